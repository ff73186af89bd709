"""The commands of the README, and what is said at boot."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gunicorn
import pytest
from gunicorn.errors import HaltServer
from server import OURS, STOCK, TESTS, environment, wait_for

from replica_plugin import hook

BIN = Path(sys.executable).parent
COMMAND = (str(BIN / "gunicorn"),)
APP = "def app(environ, start_response):\n    start_response('200 OK', [])\n    return [b'here']\n"
IMPORT = "from replica_plugin.conf import *\n"
DEFAULTS = (
    "Replica: 1 process x 1 thread = 1 request at a time (thread mode), "
    "up to 1023 waiting (max_replica_concurrency 1024), from "
)


def init(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "replica-plugin"), "init"]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def messages(log: str, level: str) -> list[str]:
    """What a log holds of one level, without time and pid."""
    mark = f"[{level}] "
    return [line.partition(mark)[2] for line in log.splitlines() if mark in line]


# The two commands.


def test_the_python_form_works_in_a_folder_with_nothing_but_the_app(start):
    server = start(files={"app.py": APP}, command=COMMAND, app="app:app")
    assert server.get("/").body == b"here"
    assert f"{DEFAULTS}defaults" in messages(server.log, "INFO")
    assert messages(server.log, "WARNING") == messages(server.log, "ERROR") == []
    assert server.stop() == 0
    assert {p.name for p in server.folder.iterdir()} <= {"app.py", "log", "__pycache__"}


def test_the_file_form_works_literally_after_init(start, tmp_path):
    made = init(tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    names = ("replica.yaml", "replica_plugin.conf")
    files = {name: (tmp_path / name).read_text() for name in names}
    server = start(
        files={"app.py": APP, **files}, command=COMMAND, base=("-c", names[1]), app="app:app"
    )
    assert server.get("/").body == b"here"
    assert f"{DEFAULTS}replica.yaml" in messages(server.log, "INFO")


@pytest.mark.parametrize("there", ["replica.yaml", "replica_plugin.conf"])
def test_init_writes_nothing_where_one_of_its_files_is(tmp_path, there):
    (tmp_path / there).write_text("mine\n")
    refused = init(tmp_path)
    assert refused.returncode == 1
    assert refused.stderr == f"replica-plugin: already there, nothing written: {there}\n"
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine\n"


def test_init_names_both_files_if_both_are_there(tmp_path):
    init(tmp_path)
    assert init(tmp_path).stderr == (
        "replica-plugin: already there, nothing written: replica.yaml, replica_plugin.conf\n"
    )


def test_the_boot_line_says_what_the_replica_is(start):
    config = {
        "processes_per_replica": 2,
        "threads_per_process": 3,
        "max_replica_concurrency": 10,
    }
    server = start(config=config)
    assert (
        "Replica: 2 processes x 3 threads = 6 requests at a time (thread mode), "
        "up to 4 waiting (max_replica_concurrency 10), from replica.yaml"
    ) in messages(server.log, "INFO")


class Arbiter:
    """gunicorn's before 27: it forgets nobody who could not boot, but whom it cannot signal."""

    def __init__(self) -> None:
        self.WORKERS = {1: None, 2: None, 3: None}
        self.ended = ["Worker failed to boot."] * 2

    def reap_workers(self) -> None:
        if self.ended:
            raise HaltServer(self.ended.pop(0), 3)

    def kill_worker(self, pid: int, number: int) -> None:
        assert number == 0
        if pid != 3:
            del self.WORKERS[pid]


def test_in_a_stop_whoever_could_not_boot_is_not_waited_for():
    arbiter = Arbiter()
    hook._reap(arbiter.reap_workers, arbiter, SimpleNamespace(stopping=True))
    assert list(arbiter.WORKERS) == [3]


def test_the_first_process_that_cannot_boot_has_gunicorn_stop():
    arbiter = Arbiter()
    with pytest.raises(HaltServer):
        hook._reap(arbiter.reap_workers, arbiter, SimpleNamespace(stopping=False))


# A user's own gunicorn.conf.py.

