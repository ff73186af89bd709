"""An installation that any user can read, for servers that run as somebody else.

The interpreter that runs the tests may lie where only root can go.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from server import TESTS

NOBODY = "nobody"
PACKAGES = ("replica_plugin", "gunicorn", "yaml", "packaging")


@dataclass(frozen=True)
class Install:
    """A command that starts gunicorn, with the environment it needs, and a folder of nobody's."""

    command: tuple[str, ...]
    env: dict[str, str]
    uid: int
    gid: int
    group: str
    folder: Path


def _as_nobody(command: list[str]) -> bool:
    user = pwd.getpwnam(NOBODY)
    try:
        done = subprocess.run(
            command, user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/",
            capture_output=True,
        )  # fmt: skip
    except OSError:
        return False
    return done.returncode == 0


def _interpreter() -> str | None:
    """An interpreter that nobody can start, and of a version that we support."""
    check = "import sys, ssl, socket; sys.exit(sys.version_info < (3, 10))"
    found = [sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"]
    return next((each for each in found if _as_nobody([each, "-c", check])), None)


@pytest.fixture(scope="module")
def install() -> Iterator[Install]:
    if os.geteuid() != 0:
        pytest.skip("only root can start servers as somebody else")
    import grp

    user = pwd.getpwnam(NOBODY)
    python = _interpreter()
    if python is None:
        pytest.skip("no interpreter here that user nobody can read")
    home = Path(tempfile.mkdtemp(prefix="replica-"))
    try:
        home.chmod(0o755)
        packages = home / "packages"
        for name in PACKAGES:
            spec = find_spec(name)
            if spec is not None and spec.submodule_search_locations:
                shutil.copytree(
                    spec.submodule_search_locations[0], packages / name,
                    ignore=shutil.ignore_patterns("__pycache__", "*.so"),
                )  # fmt: skip
        for name in ("served_app.py",):
            shutil.copy(TESTS / name, packages)
        folder = home / "folder"
        folder.mkdir()
        os.chown(folder, user.pw_uid, user.pw_gid)
        env = {"PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"}
        group = grp.getgrgid(user.pw_gid).gr_name
        command = (python, "-m", "gunicorn")
        yield Install(command, env, user.pw_uid, user.pw_gid, group, folder)
    finally:
        shutil.rmtree(home)
