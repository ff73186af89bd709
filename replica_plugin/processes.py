"""The side of the dispatcher that faces processes: registration, jobs, reports, deaths.

1. A process is known from its REGISTER until its pidfd fires; the end of its channel may never
   come, since a child that the app forked may hold the other end open. If it comes, and the process
   lives on, it is ended (DEAF): nothing could be heard of what it has, or has taken off the deck.
2. What a process reported before it died counts: the channel is read to its end first.
3. What a process says that nobody understands ends that process, never us: it may have lost a
   report of a slot, and dead it is replaced. So does an offer in another's name: by its pidfd, and
   by what the kernel says of who has sent the offer, a process can register only itself.
4. However much a process says, the others have their turns (TURN, LAST_WORDS).
5. Nothing here waits. A job that cannot be delivered now goes back (`unsent`), and the
   process is sent nothing until its channel has room.
"""

from __future__ import annotations

import errno
import math
import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from .cells import DUMP, Cells
from .channel import (
    LEAVE,
    VERSION,
    WELCOME,
    Address,
    Adopt,
    Job,
    Kind,
    Register,
    Report,
    close_all,
    decode_report,
    receive_control,
    receive_now,
    send,
    send_job,
)
from .deck import Deck
from .heritage import is_dead

TURN = 64  # messages of one process, or on the control socket, before others have their turn
DEAF = 2.0  # seconds a process may live when its channel has ended
LAST_WORDS = 4096  # messages of a dead one; its channel has room for no more
_SHORTAGE = (errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)
_ENDS_A_JOB = (Kind.DONE, Kind.RETURNED)
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
_STREAMS = (0, socket.IPPROTO_TCP, 262)  # Unix, TCP and MPTCP


@dataclass(eq=False)
class Link:
    """A registered process, and the descriptors that tie us to it."""

    age: int
    pid: int
    slots: int
    extra: int
    channel: socket.socket
    cells: Cells
    pidfd: int
    open: bool = True  # the channel has not ended
    full: bool = False  # a message could not be delivered
    # Nor could one, or it could not be taken, for want of something else: tried again then, or, if
    # 0, whenever we look.
    short_until: float = math.inf
    done_at: float = -math.inf  # when it has reported a request done, the last time
    heard: bool = False  # anything, on the channel
    deaf_since: float | None = None
    leave_due: bool = False
    dismissed: bool = False
    stalled: bool = False  # as the dispatcher was told last
    busy: int = 0  # how many jobs it was sent, and has not reported done
    silenced: bool = False  # its slots begin no response any more


class Office(Protocol):
    """What the processes' side tells the dispatcher."""

    def on_registered(self, link: Link, owed: int, leaving: bool) -> None: ...
    def on_report(self, link: Link, report: Report, now: float) -> None: ...
    def on_sendable(self, link: Link, now: float) -> None: ...
    def on_undeliverable(self, error: OSError) -> None: ...
    def on_stall(self, link: Link, now: float) -> None: ...
    def may_have(self, slots: int) -> bool: ...
    def on_nonsense(self, link: Link) -> None: ...
    def on_death(self, link: Link, now: float) -> None: ...
    def on_adopt(self, adopt: Adopt, sock: socket.socket, client: Address, now: float) -> None: ...
    def on_control_end(self) -> None: ...


