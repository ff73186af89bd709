"""Replica(app) and the middleware: the cap where no dispatcher keeps it, and none beside one."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from flask import Flask
from server import Pending, wait_for
from werkzeug.test import create_environ, run_wsgi_app

from replica_plugin import Replica, ReplicaMiddleware, Stats
from replica_plugin.config.settings import Settings
from replica_plugin.environ import WAITED

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


def status_of(app: Any, **environ: Any) -> tuple[str, dict[str, str], bytes]:
    chunks, status, headers = run_wsgi_app(app, {**create_environ(), **environ}, buffered=True)
    return status, dict(headers), b"".join(chunks)


def test_a_permit_is_held_until_the_body_is_closed_and_given_back_once():
    body = Body()
    app = served(body=body)
    response = call(app)
    assert app.gate.running == 1
    response.close()
    response.close()
    assert (app.gate.running, body.closed) == (0, 1)


def test_a_body_that_nobody_closes_gives_its_permit_back_when_it_is_garbage():
    app = served()
    response = call(app)
    assert app.gate.running == 1
    del response
    assert app.gate.running == 0


def test_an_app_that_raises_gives_its_permit_back():
    def fail(environ: Any, start_response: Any) -> Any:
        raise RuntimeError

    app = ReplicaMiddleware(fail, ONE)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            call(app)
    assert app.gate.running == 0


def test_a_full_process_refuses_with_the_reason_and_the_status_that_was_asked_for():
    app = served(Settings(max_replica_concurrency=1, overload_status=429))
    response = call(app)
    status, headers, body = status_of(app)
    assert status == "429 Too Many Requests"
    assert body == (
        b"The replica is full: 1 requests are in flight, "
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
    assert app.gate is None


def test_a_request_learns_how_long_it_waited():
    seen = []
    settings = Settings(max_replica_concurrency=2)
    app = ReplicaMiddleware(lambda environ, start: seen.append(environ[WAITED]) or [], settings)
    first = call(app)
    second = Pending(lambda: call(app).close())
    wait_for(lambda: app.gate.waiting == 1, "one waits")
    first.close()
    second.result()
    assert seen[0] < seen[1]


def test_the_log_says_once_what_is_not_promised(caplog):
    app = served()
    with caplog.at_level(logging.WARNING, "replica_plugin"):
        for _ in range(3):
            call(app).close()
    assert [record.getMessage() for record in caplog.records] == [
        "No dispatcher under this server: a semaphore keeps threads_per_process (1) in each "
        "process; that all slots of the replica are used before a request waits (P1), one queue "
        "(P3) and one bound (P4) for it are not promised."
    ]


def flask_app(**config: Any) -> Flask:
    app = Flask("app")
    app.config.update(config)
    replica = Replica()
    replica.init_app(app)
    replica.init_app(app)

    @app.get("/")
    def hello() -> dict[str, Any]:
        return {"waited": replica.waited, "running": replica.stats().running}

    return app


def test_the_extension_keeps_the_cap_in_a_factory_and_knows_the_numbers():
    app = flask_app()
    status, _, body = status_of(app)
    assert status == "200 OK"
    assert b'"running":1' in body
    assert app.extensions["replica"].gate.running == 0


def test_two_apps_have_a_queue_each():
    first, second = flask_app(), flask_app()
    status_of(first)
    assert first.extensions["replica"].gate is not second.extensions["replica"].gate


@pytest.mark.parametrize(
    ("config", "capped"),
    [
        ({"TESTING": True}, False),
        ({"REPLICA_ENABLED": False}, False),
        ({"TESTING": True, "REPLICA_ENABLED": True}, True),
    ],
)
def test_the_cap_can_be_switched_off_and_kept_on(config, capped):
    app = flask_app(**config)
    status_of(app)
    assert (app.extensions["replica"].gate is not None) is capped


def test_numbers_show_themselves():
    stats = Stats(2, 4, 3, 2, 1024, True)
    assert (repr(stats), stats.in_flight) == ("<Replica 3/4 running, 2 waiting>", 5)
