"""`flask replica`: the same files, words and exit statuses as replica-plugin's."""

from __future__ import annotations

import subprocess
import sys

import pytest
from server import environment

FLASK = (sys.executable, "-m", "flask", "replica")
OURS = (sys.executable, "-m", "replica_plugin")
SETTINGS = "processes_per_replica: 2\n"
MISTAKE = "processes_per_replica: none\n"


def run(folder, *command):
    options = {"capture_output": True, "text": True, "timeout": 60, "env": environment()}
    done = subprocess.run(command, cwd=folder, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("settings", "arguments", "status"),
    [
        (SETTINGS, ["check"], 0),
        (SETTINGS, ["check", "--json"], 0),
        (SETTINGS, ["check", "replica.yaml"], 0),
        (MISTAKE, ["check"], 2),
        (MISTAKE, ["check", "--json"], 2),
        (SETTINGS, ["check", "missing.yaml"], 2),
        (SETTINGS, ["init"], 1),
    ],
)
def test_flask_replica_says_what_replica_plugin_says(settings, arguments, status, tmp_path):
    (tmp_path / "replica.yaml").write_text(settings)
    said = run(tmp_path, *FLASK, *arguments)
    assert said == run(tmp_path, *OURS, *arguments)
    assert said[0] == status


def test_init_writes_the_same_files_though_there_is_no_app_that_could_be_loaded(tmp_path):
    folders = [tmp_path / "flask", tmp_path / "ours"]
    for folder in folders:
        folder.mkdir()
        (folder / "app.py").write_text("raise RuntimeError('not ready')\n")
    assert run(folders[0], *FLASK, "init") == run(folders[1], *OURS, "init")
    written = [{each.name: each.read_text() for each in folder.glob("r*")} for folder in folders]
    assert written[0] == written[1]
    assert written[0].keys() == {"replica.yaml", "replica_plugin.conf"}


def test_the_commands_cost_flask_no_import_but_their_own():
    """They are imported for each command of Flask's."""
    code = (
        "import sys, click, replica_plugin; before = {*sys.modules};"
        "import replica_plugin.flask_commands; print(*sorted({*sys.modules} - before))"
    )
    assert run(None, sys.executable, "-c", code)[1].split() == ["replica_plugin.flask_commands"]
