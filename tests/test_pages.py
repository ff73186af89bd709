"""Memory that processes share: what a reader sees, at every moment of a write."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from replica_plugin.cells import Cells
from replica_plugin.pages import LoadPage, MasterPage, Numbers, ReplicaPage

HEADER = 16  # bytes of turn, length and checksum, which are written last


Page = TypeVar("Page", MasterPage, ReplicaPage, LoadPage, Cells)


@pytest.fixture
def new() -> Iterator[Callable[[Page], Page]]:
    """Pages whose descriptors are closed in the end."""
    descriptors = []

    def remember(page: Page) -> Page:
        descriptors.append(page.fd)
        return page

    yield remember
    for fd in descriptors:
        os.close(fd)


# What the master wants.


def test_a_page_that_was_never_written_says_nothing(new):
    assert new(MasterPage()).read() is None


def test_a_page_says_what_was_written_last_to_whoever_has_its_descriptor(new):
    page = new(MasterPage())
    page.write({"a": [1, 2.5, None, "ü"]})
    page.write({"b": {}})
    assert MasterPage(page.fd).read() == page.read() == {"b": {}}


@pytest.mark.parametrize("sizes", [(10, 10), (10, 30), (30, 10)])
def test_a_page_in_the_middle_of_a_write_says_the_old_or_the_new(new, sizes):
    first, old, young = (
        {"value": letter * size} for letter, size in zip("_ab", (20, *sizes), strict=True)
    )
    page = new(MasterPage())
    page.write(first)
    page.write(old)
    size = os.fstat(page.fd).st_size
    before = os.pread(page.fd, size, 0)
    page.write(young)
    after = os.pread(page.fd, size, 0)
    changed = [at for at in range(size) if before[at] != after[at]]
    header, text = ([at for at in changed if inside(at)] for inside in (is_header, is_text))
    os.pwrite(page.fd, before, 0)
    seen = [page.read()]
    for at in text + header:
        os.pwrite(page.fd, after[at : at + 1], at)
        seen.append(page.read())
    assert seen == [old] * len(changed) + [young]


def is_header(at: int) -> bool:
    return at % (1 << 20) < HEADER


def is_text(at: int) -> bool:
    return not is_header(at)


WRITER = """
import sys
from replica_plugin.pages import MasterPage
page = MasterPage(int(sys.argv[1]))
turn = 0
while True:
    turn += 1
    page.write({"turn": turn, "filler": [turn] * (turn % 1000)})
"""


def test_whatever_is_read_while_another_process_writes_was_written_as_a_whole(new):
    page = new(MasterPage())
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(page.fd)], pass_fds=[page.fd])
    last, reads = 0, 0
    try:
        while last < 5000:
            assert writer.poll() is None
            state = page.read()
            if state is not None:
                assert state["filler"] == [state["turn"]] * (state["turn"] % 1000)
                assert state["turn"] >= last
                last, reads = state["turn"], reads + 1
    finally:
        writer.kill()
        writer.wait()
    assert reads > 1


BEATING = """
import sys
from replica_plugin.pages import Numbers, ReplicaPage
page = ReplicaPage(int(sys.argv[1]))
while True:
    page.write(Numbers(7.0, *[7] * (len(Numbers._fields) - 1)))
    page.write_load(7, 7)
