"""How processes load the app: in turn, in how many at once, and when it cannot be loaded.

In both modes where a process takes part in it, which in gevent mode patches first; the rest is up
to the master.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from server import IN_BOTH_MODES, Load, wait_for
from test_hook_start import APP, IMPORT

from replica_plugin.loading import LONGEST_PAUSE, Pauses
from replica_plugin.pages import LoadPage

TWO = {"processes_per_replica": 2, "threads_per_process": 2}
BROKEN = "raise RuntimeError('a broken deploy')\n"
KILLED = "import os\nos.kill(os.getpid(), 9)\n"
HELD = {"HOLD_IMPORT": "1"}
TOLD_EARLY = """\
import os
import signal
from gunicorn.workers.base import Worker
from replica_plugin.conf import *

_init_signals = Worker.init_signals

def init_signals(self):
    _init_signals(self)
    if not os.path.exists("told"):
        open("told", "x").close()
        os.kill(os.getpid(), signal.{name})

Worker.init_signals = init_signals
"""
THREADED = """\
import threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
1 / 0
"""
ONE_AFTER_ANOTHER = """\
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
try:
    with open("first", "x") as file:
        file.write(str(os.getpid()))
except FileExistsError:
    while not (pid := open("first").read()) or os.path.exists(f"/proc/{pid}"):
        time.sleep(0.01)
1 / 0
"""
COUNTED = "open('loads', 'a').write('x')\n" + APP


def deploy(server, text):
    """Other code; a pyc of the old one could be taken for it if both were written in a second."""
    (server.folder / "app.py").write_text(text)


def start_app(start, *arguments, text=APP, lasting="", **options):
    env = {"PYTHONDONTWRITEBYTECODE": "1"}
    files = {"app.py": text, "lasting.py": lasting}
    return start(*arguments, files=files, app="app:app", env=env, **options)


def fail_a_reload(server, failures):
    deploy(server, BROKEN)
    server.tell(signal.SIGHUP)
    server.wait_log("RuntimeError: a broken deploy", failures)


@IN_BOTH_MODES
def test_hup_to_an_app_that_cannot_load_is_logged_and_the_old_processes_serve_on(start):
    server = start_app(start, config=TWO)
    old = server.workers
    with Load(server, "/") as load:
        load.go_on(50)
        fail_a_reload(server, 2)
        wait_for(lambda: server.workers == old, "the end of those that failed")
        load.go_on(50)
        server.wait_numbers(processes=2, slots=4)
        assert server.workers == old
        assert server.log.count("The app cannot be loaded\nTraceback (most recent") == 2
        deploy(server, APP.replace("here", "there"))
        server.tell(signal.SIGHUP)
        wait_for(lambda: not set(old) & set(server.workers), "the old processes' end")
        server.wait_numbers(processes=2, slots=4)
        assert server.get("/").body == b"there"
        load.go_on(50)
    assert load.failures == []


@IN_BOTH_MODES
@pytest.mark.parametrize("p", [1, 2])
def test_hup_to_an_app_whose_load_is_killed_leaves_the_old_processes_where_they_are(start, p):
    """For want of memory, say: nobody is left who could tell."""
    server = start_app(start, config={**TWO, "processes_per_replica": p})
    old = server.workers
    with Load(server, "/") as load:
        load.go_on(50)
        deploy(server, KILLED)
        server.tell(signal.SIGHUP)
        server.wait_log("was sent SIGKILL!", p)
        load.go_on(200)
        wait_for(lambda: server.workers == old, "nothing but the old ones")
        deploy(server, APP)
        server.tell(signal.SIGHUP)
        wait_for(lambda: not set(old) & set(server.workers), "the old processes' end")
        server.wait_numbers(processes=p, slots=2 * p)
        load.go_on(50)
    assert load.failures == []


ONCE_KILLED = """\
import os
if os.path.exists("second") and not os.path.exists("third"):
    open("third", "w").close()
    os.kill(os.getpid(), 9)
