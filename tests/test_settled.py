"""What is found out once says the same as what gunicorn finds out for each request."""

from __future__ import annotations

import io
import logging
from importlib.util import find_spec

import pytest
from gunicorn import http, util, version_info
from gunicorn.config import Config
from gunicorn.http import wsgi
from gunicorn.http.errors import NoMoreData

from replica_plugin.settled import Settled, refuses_at_once, settle

stock_date, stock_environ = util.http_date, wsgi.base_environ


@pytest.fixture
def config(monkeypatch):
    """With gunicorn as it is with our workers, for a while."""
    monkeypatch.setattr(util, "http_date", stock_date)
    monkeypatch.setattr(wsgi, "base_environ", stock_environ)
    settle()
    config = Config()
    config.set("errorlog", "a file")
    return Settled(config)


class Waiting(http.RequestParser):
    """One that reads a head to its end before it judges it."""

    def __next__(self):
        while self.unreader.read():
            pass
        raise NoMoreData


@pytest.mark.skipif(
    version_info < (27,) or find_spec("gunicorn_h1c") is not None, reason="these wait"
)
@pytest.mark.parametrize("line", [0, 4094])
def test_gunicorns_parser_does_not_wait_with_what_is_malformed(line):
    config = Config()
    config.set("proxy_protocol", True)
    config.set("limit_request_line", line)
    assert refuses_at_once(config)


def test_a_parser_that_waits_with_what_is_malformed_is_known(monkeypatch):
    monkeypatch.setattr("replica_plugin.settled.get_parser", Waiting)
    assert not refuses_at_once(Config())


@pytest.mark.parametrize("moment", [0.0, 0.999, 1.0, 1e9 + 0.5, 1764392400.25])
def test_the_date_is_that_of_its_second(config, moment):
    assert util.http_date(moment) == stock_date(moment)
    assert util.http_date(moment + 1) == stock_date(moment + 1)


def test_the_date_is_todays(config, monkeypatch):
    for moment in (1e9, 1e9 + 0.9, 1e9 + 1.1):
        monkeypatch.setattr("time.time", lambda: moment)
        assert util.http_date() == stock_date(moment)


def test_the_environment_is_gunicorns_and_nobody_elses(config):
    ours, stock = wsgi.base_environ(config), stock_environ(config)
    assert isinstance(ours.pop("wsgi.errors"), type(stock.pop("wsgi.errors")))
    assert ours == stock
    ours["wsgi.multithread"] = "changed"
    assert wsgi.base_environ(config)["wsgi.multithread"] == stock["wsgi.multithread"]


def test_errors_are_written_to_the_log_as_it_is_then(config, monkeypatch):
    old, new = (logging.StreamHandler(io.StringIO()) for _ in range(2))
    log = logging.getLogger("gunicorn.error")
    monkeypatch.setattr(log, "handlers", [old])
    errors = wsgi.base_environ(config)["wsgi.errors"]
    print("before", file=errors)
    monkeypatch.setattr(log, "handlers", [new])
    print("after", file=errors)
    assert (old.stream.getvalue(), new.stream.getvalue()) == ("before\n", "after\n")
