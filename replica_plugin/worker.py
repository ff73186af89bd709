"""What gunicorn's worker is with us: a process with t slots, and an attendant beside them.

In thread mode, with t > 1 and exempt paths, there is one slot more: they are all alike, and the
dispatcher sees to it that never more than t requests run that are not exempt.

The attendant watches over what is not a request: gunicorn's heartbeat, signals, the master,
the dispatcher (registration.py). Which threads slots and attendant are is the business of
thread_worker.py and gevent_worker.py.

    attendant                         slots
    comes to a dispatcher        ->   take the channel, send FREE, take jobs
    dispatcher dies              ->   the channel ends; wait for the next one
    TERM, parent gone: LEAVING        LEAVE: finish, and end

Shared between them: `_channel` (None while there is no dispatcher) and `serving` (True until
the process is dismissed, or has given up waiting for that). ThreadWorker guards them with
`_change`; in gevent mode only the main thread writes `_channel`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

from gunicorn.workers.base import Worker

from . import hook, loading, overtime
from .cells import Cells
from .channel import LEAVING, Adopt, Kind, ProcessEnd, Register, Report, send_adopt
from .client_socket import ClientSocket
from .loading import Loading, end_within
from .overdue import Interrupter, Run, Watch
from .registration import Registration
from .settled import Settled, settle
from .slot import Slot
from .unpatched import socketpair

ORPHAN_TIME = 2.0  # seconds a process that was told to leave waits for a dispatcher to say when
ASKED = 0.5  # seconds after TERM in which the master may say that it was for all, and we stay
TURN = 1.0  # seconds between two heartbeats at most
LOAD_TIME = 10 * 365 * 86400.0  # seconds for which `timeout` is put off while the app is loaded


def _hear_alone() -> None:
    """A child that the app forks: its parent, whose attendant reads the pipe, would take for its
    own what the child is told."""
    signal.set_wakeup_fd(-1)


def _leave_at_once(number: int, frame: Any) -> None:
    os._exit(0)


# TERM needs no turn of the interpreter, which may be in a long call; QUIT would leave a core.
_WHILE_LOADING: dict[signal.Signals, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGQUIT: _leave_at_once,
    signal.SIGINT: _leave_at_once,
}


def _turn_away(channel: ProcessEnd) -> None:
    """The dispatcher cannot send us anything any more; but we can."""
    with suppress(OSError):  # it was faster, or is dead
        channel.sock.shutdown(socket.SHUT_RD)


class ReplicaWorker(Worker):  # type: ignore[misc]  # gunicorn ships no types
    """What the worker classes of both modes have in common."""

    client_socket = ClientSocket
    turn = TURN
    may_have_extra = False  # a slot for exempt requests

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.alive: bool
        self.serving = True
        self._channel: ProcessEnd | None = None
        self._leaving_since: float | None = None
        self._asked = False  # to leave, with TERM
        self._told: ProcessEnd | None = None  # whose dispatcher knows that we want to leave
        self._dead: socket.socket | None = None  # whose end no slot may be free to read
        self._alone_since: float | None = None  # without a dispatcher, and wanting to leave
        self._dismissed_at: float | None = None
        self._owed_told: tuple[ProcessEnd, int] | None = None
        self._early_usr1 = False  # which came before there was a pipe

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """gunicorn asks before it forks; we add our hooks to its configuration."""
        hook.check_config(cfg, log)

    def init_process(self) -> None:
        """Runs in the new process. Returns when it has nothing more to do."""
        master = hook.master()
        if master is None:
            self.log.error(
                "This worker has no dispatcher: the hook when_ready of replica_plugin was not "
                "called. Take its settings into gunicorn's configuration with "
                "`from replica_plugin.conf import *`, and leave check_config to its worker class."
            )
            sys.exit(3)
        self._master = master
        self._replica_page = master.replica_page
        wants_extra = self.may_have_extra and self.cfg.threads > 1 and master.settings.exempt
        self._extra = int(bool(wants_extra))
        self._control = master.control_out
        master.in_worker()
        self.sockets: list[Any] = []
        super().init_process()

    def init_signals(self) -> None:
        """gunicorn's handlers, and at once ours, before one that heeds nothing yet is called."""
        signal.pthread_sigmask(signal.SIG_BLOCK, hook.HELD)
        super().init_signals()
        os.register_at_fork(after_in_child=_hear_alone)
        self.leave_at_once_when_told()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, hook.HELD)
        if self._early_usr1:
            self._wake_attendant(signal.SIGUSR1)

    def hear_early(self) -> None:
        """In place of the master's handlers, from the fork to `init_signals`."""
        self.leave_at_once_when_told()
        signal.signal(signal.SIGUSR1, self._note_usr1)

    def _note_usr1(self, sig: int, frame: Any) -> None:
        self._early_usr1 = True

    def leave_at_once_when_told(self) -> None:
        """Until the app is loaded there is nothing to finish."""
        for number, at_once in _WHILE_LOADING.items():
            signal.signal(number, at_once)

    def load_wsgi(self) -> None:
        """Load the app; however long that takes, and whether or not it holds the GIL."""
        self._put_off_timeout(LOAD_TIME)
        master = self._master
        attempt = Loading(self, master.load_page, master.page)
        staggered = master.settings.stagger_init and not self.cfg.preload_app
        attempt.run(self._load_and_warm_up, staggered)
        master.load_page.close()
        self.notify()

    def _put_off_timeout(self, seconds: float) -> None:
        """No heartbeat is due until then."""
        then = time.monotonic() + seconds
        os.utime(self.tmp.fileno(), (then, then))

    def _load_and_warm_up(self) -> None:
        """The app, and the hook that gunicorn would call next: there an error ends gunicorn."""
        super().load_wsgi()
        self._heed_signals()  # which the hook may have its own handlers call
        warm_up = self.cfg.post_worker_init
        self.cfg.set("post_worker_init", lambda worker: None)
        try:
            warm_up(self)
        except BaseException:
            self.leave_at_once_when_told()
            raise

    def _heed_signals(self) -> None:
        """Again as gunicorn's `init_signals` has it, but for those that the app has taken."""
        ours = {signal.SIGTERM: self.handle_exit}
        ours |= dict.fromkeys((signal.SIGQUIT, signal.SIGINT), self.handle_quit)
        for number, at_once in _WHILE_LOADING.items():
            if signal.getsignal(number) is at_once:
                signal.signal(number, ours[number])
        signal.siginterrupt(signal.SIGTERM, False)

    def run(self) -> None:
        """Serve until dismissed."""
        settle()
        self.cfg: Any = Settled(self.cfg)
        count = self.cfg.threads + self._extra
        self._cells = Cells(count)
        self._cells.await_dump()
        self._watch = Watch(count, self._interrupter(), self._wake_attendant)
        # Those that have not ended: each takes itself out.
        self._slots = [Slot(self, i, self._cells, self._watch) for i in range(count)]
        self._nowhere, other = socketpair(socket.SOCK_STREAM)
        other.close()
        self._forking = threading.local()
        os.register_at_fork(
            before=self._hold_signals,
            after_in_parent=self._let_signals_come,
            after_in_child=self._part_from_parent,
        )
        try:
            self._serve()
        finally:
            self._take_no_more()
            self._end_in_time()
        # The dispatcher may dismiss us before a signal of the master comes, which would then kill
        # an interpreter that is ending, and has given its handlers up.
        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)

    def _end_in_time(self) -> None:
        """Else a thread of the app, or its atexit, would keep our place from a successor."""
        now = time.monotonic()
        rest = (self._dismissed_at or now) + self.cfg.graceful_timeout - now
        rest = max(loading.END_TIME, rest)
        why = "A thread of the app, or an atexit handler, has not ended in time: leaving"
        end_within(rest, 1, partial(self.log.error, why))
        if not self.aborted:
            self._put_off_timeout(rest)

    def _hold_signals(self) -> None:
        """The app forks: what the child is sent at once waits until it has parted from us."""
        self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, hook.ENDINGS)

    def _let_signals_come(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _part_from_parent(self) -> None:
        """A child that the app forks, in which gevent's hub turns on, takes no requests of ours.

        There may be no descriptor left for that; so `_nowhere` was made before. Nor does it read or
        answer any of those that run. It ends when told to, which our handlers would ignore.
        """
        try:
            for number in hook.ENDINGS:
                if signal.getsignal(number) in (self.handle_exit, self.handle_quit):
                    signal.signal(number, signal.SIG_DFL)
            channel, self._channel = self._channel, None  # a child of the child has none to cut off
            if channel is not None:
                for end in (channel.sock, channel.deck):
                    os.dup2(self._nowhere.fileno(), end.fileno(), inheritable=False)
            self._control = self._nowhere
            for slot in self._slots:
                slot.forget()
            self._cells.part()
            self._watch.part(self._nowhere.fileno())
        finally:
            self._let_signals_come()

    def _on_slot_failed(self) -> None:
        """It is a slot less now: another process has all of them."""
        self.alive = False
        with suppress(BaseException):
            self.log.exception("A slot failed")

    # What each mode does in its own way.

    def _interrupter(self) -> Interrupter:
        """How the code of its requests is interrupted."""
        raise NotImplementedError

    def _serve(self) -> None:
        """Run the slots, and the attendant beside them, until all slots have ended."""
        raise NotImplementedError

    def _found(self, sock: socket.socket, deck: socket.socket) -> None:
        """A dispatcher has taken our channel, and given us its deck."""
        raise NotImplementedError

    def _on_death(self, sock: socket.socket) -> None:
        """The dispatcher at the other end of our channel is dead."""
        raise NotImplementedError

    def _end(self) -> None:
        """No slot takes another request."""
        raise NotImplementedError

    def _is_stuck(self) -> bool:
        """Whether gunicorn's `timeout` has passed for the process."""
        raise NotImplementedError

    # What slots ask (slot.Process).

    def await_channel(self) -> ProcessEnd | None:
        """The channel to take from, once there is one; None when there will be none."""
        raise NotImplementedError

    def lost(self, channel: ProcessEnd) -> None:
        """This channel has ended: its dispatcher is dead, unless `dismissed` has shut it."""
        if self._channel is channel and self.serving:
            self._channel = None

    def dismissed(self, channel: ProcessEnd) -> None:
        """A slot was told LEAVE: nothing lies behind it on the channel, all slots may end."""
        if self._dismissed_at is None:  # the attendant may have seen it before
            self._dismissed_at = time.monotonic()
        self._end()
        _turn_away(channel)

    def offer(self, adopt: Adopt, sock: socket.socket) -> None:
        """Offer a connection to whichever dispatcher comes; if that is not possible it ends."""
        try:
            send_adopt(self._control, adopt, sock.fileno())
        except OSError as error:
            self.log.debug("A kept-alive connection could not be handed back: %s", error)

    def may_take(self) -> bool:
        """Whether a slot may find something on the deck: a look there is a system call."""
        return self.serving and self._replica_page.something_waits()

    def room_for_rest(self) -> int:
        """How many bytes of a response a slot may leave to the dispatcher now.

        Of all together the dispatcher's page tells; so they may exceed response_buffer_total by
        what slots leave at one and the same moment, p*t times response_buffer at most.
        """
        settings, numbers = self._master.settings, self._replica_page.read()
        if numbers.short:
            return 0
        unsent = numbers.unsent
        return min(settings.response_buffer, max(0, settings.response_buffer_total - unsent))

    def count_request(self) -> None:
        """A slot is about to call the app; after max_requests the process asks to leave."""
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("Autorestarting worker after %d requests.", self.nr)
            self.alive = False
            self._wake_attendant()

    # What signals ask: these run in the main thread, between two of its instructions.

    def handle_exit(self, sig: int, frame: Any) -> None:
        """TERM: leave when the dispatcher says so; at once from a `post_worker_init`."""
        if not self.booted:
            os._exit(0)
        self._asked = True
        self.alive = False

    def handle_usr1(self, sig: int, frame: Any) -> None:
        """USR1: the attendant reopens the logs; an idle slot would only when it has work.

        That has not heard if a loop of asyncio's handled signals here: those take the pipe away.
        """
        self._wake_attendant(sig)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """QUIT, INT: leave now."""
        self._take_no_more()
        super().handle_quit(sig, frame)

    def handle_abort(self, sig: int, frame: Any) -> None:
        """ABRT: the master has not seen a heartbeat for `timeout`; KILL follows a second later."""
        self.aborted = True
        self._take_no_more()
        super().handle_abort(sig, frame)

    def _take_no_more(self) -> None:
        """What comes now is another process's: this one ends, dismissed or not, and an atexit
        handler may take its time over that."""
        self.serving, channel = False, self._channel
        if channel is not None:
            _turn_away(channel)

    # The attendant.

    def _attend_beside(self) -> None:
        """In a thread of its own, without which the process must not live on."""
        try:
            self._attend()
        except BaseException:  # the app has closed its descriptors, say
            with suppress(Exception):
                self.log.exception("The attendant failed: leaving")
            os._exit(1)

    def _attend(self) -> None:
        """Watch until no slot is left, or the time of a dismissed process is over."""
        registration = Registration(
            self._control, self._cells.fd, self.log, self._describe, self._found, self._on_death
        )
        registration.watch(self.PIPE[0])
        while self._slots:
            self._beat()
            turn = min(self.turn, self.timeout or TURN, self._until_leave() or TURN)
            registration.wait(min(turn, self._see_to_overdue()))
            self._read_signals()
            if not self.alive or self.ppid != os.getppid():
                self._leave()
            if not self.serving:
                self._tell_owed()
            if self._is_overdue():
                self._give_up()
        self._tell_owed()  # the process may take long to end, or for ever

    def _wake_attendant(self, sig: int = 0) -> None:
        with suppress(BlockingIOError):  # with so much to read it is about to wake up anyway
            os.write(self.PIPE[1], bytes((sig,)))

    def _read_signals(self) -> None:
        """The numbers of the signals that came. With t = 1 the main thread may see them late."""
        try:
            came = os.read(self.PIPE[0], 512)
        except BlockingIOError:
            return
        if signal.SIGTERM in came:
            self._asked = True
            self.alive = False
        if signal.SIGUSR1 in came:
            self._reopen_logs()

    def _reopen_logs(self) -> None:
        """If we may not, a successor may, who gets them from the master."""
        try:
            self.log.reopen_files()
        except Exception as error:  # a stdout of the app's, say, that is no file
            self.alive = False
            text = f"Leaving, since the logs cannot be opened: {error}"
            with suppress(Exception):  # nor may that be possible
                print(text, file=sys.stderr, flush=True)

    def _beat(self) -> None:
        """Tell gunicorn that we live."""
        if not self._is_stuck():
            self.notify()

    def _see_to_overdue(self) -> float:
        """What runs for longer than request_timeout; seconds until the next look.

        What a dispatcher of before has sent is nobody's to count, so it is for us to leave.
        """
        now, channel = time.monotonic(), self._channel
        if self._watch.outlives(now - overtime.GRACE, channel):
            self.alive = False
        return max(0.0, self._watch.look(now, self._tell_overdue) - now)

    def _tell_overdue(self, run: Run) -> bool:
        channel = self._channel
        if channel is None:
            return False
        kind = Kind.OVERDUE if run.was_answered else Kind.UNFINISHED
        stack = run.tale.encode("utf-8", "replace")
        try:
            channel.tell_now(Report(kind, run.request, carry=stack).encode())
        except OSError:  # no room, or a dispatcher that died: again in the next turn
            return False
        return True

    def _is_overdue(self) -> bool:
        """Whether a process that was told to leave has had its time since it was dismissed; which
        no slot has read yet, if all of them are busy.

        Not one that is dismissed for a stuck request: what else it runs has request_timeout.
        """
        if self._leaving_since is None:
            return False
        now, channel = time.monotonic(), self._channel
        if self._dismissed_at is None and channel is not None and channel.is_dismissed():
            self._dismissed_at = now
        if self._dismissed_at is None:
            return False
        since = max(self._dismissed_at, self._leaving_since)
        return bool(now - since > self.cfg.graceful_timeout)

    def _give_up(self) -> None:
        """End with requests running. With t = 1 the main thread is stuck in one of them."""
        self.log.error("Not finished within graceful_timeout of being dismissed: leaving")
        os._exit(1)

    def _tell_owed(self) -> None:
        """How many slots may be busy yet with what another dispatcher has sent.

        It counts those that we had when we registered until they say FREE, which one that ends
        does not. What we tell is never too low: a slot that has said FREE, and is about to
        remember that, still counts.
        """
        channel = self._channel
        if channel is None:
            return
        owed = sum(slot.free_on is not channel for slot in tuple(self._slots))
        if (channel, owed) != self._owed_told:
            with suppress(OSError):  # no room, or a dispatcher that died: again in the next turn
                channel.tell_now(Report(Kind.OWED, owed).encode())
                self._owed_told = channel, owed

    def _until_leave(self) -> float:
        """Seconds until we may say that we want to leave.

        What ends a whole control group, or group of processes, signals us along with the master. If
        we left before it has said that all stop, nobody would be there for what waits.
        """
        if self._leaving_since is None or not self._asked:
            return 0.0
        return max(0.0, self._leaving_since + ASKED - time.monotonic())

    def _leave(self) -> None:
        """Ask the dispatcher to be dismissed; without one, end when no request is left."""
        now, channel = time.monotonic(), self._channel
        if self._leaving_since is None:
            self._leaving_since = now
        if channel is None or channel.sock is self._dead:
            self._end_if_alone(now)
            return
        self._alone_since = None
        if channel is not self._told and not self._until_leave():
            with suppress(OSError):  # no room, or a dispatcher that died: again in the next turn
                channel.tell_now(LEAVING)
                self._told = channel

    def _end_if_alone(self, now: float) -> None:
        """Another dispatcher may come, and say when; not after the master's death, whose
        dispatcher has given all that ran its time."""
        if self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since > ORPHAN_TIME and self._dismissed_at is None:
            self._dismissed_at = now if self.ppid == os.getppid() else self._leaving_since
            self._end()

    # What the registration asks and tells.

    def _describe(self, again: bool) -> Register:
        leaving = self._leaving_since is not None or not self.serving
        owed = len(self._slots) if again else 0
        return Register(self.age, self.cfg.threads, owed, leaving, self._extra)
