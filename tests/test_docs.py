"""Every command shown in README and docs is run, in page order, with the output shown.

What a page may hold, in fenced blocks:

* ```sh: commands, each of which must succeed.
* ```console: commands after `$ `, each with the lines it is to print: as they stand in the
  page, in that order. `...` stands for anything, a line may be a part of the printed one,
  and other lines may come between. A command that is to fail ends in `|| echo "exit code $?"`.
* ```{code-block} with `:caption: NAME`: a file, which is written; with `:caption: log`, lines that
  the running server is to log next, matched in the same way.

A page begins in a folder of its own, which is that of the tutorial when one has followed it; the
tutorial begins in an empty one. A command that starts a server goes on until the next one does,
or the page ends: it is stopped with Ctrl-C. Port 8000 stands for a free one.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Starter
from server import environment, wait_for, write_files

from replica_plugin.config.templates import CONF

ROOT = Path(__file__).parent.parent
TUTORIAL = "docs/tutorial.md"
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]

ELSEWHERE = {"README.md": 2}
"""The page's first blocks that are not run here: .ci/run runs the README's two, as they stand."""

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
CAPTION = re.compile(r":caption: (\S+)\n\n?")
COMMAND = re.compile(r"^\$ (?P<command>(?:.*\\\n)*.*)\n(?P<shown>(?:(?!\$ ).*\n)*)", re.M)
SERVER = re.compile(r"(\w+=\S+ )*(gunicorn|flask .*run)\b(?!.*(--check-config|\|\|))")
CROWD = "& done"
"""In a command that sends requests at once; it, or the next command, shows how they met."""
PORT = re.compile(r"\b8000\b")
LOG = "log"
PATIENCE = 60.0

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="the docs ask with curl")


@dataclass
class Step:
    """A command and what is shown for it, or a file and its text; `line` is where it stands."""

    line: int
    command: str = ""
    shown: str = ""
    file: str = ""
    text: str = ""


def steps(page: str) -> Iterator[Step]:
    """What a reader who follows a page does."""
    source = (ROOT / page).read_text()
    elsewhere = ELSEWHERE.get(page, 0)
    for fence in FENCE.finditer(source):
        line = source.count("\n", 0, fence.start()) + 2
        text = textwrap.dedent(fence["text"])
        if fence["language"] in ("sh", "console") and elsewhere:
            elsewhere -= 1
        elif fence["language"] == "sh":
            yield from (Step(line + n, each) for n, each in enumerate(text.splitlines()))
        elif fence["language"] == "console":
            for each in COMMAND.finditer(text):
                at = line + text.count("\n", 0, each.start())
                yield Step(at, each["command"], each["shown"])
        elif caption := CAPTION.match(text):
            yield Step(line, file=caption[1], text=text[caption.end() :])


class Reader:
    """Somebody who follows a page in a folder of their own."""

    def __init__(self, page: str, folder: Path, env: Mapping[str, str]) -> None:
        self._page, self._folder = page, folder
        self._log = folder / "server.log"
        self._seen = 0
        # Held, so that nobody else gets it; a server may bind it, too, while we do not listen.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port = self._held.getsockname()[1]
        self._env = environment(
            {
                **env,
                "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
                "PYTHONPATH": None,
                "COLUMNS": "80",
                "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{self.port}",
                "FLASK_RUN_PORT": str(self.port),
            }
        )
        self._server: subprocess.Popen[bytes] | None = None
        self._crowd: Step | None = None

    def follow(self) -> None:
        try:
            for step in steps(self._page):
                self._do(step)
        finally:
            self._stop_server()
            self._held.close()

    def _do(self, step: Step) -> None:
        if step.file == LOG:
            self._await_log(step)
        elif step.file:
            write_files(self._folder, {step.file: self._with_port(step.text)})
        elif SERVER.match(step.command):
            self._start_server(step)
        else:
            self._run(step)

    def _run(self, step: Step) -> None:
        """A crowd may come too late to meet, on a busy machine: then it comes again, twice."""
        before, self._crowd = self._crowd, step if CROWD in step.command else None
        for time in range(3 if before or self._crowd else 1):
            if time and before:
                self._print(before)
            printed = self._print(step)
            missing = self._compare(step.shown, printed.splitlines())[0]
            if not missing:
                return
        self._fail(step, f"does not print, where the page shows it: {missing}", printed)

    def _print(self, step: Step) -> str:
        """Run a command: what it printed."""
        try:
            done = subprocess.run(
                ["bash", "-c", self._with_port(step.command)],
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired as late:
            self._fail(step, f"has not ended within {PATIENCE:g} s", str(late.output))
        if done.returncode:
            self._fail(step, f"exit code {done.returncode}", done.stdout)
        return done.stdout

    def _start_server(self, step: Step) -> None:
        """Until it answers, and has logged what is shown."""
        self._stop_server()
        self._log.unlink(missing_ok=True)
        with open(self._log, "wb") as file:
            self._server = server = subprocess.Popen(
                ["bash", "-c", f"exec env {self._with_port(step.command)}"],
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        wait_for(lambda: self._answers() or server.poll() is not None, step.command, PATIENCE)
        if server.poll() is not None:
            self._fail(step, f"exit code {server.returncode}", self._log.read_text())
        self._seen = 0
        self._await_log(step)

    def _await_log(self, step: Step) -> None:
        """Until the server has logged these lines, after those seen before."""
        shown = step.shown or step.text

        def compare() -> tuple[str, int]:
            return self._compare(shown, self._log.read_text().splitlines()[self._seen :])

        with suppress(AssertionError):
            wait_for(lambda: not compare()[0], "the log", PATIENCE)
        missing, seen = compare()
        if missing:
            self._fail(step, f"the server does not log: {missing}", self._log.read_text())
        self._seen += seen

    def _answers(self) -> bool:
        """Whether it answers; read to the connection's end, so that no request is left in it."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"GET /-/readyz HTTP/1.0\r\n\r\n")
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError:
            return False
        return answer[8:13] in (b" 200 ", b" 404 ")

    def _stop_server(self) -> None:
        if self._server is not None and self._server.poll() is None:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(PATIENCE)

    def _compare(self, shown: str, printed: list[str]) -> tuple[str, int]:
        """The first line shown that was not printed after the one before, and how far we got."""
        lines = enumerate(printed, 1)
        seen = 0
        for each in self._with_port(shown).splitlines():
            pattern = ".*".join(map(re.escape, each.split("...")))
            seen = next((number for number, line in lines if re.search(pattern, line)), 0)
            if not seen:
                return each, 0
        return "", seen

    def _with_port(self, text: str) -> str:
        return PORT.sub(str(self.port), text)

    def _fail(self, step: Step, why: str, output: str) -> None:
        what = f"$ {step.command}" if step.command else step.file
        pytest.fail(f"{self._page}:{step.line}: {what}\n{why}\n\n{output}", False)


@needs_curl
@pytest.mark.parametrize("page", [page for page in PAGES if any(s.command for s in steps(page))])
def test_the_commands_of_a_page_do_what_it_shows(page: str, start: Starter) -> None:
    folder = start.folder("reader")
    if page != TUTORIAL:
        files = {step.file: step.text for step in steps(TUTORIAL) if step.file}
        write_files(folder, {**files, "replica_plugin.conf": CONF})
    env = {"PATH": "/usr/bin:/bin", **start.environment}
    Reader(page, folder, env).follow()


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_stand_in_blocks_that_are_run(page: str) -> None:
    languages = {fence["language"] for fence in FENCE.finditer((ROOT / page).read_text())}
    assert not languages & {"", "bash", "shell", "shell-session", "zsh"}
