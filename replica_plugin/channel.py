"""What dispatcher and processes say to each other, and in which form.

The control socket is one pair made by the master before the first fork. Every process
writes to it, whichever dispatcher lives reads from it:

    REGISTER  a process offers its end of a new channel, its cells, and its pidfd
    ADOPT     a connection whose dispatcher died while a slot was working on it

The kernel tells who writes (SO_PASSCRED), so that no process is taken for another.

A channel is a SEQPACKET pair between one process and one dispatcher:

    dispatcher -> process   WELCOME (with the dispatcher's pidfd and an end of
                            its deck), JOB (with a client), LEAVE
    process -> dispatcher   FREE, REST, DONE, RETURNED, LEAVING, OWED, OVERDUE, UNFINISHED; in
                            gevent mode TURNING, STALLED

Messages of processes are fixed structures or JSON, so that a process, which runs user code,
cannot make the dispatcher build objects; jobs use marshal, which is as fast as it gets
between two processes of one interpreter. Nothing here waits in the dispatcher: it sends and
receives with MSG_DONTWAIT, since O_NONBLOCK would be shared with every copy of a descriptor.
"""

from __future__ import annotations

import array
import errno
import json
import marshal
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from .rest import NOW, Rest
from .unpatched import socketpair

VERSION = 4
PAUSE = 0.01  # seconds until the next attempt while the kernel has no memory for a message
LARGEST = 1 << 16
"""Bytes of the largest message. Half of it is for `ahead` and `carry`, so that each job fits: a
connection with more than that read ahead is closed."""

_ADDRESS = 1024  # characters of the longest address, as Python writes it
_STALL = 4096  # bytes of the longest Stall
_REPORT = struct.Struct("=BBQIQ")
_LONGEST = _REPORT.size + LARGEST // 2  # report that a request is done
_ANCILLARY = socket.CMSG_SPACE(4 * array.array("i").itemsize)
_SENDER = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_SCM_CREDENTIALS = 2
_WITH_DESCRIPTORS = (socket.SCM_RIGHTS, 4)  # and SCM_PIDFD, since Linux 6.5
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
_DONTWAIT, _NOSIGNAL = int(socket.MSG_DONTWAIT), int(socket.MSG_NOSIGNAL)
_PEEK = int(socket.MSG_DONTWAIT | socket.MSG_PEEK)

Address = tuple[Any, ...] | str | bytes

# End, Kind, and states elsewhere are plain constants: in Python 3.11 to look up a member of an Enum
# takes 0.2 us, and a request meets some twenty.


class End:
    """How a connection goes on after a request."""

    KEEP = 0  # another request may follow
    CLOSE = 1  # the client expects the end, and everything it sent was read
    LINGER = 2  # the client may still be sending: half-close, drain, close
    ABORT = 3  # nothing more can be said to this client
    UNTAKEN = 4  # nothing was said: no descriptor was left (RETURNED), or a stop forbade it (DONE)


class Kind:
    """What a process tells on its channel."""

    FREE = 0
    DONE = 1
    LEAVING = 2
    TURNING = 3  # its hub turns again
    STALLED = 4  # its hub does not turn, and why: for the log
    RETURNED = 5  # a job that no slot has taken, since the hub does not turn; or UNTAKEN
    OVERDUE = 6  # a request has reached request_timeout, and was answered so
    UNFINISHED = 7  # it has, and its response had begun
    REST = 8  # a connection, and what its client has not taken yet; DONE is still to come
    OWED = 9  # how many slots may be busy yet with requests of a dispatcher before


class Job(NamedTuple):
    """A ready request on its way to a slot.

    `number` counts the connection's requests from 1. `ahead` are bytes of this request that
    an earlier parser had read already; `carry` is what the slot before wanted to be told.
    `last` asks for `Connection: close`. `waited` is in seconds. `overdue_at` is the monotonic
    time of its request_timeout, or infinity; `limit` is that in seconds, for who speaks of it.
    A job on the deck has `ready_at` instead of both times: they are known when it is taken.
    """

    request: int
    number: int
    client: Address
    server: Address
    ahead: bytes
    carry: bytes
    last: bool
    waited: float
    overdue_at: float
    limit: float | None = None
    ready_at: float = 0.0


class Report(NamedTuple):
    """What a process says.

    DONE has all of it but the `rest`, which REST has, and not `took`; behind a REST only the slot
    comes back with DONE. RETURNED has the `request` and the `end`, STALLED the request and, as
    `carry`, a Stall, OVERDUE and UNFINISHED a stack. OWED has in place of the `request` how many.

    `rest` is what the client has not taken yet; its descriptor travels beside the message. `took`
    is the request that the slot has taken off the deck, and begins; 0 if it waits to be sent one.
    """

    kind: int
    request: int = 0
    end: int = End.KEEP
    ahead: bytes = b""
    carry: bytes = b""
    rest: Rest | None = None
    took: int = 0

    def encode(self) -> bytes:
        start = _REPORT.pack(self.kind, self.end, self.request, len(self.ahead), self.took)
        return b"".join((start, self.ahead, self.carry))