open("second", "w").close()
""" + APP.replace("here", "there")


@IN_BOTH_MODES
def test_a_hup_of_whose_processes_one_is_killed_as_it_loads_comes_to_its_end(start):
    server = start_app(start, config=TWO)
    old = server.workers
    with Load(server, "/") as load:
        deploy(server, ONCE_KILLED)
        server.tell(signal.SIGHUP)
        wait_for(lambda: not set(old) & set(server.workers), "the old processes' end")
        server.wait_numbers(processes=2, slots=4)
        load.go_on(50)
    assert server.log.count("was sent SIGKILL!") == 1
    assert load.failures == []
    assert server.get("/").body == b"there"


def test_a_dead_process_is_replaced_after_a_failed_hup_and_then_the_others_are_too(start):
    server = start_app(start, config=TWO)
    old = server.workers
    fail_a_reload(server, 2)
    deploy(server, APP)
    server.tell(signal.SIGKILL, old[0])
    wait_for(lambda: not set(old) & set(server.workers), "the end of the old ones")
    server.wait_numbers(processes=2, slots=4)


def test_while_the_app_cannot_load_no_process_is_retired_for_max_requests(start):
    server = start_app(start, "--max-requests", "5", config={**TWO, "processes_per_replica": 3})
    old = set(server.workers)
    deploy(server, BROKEN)
    with Load(server, "/") as load:
        server.wait_log("RuntimeError: a broken deploy")
        server.wait_numbers(processes=2)
        load.go_on(200)
        assert len(old & set(server.workers)) == 2
    assert load.failures == []


@pytest.mark.parametrize("text", [BROKEN, KILLED])
def test_one_that_is_missing_is_tried_again_after_pauses_that_grow(start, text):
    server = start_app(start, config=TWO)
    deploy(server, text)
    server.tell(signal.SIGKILL, server.workers[0])
    server.wait_log("had loaded the app: the next one starts in 4 s")
    assert re.findall(r"the next one starts in (\d+) s", server.log) == ["1", "2", "4"]
    assert server.log.count("Booting worker") == 5
    assert server.get("/").status == 200
    deploy(server, APP)
    server.wait_numbers(processes=2, slots=4)


LASTING = """\
from replica_plugin import loading

begin = loading.Pauses.begin

def begin_and_last(self, age, now):
    pause = begin(self, age, now)
    if pause:
        self.until += 600
    return pause

loading.Pauses.begin = begin_and_last
from replica_plugin.conf import *
"""


def test_one_that_had_the_app_is_replaced_at_once_though_another_waits_for_its_pause(start):
    server = start_app(start, base=("-c", "lasting.py"), lasting=LASTING, config=TWO)
    deploy(server, BROKEN)
    server.tell(signal.SIGTTIN)
    server.wait_log("had loaded the app: the next one starts in 1 s")
    deploy(server, APP)
    server.tell(signal.SIGKILL, server.workers[0])
    server.wait_numbers(processes=3, slots=6)


def test_after_the_word_of_an_operator_no_process_waits_for_a_pause_of_before(start):
    one = {"processes_per_replica": 1}
    server = start_app(start, base=("-c", "lasting.py"), lasting=LASTING, config=one)
    deploy(server, BROKEN)
    server.tell(signal.SIGKILL, server.workers[0])
    server.wait_log("the next one starts in 1 s")
    server.tell(signal.SIGHUP)
    server.wait_log("the next one starts in 1 s", 2)
    deploy(server, APP)
    server.tell(signal.SIGTTIN)
    server.wait_numbers(processes=2, slots=2)


@IN_BOTH_MODES
def test_an_app_that_cannot_be_loaded_ends_gunicorn_though_it_has_started_a_thread(start, mode):
    text = (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n1 / 0"
    )
    files = {"app.py": text, "replica.yaml": f"mode: {mode}\n"}
    assert start.to_its_end(app=("app:app",), files=files).code == 3


def test_a_second_process_that_cannot_load_does_not_keep_gunicorn_from_its_end(start):
    files = {"app.py": ONE_AFTER_ANOTHER, "replica.yaml": "stagger_init: false\n"}
    ended = start.to_its_end("--workers", "2", app=("app:app",), files=files)
    assert ended.code == 3
    assert "Reason: Worker failed to boot." in ended.output
    assert "HaltServer" not in ended.output


WARM_UP = (
    IMPORT
    + """
