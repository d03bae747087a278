# SPDX-License-Identifier: Apache-2.0
"""ChunkWindow and DoorbellTable against models: what is seen, through old views and new, after any sequence."""

from __future__ import annotations

import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ism.driver.transport import Span
from ism.driver.window import ChunkWindow, DoorbellTable
from ism.errors import TransportError
from ism.eventfd import drain, raise_eventfd
from ism.memory import PAGE_SIZE, create_memfd

CHUNKS = 16
OFFSETS = st.integers(0, CHUNKS - 1)
LENGTHS = st.integers(1, 4)


class WindowMachine(RuleBasedStateMachine):
    """The model: which byte each chunk of the window shows, which page of which view lies under which chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.window = ChunkWindow()
        self.fds: list[int] = []
        self.live: dict[int, list[int]] = {}  # chunk -> the page of the memory (a list of one byte) mapped there
        self.starts: dict[int, int] = {}  # areas as they were mapped: first chunk -> length
        self.changed: set[int] = set()  # areas (first chunk) that are not one shared mapping any more
        self.views: list[tuple[memoryview, list[list[int]]]] = []
        self.under: dict[int, list[tuple[int, int]]] = {}  # chunk -> pages of views that follow it
        self.serial = 0

    def memory(self, length: int) -> tuple[int, list[list[int]]]:
        fd = create_memfd("model", length * PAGE_SIZE)
        self.fds.append(fd)
        pages = []
        for page in range(length):
            self.serial = self.serial % 250 + 1
            os.pwrite(fd, bytes([self.serial]), page * PAGE_SIZE)
            pages.append([self.serial])
        return fd, pages

    @rule(offset=OFFSETS, length=LENGTHS, write=st.booleans())
    def map(self, offset: int, length: int, write: bool) -> None:
        fd, pages = self.memory(length)
        chunks = range(offset, offset + length)
        mapped = [chunk in self.live for chunk in chunks]
        try:
            self.window.map(offset * PAGE_SIZE, length * PAGE_SIZE, fd, 0, read=True, write=write)
        except OSError:
            assert any(mapped)
            assert not all(mapped)
            return
        assert all(mapped) or not any(mapped)
        if not any(mapped):
            self.starts[offset] = length
            self.changed.discard(offset)
            for chunk, page in zip(chunks, pages, strict=True):
                self.live[chunk] = page
                self.under[chunk] = []
            return
        for start, size in self.starts.items():
            covered = len(set(chunks) & set(range(start, start + size)))
            if covered == size and write:
                self.changed.discard(start)
            elif covered:
                self.changed.add(start)
        for chunk, page in zip(chunks, pages, strict=True):
            self.live[chunk] = page
            for view, index in self.under[chunk]:
                self.views[view][1][index] = page

    @rule(offset=OFFSETS, length=LENGTHS)
    def unmap(self, offset: int, length: int) -> None:
        self.window.unmap(offset * PAGE_SIZE, length * PAGE_SIZE)
        for chunk in range(offset, offset + length):
            if self.live.pop(chunk, None) is not None:
                for view, index in self.under.pop(chunk):
                    self.views[view][1][index] = [0]
        self.starts = {
            start: size for start, size in self.starts.items() if start + size <= offset or start >= offset + length
        }  # what is left of an area is no area of a region any more

    @precondition(lambda self: self.starts)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """Make a region of some areas, as an attach does; they belong to no other afterwards."""
        areas = data.draw(st.lists(st.sampled_from(sorted(self.starts)), min_size=1, max_size=4, unique=True))
        spans = [Span(start * PAGE_SIZE, self.starts[start] * PAGE_SIZE) for start in areas]
        chunks = [start + index for start in areas for index in range(self.starts[start])]
        try:
            mapping = self.window.contiguous(spans)
        except TransportError as exc:
            problem = str(exc)
            mapping = None
        if mapping is None:
            assert "were changed" in problem
            assert len(areas) > 1
            assert self.changed.intersection(areas)
            return
        assert len(areas) == 1 or self.changed.isdisjoint(areas)
        assert mapping.length == len(chunks) * PAGE_SIZE
        self.views.append((mapping.view, [self.live[chunk] for chunk in chunks]))
        for index, chunk in enumerate(chunks):
            self.under[chunk].append((len(self.views) - 1, index))
        for start in areas:
            del self.starts[start]

    @rule(offset=OFFSETS)
    def hold_nothing(self, offset: int) -> None:
        if offset not in self.live:
            try:
                self.window.contiguous([Span(offset * PAGE_SIZE, PAGE_SIZE)])
            except TransportError:
                return
            raise AssertionError("an area that is not mapped was found")

    @invariant()
    def every_view_shows_what_the_model_says(self) -> None:
        for view, pages in self.views:
            assert [view[index * PAGE_SIZE] for index in range(len(pages))] == [page[0] for page in pages]

    def teardown(self) -> None:
        self.window.clear()
        for view, pages in self.views:
            assert [view[index * PAGE_SIZE] for index in range(len(pages))] == [page[0] for page in pages]
        for fd in self.fds:
            os.close(fd)


WindowMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestWindow = WindowMachine.TestCase


class DoorbellMachine(RuleBasedStateMachine):
    """The model: which bell each slot rings. Numbers that were handed out once are rung for ever after."""

    def __init__(self) -> None:
        super().__init__()
        self.table = DoorbellTable()
        self.bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        self.wired: dict[int, int] = {}
        self.numbers: set[int] = set()
        self.others: list[int] = []

    @rule(slot=st.integers(0, 4), bell=st.integers(0, 2))
    def set(self, slot: int, bell: int) -> None:
        self.table.set(slot, self.bells[bell])
        self.wired[slot] = bell
        number = self.table.get(slot)
        assert number is not None
        self.numbers.add(number)

    @rule(slot=st.integers(0, 4))
    def unset(self, slot: int) -> None:
        self.table.unset(slot)
        self.wired.pop(slot, None)

    @rule()
    def open_something_else(self) -> None:
        if len(self.others) < 8:
            self.others.append(os.open(os.devnull, os.O_RDONLY))

    @rule(slot=st.integers(0, 4))
    def ring(self, slot: int) -> None:
        number = self.table.get(slot)
        if slot not in self.wired:
            assert number is None
            return
        assert number is not None
        raise_eventfd(number)
        assert [drain(bell) for bell in self.bells] == [bell == self.wired[slot] for bell in range(3)]

    @invariant()
    def a_number_never_becomes_another_kind_of_descriptor(self) -> None:
        for number in self.numbers:
            assert os.readlink(f"/proc/self/fd/{number}") == "anon_inode:[eventfd]"
        assert self.numbers.isdisjoint(self.others)

    def teardown(self) -> None:
        in_use = {self.table.get(slot) for slot in self.wired}
        for number in self.numbers - in_use:  # rung too late: nobody hears it
            raise_eventfd(number)
        assert not any(drain(bell) for bell in self.bells)
        self.table.close()
        for fd in (*self.bells, *self.others):
            os.close(fd)


DoorbellMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestDoorbells = DoorbellMachine.TestCase
