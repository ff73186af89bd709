"""Cortex API files: which are read, and Cortex 0.32's rules on each key."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from replica_plugin.errors import ConfigError
from replica_plugin.load import Loaded, load
from replica_plugin.settings import Settings

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


def predictor(*lines: str, kind: str = "RealtimeAPI") -> str:
    """One API whose predictor's keys begin on line 4."""
    return api("predictor:", *(f"  {line}" for line in lines), kind=kind)


def section_refusal(section: str, *lines: str) -> str:
    """What is said about keys of a section, the first of which is on line 5."""
    message = refusal(
        api("predictor: {path: a.py}", f"{section}:", *(f"  {line}" for line in lines))
    )
    where = f"cortex.yaml:5: apis[0] (iris).{section}."
    assert message.startswith(where)
    return message.removeprefix(where)


def predictor_refusal(*lines: str, kind: str = "RealtimeAPI") -> str:
    message = refusal(predictor(*lines, kind=kind))
    where = "apis[0] (iris).predictor."
    assert where in message
    return message.removeprefix("cortex.yaml:").replace(where, "").removesuffix(
        f"\ncortex.yaml: must have a RealtimeAPI to serve (iris is a {kind})"
    )


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
        "cortex.yaml: must have a RealtimeAPI to serve (s is a TrafficSplitter, b is a BatchAPI)"
    )


def test_an_empty_list_is_refused() -> None:
    expected = "cortex.yaml: must have a RealtimeAPI to serve (the list is empty)"
    assert refusal("[]\n") == expected


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
        "(got 3000); raise max_replica_concurrency or set a lower target_replica_concurrency"
    )


def test_a_target_above_the_bound_is_refused() -> None:
    expected = (
        "target_replica_concurrency: must be less than or equal to max_replica_concurrency, 4 "
        "(got 5); lower it or raise max_replica_concurrency"
    )
    lines = ("target_replica_concurrency: 5", "max_replica_concurrency: 4")
    assert section_refusal("autoscaling", *lines) == expected


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
    assert refusal(f"- name: a\n  predictor: {{}}\n  {kind}\n") == (
        "cortex.yaml:1: apis[0] (a).kind: must be RealtimeAPI, AsyncAPI, BatchAPI, TaskAPI or "
        f"TrafficSplitter (got {seen})"
    )


def test_an_api_that_is_no_mapping_is_refused() -> None:
    assert refusal("- iris\n") == 'cortex.yaml:1: apis[0]: must be a mapping of keys (got "iris")'


def test_a_file_of_a_later_cortex_is_refused_by_its_keys() -> None:
    assert refusal(api("handler: {path: a.py}")) == (
        'cortex.yaml:3: apis[0] (iris).handler: key "handler" is not supported; remove it\n'
        "cortex.yaml:1: apis[0] (iris).predictor: must be defined"
    )


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("thread_per_process: 2", "thread_per_process; did you mean threads_per_process?"),
        ("monitor: 2", "monitor; remove it"),
    ],
)
def test_an_unknown_key_is_told_its_nearest(key: str, text: str) -> None:
    name, _, step = text.partition("; ")
    assert predictor_refusal(key) == f'4: {name}: key "{name}" is not supported; {step}'


