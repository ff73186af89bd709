"""Cortex API files: Cortex 0.32's rules on each key and across keys."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from replica_plugin.config.load import Loaded, load
from replica_plugin.config.settings import Settings
from replica_plugin.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(content: str) -> Loaded:
    Path("cortex.yaml").write_text(content)
    return load(environ={})


def refusal(content: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(content)
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
    return (
        message.removeprefix("cortex.yaml:")
        .replace(where, "")
        .removesuffix(f"\ncortex.yaml: must have a RealtimeAPI to serve (got {kind} iris)")
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


def test_a_target_above_the_bound_is_refused() -> None:
    expected = (
        "target_replica_concurrency: must be less than or equal to max_replica_concurrency, 4 "
        "(got 5); lower it or raise max_replica_concurrency"
    )
    lines = ("target_replica_concurrency: 5", "max_replica_concurrency: 4")
    assert section_refusal("autoscaling", *lines) == expected


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
        "cortex.yaml: must have a RealtimeAPI to serve (got TaskAPI iris)"
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
