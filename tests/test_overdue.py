"""The attendant's watch, and that no interrupt reaches a request it is not meant for."""

from __future__ import annotations

import math
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from server import wait_for
from stage import PATIENCE

from replica_plugin import overdue
from replica_plugin.channel import Job
from replica_plugin.errors import OverdueError
from replica_plugin.overdue import MainInterrupter, Run, ThreadInterrupter, Watch

CHANNEL, OTHER = object(), object()
MOMENT = 0.001
LATE = b"HTTP/1.1 504 Gateway Timeout"


class Told(list):
    """The dispatcher of a test, which may be deaf."""

    deaf = False

    def __call__(self, run: Run) -> bool:
        if not self.deaf:
            self.append((run.request, run.was_answered))
        return not self.deaf


class Client:
    """A client's socket, which takes down what the attendant sends."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    def answer_instead(self, data: bytes) -> None:
        self.taken.append(data.partition(b"\r\n")[0])


def yes() -> bool:
    return True


class Nobody:
    """Interrupts by writing it down."""

    def __init__(self) -> None:
        self.struck: list[int] = []
        self.taken_back = 0

    def here(self) -> None:
        return None

    def frame(self, where: None) -> None:
        return None

    def strike(self, run: Run) -> None:
        self.struck.append(run.request)

    def take_back(self, run: Run) -> None:
        self.taken_back += 1


@pytest.fixture
def hurry() -> Iterator[None]:
    """Threads take turns more often, which makes more of the rare moments, in less time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def signals() -> Iterator[None]:
    before = signal.getsignal(overdue.SIGNAL)
    yield
    signal.signal(overdue.SIGNAL, before)


def watch(slots: int = 2) -> tuple[Watch, Nobody, Told, list[str]]:
    wakes: list[str] = []
    nobody = Nobody()
    return Watch(slots, nobody, lambda: wakes.append("woken")), nobody, Told(), wakes


def job(request: int = 1, overdue_at: float = 0.0) -> Job:
    return Job(request, 1, "", "", b"", b"", False, 0.0, overdue_at, 2.5)


def begin(
    watching: Watch, slot: int, request: int, overdue_at: float, channel: object = CHANNEL
) -> Run:
    """A slot has taken a request, and made a socket of its descriptor."""
    run = watching.begin(slot, job(request, overdue_at), channel, yes)
    run.client = Client()
    return run


# What the attendant sees, and when.


def test_what_is_overdue_is_answered_and_told_and_interrupted_once():
    watching, nobody, told, _ = watch()
    run = begin(watching, 0, 7, 5.0)
    run.is_open = True
    assert watching.look(4.5, told) == 5.0
    assert (told, nobody.struck, run.client.taken) == ([], [], [])
    for now in (5.0, 6.0):
        assert watching.look(now, told) == now + overdue.TURN
        assert (told, nobody.struck, run.client.taken) == ([(7, True)], [7], [LATE])
    assert run.is_answered and not run.may_write() and not run.claim_for_slot()


def test_a_response_that_has_begun_is_the_slots_and_interrupted_all_the_same():
    watching, nobody, told, _ = watch()
    run = begin(watching, 0, 7, 5.0)
    run.is_open = True
    assert run.may_write()
    watching.look(5.0, told)
    assert (told, nobody.struck, run.client.taken) == ([(7, False)], [7], [])
    assert run.may_write() and not run.is_answered


def test_a_response_that_this_process_may_not_begin_is_not_the_attendants_to_give_either():
    watching, _, told, _ = watch()
    run = watching.begin(0, job(7, 5.0), CHANNEL, lambda: False)
    run.client = Client()
    watching.look(5.0, told)
    assert (told, run.client.taken) == ([(7, False)], [])


def test_a_request_whose_socket_is_not_there_yet_is_seen_to_in_the_next_turn():
    watching, nobody, told, _ = watch()
    run = watching.begin(0, job(7, 5.0), CHANNEL, yes)
    watching.look(5.0, told)
    assert (told, nobody.struck) == ([], [])
    run.client, run.is_open = Client(), True
    watching.look(6.0, told)
    assert (told, nobody.struck, run.client.taken) == ([(7, True)], [7], [LATE])