def decode_report(data: bytes, fds: list[int]) -> Report:
    """Raises ValueError for what no process of ours says; its descriptors are closed then.

    A rest that did not come along, since we are out of descriptors, is lost: then the
    connection must not go on.
    """
    try:
        if len(data) < _REPORT.size:
            raise ValueError("too short for a report")
        kind, end, request, ahead, took = _REPORT.unpack_from(data)
        if fds and (len(fds) > 1 or kind != Kind.REST):
            raise ValueError("a descriptor too many")
        if kind == Kind.REST and not fds:
            end = End.ABORT
        split = _REPORT.size + ahead
        if kind > Kind.OWED or end > End.UNTAKEN or split > len(data):
            raise ValueError("unknown, or cut short")
        if took and kind != Kind.DONE:
            raise ValueError("a slot takes a request when it ends one")
        if len(data) > _LONGEST and kind in (Kind.DONE, Kind.REST):
            raise ValueError("more than fits into the next job")
        rest = Rest(fds.pop()) if fds else None
    finally:
        close_all(fds)
    return Report(kind, request, end, data[_REPORT.size : split], data[split:], rest, took)


FREE = Report(Kind.FREE).encode()
LEAVING = Report(Kind.LEAVING).encode()
TURNING = Report(Kind.TURNING).encode()
LEAVE = b"L"
WELCOME = b"W"


@dataclass(frozen=True)
class Register:
    """A process's offer.

    `owed` slots may be busy with requests of a dispatcher before; each has ended what it was busy
    with when it says FREE, or ends (OWED). `extra` slots, one at most, stand beside the `slots`,
    for an exempt request.
    """

    age: int
    slots: int
    owed: int
    leaving: bool
    extra: int = 0
    version: int = VERSION


@dataclass(frozen=True)
class Stall:
    """What keeps a hub from turning: CPU used meanwhile, as a share of 1, and the line it is at."""

    share: float
    place: str

    def encode(self) -> bytes:
        return json.dumps(vars(self)).encode()


def decode_stall(data: bytes) -> Stall | None:
    """None for what no process of ours says."""
    if len(data) > _STALL:
        return None
    try:
        fields = json.loads(data)
        place = "".join(filter(str.isprintable, str(fields["place"])))
        return Stall(float(fields["share"]), place[:200])
    except Exception:  # whatever it is, it must not end the dispatcher
        return None


