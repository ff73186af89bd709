"""What happens to the server. Each fault is one function, and is told in the ledger."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from server import Server, wait_for

from chaos import clients
from chaos.checks import Watcher
from chaos.clients import Crowd
from chaos.ledger import Ledger, Times
from replica_plugin.decisions import Rules

APP = """\
from chaos.app import make
{before}
application = make({folder!r}, {version!r}, {preload})
"""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
UNLOADABLE = "raise RuntimeError('this version of the app cannot be loaded')"


def settings(
    mode: str, processes: int, threads: int, bound: int, preload: bool, times: Times
) -> dict[str, Any]:
    """What replica.yaml has."""
    return {
        "preload": preload,
        "drain_delay": times.drain,
        "mode": mode,
        "processes_per_replica": processes,
        "threads_per_process": threads,
        "max_replica_concurrency": bound,
        "queue_timeout": times.queue,
        "request_timeout": times.request,
        "header_timeout": times.header,
        "receive_timeout": times.receive,
        "send_timeout": times.send,
        "request_buffer": "64Ki",
        "response_buffer": "1Mi",
        "exempt": ["/exempt"],
    }


class Scene:
    """A server, and what can be done to it."""

    def __init__(
        self, server: Server, crowd: Crowd, watcher: Watcher, ledger: Ledger,
        config: dict[str, Any], seed: int,
    ) -> None:  # fmt: skip
        self.server = server
        self.crowd = crowd
        self.watcher = watcher
        self.ledger = ledger
        self.first = config
        self.config = config
        self.random = random.Random(f"{seed} faults")
        self.version = 1

    def signal(self, pid: int, number: int, role: str) -> None:
        name = signal.Signals(number).name
        self.ledger.tell(f"{name} to {role} {pid}")
        if number in (signal.SIGKILL, signal.SIGSTOP):
            self.watcher.causes[pid] = name
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def to_master(self, number: int) -> None:
        self.signal(self.server.process.pid, number, "master")

    def reload(self, config: dict[str, Any]) -> None:
        """HUP to these settings; until the master has taken them."""
        self.config = config
        self.server.write_config(config)
        self.ledger.tell(f"settings: {_numbers(config)}")
        rules = Rules(
            config["processes_per_replica"],
            config["threads_per_process"],
            config["max_replica_concurrency"],
        )
        self.expect(rules, signal.SIGHUP)

    def expect(self, rules: Rules, number: int) -> None:
        self.watcher.announce(rules)
        self.to_master(number)
        self.watcher.await_announced()

    def log_count(self, text: str) -> int:
        return self.server.log.count(text)

    def write_app(self, before: str = "") -> None:
        self.version += 1
        folder = str(self.server.folder)
        preload = self.first["preload"]
        text = APP.format(before=before, folder=folder, version=str(self.version), preload=preload)
        (self.server.folder / "served.py").write_text(text)

    @property
    def cap(self) -> int:
        return self.watcher.rules.cap

    def process(self) -> int | None:
        """Some process: more often than not one that is busy."""
        busy, workers = self.watcher.busy(), self.server.workers
        found = busy if busy and self.random.random() < 0.8 else workers
        return self.random.choice(found) if found else None

    def fire(self) -> None:
        """Have all slots busy, some with connections that go on, and some requests wait."""
        count = self.cap + self.random.randint(1, 6)
        self.ledger.tell(f"fire: {count}")
        self.crowd.send(clients.kept, (self.cap + 1) // 2, "nap", "700")
        self.crowd.send(clients.plain, count, "nap", "400")
        time.sleep(0.05 + self.random.random() * 0.2)

    def stuck(self, action: str, shortest: float, longest: float, most: int = 1) -> None:
        seconds = f"{self.random.uniform(shortest, longest):.1f}"
        count = self.random.randint(1, most)
        self.ledger.tell(f"{count} x {action} for {seconds} s")
        self.crowd.send(clients.plain, count, action, seconds)


# Deaths.


def kill_process(scene: Scene) -> None:
    scene.fire()
    process = scene.process()
    if process is not None:
        scene.signal(process, signal.SIGKILL, "process")


def kill_all_processes(scene: Scene) -> None:
    scene.fire()
    for worker in scene.server.workers:
        scene.signal(worker, signal.SIGKILL, "process")


def kill_dispatcher(scene: Scene) -> None:
    scene.fire()
    scene.signal(scene.server.dispatcher, signal.SIGKILL, "dispatcher")


def kill_dispatcher_at_rest(scene: Scene) -> None:
    """While slots are free, so that the next request has to begin soon."""
    now = scene.server.numbers()
    if now.running < scene.cap and now.processes == scene.watcher.rules.processes:
        scene.signal(scene.server.dispatcher, signal.SIGKILL, "dispatcher")
        scene.ledger.spared.append(time.monotonic())
        scene.crowd.send(clients.plain, 1, "nap", "5")
        time.sleep(0.5)


def kill_both(scene: Scene) -> None:
    kill_dispatcher(scene)
    kill_process(scene)


def kill_dispatcher_again_and_again(scene: Scene) -> None:
    for _ in range(3):
        kill_dispatcher(scene)
        time.sleep(scene.random.random() * 0.15)


def hang_dispatcher(scene: Scene) -> None:
    """It is found out after 5 s."""
    pid = scene.server.dispatcher
    scene.signal(pid, signal.SIGSTOP, "dispatcher")
    wait_for(lambda: scene.server.dispatcher != pid, "another dispatcher")


def pause_dispatcher(scene: Scene) -> None:
    pid = scene.server.dispatcher
    if pid in scene.watcher.causes:  # one that was just killed may be seen for a moment
        return
    scene.signal(pid, signal.SIGSTOP, "dispatcher")
    time.sleep(scene.random.random())
    scene.signal(pid, signal.SIGCONT, "dispatcher")
    scene.watcher.causes.pop(pid)  # it has to bear that


def kill_supervisor(scene: Scene) -> None:
    """And perhaps the dispatcher with it; a HUP brings what is missing."""
    pid, dispatcher = scene.server.supervisor, scene.server.dispatcher
    scene.signal(pid, signal.SIGKILL, "supervisor")
    if scene.random.random() < 0.5:
        scene.fire()
        scene.signal(dispatcher, signal.SIGKILL, "dispatcher")
    time.sleep(scene.random.random())
    reload_same(scene)
    wait_for(lambda: scene.server.supervisor != pid, "another supervisor")


def fatal_request(scene: Scene) -> None:
    scene.fire()
    action = scene.random.choice(("exit", "segfault", "abort"))
    scene.ledger.tell(f"a request that ends its process: {action}")
    scene.crowd.send(clients.plain, 1, action, scene.random.choice(("0", "1", "77")))


def oversleep(scene: Scene) -> None:
    scene.stuck("oversleep", 2.5, 7, 3)


def grip(scene: Scene) -> None:
    scene.stuck("grip", 0.5, 7)


def deaf(scene: Scene) -> None:
    scene.stuck("deaf", 2.5, 8, 2)


def spin(scene: Scene) -> None:
    scene.stuck("spin", 1, 3)


# Changes.


def reload_same(scene: Scene) -> None:
    scene.reload(scene.config)


def reload_twice(scene: Scene) -> None:
    reload_same(scene)
    reload_same(scene)


def reload_other(scene: Scene) -> None:
    """Other numbers."""
    scene.fire()
    first, choose = scene.first, scene.random
    processes = choose.randint(1, first["processes_per_replica"] + 1)
    threads = choose.randint(1, first["threads_per_process"] + 2)
    bound = processes * threads + choose.randint(2, 40)
    numbers = {
        "processes_per_replica": processes,
        "threads_per_process": threads,
        "max_replica_concurrency": bound,
    }
    scene.reload({**scene.config, **numbers})


def reload_mode(scene: Scene) -> None:
    mode = "gevent" if scene.config["mode"] == "thread" else "thread"
    scene.reload({**scene.config, "mode": mode})


def reload_code(scene: Scene) -> None:
    """Another version of the app, which may ignore TERM."""
    scene.write_app(scene.random.choice(("", "", DEAF)))
    reload_same(scene)


def reload_broken(scene: Scene) -> None:
    """A replica.yaml with a mistake."""
    told = "The settings from before go on to hold"
    count = scene.log_count(told)
    (scene.server.folder / "replica.yaml").write_text("processes_per_replica: many\n")
    scene.to_master(signal.SIGHUP)
    wait_for(lambda: scene.log_count(told) > count, told)
    scene.server.write_config(scene.config)


def reload_unloadable(scene: Scene) -> None:
    """An app that cannot be loaded, and then one that can."""
    told = "The app cannot be loaded"
    count = scene.log_count(told)
    scene.write_app(UNLOADABLE)
    reload_same(scene)
    wait_for(lambda: scene.log_count(told) > count, told)
    if scene.random.random() < 0.5:
        kill_process(scene)
    time.sleep(scene.random.random() * 2)
    reload_code(scene)


def one_more(scene: Scene) -> None:
    rules = scene.watcher.rules
    if rules.processes <= scene.first["processes_per_replica"] + 1:
        scene.expect(replace(rules, processes=rules.processes + 1), signal.SIGTTIN)


def one_less(scene: Scene) -> None:
    scene.fire()
    rules = scene.watcher.rules
    if rules.processes > 1:
        scene.expect(replace(rules, processes=rules.processes - 1), signal.SIGTTOU)


def pause(scene: Scene) -> None:
    """No processes: what has come is finished, new clients wait; a HUP or a TTIN ends it."""
    scene.fire()
    told = "graceful stop of workers"
    count, began = scene.log_count(told), time.monotonic()
    scene.to_master(signal.SIGWINCH)
    wait_for(lambda: scene.log_count(told) > count, told)
    time.sleep(scene.random.random() * 3)
    if scene.random.random() < 0.5:
        reload_same(scene)
    else:
        scene.expect(replace(scene.watcher.rules, processes=1), signal.SIGTTIN)
    scene.ledger.pauses.append((began, time.monotonic()))


def recycle_process(scene: Scene) -> None:
    scene.fire()
    process = scene.process()
    if process is not None:
        scene.signal(process, signal.SIGTERM, "process")


def reopen_logs(scene: Scene) -> None:
    scene.to_master(signal.SIGUSR1)


# Crowds.


def burst(scene: Scene) -> None:
    """As many as there are slots, or a few more, at once."""
    count = scene.cap + scene.random.randint(0, 3)
    scene.ledger.tell(f"a burst of {count}")
    scene.crowd.send(clients.plain, count, "nap", "100")


def overload(scene: Scene) -> None:
    """More than the bound admits."""
    count = scene.watcher.rules.bound + scene.random.randint(10, 60)
    scene.ledger.tell(f"an overload of {count}")
    scene.crowd.send(clients.plain, count, "nap", "50")


def siege(scene: Scene) -> None:
    """Many slow clients of one kind."""
    kinds = (
        clients.silent, clients.stalling_head, clients.stalling_body, clients.never_reader,
        clients.lingering, clients.pausing_body, clients.leaving, clients.half_closing,
    )  # fmt: skip
    kind = scene.random.choice(kinds)
    count = scene.random.randint(5, 30)
    scene.ledger.tell(f"{count} clients: {kind.__name__}")
    scene.crowd.send(kind, count)


Fault = Callable[[Scene], None]
MIX: dict[Fault, int] = {
    kill_process: 10,
    kill_all_processes: 2,
    kill_dispatcher: 8,
    kill_dispatcher_at_rest: 5,
    kill_both: 3,
    kill_dispatcher_again_and_again: 2,
    hang_dispatcher: 1,
    pause_dispatcher: 3,
    kill_supervisor: 3,
    fatal_request: 8,
    oversleep: 4,
    grip: 3,
    deaf: 3,
    spin: 2,
    reload_same: 3,
    reload_twice: 2,
    reload_other: 8,
    reload_mode: 3,
    reload_code: 3,
    reload_broken: 2,
    reload_unloadable: 2,
    one_more: 4,
    one_less: 4,
    pause: 3,
    recycle_process: 4,
    reopen_logs: 1,
    burst: 6,
    overload: 5,
    siege: 6,
}
"""How often each comes."""
OF_THE_APP = (reload_mode, reload_code, reload_unloadable)
"""Those that need the app to be loaded anew, which a reload does not do with `preload`."""


def _numbers(config: dict[str, Any]) -> str:
    names = ("mode", "processes_per_replica", "threads_per_process", "max_replica_concurrency")
    return ", ".join(str(config[name]) for name in names)