@pytest.mark.parametrize(
    ("kind", "key"),
    [("BatchAPI", "autoscaling"), ("TaskAPI", "predictor"), ("TrafficSplitter", "compute")],
)
def test_a_kind_has_only_its_own_keys(kind: str, key: str) -> None:
    first = refusal(api(f"{key}: {{}}", kind=kind)).splitlines()[0]
    assert first == f'cortex.yaml:3: apis[0] (iris).{key}: key "{key}" is not supported; remove it'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("processes_per_replica: 101", "must be less than or equal to 100 (got 101)"),
        ("processes_per_replica: 0", "must be greater than or equal to 1 (got 0)"),
        ("threads_per_process: 2.0", "must be an integer >= 1 (got 2.0)"),
        ("threads_per_process: null", "must be an integer >= 1 (got null)"),
        ("type: pytorch", 'must be python, tensorflow or onnx (got "pytorch")'),
        ("path: 3", "must be text (got 3); put it in quotes"),
        ("shm_size: 3", "must be a quantity, such as 200m, 2 or 512Mi (got 3)"),
        ("models: a", 'must be a mapping of keys (got "a")'),
        ("log_level: loud", 'must be debug, info, warning or error (got "loud")'),
    ],
)
def test_a_bad_value_of_the_predictor_is_told(line: str, message: str) -> None:
    assert predictor_refusal(line) == f"4: {line.partition(':')[0]}: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_replica_concurrency: 30001", "must be less than or equal to 30000 (got 30001)"),
        ("target_replica_concurrency: 0", "must be greater than 0 (got 0)"),
        ("min_replicas: 0", "must be greater than 0 (got 0)"),
        ("window: 5s", 'must be greater than or equal to 10s (got "5s")'),
        ("window: 15s", 'must be a multiple of 10s (got "15s")'),
        ("window: 60", "must be a duration >= 10s, such as 10s or 1m30s (got 60)"),
        ("upscale_stabilization_period: -1s", 'must be greater than or equal to 0s (got "-1s")'),
        ("max_downscale_factor: 1", "must be less than 1 (got 1)"),
        ("max_downscale_factor: x", 'must be a number >= 0 and < 1 (got "x")'),
        ("max_upscale_factor: 1.0", "must be greater than 1 (got 1.0)"),
        ("downscale_tolerance: 1", "must be less than 1 (got 1)"),
        ("upscale_tolerance: -0.1", "must be greater than or equal to 0 (got -0.1)"),
    ],
)
def test_a_bad_value_of_autoscaling_is_told(line: str, message: str) -> None:
    assert section_refusal("autoscaling", line) == f"{line.partition(':')[0]}: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cpu: 10m", 'must be greater than or equal to 0.02 (got "10m")'),
        ("cpu: lots", 'must be a quantity >= 0.02, such as 200m, 2 or 512Mi (got "lots")'),
        ("mem: 19Mi", 'must be greater than or equal to 20971520 (got "19Mi")'),
        ("gpu: 1.0", "must be an integer >= 0 (got 1.0)"),
        ("inf: -1", "must be greater than or equal to 0 (got -1)"),
    ],
)
def test_a_bad_value_of_compute_is_told(line: str, message: str) -> None:
    assert section_refusal("compute", line) == f"{line.partition(':')[0]}: {message}"


@pytest.mark.parametrize("line", ["cpu: null", "mem: ~", "cpu: 200m", "cpu: 2", "mem: 1e9"])
def test_a_good_value_of_compute_is_taken(line: str) -> None:
    quoted = line.replace("1e9", '"1e9"')
    assert read(api("predictor: {}", f"compute: {{{quoted}}}")).settings == Settings()


@pytest.mark.parametrize(
    "line", ["shm_size: null", "server_side_batching: null", "config: null", "protobuf_path: null"]
)
def test_null_is_taken_where_cortex_takes_it(line: str) -> None:
    assert read(predictor(line)).settings == Settings()


@pytest.mark.parametrize("section", ["predictor", "autoscaling", "compute", "networking"])
def test_null_is_refused_for_other_sections(section: str) -> None:
    other = "predictor: {}" if section != "predictor" else "compute: {}"
    expected = f"cortex.yaml:3: apis[0] (iris).{section}: must be a mapping of keys (got null)"
    assert refusal(api(f"{section}: null", other)) == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ("min_replicas: 3", "max_replicas: 2"),
            "min_replicas: must be less than or equal to max_replicas, 2 (got 3)",
        ),
        (
            ("min_replicas: 101",),
            "min_replicas: must be less than or equal to max_replicas, 100 (got 101)",
        ),
        (
            ("init_replicas: 1", "min_replicas: 2"),
            "init_replicas: must be from min_replicas, 2, to max_replicas, 100 (got 1)",
        ),
        (
            ("init_replicas: 9", "max_replicas: 8"),
            "init_replicas: must be from min_replicas, 1, to max_replicas, 8 (got 9)",
        ),
    ],
)
def test_replicas_out_of_order_are_refused(lines: tuple[str, ...], message: str) -> None:
    assert section_refusal("autoscaling", *lines) == message


