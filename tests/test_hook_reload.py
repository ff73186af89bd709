"""HUP: what is read anew, what cannot change, and what a mistake does not break."""

from __future__ import annotations

import signal
import socket

import pytest
from server import OURS, wait_for, write_files
from test_hook_start import APP, IMPORT, REASONS, has, messages

FORMS = {
    "module": (OURS, {}),
    "file": (("-c", "replica_plugin.conf"), {"replica_plugin.conf": IMPORT}),
    "own module": (("-c", "python:own"), {"own.py": IMPORT}),
    "module of a package": (
        (),
        {"gunicorn.conf.py": "from replica_plugin import conf\nglobals().update(vars(conf))\n"},
    ),
    "shared module": ((), {"gunicorn.conf.py": "from shared import *\n", "shared.py": IMPORT}),
}
BOOT = "Replica: "


def reload(server, config=None, *, text=None):
    """Change the settings, HUP, and wait until the master has taken them up."""
    before = server.log.count(BOOT)
    if config is not None:
        server.write_config(config)
    if text is not None:
        (server.folder / "replica.yaml").write_text(text)
    server.tell(signal.SIGHUP)
    server.wait_log(BOOT, before + 1)


@pytest.mark.parametrize("form", FORMS)
def test_changed_settings_are_in_effect_after_hup_in_every_form_of_configuration(
    start, stage, form
):
    base, files = FORMS[form]
    server = start(base=base, files=files, config={"threads_per_process": 2})
    # A probe says when the new settings are in effect: its path is one of them.
    changed = {"processes_per_replica": 2, "threads_per_process": 1, "max_replica_concurrency": 2}
    reload(server, {**changed, "probes": "/new/"})
    wait_for(lambda: server.get("/new/readyz").status == 200, "the new probes")
    assert server.get("/-/readyz").status == 404
    server.wait_numbers(processes=2, slots=2)
    running, actors = fill(server, stage)
    assert server.get("/hello").body == (
        b"The replica is full: 2 requests are in flight, as many as "
        b"max_replica_concurrency (2) admits.\n"
    )
    finish(running, actors)
    changed |= {"max_replica_concurrency": 3, "queue_timeout": "2s"}
    reload(server, {**changed, "probes": "/newer/"})
    wait_for(lambda: server.get("/newer/readyz").status == 200, "the new probes")
    running, actors = fill(server, stage)
    waited = server.get("/hello").body
    assert waited == b"No slot became free within queue_timeout (2 s).\n"
    finish(running, actors)
    assert (
        "Replica: 2 processes x 1 thread = 2 requests at a time (thread mode), "
        "up to 1 waiting (max_replica_concurrency 3), from replica.yaml"
    ) in messages(server.log, "INFO")


def test_our_worker_class_alone_reads_the_settings_at_hup(start):
    worker = "replica_plugin.thread_worker.ThreadWorker"
    server = start("-k", worker, base=())
    reload(server, {"probes": "/new/"})
    wait_for(lambda: server.get("/new/readyz").status == 200, "the new probes")
    reload(server, text="probes: 1\n")
    server.wait_log("The settings from before go on to hold.")
    assert server.get("/new/readyz").status == 200


def fill(server, stage):
    """Two requests running, in two processes."""
    running = [server.later(f"/hold/{n}") for n in range(2)]
    actors = stage.take(2)
    assert len({actor.pid for actor in actors}) == 2
    return running, actors


def finish(running, actors):
    for actor in actors:
        actor.finish()
    assert [each.result().status for each in running] == [200, 200]


def test_lowering_the_slots_starts_nothing_while_more_are_running(start, stage):
    at_once = {"stagger_init": False}  # else the new one would not load before an old one has gone
    server = start(config={"processes_per_replica": 2, "threads_per_process": 2, **at_once})
    old = [server.later(f"/hold/{n}") for n in range(4)]
    actors = stage.take(4)
    reload(server, {"processes_per_replica": 1, "threads_per_process": 1, **at_once})
    server.wait_numbers(processes=1, slots=2 + 2 + 1)
    new = server.later("/hold/new")
    server.wait_numbers(waiting=1)
    for actor in actors[:3]:
        actor.finish()
    server.wait_numbers(running=1, waiting=1)
    assert stage.is_empty()
    actors[3].finish()
    last = stage.next()
    assert last.main and last.pid not in {actor.pid for actor in actors}
    last.finish()
    assert {each.result().status for each in [*old, new]} == {200}


