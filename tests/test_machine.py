"""Limits of the machine: told at the start, and met without a crash or a spin.

Those of the dispatcher are the same in both modes.
"""

from __future__ import annotations

import http.client
import os
import resource
import shutil
import signal
import time

import pytest
from gunicorn.config import Config
from server import IN_BOTH_MODES, Load, Server, cpu, wait_for
from tracing import tracing

from replica_plugin import boot, machine
from replica_plugin.answers import UNTAKEN
from replica_plugin.channel import End, Kind, Report, decode_report
from replica_plugin.config.load import load
from replica_plugin.machine import Machine, shortages, spare
from replica_plugin.rest import Rest

PLENTY = Machine(1024, 1 << 20, 4096)
OUT = r"\[WARNING\] Out of descriptors or memory: connections wait in the backlog \(see ulimit"


def test_a_machine_that_allows_everything_needs_no_word():
    assert shortages(PLENTY, 1024, 4, 4, 2048) == []
    assert shortages(Machine(-1, -1, None), 30000, 100, 4000, 2048) == []


@pytest.mark.parametrize("bound", [32, 100, 215, 216, 1024, 30000])
def test_the_limit_of_open_files_that_is_asked_for_is_enough_and_one_less_is_not(bound):
    (line,) = shortages(PLENTY._replace(hard=bound), bound, 1, 4, 2048)
    needed = int(line.split("Raise it to ")[1].split()[0])
    assert shortages(PLENTY._replace(hard=needed), bound, 1, 4, 2048) == []
    assert needed - spare(needed, 1) <= bound + 1


def test_connections_leave_descriptors_to_all_processes_and_their_successors():
    """Each brings a channel, its cells and its pidfd; the cells are then held twice."""
    assert [spare(1 << 20, processes) for processes in (0, 1, 100)] == [64, 72, 864]


def test_a_hard_limit_that_is_too_low_for_the_processes_is_told():
    assert shortages(PLENTY._replace(hard=1024), 100, 33, 4, 2048) == [
        "Open files: the hard limit (1024) is too low for 33 processes. Raise it to 1056 or more, "
        "or lower processes_per_replica. Until then processes that start may have to wait for "
        "connections to end before they get requests."
    ]
    assert shortages(PLENTY._replace(hard=1056), 100, 33, 4, 2048) == []


def test_a_hard_limit_that_is_too_low_is_told_with_what_holds_until_it_is_raised():
    assert shortages(PLENTY._replace(hard=512), 1024, 8, 4, 2048) == [
        "Open files: the hard limit (512) is too low for max_replica_concurrency (1024). Raise "
        "it to 1152 (ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of docker) or lower "
        "max_replica_concurrency to 384. Until then the replica takes about 384 connections at a "
        "time; more wait in the backlog."
    ]


def test_a_soft_limit_that_is_too_low_for_the_slots_of_a_process_is_told():
    assert shortages(PLENTY, 1024, 4, 1000, 2048) == [
        "Open files: the soft limit (1024) is too low for 1000 slots in a process. Raise it to "
        "1064 or more (ulimit -n), or lower threads_per_process. Until then requests for which no "
        "process has a descriptor wait for one, and get 503 if none is about to be free."
    ]


def test_a_soft_limit_that_is_too_low_for_one_slot_has_one_way_out():
    (line,) = shortages(PLENTY._replace(soft=64), 1024, 1, 1, 2048)
    assert "too low for a slot in a process. Raise it to 65 or more (ulimit -n). Until" in line


@pytest.mark.parametrize(
    ("mode", "threads", "slots"), [("thread", 1, 1), ("thread", 2, 3), ("gevent", 2, 2)]
)
def test_only_threads_have_a_slot_more_for_exempt_requests(monkeypatch, mode, threads, slots):
    asked = []
    monkeypatch.setattr(machine, "shortages", lambda *asking: asked.append(asking[3]))
    cfg = Config()
    cfg.set("worker_class", boot.worker_class(mode))
    cfg.set("threads", threads)
    loaded = load(environ={"REPLICA_EXEMPT": "/status"})
    boot.shortages(cfg, loaded)
    assert asked == [slots]


def test_a_backlog_that_the_kernel_cuts_is_told():
    assert shortages(PLENTY._replace(backlog=128), 1024, 4, 4, 2048) == [
        "Backlog: net.core.somaxconn (128) is less than gunicorn's backlog (2048). Raise it "
        "(sysctl -w net.core.somaxconn=2048), or set --backlog 128. Until then the kernel holds "
        "128 connections for a dispatcher that is busy or starts again, and lets others try once "
        "more."
    ]