HOOKS = """
def _note(name):
    import os
    with open("calls", "a") as file:
        file.write(name + "\\n")

def on_starting(server): _note("on_starting")
def on_reload(server): _note("on_reload")
def when_ready(server): _note("when_ready")
def pre_fork(server, worker): _note("pre_fork")
def post_fork(server, worker): _note("post_fork")
def post_worker_init(worker): _note("post_worker_init")
def worker_int(worker): _note("worker_int")
def worker_exit(server, worker): _note("worker_exit")
def child_exit(server, worker): _note("child_exit")
def nworkers_changed(server, new, old): _note("nworkers_changed")
def on_exit(server): _note("on_exit")
"""
BOOT = {
    "on_starting": 1, "nworkers_changed": 1, "when_ready": 1,
    "pre_fork": 2, "post_fork": 2, "post_worker_init": 2,
}  # fmt: skip
RELOAD = {
    "on_reload": 1, "nworkers_changed": 1, "pre_fork": 2, "post_fork": 2, "post_worker_init": 2,
    "worker_exit": 2, "child_exit": 2,
}  # fmt: skip
QUIT = {"worker_int": 2, "worker_exit": 2, "child_exit": 2, "on_exit": 1}
TRACER = """
import importlib.machinery, os, sys

assert not os.environ.get("TRACED"), "This is imported twice"
os.environ["TRACED"] = "yes"

class Loader:
    def __init__(self, loader):
        self.create_module, self._exec_module = loader.create_module, loader.exec_module

    def exec_module(self, module):
        self._exec_module(module)  # a frame of this file's lies between our line and us

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "replica_plugin.conf":
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            spec.loader = Loader(spec.loader)
            return spec

sys.meta_path.insert(0, Finder())
"""
EXECUTED = """
names = {}
exec(open("theirs").read(), names)
globals().update((name, value) for name, value in names.items() if name != "__builtins__")
"""
BESIDE = {
    "tracer.py": TRACER,
    "base.py": IMPORT,
    **dict.fromkeys(("theirs", "own.py"), f"{HOOKS}\n{IMPORT}"),
}
USERS_FILES = {
    "above": (f"{HOOKS}\n{IMPORT}", ()),
    "below": (f"{IMPORT}\n{HOOKS}", ()),
    "above, under an import hook": (f"import tracer\n{HOOKS}\n{IMPORT}", ()),
    "above, in a text that is executed": (EXECUTED, ()),
    "above, as a module": ("", ("-c", "python:own")),
    "above, with our line in another file": (f"{HOOKS}\nfrom base import *", ()),
    "without ours": (f"{HOOKS}\nworkers = 2\nthreads = 2", STOCK),
}


@pytest.mark.parametrize("place", USERS_FILES)
def test_a_users_hooks_are_called_once_an_event_wherever_our_line_stands(start, place):
    text, base = USERS_FILES[place]
    server = start(
        base=base,
        files={"gunicorn.conf.py": text, **BESIDE},
        config={"processes_per_replica": 2, "threads_per_process": 2},
    )
    calls = Calls(server)
    calls.wait(BOOT)
    calls.reload()
    calls.wait(BOOT, RELOAD)
    assert server.get("/").status == 200
    calls.reload()
    calls.wait(BOOT, RELOAD, RELOAD)
    assert server.get("/").status == 200
    server.stop(3)
    calls.wait(BOOT, RELOAD, RELOAD, QUIT)


class Calls:
    """The user's hooks that were called."""

    def __init__(self, server):
        self._server = server

    def reload(self):
        """HUP, once all that is there has booted."""
        self._server.tell(1)

    def wait(self, *expected):
        """Wait until as many were called as expected; then see that they are the ones."""
        total = sum(map(Counter, expected), Counter())

        def enough():
            return self._called().total() >= total.total()

        with contextlib.suppress(AssertionError):  # the comparison says more
            wait_for(enough, "the user's hooks called")
        assert self._called() == total

    def _called(self):
        return Counter((self._server.folder / "calls").read_text().split())


def test_a_users_settings_below_our_line_win_and_it_is_said_once(start):
    server = start(
        base=(),
        files={"gunicorn.conf.py": f"{IMPORT}\nworkers = 3\nkeepalive = 7\n"},
        config={"processes_per_replica": 2},
    )
    assert messages(server.log, "WARNING") == [
        "Conflict: gunicorn's workers (3) wins over processes_per_replica: 2 (replica.yaml:1)"
    ]
    server.tell(1)
    server.wait_log("Replica: 3 processes", 2)
    assert len(messages(server.log, "WARNING")) == 1


# What overrides us.