BAD = "processes_per_replica: 0\nqueue_timeot: 3s\n"


@pytest.mark.parametrize("form", ["module", "file"])
def test_a_broken_yaml_is_told_at_hup_and_the_old_settings_hold_until_it_is_mended(start, form):
    base, files = FORMS[form]
    server = start(base=base, files=files, config={"processes_per_replica": 2})
    old = server.workers
    reload(server, text=BAD)
    told = server.log.partition("[ERROR] ")[2]
    assert told.startswith(
        "replica.yaml:1: processes_per_replica: must be greater than or equal to 1 (got 0)\n"
        "replica.yaml:2: queue_timeot: unknown key; did you mean queue_timeout?\n"
        "The settings from before go on to hold.\n"
    )
    assert "Traceback" not in server.log
    assert server.get("/").status == 200
    server.wait_numbers(processes=2, slots=2)
    wait_for(lambda: not set(old) & set(server.workers), "a rolling restart")
    reload(server, {"processes_per_replica": 3})
    server.wait_numbers(processes=3, slots=3)


GONE = (
    "replica.yaml: must be there in a reload, and not empty, since the settings are from it "
    "(got {}); put it back and HUP, or restart to run without it\n"
    "The settings from before go on to hold.\n"
)
LOST = {
    "gone": ({"replica.yaml": None}, "no file"),
    "empty": ({"replica.yaml": "# two\n"}, "nothing in replica.yaml"),
    "passed over": ({"replica.yaml": None, "cortex.yaml": "probes: /other/\n"}, "cortex.yaml"),
}


@pytest.mark.parametrize("case", LOST)
def test_a_file_that_is_lost_is_told_at_hup_and_its_settings_hold_until_it_is_back(start, case):
    files, seen = LOST[case]
    server = start(config={"processes_per_replica": 2})
    old = server.workers
    change(server.folder, files)
    reload(server)
    assert server.log.partition("[ERROR] ")[2].startswith(GONE.format(seen))
    wait_for(lambda: not set(old) & set(server.workers), "a rolling restart")
    server.wait_numbers(processes=2, slots=2)
    reload(server, {"processes_per_replica": 3})
    server.wait_numbers(processes=3, slots=3)
    assert server.log.count("[ERROR]") == 1


def change(folder, files):
    for name, text in files.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)


FOUND = {
    "another that is named": (
        {"replica.yaml": "probes: /old/\n"},
        {"replica.yaml": None, "a.yaml": "probes: /new/\n", "named": "a.yaml"},
    ),
    "one that has gained something": ({"replica.yaml": ""}, {"replica.yaml": "probes: /new/\n"}),
    "replica.yaml for cortex.yaml": (
        {"cortex.yaml": "probes: /old/\n"},
        {"cortex.yaml": None, "replica.yaml": "probes: /new/\n"},
    ),
}
NAMED = "import os\nos.environ['REPLICA_CONFIG'] = open('named').read()\n"


@pytest.mark.parametrize("case", FOUND)
def test_a_hup_may_find_another_file_and_without_one_before_needs_none(start, case):
    before, after = FOUND[case]
    files = {"gunicorn.conf.py": NAMED + IMPORT, "named": "", **before}
    server = start(base=(), files=files, ready=False)
    server.wait_log(BOOT)
    change(server.folder, after)
    reload(server)
    wait_for(lambda: server.get("/new/readyz").status == 200, "the new probes")
    assert "[ERROR]" not in server.log


@pytest.mark.parametrize("after", [None, ""])
def test_a_replica_that_had_no_file_needs_none_at_hup(start, after):
    server = start(files={"replica.yaml": ""})
    change(server.folder, {"replica.yaml": after})
    reload(server)
    assert server.get("/").status == 200
    assert "[ERROR]" not in server.log