"""


def test_no_number_that_is_read_while_another_process_writes_is_zero(new):
    page = new(ReplicaPage())
    sevens = Numbers(7.0, *[7] * (len(Numbers._fields) - 1))
    page.write(sevens)
    writer = subprocess.Popen([sys.executable, "-c", BEATING, str(page.fd)], pass_fds=[page.fd])
    try:
        assert {page.read() for _ in range(200_000)} == {sevens}
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.wait()


def test_a_value_that_is_too_big_is_refused_and_the_old_one_stays(new):
    page = new(MasterPage())
    page.write({"a": 1})
    room = (1 << 20) - HEADER
    with pytest.raises(ValueError) as caught:
        page.write({"a": "x" * room})
    assert str(caught.value) == f"{room + 9} bytes do not fit where {room} do"
    assert page.read() == {"a": 1}
    longest = {"a": "x" * (room - 9)}
    page.write(longest)
    assert page.read() == longest
    with pytest.raises(ValueError):
        page.write({"a": "x" * (room - 8)})


# What a process that runs the app can do to a page.


@pytest.mark.parametrize("kind", [MasterPage, ReplicaPage, LoadPage, lambda: Cells(1)])
def test_a_page_cannot_be_made_smaller_which_would_kill_whoever_looks_at_it(new, kind):
    page = new(kind())
    with pytest.raises(PermissionError):
        os.ftruncate(page.fd, 0)


@pytest.mark.parametrize("kind", [MasterPage, ReplicaPage])
def test_a_page_is_nobody_elses_to_open(new, kind):
    assert os.fstat(new(kind()).fd).st_mode & 0o777 == 0o600


def test_a_page_that_is_only_read_shows_what_is_written_and_takes_no_write(new):
    page = MasterPage()
    writer = new(MasterPage(os.dup(page.fd)))
    page.only_read()
    new(page)
    writer.write({"a": 1})
    assert page.read() == {"a": 1}
    with pytest.raises(TypeError):
        page.write({"a": 2})
    with pytest.raises(PermissionError):
        mmap.mmap(page.fd, 4096)
    with pytest.raises(OSError):
        os.pwrite(page.fd, b"x", 0)


def test_numbers_that_are_only_read_are_todays(new):
    page = ReplicaPage()
    writer = new(ReplicaPage(os.dup(page.fd)))
    page.only_read()
    new(page)
    writer.write(Numbers(beat=2.5))
    writer.write_table([(1, 2, 3)])
    assert (page.read(), page.read_table()) == (Numbers(beat=2.5), [(1, 2, 3)])


# How loading the app went.


@pytest.fixture
def other(new) -> Iterator[tuple[LoadPage, subprocess.Popen[bytes]]]:
    """A page, and another process that has its turn in the first lane."""
    page = new(LoadPage())
    code = (
        "import sys, time; from replica_plugin.pages import LoadPage; "
        "page = LoadPage(int(sys.argv[1])); page.take_turn(0); print(flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(page.fd)], pass_fds=[page.fd], stdout=subprocess.PIPE
    )
    child.stdout.readline()
    yield page, child
    child.kill()
    child.communicate()


def test_a_turn_is_one_processs_and_known_and_ends_with_it(other):
    page, child = other
    assert not page.take_turn(0)
    assert page.whose_turn(0) == child.pid
    assert page.take_turn(1)
    child.kill()
    child.wait()
    assert page.whose_turn(0) == 0
    assert page.take_turn(0)


def test_those_that_have_the_app_are_known_as_long_as_they_live(new):
    page = new(LoadPage())
    assert page.loaded([1, 2]) == set()
    for age in range(1, 5000):
        page.note_loaded(age, [1, age])
    assert page.loaded([1, 2, 4999, 5000]) == {1, 4999}
    assert page.loaded([]) == set()


def test_loads_are_counted(new):
    page = new(LoadPage())
    assert not page.was_loaded
    for _ in range(2):
        page.note_loaded(4, [4])
    assert page.loads == 2
    assert page.was_loaded


# The replica in numbers.


def test_the_numbers_are_those_written_last_and_zero_before(new):
    page = new(ReplicaPage())
    assert page.read() == Numbers() == (0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    numbers = Numbers(1.5, 1, 2, 3, 4, 5, 6, 7, 8, 2**64 - 1, 1)
    page.write(numbers)
    assert ReplicaPage(page.fd).read() == numbers


def test_the_load_is_two_of_the_numbers(new):
    page = new(ReplicaPage())
    page.write(Numbers(1.5, 1, 2, 3, 4, 5, 6, 7))
    page.write_load(40, 50)
    assert page.read() == Numbers(1.5, 1, 2, 3, 4, 5, 6, 7)._replace(waiting=40, running=50)


def test_the_table_is_beside_the_numbers(new):
    page = new(ReplicaPage())
    assert page.read_table() == []
    rows = [(age, 64, 4194304 + age) for age in range(1000)]
    page.write_table(rows)
    page.write(Numbers(1.5, *[2**64 - 1] * 10))
    assert ReplicaPage(page.fd).read_table() == rows
    page.write_table([])
    assert page.read_table() == []
    assert page.read().beat == 1.5


# Cells.


def test_a_cell_says_which_request_its_slot_has_and_whether_the_response_may_have_begun(new):
    cells = new(Cells(3))
    other = Cells(3, cells.fd)
    assert other.begun() == {}
    cells.begin(0, 7)
    cells.begin(2, 2**61)
    assert other.begun() == {7: False, 2**61: False}
    cells.answering(2)
    assert other.begun() == {7: False, 2**61: True}
    cells.end(0)
    assert other.begun() == {2**61: True}
    assert other.ending() == 0
    cells.complete(2)
    assert other.ending() == 1
    assert other.begun() == {2**61: True}
    cells.end(2)
    assert other.ending() == 0
    cells.begin(2, 8)
    assert other.begun() == {8: False}
    cells.close()
    other.close()


def test_the_cells_of_a_process_that_was_killed_stay(new):
    cells = new(Cells(1))
    code = (
        "import os, sys; from replica_plugin.cells import Cells; "
        "Cells(1, int(sys.argv[1])).begin(0, 9); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(cells.fd)], pass_fds=[cells.fd])
    assert cells.begun() == {9: False}
    cells.close()


def test_cells_smaller_than_said_are_refused(new):
    cells = new(Cells(1))
    with pytest.raises(ValueError, match="mmap length is greater than file size"):
        Cells(1000, cells.fd)
    cells.close()


def test_cells_that_could_be_made_smaller_are_refused():
    fd = os.memfd_create("cells")
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="no memory that keeps its size"):
        Cells(1, fd)
    os.close(fd)


def test_a_slot_that_was_silenced_may_not_begin_a_response_and_one_that_began_goes_on(new):
    cells = new(Cells(2))
    dispatcher = Cells(2, cells.fd)
    cells.begin(0, 7)
    cells.begin(1, 8)
    assert cells.answering(0)
    dispatcher.silence()
    assert dispatcher.begun() == {7: True, 8: False}
    assert not cells.answering(1)
    dispatcher.close()


def test_the_stacks_of_a_process_are_those_that_it_was_asked_for_last(new):
    cells = new(Cells(2))
    with open(f"/proc/self/fd/{cells.fd}", "ab", buffering=0) as file:
        cells.expect_stacks()
        file.write(b"first\n")
        assert cells.stacks() == "first\n"
        cells.expect_stacks()
        assert cells.stacks() == ""
        file.write(b"second\n")
        assert cells.stacks() == "second\n"