def test_the_start_tells_what_the_machine_does_not_allow(start):
    server = start("--backlog", "1000000")
    server.wait_log(r"\[WARNING\] Backlog: net\.core\.somaxconn \(\d+\) is less than")


def test_a_rest_of_a_response_that_found_no_descriptor_ends_its_connection():
    rest = Rest.of(b"abc")
    message = Report(Kind.REST, 7, End.KEEP, rest=rest).encode()
    assert decode_report(message, []) == Report(Kind.REST, 7, End.ABORT)
    assert decode_report(message, [rest.fd]).end == End.KEEP
    rest.close()


@IN_BOTH_MODES
def test_a_request_for_which_its_process_has_no_descriptor_is_answered_503(start):
    server = start()
    (worker,) = server.workers
    limits = leave_no_descriptor(worker)
    for _ in range(3):
        reply = server.get("/hello")
        assert (reply.status, reply.body.decode()) == (503, f"{UNTAKEN.text}\n")
    resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
    assert server.get("/hello").status == 200
    server.wait_log(rf"Out of descriptors: process {worker} could not take a request")


@IN_BOTH_MODES
def test_requests_for_which_one_process_has_no_descriptor_go_to_the_others(start):
    server = start(config={"processes_per_replica": 2, "threads_per_process": 2})
    poor, rich = server.workers
    limits = leave_no_descriptor(poor)
    for _ in range(50):
        reply = server.get("/numbers")
        assert (reply.status, reply.json["pid"]) == (200, rich)
    resource.prlimit(poor, resource.RLIMIT_NOFILE, limits)
    wait_for(lambda: server.get("/numbers").json["pid"] == poor, "its turn")


@IN_BOTH_MODES
def test_requests_for_which_busy_processes_have_no_descriptor_wait_until_one_of_theirs_ends(start):
    server = start(config={"processes_per_replica": 2, "threads_per_process": 2})
    clients = [server.connect().ask("/hold/x") for _ in range(2)]
    actors = start.stage.take(2)
    for worker in server.workers:
        leave_no_descriptor(worker)
    waiting = [server.connect().ask("/hello") for _ in range(4)]
    server.wait_log("Out of descriptors: process .* could not take a request")
    server.wait_numbers(running=2, waiting=4)
    actors.pop().finish()
    assert [client.reply().status for client in waiting] == [200] * 4
    actors.pop().finish()
    assert [client.reply().status for client in clients] == [200] * 2


@IN_BOTH_MODES
def test_what_waits_in_a_stop_is_not_refused_since_one_process_has_no_descriptor(start):
    server = start(config={"processes_per_replica": 2, "threads_per_process": 1})
    clients = [server.connect().ask("/hold/x")]
    actor = start.stage.next()
    clients += [server.connect().send("GET /hello HTTP/1.1\r\nHo") for _ in range(5)]
    server.wait_numbers(running=1, connections=6)
    (poor,) = set(server.workers) - {actor.pid}
    leave_no_descriptor(poor)
    server.tell(signal.SIGTERM)
    server.wait_closed()
    for client in clients[1:]:
        client.send("st: test\r\n\r\n")
    server.wait_log(rf"Out of descriptors: process {poor} could not take a request")
    actor.finish()
    assert [client.reply().status for client in clients] == [200] * 6
    assert server.stop() == 0


def leave_no_descriptor(worker: int) -> tuple[int, int]:
    """Of a process that has had no client yet, whose descriptor it could let go of."""
    limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (lowest_free(worker), limits[1]))
    return limits


def lowest_free(pid: int) -> int:
    """The number that a process's next descriptor gets."""
    return min(set(range(1024)) - {int(number) for number in os.listdir(f"/proc/{pid}/fd")})


@pytest.fixture
def poor(start) -> Server:
    """A replica whose dispatcher may have 80 descriptors, of which 60 are for connections."""
    server = start("--keep-alive", "60")
    resource.prlimit(server.supervisor, resource.RLIMIT_NOFILE, (80, 80))
    before = server.dispatcher
    os.kill(before, 9)
    wait_for(lambda: server.dispatcher != before, "another dispatcher")
    assert server.get("/hello").status == 200
    return server