def test_the_longest_settings_can_be_told_at_hup_and_what_is_longer_is_left_out(start):
    text = (
        IMPORT
        + "logconfig_dict = dict(version=1, x='x' * (1 << {}))\n"
        + "proc_name = statsd_prefix = syslog_prefix = '\U0001f600' * 5000\n"
    )
    server = start(base=(), files={"gunicorn.conf.py": text.format(2)})
    (server.folder / "gunicorn.conf.py").write_text(text.format(22))
    quotes = '"' * 15_998
    longest = {"exempt": ["/" + quotes], "ready_file": "\U0001f600" * 16_000}
    reload(server, {**longest, "probes": f"/{quotes}/"})
    server.wait_log("ready_file .* cannot be kept: File name too long")
    assert server.get("/hello").status == 200


def test_a_bound_below_the_command_lines_slots_is_told_at_hup_and_left_alone(start):
    server = start("-w", "2", "--threads", "2", config={})
    reload(server, {"max_replica_concurrency": 3})
    assert messages(server.log, "ERROR") == [
        "Not possible with a replica, and left alone: max_replica_concurrency (3) is less than "
        "workers x threads (2 x 2 = 4). Raise it, or lower workers or threads."
    ]
    server.wait_numbers(bound=1024)
    assert server.get("/").status == 200


def test_a_changed_bind_is_refused_at_hup_and_serving_goes_on(start):
    text = "bind = '127.0.0.1:0'\n"
    server = start(base=(), bind=(), files={"gunicorn.conf.py": IMPORT + text})
    (server.folder / "gunicorn.conf.py").write_text(IMPORT + "bind = ['127.0.0.1:0', 'unix:x']\n")
    reload(server)
    assert messages(server.log, "ERROR") == [
        "bind has changed, which needs a restart; it stays ['127.0.0.1:0']"
    ]
    assert server.get("/").status == 200
    reload(server)
    assert server.get("/").status == 200
    assert not (server.folder / "x").exists()


def test_a_changed_worker_class_is_refused_at_hup_and_serving_goes_on(start):
    server = start(base=(), files={"gunicorn.conf.py": IMPORT})
    (server.folder / "gunicorn.conf.py").write_text(IMPORT + "worker_class = 'gthread'\n")
    reload(server)
    assert messages(server.log, "ERROR") == [
        "worker_class has changed, which needs a restart; "
        "it stays replica_plugin.thread_worker.ThreadWorker"
    ]
    server.wait_numbers(processes=1)
    assert server.get("/").status == 200


def test_a_gunicorn_that_is_given_our_line_at_hup_serves_on_and_says_that_it_needs_a_restart(start):
    server = start(base=(), files={"gunicorn.conf.py": ""}, config={"processes_per_replica": 2})
    for n in (1, 2):
        old = server.workers
        (server.folder / "gunicorn.conf.py").write_text(IMPORT)
        server.tell(signal.SIGHUP)
        server.wait_log("A replica needs a restart", n)
        wait_for(lambda old=old: not set(old) & set(server.workers), "new workers")
        wait_for(lambda: len(server.workers) == 2, "two of them")
        server.wait_ready()  # gunicorn's own reset connections while they reload
    assert (
        messages(server.log, "ERROR")
        == ["A replica needs a restart of gunicorn; until then its own gthread serves"] * 2
    )
    old = server.workers
    (server.folder / "replica.yaml").write_text(BAD)
    server.tell(signal.SIGHUP)
    server.wait_log("The settings from before go on to hold.")
    wait_for(lambda: not set(old) & set(server.workers), "new workers")
    wait_for(lambda: len(server.workers) == 2, "two of them")


REFUSED = {
    "reuse_port": "reuse_port = True\n",
    "certfile": "certfile = keyfile = 'key.pem'\n",
    "http2": "http2_cleartext = 'prior-knowledge'\n",
    "protocol": "protocol = 'uwsgi'\n",
    "bound": "workers, threads = 33, 32\n",
    "threads": "threads = 0\n",
}
LEFT_ALONE = "Not possible with a replica, and left alone: "


@pytest.mark.parametrize("name", [name for name in REFUSED if has(name)])
def test_what_cannot_hold_is_told_at_hup_and_left_alone(start, name):
    """A port that is fixed, for a socket of a process's own on port 0 is on another one."""
    files = {"gunicorn.conf.py": IMPORT, "key.pem": ""}
    with socket.socket() as kept:  # until the server has it: nobody else is given this port
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        bind = (f"127.0.0.1:{kept.getsockname()[1]}", "unix:sock")
        server = start(base=(), bind=bind, files=files, config={"processes_per_replica": 2})
    (server.folder / "gunicorn.conf.py").write_text(IMPORT + REFUSED[name])
    old = server.workers
    reload(server)
    assert messages(server.log, "ERROR") == [LEFT_ALONE + REASONS[name]]
    wait_for(lambda: not set(old) & set(server.workers), "new workers")
    server.wait_numbers(processes=2, slots=2, bound=1024)
    assert [server.get("/hello", which).status for which in (0, 1)] == [200, 200]
    assert "[ERROR]" not in server.log.partition(LEFT_ALONE)[2]


