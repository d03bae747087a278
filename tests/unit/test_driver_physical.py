# SPDX-License-Identifier: Apache-2.0
"""Memory with physical addresses: what it is made of, and what is missing when there is none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ism.driver import physical
from ism.driver.physical import HUGE_PAGE, HugeMapping, PhysicalMemory, physical_address
from ism.errors import TransportError
from ism.memory import PAGE_SIZE

PRESENT = 1 << 63

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="physical addresses are shown to root only")


@pytest.fixture
def no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(length: int) -> HugeMapping:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(physical, "HugeMapping", none)


@pytest.fixture
def stays(tmp_path: Path) -> Path:
    """The file of a kernel that does not move locked pages."""
    path = tmp_path / "compact_unevictable_allowed"
    path.write_text("0\n")
    return path


@as_root
def test_a_page_that_the_kernel_does_not_move_is_locked_and_has_its_physical_address(
    no_huge_pages: None, stays: Path
) -> None:
    memory = PhysicalMemory("test", compaction=stays)
    buffer = memory.alloc(100)
    assert buffer.mapping.length == PAGE_SIZE
    assert buffer.iova == physical_address(buffer.mapping.address) != 0
    assert not any(buffer.mapping.view)
    memory.free(buffer)


@as_root
def test_a_huge_page_is_taken_where_there_is_one() -> None:
    try:
        HugeMapping(HUGE_PAGE)
    except OSError:
        pytest.skip("no huge pages: write 16 to /proc/sys/vm/nr_hugepages")
    buffer = PhysicalMemory("test").alloc(100)
    assert buffer.mapping.length == HUGE_PAGE
    assert buffer.iova % HUGE_PAGE == buffer.mapping.address % HUGE_PAGE == 0
    assert physical_address(buffer.mapping.address + PAGE_SIZE) == buffer.iova + PAGE_SIZE


def test_a_locked_page_that_the_kernel_may_move_is_refused_with_both_ways_out(
    no_huge_pages: None, tmp_path: Path
) -> None:
    moves = tmp_path / "compact_unevictable_allowed"
    moves.write_text("1\n")
    with pytest.raises(TransportError, match=r"test: no huge page .*nr_hugepages, or 0 to .*compact_unev") as info:
        PhysicalMemory("test", compaction=moves).alloc(1)
    assert info.value.errno == errno.ENOMEM


def test_more_than_a_page_needs_a_huge_page(no_huge_pages: None, stays: Path) -> None:
    with pytest.raises(TransportError, match=r"no huge page for 4097 bytes.*write 16 to /proc/sys/vm/nr_hugepages$"):
        PhysicalMemory("test", compaction=stays).alloc(PAGE_SIZE + 1)


@pytest.mark.parametrize("size", [0, -1, HUGE_PAGE + 1])
def test_what_is_no_part_of_a_huge_page_is_refused(size: int) -> None:
    with pytest.raises(TransportError, match="no part of a huge page"):
        PhysicalMemory("test").alloc(size)


@pytest.mark.parametrize("entry", [PRESENT, 5, 0])
def test_a_page_that_is_hidden_or_not_there_is_an_error_that_says_what_is_missing(tmp_path: Path, entry: int) -> None:
    pagemap = tmp_path / "pagemap"
    pagemap.write_bytes(entry.to_bytes(8, "little") * 16)
    with pytest.raises(TransportError, match="CAP_SYS_ADMIN"):
        physical_address(3 * PAGE_SIZE, pagemap)


def test_the_offset_in_the_page_is_part_of_the_address(tmp_path: Path) -> None:
    pagemap = tmp_path / "pagemap"
    pagemap.write_bytes(bytes(24) + (PRESENT | 0x1234).to_bytes(8, "little"))
    assert physical_address(3 * PAGE_SIZE + 5, pagemap) == 0x1234 * PAGE_SIZE + 5


def test_a_pagemap_that_cannot_be_opened_is_an_error_that_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="CAP_SYS_ADMIN"):
        physical_address(0, tmp_path / "absent")


@as_root
def test_a_forked_child_gets_zero_pages_in_its_place(no_huge_pages: None, stays: Path) -> None:
    buffer = PhysicalMemory("test", compaction=stays).alloc(1)
    buffer.mapping.view[0] = 7
    pid = os.fork()
    if pid == 0:
        seen = buffer.mapping.view[0]
        buffer.mapping.view[0] = 9
        os._exit(seen)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert buffer.mapping.view[0] == 7
