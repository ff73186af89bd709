"""What comes through a channel: when its other end is gone, and beside a message."""

from __future__ import annotations

import errno
import gc
import math
import os
import socket
from typing import Any

import pytest

from replica_plugin.channel import (
    FREE,
    LARGEST,
    LEAVE,
    Adopt,
    Job,
    Kind,
    ProcessEnd,
    Report,
    Stall,
    close_all,
    control_pair,
    decode_job,
    decode_report,
    decode_stall,
    pair,
    receive_control,
    receive_now,
    send,
    send_adopt,
    send_job,
)
from replica_plugin.rest import Rest

SO_PASSPIDFD = 76


def test_what_was_said_before_the_end_is_read_though_not_all_had_been_heard():
    ours, theirs = pair()
    with ours:
        ours.send(LEAVE)
        theirs.send(FREE)
        theirs.close()
        assert [receive_now(ours) for _ in range(2)] == [(FREE, []), (b"", [])]


def test_a_rest_of_which_nobody_knows_whether_it_was_told_is_not_sent_again():
    """An alarm of the app's, say, whose handler raises as the message has gone out."""

    class Late(socket.socket):
        def sendmsg(self, *arguments: Any) -> int:
            super().sendmsg(*arguments)
            raise TimeoutError

    ours, theirs = pair()
    with Late(fileno=ours.detach()) as late, theirs, pytest.raises(TimeoutError):
        ProcessEnd(late, late).leave(Report(Kind.REST, 7), Rest.of(b"left"))


def test_of_a_hub_a_process_cannot_say_more_than_takes_no_time_to_read():
    assert decode_stall(Stall(0.5, "app.py:1 (run)").encode()) == Stall(0.5, "app.py:1 (run)")
    assert decode_stall(Stall(0.5, "x" * 5000).encode()) is None


def test_what_else_the_kernel_says_beside_a_message_is_no_descriptor():
    """A process shares the sockets that it gives and is given, and may set their options."""
    for ours, theirs in (pair(), reversed(pair())):
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            send(theirs, FREE)
            assert receive_now(ours) == (FREE, [])


def test_a_pidfd_that_a_process_has_the_kernel_lay_beside_a_message_is_nonsense_and_closed():
    """Else its messages would leave the dispatcher without descriptors."""
    ours, theirs = pair()
    with ours, theirs:
        ask_for_pidfds(ours)
        before = descriptors()
        for message in (FREE, Report(Kind.DONE, 1).encode()):
            send(theirs, message)
            data, fds = receive_now(ours)
            assert (data, len(fds)) == (message, 1)
            with pytest.raises(ValueError, match="a descriptor too many"):
                decode_report(data, fds)
        assert descriptors() == before


def test_a_pidfd_that_somebody_has_laid_beside_what_is_on_the_control_socket_is_closed():
    reading, writing = control_pair()
    with reading, writing:
        ask_for_pidfds(reading)
        before = descriptors()
        send(writing, b"?")
        close_all(receive_control(reading).fds)
        assert descriptors() == before


def ask_for_pidfds(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
    except OSError:
        pytest.skip("no pidfds beside messages before Linux 6.5")


def descriptors() -> int:
    gc.collect()  # what others have left is not closed in between
    return len(os.listdir("/proc/self/fd"))


class Poor(socket.socket):
    """A socket for whose messages there is no memory, twice; then its other end is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.errors = [errno.ENOBUFS, errno.ENOMEM, errno.EPIPE]

    def send(self, data: bytes, flags: int = 0) -> int:
        error = self.errors.pop(0)
        raise OSError(error, "")


def test_a_report_waits_while_there_is_no_memory_for_it():
    """Else the slot would take its dispatcher for dead, and its credit would be lost."""
    sock = Poor()
    with sock, pytest.raises(BrokenPipeError):
        ProcessEnd(sock, sock).tell(FREE)
    assert not sock.errors


# What a process says of a connection goes into the next job, which is one message.

MOST = LARGEST // 2
LONGEST = b"\0" + bytes(range(0x80, 0x80 + 107))  # of a Unix socket


def test_the_most_that_a_process_may_say_of_a_connection_fits_into_the_next_job():
    done = decode_report(Report(Kind.DONE, 1, ahead=b"a" * MOST).encode(), [])
    longest = os.fsdecode(LONGEST)
    job = Job(1 << 63, 2, longest, longest, done.ahead, b"", True, 1e9, math.inf, 1e9, 1e9)
    ours, theirs = pair()
    with ours, theirs:
        send_job(ours, job, ours.fileno())
        data, (fd,) = receive_now(theirs)
        os.close(fd)
    assert decode_job(data) == job


@pytest.mark.parametrize(("ahead", "carry"), [(MOST + 1, 0), (0, MOST + 1), (MOST, 1)])
def test_more_than_fits_into_the_next_job_is_nonsense(ahead, carry):
    report = Report(Kind.DONE, 1, ahead=b"a" * ahead, carry=b"c" * carry)
    with pytest.raises(ValueError, match="more than fits into the next job"):
        decode_report(report.encode(), [])
    assert adopted(ahead=b"a" * ahead, carry=b"c" * carry) is None


def test_the_stack_of_a_request_may_be_longer_for_it_is_only_logged():
    stack = b"s" * (MOST + 1)
    assert decode_report(Report(Kind.OVERDUE, 1, carry=stack).encode(), []).carry == stack


@pytest.mark.parametrize(
    "server",
    [("127.0.0.1", 8000), ("::1", 8000, 0, 0), "/run/socket", "", os.fsdecode(LONGEST)],
    ids=repr,
)
def test_an_address_comes_back_with_its_connection(server):
    adopt = Adopt(2, server, b"a" * MOST, b"")
    assert adopted(**vars(adopt)) == adopt


@pytest.mark.parametrize(
    "server",
    [None, 1, 1.5, {}, ["a", None], [["a"]], "a" * LARGEST, ["a" * 2000], ["a"] * 1000, [9**4000]],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_address_does_not_come_back_with_a_connection(server):
    assert adopted(server=server) is None


def adopted(**fields: object) -> object:
    """What a dispatcher hears of a connection that is handed back so."""
    reading, writing = control_pair()
    adopt = Adopt(**{"number": 2, "server": "", "ahead": b"", "carry": b"", **fields})
    with reading, writing:
        send_adopt(writing, adopt, writing.fileno())
        said = receive_control(reading)
    close_all(said.fds)
    return said.message
