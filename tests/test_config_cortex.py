"""Cortex API files: which are read, and Cortex 0.32's rules on each key."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from replica_plugin.config.load import Loaded, load
from replica_plugin.config.settings import Settings
from replica_plugin.errors import ConfigError

WHOLE = """\
- name: iris
  kind: RealtimeAPI
  predictor:
    type: tensorflow
    path: predictor.py
    protobuf_path: null
    python_path: lib
    image: ""
    tensorflow_serving_image: server:1
    processes_per_replica: 2
    threads_per_process: 4
    shm_size: 64Mi
    log_level: debug
    config: {any: [thing, 1, null]}
    env: {NAME: value}
    dependencies: {pip: requirements.txt, conda: conda.txt, shell: run.sh}
    models: {paths: [{name: a, path: b}], signature_key: c}
    server_side_batching: {max_batch_size: 8, batch_interval: 0.1s}
  networking: {endpoint: /iris}
  compute: {cpu: 1.5, mem: 2G, gpu: 1, inf: 0}
  autoscaling:
    min_replicas: 2
    max_replicas: 8
    init_replicas: 3
    max_replica_concurrency: 256
    target_replica_concurrency: 6.5
    window: 1m30s
    downscale_stabilization_period: 0s
    upscale_stabilization_period: 90s
    max_downscale_factor: 0
    max_upscale_factor: 2.5
    downscale_tolerance: 0.1
    upscale_tolerance: 3
  update_strategy: {max_surge: 25%, max_unavailable: 1}
"""

TWO = """\
- name: iris
  kind: RealtimeAPI
  predictor: {threads_per_process: 2}
- name: digits
  kind: RealtimeAPI
  predictor: {threads_per_process: 3}
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(content: str, api: str = "") -> Loaded:
    Path("cortex.yaml").write_text(content)
    return load(environ={"REPLICA_API": api})