@pytest.mark.parametrize(("threads", "timeout", "told"), [(1, 30, 1), (1, 0, 0), (2, 30, 0)])
def test_with_one_thread_a_timeout_that_can_come_before_request_timeout_is_said(
    start, threads, timeout, told
):
    config = {"request_timeout": "30s", "threads_per_process": threads}
    server = start("--timeout", str(timeout), config=config)
    said = [
        "Conflict: gunicorn's timeout (30 s) can come before request_timeout: 30 s "
        "(replica.yaml:1). It ends the process of a request that keeps the GIL for so long, "
        "or runs for 60 s. "
        "Set --timeout above 40, or a shorter request_timeout."
    ]
    assert messages(server.log, "WARNING") == said[:told]


@pytest.mark.parametrize(("said", "used"), [("gevent", "thread"), ("thread", "gevent")])
def test_the_worker_class_decides_the_mode_and_what_follows_from_it(start, said, used):
    pytest.importorskip("gevent")
    worker = f"replica_plugin.{used}_worker.{used.title()}Worker"
    config = {"mode": said, "request_timeout": "30s"}
    server = start("-k", worker, "--timeout", "30", config=config)
    server.wait_log(f"1 request at a time \\({used} mode\\)")
    conflict, *others = messages(server.log, "WARNING")
    assert conflict == (
        f"Conflict: gunicorn's worker_class ({used}) wins over mode: {said} (replica.yaml:1)"
    )
    assert len(others) == (used == "thread")  # with one thread, timeout before request_timeout


@pytest.mark.parametrize(
    ("arguments", "env", "p", "t"),
    [
        (("-w", "3"), {}, 3, 2),
        (("--threads", "1"), {}, 2, 1),
        (("-w", "1", "--threads", "3"), {}, 1, 3),
        ((), {"GUNICORN_CMD_ARGS": "--workers=1 --threads=1"}, 1, 1),
        ((), {"WEB_CONCURRENCY": "5"}, 2, 2),
    ],
)
def test_the_command_line_wins_and_the_cap_is_then_its_own(start, stage, arguments, env, p, t):
    config = {"processes_per_replica": 2, "threads_per_process": 2}
    server = start(*arguments, config=config, env=env)
    lines = [
        f"Conflict: gunicorn's {theirs} ({value}) wins over {ours}: 2 (replica.yaml:{line})"
        for ours, theirs, value, line in (
            ("processes_per_replica", "workers", p, 1),
            ("threads_per_process", "threads", t, 2),
        )
        if value != 2
    ]
    assert messages(server.log, "WARNING") == lines
    server.wait_log(f"Replica: {p} process(es)? x {t} threads? = {p * t} requests? at a time")
    waiting = [server.later(f"/hold/{n}") for n in range(p * t + 1)]
    actors = stage.take(p * t)
    server.wait_numbers(running=p * t, waiting=1, processes=p, slots=p * t)
    assert Counter(Counter(actor.pid for actor in actors).values()) == {t: p}
    for actor in actors:
        actor.finish()
    stage.next().finish()
    assert {each.result().status for each in waiting} == {200}


@pytest.mark.parametrize("kind", ["gthread", "sync", "gevent"])
def test_with_another_worker_class_there_is_no_dispatcher_and_it_is_said(start, kind):
    if kind == "gevent":
        pytest.importorskip("gevent")
    config = {"processes_per_replica": 2, "threads_per_process": 2}
    server = start("-k", kind, config=config)
    # gunicorn itself takes gthread in place of sync with more than one thread.
    used = "gthread" if kind == "sync" else kind
    assert messages(server.log, "WARNING") == [
        f"No dispatcher: worker class {used} (this worker class was asked for). Each process keeps "
        "a queue of its own, with 2 threads; that all slots are used before a request waits, "
        "the order of requests and their bound are not promised."
    ]
    pids = set()
    wait_for(lambda: pids.add(server.get("/numbers").json["pid"]) or len(pids) == 2, "two workers")
    assert set(server.children()) == pids


@pytest.mark.parametrize("arguments", [(), STOCK])
def test_gunicorns_control_socket_is_not_opened(start, tmp_path, arguments):
    server = start(*arguments, env={"HOME": str(tmp_path / "home"), "XDG_RUNTIME_DIR": None})
    server.stop()
    assert "ontrol socket" not in server.log
    assert not (tmp_path / "home").exists()


@pytest.mark.skipif(gunicorn.version_info < (25, 1), reason="gunicorn has none")
def test_gunicorns_control_socket_is_opened_where_the_user_wants_it(start, tmp_path):
    server = start("--control-socket", str(tmp_path / "control"))
    server.wait_log(f"Control socket listening at {tmp_path}/control")
    server.stop()
    assert not (tmp_path / "control").exists()