def test_what_a_dispatcher_before_has_sent_is_answered_too_and_outlives_it():
    watching, nobody, told, _ = watch()
    run = begin(watching, 0, 7, 5.0, OTHER)
    run.is_open = True
    watching.look(5.0, told)
    assert (told, nobody.struck, run.client.taken) == ([(7, True)], [7], [LATE])
    assert not watching.outlives(4.9, CHANNEL)
    assert watching.outlives(5.0, CHANNEL)
    assert not watching.outlives(5.0, OTHER)


def test_what_could_not_be_told_is_told_in_the_next_turn_and_answered_and_interrupted_once():
    watching, nobody, told, _ = watch()
    run = begin(watching, 0, 7, 5.0)
    run.is_open = True
    told.deaf = True
    assert watching.look(5.0, told) == 5.0 + overdue.TURN
    assert (nobody.struck, run.client.taken) == ([7], [LATE])
    told.deaf = False
    watching.look(6.0, told)
    assert (told, nobody.struck, run.client.taken) == ([(7, True)], [7], [LATE])


@pytest.mark.parametrize("deaf", [False, True])
def test_a_slot_that_ends_while_the_attendant_answers_waits_until_that_has_told(deaf):
    """Else it would close its socket, and the next could have the same number."""
    watching, _, told, _ = watch()
    run = begin(watching, 0, 7, 5.0)
    claims: list[bool] = []
    slot = threading.Thread(target=lambda: claims.append(run.claim_for_slot()))

    def tell(run: Run) -> bool:
        slot.start()
        slot.join(0.05)
        assert slot.is_alive()
        return told(run)

    told.deaf = deaf
    watching.look(5.0, tell)
    slot.join(PATIENCE)
    assert claims == [False]


def test_a_request_outside_its_window_is_told_and_not_interrupted():
    watching, nobody, told, _ = watch()
    begin(watching, 0, 7, 5.0)
    watching.look(5.0, told)
    assert (told, nobody.struck) == ([(7, True)], [])


def test_a_request_that_has_ended_is_not_seen():
    watching, nobody, told, _ = watch()
    begin(watching, 0, 7, 5.0).is_open = True
    watching.end(0)
    watching.look(5.0, told)
    assert (told, nobody.struck) == ([], [])


def test_the_attendant_is_woken_only_for_what_is_overdue_before_it_looks():
    watching, _, told, wakes = watch()
    assert watching.look(10.0, told) == 11.0
    begin(watching, 0, 1, math.inf)
    begin(watching, 0, 2, 11.0)
    assert wakes == []
    begin(watching, 1, 3, 10.9)
    assert wakes == ["woken"]
    assert watching.look(10.1, told) == 10.9


# No late exception.


def spin(until: float = math.inf) -> str:
    while time.monotonic() < until:
        pass
    return "done"


class Attendant:
    """Looks all the time, in a thread of its own, until told to end."""

    def __init__(self, watching: Watch) -> None:
        self._watch = watching
        self._told = Told()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Attendant:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._watch.look(time.monotonic(), self._told)
            time.sleep(MOMENT / 10)


def run_near_their_deadlines(watching: Watch, slot: int, count: int) -> tuple[int, int]:
    """How many were interrupted, and how many others behind them were."""
    interrupted = late = 0
    chance = random.Random(slot)
    for request in range(count):
        begun = time.monotonic()
        run = begin(watching, slot, 2 * request, begun + MOMENT)
        try:
            run.window(lambda: spin(begun + MOMENT * chance.uniform(0.9, 1.2)))
        except OverdueError:
            interrupted += 1
        try:
            run = begin(watching, slot, 2 * request + 1, math.inf)
            run.window(lambda: [spin(0.0) for _ in range(50)])
            [spin(0.0) for _ in range(50)]
        except OverdueError:
            late += 1
    return interrupted, late


