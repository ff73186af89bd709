"""How a process comes to a dispatcher, and to the next one when that dies.

1. The process makes a channel and offers one end over the control socket (REGISTER).
2. The dispatcher takes the offer and says so on the channel (WELCOME, with its own pidfd and
   the deck).
3. The channel is given to the slots.
4. When the dispatcher's pidfd fires, the channel is ended, so that slots let go of it (the
   app may have forked a child that holds it open), and it begins again at 1.

An offer that nobody takes in time is withdrawn and made anew: a dispatcher that reads it
later finds the channel closed. All of it runs in the attendant (worker.py).
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .channel import WELCOME, Register, close_all, pair, receive_now, send_register
from .deck import let_go
from .unpatched import Socket, poll

OFFER_TIME = 5.0  # seconds without WELCOME after which the process offers itself anew
RETRY_TIME = 0.02  # seconds until it does so if the dispatcher died with its offer


class Registration:
    """One process's tie to whichever dispatcher lives.

    `found` is called with a channel, which a dispatcher has taken, and its deck, `lost` when that
    died. `describe` makes the offer.
    """

    def __init__(
        self,
        control: socket.socket,
        cells: int,
        log: Any,
        describe: Callable[[bool], Register],
        found: Callable[[socket.socket, socket.socket], None],
        lost: Callable[[socket.socket], None],
    ) -> None:
        self._control = control
        self._cells = cells
        self._log = log
        self._describe = describe
        self._found = found
        self._lost = lost
        self._own_pidfd = os.pidfd_open(os.getpid())
        self._poll = poll()
        self._offered: socket.socket | None = None
        self._offered_at = 0.0
        self._dispatcher = -1  # its pidfd
        self._ends: dict[socket.socket, int] = {}  # channel and deck, and their inodes
        self._was_registered = False

    def watch(self, fd: int) -> None:
        """Have `wait` return when there is something to read here, too."""
        self._poll.register(fd, select.POLLIN)

    def wait(self, seconds: float) -> None:
        """Sleep until something has happened, and see to it if it is ours."""
        self._offer_if_needed()
        if self._dispatcher < 0 and self._offered is None:
            seconds = RETRY_TIME
        ready = {fd for fd, _ in self._poll.poll(seconds * 1000)}
        if self._offered is not None and self._offered.fileno() in ready:
            self._on_reply(self._offered)
        if self._dispatcher in ready:
            self._on_death()
        self._check_ends()

    def _offer_if_needed(self) -> None:
        if self._dispatcher >= 0:
            return
        now = time.monotonic()
        patience = RETRY_TIME if self._offered is None else OFFER_TIME
        if now - self._offered_at >= patience:
            self._withdraw()
            self._offer(now)

    def _offer(self, now: float) -> None:
        self._offered_at = now
        try:
            ours, theirs = pair()
        except OSError as error:  # the app has all the descriptors; perhaps not in a moment
            self._log.debug("No channel can be made: %s", error)
            return
        offer = self._describe(self._was_registered)
        try:
            send_register(self._control, offer, theirs.fileno(), self._cells, self._own_pidfd)
        except OSError as error:
            self._log.debug("No dispatcher takes registrations: %s", error)
        theirs.close()
        self._offered = ours
        self._poll.register(ours, select.POLLIN)

    def _withdraw(self) -> None:
        if self._offered is not None:
            self._poll.unregister(self._offered)
            self._offered.close()
            self._offered = None

    def _on_reply(self, channel: socket.socket) -> None:
        """The dispatcher has taken our offer, or has died with it."""
        try:
            data, fds = receive_now(channel)
        except OSError:
            data, fds = b"", []
        if data != WELCOME or len(fds) != 2:
            close_all(fds)
            self._withdraw()
            return
        self._poll.unregister(channel)
        self._offered = None
        self._was_registered = True
        self._dispatcher = fds[0]
        self._poll.register(fds[0], select.POLLIN)
        deck = Socket(fileno=fds[1])
        deck.setblocking(True)  # whatever setdefaulttimeout says: a look there never waits
        self._ends = {end: _inode(end) for end in (channel, deck)}
        self._found(channel, deck)

    def _check_ends(self) -> None:
        """Raises OSError if the app has closed one of them; its number may be another's by now."""
        if any(_inode(end) != inode for end, inode in self._ends.items()):
            raise OSError("The app has closed a descriptor of this process's channel")

    def _on_death(self) -> None:
        self._poll.unregister(self._dispatcher)
        os.close(self._dispatcher)
        self._dispatcher = -1
        (channel, deck), self._ends = self._ends, {}
        self._lost(channel)
        with suppress(OSError):  # the other end was faster
            channel.shutdown(socket.SHUT_RDWR)
        let_go(deck)


def _inode(end: socket.socket) -> int:
    return os.fstat(end.fileno()).st_ino
