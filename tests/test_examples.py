"""Each example does what its README says, and runs as many requests at once as its yaml says."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from conftest import Starter
from readme import EXAMPLES, Reader
from server import Pending, Server, descriptors, wait_for

PATHS = {
    "digits_cpu": "/",
    "digits_s3": "/predict/7",
    "fanout_gevent": "/price/80",
    "shop": "/products",
}
"""What to ask each example for."""

BEHIND = {"digits_s3": ("moto_server", [9000]), "fanout_gevent": ("models", [9001, 9002, 9003])}
"""What an I/O-bound example waits for: its name, and the ports in the README."""

ANSWERS: dict[str, Callable[[int], tuple[str, Any]]] = {
    "digits_s3": lambda number: ("/predict/7", {"digit": 7}),
    "fanout_gevent": lambda area: (f"/price/{area}", {"price": 4400.0 * area}),
}
"""What to ask it for, by the number of the request, and what is right."""

fanout = pytest.mark.parametrize("example", ["fanout_gevent"], indirect=True)
io_bound = pytest.mark.parametrize("example", BEHIND, indirect=True)
shop = pytest.mark.parametrize("example", ["shop"], indirect=True)


@pytest.fixture(scope="module", params=PATHS)
def example(request: pytest.FixtureRequest, module_start: Starter) -> Iterator[Reader]:
    """An example whose README has been followed; its servers still run."""
    with Reader(request.param, module_start) as reader:
        reader.follow()
        yield reader


def slots(example: Reader) -> tuple[int, int]:
    """p and t, as the example's replica.yaml has them."""
    settings = yaml.safe_load((example.folder / "replica.yaml").read_text())
    return settings["processes_per_replica"], settings["threads_per_process"]


def test_the_readme_of_an_example_shows_what_its_commands_print(example: Reader) -> None:
    assert any(command.output for command in example.commands)
    assert [command for command in example.commands if not command.is_true()] == []


def test_an_example_runs_as_many_requests_at_once_as_its_replica_yaml_says(
    example: Reader, module_start: Starter
) -> None:
    server, stage, path = example.server, module_start.stage, PATHS[example.name]
    processes, threads = slots(example)
    asked = [
        Pending(lambda: server.get(path, X_Stage="yes")) for _ in range(processes * threads + 1)
    ]
    running = stage.take(processes * threads)
    server.wait_numbers(running=processes * threads, waiting=1)
    assert stage.is_empty()
    assert [*Counter(actor.pid for actor in running).values()] == [threads] * processes
    for actor in running:
        actor.finish()
    stage.next().finish()
    assert {each.result().status for each in asked} == {200}


@io_bound
def test_while_what_is_behind_is_silent_every_slot_waits_for_it_and_one_request_for_a_slot(
    example: Reader,
) -> None:
    server, (name, ports) = example.server, BEHIND[example.name]
    processes, threads = slots(example)
    example.background[name].send_signal(signal.SIGSTOP)
    told = [ANSWERS[example.name](number) for number in range(processes * threads + 1)]
    asked = [server.later(path) for path, _ in told]
    server.wait_numbers(running=processes * threads, waiting=1)
    for port in ports:
        fetching = partial(fetches, server, example.ports[port])
        wait_for(lambda: fetching() == [threads] * processes, "fetches")
    example.background[name].send_signal(signal.SIGCONT)
    assert [each.result().json for each in asked] == [right for _, right in told]


def fetches(server: Server, port: int) -> list[int]:
    """How many connections each of a server's processes has to a port of this machine."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    established = [row for row in rows if row[2:4] == [f"0100007F:{port:04X}", "01"]]
    sockets = {f"socket:[{row[9]}]" for row in established}
    return [sum(link in sockets for link in descriptors(pid).values()) for pid in server.workers]


@pytest.mark.slow
@fanout
def test_the_picture_of_throughput_has_what_was_measured_in_both_modes(example: Reader) -> None:
    tiny = ["--slots", "4", "--seconds", "1", "--rounds", "1"]
    printed = example.run(["python", "throughput.py", *tiny])
    measured = re.findall(r"^(\w+) mode, 4 slots: (\d+) requests/s$", printed, re.MULTILINE)
    assert [mode for mode, _ in measured] == ["gevent", "thread"]
    assert all(int(rate) > 0 for _, rate in measured)
    drawn = ElementTree.parse(example.folder / "throughput.svg").findall(".//{*}polyline")
    assert [line.get("class") for line in drawn] == ["gevent", "thread"]


@shop
def test_orders_at_once_sell_what_is_there_and_no_more(example: Reader) -> None:
    def order() -> int:
        with example.server.connect() as client:
            body = b'{"product": 3, "quantity": 300}'
            client.ask("/orders", "POST", body, Content_Type="application/json")
            return client.reply().status

    orders = [Pending(order) for _ in range(8)]
    assert Counter(each.result() for each in orders) == {201: 3, 409: 5}
    assert example.server.get("/products/3").json["stock"] == 100


@shop
def test_under_flask_run_the_app_that_was_there_before_has_a_semaphore(example: Reader) -> None:
    assert "a semaphore keeps threads_per_process (4, from replica.yaml) in each" in example.log(
        "flask"
    )


def test_the_app_that_was_there_before_took_two_lines() -> None:
    code = "".join(path.read_text() for path in (EXAMPLES / "shop").rglob("*.py"))
    ours = re.findall(r'^(?!""").*replica.*$', code, re.MULTILINE | re.IGNORECASE)
    assert ours == ["from replica_plugin import Replica", "    Replica(app)"]


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == set(PATHS)
