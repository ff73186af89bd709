"""A world for `Decisions`: a fake gunicorn master, and processes that follow the protocol.

What is faithful here: the order in which gunicorn writes its page, forks, tells processes to
leave and reaps them; that a dispatcher hears of deaths and of the page late; that a slot gives
one credit when it comes to wait, and reports what it was sent at most once, or with that what it
has taken off the deck; that jobs lie in a channel before a process reads them, and reports before
the dispatcher does; that a message may not fit; and what is left when a
dispatcher dies. Nothing here happens by itself: a test says what happens next.

Each event goes to the decisions and to the model, which judges the answer. The world knows
the truth beside them: what really runs (P2), in which order it began (P3), and how each request
ended (P6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

from model import Model

from replica_plugin.actions import Action, Dismiss, Kill, Lost, Refuse, Send, Why
from replica_plugin.decisions import Decisions, Rules


@dataclass(eq=False)
class Worker:
    """A process. Its slots: `starting`, `idle` (they gave a credit), reading, `old`, `ended`."""

    age: int
    slots: int
    starting: int
    alive: bool = True
    life: int = 0  # the dispatcher that knows it
    welcomed: bool = False  # and that it knows
    again: bool = False  # it had a dispatcher before
    told: bool = False  # to leave
    said: bool = False  # that it wants to leave, on this channel
    dismissed: bool = False
    serves: bool = True  # else none of its slots comes to wait any more
    owed: int | None = None  # as it has told, on this channel
    idle: int = 0
    ended: int = 0
    extra: int = 0
    old: list[int] = field(default_factory=list)  # requests of a dispatcher that died
    mailbox: list[int] = field(default_factory=list)
    reading: list[int] = field(default_factory=list)
    reports: list[tuple[int, int]] = field(default_factory=list)  # said, and not heard yet
    full: bool = False  # its channel takes no message now
    missed: bool = False  # something could not be delivered
    leave_due: bool = False
    stalled: bool = False  # the dispatcher has seen that its slots stand still
    haunted: bool = False  # a child that the app forked keeps the channel open
    heard: bool = False  # the dispatcher knows that it is dead

    @property
    def booting(self) -> bool:
        return self.alive and not self.life

    def running(self) -> list[int]:
        return self.mailbox + self.reading + self.old if self.alive else []

    @property
    def all_slots(self) -> int:
        return self.slots + self.extra


class World:
    def __init__(self, rules: Rules, has_exempt: bool = False) -> None:
        self.now = 100.0
        self.events = 0
        self.rules = rules
        self.workers: dict[int, Worker] = {}  # the master's, from the fork until they are reaped
        self.unburied: list[Worker] = []  # dead, and somebody has not noticed
        self.stopped = False
        self.life = 1
        self.requests: dict[int, str] = {}
        self.exempts: set[int] = set()
        self.has_exempt = has_exempt
        self.table: dict[int, Worker] = {}  # those the dispatcher knows, and its successor will
        self._ages = 0
        self._first = 1  # since the last reload
        self._numbers = 0
        self._reloading = 0  # the newest age of before, while a reload waits for those to go
        self.reads_at_once = True
        self.deck: list[int] = []
        self.vanished: set[int] = set()  # taken off it by processes that died before they said so
        self.left: set[int] = set()  # of those, the ones whose clients are gone
        self.write()
        self._be_born(was_ready=False)
        self.manage()

    # The master.

    def write(self, *forking: int) -> None:
        """Write the page, and nudge; the dispatcher may look at once, or later."""
        live = frozenset({*self.workers, *forking})
        self.page = (self.rules, live, self._first, self.stopped)
        if self.reads_at_once and hasattr(self, "decisions"):
            self.read()

    def _fork(self) -> None:
        self._ages += 1
        threads = self.rules.threads
        self.write(self._ages)
        extra = int(self.has_exempt and threads > 1)
        self.workers[self._ages] = Worker(self._ages, threads, threads + extra, extra=extra)

    def manage(self) -> None:
        """gunicorn's manage_workers, which does not run while a reload waits."""
        if self.stopped or min(self.workers, default=math.inf) <= self._reloading:
            return
        self._reloading = 0
        while len(self.workers) < self.rules.processes:
            self._fork()
        for age in sorted(self.workers)[: len(self.workers) - self.rules.processes]:
            self.terminate(self.workers[age])

    def reload(self, rules: Rules, has_exempt: bool = False) -> None:
        self.has_exempt = has_exempt
        newest, self._reloading = self._ages, 0
        self._first = newest + 1
        self.rules = rules
        self.write()
        for _ in range(rules.processes):
            self._fork()
        self.manage()
        self._reloading = newest

    def end_reload(self) -> None:
        """graceful_timeout is over."""
        self._reloading = 0
        self.manage()

    def resize(self, processes: int) -> None:
        """TTIN, TTOU; WINCH if there are to be none."""
        self.rules = replace(self.rules, processes=processes)
        self.write()
        self.manage()

    def stop(self) -> None:
        self.stopped = True
        self.write()
        for worker in list(self.workers.values()):
            self.terminate(worker)

    def terminate(self, worker: Worker) -> None:
        """TERM, or max_requests: it wants to leave; while it still loads it just ends."""
        worker.told = True
        if worker.booting:
            self.die(worker)

    def fail(self, worker: Worker) -> None:
        """It cannot load the app, says so, and ends."""
        if worker.booting:
            self.die(worker)

    def reap(self, worker: Worker) -> None:
        if not worker.alive and self.workers.pop(worker.age, None):
            self.write()

    # What processes do.

    def die(self, worker: Worker) -> None:
        worker.alive = False
        self.unburied.append(worker)

    def register(self, worker: Worker, welcomed: bool = True) -> None:
        """It offers a channel; the dispatcher knows it before it knows the dispatcher."""
        if not worker.alive or worker.life == self.life:
            return
        worker.life, worker.owed = self.life, None
        worker.said = worker.again and (worker.told or worker.dismissed)
        owed = worker.all_slots - worker.ended if worker.again else 0
        self.table[worker.age] = worker
        self.tell("registered", worker.age, worker.slots, owed, worker.extra)
        if worker.said:
            self.tell("leaving", worker.age)
        if welcomed:
            self.welcome(worker)

    def welcome(self, worker: Worker) -> None:
        if self._has_link(worker):
            worker.welcomed = worker.again = True

    def say_leaving(self, worker: Worker) -> None:
        """What the master had written when it told it to leave has been read by now."""
        if worker.told and not worker.said and worker.welcomed and self._has_link(worker):
            worker.said = True
            self.hear(worker)
            self.read()
            self.tell("leaving", worker.age)

    def free(self, worker: Worker) -> None:
        """A slot comes to wait."""
        if worker.starting and worker.serves and worker.welcomed and self._has_link(worker):
            worker.starting -= 1
            worker.idle += 1
            self.hear(worker)
            self.tell("freed", worker.age, self.now)

    def end_slot(self, worker: Worker) -> None:
        """A slot ends, instead of coming to wait or while it waits; all are told that do not."""
        if worker.alive and worker.dismissed:
            if worker.starting:
                worker.starting -= 1
                worker.ended += 1
            elif worker.idle > len(worker.mailbox):
                worker.idle -= 1
                worker.ended += 1
            self.say_owed(worker)

    def say_owed(self, worker: Worker) -> None:
        """Its attendant tells how many slots have neither ended nor come to wait."""
        owed = worker.starting + len(worker.old)
        if worker.welcomed and self._has_link(worker) and not worker.full and owed != worker.owed:
            worker.owed = owed
            self.hear(worker)
            self.tell("owes", worker.age, owed, self.now)

    def take(self, worker: Worker) -> None:
        """A slot begins to read a request."""
        if worker.alive and worker.mailbox:
            worker.reading.append(worker.mailbox.pop(0))
            worker.idle -= 1

    def finish(self, worker: Worker, which: int = 0) -> None:
        """A slot is done with a request: of this dispatcher's, or of one before."""
        if not worker.alive:
            return
        if worker.reading:
            request = worker.reading.pop(which % len(worker.reading))
            worker.idle += 1
            self._end(request, "sent", "answered")
            self.hear(worker)
            self.tell("done", worker.age, request, self.now, 0)
        elif worker.old:
            worker.old.pop(which % len(worker.old))
            worker.starting += 1
            self.free(worker)

    def take_next(self, worker: Worker, which: int = 0, dies: bool = False) -> None:
        """A slot is done with a request, and takes the next one off the deck. It reports both; or
        it dies before it has."""
        if not (worker.alive and worker.reading and self.deck and not worker.dismissed):
            return
        request, taken = worker.reading.pop(which % len(worker.reading)), self.deck.pop(0)
        wait = {r for r, state in self.requests.items() if state == "waiting"}
        assert taken == min(wait - self.exempts - self.vanished), "P3: the longest waiting one"
        if dies:
            self.vanished.add(taken)
            worker.reading.append(request)
            self.die(worker)
            return
        self._end(request, "sent", "answered")
        self._end(taken, "waiting", "sent")
        worker.reading.append(taken)
        worker.reports.append((request, taken))

    def hear(self, worker: Worker) -> None:
        """The dispatcher reads what a process has said."""
        reports, worker.reports = worker.reports, []
        for request, taken in reports:
            self.tell("done", worker.age, request, self.now, taken)

    def fill_deck(self) -> None:
        for request in self.decisions.for_deck():
            self.model.offered_next(request)
            self.decisions.on_deck(request)
            self.deck.append(request)

    def _recall(self, most: int) -> list[int]:
        left, self.deck = self.deck[:most], self.deck[most:]
        self.model.recalled(left, self.deck)
        return left

    def see_who_took(self) -> None:
        """All is heard that living processes have said; whoever else had something is dead."""
        taken = list(self.decisions.taken)
        for worker in list(self.table.values()):
            self.hear(worker)
        if taken:
            missing = [each for each in taken if each in self.decisions.taken]
            left = [each for each in missing if each in self.left]
            assert set(missing) <= self.vanished
            self.vanished -= set(missing)
            for request in left:
                self._end(request, "waiting", "gone")
            self.tell("untaken", missing, left, self.now)

    def say_overdue(self, worker: Worker) -> None:
        """Its attendant has a look at what its slots have begun."""
        self.hear(worker)
        for request in list(worker.reading) if self._has_link(worker) else ():
            limits = self.model.processes[worker.age].limits
            if limits.get(request, math.inf) <= self.now:
                self.tell("overdue", worker.age, request)

    def stall(self, worker: Worker) -> None:
        """Its slots stand still. The dispatcher sees it."""
        if not worker.stalled and self._is_known(worker):
            worker.stalled = True
            self.tell("stalled", worker.age)

    def turn(self, worker: Worker) -> None:
        """Its slots go on."""
        if worker.stalled and self._is_known(worker):
            self.hear(worker)
            self.tell("turning", worker.age, self.now)
        worker.stalled = False

    def give_back(self, worker: Worker) -> None:
        """What no slot has taken goes back; they may have begun to move again meanwhile."""
        while worker.mailbox and worker.welcomed and self._is_known(worker):
            request = worker.mailbox.pop(0)
            self._end(request, "sent", "waiting")
            self.hear(worker)
            self.tell("returned", worker.age, request, self.now)
            if not worker.stalled:  # it may be sent back at once
                return

    def _is_known(self, worker: Worker) -> bool:
        return self._has_link(worker) and worker.age in self.table

    def orphan(self, worker: Worker) -> None:
        """It was told to leave, and no dispatcher came: it finishes what it runs, and leaves."""
        if worker.alive and worker.told and worker.life != self.life:
            worker.dismissed, worker.serves = True, False

    def leave(self, worker: Worker) -> None:
        """Its slots have ended; so does it."""
        if worker.alive and worker.dismissed and not worker.running():
            self.die(worker)

    def fill(self, worker: Worker) -> None:
        worker.full = worker.alive

    def make_room(self, worker: Worker) -> None:
        if not (worker.full and worker.alive):
            return
        worker.full = False
        if not self._has_link(worker):
            return
        if worker.leave_due:
            worker.dismissed = True
        elif worker.missed:
            worker.missed = False
            self.tell("sendable", worker.age, self.now)

    def _has_link(self, worker: Worker) -> bool:
        return worker.alive and worker.life == self.life

    # Clients.

    def arrive(self, patience: float = math.inf, exempt: bool = False) -> None:
        self._numbers += 1
        self.requests[self._numbers] = "waiting"
        if exempt:
            self.exempts.add(self._numbers)
        self.tell("ready", self._numbers, self.now, patience, exempt)

    def go(self, request: int) -> None:
        """The client of a waiting request leaves; or of one that a slot has just taken."""
        if request in self.vanished:
            self.left.add(request)
        elif self.requests[request] == "waiting":
            self._end(request, "waiting", "gone")
        self.tell("gone", request)

    # The dispatcher.

    def _be_born(self, was_ready: bool) -> None:
        rules = self.page[0]
        rules = replace(rules, processes=max(1, rules.processes))
        rows = {age: self._most_busy(age) for age in self.table}
        self.decisions, self.model = Decisions(rules, self._recall), Model(rules, was_ready)
        self.decisions.roster.was_ready = was_ready
        for age in self.table:
            self.tell("expected", age, rows[age])
        self.read()

    def _most_busy(self, age: int) -> int:
        """As the dispatcher has it in its table."""
        process = self.decisions.processes[age]
        return min(process.slots, process.running) if process.dismissed else process.slots

    def restart(self) -> None:
        """It dies; what waits is lost, what runs goes on, and there is another."""
        self.life += 1
        for request, state in self.requests.items():
            if state == "waiting":
                self._end(request, "waiting", "reset")
        self.deck, self.vanished = [], set()
        for worker in self.table.values():
            self._lose_dispatcher(worker)
        self.table = {age: worker for age, worker in self.table.items() if worker.alive}
        for worker in self.unburied:
            worker.heard = True
        self._be_born(self.decisions.roster.was_ready)

    def _lose_dispatcher(self, worker: Worker) -> None:
        for request in worker.mailbox + worker.reading:
            self._end(request, "sent", "answered" if worker.alive else "reset")
        worker.old += worker.mailbox + worker.reading
        worker.mailbox, worker.reading, worker.idle, worker.reports = [], [], 0, []
        worker.starting = worker.all_slots - len(worker.old) - worker.ended
        worker.serves = worker.serves and not worker.dismissed
        worker.welcomed = worker.full = worker.missed = worker.leave_due = False
        worker.stalled = False

    def read(self) -> None:
        """Look at the master's page."""
        rules, live, first, stopped = self.page
        paused = not rules.processes
        if paused:
            rules = self.decisions.rules
        self.tell("ruled", rules, live, self.now, first)
        if self.decisions.roster.stopping and not (stopped or paused):
            self.tell("resume", self.now)
        if (stopped or paused) and not self.decisions.roster.stopping:
            self.tell("stop")

    def hear_death(self, worker: Worker) -> None:
        if worker.alive or worker.heard:
            return
        worker.heard = True
        if worker.age in self.table:
            self.hear(worker)
        if self.table.pop(worker.age, None):
            unread = worker.mailbox if worker.life == self.life else []
            for request in worker.mailbox:
                self._end(request, "sent", "waiting")
            self.tell("died", worker.age, frozenset(unread), self.now)
            assert all(self.requests[each] != "sent" for each in worker.reading), "P6: it is told"

    def tick(self) -> None:
        self.tell("tick", self.now)

    def may_drain(self) -> bool:
        alive = ("waiting", "sent")
        return self.decisions.roster.stopping and not any(
            s in alive for s in self.requests.values()
        )

    def drain(self) -> None:
        if self.may_drain() and not self.decisions.roster.drained:
            self.tell("drain")

    def tell(self, event: str, *arguments: Any) -> None:
        """Give an event to the decisions and to the model, and do what was decided."""
        self.events += 1
        actions = getattr(self.decisions, event)(*arguments)
        getattr(self.model, event)(*arguments, actions)
        self.model.agree(self.decisions)
        for action in actions if isinstance(actions, list) else ():
            self._perform(action)

    def _perform(self, action: Action) -> None:
        if isinstance(action, Send):
            self._send(action, self.table[action.age])
        elif isinstance(action, Refuse):
            if action.why is Why.FULL and self.decisions.rules.dry_run:
                patience = self.model.patience[action.request]
                self.tell("spare", action.request, self.now, patience)
            else:
                self._end(action.request, "waiting", "refused")
        elif isinstance(action, Lost):
            self._end(action.request, "sent", "lost")
        elif isinstance(action, Kill):
            if self.table[action.age].alive:
                self.die(self.table[action.age])
        elif isinstance(action, Dismiss):
            worker = self.table[action.age]
            worker.leave_due = worker.full
            worker.dismissed = worker.dismissed or not worker.full

    def _send(self, send: Send, worker: Worker) -> None:
        self._end(send.request, "waiting", "sent")
        if worker.full or not (worker.alive or worker.haunted):
            worker.missed = True
            self._end(send.request, "sent", "waiting")
            self.tell("unsent", send.age, send.request, self.now)
            return
        beyond = worker.extra and send.request in self.exempts
        running = sum(map(self._counted, self.workers.values()))
        assert beyond or running < self.model.rules.cap, "P2: more run than may, in truth"
        assert beyond or self._counted(worker) < worker.slots, "P2: in one process, too"
        assert len(worker.mailbox) < worker.idle, "P2: a slot is free in truth"
        assert not worker.dismissed, "nothing is sent behind LEAVE"
        worker.mailbox.append(send.request)

    def _counted(self, worker: Worker) -> int:
        """How many run, in truth, that count for the cap."""
        running = worker.running()
        return len([r for r in running if not (worker.extra and r in self.exempts)])

    def _end(self, request: int, before: str, after: str) -> None:
        assert self.requests[request] == before, f"{request} is {self.requests[request]}"
        self.requests[request] = after

    # All of it, to the end.

    def settle(self) -> None:
        """Let everything happen that is under way, until nothing is left to happen."""
        self.reads_at_once = True
        self.read()
        before = -1
        while before != self._happenings():
            before = self._happenings()
            for worker in [*self.workers.values(), *self.unburied]:
                for happens in self._all_that_happens():
                    happens(worker)
            self.unburied = [each for each in self.unburied if each.age in self.workers]
            self.fill_deck()
            self.see_who_took()
            self.drain()
            self.manage()
            if before == self._happenings():
                self.end_reload()

    def _all_that_happens(self) -> Collection[Callable[[Worker], None]]:
        return (
            self.make_room,
            self.turn,
            self.register,
            self.welcome,
            self.say_leaving,
            *[self.free, self.take, self.take_next, self.finish] * 4,
            self.end_slot,
            self.leave,
            self.hear_death,
            self.reap,
        )

    def _happenings(self) -> tuple[int, int, int]:
        return (self.events, self._ages, len(self.unburied))
