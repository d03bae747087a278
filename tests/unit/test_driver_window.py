# SPDX-License-Identifier: Apache-2.0
"""The client's side of the map channel: chunks come and go, views stay valid, doorbell numbers stay eventfds."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

import pytest

from ism.driver.transport import Span
from ism.driver.window import ChunkWindow, DoorbellTable
from ism.errors import TransportError
from ism.eventfd import drain, raise_eventfd
from ism.memory import PAGE_SIZE, create_memfd, reopen_readonly

PAGE = PAGE_SIZE
PAGES = 8


@pytest.fixture
def memfd() -> Iterator[int]:
    """A memory file of eight pages, page n full of the byte n + 1."""
    fd = create_memfd("test", PAGES * PAGE)
    for page in range(PAGES):
        os.pwrite(fd, bytes([page + 1]) * PAGE, page * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def window() -> ChunkWindow:
    return ChunkWindow()


def put(window: ChunkWindow, memfd: int, offset: int, pages: int = 1, at: int = 0, *, write: bool = True) -> None:
    window.map(offset * PAGE, pages * PAGE, memfd, at * PAGE, read=True, write=write)


def pages_of(view: memoryview) -> list[int]:
    return [view[at] for at in range(0, len(view), PAGE)]


def test_a_mapped_area_shows_the_file_and_writes_to_it(window: ChunkWindow, memfd: int) -> None:
    put(window, memfd, 4, 2, at=3)
    view = window.contiguous([Span(4 * PAGE, 2 * PAGE)]).view
    assert pages_of(view) == [4, 5]
    view[0] = 77
    assert os.pread(memfd, 1, 3 * PAGE) == b"\x4d"


def test_scattered_areas_are_shown_side_by_side_in_the_order_of_the_region(window: ChunkWindow, memfd: int) -> None:
    put(window, memfd, 9, 1, at=0)
    put(window, memfd, 2, 2, at=1)
    put(window, memfd, 30, 1, at=3)
    spans = [Span(9 * PAGE, PAGE), Span(2 * PAGE, 2 * PAGE), Span(30 * PAGE, PAGE)]
    mapping = window.contiguous(spans)
    assert pages_of(mapping.view) == [1, 2, 3, 4]
    mapping.view[3 * PAGE] = 99
    assert os.pread(memfd, 1, 3 * PAGE) == b"\x63"


@pytest.mark.parametrize(
    "spans",
    [
        [Span(0, PAGE)],
        [Span(4 * PAGE, PAGE)],
        [Span(4 * PAGE, 3 * PAGE)],
        [Span(5 * PAGE, PAGE)],
        [Span(4 * PAGE, 2 * PAGE), Span(8 * PAGE, PAGE)],
    ],
)
def test_an_area_that_is_not_what_was_mapped_is_an_error(window: ChunkWindow, memfd: int, spans: list[Span]) -> None:
    put(window, memfd, 4, 2)
    with pytest.raises(TransportError, match="mapped nothing; it offers no map channel"):
        window.contiguous(spans)


def test_an_area_cannot_belong_to_two_regions_or_twice_to_one(window: ChunkWindow, memfd: int) -> None:
    put(window, memfd, 0)
    put(window, memfd, 1, at=1)
    both = [Span(0, PAGE), Span(PAGE, PAGE)]
    with pytest.raises(TransportError, match="for two regions"):
        window.contiguous([both[0], both[0]])
    mapping = window.contiguous(both)
    for spans in (both, both[:1], both[1:]):
        with pytest.raises(TransportError, match="for two regions"):
            window.contiguous(spans)
    assert pages_of(mapping.view) == [1, 2]


def test_unmap_puts_zeros_under_every_view_and_ends_writing_to_the_file(window: ChunkWindow, memfd: int) -> None:
    put(window, memfd, 0)
    put(window, memfd, 5, at=1)
    view = window.contiguous([Span(0, PAGE), Span(5 * PAGE, PAGE)]).view
    window.unmap(5 * PAGE, PAGE)
    assert pages_of(view) == [1, 0]
    view[PAGE] = 42
    assert os.pread(memfd, 1, PAGE) == b"\x02"
    window.unmap(0, PAGE)
    assert pages_of(view) == [0, 42]
    assert len(window) == 0


def test_a_view_outlives_window_mapping_and_file(memfd: int) -> None:
    window = ChunkWindow()
    put(window, memfd, 0, 2)
    view = window.contiguous([Span(0, 2 * PAGE)]).view
    window.clear()
    del window
    assert pages_of(view) == [1, 2]


def test_chunks_that_are_mapped_anew_get_addresses_of_their_own(window: ChunkWindow, memfd: int) -> None:
    put(window, memfd, 3)
    old = window.contiguous([Span(3 * PAGE, PAGE)])
    window.unmap(3 * PAGE, PAGE)
    put(window, memfd, 3, at=6)
    new = window.contiguous([Span(3 * PAGE, PAGE)])
    assert new.address != old.address
    assert pages_of(old.view) == [0]
    assert pages_of(new.view) == [7]


def test_a_part_that_was_unmapped_is_mapped_anew_elsewhere(window: ChunkWindow, memfd: int) -> None:
    put(window, memfd, 0, 3)
    old = window.contiguous([Span(0, 3 * PAGE)])
    window.unmap(PAGE, PAGE)
    assert pages_of(old.view) == [1, 0, 3]
    assert len(window) == 2
    put(window, memfd, 1, at=7)
    assert pages_of(old.view) == [1, 0, 3]
    window.unmap(0, 3 * PAGE)
    assert pages_of(old.view) == [0, 0, 0]


def test_rights_that_are_narrowed_replace_the_pages_in_place(window: ChunkWindow, memfd: int) -> None:
    put(window, memfd, 0, 2)
    view = window.contiguous([Span(0, 2 * PAGE)]).view
    readonly = reopen_readonly(memfd)
    put(window, readonly, 0, 2, write=False)
    os.close(readonly)
    os.pwrite(memfd, b"\x21", PAGE)
    assert pages_of(view) == [1, 0x21]
    view[0] = 9  # a store that was on its way: it reaches nobody, and the process lives
    assert os.pread(memfd, 1, 0) == b"\x01"
    put(window, memfd, 0, 2)
    assert pages_of(view) == [1, 0x21]


def test_areas_that_lose_the_right_to_write_before_they_are_put_together_are_an_error(
    window: ChunkWindow, memfd: int
) -> None:
    put(window, memfd, 0)
    put(window, memfd, 4, at=1)
    put(window, memfd, 4, at=1, write=False)
    spans = [Span(0, PAGE), Span(4 * PAGE, PAGE)]
    with pytest.raises(TransportError, match="rights to the region were changed"):
        window.contiguous(spans)
    put(window, memfd, 4, at=1)
    assert pages_of(window.contiguous(spans).view) == [1, 2]


def test_an_area_that_was_replaced_in_part_is_not_put_together_with_others(window: ChunkWindow, memfd: int) -> None:
    small = create_memfd("small", PAGE)
    put(window, memfd, 0, 2)
    put(window, memfd, 4)
    put(window, small, 0)  # shown twice as a whole, the area would reach beyond the end of this file
    os.close(small)
    with pytest.raises(TransportError, match="rights to the region were changed"):
        window.contiguous([Span(0, 2 * PAGE), Span(4 * PAGE, PAGE)])
    assert pages_of(window.contiguous([Span(0, 2 * PAGE)]).view) == [0, 2]


def test_a_replacement_of_only_some_of_the_chunks_is_made_where_they_are(window: ChunkWindow, memfd: int) -> None:
    put(window, memfd, 0, 2)
    put(window, memfd, 2, 2, at=2)
    first, second = window.contiguous([Span(0, 2 * PAGE)]), window.contiguous([Span(2 * PAGE, 2 * PAGE)])
    put(window, memfd, 1, 2, at=5)
    assert pages_of(first.view) == [1, 6]
    assert pages_of(second.view) == [7, 4]


@pytest.mark.parametrize(("offset", "pages"), [(0, 2), (1, 2), (0, 8), (2, 3), (1, 4)])
def test_a_map_over_chunks_of_which_only_some_are_mapped_is_refused_and_changes_nothing(
    window: ChunkWindow, memfd: int, offset: int, pages: int
) -> None:
    put(window, memfd, 1)
    put(window, memfd, 3, at=1)
    views = [window.contiguous([Span(at * PAGE, PAGE)]).view for at in (1, 3)]
    with pytest.raises(OSError, match="only some are mapped") as caught:
        put(window, memfd, offset, pages)
    assert caught.value.errno == errno.EINVAL
    assert [pages_of(view) for view in views] == [[1], [2]]


@pytest.mark.parametrize(("offset", "length"), [(-PAGE, PAGE), (1, PAGE), (0, 0), (0, -PAGE), (0, PAGE + 1)])
def test_ranges_that_are_not_pages_are_refused(window: ChunkWindow, memfd: int, offset: int, length: int) -> None:
    with pytest.raises(OSError, match="not made of pages"):
        window.map(offset, length, memfd, 0, read=True, write=True)
    with pytest.raises(OSError, match="not made of pages"):
        window.unmap(offset, length)


def test_what_the_kernel_refuses_leaves_no_trace(window: ChunkWindow, memfd: int) -> None:
    readonly = reopen_readonly(memfd)
    with pytest.raises(PermissionError):
        put(window, readonly, 0)
    os.close(readonly)
    assert len(window) == 0
    put(window, memfd, 0)


def test_mapping_and_unmapping_while_another_thread_stores_never_faults(window: ChunkWindow, memfd: int) -> None:
    put(window, memfd, 0, 4)
    view = window.contiguous([Span(0, 4 * PAGE)]).view
    readonly = reopen_readonly(memfd)
    stop = threading.Event()

    def store() -> None:
        while not stop.is_set():
            for at in range(0, 4 * PAGE, 512):
                view[at] = 1

    thread = threading.Thread(target=store)
    thread.start()
    for _ in range(200):
        put(window, readonly, 0, 4, write=False)
        put(window, memfd, 0, 4)
    window.unmap(0, 4 * PAGE)
    stop.set()
    thread.join(30)
    os.close(readonly)


# -- doorbells


@pytest.fixture
def table() -> Iterator[DoorbellTable]:
    made = DoorbellTable()
    yield made
    made.close()
    made.close()


@pytest.fixture
def bell() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_a_slot_rings_the_eventfd_that_it_was_given(table: DoorbellTable, bell: int) -> None:
    assert table.get(3) is None
    table.set(3, bell)
    wired = table.get(3)
    assert wired is not None
    assert wired != bell
    raise_eventfd(wired)
    assert drain(bell)


def test_a_slot_that_is_wired_anew_keeps_its_number(table: DoorbellTable, bell: int) -> None:
    other = os.eventfd(0, os.EFD_NONBLOCK)
    table.set(0, other)
    number = table.get(0)
    table.set(0, bell)
    assert table.get(0) == number
    assert number is not None
    raise_eventfd(number)
    assert drain(bell)
    assert not drain(other)
    os.close(other)


def test_a_number_that_somebody_still_uses_after_unset_is_an_eventfd_that_wakes_nobody(
    table: DoorbellTable, bell: int
) -> None:
    table.set(0, bell)
    number = table.get(0)
    assert number is not None
    table.unset(0)
    table.unset(0)
    assert table.get(0) is None
    opened = os.open(os.devnull, os.O_RDONLY)  # would take the number if it were free
    assert opened != number
    raise_eventfd(number)
    assert not drain(bell)
    table.set(9, bell)
    assert table.get(9) == number
    os.close(opened)


def test_what_is_no_eventfd_is_refused(table: DoorbellTable) -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match="must be an eventfd") as caught:
        table.set(0, write_end)
    assert caught.value.errno == errno.EINVAL
    assert table.get(0) is None
    os.close(read_end)
    os.close(write_end)


def test_after_close_nothing_is_wired(bell: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    table = DoorbellTable()
    table.set(0, bell)
    table.set(1, bell)
    table.unset(1)
    table.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert table.get(0) is None
    with pytest.raises(OSError, match="closed"):
        table.set(0, bell)
