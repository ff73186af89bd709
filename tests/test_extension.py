"""Replica(app) and the middleware: the cap where no dispatcher keeps it, and none beside one."""

from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from flask import Flask, Request, send_file
from server import Pending, wait_for
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client, create_environ, run_wsgi_app

from replica_plugin import Replica, ReplicaMiddleware, Stats
from replica_plugin.cap import of_process
from replica_plugin.config.settings import Settings
from replica_plugin.environ import WAITED
from replica_plugin.errors import ConfigError
from replica_plugin.gate import Gate
from replica_plugin.pages import ReplicaPage

ONE = Settings(threads_per_process=1, max_replica_concurrency=1)


class Body:
    """A response body that says when it was closed."""

    closed = 0

    def __iter__(self) -> Any:
        return iter([b"body"])

    def close(self) -> None:
        self.closed += 1


def call(app: Any, **environ: Any) -> Any:
    """Call a WSGI app as a server would, up to the body."""
    return app({**create_environ(), **environ}, lambda *_: None)


def served(settings: Settings = ONE, body: Any = None) -> ReplicaMiddleware:
    return ReplicaMiddleware(lambda environ, start: body or [b"body"], settings)


def gate_of(app: ReplicaMiddleware) -> Gate:
    return app._cap.gate


def status_of(app: Any, **environ: Any) -> tuple[str, dict[str, str], bytes]:
    chunks, status, headers = run_wsgi_app(app, {**create_environ(), **environ}, buffered=True)
    return status, dict(headers), b"".join(chunks)


def test_a_permit_is_held_until_the_body_is_closed_and_given_back_once():
    body = Body()
    app = served(body=body)
    response = call(app)
    assert gate_of(app).running == 1
    response.close()
    response.close()
    assert (gate_of(app).running, body.closed) == (0, 1)


def test_a_body_that_nobody_closes_gives_its_permit_back_when_it_is_garbage():
    app = served()
    response = call(app)
    assert gate_of(app).running == 1
    del response
    assert gate_of(app).running == 0


def test_an_app_that_raises_gives_its_permit_back():
    def fail(environ: Any, start_response: Any) -> Any:
        raise RuntimeError

    app = ReplicaMiddleware(fail, ONE)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            call(app)
    assert gate_of(app).running == 0


def test_a_full_process_refuses_with_the_reason_and_the_status_that_was_asked_for():
    app = served(Settings(max_replica_concurrency=1, overload_status=429))
    response = call(app)
    status, headers, body = status_of(app)
    assert status == "429 Too Many Requests"
    assert body == (
        b"The replica is full: 1 request is in flight, "
        b"as many as max_replica_concurrency (1) admits.\n"
    )
    assert headers["Retry-After"].isdigit()
    response.close()


def test_json_is_refused_in_json():
    app = served()
    response = call(app)
    assert status_of(app, HTTP_ACCEPT="application/json")[1]["Content-Type"] == "application/json"
    response.close()


def test_a_request_that_a_dispatcher_let_in_meets_no_second_queue():
    app = served()
    call(app, **{WAITED: 0.5})
    assert app.stats().running == 0


def test_a_request_learns_how_long_it_waited():
    seen = []
    settings = Settings(max_replica_concurrency=2)
    app = ReplicaMiddleware(lambda environ, start: seen.append(environ[WAITED]) or [], settings)
    first = call(app)
    second = Pending(lambda: call(app).close())
    wait_for(lambda: gate_of(app).waiting == 1, "one waits")
    first.close()
    second.result()
    assert seen[0] < seen[1]


def test_the_log_says_once_what_is_not_promised(caplog):
    app = served()
    with caplog.at_level(logging.WARNING, "replica_plugin"):
        for _ in range(3):
            call(app).close()
    assert [record.getMessage() for record in caplog.records] == [
        "No dispatcher under this server: a semaphore keeps threads_per_process (1, from the app) "
        "in each process, with max_replica_concurrency and queue_timeout for each process, too. "
        "What is not promised: that all slots of the replica are in use before a request waits, "
        "one queue and one bound for all processes, probes, and that slow clients hold no slot."
    ]


def with_context(app: Flask) -> Any:
    """A client that has Flask keep its context, as the debugger does."""
    with app.test_client() as client:
        return client