def test_of_thousands_that_end_at_their_deadline_none_has_its_interrupt_reach_the_next(hurry):
    watching = Watch(2, ThreadInterrupter(), lambda: None)
    outcomes: list[tuple[int, int]] = []
    slots = [
        threading.Thread(
            target=lambda n=n: outcomes.append(run_near_their_deadlines(watching, n, 1000))
        )
        for n in range(2)
    ]
    with Attendant(watching):
        for slot in slots:
            slot.start()
        for slot in slots:
            slot.join()
    assert sum(late for _, late in outcomes) == 0
    assert all(0 < interrupted < 1000 for interrupted, _ in outcomes)


def test_in_the_main_thread_none_reaches_the_next_either(signals, hurry):
    watching = Watch(1, MainInterrupter(), lambda: None)
    with Attendant(watching):
        interrupted, late = run_near_their_deadlines(watching, 0, 2000)
    assert late == 0
    assert 0 < interrupted < 2000


class Held(ThreadInterrupter):
    """Stands still between step 2 and step 3."""

    def __init__(self) -> None:
        self.arrived, self.go_on = threading.Event(), threading.Event()

    def strike(self, run: Run) -> None:
        self.arrived.set()
        self.go_on.wait()
        super().strike(run)


def test_a_slot_that_is_done_waits_for_an_interrupt_under_way_and_takes_it_back():
    """Steps 1, 2, a; then b, as long as we like; then 3, 4, c, d."""
    held = Held()
    run = Run(job(), CHANNEL, yes, held)
    returned, steps = threading.Event(), []

    def call() -> str:
        assert held.arrived.wait(20)
        return "result"

    def slot() -> None:
        try:
            steps.append(run.window(call))
        except OverdueError:  # it was raised while the window was closing
            steps.append("interrupted")
        returned.set()
        try:
            [spin(0.0) for _ in range(1000)]
        except OverdueError:
            steps.append("late")

    thread = threading.Thread(target=slot)
    thread.start()
    wait_for(lambda: run.is_open, "an open window")
    attendant = threading.Thread(target=run.interrupt)
    attendant.start()
    wait_for(lambda: held.arrived.is_set() and not run.is_open, "step a")
    assert run.aims and not returned.is_set()
    held.go_on.set()
    thread.join()
    attendant.join()
    assert steps in (["result"], ["interrupted"])


class AtTheWorst(Nobody):
    """Has the exception raised in the middle of `take_back`, the first time."""

    def take_back(self, run: Run) -> None:
        super().take_back(run)
        if self.taken_back == 1:
            raise OverdueError


def test_an_exception_raised_while_the_window_closes_has_it_closed_again():
    worst = AtTheWorst()
    run = Run(job(), CHANNEL, yes, worst)
    with pytest.raises(OverdueError):
        run.window(run.interrupt)
    assert worst.taken_back == 2
    assert not run.is_open


def test_a_signal_outside_the_window_raises_nothing(signals):
    main = MainInterrupter()
    run = Run(job(), CHANNEL, yes, main)
    assert run.window(lambda: "done") == "done"
    main._aim = run
    signal.raise_signal(overdue.SIGNAL)
    signal.raise_signal(overdue.SIGNAL)


def test_a_blocking_call_in_the_main_thread_ends(signals):
    main = MainInterrupter()
    run = Run(job(), CHANNEL, yes, main)

    def strike_when_open() -> None:
        wait_for(lambda: run.is_open, "an open window")
        run.interrupt()

    thread = threading.Thread(target=strike_when_open)
    thread.start()
    with pytest.raises(OverdueError):
        run.window(lambda: time.sleep(100))
    thread.join()


class Blind(Nobody):
    def frame(self, where: None) -> None:
        raise LookupError("source")


def test_a_stack_that_cannot_be_read_costs_the_attendant_nothing():
    run = Run(job(), CHANNEL, yes, Blind())
    assert run.window(run.stack) == "(not known: LookupError('source'))\n"


def test_where_a_request_is_can_be_read():
    interrupter = ThreadInterrupter()
    run = Run(job(), CHANNEL, yes, interrupter)
    assert run.stack() == "(not in the app)\n"
    assert "in test_where_a_request_is_can_be_read" in run.window(run.stack)