def batching(size: int, interval: str = "1s") -> str:
    return f"server_side_batching: {{max_batch_size: {size}, batch_interval: {interval}}}"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            (batching(4), "type: python", "threads_per_process: 2"),
            "4: server_side_batching.max_batch_size: must equal threads_per_process, 2 (got 4)",
        ),
        (
            (batching(5), "type: tensorflow", "threads_per_process: 2", "processes_per_replica: 2"),
            "4: server_side_batching.max_batch_size: must be less than or equal to "
            "processes_per_replica * threads_per_process, 4 (got 5)",
        ),
        (
            (batching(2), "type: onnx", "threads_per_process: 2"),
            "4: server_side_batching: is not supported for predictor type onnx; remove it",
        ),
        (
            (batching(1),),
            "4: server_side_batching.max_batch_size: must be greater than or equal to 2 (got 1)",
        ),
        (
            (batching(2, "0s"),),
            '4: server_side_batching.batch_interval: must be greater than 0s (got "0s")',
        ),
        (
            ("server_side_batching: {max_batch_size: 2}",),
            "4: server_side_batching.batch_interval: must be defined",
        ),
    ],
)
def test_a_rule_of_batching_is_told(lines: tuple[str, ...], message: str) -> None:
    assert predictor_refusal(*lines) == message


@pytest.mark.parametrize("kind", ["BatchAPI", "AsyncAPI"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("processes_per_replica: 2", "4: processes_per_replica: must be 1 for kind {} (got 2)"),
        ("threads_per_process: 2", "4: threads_per_process: must be 1 for kind {} (got 2)"),
        (batching(2), "4: server_side_batching: is not supported for kind {}; remove it"),
    ],
)
def test_other_kinds_work_on_one_request_at_a_time(kind: str, line: str, message: str) -> None:
    assert predictor_refusal(line, kind=kind) == message.format(kind)


def test_a_task_has_no_processes_to_set() -> None:
    assert refusal(api("definition: {processes_per_replica: 2}", kind="TaskAPI")) == (
        "cortex.yaml:3: apis[0] (iris).definition.processes_per_replica: "
        'key "processes_per_replica" is not supported; remove it\n'
        "cortex.yaml: must have a RealtimeAPI to serve (iris is a TaskAPI)"
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("models", "tensorflow"), ("multi_model_reloading", "python")]
)
def test_a_model_cache_needs_one_process(name: str, kind: str) -> None:
    lines = (f"{name}: {{cache_size: 2, disk_cache_size: 3}}", f"type: {kind}")
    expected = f"4: {name}.cache_size: needs processes_per_replica 1 (got 2)"
    assert predictor_refusal(*lines, "processes_per_replica: 2") == expected


def test_shared_memory_must_fit_into_memory() -> None:
    content = api("predictor: {shm_size: 2G}", "compute: {mem: 1Gi}")
    assert refusal(content) == (
        "cortex.yaml:3: apis[0] (iris).predictor.shm_size: must be less than or equal to "
        "compute.mem, 1073741824 (got 2000000000)"
    )


@pytest.mark.parametrize(("shared", "memory"), [("1024Mi", "1Gi"), ("1G", "1Gi"), ("1", "20Mi")])
def test_shared_memory_that_fits_is_taken(shared: str, memory: str) -> None:
    content = api(f'predictor: {{shm_size: "{shared}"}}', f"compute: {{mem: {memory}}}")
    assert read(content).settings == Settings()