import os

def post_worker_init(worker):
    print("warms up", flush=True)
    if os.path.exists("told"):
        worker.handle_exit(15, None)
    if os.path.exists("broken"):
        raise ConnectionError("no database")
"""
)


@IN_BOTH_MODES
def test_a_process_whose_post_worker_init_raises_is_one_that_cannot_load_the_app(start):
    server = start(base=(), files={"gunicorn.conf.py": WARM_UP}, config=TWO)
    old = server.workers
    (server.folder / "broken").touch()
    server.tell(signal.SIGHUP)
    server.wait_log("ConnectionError: no database", 2)
    wait_for(lambda: server.workers == old, "the end of those that failed")
    assert server.get("/hello").status == 200
    (server.folder / "broken").unlink()
    server.tell(signal.SIGHUP)
    wait_for(lambda: not set(old) & set(server.workers), "the old processes' end")
    server.wait_numbers(processes=2, slots=4)
    assert server.log.count("warms up") == 6


POST_FORK = (
    IMPORT
    + """
import os

def post_fork(server, worker):
    if os.path.exists("broken"):
        raise ConnectionError("no metrics")
"""
)


@IN_BOTH_MODES
def test_a_process_whose_post_fork_raises_is_one_that_cannot_load_the_app(start):
    server = start(base=(), files={"gunicorn.conf.py": POST_FORK}, config=TWO)
    old = server.workers
    (server.folder / "broken").touch()
    server.tell(signal.SIGHUP)
    server.wait_log("ConnectionError: no metrics", 2)
    wait_for(lambda: server.workers == old, "the end of those that failed")
    server.tell(signal.SIGKILL, old[0])
    server.wait_log("the next one starts in 2 s")
    assert server.get("/hello").status == 200
    (server.folder / "broken").unlink()
    wait_for(lambda: not set(old) & set(server.workers), "the old processes' end")
    server.wait_numbers(processes=2, slots=4)


INTERRUPTED = POST_FORK.replace("ConnectionError", "KeyboardInterrupt")


@IN_BOTH_MODES
@pytest.mark.parametrize("hook", [POST_FORK, INTERRUPTED], ids=["error", "interrupt"])
def test_a_process_that_fails_and_cannot_say_so_ends_nobody_but_itself(start, hook):
    """gunicorn prints to stderr what its log has already; the process has a copy of the master."""
    with open("/dev/full", "w") as full:
        server = start(
            "--error-logfile", "log", base=(), files={"gunicorn.conf.py": hook}, config=TWO,
            stderr=full,
        )  # fmt: skip
    (server.folder / "broken").touch()
    server.tell(signal.SIGKILL, server.workers[0])
    server.wait_log("had loaded the app: the next one starts in 2 s")
    assert server.get("/hello").status == 200
    (server.folder / "broken").unlink()
    server.wait_numbers(processes=2, slots=4)
    assert server.get("/hello").status == 200


@pytest.mark.parametrize("hook", [POST_FORK, INTERRUPTED], ids=["error", "interrupt"])
def test_a_post_fork_that_raises_at_the_start_ends_gunicorn(start, hook):
    files = {"gunicorn.conf.py": hook, "broken": ""}
    assert start.to_its_end(base=(), files=files).code == 3


WAITS = (
    IMPORT
    + """
import os, time

def post_worker_init(worker):
    while os.path.exists("hold"):
        open("waits", "w").close()
        time.sleep(0.01)