@dataclass(frozen=True)
class Adopt:
    """A kept-alive connection on its way back, to a dispatcher that does not know it."""

    number: int
    server: Address
    ahead: bytes
    carry: bytes


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a new channel."""
    ours, theirs = socketpair(socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return ours, theirs


def send(sock: socket.socket, data: bytes, *fds: int) -> None:
    """Send a message and descriptors at once or not at all. Raises OSError."""
    sock.sendmsg((data,), _rights(*fds), NOW)


def _rights(*fds: int) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def receive(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """The next message and its descriptors; `b""` at the end. Raises OSError.

    MSG_CMSG_CLOEXEC keeps clients' connections out of the programs that the app starts
    (`socket.recv_fds` loses its flags in Python 3.11).
    """
    try:
        data, rights, _, _ = sock.recvmsg(LARGEST, _ANCILLARY, flags | _CLOEXEC)
    except ConnectionResetError:  # it has not read all we said; told once, before what it said
        data, rights, _, _ = sock.recvmsg(LARGEST, _ANCILLARY, flags | _CLOEXEC)
    if not rights:
        return data, []
    return data, _descriptors(rights)


def _descriptors(extras: list[tuple[int, int, bytes]]) -> list[int]:
    """All that have come, whoever asked for them.

    A process shares the sockets that it gives and is given. It can have the kernel say more
    (SO_PASSCRED), and lay a pidfd beside each message (SO_PASSPIDFD).
    """
    fds = array.array("i")
    for _, kind, content in extras:
        if kind in _WITH_DESCRIPTORS:
            fds.frombytes(content)
    return [fd for fd in fds if fd >= 0]  # else the reason why there is no pidfd


def receive_now(sock: socket.socket) -> tuple[bytes, list[int]]:
    """As `receive`, without waiting. Raises BlockingIOError when there is nothing."""
    return receive(sock, _DONTWAIT)


class ProcessEnd:
    """A process's end of a channel, from which any number of slots may take at a time.

    `deck` is that of the dispatcher at the other end; a slot takes from it while it `may_take`.
    """

    may_take = True
    _flags = _NOSIGNAL

    def __init__(self, sock: socket.socket, deck: socket.socket) -> None:
        self.sock = sock
        self.deck = deck

    def receive(self) -> tuple[bytes, list[int]]:
        """Wait for the next message; `b""` at the end.

        Raises whatever else stops the wait, such as a TimeoutError of the app's, from a handler.
        """
        try:
            return receive(self.sock)
        except ConnectionError:
            return b"", []

    def is_dismissed(self) -> bool:
        """Asked by the attendant: whether LEAVE comes next, and no slot is free to read it."""
        try:
            return self.sock.recv(len(LEAVE), _PEEK) == LEAVE
        except OSError:
            return False

    def tell(self, message: bytes, *fds: int) -> None:
        """Tell the dispatcher, waiting while there is no room or no memory. Raises OSError."""
        while True:
            try:
                if fds:
                    self.sock.sendmsg((message,), _rights(*fds), self._flags)
                else:
                    self.sock.send(message, self._flags)
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM):
                    raise
                self._wait(error.errno == errno.EAGAIN)

    def tell_now(self, message: bytes) -> None:
        """Tell the dispatcher if there is room. Raises OSError."""
        self.sock.send(message, NOW)

    def leave(self, report: Report, rest: Rest) -> bool:
        """Tell REST; False if there is nobody to take it.

        Raises what is the app's, such as a TimeoutError: nobody knows whether it was told then.
        """
        try:
            self.tell(report.encode(), rest.fd)
        except OSError as error:
            if not (isinstance(error, ConnectionError) or error.errno == errno.ETOOMANYREFS):
                raise
            return False
        finally:
            rest.close()
        return True

    def _wait(self, for_room: bool) -> None:
        """The kernel has waited for room itself."""
        time.sleep(PAUSE)


def send_job(sock: socket.socket, job: Job, client: int) -> None:
    send(sock, marshal.dumps(tuple(job)), client)


def decode_job(data: bytes) -> Job:
    return Job(*marshal.loads(data))


def send_register(
    control: socket.socket, offer: Register, channel: int, cells: int, pidfd: int
) -> None:
    send(control, b"R" + json.dumps(vars(offer)).encode(), channel, cells, pidfd)


def send_adopt(control: socket.socket, adopt: Adopt, client: int) -> None:
    send(control, b"A" + json.dumps(vars(adopt), default=_as_text).encode(), client)


def _as_text(value: bytes) -> str:
    return value.decode("latin-1")


class Said(NamedTuple):
    """What lay on the control socket; no message if it means nothing to us. `pid` has sent it."""

    message: Register | Adopt | None
    fds: list[int]
    pid: int


def control_pair() -> tuple[socket.socket, socket.socket]:
    """The control socket: where to read, and where to write."""
    reading, writing = socketpair(socket.SOCK_SEQPACKET)
    reading.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    writing.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return reading, writing


def receive_control(control: socket.socket) -> Said:
    """What lies on the control socket. Raises OSError when there is nothing, EOFError at its end.

    A message, however empty, has a sender.
    """
    space = _ANCILLARY + socket.CMSG_SPACE(_SENDER.size)
    data, extras, _, _ = control.recvmsg(LARGEST, space, _DONTWAIT | _CLOEXEC)
    if not data and not extras:
        raise EOFError
    fds, pid = _descriptors(extras), 0
    for _, kind, content in extras:
        if kind == _SCM_CREDENTIALS:
            pid, *_ = _SENDER.unpack(content)
    try:
        return Said(_decode_control(data, len(fds)), fds, pid)
    except Exception:  # whatever it is, it must not end the dispatcher
        return Said(None, fds, pid)


def _decode_control(data: bytes, fds: int) -> Register | Adopt | None:
    if data[:1] == b"R" and fds == 3:
        return _decode_register(json.loads(data[1:]))
    if data[:1] == b"A" and fds == 1:
        return _decode_adopt(json.loads(data[1:]))
    return None


def _decode_register(fields: dict[str, Any]) -> Register:
    age, slots, owed, extra = (int(fields[name]) for name in ("age", "slots", "owed", "extra"))
    if slots < 1 or extra not in (0, 1) or not 0 <= age < 1 << 31:
        raise ValueError("a process without slots, or with too many, or of no age")
    if not 0 <= owed <= slots + extra:
        raise ValueError("more busy slots than it has")
    return Register(age, slots, owed, bool(fields["leaving"]), extra, fields["version"])


def _decode_adopt(fields: dict[str, Any]) -> Adopt:
    ahead, carry = (fields[name].encode("latin-1") for name in ("ahead", "carry"))
    if len(ahead) + len(carry) > LARGEST // 2:
        raise ValueError("more than fits into the next job")
    return Adopt(int(fields["number"]), _address(fields["server"]), ahead, carry)


def _address(value: Any) -> Address:
    if not (isinstance(value, (list, str)) and all(isinstance(part, (str, int)) for part in value)):
        raise ValueError("no address")
    if len(str(value)) > _ADDRESS:
        raise ValueError("an address that is too long")
    return tuple(value) if isinstance(value, list) else value


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
