"""gunicorn's settings that show in HTTP: the same with ours as with gunicorn's own workers."""

from __future__ import annotations

import json
import re
import socket

import pytest
from server import IN_BOTH_MODES, STOCK, STOCK_GEVENT, Server, wait_for
from stage import PATIENCE
from test_hook_start import IMPORT
from wire import AGAIN, Pair, Wire, chunked, post, request, start_pair

pytestmark = IN_BOTH_MODES

FORMAT = (
    "%(h)s|%(l)s|%(u)s|%(r)s|%(m)s|%(U)s|%(q)s|%(H)s|%(s)s|%(B)s|%(b)s|%(f)s|%(a)s|"
    "%({x-a}i)s|%({content-type}o)s|%({raw_uri}e)s"
)


@pytest.fixture(scope="module")
def pair(module_start, tmp_path_factory, mode) -> Pair:
    """With hooks, an access log of our own, small limits, and binds of every kind."""
    folder = tmp_path_factory.mktemp("logs")
    servers = []
    for name, base in (("ours", "python:served_hooks_ours"), ("stock", "python:served_hooks")):
        arguments = [
            "-c",
            base,
            "--access-logfile",
            str(folder / name),
            "--access-logformat",
            FORMAT,
        ]
        arguments += ["--limit-request-line", "200", "--limit-request-fields", "8"]
        arguments += ["--limit-request-field_size", "300", "--keep-alive", str(int(PATIENCE * 3))]
        arguments += ["--forwarded-allow-ips", "127.0.0.1", "--threads", "2"]
        arguments += ["--env", "RAW=raw"]
        if name == "stock":
            arguments += STOCK_GEVENT if mode == "gevent" else STOCK
        bind = ("127.0.0.1:0", f"unix:{folder / name}.sock", "[::1]:0", "0.0.0.0:0")
        server = module_start(
            *arguments, base=(), bind=bind, app="odd_app:application",
            config={"threads_per_process": 2}, env={"SCRIPT_NAME": ""},
        )  # fmt: skip
        server.access = folder / name
        servers.append(server)
    return Pair(*servers)


@pytest.mark.parametrize("which", range(4), ids=["ipv4", "unix", "ipv6", "wildcard"])
def test_environ_is_that_of_gthread_on_every_bind(pair, which):
    sent = request("/everything?a=b%20c", "X-A: 1", "X-A: 2", "Content-Type: t", "Cookie: c")
    ours, stock = (
        json.loads(outcome.replies[0].body) for outcome in pair.outcomes([sent], "GET", which=which)
    )
    assert ours == stock


def test_raw_env_is_set(pair):
    assert pair.outcomes([request("/env/RAW")], "GET")[0].replies[0].body == b"raw"


@pytest.mark.parametrize("which", range(3), ids=["ipv4", "unix", "ipv6"])
@pytest.mark.parametrize(
    "fields",
    [
        ["X-Forwarded-Proto: https"],
        ["X-Forwarded-Ssl: on"],
        ["X-Forwarded-Proto: http", "X-Forwarded-Ssl: on"],
        ["X-Forwarded-For: 9.9.9.9", "Forwarded: for=9.9.9.9"],
        ["Script_Name: /every"],
        ["Path_Info: /else"],
        ["Remote_User: root"],
    ],
    ids=str,
)
def test_forwarded_headers_count_where_they_do_with_gthread(pair, fields, which):
    ours, stock = pair.outcomes([request("/everything", *fields)], "GET", which=which)
    assert ours == stock


def test_forwarded_headers_count_by_the_address_of_each_client(pair):
    sent = request("/everything", "X-Forwarded-Proto: https", "Connection: close")
    schemes = [
        json.loads(_from(source, pair.ours.addresses[3], sent))["wsgi.url_scheme"]
        for source in ("127.0.0.1", "127.0.0.2") * 2
    ]
    assert schemes == ["https", "http"] * 2