"""
)


@IN_BOTH_MODES
def test_a_process_that_is_told_to_leave_ends_at_once_in_post_worker_init(start):
    """Else it would keep the turn to load from its successor, for as long as its hook takes."""
    server = start(base=(), files={"gunicorn.conf.py": WAITS}, config={"processes_per_replica": 1})
    (server.folder / "hold").touch()
    (first,) = server.workers
    server.tell(signal.SIGTTIN)
    wait_for(lambda: len(server.workers) == 2, "another process")
    (second,) = set(server.workers) - {first}
    wait_for((server.folder / "waits").exists, "its hook")
    server.tell(signal.SIGTERM, second)
    wait_for(lambda: second not in server.workers, "its end")
    (server.folder / "hold").unlink()
    server.wait_numbers(processes=2)


def test_a_post_worker_init_that_raises_in_a_process_told_to_leave_ends_nobody_else(start):
    server = start(base=(), files={"gunicorn.conf.py": WARM_UP}, config=TWO)
    for name in ("broken", "told"):
        (server.folder / name).touch()
    server.tell(signal.SIGKILL, server.workers[0])
    server.wait_log("warms up", 4)
    for name in ("broken", "told"):
        (server.folder / name).unlink()
    server.wait_numbers(processes=2, slots=4)
    assert server.get("/hello").status == 200


@IN_BOTH_MODES
def test_a_post_worker_init_that_raises_at_the_start_ends_gunicorn(start, mode):
    text = IMPORT + "def post_worker_init(worker):\n    1 / 0\n"
    files = {"gunicorn.conf.py": text, "replica.yaml": f"mode: {mode}\n"}
    assert start.to_its_end(base=(), files=files).code == 3


def test_a_failure_after_a_thousand_others_in_a_row_is_one_like_the_first():
    """With one a minute that takes 17 hours; an error of ours would end gunicorn."""
    page = LoadPage()
    pauses, now = Pauses(page), 0.0
    for age in range(1024):
        now += pauses.begin(age + 1, now)
    assert pauses.begin(1025, now) == LONGEST_PAUSE
    os.close(page.fd)


def test_those_that_fail_together_are_one_failure_and_one_that_has_loaded_ends_the_row():
    page = LoadPage()
    pauses = Pauses(page)
    assert [pauses.begin(age, 10.0) for age in (1, 2, 3)] == [1.0, 0.0, 0.0]
    assert pauses.begin(4, 11.0) == 2.0
    page.note_loaded(5, [5])
    assert pauses.begin(5, 20.0) == 0.0
    assert pauses.begin(6, 20.0) == 1.0
    assert pauses.begin(5, 20.5) == 0.0
    assert pauses.begin(7, 20.5) == 2.0  # its end has ended the pause, and not the row
    os.close(page.fd)


def test_an_app_that_has_been_served_can_fail_in_all_processes_and_come_back(start):
    server = start_app(start, config=TWO)
    deploy(server, BROKEN)
    for worker in server.workers:
        server.tell(signal.SIGKILL, worker)
    server.wait_log("RuntimeError: a broken deploy", 2)
    deploy(server, APP)
    server.wait_numbers(processes=2, slots=4)
    assert server.get("/").status == 200


@IN_BOTH_MODES
@pytest.mark.parametrize("p", [1, 3])
def test_at_the_start_one_process_loads_after_another(start, stage, p):
    server = start(config={"processes_per_replica": p}, env=HELD, ready=False)
    for n in range(p):
        actor = stage.next()
        wait_for(lambda: len(server.workers) == p, "all processes")
        server.wait_numbers(processes=n)
        assert stage.is_empty()
        actor.finish()
    server.wait_numbers(processes=p)


IMPATIENT = """\
from replica_plugin import loading
loading.PATIENCE = 0.5
from replica_plugin.conf import *
"""


def test_behind_one_that_hangs_as_it_loads_the_others_load_after_all(start, stage):
    base, files = ("-c", "impatient.py"), {"impatient.py": IMPATIENT}
    p = {"processes_per_replica": 3}
    server = start(base=base, files=files, config=p, env=HELD, ready=False)
    hangs = stage.next()
    for n in (1, 2):
        stage.next().finish()
        server.wait_numbers(processes=n)
    server.wait_log(rf"in spite of stagger_init: for 0.5 s process {hangs.pid} has been loading it")
    assert server.get("/hello").status == 200
    hangs.finish()
    server.wait_ready()


def test_the_next_one_loads_when_the_one_that_loads_is_killed(start, stage):
    server = start(config=TWO, env=HELD, ready=False)
    first = stage.next()
    server.tell(signal.SIGKILL, first.pid)
    for _ in range(2):
        stage.next().finish()
    server.wait_ready()


def test_processes_that_wait_for_their_turn_end_with_the_master(start, stage):
    server = start(config={"processes_per_replica": 3}, env=HELD, ready=False)
    loading = stage.next()
    wait_for(lambda: len(server.workers) == 3, "all processes")
    waiting = [pid for pid in server.workers if pid != loading.pid]
    server.tell(signal.SIGKILL)
    server.process.wait()
    wait_for(lambda: not set(waiting) & set(start.left()), "their end")
    loading.finish()


def test_without_stagger_init_all_load_at_once(start, stage):
    server = start(config={**TWO, "stagger_init": False}, env=HELD, ready=False)
    for actor in stage.take(2):
        actor.finish()
    server.wait_ready()


@IN_BOTH_MODES
def test_in_a_reload_one_process_more_than_p_has_the_app_loaded(start, stage):
    server = start(config=TWO, env=HELD, ready=False)
    for _ in range(2):
        stage.next().finish()
    server.wait_ready()
    old = sorted(server.workers, key=lambda pid: (started(pid), pid))
    held = [server.later("/hold/x") for _ in range(4)]
    running = stage.take(4)
    server.tell(signal.SIGHUP)
    stage.next().finish()
    server.wait_numbers(slots=6)  # the first successor is there, and one old process dismissed
    assert stage.is_empty() and set(old) < set(server.workers)
    first = [actor for actor in running if actor.pid == old[0]]
    for actor in first:
        actor.finish()
    last = stage.next()
    assert last.name == "import"
    assert old[0] not in server.workers and old[1] in server.workers
    last.finish()
    for actor in running:
        if actor not in first:
            actor.finish()
    assert {each.result().status for each in held} == {200}
    wait_for(lambda: not set(old) & set(server.workers), "the old processes' end")
    server.wait_numbers(processes=2, slots=4)


def started(pid: int) -> int:
    """When a process was: pids begin anew."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