@pytest.fixture(autouse=True)
def process(tmp_path, monkeypatch):
    """Each test begins as a process does: without a cap, in a folder without settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("replica_plugin.cap._cap", None)


def flask_app(**config: Any) -> Flask:
    app = Flask("app")
    app.config.update(config)
    replica = Replica()
    replica.init_app(app)
    replica.init_app(app)
    Replica(app)

    @app.get("/")
    def hello() -> dict[str, Any]:
        return {"waited": replica.waited, "running": replica.stats().running}

    @app.get("/file")
    def file() -> Any:
        return send_file(__file__)

    return app


def gate() -> Gate:
    return of_process().gate


def test_the_extension_keeps_the_cap_in_a_factory_and_knows_the_numbers():
    response = call(flask_app())
    assert b'"running":1' in b"".join(response)
    assert gate().running == 1
    response.close()
    assert gate().running == 0


def test_the_numbers_can_be_asked_for_anywhere():
    response = call(flask_app())
    numbers = Pending(Replica().stats).result()
    assert numbers == Stats(1, 1, 1, 0, 1024, False)
    response.close()


def test_two_apps_of_a_process_share_its_slots():
    first, second = call(flask_app()), Pending(lambda: call(flask_app()).close())
    wait_for(lambda: gate().waiting == 1, "one waits")
    first.close()
    second.result()


def test_a_request_to_an_app_within_an_app_takes_one_slot():
    outer = flask_app()
    outer.wsgi_app = DispatcherMiddleware(outer.wsgi_app, {"/inner": flask_app()})
    response = Pending(lambda: call(ReplicaMiddleware(outer), PATH_INFO="/inner/")).result()
    assert b"running" in b"".join(response)
    response.close()
    assert gate().running == 0


def test_middleware_with_settings_of_its_own_has_slots_of_its_own():
    response = call(flask_app())
    call(served()).close()
    response.close()


def told(caplog) -> int:
    """How often the log said that the cap is at work."""
    return sum("No dispatcher" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("config", "capped"),
    [
        ({}, True),
        ({"TESTING": True}, False),
        ({"REPLICA_ENABLED": False}, False),
        ({"TESTING": True, "REPLICA_ENABLED": True}, True),
    ],
)
def test_the_cap_can_be_switched_off_and_kept_on(config, capped, caplog):
    app = flask_app()
    app.config.update(config)
    call(app).close()
    assert told(caplog) == capped


@pytest.mark.parametrize("make", [lambda app: app.test_client(), Client, with_context])
def test_a_test_client_passes_by_the_cap_though_a_response_is_still_open(make, caplog):
    client = make(flask_app())
    first = client.get("/", buffered=False)
    second = Pending(lambda: client.get("/")).result()
    assert second.json == {"waited": 0.0, "running": 0}
    first.close()
    assert told(caplog) == 0


def test_a_request_that_a_middleware_has_looked_at_is_not_taken_for_one_of_a_test_client(caplog):
    app = flask_app()

    def looks(environ: Any, start_response: Any) -> Any:
        Request(environ)
        return app(environ, start_response)

    call(looks).close()
    assert told(caplog) == 1


def test_a_test_of_the_cap_can_have_it_under_a_test_client():
    with flask_app(REPLICA_ENABLED=True).test_client() as client:
        assert client.get("/").json["running"] == 1


def test_a_mistake_in_the_settings_is_told_when_the_app_is_made(tmp_path):
    (tmp_path / "replica.yaml").write_text("threads_per_process: 0\nqueue_timout: 3\n")
    with pytest.raises(ConfigError) as error:
        flask_app()
    assert str(error.value) == (
        "replica.yaml:1: threads_per_process: must be greater than or equal to 1 (got 0)\n"
        "replica.yaml:2: queue_timout: unknown key; did you mean queue_timeout?"
    )


def test_an_app_of_our_workers_reads_no_settings(tmp_path, monkeypatch):
    (tmp_path / "replica.yaml").write_text("threads_per_process: 0\n")
    monkeypatch.setattr("replica_plugin.stats._page", ReplicaPage())
    response = call(flask_app())
    assert b'"running":0' in b"".join(response)


def test_an_app_that_was_loaded_before_the_dispatcher_was_there_has_no_queue(monkeypatch, caplog):
    app = flask_app()
    monkeypatch.setattr("replica_plugin.stats._page", ReplicaPage())
    call(app).close()
    assert told(caplog) == 0


def test_numbers_are_frozen():
    with pytest.raises(FrozenInstanceError):
        Replica().stats().running = 1


def test_numbers_show_themselves():
    stats = Stats(2, 4, 3, 2, 1024, True)
    assert (repr(stats), stats.in_flight) == ("<Replica 3/4 running, 2 waiting>", 5)
