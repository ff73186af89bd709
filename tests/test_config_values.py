"""Values in the flat layout: what each kind takes, and what it says about the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica_plugin.config.load import load
from replica_plugin.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(key: str, value: str) -> object:
    Path("replica.yaml").write_text(f"{key}: {value}\n")
    return getattr(load(environ={}).settings, key)


def refusal(key: str, value: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(key, value)
    where = f"replica.yaml:1: {key}: "
    assert str(caught.value).startswith(where)
    return str(caught.value).removeprefix(where)


@pytest.mark.parametrize(("value", "number"), [("1", 1), ("+3", 3), ("2147483647", 2147483647)])
def test_an_integer_is_read(value: str, number: int) -> None:
    Path("replica.yaml").write_text(
        f"threads_per_process: {value}\ntarget_replica_concurrency: 1\n"
    )
    assert load(environ={}).settings.threads_per_process == number


@pytest.mark.parametrize(
    ("value", "ending"),
    [
        ("two", '(got "two")'),
        ('"2"', '(got "2"); remove the quotes'),
        ("2.0", "(got 2.0)"),
        ("1e3", '(got "1e3")'),
        ("true", "(got true)"),
        ("yes", "(got yes)"),
        ("010", "(got 010); write it in plain decimal digits"),
        ("1_000", "(got 1_000); write it in plain decimal digits"),
        ("0x10", "(got 0x10); write it in plain decimal digits"),
        ("0b11", "(got 0b11); write it in plain decimal digits"),
        ("1:30", "(got 1:30); write it in plain decimal digits"),
        ("", "(got nothing)"),
        ("null", "(got null)"),
        ("~", "(got ~)"),
        ("[1]", "(got a list)"),
        ("{a: 1}", "(got a mapping)"),
        ("x" * 61, f'(got "{"x" * 57}...")'),
        ('"a\\e[31m"', '(got "a\\x1b[31m")'),
    ],
)
def test_what_is_no_integer_is_refused(value: str, ending: str) -> None:
    assert refusal("threads_per_process", value) == f"must be an integer >= 1 {ending}"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("threads_per_process", "0", "must be greater than or equal to 1 (got 0)"),
        ("threads_per_process", "-1", "must be greater than or equal to 1 (got -1)"),
        (
            "threads_per_process",
            "2147483648",
            "must be less than or equal to 2147483647 (got 2147483648)",
        ),
        ("processes_per_replica", "101", "must be less than or equal to 100 (got 101)"),
        ("max_replica_concurrency", "30001", "must be less than or equal to 30000 (got 30001)"),
        ("target_replica_concurrency", "0", "must be greater than 0 (got 0)"),
        ("queue_timeout", "0", "must be greater than 0s (got 0)"),
        ("queue_timeout", "-5s", 'must be greater than 0s (got "-5s")'),
        (
            "queue_timeout",
            "2562048h",
            'must be less than or equal to 9223369200s (got "2562048h")',
        ),
    ],
)
def test_a_number_beyond_a_bound_is_told_the_bound(key: str, value: str, message: str) -> None:
    assert refusal(key, value) == message


def test_an_integer_too_long_to_convert_is_refused() -> None:
    message = f"must be less than or equal to 2147483647 (got {'1' * 57}...)"
    assert refusal("threads_per_process", "1" * 5000) == message
    message = f"must be greater than or equal to 1 (got -{'1' * 56}...)"
    assert refusal("threads_per_process", "-" + "1" * 5000) == message


@pytest.mark.parametrize(("value", "number"), [("2", 2.0), ("0.5", 0.5), ("1.5e+2", 150.0)])
def test_a_number_is_read(value: str, number: float) -> None:
    assert read("target_replica_concurrency", value) == number


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (".nan", ".nan"),
        (".inf", ".inf"),
        ("1.0e+999", "1.0e+999"),
        ('"2"', '"2"'),
        ("1:30.5", "1:30.5"),
        ("1_0.5", "1_0.5"),
        ("false", "false"),
    ],
)
def test_what_is_no_finite_number_is_refused(value: str, seen: str) -> None:
    assert refusal("target_replica_concurrency", value) == f"must be a number > 0 (got {seen})"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("500ms", 0.5),
        ("10s", 10.0),
        ("1m30s", 90.0),
        ("2h", 7200.0),
        ("1.5s", 1.5),
        (".5s", 0.5),
        ("1h0.5m", 3630.0),
        ("20us", 2e-05),
        ("10", 10.0),
        ("0.25", 0.25),
        ('"10s"', 10.0),
    ],
)
def test_a_duration_is_read_as_seconds(value: str, seconds: float) -> None:
    assert read("queue_timeout", value) == seconds


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("soon", '"soon"'),
        ("1d", '"1d"'),
        ("1 s", '"1 s"'),
        ("10S", '"10S"'),
        ('"10"', '"10"'),
        ("010", "010"),
        ("1:30", "1:30"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("1" * 100 + "s", f'"{"1" * 57}..."'),
    ],
)
def test_what_is_no_duration_is_refused(value: str, seen: str) -> None:
    message = f"must be a duration > 0s, such as 10s or 1m30s (got {seen})"
    assert refusal("queue_timeout", value) == message


@pytest.mark.parametrize(
    ("value", "size"), [("0", 0), ("1024", 1024), ("512Ki", 524288), ("1Mi", 2**20), ("1Gi", 2**30)]
)
def test_a_size_is_read_as_bytes(value: str, size: int) -> None:
    assert read("request_buffer", value) == size


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("1M", '"1M"'),
        ("1MB", '"1MB"'),
        ("1.5Mi", '"1.5Mi"'),
        ("-1", "-1"),
        ("010", "010"),
        ("1_024", "1_024"),
        ('"1024"', '"1024"'),
    ],
)
def test_what_is_no_size_is_refused(value: str, seen: str) -> None:
    rule = "a size >= 0: a number of bytes, or such as 512Ki, 1Mi or 1Gi"
    assert refusal("request_buffer", value) == f"must be {rule} (got {seen})"


@pytest.mark.parametrize(
    ("value", "prefix"),
    [("true", "/-/"), ("True", "/-/"), ("false", None), ("/x/", "/x/"), ("/", "/")],
)
def test_probes_are_read_as_a_prefix(value: str, prefix: str | None) -> None:
    assert read("probes", value) == prefix


@pytest.mark.parametrize(
    ("value", "ending"),
    [
        ("yes", "(got yes); write true"),
        ("on", "(got on); write true"),
        ("off", "(got off); write false"),
        ('"true"', '(got "true")'),
        ("/x", '(got "/x")'),
        ("x/", '(got "x/")'),
        ('"/a b/"', '(got "/a b/")'),
        ('"/a?/"', '(got "/a?/")'),
    ],
)
def test_what_is_no_prefix_is_refused(value: str, ending: str) -> None:
    rule = 'true, false, or a path that starts and ends with "/"'
    assert refusal("probes", value) == f"must be {rule} {ending}"


def test_a_status_is_one_of_two_integers() -> None:
    assert read("overload_status", "429") == 429


@pytest.mark.parametrize(
    ("value", "seen"), [("500", "500"), ('"429"', '"429"'), ("0x1ad", "0x1ad")]
)
def test_another_status_is_refused(value: str, seen: str) -> None:
    assert refusal("overload_status", value) == f"must be 503 or 429 (got {seen})"


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("admin_bind", "127.0.0.1:9100", '"127.0.0.1:9100"'),
        ("admin_bind", "unix:/run/admin.sock", '"unix:/run/admin.sock"'),
    ],
)
def test_a_key_that_does_nothing_yet_takes_no_value(key: str, value: str, seen: str) -> None:
    assert refusal(key, value) == f"is not supported yet (got {seen}); remove it"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("request_timeout", "0", "must be greater than 0s (got 0)"),
        ("preload", "no", "must be true or false (got no); write false"),
        ("preload", "1", "must be true or false (got 1); write true"),
        ("admin_bind", "9100", "must be host:port or unix:path (got 9100); put it in quotes"),
        ("ready_file", '""', 'must be a path (got "")'),
        ("ready_file", "1", "must be a path (got 1); put it in quotes"),
        ("ready_file", "none", 'must be a path (got "none"); leave the key out for none'),
        ("ready_file", "null", "must be a path (got null); leave the key out for none"),
        (
            "exempt",
            "[/a, b]",
            'must be a list of paths that start with "/" and have no "?" or "#" (got "b")',
        ),
        (
            "exempt",
            "/a",
            'must be a list of paths that start with "/" and have no "?" or "#" (got "/a")',
        ),
    ],
)
def test_a_key_that_does_nothing_yet_has_its_rule(key: str, value: str, message: str) -> None:
    assert refusal(key, value) == message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("exempt", f"[{', '.join(['/1234567'] * 2000)}{{}}]"),
        ("probes", f"/{'x' * 15_998}{{}}/"),
        ("ready_file", f"{'x' * 16_000}{{}}"),
    ],
)
def test_what_the_master_passes_on_has_a_limit(key: str, value: str) -> None:
    read(key, value.format(""))
    longer = value.format(", /" if key == "exempt" else "x")
    assert refusal(key, longer) == "must have at most 16000 characters in all (got 16001)"


def test_an_unknown_mode_is_refused() -> None:
    assert refusal("mode", "process") == 'must be thread or gevent (got "process")'
