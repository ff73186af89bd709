"""The demo: its pictures and sentences from given rows, and a real run."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from server import show_demo

from replica_plugin import demo
from replica_plugin.demo import contest
from replica_plugin.demo.bars import lay_out
from replica_plugin.demo.burst import Row, faults, name_slots, sentence
from replica_plugin.demo.chart import ASCII, UNICODE, Glyphs, choose_glyphs, colour, draw, mark
from replica_plugin.demo.contest import Contestant
from replica_plugin.demo.report import Progress, as_json, charts
from replica_plugin.demo.server import DemoError, Server
from replica_plugin.demo.svg import STYLE, picture
from replica_plugin.demo.trial import Plan, Trial

DEADLINE = 120
COMMAND = [sys.executable, "-m", "replica_plugin", "demo"]
TWO_BY_TWO = Plan(processes=2, threads=2, rounds=2)


def row(pid: int, thread: int, begin: int, end: int) -> Row:
    """A request sent at 0 ms, by the demo's clock, that ran and was answered at these ms."""
    began, ended = 100 + begin / 1000, 100 + end / 1000
    return Row(100, ended, began, ended, pid, thread, prediction=7, truth=7)


FOUR = [row(10, 1, 2, 180), row(10, 2, 3, 220), row(11, 3, 1, 260), row(11, 4, 4, 300)]
FIVE = [*FOUR, row(10, 1, 182, 530)]
STRANDED = [*FOUR[:3], row(10, 1, 182, 530)]
"""Four, of which one waits although a thread of process 2 is idle."""


def trial(name: str, *rounds: list[Row]) -> Trial:
    made = Trial(name, TWO_BY_TWO)
    for rows in rounds:
        made.add(rows)
    return made


STOCK = trial("stock gunicorn", STRANDED, FOUR, [*STRANDED, row(10, 2, 225, 430)], FIVE)
OURS = trial("replica-plugin", FOUR, FOUR, FIVE, FIVE)


def drawn(rows: Sequence[Row], glyphs: Glyphs) -> str:
    names = name_slots(rows)
    bars = lay_out(rows, names, [*names.values(), "process 3, thread 1"])
    return draw(bars, max(bar.end for bar in bars), 60, glyphs)


def test_chart_puts_a_waiting_request_below_the_one_it_waited_for() -> None:
    assert drawn(FIVE, UNICODE) == "\n".join(
        [
            "process 1, thread 1  █████████████",
            "process 1, thread 1  ░░░░░░░░░░░░░██████████████████████████",
            "process 1, thread 2  ████████████████",
            "process 2, thread 1  ███████████████████",
            "process 2, thread 2  ██████████████████████",
            "process 3, thread 1  (idle)",
            "                     ┬──────────────┬─────────────┬─────────",
            "                     0 ms           200 ms        400 ms",
        ]
    )