def wait_quiet(server: Server) -> None:
    """Numbers of before may not count the fixture's connection yet."""
    now = time.monotonic()
    wait_for(lambda: server.numbers().beat > now, "new numbers")
    server.wait_numbers(connections=0)


def test_a_dispatcher_out_of_descriptors_waits_without_spinning_and_recovers(poor):
    before, used = poor.dispatcher, cpu(poor.dispatcher)
    silent = [poor.connect() for _ in range(100)]
    poor.wait_log(OUT)
    late = poor.connect().ask("/hello")
    poor.wait_log(r"\[WARNING\] \d+ more in 10 s: Out of descriptors or memory")
    assert not late.is_readable()
    assert cpu(before) - used < 2
    assert len(os.listdir(f"/proc/{before}/fd")) < 70
    for client in silent:
        client.close()
    assert late.reply().status == 200
    assert poor.get("/hello").status == 200
    assert poor.dispatcher == before


def test_a_dispatcher_without_any_descriptor_recovers(poor):
    pid = poor.dispatcher
    wait_quiet(poor)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free(pid), 80))
    late = poor.connect().ask("/hello")
    poor.wait_log(OUT)
    assert not late.is_readable()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (80, 80))
    assert late.reply().status == 200
    assert poor.dispatcher == pid


def test_slots_send_for_themselves_before_no_descriptor_is_left_for_what_they_leave(poor):
    """A response that its client does not take is a descriptor more than its connection."""
    wait_quiet(poor)
    clients = [poor.connect() for _ in range(60 - len(os.listdir(f"/proc/{poor.dispatcher}/fd")))]
    poor.wait_numbers(connections=len(clients))
    asking = [client.ask("/large/8/one") for client in clients[:25]]
    poor.wait_numbers(short=1, running=1)
    assert [len(client.reply().body) for client in asking] == [8 << 20] * 25
    for client in clients:
        client.close()
    poor.wait_numbers(short=0, running=0, unsent=0)
    assert "cut short" not in poor.log


def test_a_response_that_is_cut_for_want_of_a_descriptor_is_told_and_the_next_is_whole(poor):
    pid = poor.dispatcher
    wait_quiet(poor)
    cut, whole = poor.connect(), poor.connect()
    poor.wait_numbers(connections=2)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free(pid), 80))
    cut.ask("/large/8/one")
    poor.wait_log(r"\[WARNING\] Out of descriptors: a response was cut short \(see ulimit -Hn\)")
    poor.wait_numbers(connections=1)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        cut.reply()
    assert len(whole.ask("/large/8/one").reply().body) == 8 << 20
    assert poor.dispatcher == pid


def test_idle_connections_make_room_for_new_ones(poor):
    idle = []
    for _ in range(100):
        client = poor.connect()
        assert client.get("/hello").status == 200
        idle.append(client)
    assert sum(client.is_readable() for client in idle) >= 40


def test_a_flood_of_connections_that_end_leaves_processes_that_start_their_descriptors(poor):
    with Load(poor, "/sleep/0.02", clients=120) as load:
        wait_for(lambda: load.answered > 150, "connections to have come and gone")
        beyond = [n for n in os.listdir(f"/proc/{poor.dispatcher}/fd") if int(n) >= 60]
        assert len(beyond) <= 2  # a connection, and a look
        (old,) = poor.workers
        poor.tell(signal.SIGHUP)
        wait_for(lambda: old not in poor.workers, "the old one's end")
    assert poor.get("/hello").status == 200


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize("error", ["ENOBUFS", "ENOMEM"])
@pytest.mark.parametrize(
    ("call", "said"), [("accept4", OUT), ("sendmsg", r"\[WARNING\] Requests wait, since none can")]
)
def test_a_kernel_that_is_short_of_memory_for_a_moment_is_waited_for(
    start, tmp_path, call, said, error
):
    """strace has the dispatcher's first three such calls fail."""
    server = start()
    before = server.dispatcher
    file = tmp_path / "calls"
    with tracing(
        before, file, "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when=1..3"
    ):
        clients = [server.later("/hello") for _ in range(5)]
        assert {each.result().status for each in clients} == {200}
    assert file.read_text().count("(INJECTED)") == 3
    server.wait_log(said)
    assert server.get("/hello").status == 200
    assert server.dispatcher == before
    server.wait_numbers(running=0, waiting=0)
