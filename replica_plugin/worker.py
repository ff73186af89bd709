"""gunicorn's worker class: a process with t slots, and an attendant beside them.

The attendant watches over what is not a request: gunicorn's heartbeat, signals, the master,
the dispatcher. With t = 1 the slot is the main thread, so that the app sees one thread
only, and the attendant is a thread beside it that runs no code of the app. With t > 1 the
attendant is the main thread.

    attendant                         slots
    offers a channel (REGISTER)       wait for a channel
    gets WELCOME, publishes it   ->   send FREE, take jobs
    dispatcher's pidfd fires     ->   the channel ends; wait for the next one
    TERM, parent gone: LEAVING        LEAVE: finish, and end

Shared between them, under `_change`: `_channel` (None while there is no dispatcher) and
`serving` (False once, when the process is dismissed or has given up waiting).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from gunicorn.workers.base import Worker

from . import hook
from .channel import LEAVING, WELCOME, Adopt, Register, pair, receive, send_adopt, send_register
from .pages import Cells
from .slot import Slot

OFFER_TIME = 5.0  # seconds without WELCOME after which the process offers itself anew
ORPHAN_TIME = 2.0  # seconds a process that was told to leave waits for a dispatcher to say when
TURN = 1.0  # seconds between two heartbeats at most


class ThreadWorker(Worker):  # type: ignore[misc]  # gunicorn ships no types
    """The worker class of thread mode."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.alive: bool
        self.serving = True
        self._change = threading.Condition()
        self._channel: socket.socket | None = None
        self._offered: socket.socket | None = None
        self._offered_at = 0.0
        self._registered = False
        self._dispatcher_pidfd = -1
        self._leaving_since: float | None = None
        self._dismissed_at: float | None = None
        self._working = 0

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
        self._control = master.offer_socket()
        master.in_worker()
        self.sockets: list[Any] = []
        super().init_process()

    def run(self) -> None:
        """Serve until dismissed."""
        self._cells = Cells(self.cfg.threads)
        slots = [Slot(self, index, self._cells) for index in range(self.cfg.threads)]
        self._own_pidfd = os.pidfd_open(os.getpid())
        self._working = len(slots)
        self._serve(slots)
        # The dispatcher may dismiss us before the master's signal comes, which would then kill
        # an interpreter that is ending, and has given its handlers up.
        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def _serve(self, slots: list[Slot]) -> None:
        if len(slots) == 1:
            threading.Thread(target=self._attend, name="replica-attendant", daemon=True).start()
            self._run_slot(slots[0])
            return
        for index, slot in enumerate(slots):
            name = f"replica-slot-{index}"
            threading.Thread(target=self._run_slot, args=(slot,), name=name, daemon=True).start()
        self._attend()

    def _run_slot(self, slot: Slot) -> None:
        try:
            slot.run()
        except Exception:
            self.log.exception("A slot failed")
        finally:
            with self._change:
                self._working -= 1
            self._wake_attendant()

    # What slots ask.

    def await_channel(self) -> socket.socket | None:
        """The channel to take from, once there is one; None when there will be none."""
        with self._change:
            while self.serving and self._channel is None:
                self._change.wait(TURN)
            return self._channel if self.serving else None

    def dismissed(self, channel: socket.socket) -> None:
        """A slot was told LEAVE: nothing lies behind it on the channel, all slots may end."""
        with self._change:
            self._dismissed_at = time.monotonic()
            self.serving = False
            self._change.notify_all()
        _shut(channel, socket.SHUT_RD)

    def lost(self, channel: socket.socket) -> None:
        """A slot found its channel at an end."""
        with self._change:
            if self._channel is channel:
                self._channel = None
        self._wake_attendant()

    def offer(self, adopt: Adopt, sock: socket.socket) -> None:
        """Offer a connection to whichever dispatcher comes; if that is not possible it ends."""
        try:
            send_adopt(self._control, adopt, sock.fileno())
        except OSError as error:
            self.log.debug("A kept-alive connection could not be handed back: %s", error)

    def count_request(self) -> None:
        """A slot is about to call the app; after max_requests the process asks to leave."""
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("Autorestarting worker after %d requests.", self.nr)
            self.alive = False
            self._wake_attendant()

    # What signals ask: these run in the main thread, between two of its instructions.

    def handle_exit(self, sig: int, frame: Any) -> None:
        """TERM: leave when the dispatcher says so."""
        self.alive = False

    def handle_usr1(self, sig: int, frame: Any) -> None:
        """USR1: the attendant reopens the logs; an idle slot would, but only when it has work."""

    def handle_quit(self, sig: int, frame: Any) -> None:
        """QUIT, INT: leave now."""
        self.serving = False
        super().handle_quit(sig, frame)

    def handle_abort(self, sig: int, frame: Any) -> None:
        """ABRT: the master has not seen a heartbeat for `timeout`."""
        self.serving = False
        super().handle_abort(sig, frame)

    # The attendant.

    def _attend(self) -> None:
        """Watch until no slot is left, or the time of a dismissed process is over."""
        poll = select.poll()
        poll.register(self.PIPE[0], select.POLLIN)
        while self._working:
            if self._is_overdue():
                self._give_up()
            self._beat()
            self._see_dispatcher(poll)
            ready = {fd for fd, _ in poll.poll(self._patience() * 1000)}
            if self.PIPE[0] in ready:
                self._read_signals()
            if self._offered is not None and self._offered.fileno() in ready:
                self._on_welcome(poll)
            if self._dispatcher_pidfd in ready:
                self._on_dispatcher_death(poll)
            if not self.alive or self.ppid != os.getppid():
                self._leave()

    def _patience(self) -> float:
        return min(TURN, self.timeout or TURN)

    def _wake_attendant(self) -> None:
        with suppress(BlockingIOError):  # with so much to read it is about to wake up anyway
            os.write(self.PIPE[1], b"\0")

    def _read_signals(self) -> None:
        """The numbers of the signals that came. With t = 1 the main thread may be busy."""
        try:
            came = os.read(self.PIPE[0], 512)
        except BlockingIOError:
            return
        if signal.SIGTERM in came:
            self.alive = False
        if signal.SIGUSR1 in came:
            self._reopen_logs()

    def _reopen_logs(self) -> None:
        """If we may not, a successor may, who gets them from the master."""
        try:
            self.log.reopen_files()
        except OSError as error:
            print(f"Leaving, since the logs cannot be opened: {error}", file=sys.stderr, flush=True)
            self.alive = False

    def _beat(self) -> None:
        """Tell gunicorn that we live: with t = 1, unless a request is older than `timeout`.

        So `timeout` protects from a stuck request with t = 1, as it does in the sync worker;
        with t > 1 it watches the process, as it does in gthread.
        """
        if self.cfg.threads > 1 or not self._is_stuck():
            self.notify()

    def _is_stuck(self) -> bool:
        busy = self._cells.begun()
        if busy != getattr(self, "_seen", None):
            self._seen, self._seen_at = busy, time.monotonic()
        return (
            bool(busy)
            and bool(self.cfg.timeout)
            and (time.monotonic() - self._seen_at > self.cfg.timeout)
        )

    def _is_overdue(self) -> bool:
        since = self._dismissed_at
        return since is not None and time.monotonic() - since > self.cfg.graceful_timeout

    def _give_up(self) -> None:
        """End with requests running. With t = 1 the main thread is stuck in one of them."""
        self.log.error("Not finished within graceful_timeout of being dismissed: leaving")
        os._exit(1)

    def _leave(self) -> None:
        """Ask the dispatcher to be dismissed; without one, end when no request is left."""
        now = time.monotonic()
        if self._leaving_since is None:
            self._leaving_since = now
            self._say_leaving()
        if self._channel is None and now - self._leaving_since > ORPHAN_TIME:
            with self._change:
                self.serving = False
                self._change.notify_all()

    def _say_leaving(self) -> None:
        channel = self._channel
        if channel is not None:
            try:
                channel.send(LEAVING, socket.MSG_NOSIGNAL)
            except OSError:
                self.lost(channel)

    # The dispatcher, as the attendant sees it.

    def _see_dispatcher(self, poll: select.poll) -> None:
        """Without a channel, offer one; if nobody takes it in time, offer another."""
        now = time.monotonic()
        if self._channel is not None or not self.serving:
            return
        if self._offered is not None and now - self._offered_at < OFFER_TIME:
            return
        self._withdraw(poll)
        self._offer_channel(poll, now)

    def _offer_channel(self, poll: select.poll, now: float) -> None:
        ours, theirs = pair()
        offer = Register(
            os.getpid(),
            self.age,
            self.cfg.threads,
            self._registered,
            self._leaving_since is not None,
        )
        try:
            send_register(self._control, offer, theirs.fileno(), self._cells.fd, self._own_pidfd)
        except OSError as error:
            self.log.debug("No dispatcher takes registrations: %s", error)
        theirs.close()
        self._offered, self._offered_at = ours, now
        poll.register(ours, select.POLLIN)

    def _withdraw(self, poll: select.poll) -> None:
        if self._offered is not None:
            poll.unregister(self._offered)
            self._offered.close()
            self._offered = None

    def _on_welcome(self, poll: select.poll) -> None:
        """The dispatcher has taken our offer: watch it, and let the slots take requests."""
        channel = self._offered
        assert channel is not None
        try:
            data, fds = receive(channel, socket.MSG_DONTWAIT)
        except OSError:
            data, fds = b"", []
        if data != WELCOME or len(fds) != 1:
            self._withdraw(poll)
            return
        poll.unregister(channel)
        self._offered = None
        self._dispatcher_pidfd = fds[0]
        poll.register(fds[0], select.POLLIN)
        self._registered = True
        with self._change:
            self._channel = channel
            self._change.notify_all()

    def _on_dispatcher_death(self, poll: select.poll) -> None:
        """End the channel, which a child that the app forked may hold open."""
        poll.unregister(self._dispatcher_pidfd)
        os.close(self._dispatcher_pidfd)
        self._dispatcher_pidfd = -1
        with self._change:
            channel, self._channel = self._channel, None
        if channel is not None:
            _shut(channel, socket.SHUT_RDWR)


def _shut(channel: socket.socket, how: int) -> None:
    with suppress(OSError):  # the other end was faster
        channel.shutdown(how)
