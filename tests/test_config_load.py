"""Which file is read, and what is known about each value afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica_plugin.config.load import load
from replica_plugin.config.settings import KEYS, Settings
from replica_plugin.errors import ConfigError

CORTEX = "- name: a\n  kind: RealtimeAPI\n  predictor:\n    threads_per_process: 2\n"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_a_file_all_defaults_are_used() -> None:
    loaded = load(environ={})
    assert (loaded.settings, loaded.file, loaded.notes) == (Settings(), None, ())
    assert loaded.sources == dict.fromkeys(KEYS, "default")


def test_replica_yaml_comes_before_cortex_yaml() -> None:
    Path("replica.yaml").write_text("threads_per_process: 3\n")
    Path("cortex.yaml").write_text(CORTEX)
    loaded = load(environ={})
    assert (loaded.settings.threads_per_process, loaded.file) == (3, "replica.yaml")
    assert loaded.notes == ("cortex.yaml: not read, replica.yaml comes first",)


def test_cortex_yaml_is_read_when_it_is_alone() -> None:
    Path("cortex.yaml").write_text(CORTEX)
    loaded = load(environ={})
    assert (loaded.settings.threads_per_process, loaded.file) == (2, "cortex.yaml")


def test_the_variable_comes_before_the_usual_files() -> None:
    Path("replica.yaml").write_text("threads_per_process: 3\n")
    Path("other.yaml").write_text("threads_per_process: 4\n")
    loaded = load(environ={"REPLICA_CONFIG": "other.yaml"})
    assert (loaded.settings.threads_per_process, loaded.file) == (4, "other.yaml")


def test_the_argument_comes_before_the_variable() -> None:
    Path("given.yaml").write_text("threads_per_process: 5\n")
    loaded = load("given.yaml", environ={"REPLICA_CONFIG": "other.yaml"})
    assert (loaded.settings.threads_per_process, loaded.file) == (5, "given.yaml")


def test_the_variable_must_name_a_file_that_is_there() -> None:
    Path("replica.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        load(environ={"REPLICA_CONFIG": "missing.yaml"})
    assert str(caught.value) == (
        'environment: REPLICA_CONFIG: must name a file that is there (got "missing.yaml")'
    )


def test_a_usual_file_that_leads_nowhere_is_not_passed_over() -> None:
    Path("replica.yaml").symlink_to("gone.yaml")
    with pytest.raises(ConfigError) as caught:
        load(environ={})
    assert str(caught.value) == "replica.yaml: cannot be read: No such file or directory"


def test_the_layout_is_told_by_shape_and_not_by_name() -> None:
    Path("replica.yaml").write_text(CORTEX)
    assert load(environ={}).settings.threads_per_process == 2


def test_each_value_knows_its_line() -> None:
    Path("replica.yaml").write_text("# two\n\nthreads_per_process: 2\n")
    loaded = load(environ={"REPLICA_PROBES": "false"})
    told = {key: source for key, source in loaded.sources.items() if source != "default"}
    assert told == {"threads_per_process": "replica.yaml:3", "probes": "REPLICA_PROBES"}


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICA_THREADS_PER_PROCESS", "6")
    assert load().settings.threads_per_process == 6


@pytest.mark.parametrize("name", [None, "replica.yaml"])
def test_naming_an_api_without_a_cortex_file_is_noted(name: str | None) -> None:
    if name:
        Path(name).touch()
    note = "environment: REPLICA_API: has no effect without a Cortex API file"
    assert load(name, environ={"REPLICA_API": "a"}).notes == (note,)


def test_the_problems_can_be_taken_one_by_one() -> None:
    Path("replica.yaml").write_text("mode: x\nqux: 1\n")
    with pytest.raises(ConfigError) as caught:
        load(environ={})
    assert [problem.place.key for problem in caught.value.problems] == ["mode", "qux"]
