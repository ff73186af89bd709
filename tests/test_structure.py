"""What holds the code together: who may import whom, and documents that repeat the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from replica_plugin.config.settings import reference_table

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "replica_plugin"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

KNOW_GUNICORN = {
    "answers", "boot", "exchange", "hook", "journal", "master", "settled",
    "supervisor", "worker",
}  # fmt: skip
DISPATCHER = {
    "actions", "answers", "arrival", "arriving", "cells", "channel", "chunks", "clients",
    "connection", "deadlines", "decisions", "deck", "dispatcher", "doubts", "endings", "guard",
    "head", "heritage", "journal", "listeners", "machine", "overtime", "pages", "process",
    "processes", "rate", "ready_file", "request_queue", "rest", "roster", "rules", "scheduling",
    "stopping", "supervisor", "unpatched",
}  # fmt: skip
"""What runs in the process without user code."""


def imports(module: str) -> set[str]:
    """The modules that a module imports, ours by their bare names."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = (node.module or "").partition(".")[0]
            found |= {name} if name else {alias.name for alias in node.names}
    return found


def test_the_decisions_know_nothing_but_the_standard_library():
    standard = {
        "__future__", "bisect", "collections", "dataclasses", "enum", "itertools", "math",
        "operator", "typing",
    }  # fmt: skip
    ours = {"actions", "overtime", "process", "rate", "request_queue", "roster"}
    assert set().union(*map(imports, ours | {"decisions"})) <= standard | ours


@pytest.mark.parametrize("module", ["clients", "processes"])
def test_the_two_sides_of_the_dispatcher_do_not_know_each_other_or_the_queue(module):
    others = {"clients", "processes"} - {module}
    assert not imports(module) & (others | {"decisions", "dispatcher", "journal"})


def test_gunicorn_is_touched_in_few_files():
    assert {module for module in MODULES if "gunicorn" in imports(module)} == KNOW_GUNICORN


def test_gevent_is_imported_by_gevent_mode_only():
    assert {m for m in MODULES if "gevent" in imports(m)} == {"gevent_worker", "green"}
    assert {m for m in MODULES if "green" in imports(m)} == {"gevent_worker"}


def test_the_dispatcher_imports_nothing_that_runs_user_code_or_reads_configuration():
    reached = set().union(*(imports(module) for module in DISPATCHER)) & {*MODULES, "config"}
    assert reached <= DISPATCHER


def test_nothing_that_a_process_has_written_is_read_with_marshal_which_could_crash_the_reader():
    """But for jobs, which the dispatcher writes, and in which a process's words are bytes."""
    readers = [path.name for path in PACKAGE.glob("*.py") if "marshal.loads" in path.read_text()]
    assert readers == ["channel.py"]
    assert (PACKAGE / "channel.py").read_text().count("marshal.loads") == 1


def test_importing_the_package_imports_neither_flask_nor_gunicorn_nor_anything_of_linux():
    code = "import sys, replica_plugin; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unwanted = {"flask", "gunicorn", "gevent", "yaml", "replica_plugin.supervisor"}
    assert not unwanted & set(run.stdout.split())


def test_the_readme_shows_the_settings_as_the_code_has_them():
    assert reference_table().strip() in (ROOT / "README.md").read_text()


def test_the_files_named_in_the_design_notes_exist():
    text = (ROOT / "docs" / "design.md").read_text()
    named = {word.strip("`") for word in text.replace(",", " ").split() if word.endswith(".py`")}
    assert named
    assert {name for name in named if not (PACKAGE / name).exists()} == set()


GUNICORNS = {
    "Error handling request %s",
    "Exception in post_request hook",
    "Socket error processing request.",
}
"""Lines that are its own, from wherever."""


def test_each_line_of_the_log_is_in_the_reference():
    """As far as it is a literal: by the first words of what lies between two values."""
    reference = (ROOT / "docs/reference/logs.md").read_text()
    missing = [
        line
        for file in PACKAGE.glob("*.py")
        for line in logged(file)
        if line not in GUNICORNS and not any(part in reference for part in first_words(line))
    ]
    assert missing == []


def first_words(line: str) -> list[str]:
    parts = [part.strip() for part in re.split(r"%\w|\n", line)]
    return [part[:18] for part in parts if len(part) > 3]


def logged(file: Path) -> list[str]:
    """What it logs as a warning, or worse."""
    calls = [each for each in ast.walk(ast.parse(file.read_text())) if isinstance(each, ast.Call)]
    return [
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in ("warning", "error", "exception")
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and len(call.args[0].value) > len("%s: %s, %s")
    ]
