# SPDX-License-Identifier: Apache-2.0
"""The table of DMA maps, and the memory behind a client's."""

from __future__ import annotations

import errno
import os

import pytest

from ism.vfio_user.dma import DmaTable
from ism.vfio_user.dma_memory import Backing, DmaMemory
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd


def errno_of(call: object, *args: object) -> int:
    with pytest.raises(VfioUserError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.errno


def test_maps_do_not_overlap() -> None:
    table: DmaTable[str] = DmaTable()
    table.add(0x2000, 0x2000, "a")
    for address, size in ((0x2000, 0x2000), (0x1000, 0x1001), (0x3FFF, 1), (0, 0x10000), (0x2800, 0x10)):
        assert errno_of(table.add, address, size, "b") == errno.EEXIST
    table.add(0x1000, 0x1000, "below")
    table.add(0x4000, 0x1000, "above")
    assert [entry.value for entry in table] == ["below", "a", "above"]


def test_a_map_stays_within_64_bits() -> None:
    table: DmaTable[int] = DmaTable()
    table.add((1 << 64) - 1, 1, 0)
    assert errno_of(table.add, (1 << 64) - 10, 11, 0) == errno.EINVAL
    assert errno_of(table.add, 0, 0, 0) == errno.EINVAL


def test_the_table_is_bounded() -> None:
    table: DmaTable[int] = DmaTable(2)
    table.add(0, 1, 0)
    table.add(1, 1, 0)
    assert errno_of(table.add, 2, 1, 0) == errno.ENOSPC


def test_an_unmap_names_exactly_one_map() -> None:
    table: DmaTable[str] = DmaTable()
    table.add(0x1000, 0x1000, "a")
    for address, size in ((0x1000, 0xFFF), (0x1001, 0xFFF), (0, 0x2000)):
        assert errno_of(table.remove, address, size) == errno.ENOENT
    assert table.remove(0x1000, 0x1000).value == "a"
    assert len(table) == 0


def test_an_access_lies_inside_one_map() -> None:
    table: DmaTable[str] = DmaTable()
    table.add(0x1000, 0x1000, "a")
    table.add(0x2000, 0x1000, "b")
    found = table.find(0x1FFF, 1)
    assert found is not None
    assert found.value == "a"
    assert table.find(0x1FFF, 2) is None
    assert table.find(0xFFF, 1) is None
    assert table.find(0x3000, 1) is None


def test_a_server_reads_and_writes_what_it_was_granted() -> None:
    memory = DmaMemory(8)
    buffer = bytearray(b"0123456789")
    memory.add(100, 10, Backing(10, buffer, None, 0, read=True, write=True))
    memory.add(200, 10, Backing(10, bytes(10), None, 0, read=True, write=False))
    memory.add(300, 10, Backing(10, None, None, 0, read=True, write=True))
    assert memory.read(102, 3) == b"234"
    memory.write(108, b"xy")
    assert buffer == b"01234567xy"
    assert errno_of(memory.write, 200, b"x") == errno.EPERM
    assert errno_of(memory.read, 109, 2) == errno.EFAULT
    assert errno_of(memory.read, 300, 1) == errno.EFAULT
    memory.clear()
    assert errno_of(memory.read, 102, 3) == errno.EFAULT
    buffer.append(0)  # no view of it is left


def test_a_descriptor_is_mapped_when_there_is_no_other_memory() -> None:
    memory = DmaMemory(8)
    with Fd(os.memfd_create("ram")) as fd:
        os.ftruncate(fd.fileno(), 8192)
        os.pwrite(fd.fileno(), b"page two", 4096)
        memory.add(0, 4096, Backing(4096, None, fd, 4096, read=True, write=True))
        assert memory.read(0, 8) == b"page two"
        memory.write(5, b"2!!")
        assert os.pread(fd.fileno(), 8, 4096) == b"page 2!!"
        memory.clear()


class Callbacks:
    def __init__(self) -> None:
        self.written: list[tuple[int, bytes]] = []

    def read(self, offset: int, count: int, /) -> bytes:
        return b"short" if count == 9 else bytes([offset]) * count

    def write(self, offset: int, data: bytes, /) -> None:
        self.written.append((offset, data))


def test_callbacks_stand_behind_a_map() -> None:
    memory, callbacks = DmaMemory(8), Callbacks()
    memory.add(0x1000, 0x1000, Backing(0x1000, callbacks, None, 0, read=True, write=True))
    assert memory.read(0x1007, 3) == b"\7\7\7"
    memory.write(0x1002, b"ab")
    assert callbacks.written == [(2, b"ab")]
    assert errno_of(memory.read, 0x1000, 9) == errno.EIO


def test_memory_that_cannot_stand_behind_a_map_is_refused() -> None:
    with pytest.raises(ValueError, match="behind a map of 11"):
        Backing(11, bytearray(10), None, 0, read=True, write=True)
    with pytest.raises(ValueError, match="read-only"):
        Backing(10, bytes(10), None, 0, read=True, write=True)