def _from(source: str, address: tuple[str, int], sent: bytes) -> bytes:
    """The body of what is answered to a client with this address."""
    with socket.create_connection(("127.0.0.1", address[1]), source_address=(source, 0)) as sock:
        sock.sendall(sent)
        with sock.makefile("rb") as file:
            return file.read().partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "sent",
    [
        request("/" + "a" * 184),
        request("/" + "a" * 190),
        b"\r\n" + request("/" + "a" * 184),
        request("/hello", "A: " + "b" * 295),
        request("/hello", "A: " + "b" * 296),
        request("/hello", *["A: b"] * 7),
        request("/hello", *["A: b"] * 8),
        request("/hello", *["A: " + "b" * 290] * 7),
        chunked("/echo", b"abc", end=b"0\r\n" + b"A: b\r\n" * 9 + b"\r\n"),
    ],
    ids=lambda sent: sent[:20].decode() + str(len(sent)),
)
def test_limits_hold_as_with_gthread(pair, sent):
    ours, stock = pair.outcomes([sent], "GET")
    assert ours == stock


def test_head_beyond_all_limits_is_answered_431(pair):
    with Wire(pair.ours.address) as wire:
        outcome = wire.send_if_it_can(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000).outcome("GET")
    assert (outcome.statuses, outcome.stays) == ([431], False)


def test_head_beyond_all_limits_with_much_behind_it_is_answered_431(pair, which):
    dispatcher = pair.ours.dispatcher
    head = request("/hello", *["A: " + "b" * 290] * 20)
    with Wire(pair.ours.addresses[which]) as wire:
        assert wire.send_if_it_can(head + b"x" * 20_000).reply().status == 431
    assert pair.ours.dispatcher == dispatcher


HOOKED = [
    request("/hello?hooked"),
    request("/hello?hooked", "X-A: pre"),
    request("/hello?hooked", "X-A: post"),
    request("/fail?hooked", "X-A: post"),
    request("/fail-late?hooked"),
    request("/unsized?hooked", method="HEAD"),
    request("/unsized?hooked", version="1.0"),
    request("/no-content-with-body?hooked"),
    request("/hello?hooked", "Authorization: Basic dTpw", "Referer: r", "User-Agent: a b"),
    post("/echo?hooked", b"abc"),
    chunked("/echo?hooked", b"abc"),
    request("/splits-header?hooked"),
    request("/file/1000?hooked"),
]
UNLOGGED = [request("/hello?hooked", "A b: c"), b"GARBAGE hooked\r\n"]  # nor does gthread log them


def test_access_log_and_hooks_see_what_they_see_with_gthread(pair):
    """pre_request and post_request write to the log; both raise if a request asks them to."""
    seen = [_told(server) for server in (pair.ours, pair.stock)]
    assert seen[0] == seen[1]


def _told(server: Server) -> tuple[list[str], list[str]]:
    """What access log and hooks tell of these requests, one after the other."""
    for sent in UNLOGGED + HOOKED:
        before = _counts(server)
        with Wire(server.address) as wire:
            wire.send(sent).sock.recv(1)
            if sent not in UNLOGGED:
                wait_for(lambda n=before: all(map(int.__gt__, _counts(server), n)), str(sent))
    hooks = [line for line in re.findall("hook: (.*)", server.log) if "hooked" in line]
    return [line for line in server.access.read_text().splitlines() if "hooked" in line], hooks


def _counts(server: Server) -> list[int]:
    """Lines in the access log, and calls of post_request, for requests of `_told`."""
    calls = re.findall("hook: post .*hooked", server.log)
    return [server.access.read_text().count("hooked"), len(calls)]


def test_refusals_are_in_the_access_log_with_their_true_sizes(module_start):
    server = module_start(
        "--access-logfile", "-", "--access-logformat", "log: %(r)s %(s)s %(B)s",
        config={"max_replica_concurrency": 1}, app="odd_app:application",
    )  # fmt: skip
    held = server.later("/hold/x")
    actor = module_start.stage.next()
    for method, accept in (("GET", "*/*"), ("GET", "application/json"), ("HEAD", "*/*")):
        with Wire(server.address) as wire:
            reply = wire.send(request(f"/{method}", f"Accept: {accept}", method=method)).reply(
                method
            )
        assert reply.status == 503
        server.wait_log(rf"log: {method} /{method} HTTP/1.1 503 {len(reply.body)}\n")
    actor.finish()
    assert held.result().status == 200