def test_chart_without_unicode_is_drawn_in_ascii() -> None:
    assert drawn([row(10, 1, 30, 60), row(11, 1, 0, 90)], ASCII) == "\n".join(
        [
            "process 1, thread 1  .............#############",
            "process 2, thread 1  #######################################",
            "process 3, thread 1  (idle)",
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


@pytest.mark.parametrize(
    ("right", "glyphs", "coloured", "expected"),
    [
        (True, UNICODE, False, "✓"),
        (False, ASCII, False, "n"),
        (False, UNICODE, True, "\x1b[31m✗\x1b[0m"),
    ],
)
def test_each_round_has_a_mark(right: bool, glyphs: Glyphs, coloured: bool, expected: str) -> None:
    assert mark(right, glyphs, coloured) == expected


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


def test_many_late_requests_are_told_by_their_extremes() -> None:
    rows = [FOUR[0], *(row(10, 1, 185 + late, 400 + late) for late in (0, 100, 200, 300))]
    expected = "1 began at once (within 2 ms), 4 waited 185 ms to 485 ms"
    assert sentence(rows, name_slots(rows)) == expected


def test_waiting_for_another_slot_than_the_first_free_breaks_the_promise() -> None:
    rows = [*FOUR, row(11, 4, 301, 500)]
    assert faults(rows, name_slots(rows), 2, 2) == [
        "process 1, thread 1 was free first, the waiting request got process 2, thread 2"
    ]


def test_slots_freed_within_the_tie_are_both_first() -> None:
    rows = [*FOUR[:1], replace(FOUR[1], answered=100.195), *FOUR[2:], row(10, 2, 200, 500)]
    assert faults(rows, name_slots(rows), 2, 2) == []


def test_more_running_than_slots_breaks_the_promise() -> None:
    rows = [*FOUR, row(10, 5, 5, 340)]
    assert faults(rows, name_slots(rows), 2, 2) == [
        "5 ran at a time, 4 may",
        "3 ran at a time in one process, 2 may",
    ]


def test_share_is_that_of_the_rounds_that_went_right() -> None:
    told = [(t.share(4), t.right(4), t.share(5)) for t in (STOCK, OURS)]
    assert told == [
        ("1 of 2 rounds", [False, True], "1 of 2 rounds"),
        ("2 of 2 rounds", [True, True], "2 of 2 rounds"),
    ]


def test_picture_is_of_the_largest_burst_of_which_fewest_began_at_once() -> None:
    assert STOCK.worst() == [*STRANDED, row(10, 2, 225, 430)]


def test_threads_that_ran_nothing_while_requests_waited_are_told() -> None:
    assert STOCK.sentence(STRANDED) == (
        "3 began at once (within 3 ms), 1 waited 182 ms for process 1, thread 1, "
        "while 1 thread ran nothing"
    )
    assert OURS.sentence(FOUR[:2]) == "all 2 began at once (within 3 ms)"


def test_thread_that_never_ran_anything_is_drawn_all_the_same() -> None:
    lonely = trial("stock gunicorn", [row(10, 1, 1, 100)])
    lanes = [bar.lane for bar in lonely.bars(lonely.worst()) if bar.idle]
    assert lanes == ["process 1, thread 2", "process 2, thread 1", "process 2, thread 2"]


def test_report_shows_the_worst_of_both_on_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = charts(STOCK, OURS, sys.__stdout__)
    titles = re.findall("^.*worst round.*$", told, re.MULTILINE)
    assert [title.partition(" (")[0] for title in titles] == [
        "stock gunicorn, the worst round of 5 requests",
        "replica-plugin, the worst round of 5 requests",
    ]
    axes = re.findall("^ .*100 ms.*$", told, re.MULTILINE)
    assert len(axes) == 2
    assert len(set(axes)) == 1


@pytest.mark.parametrize(("load", "hint"), [(2.0, False), (9.26, True)])
def test_broken_promise_on_a_machine_with_other_work_comes_with_a_hint(
    monkeypatch: pytest.MonkeyPatch, load: float, hint: bool
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    told = " ".join(charts(STOCK, STOCK, sys.__stdout__).split())
    assert ("But the load is 9.3 on 2 CPUs: try again with less other work." in told) == hint
    assert "But the load" not in charts(STOCK, OURS, sys.__stdout__)


def test_stock_gunicorn_that_did_as_well_is_told_to_have() -> None:
    told = " ".join(charts(OURS, OURS, sys.__stdout__).split())
    assert "Stock gunicorn got every round right this time." in told
    assert "Stock gunicorn got" not in charts(STOCK, OURS, sys.__stdout__)


def test_stock_gunicorn_of_one_process_is_told_to_have_one_queue() -> None:
    one = Trial("stock gunicorn", Plan(processes=1, threads=1, rounds=1))
    one.add([row(10, 1, 1, 100)])
    assert "with one process there is one queue" in " ".join(
        charts(one, one, sys.__stdout__).split()
    )


def test_json_has_every_request_of_both() -> None:
    told = json.loads(as_json(STOCK, OURS))
    assert (told["processes"], told["threads"], told["rounds"]) == (2, 2, 2)
    assert [server["server"] for server in told["servers"]] == ["stock gunicorn", "replica-plugin"]
    first = told["servers"][0]["bursts"][0]
    assert (first["size"], len(first["rows"])) == (4, 4)
    assert first["broken"] == ["4 should have begun at once, 3 did"]
    assert [burst["broken"] for burst in told["servers"][1]["bursts"]] == [[]] * 4


def test_svg_has_a_bar_for_each_request_and_idle_thread_and_a_mark_for_each_round() -> None:
    counts = _classes(picture(STOCK, OURS))
    legend = 1
    assert counts["running"] == 5 + 5 + legend
    assert counts["idle"] == 1 + legend
    assert (counts["right"], counts["wrong"]) == (2 + 4, 2)


def test_svg_tells_the_shares() -> None:
    root = ElementTree.fromstring(picture(STOCK, OURS))
    told = [element.text for element in root.iter() if element.get("class") == "strong"]
    assert told == ["1 of 2 rounds", "1 of 2 rounds", "2 of 2 rounds", "2 of 2 rounds"]


def test_svg_stays_within_its_borders() -> None:
    root = ElementTree.fromstring(picture(STOCK, OURS))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter():
        right = float(element.get("x", 0)) + float(element.get("width", 0))
        bottom = float(element.get("y", 0)) + float(element.get("height", 0))
        assert 0 < right <= width or "x" not in element.attrib
        assert bottom <= height


def test_svg_has_nothing_that_a_page_would_not_show() -> None:
    svg = picture(STOCK, OURS)
    assert "prefers-color-scheme: dark" in svg
    assert not re.search(r"<script|@import|@font-face|href|url\((?!#)|<foreignObject", svg)


def test_readme_shows_the_demo_as_it_is() -> None:
    root = Path(__file__).parent.parent
    readme = (root / "README.md").read_text()
    assert "](docs/demo.svg)" in readme
    assert ElementTree.parse(root / "docs/demo.svg").findtext("{*}style") == STYLE
    assert all(f"\n{TWO_BY_TWO.claim(size)}:\n" in readme for size in TWO_BY_TWO.sizes)


LATE = [*FOUR[:3], replace(FOUR[3], sent=100.06)]


def test_burst_that_was_not_sent_together_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bursts = iter([LATE, LATE, FOUR])
    monkeypatch.setattr(contest, "send", lambda port, size: next(bursts))
    assert Contestant(Server([], tmp_path), 1, OURS).burst(4) == FOUR


def test_machine_too_busy_to_send_a_burst_together_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(contest, "send", lambda port, size: LATE)
    with pytest.raises(DemoError) as caught:
        Contestant(Server([], tmp_path), 1, OURS).burst(4)
    assert str(caught.value) == (
        "This machine is too busy to send 4 requests together, 10 times in a row: "
        "try again with less other work"
    )


@pytest.mark.parametrize(("stock", "ours", "status"), [(STOCK, OURS, 0), (OURS, STOCK, 1)])
def test_only_a_promise_of_ours_that_is_broken_fails_the_demo(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stock: Trial,
    ours: Trial,
    status: int,
) -> None:
    monkeypatch.setattr(demo, "compare", lambda plan, progress: (stock, ours))
    assert demo.main([]) == status
    told = " ".join(capsys.readouterr().out.split())
    broken = "Promise broken: 4 requests, round 1: 4 should have begun at once, 3 did."
    assert (broken in told) == bool(status)


def test_picture_that_cannot_be_written_is_told_and_fails_the_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "compare", lambda plan, progress: (STOCK, OURS))
    assert demo.main(["--svg", "/dev/full"]) == 1
    expected = f"replica-plugin: cannot write /dev/full: {os.strerror(errno.ENOSPC)}\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing/picture.svg", "there is no folder {0}/missing, make it first"),
        (".", "{0}/. is a folder, name a file"),
    ],
)
def test_picture_that_could_not_be_written_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, told: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(["--svg", f"{tmp_path}/{name}"])
    assert caught.value.code == 2
    expected = f"replica-plugin demo: error: argument --svg: {told.format(tmp_path)}"
    assert capsys.readouterr().err.splitlines()[-1] == expected


