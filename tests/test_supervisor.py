"""The supervisor, where the system gives it less than it asks for."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest

from replica_plugin import supervisor
from replica_plugin.channel import control_pair
from replica_plugin.heritage import is_dead
from replica_plugin.journal import Journal
from replica_plugin.pages import MasterPage, ReplicaPage
from replica_plugin.rules import Privileges


class Said(Journal):
    """A journal that is read here."""

    def __init__(self):
        self.errors = []

    def error(self, message, *args):
        self.errors.append(message % args)


@pytest.fixture
def one(monkeypatch):
    monkeypatch.setattr(supervisor, "PAUSE", 0)
    monkeypatch.setattr(supervisor.util, "_setproctitle", lambda title: None)
    control, other = control_pair()
    page, replica_page = MasterPage(), ReplicaPage()
    fds = [os.eventfd(0), os.eventfd(0), os.pidfd_open(os.getppid())]
    inheritance = supervisor.Inheritance(
        [], control.detach(), page.fd, replica_page.fd, *fds, os.getppid()
    )
    one = supervisor.Supervisor(inheritance, page, SimpleNamespace(stop=None), Said())
    monkeypatch.setattr(one, "_become_dispatcher", lambda: claim_and_stay(one))
    yield one
    signal.pidfd_send_signal(one._pidfd, signal.SIGKILL)
    os.waitpid(one._pid, 0)
    one._control.close()
    other.close()
    for fd in (*fds, one._pidfd, page.fd, replica_page.fd):
        os.close(fd)


def claim_and_stay(one):
    try:
        one._replica_page.claim()
        time.sleep(60)
    finally:
        os._exit(0)


def test_a_dispatcher_that_cannot_be_started_is_tried_again_and_it_is_said(one, monkeypatch):
    fork, failures = os.fork, [BlockingIOError(11, "Try again"), OSError(12, "No memory")]

    def scarce():
        if failures:
            raise failures.pop(0)
        return fork()

    monkeypatch.setattr(os, "fork", scarce)
    one._start()
    assert one._journal.errors == [
        "No dispatcher can be started: Try again",
        "No dispatcher can be started: No memory",
    ]
    assert one._pid and one._pidfd >= 0


@pytest.mark.parametrize("error", [ValueError, PermissionError])
def test_a_limit_that_cannot_be_raised_stays(monkeypatch, error):
    def refused(*_):
        raise error

    monkeypatch.setattr(resource, "setrlimit", refused)

    class Wishes:
        privileges = Privileges(os.geteuid(), os.getegid(), False)

    supervisor._settle(Wishes)


def test_a_process_that_has_ended_has_done_so_however_long_one_would_wait():
    """graceful_timeout may be said to be years."""
    child = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(child.pid)
    child.wait()
    assert is_dead(pidfd, 1e10)
    os.close(pidfd)
