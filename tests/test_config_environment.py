"""The environment: what it overrides, and what it says about names it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica_plugin.config.load import load
from replica_plugin.config.settings import Settings
from replica_plugin.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(environ=environ)
    return str(caught.value)


def test_a_variable_overrides_the_file() -> None:
    Path("replica.yaml").write_text("threads_per_process: 2\nprobes: false\n")
    loaded = load(environ={"REPLICA_THREADS_PER_PROCESS": "3"})
    assert loaded.settings == Settings(threads_per_process=3, probes=None)
    assert loaded.sources["threads_per_process"] == "REPLICA_THREADS_PER_PROCESS"


def test_a_variable_overrides_a_cortex_file() -> None:
    Path("cortex.yaml").write_text(
        "- name: a\n  kind: RealtimeAPI\n  predictor: {threads_per_process: 2}\n"
    )
    loaded = load(environ={"REPLICA_THREADS_PER_PROCESS": "3"})
    assert loaded.settings.threads_per_process == 3


def test_an_empty_variable_is_unset() -> None:
    assert load(environ={"REPLICA_QUEUE_TIMEOUT": "", "REPLICA_CONFIG": ""}).settings == Settings()


def test_a_bad_value_is_told() -> None:
    assert refusal({"REPLICA_QUEUE_TIMEOUT": "soon"}) == (
        "environment: REPLICA_QUEUE_TIMEOUT: must be a duration > 0s, such as 10s or 1m30s "
        '(got "soon")'
    )


def test_a_list_is_written_with_commas() -> None:
    assert load(environ={"REPLICA_EXEMPT": "/a,/b"}).settings.exempt == ("/a", "/b")


def test_a_bad_item_of_a_list_is_told() -> None:
    assert refusal({"REPLICA_EXEMPT": "/a,b"}) == (
        "environment: REPLICA_EXEMPT: must be a list of paths that start with "
        '"/" and have no "?" or "#" (got "b")'
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("REPLICA_QUEUE_TIMOUT", "REPLICA_QUEUE_TIMEOUT"),
        ("REPLICA_queue_timeout", "REPLICA_QUEUE_TIMEOUT"),
        ("REPLICA_THREAD_PER_PROCESS", "REPLICA_THREADS_PER_PROCESS"),
        ("REPLICA_CONFIGS", "REPLICA_CONFIG"),
    ],
)
def test_a_likely_typo_is_a_problem(name: str, meant: str) -> None:
    expected = f"environment: {name}: unknown variable; did you mean {meant}?"
    assert refusal({name: "1"}) == expected


@pytest.mark.parametrize("name", ["REPLICA_ID", "REPLICA_MODEL", "REPLICA_SET_NAME", "REPLICA_"])
def test_another_name_may_be_somebody_elses_and_is_noted(name: str) -> None:
    expected = (f"environment: {name}: no key of replica-plugin, ignored",)
    assert load(environ={name: "1"}).notes == expected


def test_problems_of_file_and_environment_are_told_together() -> None:
    Path("replica.yaml").write_text("mode: x\n")
    assert refusal({"REPLICA_PROBES": "on", "REPLICA_CONFIGS": "y"}) == (
        'replica.yaml:1: mode: must be thread or gevent (got "x")\n'
        "environment: REPLICA_CONFIGS: unknown variable; did you mean REPLICA_CONFIG?\n"
        'environment: REPLICA_PROBES: must be true, false, or a path that starts and ends with "/" '
        "(got on); write true"
    )


def test_problems_of_an_unreadable_file_and_of_the_environment_are_told_together() -> None:
    Path("replica.yaml").mkdir()
    assert refusal({"REPLICA_MODE": "x"}) == (
        "replica.yaml: must be a regular file\n"
        'environment: REPLICA_MODE: must be thread or gevent (got "x")'
    )


def test_the_rule_across_keys_holds_for_both_together() -> None:
    Path("replica.yaml").write_text("threads_per_process: 8\n")
    assert refusal({"REPLICA_MAX_REPLICA_CONCURRENCY": "7"}) == (
        "environment: REPLICA_MAX_REPLICA_CONCURRENCY: processes_per_replica * threads_per_process "
        "must be less than or equal to max_replica_concurrency, 7 (got 8), or some slots would "
        "never be used; raise max_replica_concurrency to 8, lower one of the others, or, if it is "
        "meant, set target_replica_concurrency to 7 or less"
    )


def test_the_environment_can_repair_what_is_too_much_for_the_file() -> None:
    Path("replica.yaml").write_text("threads_per_process: 2000\n")
    loaded = load(environ={"REPLICA_MAX_REPLICA_CONCURRENCY": "3000"})
    assert loaded.settings.waiting_room == 1000