@pytest.mark.parametrize("seen", ["0", "31", "-1", "x"])
def test_number_of_rounds_that_makes_no_sense_is_told(
    capsys: pytest.CaptureFixture[str], seen: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main([f"--rounds={seen}"])
    assert caught.value.code == 2
    expected = f"replica-plugin demo: error: argument --rounds: must be 1 to 30, not {seen}"
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_progress_without_a_stream_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(None)
    progress.say("x")
    progress.mark(True)
    assert capsys.readouterr() == ("", "")


def _classes(svg: str) -> Counter[str]:
    """How many elements of a picture there are of each class."""
    return Counter(element.get("class", "") for element in ElementTree.fromstring(svg).iter())


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


def test_demo_shows_both_and_that_ours_keeps_its_promises(tmp_path: Path) -> None:
    work, svg = _folder(tmp_path / "work"), tmp_path / "demo.svg"
    command = [*COMMAND, "--rounds", "1", "--svg", str(svg)]
    env, quiet = _environment(work), {"capture_output": True, "text": True, "timeout": DEADLINE}
    done = show_demo(lambda: subprocess.run(command, env=env, **quiet))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    shares = re.findall(r"^  (\w+).* (\d) of 1 round$", done.stdout, re.MULTILINE)
    assert [name for name, _ in shares] == ["stock", "replica"] * 2
    assert [share for name, share in shares if name == "replica"] == ["1", "1"]
    one = r"1 waited \d+ ms for process [12], thread [12]\."
    assert re.search(rf"4 began at once \(within \d+ ms\), {one}", " ".join(done.stdout.split()))
    assert max(map(len, done.stdout.splitlines())) <= 60
    assert not re.search("[\r\x1b]", done.stdout)
    assert _classes(svg.read_text())["running"] >= 10
    assert _left_in(work) == []


@pytest.mark.parametrize(
    ("number", "reached"),
    [(signal.SIGINT, "Starting"), (signal.SIGINT, "ready."), (signal.SIGTERM, "ready.")],
)
def test_demo_that_is_interrupted_leaves_nothing(
    tmp_path: Path, number: signal.Signals, reached: str
) -> None:
    work, out = _folder(tmp_path / "work"), tmp_path / "out"
    with out.open("w") as stdout:
        # A test run in the background of a script ignores SIGINT, and so would the demo.
        child = subprocess.Popen(
            [*COMMAND, "--rounds", "30"],
            env=_environment(work),
            stdout=stdout,
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        )
    try:
        _wait(lambda: reached in out.read_text() and _listening(work) == 2)
        child.send_signal(number)
        assert child.wait(DEADLINE) == 128 + number
    finally:
        child.kill()
        child.wait()
    _wait(lambda: _left_in(work) == [])


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _listening(folder: Path) -> int:
    """How many servers of a demo that works in `folder` listen."""
    return sum("Listening" in log.read_text() for log in folder.glob("*/*/server.log"))


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
