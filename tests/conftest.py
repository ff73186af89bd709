"""Fixtures: servers that are stopped, and that must leave nothing behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from server import Ended, Server, all_pids, environ_of, run_to_its_end, wait_for
from stage import Stage
from unprivileged import install as install  # a fixture for everyone

Start = Callable[..., Server]

hypothesis.settings.register_profile("long", max_examples=20_000, deadline=None)
"""For hours: `pytest --hypothesis-profile=long tests/test_fuzz_*.py`."""


def pytest_configure() -> None:
    """Who starts us in a shell's background has INT and QUIT ignored, by all that we start, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` means: more than there are CPUs, since most tests wait most of their time."""
    return 2 * (os.cpu_count() or 1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: others fill the CPUs meanwhile, and nobody waits for one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


class Starter:
    """Starts servers with a stage of their own, and stops them."""

    def __init__(self, folder: Path, mode: str) -> None:
        self._folder = folder
        self.mode = mode
        self.stage = Stage(folder)
        self.servers: list[Server] = []
        self._ended: list[Ended] = []

    def __call__(self, *arguments: str, **options: Any) -> Server:
        folder = self._folder / f"server{len(self.servers)}"
        folder.mkdir()
        env = {**self.environment, **options.pop("env", {})}
        if self.mode != "thread":
            options = {"mode": self.mode, "config": {}, **options}
        kind = options.pop("kind", Server)
        server = kind(folder, *arguments, env=env, **options)
        self.servers.append(server)
        return server

    def close(self) -> None:
        self.stage.close()
        for server in self.servers:
            if server.process.poll() is None:
                try:
                    server.stop(signal.SIGQUIT)
                except BaseException:
                    server.kill()
                    raise
            server.close()
        self.wait_nothing_left()

    def wait_nothing_left(self) -> None:
        """Wait until no process lives that has our stage in its environment."""
        try:
            wait_for(lambda: not self.left(), "no process left")
        except AssertionError:
            for pid in self.left():
                os.kill(pid, signal.SIGKILL)
            raise

    def left(self) -> list[int]:
        mark = f"STAGE={self.stage.path}\0".encode()
        return [pid for pid in all_pids() if mark in environ_of(pid)]

    def folder(self, name: str) -> Path:
        """A folder of its own for something started by hand, with `environment`."""
        folder = self._folder / name
        folder.mkdir()
        return folder

    @property
    def environment(self) -> dict[str, str]:
        """Stock gunicorn opens a control socket in the user's home."""
        return {"STAGE": self.stage.path, "HOME": str(self._folder)}

    def to_its_end(self, *arguments: str, **options: Any) -> Ended:
        """Run a gunicorn that ends by itself."""
        folder = self._folder / f"ended{len(self._ended)}"
        folder.mkdir()
        env = {**self.environment, **options.pop("env", {})}
        self._ended.append(run_to_its_end(folder, *arguments, env=env, **options))
        return self._ended[-1]


@pytest.fixture(scope="module")
def mode(request: pytest.FixtureRequest) -> str:
    """The mode of the servers of `start`: what server.IN_BOTH_MODES says, or thread."""
    return str(getattr(request, "param", "thread"))


@pytest.fixture
def start(tmp_path: Path, mode: str) -> Iterator[Starter]:
    """Start servers for one test: `start("--keep-alive", "5", config={...})`."""
    starter = Starter(tmp_path, mode)
    yield starter
    starter.close()


@pytest.fixture
def stage(start: Starter) -> Stage:
    """Where the requests of servers of `start` begin."""
    return start.stage


@pytest.fixture(scope="module")
def module_start(tmp_path_factory: pytest.TempPathFactory, mode: str) -> Iterator[Starter]:
    """Start servers that the tests of a module share."""
    starter = Starter(tmp_path_factory.mktemp("servers"), mode)
    yield starter
    starter.close()


@pytest.fixture(params=[0, 1], ids=["tcp", "unix"])
def which(request: pytest.FixtureRequest) -> int:
    """Which of a server's binds, if it has both."""
    return int(request.param)


@pytest.fixture
def which_by_mode(mode: str) -> int:
    """TCP in thread mode, the Unix socket in gevent mode: for a module, as its `which`, whose tests
    start a server each. Only slots know of modes, so that four pairs would repeat what two show;
    the tests of HTTP, with servers they share, have all four.
    """
    return int(mode == "gevent")
