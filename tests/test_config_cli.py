"""The command: init, check and what surrounds them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from replica_plugin import demo
from replica_plugin.cli import main
from replica_plugin.config import templates


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("REPLICA_")]:
        monkeypatch.delenv(name)


Output = pytest.CaptureFixture[str]


def test_init_writes_both_files(capsys: Output) -> None:
    assert main(["init"]) == 0
    assert sorted(os.listdir()) == ["replica.yaml", "replica_plugin.conf"]
    assert capsys.readouterr().out == (
        "wrote replica.yaml and replica_plugin.conf\n"
        "next: gunicorn -c replica_plugin.conf app:app\n"
    )


def test_what_init_writes_passes_the_check() -> None:
    assert (main(["init"]), main(["check"])) == (0, 0)


@pytest.mark.parametrize(
    "names", [["replica.yaml"], ["replica_plugin.conf"], ["replica.yaml", "replica_plugin.conf"]]
)
def test_init_names_every_existing_file_and_writes_nothing(
    names: list[str], capsys: Output
) -> None:
    for name in names:
        Path(name).touch()
    assert main(["init"]) == 1
    told = f"replica-plugin: already there, nothing written: {', '.join(names)}\n"
    assert capsys.readouterr().err == told
    assert [(name, Path(name).read_text()) for name in sorted(os.listdir())] == [
        (name, "") for name in names
    ]


def test_init_does_not_write_through_a_link_that_leads_nowhere() -> None:
    Path("replica.yaml").symlink_to("gone.yaml")
    assert main(["init"]) == 1
    assert os.listdir() == ["replica.yaml"]


def test_init_leaves_a_file_alone_that_appears_meanwhile(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    Path("replica_plugin.conf").write_text("mine")
    monkeypatch.setattr(templates, "_existing", lambda paths: [])
    assert main(["init"]) == 1
    assert capsys.readouterr().err == (
        "replica-plugin: cannot write replica_plugin.conf: File exists\n"
    )
    assert os.listdir() == ["replica_plugin.conf"]
    assert Path("replica_plugin.conf").read_text() == "mine"


def test_init_in_a_folder_that_is_gone_says_so(tmp_path: Path, capsys: Output) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    assert main(["init"]) == 1
    expected = "replica-plugin: cannot write replica.yaml: No such file or directory\n"
    assert capsys.readouterr().err == expected


def test_check_shows_the_settings_and_what_they_mean(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    Path("replica.yaml").write_text("processes_per_replica: 2\nthreads_per_process: 2\n")
    monkeypatch.setenv("REPLICA_QUEUE_TIMEOUT", "1m30s")
    monkeypatch.setenv("REPLICA_ID", "7")
    assert main(["check"]) == 0
    assert capsys.readouterr().out == (
        "processes_per_replica       2       replica.yaml:1\n"
        "threads_per_process         2       replica.yaml:2\n"
        "mode                        thread  default\n"
        "max_replica_concurrency     1024    default\n"
        "target_replica_concurrency  4       default\n"
        "queue_timeout               90s     REPLICA_QUEUE_TIMEOUT\n"
        "request_timeout             none    default\n"
        "overload_status             503     default\n"
        "overload_dry_run            false   default\n"
        "request_buffer              1Mi     default\n"
        "response_buffer             8Mi     default\n"
        "response_buffer_total       256Mi   default\n"
        "header_timeout              10s     default\n"
        "receive_timeout             30s     default\n"
        "send_timeout                30s     default\n"
        "probes                      /-/     default\n"
        "exempt                      []      default\n"
        "ready_file                  none    default\n"
        "drain_delay                 0s      default\n"
        "stagger_init                true    default\n"
        "preload                     false   default\n"
        "\n"
        "note: environment: REPLICA_ID: no key of replica-plugin, ignored\n"
        "4 requests at a time, up to 1020 waiting\n"
    )


@pytest.mark.parametrize(
    ("content", "meaning"),
    [
        ("{}", "1 request at a time, up to 1023 waiting"),
        (
            "{threads_per_process: 4, max_replica_concurrency: 4}",
            "4 requests at a time, none waiting",
        ),
        (
            "{threads_per_process: 4, max_replica_concurrency: 3, target_replica_concurrency: 3}",
            "3 requests at a time, none waiting",
        ),
    ],
)
def test_check_says_what_the_bound_means(content: str, meaning: str, capsys: Output) -> None:
    Path("other.yaml").write_text(content)
    assert main(["check", "other.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == meaning


def test_check_says_that_there_is_no_file(capsys: Output) -> None:
    assert main(["check"]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "note: no replica.yaml or cortex.yaml here"


def test_check_tells_the_problems_on_stderr(capsys: Output) -> None:
    Path("replica.yaml").write_text("mode: x\n")
    assert main(["check"]) == 2
    assert capsys.readouterr() == ("", 'replica.yaml:1: mode: must be thread or gevent (got "x")\n')


def test_check_tells_the_settings_to_programs(capsys: Output) -> None:
    Path("replica.yaml").write_text("queue_timeout: 1m\n")
    assert main(["check", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["queue_timeout"] == {"value": 60.0, "from": "replica.yaml:1"}
    assert "admin_bind" not in told["settings"]
    del told["settings"]
    assert told == {"ok": True, "problems": [], "file": "replica.yaml", "notes": []}


def test_check_tells_the_problems_to_programs(capsys: Output) -> None:
    assert main(["check", "--json", "missing.yaml"]) == 2
    output = capsys.readouterr()
    assert (json.loads(output.out), output.err) == (
        {
            "ok": False,
            "problems": ["missing.yaml: cannot be read: No such file or directory"],
            "settings": {},
        },
        "",
    )


def test_the_demo_gets_the_arguments_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []

    def fake(arguments: list[str]) -> int:
        got.append(arguments)
        return 7

    monkeypatch.setattr(demo, "main", fake)
    assert (main(["demo", "--port", "1"]), got) == (7, [["--port", "1"]])


def test_the_version_is_told(capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("replica-plugin")


def test_an_interruption_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "main", interrupt)
    assert main(["demo"]) == 130


def test_a_reader_that_has_gone_gets_no_traceback() -> None:
    code = "import sys; from replica_plugin.cli import main; sys.exit(main(['check']))"
    reading, writing = os.pipe()
    os.close(reading)
    root = str(Path(templates.__file__).parent.parent)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=writing,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": root},
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


COMMANDS = {
    "init": ["replica_plugin", "init"],
    "check": ["replica_plugin", "check"],
    "check --json": ["replica_plugin", "check", "--json"],
    "demo": ["replica_plugin", "demo"],
    "--help": ["replica_plugin", "--help"],
    "flask replica init": ["flask", "replica", "init"],
    "flask replica check": ["flask", "replica", "check"],
}
NOWHERE = {
    ">&-": "replica-plugin: cannot write to stdout: it is closed\n",
    ">/dev/full": "replica-plugin: [Errno 28] No space left on device\n",
    "2>&- >&-": "",
    "2>&- >/dev/full": "",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("nowhere", NOWHERE)
def test_without_anywhere_to_write_to_a_command_fails_and_says_so(
    command: str, nowhere: str
) -> None:
    line = shlex.join([sys.executable, "-m", *COMMANDS[command]])
    done = subprocess.run(
        f"{line} {nowhere}",
        shell=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # else argparse hides that it cannot write
        timeout=60,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, NOWHERE[nowhere])


def test_a_terminal_that_lacks_a_character_is_shown_its_number() -> None:
    Path("größe.yaml").write_text("ready_file: /größe\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "replica_plugin", "check", "größe.yaml"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    line = next(line for line in done.stdout.splitlines() if line.startswith(b"ready_file"))
    assert line.split() == [b"ready_file", rb"/gr\xf6\xdfe", rb"gr\xf6\xdfe.yaml:1"]