@IN_BOTH_MODES
def test_the_next_hup_ends_those_that_still_load_at_once(start, stage):
    server = start(config=TWO, env=HELD, ready=False)
    for _ in range(2):
        stage.next().finish()
    server.wait_ready()
    old = server.workers
    server.tell(signal.SIGHUP)
    loading = stage.next()
    wait_for(lambda: len(server.workers) == 4, "two successors")
    middle = set(server.workers) - set(old)
    server.tell(signal.SIGHUP)
    assert loading.vanished()
    wait_for(lambda: not middle & set(server.workers), "their end")
    server.wait_numbers(processes=2)
    last = 0
    while last < 2:
        actor = stage.next()
        if actor.pid not in middle:  # one of which was next to load when the first was told to end
            actor.finish()
            last += 1
    wait_for(lambda: not set(old) & set(server.workers), "the old processes' end")


@IN_BOTH_MODES
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGINT])
def test_a_stop_does_not_wait_for_those_that_still_load(start, stage, number):
    options = ("--graceful-timeout", "600")
    server = start(*options, config={"processes_per_replica": 3}, env=HELD, ready=False)
    loading = stage.next()
    wait_for(lambda: len(server.workers) == 3, "all processes")
    assert server.stop(number) == 0
    assert loading.vanished()


@pytest.mark.parametrize("base", [("-c", "python:replica_plugin.conf"), ("-c", "own.py")])
def test_with_a_broken_yaml_a_dead_process_is_replaced(start, base):
    server = start(base=base, files={"own.py": IMPORT}, config=TWO)
    (server.folder / "replica.yaml").write_text("processes_per_replica: many\n")
    old = server.workers
    server.tell(signal.SIGHUP)
    server.wait_log("The settings from before go on to hold")
    wait_for(lambda: len(server.workers) == 2 and not set(old) & set(server.workers), "a restart")
    victim = server.workers[0]
    server.tell(signal.SIGKILL, victim)
    wait_for(lambda: len(server.workers) == 2 and victim not in server.workers, "a successor")
    server.wait_numbers(processes=2, slots=4)