def test_a_hook_that_wants_to_end_the_process_writes_no_second_response(module_start):
    text = "def post_request(worker, req, environ, resp):\n    raise SystemExit('not here')\n"
    server = module_start(files={"gunicorn.conf.py": IMPORT + text}, base=())
    with Wire(server.address) as wire:
        for _ in range(3):
            assert wire.send(request("/hello")).reply().status == 200
    server.wait_log("Exception in post_request hook")


def test_connection_is_closed_after_each_request_with_keepalive_0(module_start):
    pair = start_pair(module_start, "--keep-alive", "0")
    ours, stock = pair.outcomes([AGAIN * 2], "GET")
    assert ours == stock
    assert not ours.stays
    with Wire(pair.ours.address) as wire:
        probe = wire.send(request("/-/healthz")).outcome("GET")
    assert (probe.statuses, probe.stays) == ([200], False)


def test_idle_connection_is_closed_after_keepalive(module_start):
    server = module_start("--keep-alive", "1", app="odd_app:application")
    wires = [Wire(server.address) for _ in range(3)]
    for wire, sent in zip(
        wires, (AGAIN, request("/-/healthz"), AGAIN + request("/-/readyz")), strict=True
    ):
        wire.send(sent)
        for _ in range(sent.count(b"\r\n\r\n")):
            assert wire.reply().status == 200
    for wire in wires:
        with wire:
            assert wire.rest() == b""


def test_max_requests_counts_what_slots_ran_and_closes_no_connection(module_start):
    server = module_start("--max-requests", "5", app="odd_app:application")
    (before,) = server.workers
    with Wire(server.address) as wire:
        for _ in range(20):
            assert wire.send(request("/-/healthz")).reply().status == 200
        for _ in range(4):
            assert wire.send(AGAIN).reply().status == 200
        assert server.workers == [before]
        for _ in range(8):
            assert wire.send(AGAIN).reply().status == 200
    server.wait_log("Autorestarting worker after 5 requests")


def test_statsd_counts_requests_and_refusals(module_start):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(PATIENCE)
        host, port = statsd.getsockname()
        server = module_start(
            "--statsd-host", f"{host}:{port}", "--statsd-prefix", "mine",
            config={"max_replica_concurrency": 1}, app="odd_app:application",
        )  # fmt: skip
        held = server.later("/hold/x")
        actor = module_start.stage.next()
        assert server.get("/hello").status == 503
        actor.finish()
        assert held.result().status == 200
        seen = set()
        wanted = {"mine.gunicorn.request.status.200", "mine.gunicorn.request.status.503"}
        while not wanted <= seen:
            seen.add(statsd.recv(4096).decode().partition(":")[0])


def test_logger_class_of_the_user_that_raises_costs_no_slot(module_start):
    server = module_start(
        "--logger-class", "served_hooks.RaisingLogger", app="odd_app:application",
        config={"threads_per_process": 2},
    )  # fmt: skip
    workers = server.workers
    with Wire(server.address) as wire:  # once: with all slots lost the process would be replaced
        wire.send(request("/fail?raise-in-log")).rest()
    pending = [server.later(f"/hold/{n}") for n in range(2)]
    for actor in module_start.stage.take(2):
        actor.finish()
    assert {each.result().status for each in pending} == {200}
    assert server.workers == workers


def test_access_log_goes_to_stdout(module_start):
    server = module_start("--access-logfile", "-", app="odd_app:application")
    server.get("/hello?stdout")
    server.wait_log(r'127.0.0.1 - - \[.*\] "GET /hello\?stdout HTTP/1.1" 200 6 "-" "-"')
