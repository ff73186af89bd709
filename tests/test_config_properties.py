"""What holds for any settings and any file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from replica_plugin.config.load import load
from replica_plugin.config.settings import KEYS, Settings, show, supported
from replica_plugin.errors import ConfigError

seconds = st.integers(1, 10**15).map(lambda nanoseconds: nanoseconds / 1e9)
prefixes = st.lists(st.text("abz09-_.~:@!$&'()*+,;=%{}[]", min_size=1)).map(
    lambda parts: "/" + "".join(f"{part}/" for part in parts)
)


@st.composite
def any_settings(draw: st.DrawFn) -> Settings:
    bound = draw(st.integers(1, 30000))
    return Settings(
        processes_per_replica=draw(st.integers(1, 100)),
        threads_per_process=draw(st.integers(1, 2**31 - 1)),
        max_replica_concurrency=bound,
        target_replica_concurrency=draw(st.floats(0, bound, exclude_min=True)),
        queue_timeout=draw(st.none() | seconds),
        request_timeout=draw(st.none() | seconds),
        overload_status=draw(st.sampled_from((503, 429))),
        overload_dry_run=draw(st.booleans()),
        request_buffer=draw(
            st.integers(0, 10**15 - 1) | st.integers(0, 999).map(lambda number: number * 2**20)
        ),
        header_timeout=draw(seconds),
        receive_timeout=draw(seconds),
        send_timeout=draw(seconds),
        probes=draw(st.none() | prefixes),
        ready_file=draw(st.none() | st.from_regex(r"/[a-z]+(/[a-z]+)?", fullmatch=True)),
        drain_delay=draw(st.just(0.0) | seconds),
        stagger_init=draw(st.booleans()),
        preload=draw(st.booleans()),
    )


def written(settings: Settings) -> dict[str, str]:
    """The settings key by key, without those that cannot be written, as they mean none."""
    values = {key.name: getattr(settings, key.name) for key in supported()}
    for key in ("queue_timeout", "ready_file", "request_timeout", "exempt"):
        if values[key] in (None, ()):
            del values[key]
    return {key: show(key, value) for key, value in values.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties") / "replica.yaml"


@limits(max_examples=60, deadline=None)
@given(settings=any_settings())
def test_settings_written_to_a_file_load_back_equal(file: Path, settings: Settings) -> None:
    file.write_text("".join(f"{key}: {text}\n" for key, text in written(settings).items()))
    assert load(str(file), environ={}).settings == settings


@limits(max_examples=60, deadline=None)
@given(settings=any_settings())
def test_settings_written_to_variables_load_back_equal(file: Path, settings: Settings) -> None:
    file.write_text("")
    environ = {f"REPLICA_{key.upper()}": text for key, text in written(settings).items()}
    assert load(str(file), environ=environ).settings == settings


def only_config_errors(file: Path, content: bytes, environ: dict[str, str]) -> None:
    """Settings, or problems on one line each, that say where they stand."""
    file.write_bytes(content)
    try:
        load(str(file), environ=environ)
    except ConfigError as error:
        str(error).encode()
        for problem in error.problems:
            assert problem.place.where.startswith((str(file), "environment")), problem
            assert len(str(problem).splitlines()) == 1, problem


@limits(max_examples=60, deadline=None)
@given(content=st.binary())
def test_random_bytes_raise_nothing_but_a_config_error(file: Path, content: bytes) -> None:
    only_config_errors(file, content, {})


yaml_like = st.lists(
    st.sampled_from(
        (
            *"[]{}:,-?!&*|>%@`\"'#\n\t ~<=./\\\r\ufeff\x85\u2028",
            ": ", "- ", "\n  ", "\n---\n", "...", "<<", "&a ", "*a", "!!int ", "%YAML 1.1\n",
            "name", "kind", "RealtimeAPI", "predictor", "autoscaling", "threads_per_process",
            "queue_timeout", "exempt", "mode", "1", "0x1", "1e9", ".inf", "5s", "null", "on",
            "\\U99999999", "\\ud800", "\\x00",
        )
    )
).map("".join)  # fmt: skip


@limits(max_examples=60, deadline=None)
@given(content=st.text() | yaml_like)
def test_random_text_raises_nothing_but_a_config_error(file: Path, content: str) -> None:
    only_config_errors(file, content.encode("utf-8", "surrogatepass"), {})


nodes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
CORTEX_KEYS = ("name", "kind", "predictor", "autoscaling", "compute", "threads_per_process", "type")


@limits(max_examples=60, deadline=None)
@given(
    content=st.lists(
        st.dictionaries(
            st.sampled_from(CORTEX_KEYS),
            nodes | st.dictionaries(st.sampled_from(CORTEX_KEYS), nodes) | st.just("RealtimeAPI"),
        ),
        max_size=3,
    )
)
def test_random_apis_raise_nothing_but_a_config_error(file: Path, content: object) -> None:
    # JSON is YAML, but for numbers like NaN, which then are text.
    only_config_errors(file, json.dumps(content).encode(), {})


keys = st.sampled_from(sorted(KEYS)) | st.text("abcxyz_", min_size=4, max_size=20)


@limits(max_examples=60, deadline=None)
@given(content=st.dictionaries(keys, nodes))
@example(content={"admin_bind": {"\U00010000" * 90: None}, "____": None})
def test_random_values_raise_nothing_but_a_config_error_that_names_each_unknown_key(
    file: Path, content: dict[str, object]
) -> None:
    # Not JSON, whose keys of over 1024 characters, escapes counted, are no YAML: an error without a
    # key. safe_dump announces them with "? ".
    only_config_errors(file, yaml.safe_dump(content).encode(), {})
    named: set[str] = set()
    try:
        load(str(file), environ={})
    except ConfigError as error:
        named = {problem.place.key for problem in error.problems}
    assert content.keys() - KEYS <= named


@limits(max_examples=60, deadline=None)
@given(name=st.text(), value=st.text())
def test_random_variables_raise_nothing_but_a_config_error(
    file: Path, name: str, value: str
) -> None:
    environ = {f"REPLICA_{name}": value, "REPLICA_QUEUE_TIMEOUT": value, "REPLICA_API": value}
    environ |= {"REPLICA_THREADS_PER_PROCESS": value, "REPLICA_PROBES": value}
    only_config_errors(file, b"", environ)
