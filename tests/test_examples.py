"""Each example is started and asked as its README says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from replica_plugin.demo.server import Server

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DEADLINE = 120


def test_digits_cpu_predicts_and_stops_completely(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(EXAMPLES / "digits_cpu", tmp_path / "digits_cpu"))
    readme = (folder / "README.md").read_text()
    with Server(_command(readme, "gunicorn"), folder) as server:
        port = server.wait_until_ready(DEADLINE)
        answer = _post(port, _command(readme, "curl"))
        family = _descendants(server.pid)
    assert answer["digit"] == 0
    assert 0 < answer["probability"] <= 1
    assert len(family) >= 2
    _wait_until_gone(family)


def _command(readme: str, program: str) -> list[str]:
    """The arguments of the command in the README that starts with `program`."""
    found = re.search(rf"^{program} .*$", readme, re.MULTILINE)
    assert found
    return shlex.split(found[0])[1:]


def _post(port: int, curl: list[str]) -> dict[str, float]:
    header, body = (curl[curl.index(option) + 1] for option in ("-H", "-d"))
    name, value = header.split(": ")
    connection = HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request("POST", urlsplit(curl[-1]).path, body, {name: value})
        response = connection.getresponse()
        assert response.status == 200
        answer: dict[str, float] = json.loads(response.read())
        return answer
    finally:
        connection.close()


def _descendants(pid: int) -> set[tuple[int, str]]:
    """All children and children's children, each with its start time: process ids come back."""
    stats = {int(path.parent.name): _stat(path) for path in Path("/proc").glob("[0-9]*/stat")}
    found, parents = set(), [pid]
    while parents:
        parent = str(parents.pop())
        children = [child for child, stat in stats.items() if stat[1:2] == [parent]]
        found |= {(child, stats[child][19]) for child in children}
        parents += children
    return found


def _stat(path: Path) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none if the process has ended."""
    try:
        return path.read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def _wait_until_gone(family: set[tuple[int, str]]) -> None:
    deadline = time.monotonic() + DEADLINE
    while left := {(pid, start) for pid, start in family if _lives(pid, start)}:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)


def _lives(pid: int, start: str) -> bool:
    stat = _stat(Path(f"/proc/{pid}/stat"))
    return stat[19:20] == [start] and stat[0] != "Z"
