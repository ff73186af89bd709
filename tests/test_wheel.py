"""The wheel: what it holds, and that it works in an empty environment, outside of a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from conftest import Starter
from server import Shown, environment, show_demo

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "_build", "__pycache__", "build", "dist", "*.egg-info")
PIP = (sys.executable, "-m", "pip")  # that of an environment is slow to be installed
DEADLINE = 300
# What is imported is compiled once, and not in each process: scikit-learn takes long.
ENV = {"PYTHONPATH": None, "PYTHONDONTWRITEBYTECODE": None}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, since a build leaves things behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = Path(shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT))
    run(*PIP, "wheel", "-q", "--no-deps", "-w", folder, source)
    (built,) = folder.glob("*.whl")
    shutil.rmtree(source)
    return built


def run(*command: str | Path) -> str:
    """What a command prints."""
    done = call(*command)
    assert done.returncode == 0, done.stdout
    return done.stdout


def call(*command: str | Path) -> Shown:
    """A command, in an environment that knows nothing of the checkout."""
    return subprocess.run(
        command,
        cwd="/",
        env=environment(ENV),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
    )


def test_wheel_holds_the_package_its_license_and_its_metadata_and_no_more(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = {name for name in archive.namelist() if not name.endswith("/")}
    modules = {os.path.relpath(path, ROOT) for path in ROOT.glob("replica_plugin/**/*.py")}
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == modules | {"replica_plugin/py.typed"}
    assert any(name.endswith("LICENSE") for name in about)
    (file,) = (name for name in about if name.endswith("/METADATA"))
    metadata = message_from_bytes(archive.read(file))
    assert metadata["Name"] == "replica-plugin"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "MIT" in (metadata["License"], metadata["License-Expression"])
    assert "demo" in metadata.get_all("Provides-Extra", [])
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "# replica-plugin" in metadata.get_payload()


def test_wheel_in_an_empty_environment_shows_the_demo_and_serves(
    wheel: Path, tmp_path: Path, start: Starter
) -> None:
    commands = tmp_path / "empty" / "bin"
    run(sys.executable, "-m", "venv", "--without-pip", commands.parent)
    run(*PIP, "--python", commands / "python", "install", "-q", "--no-compile", f"{wheel}[demo]")

    done = show_demo(lambda: call(commands / "replica-plugin", "demo", "--rounds", "1"))
    assert done.returncode == 0, done.stdout
    assert "4 began at once" in " ".join(done.stdout.split())

    server = start(
        command=(str(commands / "gunicorn"),),
        app="replica_plugin.demo.app:app",
        config={"threads_per_process": 2},
        env=ENV,
    )
    assert "Replica: 1 process x 2 threads" in server.log
    assert server.get("/-/readyz").body == b"ready\n"
