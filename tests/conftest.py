"""Fixtures: servers that are stopped, and that must leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from server import Server
from stage import Stage

Start = Callable[..., Server]


class Starter:
    """Starts servers with a stage of their own, and stops them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.stage = Stage(folder)
        self.servers: list[Server] = []

    def __call__(self, *arguments: str, **options: Any) -> Server:
        folder = self._folder / f"server{len(self.servers)}"
        folder.mkdir()
        env = {"STAGE": self.stage.path, **options.pop("env", {})}
        server = Server(folder, *arguments, env=env, **options)
        self.servers.append(server)
        return server

    def close(self) -> None:
        self.stage.close()
        for server in self.servers:
            if server.process.poll() is None:
                try:
                    server.stop()
                except BaseException:
                    server.kill()
                    raise


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Start servers for one test: `start("--keep-alive", "5", config={...})`."""
    starter = Starter(tmp_path)
    yield starter
    starter.close()


@pytest.fixture
def stage(start: Starter) -> Stage:
    """Where the requests of servers of `start` begin."""
    return start.stage


@pytest.fixture(scope="module")
def module_start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Start servers that the tests of a module share."""
    starter = Starter(tmp_path_factory.mktemp("servers"))
    yield starter
    starter.close()


@pytest.fixture(params=[0, 1], ids=["tcp", "unix"])
def which(request: pytest.FixtureRequest) -> int:
    """Which of a server's binds, if it has both."""
    return int(request.param)