# What is refused.

REASONS = {
    "reuse_port": (
        "reuse_port: one dispatcher accepts for all workers, so a socket for each of them "
        "would not be served. Leave --reuse-port out."
    ),
    "certfile": (
        "certfile, keyfile: the dispatcher hands over plain sockets and cannot do TLS yet. "
        "Leave them out and let a proxy in front (nginx, a load balancer) do TLS."
    ),
    "http2": (
        "http_protocols, http2_cleartext: HTTP/2 carries many requests on one connection, "
        "which cannot be handed to one slot. Leave h2 out; a proxy in front can speak it."
    ),
    "protocol": (
        "protocol: the dispatcher looks at HTTP requests only (got uwsgi). "
        "Leave --protocol out and have the proxy speak HTTP."
    ),
    "bound": (
        "max_replica_concurrency (1024) is less than workers x threads (33 x 32 = 1056). "
        "Raise it, or lower workers or threads."
    ),
    "threads": (
        "threads (0): a process without a slot would run nothing. Set --threads to 1 or more."
    ),
}
REFUSED = {
    "reuse_port": ("--reuse-port",),
    "certfile": ("--certfile", "cert.pem", "--keyfile", "key.pem"),
    "http2": ("--http2-cleartext", "prior-knowledge"),
    "protocol": ("--protocol", "uwsgi"),
    "bound": ("-w", "33", "--threads", "32"),
    "threads": ("--threads", "0"),
}
SINCE = {"http2": (25, 1), "protocol": (25, 0)}


def has(name: str) -> bool:
    return gunicorn.version_info >= SINCE.get(name, (0,))


@pytest.mark.parametrize("name", [name for name in REFUSED if has(name)])
def test_what_cannot_hold_is_refused_before_anything_listens(start, name):
    ended = start.to_its_end(
        *REFUSED[name], files={"cert.pem": "", "key.pem": ""}, env={"PYTHONWARNINGS": "ignore"}
    )
    assert ended.output == f"\nError: {REASONS[name]}\n\n"
    assert ended.code == 1
    assert not ended.listened


def test_all_that_cannot_hold_is_told_at_once(start):
    ended = start.to_its_end("--reuse-port", *REFUSED["certfile"], *REFUSED["bound"])
    told = "\n".join(REASONS[name] for name in ("reuse_port", "certfile", "bound"))
    assert ended.output == f"\nError: {told}\n\n"


@pytest.mark.parametrize("place", ["above", "below"])
def test_a_users_own_nworkers_changed_does_not_let_pass_what_cannot_hold(start, place):
    """Below our line it hides ours, so that the refusal comes late, and listeners close again."""
    text = USERS_FILES[place][0]
    ended = start.to_its_end("--reuse-port", base=(), files={"gunicorn.conf.py": text})
    assert ended.output.endswith(f"\nError: {REASONS['reuse_port']}\n\n")
    assert (ended.code, ended.listened) == (1, place == "below")


def test_a_worker_class_made_from_ours_is_treated_as_ours(start, stage):
    base = "from replica_plugin.thread_worker import ThreadWorker\n"
    own = base + "class Own(ThreadWorker):\n    pass\n"
    server = start("-k", "own.Own", files={"own.py": own}, env={"STAGE": stage.path})
    assert messages(server.log, "WARNING") == []
    server.wait_numbers(processes=1)
    ended = start.to_its_end("-k", "own.Own", "--reuse-port", files={"own.py": own})
    assert ended.output == f"\nError: {REASONS['reuse_port']}\n\n"


BROKEN = "processes_per_replica: none\nthreads: 2\n"