class Processes:
    """All registered processes, by age."""

    def __init__(self, epoll: select.epoll, control: socket.socket, office: Office) -> None:
        self.links: dict[int, Link] = {}
        self.slots = 0  # of all of them
        self._epoll = epoll
        self._control = control
        self._office = office
        self.by_channel: dict[int, Link] = {}
        self._by_pidfd: dict[int, Link] = {}
        self._own_pidfd = os.pidfd_open(os.getpid())
        self.deck = Deck()
        self._channels = select.epoll()  # all of them, for `have_spoken`
        epoll.register(control.fileno(), select.EPOLLIN)

    def on_event(self, fd: int, now: float) -> None:
        """epoll has something to say about the control socket or a pidfd."""
        if fd == self._control.fileno():
            self._on_control(now)
        elif fd in self._by_pidfd and is_dead(fd):  # not an event of the number's last owner
            self._on_death(self._by_pidfd[fd], now)

    def watch(self, now: float) -> None:
        """Tell of processes whose hub has stopped turning, and of those where it turns again.

        Their cells say it and no message, which a thread without the GIL could not send.
        And try again what the kernel was too short of something to deliver.
        """
        for link in self.links.values():
            if link.heard and not (link.open or link.dismissed):
                self._see_to_deaf(link, now)
            if link.short_until <= now:
                link.short_until = math.inf
                self._on_room(link, now)
            if link.cells.has_stalled(now) is not link.stalled:
                link.stalled = not link.stalled
                self._office.on_stall(link, now)

    def next_deadline(self) -> float:
        """When one that had no descriptor is tried again; infinity if there is none."""
        times = (link.short_until for link in self.links.values())
        return min(filter(None, times), default=math.inf)

    def _see_to_deaf(self, link: Link, now: float) -> None:
        if link.deaf_since is None:
            link.deaf_since = now
        elif now - link.deaf_since > DEAF:
            link.deaf_since = math.inf  # once
            self.on_nonsense(link)

    # What processes say.

    def _on_control(self, now: float) -> None:
        """Read what lies there.

        Its end comes when the master and all processes are gone, or one has shut it for all.
        """
        for _ in range(TURN):
            try:
                message, fds, pid = receive_control(self._control)
            except EOFError:
                self._epoll.unregister(self._control.fileno())
                self._office.on_control_end()
                return
            except OSError:  # nothing there, or no memory now
                return
            if isinstance(message, Register) and message.version == VERSION:
                self._register(message, fds, pid, now)
            elif isinstance(message, Adopt):
                self._adopt(message, fds[0], now)
            else:
                close_all(fds)

    def _adopt(self, adopt: Adopt, fd: int, now: float) -> None:
        try:
            sock = socket.socket(fileno=fd)
        except OSError:  # it is none
            os.close(fd)
            return
        try:
            if not _is_stream(sock):
                raise OSError("no connection of a client's")
            client = sock.getpeername()
        except OSError:
            sock.close()
        else:
            self._office.on_adopt(adopt, sock, client, now)

    def _register(self, offer: Register, fds: list[int], pid: int, now: float) -> None:
        if not self._office.may_have(offer.slots):
            close_all(fds)
            return
        link = _tie(offer, fds, pid)
        if link is None:
            return
        if self._is_in_anothers_name(link):
            self._office.on_nonsense(link)
            _signal(link, signal.SIGKILL)
            self._release(link)
            return
        try:
            send(link.channel, WELCOME, self._own_pidfd, self.deck.end.fileno())
            if is_dead(link.pidfd):
                raise ProcessLookupError
        except OSError:  # the process is dead, or has made another offer meanwhile
            self._release(link)
            return
        if offer.age in self.links:
            self._on_death(self.links[offer.age], now)
        self._know(link)
        self._office.on_registered(link, offer.owed, offer.leaving)

    def _is_in_anothers_name(self, link: Link) -> bool:
        """Whether its age is another process's, or it has registered under another one."""
        return any(
            (it.age == link.age) != (it.pid == link.pid) and not is_dead(it.pidfd)
            for it in self.links.values()
        )

    def _know(self, link: Link) -> None:
        self.links[link.age] = link
        self.slots += link.slots
        self.by_channel[link.channel.fileno()] = link
        self._by_pidfd[link.pidfd] = link
        self._channels.register(link.channel.fileno(), select.EPOLLIN)
        self._epoll.register(link.channel.fileno(), select.EPOLLIN)
        self._epoll.register(link.pidfd, select.EPOLLIN)

    def on_channel(self, link: Link, mask: int, now: float) -> None:
        """epoll has something to say about a channel.

        Who reads it until it is empty asks once too often: it holds a report for each job, and for
        what a slot has taken, too. What is left has another event.
        """
        if mask & select.EPOLLOUT and link.full:
            self._on_room(link, now)
        expected = max(1, link.busy)
        for report in self._reports(link, TURN):
            self._office.on_report(link, report, now)
            expected -= not (report.took or report.kind == Kind.REST)
            if not expected:
                break

    def _reports(self, link: Link, most: int) -> Iterator[Report]:
        """What lies on the channel; when it has ended, it is not listened to any more."""
        for _ in range(most):
            if not link.open:
                return
            try:
                data, fds = receive_now(link.channel)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                close_all(fds)
                self._close_channel(link)
                return
            try:
                report = decode_report(data, fds)
            except ValueError:
                self.on_nonsense(link)
                return
            link.heard = True
            link.busy -= report.kind in _ENDS_A_JOB
            yield report

    def hear_all(self, now: float) -> bool:
        """Hear what all have said by now; False if one may have something off the deck, and has
        not said so yet."""
        if any(not link.open or link.cells.is_taking() for link in self.links.values()):
            return False
        for link in list(self.links.values()):
            for report in self._reports(link, LAST_WORDS):
                self._office.on_report(link, report, now)
        return True

    def ending(self) -> int:
        """How many slots have written their response, and have not reported it yet."""
        return sum(link.cells.ending() for link in self.links.values())

    def have_spoken(self) -> bool:
        """Whether something lies on a channel."""
        return bool(self._channels.poll(0, 1))

    def on_nonsense(self, link: Link) -> None:
        """It says what no process of ours says: it ends."""
        self._office.on_nonsense(link)
        self._close_channel(link)
        _signal(link, signal.SIGKILL)

    def _on_death(self, link: Link, now: float) -> None:
        for report in self._reports(link, LAST_WORDS):
            self._office.on_report(link, report, now)
        del self.links[link.age]
        self.slots -= link.slots
        del self._by_pidfd[link.pidfd]
        self._epoll.unregister(link.pidfd)
        self._close_channel(link)
        self._office.on_death(link, now)
        self._release(link)

    def _close_channel(self, link: Link) -> None:
        if link.open:
            link.open = False
            del self.by_channel[link.channel.fileno()]
            self._channels.unregister(link.channel.fileno())
            self._epoll.unregister(link.channel.fileno())

    def _release(self, link: Link) -> None:
        link.channel.close()
        link.cells.close()
        os.close(link.cells.fd)
        os.close(link.pidfd)

    # What processes are told.

    def send(self, age: int, job: Job, client: int) -> bool:
        """Deliver a job; False if that is not possible now."""
        link = self.links[age]
        try:
            send_job(link.channel, job, client)
        except OSError as error:
            self._on_full(link, error)
            return False
        link.busy += 1
        return True

    def dismiss(self, age: int) -> None:
        """Tell a process that nothing more will come."""
        link = self.links[age]
        link.dismissed = True
        try:
            send(link.channel, LEAVE)
        except OSError as error:
            link.leave_due = True
            self._on_full(link, error)

    def inspect(self, age: int) -> None:
        """Have a process write its stacks, which can be read soon."""
        link = self.links[age]
        link.cells.expect_stacks()
        _signal(link, DUMP)

    def kill(self, age: int) -> None:
        """End a process. Its death will tell."""
        _signal(self.links[age], signal.SIGKILL)

    def kill_all(self) -> None:
        """What a master does at the end of a stop, for one that is dead: a process may be in a call
        that keeps the GIL, or wait for a thread that the app has left."""
        for age in self.links:
            self.kill(age)

    def _on_full(self, link: Link, error: OSError) -> None:
        """Wait for room; if the channel is gone, the process's death will tell.

        A channel has room all the time while memory is short, or while too many descriptors of
        this user's are under way, whoever has sent them: `watch` tries again.
        """
        if error.errno in _SHORTAGE:
            link.short_until = 0.0
            self._office.on_undeliverable(error)
        elif link.open and not link.full and error.errno == errno.EAGAIN:
            link.full = True
            self._epoll.modify(link.channel.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _on_room(self, link: Link, now: float) -> None:
        if link.full and link.open:
            self._epoll.modify(link.channel.fileno(), select.EPOLLIN)
        link.full = False
        if link.leave_due:
            link.leave_due = False
            self.dismiss(link.age)
        else:
            self._office.on_sendable(link, now)


def _is_stream(sock: socket.socket) -> bool:
    """Whether it is of a kind that a listener of ours may have accepted."""
    kind = sock.family in _FAMILIES and sock.type == socket.SOCK_STREAM
    return kind and sock.proto in _STREAMS


def _tie(offer: Register, fds: list[int], pid: int) -> Link | None:
    """None, and the descriptors closed, if they are not what this process offers."""
    channel, cells, pidfd = fds
    if not _is_of(pidfd, pid):
        close_all(fds)
        return None
    try:
        memory = Cells(offer.slots + offer.extra, cells)
        sock = socket.socket(fileno=channel)
    except (OSError, OverflowError, ValueError):
        close_all(fds)
        return None
    if sock.type != socket.SOCK_SEQPACKET:
        close_all([sock.detach(), cells, pidfd])
        return None
    return Link(offer.age, pid, offer.slots, offer.extra, sock, memory, pidfd)


def _is_of(pidfd: int, pid: int) -> bool:
    """Whether this is a pidfd of this process, which lives."""
    if not pid:  # the sender is none that we could see
        return False
    try:
        with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
            return b"\nPid:\t%d\n" % pid in file.read()
    except OSError:  # no /proc: nobody can tell
        return True


def _signal(link: Link, number: int) -> None:
    with suppress(OSError):  # it is dead already
        signal.pidfd_send_signal(link.pidfd, number)
