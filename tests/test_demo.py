"""The demo: its chart and sentences from given rows, and a real run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from replica_plugin import demo
from replica_plugin.demo.burst import Row, faults, name_slots, sentence
from replica_plugin.demo.chart import ASCII, UNICODE, choose_glyphs, colour, draw
from replica_plugin.demo.server import DemoError, Server

DEADLINE = 120
COMMAND = [sys.executable, "-m", "replica_plugin", "demo"]


def row(pid: int, thread: int, begin: int, end: int) -> Row:
    """A request sent at 0 ms, by the demo's clock, that began and ended at these ms."""
    return Row(100, 100 + begin / 1000, 100 + end / 1000, pid, thread, prediction=7, truth=7)


FOUR = [row(10, 1, 2, 180), row(10, 2, 3, 220), row(11, 3, 1, 260), row(11, 4, 4, 300)]
FIVE = [*FOUR, row(10, 1, 182, 530)]


def test_chart_puts_a_waiting_request_below_the_one_it_waited_for() -> None:
    assert draw(FIVE, name_slots(FIVE), 60, UNICODE) == "\n".join(
        [
            "5 requests sent together (░ waiting, █ running):",
            "process 1, thread 1  █████████████",
            "process 1, thread 1  ░░░░░░░░░░░░░██████████████████████████",
            "process 1, thread 2  ████████████████",
            "process 2, thread 1  ███████████████████",
            "process 2, thread 2  ██████████████████████",
            "                     ┬──────────────┬─────────────┬─────────",
            "                     0 ms           200 ms        400 ms",
        ]
    )


def test_chart_without_unicode_is_drawn_in_ascii() -> None:
    rows = [row(10, 1, 30, 60), row(11, 1, 0, 90)]
    assert draw(rows, name_slots(rows), 60, ASCII) == "\n".join(
        [
            "2 requests sent together (. waiting, # running):",
            "process 1, thread 1  .............#############",
            "process 2, thread 1  #######################################",
            "                     +--------+-------+--------+--------+---",
            "                     0 ms     20 ms   40 ms    60 ms",
        ]
    )


@pytest.mark.parametrize(
    ("encoding", "glyphs"),
    [("utf-8", UNICODE), ("ascii", ASCII), ("latin-1", ASCII), (None, ASCII)],
)
def test_glyphs_are_those_the_encoding_has(encoding: str | None, glyphs: object) -> None:
    assert choose_glyphs(encoding) is glyphs


def test_colour_paints_waiting_yellow_and_running_green() -> None:
    assert colour("thread 1  ..##", ASCII) == "thread 1  \x1b[33m..\x1b[0m\x1b[32m##\x1b[0m"


def test_burst_of_fewer_than_the_slots_all_began_at_once() -> None:
    rows = FOUR[:3]
    assert sentence(rows, name_slots(FOUR)) == "all 3 began at once (within 3 ms)"
    assert faults(rows, name_slots(FOUR), 2, 2) == []


def test_burst_of_one_more_than_the_slots_one_waited_for_the_first_free() -> None:
    names = name_slots(FIVE)
    expected = "4 began at once (within 4 ms), 1 waited 182 ms for process 1, thread 1"
    assert sentence(FIVE, names) == expected
    assert faults(FIVE, names, 2, 2) == []


def test_request_stranded_behind_a_busy_thread_while_one_is_idle_breaks_the_promise() -> None:
    rows = [FOUR[0], FOUR[1], row(10, 1, 185, 400)]
    names = name_slots(rows)
    expected = "2 began at once (within 3 ms), 1 waited 185 ms for process 1, thread 1"
    assert sentence(rows, names) == expected
    assert faults(rows, names, 2, 2) == ["3 should have begun at once, 2 did"]


def test_two_late_requests_are_both_told() -> None:
    rows = [FOUR[0], row(10, 1, 185, 400), row(10, 1, 405, 500)]
    assert sentence(rows, name_slots(rows)) == (
        "1 began at once (within 2 ms), "
        "2 waited 185 ms for process 1, thread 1; 405 ms for process 1, thread 1"
    )


def test_waiting_for_another_slot_than_the_first_free_breaks_the_promise() -> None:
    rows = [*FOUR, row(11, 4, 301, 500)]
    assert faults(rows, name_slots(rows), 2, 2) == [
        "process 1, thread 1 was free first, the waiting request got process 2, thread 2"
    ]


def test_slots_freed_within_the_tie_are_both_first() -> None:
    rows = [*FOUR[:1], replace(FOUR[1], end=100.195), *FOUR[2:], row(10, 2, 200, 500)]
    assert faults(rows, name_slots(rows), 2, 2) == []


def test_more_running_than_slots_breaks_the_promise() -> None:
    rows = [*FOUR, row(10, 5, 5, 340)]
    assert faults(rows, name_slots(rows), 2, 2) == [
        "5 ran at a time, 4 may",
        "3 ran at a time in one process, 2 may",
    ]


def test_missing_package_is_told_with_the_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert demo.main([]) == 2
    expected = "The demo needs scikit-learn: pip install 'replica-plugin[demo]'\n"
    assert capsys.readouterr() == ("", expected)


def test_server_that_ends_early_is_told_with_its_log(tmp_path: Path) -> None:
    arguments = ["-c", "python:no_such_module", "no_such_app:app"]
    with Server(arguments, tmp_path) as server, pytest.raises(DemoError) as caught:
        server.wait_until_ready(DEADLINE)
    said = str(caught.value).splitlines()
    assert said[0] == (
        "The server ended with exit code 1 before it was listening. The server's log:"
    )
    assert any("no_such_module" in line for line in said[1:])


def test_demo_shows_what_two_by_two_promises(tmp_path: Path) -> None:
    done = subprocess.run(
        COMMAND, env=_environment(tmp_path), capture_output=True, text=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    said = " ".join(done.stdout.split())
    assert re.search(r"all 3 began at once \(within \d+ ms\)\.", said)
    one = r"1 waited \d+ ms for process [12], thread [12]"
    assert re.search(rf"4 began at once \(within \d+ ms\), {one}\.", said)
    assert max(map(len, done.stdout.splitlines())) <= 60
    assert _left_in(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_that_is_interrupted_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    child = subprocess.Popen(COMMAND, env=_environment(tmp_path), stdout=subprocess.DEVNULL)
    try:
        _wait(lambda: any("Listening" in log.read_text() for log in tmp_path.glob("*/server.log")))
        child.send_signal(number)
        assert child.wait(DEADLINE) == 128 + number
    finally:
        child.kill()
        child.wait()
    assert _left_in(tmp_path) == []


def _environment(folder: Path) -> dict[str, str]:
    """The demo works in `folder`; the settings are traps it must not pass on."""
    traps = {"REPLICA_PROCESSES_PER_REPLICA": "1", "GUNICORN_CMD_ARGS": "--threads=9"}
    return {**os.environ, **traps, "TMPDIR": str(folder), "COLUMNS": "60"}


def _wait(state: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not state():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _left_in(folder: Path) -> list[str]:
    """Files in `folder`, and processes that have their working directory or a file open there."""
    links = [*Path("/proc").glob("[0-9]*/cwd"), *Path("/proc").glob("[0-9]*/fd/*")]
    targets = [(link, _target(link)) for link in links]
    files = [str(path) for path in folder.iterdir()]
    return files + [str(link) for link, target in targets if target.startswith(str(folder))]


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # a process that has ended meanwhile, or another user's
        return ""
