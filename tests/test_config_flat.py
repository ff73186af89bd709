"""The flat layout: which keys there are, and the rule across them."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica_plugin.config.load import load
from replica_plugin.config.settings import Settings
from replica_plugin.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def settings(content: str) -> Settings:
    Path("replica.yaml").write_text(content)
    return load(environ={}).settings


def refusal(content: str) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(content)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "ending"),
    [
        ("processes_per_replicas", "; did you mean processes_per_replica?"),
        ("thread", "; did you mean threads_per_process?"),
        ("process", "; did you mean processes_per_replica?"),
        ("processes", "; did you mean processes_per_replica?"),
        ("Mode", "; did you mean mode?"),
        ("qux", "; remove it"),
        ("x" * 200, "; remove it"),
    ],
)
def test_an_unknown_key_is_told_its_nearest(key: str, ending: str) -> None:
    shown = key if len(key) <= 60 else key[:57] + "..."
    assert refusal(f"{key}: 1\n") == f"replica.yaml:1: {shown}: unknown key{ending}"


def test_all_problems_are_told_at_once() -> None:
    assert refusal("processes_per_replicas: 2\nthreads_per_process: two\nprobes: 1\n") == (
        "replica.yaml:1: processes_per_replicas: unknown key; "
        "did you mean processes_per_replica?\n"
        'replica.yaml:2: threads_per_process: must be an integer >= 1 (got "two")\n'
        "replica.yaml:3: probes: must be true, false, or a path that starts and ends "
        'with "/" (got 1)'
    )


def test_a_target_above_the_bound_is_refused() -> None:
    assert refusal("target_replica_concurrency: 3.5\nmax_replica_concurrency: 3\n") == (
        "replica.yaml:1: target_replica_concurrency: must be less than or equal to "
        "max_replica_concurrency, 3 (got 3.5); lower it or raise max_replica_concurrency"
    )


@pytest.mark.parametrize(
    ("content", "blamed", "bound", "slots"),
    [
        ("threads_per_process: 4\nmax_replica_concurrency: 3\n", "2: max_replica", 3, 4),
        ("processes_per_replica: 2\nthreads_per_process: 513\n", "2: threads_per_process", 0, 1026),
        ("threads_per_process: 1025\n", "1: threads_per_process", 0, 1025),
    ],
)
def test_more_slots_than_the_bound_are_refused(
    content: str, blamed: str, bound: int, slots: int
) -> None:
    key = "max_replica_concurrency"
    blamed = blamed.replace("max_replica", key)
    assert refusal(content) == (
        f"replica.yaml:{blamed}: processes_per_replica * threads_per_process must be less than "
        f"or equal to {key}, {bound or 1024} (got {slots}), or some slots would never be used; "
        f"raise {key} to {slots}, lower one of the others, or, if it is meant, set "
        f"target_replica_concurrency to {bound or 1024} or less"
    )


def test_more_slots_than_the_bound_are_legal_with_a_lower_target() -> None:
    content = "threads_per_process: 4\nmax_replica_concurrency: 3\ntarget_replica_concurrency: 2\n"
    assert settings(content).waiting_room == 0


def test_the_rule_across_keys_rests_while_one_of_them_is_bad() -> None:
    expected = "replica.yaml:2: max_replica_concurrency: must be greater than or equal to 1 (got 0)"
    assert refusal("threads_per_process: 2000\nmax_replica_concurrency: 0\n") == expected


def test_the_rule_across_keys_is_told_beside_a_bad_number_of_slots_that_cannot_mend_it() -> None:
    content = "processes_per_replica: 0\nthreads_per_process: 4\nmax_replica_concurrency: 3\n"
    first, second = refusal(content).splitlines()
    assert first.startswith("replica.yaml:1: processes_per_replica: must be greater than")
    assert second.startswith("replica.yaml:3: max_replica_concurrency: processes_per_replica * ")
    assert "3 (got at least 4), or some slots" in second


@pytest.mark.parametrize("content", ["- processes_per_replica: 2\n", "- iris\n", "[]\n"])
def test_a_list_that_is_none_of_cortex_apis_is_told_as_a_list(content: str) -> None:
    assert refusal(content) == (
        "replica.yaml: must be a mapping of keys (got a list, but not of Cortex APIs, which have "
        "name, kind and predictor)"
    )


def test_a_key_that_appears_twice_in_a_list_is_told_with_its_place() -> None:
    first, _ = refusal("- {mode: thread, mode: thread}\n").splitlines()
    assert first == "replica.yaml:1: [0].mode: appears twice, first on line 1; keep one"


def test_the_rule_across_keys_is_told_beside_other_problems() -> None:
    assert refusal("target_replica_concurrency: 2000\nmode: x\n") == (
        'replica.yaml:2: mode: must be thread or gevent (got "x")\n'
        "replica.yaml:1: target_replica_concurrency: must be less than or equal to "
        "max_replica_concurrency, 1024 (got 2000); lower it or raise max_replica_concurrency"
    )


def test_a_flat_key_in_a_cortex_file_is_refused() -> None:
    assert refusal("name: a\nthreads_per_process: 2\n") == (
        "replica.yaml:2: threads_per_process: is no key of a Cortex API file, "
        "which name on line 1 makes this; keep one layout"
    )


def test_slots_and_target_follow_from_processes_and_threads() -> None:
    read = settings("processes_per_replica: 2\nthreads_per_process: 3\n")
    assert (read.slots, read.effective_target, read.waiting_room) == (6, 6.0, 1018)