def test_what_was_before_is_left_alone_only_with_what_it_goes_with(start):
    text = IMPORT + "threads = {}\n"
    server = start(base=(), files={"gunicorn.conf.py": text.format(4)}, config={})
    (server.folder / "gunicorn.conf.py").write_text(text.format(0))
    reload(server, {"max_replica_concurrency": 3})
    bound = REASONS["bound"].replace("1024", "3").replace("33 x 32 = 1056", "1 x 4 = 4")
    assert messages(server.log, "ERROR") == [f"{LEFT_ALONE}{REASONS['threads']}; {bound}"]
    server.wait_numbers(slots=4, bound=1024)
    assert server.get("/hello").status == 200


def test_new_code_of_the_app_is_picked_up_by_new_processes(start):
    server = start(files={"app.py": APP}, app="app:app", config={"processes_per_replica": 2})
    old = server.workers
    assert server.get("/").body == b"here"
    (server.folder / "app.py").write_text(APP.replace("here", "there"))
    reload(server)
    wait_for(lambda: not set(old) & set(server.workers), "the old processes gone")
    server.wait_numbers(processes=2)
    assert [server.get("/").body for _ in range(4)] == [b"there"] * 4


def test_hup_finds_the_settings_of_the_folder_it_was_started_in_with_chdir(start, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "app.py").write_text(APP)
    server = start("--chdir", str(elsewhere), app="app:app", config={"processes_per_replica": 2})
    reload(server, {"processes_per_replica": 3})
    server.wait_numbers(processes=3)
    assert server.get("/").body == b"here"


@pytest.mark.parametrize("form", ["module", "file"])
def test_without_a_dispatcher_hup_reads_the_settings_too(start, form):
    base, files = FORMS[form]
    server = start("-k", "gthread", base=base, files=files, config={"processes_per_replica": 1})
    server.write_config({"processes_per_replica": 3})
    server.tell(signal.SIGHUP)
    wait_for(lambda: len(server.workers) == 3, "three workers")
    (server.folder / "replica.yaml").write_text(BAD)
    server.tell(signal.SIGHUP)
    server.wait_log("The settings from before go on to hold.")
    server.wait_ready()  # gthread resets connections while it reloads


KEEPALIVE = {
    "file": ((), {"gunicorn.conf.py": IMPORT + "keepalive = {}\n"}),
    "package": (
        ("-c", "python:own"),
        {
            "own/__init__.py": "import own.limits\n" + IMPORT + "keepalive = own.limits.KEPT\n",
            "own/limits.py": "KEPT = {}\n",
        },
    ),
}


@pytest.mark.parametrize("form", KEEPALIVE)
def test_the_settings_of_gunicorn_that_the_dispatcher_uses_change_with_hup(start, form):
    """The limit of a request's line, which the dispatcher looks at, and keepalive."""
    base, files = KEEPALIVE[form]
    server = start(base=base, files={name: text.format(0) for name, text in files.items()})
    with server.connect() as client:
        assert client.get("/-/healthz").headers["Connection"] == "close"
    write_files(server.folder, {name: text.format(10) for name, text in files.items()})
    reload(server)

    def kept():
        with server.connect() as client:
            return client.get("/-/healthz").headers["Connection"] == "keep-alive"

    wait_for(kept, "keep-alive")


@pytest.mark.parametrize("signals", ["ttin", "ttou"])
def test_ttin_and_ttou_change_the_number_of_processes(start, signals):
    server = start(config={"processes_per_replica": 2})
    number, wanted = {"ttin": (signal.SIGTTIN, 3), "ttou": (signal.SIGTTOU, 1)}[signals]
    server.tell(number)
    server.wait_numbers(processes=wanted, slots=wanted)
    wait_for(lambda: len(server.workers) == wanted, "as many workers")
    assert server.get("/").status == 200
