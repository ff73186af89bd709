"""Someone who does what the README of an example says, in a copy of it, on free ports.

A README's `sh` blocks are its commands; a `text` block is what the command before it prints,
with `...` for what differs from time to time.
"""

from __future__ import annotations

import argparse
import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from http.client import HTTPConnection
from importlib.metadata import metadata
from pathlib import Path
from urllib.parse import urlsplit

from conftest import Starter
from server import Server, environment, wait_for

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DEADLINE = 120
"""Seconds: an app may train its model first. It only ever fails tests."""

FOREIGN = ("AWS_", "FLASK_", "MODELS")
MACHINE: dict[str, str | None] = {n: None for n in os.environ if n.startswith(FOREIGN)}
MACHINE["NO_PROXY"] = "127.0.0.1"
"""What the machine's environment must not tell the examples, and what it must."""


@dataclass
class Command:
    words: list[str]
    output: str | None = None
    printed: str = ""

    def is_true(self) -> bool:
        """Whether it printed what the README says, if that says anything."""
        same = doctest.OutputChecker().check_output
        return self.output is None or same(self.output, self.printed, doctest.ELLIPSIS)


def read(readme: str) -> list[Command]:
    """The commands of a README, in order."""
    found: list[Command] = []
    for kind, text in re.findall(r"^```(\w+)\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL):
        if kind == "sh":
            found += [Command(shlex.split(line)) for line in text.splitlines()]
        elif kind == "text":
            found[-1].output = text
    return found


class Reader:
    """Runs an example's commands; a context manager that ends what it started.

    The gunicorn is the starter's to end.
    """

    server: Server

    def __init__(self, example: str, start: Starter) -> None:
        self.name = example
        self.folder = start.folder(example)
        ignore = shutil.ignore_patterns("__pycache__", "instance")
        shutil.copytree(EXAMPLES / example, self.folder, dirs_exist_ok=True, ignore=ignore)
        with open(self.folder / "replica_plugin.conf", "a") as conf:
            conf.write("from staged_hook import post_worker_init\n")
        self.commands = read((self.folder / "README.md").read_text())
        self.background: dict[str, subprocess.Popen[bytes]] = {}
        self._start = start
        self._env = start.environment | MACHINE
        self.ports: dict[int, int] = {}  # those in the README: those that were free

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.background.values():
            process.kill()
            process.wait()

    def follow(self) -> None:
        """The README from its beginning to its end."""
        for command in self.commands:
            command.printed = self.run(command.words)

    def run(self, words: list[str]) -> str:
        """One command; what it printed."""
        match words:
            case ["pip", "install", what]:
                extras = re.fullmatch(r"\.\./\.\.\[([\w,]+)\]", what)[1].split(",")
                assert {*extras} <= {*metadata("replica-plugin").get_all("Provides-Extra")}
                return ""
            case ["moto_server", "-p", port]:
                (real,) = self._serve("moto_server", ["-m", "moto.server", "-p", "0"])
                self.ports[int(port)] = real
                self._env["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{real}"
                return ""
            case ["python", "models.py", *ports]:
                reals = self._serve("models", ["models.py", *("0" for _ in ports)], len(ports))
                self.ports |= zip(map(int, ports), reals)
                self._env["MODELS"] = " ".join(f"http://127.0.0.1:{real}" for real in reals)
                return ""
            case ["flask", "run"]:
                (self.ports[5000],) = self._serve("flask", ["-m", "flask", "run", "--port", "0"])
                return ""
            case ["gunicorn", *options, app]:
                self.ports[8000] = self._gunicorn(options, app)
                return ""
            case ["curl", *arguments]:
                return self._curl(arguments)
            case ["python", *arguments]:
                return self._python(arguments)
            case ["flask", *arguments]:
                return self._python(["-m", "flask", *arguments])
        raise AssertionError(f"no way to run {words}")

    def log(self, name: str) -> str:
        """What something in the background has printed."""
        return (self.folder / f"{name}.log").read_text()

    def _python(self, arguments: list[str]) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=environment(self._env),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _serve(self, name: str, arguments: list[str], count: int = 1) -> list[int]:
        """Start something in the background that listens on so many ports, which it prints."""
        with open(self.folder / f"{name}.log", "wb") as log:
            self.background[name] = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=environment(self._env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

        def ports() -> list[int]:
            assert self.background[name].poll() is None, self.log(name)
            found = re.findall(r"Running on http://127\.0\.0\.1:(\d+)", self.log(name))
            return [int(port) for port in found] if len(found) >= count else []

        return list(wait_for(ports, name, DEADLINE)[:count])

    def _gunicorn(self, options: list[str], app: str) -> int:
        self.server = Server(self.folder, base=tuple(options), app=app, env=self._env, ready=False)
        self._start.servers.append(self.server)
        wait_for(lambda: self.server.get("/-/readyz").status == 200, "ready", DEADLINE)
        return int(self.server.address[1])

    def _curl(self, arguments: list[str]) -> str:
        """What curl would print; not every machine has it."""
        parser = argparse.ArgumentParser()
        parser.add_argument("-H", dest="header", default="Accept: */*")
        parser.add_argument("-d", dest="data")
        parser.add_argument("url")
        asked = parser.parse_args(arguments)
        url = urlsplit(asked.url)
        name, value = asked.header.split(": ")
        connection = HTTPConnection("127.0.0.1", self.ports[url.port or 80], timeout=DEADLINE)
        try:
            method = "POST" if asked.data else "GET"
            connection.request(method, url.path, asked.data, {name: value})
            return connection.getresponse().read().decode()
        finally:
            connection.close()
