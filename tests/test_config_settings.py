"""What is made of the fields: the reference table and the commented file."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica_plugin.config import templates
from replica_plugin.config.load import load
from replica_plugin.config.settings import KEYS, Settings, reference_table, supported


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_table_has_every_key_once_and_those_to_come_apart() -> None:
    now, later = reference_table().split("\n\nNot yet:\n\n")
    for table, works in ((now, True), (later, False)):
        keys = [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()[2:]]
        expected = [key for key, it in KEYS.items() if it.metadata["supported"] is works]
        assert keys == expected


def test_a_row_tells_type_default_rule_and_meaning() -> None:
    assert (
        "| processes_per_replica | int | 1 | an integer from 1 to 100 | "
        "processes that serve the app; 1 to 3 per CPU is a good start |"
    ) in reference_table().splitlines()


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("target_replica_concurrency", "p*t"),
        ("queue_timeout", "none"),
        ("request_buffer", "1Mi"),
        ("header_timeout", "10s"),
        ("probes", "/-/"),
        ("exempt", "[]"),
        ("stagger_init", "true"),
    ],
)
def test_a_default_is_shown_as_people_write_it(key: str, default: str) -> None:
    row = next(row for row in reference_table().splitlines() if row.startswith(f"| {key} |"))
    assert row.split(" | ")[2] == default


def test_the_commented_file_means_the_defaults() -> None:
    Path("replica.yaml").write_text(templates.replica_yaml())
    assert load(environ={}).settings == Settings()


def test_the_commented_file_loads_with_every_comment_on_a_key_removed() -> None:
    keys = tuple(f"#{key.name}:" for key in supported())
    lines = templates.replica_yaml().splitlines()
    bare = [line.removeprefix("#") if line.startswith(keys) else line for line in lines]
    Path("replica.yaml").write_text("\n".join(bare))
    loaded = load(environ={"REPLICA_TARGET_REPLICA_CONCURRENCY": "1"})
    assert "default" not in {loaded.sources[key.name] for key in supported()}


def test_the_commented_file_shows_a_value_to_use_where_the_default_is_none() -> None:
    entries = [line for line in templates.replica_yaml().splitlines() if line.startswith("#")]
    assert [line for line in entries if line.endswith(": none")] == []
    assert "#ready_file: /run/replica/ready" in entries


def test_the_commented_file_fits_a_terminal() -> None:
    assert max(map(len, templates.replica_yaml().splitlines())) <= 100


def test_the_configuration_for_gunicorn_is_one_line() -> None:
    code = [line for line in templates.CONF.splitlines() if not line.startswith("#")]
    assert code == ["from replica_plugin.conf import *"]
