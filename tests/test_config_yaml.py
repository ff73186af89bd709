"""Files that cannot be read, and YAML that settings have no use for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from replica_plugin.config import yaml_file
from replica_plugin.config.load import load
from replica_plugin.config.settings import Settings
from replica_plugin.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(content: bytes | str | None = None, path: str = "replica.yaml") -> str:
    if content is not None:
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load(path, environ={})
    return str(caught.value)


def test_a_missing_file_is_told() -> None:
    assert refusal() == "replica.yaml: cannot be read: No such file or directory"


def test_a_directory_is_told() -> None:
    Path("replica.yaml").mkdir()
    assert refusal() == "replica.yaml: must be a regular file"


def test_a_pipe_without_a_writer_does_not_hang() -> None:
    os.mkfifo("replica.yaml")
    assert refusal() == "replica.yaml: must be a regular file"


def test_an_unreadable_file_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    Path("replica.yaml").touch()
    monkeypatch.setattr("builtins.open", refuse)
    assert refusal() == "replica.yaml: cannot be read: Permission denied"


def test_an_impossible_path_is_told() -> None:
    assert refusal(path="a\0b") == "a\\x00b: cannot be read: embedded null byte"


def test_a_huge_file_is_refused_before_it_is_read() -> None:
    with open("replica.yaml", "wb") as file:
        file.truncate(50 * 2**20)
    begun = time.monotonic()
    assert refusal() == "replica.yaml: must not be larger than 256 KiB; is it the right file?"
    assert time.monotonic() - begun < 0.5


def test_what_is_not_utf_8_is_told_with_line_and_byte() -> None:
    expected = "replica.yaml:2: must be UTF-8 (byte 13 is not)"
    assert refusal(b"# caf\xc3\xa9\n# caf\xe9\n") == expected


@pytest.mark.parametrize(("content", "code"), [(b"\n\0", "U+0000"), (b"\n# \x1b[1m", "U+001B")])
def test_a_control_character_is_told(content: bytes, code: str) -> None:
    assert refusal(content) == f"replica.yaml:2: must not have control characters (got {code})"


@pytest.mark.parametrize("content", ["mode: thread\n\tprobes: true\n", "a:\n\t- b\n"])
def test_a_tab_that_indents_is_told(content: str) -> None:
    assert refusal(content) == "replica.yaml:2: a tab cannot indent or begin a value; use spaces"


@pytest.mark.parametrize(
    ("content", "ending"),
    [
        ("a: b: c", "1: not valid YAML at column 5: mapping values are not allowed here"),
        (
            "a: [\n",
            "2: not valid YAML at column 1: expected the node content, but found '<stream end>'",
        ),
        (
            "a: @b",
            "1: not valid YAML at column 4: found character '@' that cannot start any token",
        ),
        ('\na: "\\UFFFFFFFF"', "2: an escape sequence is no character"),
    ],
)
def test_a_syntax_error_is_told_with_its_place(content: str, ending: str) -> None:
    assert refusal(content) == f"replica.yaml:{ending}"


def test_a_key_that_appears_twice_is_told_with_both_lines() -> None:
    expected = "replica.yaml:3: mode: appears twice, first on line 1; keep one"
    assert refusal("mode: thread\nprobes: true\nmode: thread\n") == expected


def test_a_nested_key_that_appears_twice_is_told_with_its_path() -> None:
    content = "- name: a\n  kind: RealtimeAPI\n  predictor:\n    config: {b: 1, b: 2}\n"
    place = "replica.yaml:4: apis[0] (a).predictor.config.b"
    assert refusal(content) == f"{place}: appears twice, first on line 4; keep one"


def test_several_documents_are_refused() -> None:
    expected = "replica.yaml:3: must be one document; remove this --- and what follows"
    assert refusal("---\nmode: thread\n---\nmode: thread\n") == expected


@pytest.mark.parametrize(
    "content", ["a: &x 1\nb: *x\n", "- name: &x a\n  kind: *x\n", "a: [&x b]\nc: [*x, *x]\n"]
)
def test_an_alias_is_refused_in_both_layouts(content: str) -> None:
    expected = "replica.yaml:2: aliases are not supported (got *x); write the value out"
    assert refusal(content) == expected


def test_a_merge_key_is_refused() -> None:
    expected = "replica.yaml:1: merge keys are not supported (got <<); write the keys out"
    assert refusal("<<: {mode: thread}\n") == expected


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!int", "!mine"])
def test_a_tag_is_refused(tag: str) -> None:
    expected = f"replica.yaml:1: tags are not supported (got {tag}); remove it"
    assert refusal(f'mode: {tag} "1"\n') == expected


@pytest.mark.parametrize(("key", "seen"), [("1", "1"), ("on", "on"), ("? [a]\n", "a list")])
def test_a_key_that_is_no_text_is_refused(key: str, seen: str) -> None:
    expected = f"replica.yaml:1: a key must be text (got {seen}); put it in quotes"
    assert refusal(f"{key}: 1\n") == expected


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused(opening: str) -> None:
    expected = "replica.yaml:1: must not nest deeper than 50 levels"
    assert refusal(opening * 10000) == expected


@pytest.mark.parametrize(("content", "seen"), [("hello", '"hello"'), ("3", "3"), ("~", "~")])
def test_a_file_without_keys_is_refused(content: str, seen: str) -> None:
    assert refusal(content) == f"replica.yaml: must be a mapping of keys (got {seen})"


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"---\n", b"\xef\xbb\xbf"])
def test_an_empty_file_means_the_defaults(content: bytes) -> None:
    Path("replica.yaml").write_bytes(content)
    assert load(environ={}).settings == Settings()


def test_a_byte_order_mark_and_windows_line_ends_are_fine() -> None:
    Path("replica.yaml").write_bytes(b"\xef\xbb\xbfthreads_per_process: 3\r\nmode: thread\r\n")
    assert load(environ={}).settings == Settings(threads_per_process=3)


def test_problems_of_keys_and_of_values_are_told_together() -> None:
    assert refusal("1: 2\nmode: x\n") == (
        "replica.yaml:1: a key must be text (got 1); put it in quotes\n"
        'replica.yaml:2: mode: must be thread or gevent (got "x")'
    )


def test_a_file_with_thousands_of_problems_lists_a_hundred() -> None:
    lines = refusal("".join(f"k{number}: 1\n" for number in range(1000))).splitlines()
    assert lines[100:] == ["and 900 more problems"]


def test_a_long_list_is_looked_at_once(monkeypatch):
    """Any file may be named by mistake, and the master reads it in a HUP."""
    looks = []
    monkeypatch.setattr(yaml_file, "is_cortex", lambda node: bool(looks.append(node)))
    refusal("- a\n" * 100)
    assert len(looks) == 1