def refusal(content: str, api: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        read(content, api)
    return str(caught.value)


def api(*lines: str, kind: str = "RealtimeAPI") -> str:
    """One API called iris, whose own lines begin on line 3."""
    return f"- name: iris\n  kind: {kind}\n" + textwrap.indent("\n".join(lines) + "\n", "  ")


def test_every_key_of_cortex_is_taken() -> None:
    assert read(WHOLE).settings == Settings(
        processes_per_replica=2,
        threads_per_process=4,
        max_replica_concurrency=256,
        target_replica_concurrency=6.5,
    )


def test_values_know_their_lines() -> None:
    told = {key: it for key, it in read(WHOLE).sources.items() if it != "default"}
    assert told == {
        "processes_per_replica": "cortex.yaml:10",
        "threads_per_process": "cortex.yaml:11",
        "max_replica_concurrency": "cortex.yaml:25",
        "target_replica_concurrency": "cortex.yaml:26",
    }


def test_batching_is_noted_as_without_effect() -> None:
    place = "cortex.yaml:18: apis[0] (iris).predictor.server_side_batching"
    assert read(WHOLE).notes == (f"{place}: has no effect, requests are not batched",)


def test_one_api_may_stand_alone() -> None:
    content = "name: a\nkind: RealtimeAPI\npredictor: {threads_per_process: 2}\n"
    assert read(content).settings == Settings(threads_per_process=2)


def test_one_api_that_stands_alone_has_plain_key_paths() -> None:
    content = "name: a\nkind: RealtimeAPI\npredictor: {threads_per_process: two}\n"
    expected = 'cortex.yaml:3: predictor.threads_per_process: must be an integer >= 1 (got "two")'
    assert refusal(content) == expected


def test_the_variable_chooses_among_several_apis() -> None:
    assert read(TWO, "digits").settings.threads_per_process == 3


def test_several_apis_need_a_choice() -> None:
    expected = "cortex.yaml: must have one RealtimeAPI (got iris, digits); name one in REPLICA_API"
    assert refusal(TWO) == expected


def test_the_choice_must_name_one_of_them() -> None:
    assert refusal(TWO, "rose") == (
        "environment: REPLICA_API: must name a RealtimeAPI of cortex.yaml: iris, digits "
        '(got "rose")'
    )


def test_the_only_realtime_api_is_served_beside_other_kinds() -> None:
    content = api("predictor: {threads_per_process: 2}") + (
        "- {name: b, kind: BatchAPI, predictor: {path: a.py}}\n"
        "- {name: t, kind: TaskAPI, definition: {path: a.py}}\n"
        "- {name: s, kind: TrafficSplitter, apis: [{name: iris, weight: 100}]}\n"
    )
    assert read(content).settings.threads_per_process == 2


def test_a_file_without_a_realtime_api_is_refused() -> None:
    content = (
        "- {name: s, kind: TrafficSplitter, apis: []}\n- {name: b, kind: BatchAPI, predictor: {}}\n"
    )
    assert refusal(content) == (
        "cortex.yaml: must have a RealtimeAPI to serve (got TrafficSplitter s, BatchAPI b)"
    )


def test_all_apis_of_the_file_are_checked() -> None:
    content = TWO + "- {name: c, kind: BatchAPI, predictor: {threads_per_process: 2}}\n"
    assert refusal(content.replace("threads_per_process: 3", "config: 1, what: 1"), "iris") == (
        'cortex.yaml:6: apis[1] (digits).predictor.what: key "what" is not supported; remove it\n'
        "cortex.yaml:7: apis[2] (c).predictor.threads_per_process: must be 1 for kind BatchAPI "
        "(got 2)"
    )


def test_the_rule_across_keys_holds_for_apis_that_are_not_served() -> None:
    content = TWO.replace("threads_per_process: 3", "threads_per_process: 3000")
    assert refusal(content, "iris") == (
        "cortex.yaml:6: apis[1] (digits).predictor.threads_per_process: processes_per_replica * "
        "threads_per_process must be less than or equal to max_replica_concurrency, 1024 "
        "(got 3000), or some slots would never be used; raise max_replica_concurrency to 3000, "
        "lower one of the others, or, if it is meant, set target_replica_concurrency to 1024 or "
        "less"
    )


def test_a_name_that_appears_twice_is_refused() -> None:
    expected = 'cortex.yaml:4: apis[1] (iris): name must be unique in the file (got "iris")'
    assert refusal(TWO.replace("digits", "iris"), "iris") == expected


def test_what_an_api_needs_must_be_there() -> None:
    assert refusal("- kind: RealtimeAPI\n") == (
        "cortex.yaml:1: apis[0].name: must be defined\n"
        "cortex.yaml:1: apis[0].predictor: must be defined"
    )


@pytest.mark.parametrize(("kind", "seen"), [("", "nothing"), ("kind: SyncAPI", '"SyncAPI"')])
def test_an_api_of_no_known_kind_is_refused(kind: str, seen: str) -> None:
    assert refusal(f"- name: a\n  {kind}\n") == (
        f"cortex.yaml:{2 if kind else 1}: apis[0] (a).kind: must be RealtimeAPI, AsyncAPI, "
        f"BatchAPI, TaskAPI or TrafficSplitter (got {seen})"
    )


def test_an_api_that_is_no_mapping_is_refused() -> None:
    content = "- iris\n- {name: a, kind: TaskAPI, definition: {}}\n"
    first = refusal(content).splitlines()[0]
    assert first == 'cortex.yaml:1: apis[0]: must be a mapping of keys (got "iris")'


def test_a_file_of_a_later_cortex_is_refused_by_its_keys() -> None:
    assert refusal(api("handler: {path: a.py}")) == (
        'cortex.yaml:3: apis[0] (iris).handler: key "handler" is not supported; remove it\n'
        "cortex.yaml:1: apis[0] (iris).predictor: must be defined"
    )


@pytest.mark.parametrize(
    ("kind", "key"),
    [("BatchAPI", "autoscaling"), ("TaskAPI", "predictor"), ("TrafficSplitter", "compute")],
)
def test_a_kind_has_only_its_own_keys(kind: str, key: str) -> None:
    first = refusal(api(f"{key}: {{}}", kind=kind)).splitlines()[0]
    assert first == f'cortex.yaml:3: apis[0] (iris).{key}: key "{key}" is not supported; remove it'
