"""The chaos suite, for some seconds; and that its ledger and its app find what is wrong."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chaos.app import App, Limits, Presence, right_body
from chaos.checks import MEMORY, Usage, growth, tracebacks, unexplained
from chaos.ledger import Death, Entry, Ledger, Run
from chaos.rules import Judge
from server import TESTS, environment

from replica_plugin import stats
from replica_plugin.stats import Stats

LONGEST = 300  # seconds, which only ever fail the test
SEEDS = {"thread": "2", "gevent": "10"}
"""Always the same, unless CHAOS_SEED is set: what a change breaks is not to depend on luck.

These have many faults, one a change of mode, the other an upgrade at its end.
"""
PROCESS, DISPATCHER = 100, 200  # pids


@pytest.mark.slow
@pytest.mark.parametrize("mode", SEEDS)
def test_some_seconds_of_chaos_is_accounted_for(mode):
    seed = os.environ.get("CHAOS_SEED", SEEDS[mode])
    options = ["--minutes", "0.05", "--mode", mode, "--seed", seed]
    command = [sys.executable, str(TESTS / "chaos"), *options]
    env = environment({"CHAOS_MOMENT": "1"})  # beside all other tests, on any machine
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LONGEST)
    assert run.returncode == 0, run.stdout + run.stderr


# The ledger.


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    ledger.bounds = {1}
    return ledger


@pytest.fixture
def entry(ledger) -> Entry:
    """A request from second 10 to second 11."""
    entry = ledger.open("plain", "nap", "5")
    entry.connected_at = entry.began_at = 10.0
    entry.ended_at = 11.0
    return entry


def answered(entry: Entry, status: int = 200, body: bytes | None = None) -> None:
    entry.outcome, entry.status = "answered", status
    right = right_body(entry.action, entry.number, entry.argument, entry.sent)
    entry.body = right if body is None else body


def problems(ledger: Ledger) -> list[str]:
    """The first line of each."""
    return [problem.split("\n")[0] for problem in Judge(ledger).problems()]


def run(ledger: Ledger, entry: Entry, *times: float | None, pid: int = PROCESS) -> None:
    began, ended = times or (10.1, 10.9)
    assert began is not None
    ledger.runs[entry.number].append(Run(pid, began, ended))


def test_a_request_that_was_run_and_answered_is_right(ledger, entry):
    answered(entry)
    run(ledger, entry)
    assert problems(ledger) == []


def test_a_request_of_which_nobody_knows_is_lost(ledger, entry):
    assert problems(ledger) == ["lost: nobody knows what became of it"]


def test_a_client_that_waits_for_ever_is_a_problem(ledger, entry):
    entry.outcome = "silence"
    assert problems(ledger) == ["no rule allows: silence"]


def test_an_answer_with_the_body_of_another_is_wrong(ledger, entry):
    answered(entry, body=right_body("nap", entry.number + 1, "5", b""))
    run(ledger, entry)
    assert problems(ledger) == ["no rule allows: 200"]


def test_two_answers_to_one_request_are_one_too_many(ledger, entry):
    answered(entry)
    run(ledger, entry)
    entry.beyond = b"HTTP/1.1 200 OK\r\n"
    assert problems(ledger) == ["answered twice"]


def test_a_request_that_was_run_twice_is_a_problem_whatever_was_answered(ledger, entry):
    answered(entry)
    run(ledger, entry)
    run(ledger, entry, pid=PROCESS + 1)
    assert problems(ledger) == ["run twice"]


def test_an_answer_to_a_request_that_was_not_run_is_wrong(ledger, entry):
    answered(entry)
    assert problems(ledger) == ["no rule allows: 200"]


def test_a_request_that_was_never_sent_is_not_run(ledger, entry):
    answered(entry)
    run(ledger, entry)
    ledger.runs[99].append(Run(PROCESS, 1.0, 2.0))
    assert problems(ledger) == ["run unseen: request 99 was never sent"]


def test_a_refused_request_was_not_run(ledger, entry):
    answered(entry, 503, b"No slot became free within queue_timeout (4 s).\n")
    entry.ended_at = 14.0
    assert problems(ledger) == []
    run(ledger, entry)
    assert problems(ledger) == ["no rule allows: 503"]


def test_a_refusal_for_fullness_needs_as_many_others_in_flight(ledger, entry):
    text = b"The replica is full: 1 request is in flight, as many as ... (1) admits.\n"
    answered(entry, 503, text)
    assert problems(ledger) == ["no rule allows: 503"]
    other = ledger.open("plain", "nap", "5")
    other.connected_at = other.began_at = 9.0
    other.ended_at = 10.5
    answered(other)
    run(ledger, other, 9.0, 10.4)
    assert problems(ledger) == []


def test_a_reset_needs_the_death_of_a_dispatcher_while_the_request_waited(ledger, entry):
    entry.outcome = "closed"
    assert problems(ledger) == ["no rule allows: closed"]
    ledger.deaths = [Death("dispatcher", DISPATCHER, 9.9, "SIGKILL")]
    assert problems(ledger) == ["no rule allows: closed"]
    ledger.deaths = [Death("dispatcher", DISPATCHER, 10.9, "SIGKILL")]
    assert problems(ledger) == []
    run(ledger, entry)
    assert problems(ledger) == ["no rule allows: closed"]


def test_the_death_of_a_dispatcher_before_the_last_answer_on_a_connection_excuses_nothing(
    ledger, entry
):
    entry.outcome = "closed"
    entry.connected_at, entry.idle_since = 5.0, 9.9
    ledger.deaths = [Death("dispatcher", DISPATCHER, 9.0, "SIGKILL")]
    assert problems(ledger) == ["no rule allows: closed"]
    ledger.deaths = [Death("dispatcher", DISPATCHER, 9.95, "SIGKILL")]
    assert problems(ledger) == []


def test_a_502_needs_the_death_of_its_process_for_a_cause_that_is_known(ledger, entry):
    answered(entry, 502, b"The process that was working on this request died.\n")
    run(ledger, entry, 10.1, None)
    ledger.deaths = [Death("process", PROCESS + 1, 10.5, "SIGKILL")]
    assert problems(ledger) == ["never ended, though its process lives"]
    ledger.deaths = [Death("process", PROCESS, 10.5, "")]
    assert problems(ledger) == ["no rule allows: 502"]
    ledger.deaths = [Death("process", PROCESS, 10.5, "SIGKILL")]
    assert problems(ledger) == []


def test_a_504_needs_request_timeout_to_have_passed(ledger, entry):
    answered(entry, 504, b"The app did not answer within request_timeout (2 s).\n")
    run(ledger, entry)
    assert problems(ledger) == ["no rule allows: 504"]
    entry.ended_at = 12.2
    assert problems(ledger) == []


@pytest.mark.parametrize(
    ("body", "trait"), [("header_timeout", "slow head"), ("receive_timeout", "slow body")]
)
def test_a_408_needs_a_client_that_was_slow(ledger, entry, body, trait):
    answered(entry, 408, f"... within {body} (3 s).\n".encode())
    entry.ended_at = 13.1
    assert problems(ledger) == ["no rule allows: 408"]
    entry.traits = frozenset({trait})
    assert problems(ledger) == []


def test_an_idle_connection_is_not_closed_before_keepalive_has_passed(ledger, entry):
    entry.outcome = "closed"
    entry.idle_since = 9.0
    assert problems(ledger) == ["no rule allows: closed"]
    entry.idle_since = 8.0
    assert problems(ledger) == []


def test_only_an_idle_or_a_silent_connection_may_be_closed_in_a_pause(ledger, entry):
    entry.outcome = "closed"
    ledger.pauses = [(10.5, 10.8)]
    assert problems(ledger) == ["no rule allows: closed"]
    entry.traits = frozenset({"silent"})
    assert problems(ledger) == []
    entry.traits, entry.idle_since = frozenset(), 9.9
    assert problems(ledger) == []
    ledger.pauses = [(8.0, 9.0)]
    assert problems(ledger) == ["no rule allows: closed"]


def test_a_request_is_not_overtaken_by_one_that_was_ready_later(ledger, entry):
    """Unless something happened meanwhile that hides which came first."""
    entry.sent_at, entry.ended_at = 10.0, 12.5
    answered(entry)
    run(ledger, entry, 12.0, 12.1)
    other = ledger.open("plain", "nap", "5")
    other.connected_at = other.began_at = other.sent_at = 10.5
    other.ended_at = 11.5
    answered(other)
    run(ledger, other, 11.0, 11.1)
    assert problems(ledger) == ["overtaken by one that was ready later"]
    ledger.deaths = [Death("process", PROCESS + 1, 11.2, "SIGKILL")]
    assert problems(ledger) == []
    ledger.deaths = []
    ledger.runs[other.number] = [Run(PROCESS + 1, 11.0, 11.1)]  # its own process did nothing
    assert problems(ledger) == []


def test_requests_begin_soon_after_the_death_of_a_dispatcher(ledger, entry):
    answered(entry)
    entry.sent_at = 10.0
    run(ledger, entry, 10.9, 11.0)
    ledger.spared = [9.0]
    assert problems(ledger) == []
    ledger.runs.clear()
    entry.ended_at = 19.0
    run(ledger, entry, 18.0, 18.1)
    assert problems(ledger) == ["the first request after a dispatcher began 8.0 s late"]


@pytest.mark.parametrize("outcome", ["closed", "cut"])
def test_only_a_quick_stop_may_leave_what_runs_unanswered(ledger, entry, outcome):
    entry.outcome = outcome
    run(ledger, entry, 10.1, None)
    ledger.deaths = [Death("process", PROCESS, 10.9, "")]
    ledger.stopped_at = ledger.refuses_at = 10.5
    assert problems(ledger) == [f"no rule allows: {outcome}"]
    ledger.quick = True
    assert problems(ledger) == []


def test_nobody_is_refused_while_another_master_goes_on(ledger, entry):
    entry.outcome = "refused"
    ledger.stopped_at = 10.5
    assert problems(ledger) == ["no rule allows: refused"]
    ledger.refuses_at = 10.5
    assert problems(ledger) == []


def test_the_history_of_a_request_has_what_everybody_did(ledger, entry):
    entry.tell("sends")
    entry.story[0] = (10.0, "sends 67 bytes")
    run(ledger, entry)
    ledger.story.append((10.5, "SIGKILL to process 7"))
    ledger.deaths.append(Death("process", 7, 10.6, "SIGKILL"))
    assert Judge(ledger).problems()[0].split("\n")[1:] == [
        "request 1: plain, /nap/1/5, traits: none",
        "    no body",
        "       +0.000 client   sends 67 bytes",
        "       +0.100 process  100 has begun it",
        "       +0.500 run      SIGKILL to process 7",
        "       +0.600 death    of process 7: SIGKILL",
        "       +0.900 process  100 has ended it",
    ]


# The server.


def test_a_process_that_holds_more_than_any_did_is_named():
    before = {"master": [Usage(9, 1, 20_000)], "process": [Usage(12, 3, 30_000)] * 2}
    assert growth(before, {**before, "master": [Usage(9, 1, 20_000 + MEMORY)]}) == []
    after = {"master": [Usage(10, 1, 20_000)], "process": [Usage(12, 3, 30_000)]}
    assert growth(before, after) == [
        "master has grown: Usage(descriptors=9, threads=1, memory=20000), "
        "now Usage(descriptors=10, threads=1, memory=20000)",
        "process: 1 of them, 2 in the beginning",
    ]


def test_a_process_that_dies_without_a_cause_is_named():
    log = (
        "[22103] [ERROR] Worker (pid:7) was sent SIGKILL! Perhaps out of memory?\n"
        "[22103] [WARNING] Worker (pid:8) was sent SIGSEGV!\n"
        "[22103] [WARNING] Worker (pid:9) was sent SIGTERM!\n"
        "[10] [ERROR] The app cannot be loaded\n"
        "[22103] [ERROR] Worker (pid:10) exited with code 1.\n"
    )
    assert unexplained(log, {7}) == ["process 8 was sent SIGSEGV, of itself"]


def test_a_traceback_of_ours_is_found_among_those_of_the_app():
    theirs = 'Traceback (most recent call last):\n  File "/x/app.py", line 1, in f\nE: theirs\n'
    ours = theirs.replace("/x/app.py", "/x/replica_plugin/slot.py").replace("theirs", "ours")
    assert tracebacks(theirs) == []
    assert tracebacks(theirs + ours + "[7] [INFO] next\n") == [f"in the log: {ours}".rstrip()]


# The app.


def exceeded(folder: Path, threads: int = 1, **limits: int) -> list[str]:
    """What one request finds wrong, with these limits."""
    Limits(folder / "limits").write(**{"cap": 1, "processes": 1, "bound": 1, **limits})
    app = App(folder, threads, False, "1")
    environ = {"PATH_INFO": "/nap/1/0", "wsgi.input": io.BytesIO()}
    assert app(environ, lambda *_: None) == [right_body("nap", 1, "0", b"")]
    lines = (folder / "events").read_text().splitlines()
    return [line.rstrip().split(" ", 4)[4] for line in lines if line.startswith("EXCEEDED")]


def test_a_request_within_all_limits_finds_nothing_wrong(tmp_path):
    assert exceeded(tmp_path) == []


def test_a_request_beyond_the_cap_is_noted(tmp_path):
    assert exceeded(tmp_path, cap=0) == ["cap: 1 run, 0 may"]


def test_a_request_beyond_the_threads_of_its_process_is_noted(tmp_path):
    assert exceeded(tmp_path, threads=0) == ["threads: 1 run here, 0 may"]


def test_a_request_beyond_the_bound_is_noted(tmp_path, monkeypatch):
    numbers = Stats(1, 1, 1, 2, 1, True)
    monkeypatch.setattr(stats, "of_replica", lambda: numbers)
    assert exceeded(tmp_path, bound=2) == ["bound: 3 in flight, 2 may be"]


def test_a_process_beyond_those_that_may_have_the_app_is_noted(tmp_path):
    noted = "stagger_init: 1 have the app, -1 + 1 may"
    assert exceeded(tmp_path, processes=-1) == [noted]


HOLDER = """\
from chaos.app import Presence
from pathlib import Path
presence = Presence(Path("present"))
for number in (3, 4, 900):
    presence.enter(number)
presence.leave(4)
print("there", flush=True)
input()
"""


def test_what_a_process_runs_counts_until_it_is_killed(tmp_path):
    presence = Presence(tmp_path / "present")
    command = [sys.executable, "-c", HOLDER]
    pipe = subprocess.PIPE
    holder = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdin=pipe, stdout=pipe)
    try:
        assert holder.stdout.readline() == b"there\n"
        presence.enter(5)
        assert (presence.count(), presence.here()) == (3, 1)
    finally:
        holder.kill()
        holder.communicate()
    assert presence.count() == 1