def test_a_broken_yaml_ends_both_forms_with_the_same_text_before_they_listen(start, tmp_path):
    files = {"replica.yaml": BROKEN, "replica_plugin.conf": IMPORT}
    forms = (OURS, ("-c", "replica_plugin.conf"))
    ends = [
        start.to_its_end(base=base, files=files, env={"PYTHONWARNINGS": "ignore"}) for base in forms
    ]
    (tmp_path / "replica.yaml").write_text(BROKEN)
    checked = subprocess.run(
        [str(BIN / "replica-plugin"), "check"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert checked.stderr.count("\n") == 2
    for end in ends:
        assert end.output.endswith(f"\n{checked.stderr}\n")
        assert end.code == 1
        assert "Traceback" not in end.output
        assert not end.listened


# Without a dispatcher.

DEAF = """
from replica_plugin.thread_worker import ThreadWorker
class Deaf(ThreadWorker):
    @classmethod
    def check_config(cls, cfg, log):
        pass
"""


def test_a_worker_that_finds_no_dispatcher_refuses_to_boot_and_names_the_hook(start):
    ended = start.to_its_end("-k", "deaf.Deaf", files={"deaf.py": DEAF})
    assert messages(ended.output, "ERROR")[0] == (
        "This worker has no dispatcher: the hook when_ready of replica_plugin was not "
        "called. Take its settings into gunicorn's configuration with "
        "`from replica_plugin.conf import *`, and leave check_config to its worker class."
    )
    assert ended.code == 3
    assert "Reason: Worker failed to boot." in messages(ended.output, "ERROR")
    assert "Traceback" not in ended.output


def test_our_worker_class_alone_is_enough_and_the_conflict_is_logged(start, stage):
    worker = "replica_plugin.thread_worker.ThreadWorker"
    server = start("-k", worker, base=(), config={"processes_per_replica": 2})
    assert messages(server.log, "WARNING") == [
        "Conflict: gunicorn's workers (1) wins over processes_per_replica: 2 (replica.yaml:1)"
    ]
    server.wait_numbers(processes=1)


ONCE = (
    IMPORT
    + """
import os
with open("read", "a") as file:
    file.write("x")
"""
)


def test_a_module_with_our_line_that_the_app_imports_too_is_run_once(start):
    files = {"gunicorn.conf.py": "from shared import *\n", "shared.py": ONCE}
    app = "import shared\n" + APP
    server = start(base=(), files={**files, "app.py": app}, app="app:app")
    assert server.get("/").status == 200
    assert (server.folder / "read").read_text() == "x"


LACKING = {
    "Linux": "import sys\nsys.platform = 'freebsd14'\n",
    "pidfd_open": "import os\ndel os.pidfd_open\n",
    "memfd_create": "import os\ndel os.memfd_create\n",
    "eventfd": "import os\ndel os.eventfd\n",
    "pidfd_open, by a sandbox": (
        "import os\ndef refused(*_): raise PermissionError(1, 'Operation not permitted')\n"
        "os.pidfd_open = refused\n"
    ),
    "memfd_create, by an old kernel": (
        "import os\ndef refused(*_): raise OSError(38, 'Function not implemented')\n"
        "os.memfd_create = refused\n"
    ),
    "SCM_RIGHTS": "import socket\ndel socket.SCM_RIGHTS\n",
}


@pytest.mark.parametrize("lacking", LACKING)
def test_a_system_that_lacks_something_gets_gthread_and_is_told(start, tmp_path, lacking):
    (tmp_path / "sitecustomize.py").write_text(LACKING[lacking])
    options = ("--graceful-timeout", "5")  # after which a gthread that has missed QUIT is killed
    server = start(
        *options,
        env={"PYTHONPATH": f"{tmp_path}:{TESTS}"},
        config={"processes_per_replica": 2, "threads_per_process": 2},
    )
    assert messages(server.log, "WARNING") == [
        "No dispatcher: worker class gthread (this system lacks epoll, pidfd or the passing of "
        "descriptors). Each process keeps a queue of its own, with 2 threads; that all slots are "
        "used before a request waits, the order of requests and their bound are not promised."
    ]
    pids = set()
    wait_for(lambda: pids.add(server.get("/numbers").json["pid"]) or len(pids) == 2, "two workers")
    assert set(server.children()) == pids


NOWHERE = """
import sys
for name in ("fcntl", "termios", "resource", "pwd", "grp", "mmap"):
    sys.modules[name] = None
import select, os, socket
words = {select: ["EPOLL"], os: ["PIDFD", "MEMFD", "EVENTFD", "EFD_"],
         socket: ["SCM_", "CMSG", "AF_UNIX", "SEQPACKET"]}
for module in words:
    for name in [n for n in dir(module) if any(word in n.upper() for word in words[module])]:
        delattr(module, name)
del os.fork
import replica_plugin, replica_plugin.cli
from replica_plugin import Replica
print(Replica.__module__, replica_plugin.cli.main(["check"]))
"""


def test_importing_it_works_where_nothing_of_linux_is_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NOWHERE],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "replica_plugin.extension 0"
    assert "1 request at a time, up to 1023 waiting" in done.stdout
