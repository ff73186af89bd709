"""gunicorn's `timeout`: what it protects from, and what it must not kill."""

from __future__ import annotations

import time

from server import wait_for
from test_hook_start import APP

PAUSE = 0.05  # between two requests that others make meanwhile


def timeouts(server):
    return server.log.count("WORKER TIMEOUT")


def test_with_one_thread_a_stuck_request_costs_its_process_and_nobody_else(start, stage):
    """gunicorn's ABRT ends the wait inside the app, as SystemExit, which is answered like any."""
    server = start("--timeout", "5", config={"processes_per_replica": 2})
    stuck = server.later("/hold/stuck")
    actor = stage.next()
    while not stuck.done:
        assert server.get("/").status == 200
        time.sleep(PAUSE)
    assert actor.vanished()
    assert stuck.result().status == 500
    assert timeouts(server) == 1
    assert_replaced(server, actor.pid)


def test_with_one_thread_a_request_stuck_with_the_gil_costs_its_process_and_nobody_else(start):
    """ABRT finds nobody who listens, and KILL follows."""
    server = start("--timeout", "5", config={"processes_per_replica": 2})
    first = set(server.workers)
    stuck = server.later("/burn/100000")
    while not stuck.done:
        assert server.get("/").status == 200
        time.sleep(PAUSE)
    assert stuck.result().status == 502
    assert stuck.result().body == b"The process that was working on this request died.\n"
    (pid,) = first - set(server.workers)
    assert_replaced(server, pid)


LINGERS = """\
import threading, time
from served_app import application
threading.Thread(target=time.sleep, args=(1000,)).start()
"""


def test_a_stuck_request_costs_its_process_soon_whatever_threads_of_the_app_do(start, stage):
    """It was to end: its end has not what is left of graceful_timeout."""
    server = start(
        "--timeout", "5", "--graceful-timeout", "1000",
        config={"processes_per_replica": 1}, app="lingers:application",
        files={"lingers.py": LINGERS},
    )  # fmt: skip
    stuck = server.later("/hold/stuck")
    actor = stage.next()
    server.wait_log("Booting worker", 2)
    assert actor.vanished()
    assert stuck.result().status == 500
    assert server.get("/hello").status == 200


def assert_replaced(server, pid):
    wait_for(lambda: len(server.workers) == 2 and pid not in server.workers, "a successor")
    server.wait_numbers(processes=2, running=0)
    assert server.get("/").status == 200


def test_with_two_threads_neither_a_stuck_request_nor_a_long_load_costs_the_process(start, stage):
    """As with gthread: the timeout watches over the process, not over a request."""
    slow = "import time\ntime.sleep(8)\n"
    text = slow + "from served_app import application as app\n"
    server = start(
        "--timeout", "5", files={"slow.py": text}, app="slow:app",
        config={"processes_per_replica": 1, "threads_per_process": 2},
    )  # fmt: skip
    stuck = server.later("/hold/stuck")
    actor = stage.next()
    begun = time.monotonic()
    while time.monotonic() < begun + 11:  # more than the timeout, twice
        assert server.get("/").status == 200
        time.sleep(PAUSE)
    assert timeouts(server) == 0
    assert server.workers == [actor.pid]
    actor.finish()
    assert stuck.result().status == 200


def test_with_one_thread_a_long_load_does_not_cost_the_process(start):
    slow = "import time\ntime.sleep(8)\n"
    server = start("--timeout", "5", files={"slow.py": slow + APP}, app="slow:app")
    assert server.get("/").body == b"here"
    assert timeouts(server) == 0
    assert server.log.count("Booting worker") == 1


def test_with_one_thread_requests_one_after_another_are_no_stuck_request(start):
    server = start("--timeout", "3", config={"max_replica_concurrency": 4})
    begun = time.monotonic()
    while time.monotonic() < begun + 7:
        assert server.get("/sleep/0.3").status == 200
    assert timeouts(server) == 0


def test_an_idle_process_lives_on(start):
    server = start("--timeout", "3")
    pid = server.get("/numbers").json["pid"]
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() > begun + 7, "more than the timeout, twice")
    assert server.get("/numbers").json["pid"] == pid
    assert timeouts(server) == 0