# preload

FROZEN = """
import gc, os
LOADER = os.getpid()
def app(environ, start_response):
    start_response("200 OK", [])
    return [f"{LOADER} {gc.get_freeze_count() > 0}".encode()]
"""


@IN_BOTH_MODES
def test_preload_loads_the_app_once_in_the_master_and_freezes_it(start):
    server = start_app(start, text=FROZEN, config={**TWO, "preload": True})
    assert server.get("/").body == f"{server.process.pid} True".encode()
    deploy(server, BROKEN)
    old = server.workers
    server.tell(signal.SIGHUP)
    server.wait_log("preload: the new processes have the app as the master loaded it at the start")
    wait_for(lambda: not set(old) & set(server.workers), "the old processes' end")
    assert server.get("/").body == f"{server.process.pid} True".encode()


def test_a_file_of_the_users_own_keeps_its_preload_app(start):
    files = {"own.py": f"preload_app = True\n{IMPORT}"}
    server = start(base=("-c", "own.py"), files=files, config={"processes_per_replica": 1})
    server.tell(signal.SIGHUP)
    server.wait_log("preload: the new processes have the app as the master loaded it at the start")


def test_a_preload_that_hup_would_change_needs_a_restart(start):
    server = start(config={"preload": False})
    server.write_config({"preload": True})
    server.tell(signal.SIGHUP)
    server.wait_log("preload_app has changed, which needs a restart; it stays False")


def test_a_preload_app_that_wins_over_preload_is_told(start):
    files = {"own.py": f"{IMPORT}preload_app = False\n"}
    server = start(base=("-c", "own.py"), files=files, config={"preload": True})
    assert "gunicorn's preload_app (False) wins over preload: true (replica.yaml:1)" in server.log


@IN_BOTH_MODES
@pytest.mark.parametrize("name", ["SIGTERM", "SIGQUIT"])
def test_a_process_told_to_end_while_gunicorn_sets_its_handlers_does_not_load_first(start, name):
    """The handler that gunicorn sets only makes a note, which is read once the app is loaded."""
    early = {"app.py": COUNTED, "early.py": TOLD_EARLY.format(name=name)}
    server = start(files=early, app="app:app", base=("-c", "early.py"))
    assert server.get("/").body == b"here"
    assert (server.folder / "told").exists()
    assert (server.folder / "loads").read_text() == "x"


# Processes that cannot be started.

NO_FORK = (
    IMPORT
    + """
import os

fork = os.fork

def fork_if_possible():
    if os.path.exists("full"):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()

os.fork = fork_if_possible
"""
)


def test_while_no_process_can_be_forked_those_that_are_there_serve_on(start, stage):
    server = start(base=(), files={"gunicorn.conf.py": NO_FORK}, config=TWO)
    running = server.later("/hold/x")
    actor = stage.next()
    idle = next(pid for pid in server.workers if pid != actor.pid)
    (server.folder / "full").touch()
    server.tell(signal.SIGKILL, idle)
    server.wait_log("No process can be started: BlockingIOError.11, 'Resource temporarily una", 2)
    actor.finish()
    assert running.result().status == server.get("/hello").status == 200
    server.tell(signal.SIGKILL, actor.pid)
    wait_for(lambda: server.get("/-/healthz").status == 503, "none that boots, nor seems to")
    (server.folder / "full").unlink()
    server.wait_numbers(processes=2, slots=4)
    server.tell(signal.SIGTERM, server.workers[0])
    server.wait_log("Booting worker", 5)
    server.wait_numbers(processes=2, slots=4)


def test_a_process_that_cannot_be_forked_at_the_start_ends_gunicorn(start):
    files = {"gunicorn.conf.py": NO_FORK, "full": ""}
    ended = start.to_its_end(base=(), files=files)
    assert ended.code == 255
    assert "Resource temporarily unavailable" in ended.output
