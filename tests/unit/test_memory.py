# SPDX-License-Identifier: Apache-2.0
"""Mappings live as long as their views; memory files keep their size and their rights."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ism.memory import PAGE_SIZE, Mapping, create_memfd, memfd_seals, protection, reopen_readonly


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = create_memfd("test", 4 * PAGE_SIZE)
    yield fd
    os.close(fd)


def mapped(address: int) -> bool:
    return any(
        int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
        for line in Path("/proc/self/maps").read_text().splitlines()
    )


def test_a_fresh_mapping_is_zero_writable_and_page_aligned() -> None:
    mapping = Mapping(3 * PAGE_SIZE)
    assert mapping.address % PAGE_SIZE == 0
    assert len(mapping.view) == mapping.length == 3 * PAGE_SIZE
    assert not any(mapping.view)
    mapping.view[-1] = 1


@pytest.mark.parametrize("length", [0, -PAGE_SIZE, 1, PAGE_SIZE - 1, PAGE_SIZE + 1])
def test_a_length_that_is_not_made_of_pages_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="positive multiple of the page size"):
        Mapping(length)


def test_an_impossible_length_is_the_kernels_error() -> None:
    with pytest.raises(OSError, match="mmap of") as caught:
        Mapping(1 << 62)
    assert caught.value.errno == errno.ENOMEM


def test_a_mapping_is_unmapped_when_its_last_view_goes_and_not_before() -> None:
    mapping = Mapping(PAGE_SIZE)
    address = mapping.address
    part = mapping.view[10:20]
    mapping.view.release()
    del mapping
    gc.collect()
    assert mapped(address)
    part[0] = 5
    assert part[0] == 5
    del part
    gc.collect()
    assert not mapped(address)


def test_placed_pages_are_shared_with_the_file(memfd: int) -> None:
    mapping = Mapping(4 * PAGE_SIZE)
    mapping.place(PAGE_SIZE, 2 * PAGE_SIZE, memfd, 2 * PAGE_SIZE)
    os.pwrite(memfd, b"here", 2 * PAGE_SIZE)
    assert mapping.view[PAGE_SIZE : PAGE_SIZE + 4] == b"here"
    mapping.view[PAGE_SIZE] = 0x54
    assert os.pread(memfd, 4, 2 * PAGE_SIZE) == b"Tere"
    assert mapping.view[0] == mapping.view[-1] == 0


def test_private_pages_show_the_file_and_keep_stores_to_this_process(memfd: int) -> None:
    os.pwrite(memfd, b"a", 0)
    mapping = Mapping(2 * PAGE_SIZE)
    readonly = reopen_readonly(memfd)
    mapping.place_private(0, 2 * PAGE_SIZE, readonly, 0)
    os.close(readonly)
    os.pwrite(memfd, b"b", 0)
    assert mapping.view[0] == ord("b")
    mapping.view[0] = ord("c")
    assert os.pread(memfd, 1, 0) == b"b"
    os.pwrite(memfd, b"d", PAGE_SIZE)
    assert mapping.view[PAGE_SIZE] == ord("d")


def test_cleared_pages_are_zero_and_let_the_file_go(memfd: int) -> None:
    mapping = Mapping(2 * PAGE_SIZE)
    mapping.place(0, 2 * PAGE_SIZE, memfd, 0)
    view = mapping.view
    view[0] = view[PAGE_SIZE] = 9
    mapping.clear(0, PAGE_SIZE)
    assert (view[0], view[PAGE_SIZE]) == (0, 9)
    mapping.clear()
    assert view[PAGE_SIZE] == 0
    view[PAGE_SIZE] = 3
    assert os.pread(memfd, 1, PAGE_SIZE) == b"\x09"


def test_shared_pages_can_be_shown_twice(memfd: int) -> None:
    one, two = Mapping(PAGE_SIZE), Mapping(2 * PAGE_SIZE)
    one.place(0, PAGE_SIZE, memfd, 0)
    two.share(PAGE_SIZE, one)
    one.view[7] = 7
    assert two.view[PAGE_SIZE + 7] == 7
    one.clear()
    assert two.view[PAGE_SIZE + 7] == 7


def test_private_pages_cannot_be_shown_twice() -> None:
    with pytest.raises(OSError, match="mremap"):
        Mapping(2 * PAGE_SIZE).share(0, Mapping(PAGE_SIZE))


@pytest.mark.parametrize(
    ("at", "length"),
    [(-PAGE_SIZE, PAGE_SIZE), (1, PAGE_SIZE), (0, 1), (0, 0), (0, 3 * PAGE_SIZE), (2 * PAGE_SIZE, PAGE_SIZE)],
)
def test_no_call_reaches_beyond_its_mapping(memfd: int, at: int, length: int) -> None:
    mapping = Mapping(2 * PAGE_SIZE)
    for call in (
        lambda: mapping.place(at, length, memfd, 0),
        lambda: mapping.place_private(at, length, memfd, 0),
        lambda: mapping.clear(at, length),
    ):
        with pytest.raises(ValueError, match="not a page-aligned part"):
            call()


def test_a_share_must_fit_too() -> None:
    with pytest.raises(ValueError, match="not a page-aligned part"):
        Mapping(PAGE_SIZE).share(0, Mapping(2 * PAGE_SIZE))


def test_protection_bits_follow_the_rights() -> None:
    assert [protection(read, write) for read, write in ((False, False), (True, False), (True, True))] == [
        0,
        mmap.PROT_READ,
        mmap.PROT_READ | mmap.PROT_WRITE,
    ]


def test_a_memory_file_is_zero_of_its_size_private_to_the_user_and_closed_on_exec(memfd: int) -> None:
    status = os.fstat(memfd)
    assert status.st_size == 4 * PAGE_SIZE
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert not os.get_inheritable(memfd)
    assert not any(os.pread(memfd, 4 * PAGE_SIZE, 0))
    assert "test" in os.readlink(f"/proc/self/fd/{memfd}")


def test_nobody_can_grow_or_shrink_a_memory_file(memfd: int) -> None:
    assert memfd_seals(memfd) & (fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK) == fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
    for size in (0, PAGE_SIZE, 5 * PAGE_SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(memfd, size)
    with pytest.raises(PermissionError):
        os.pwrite(memfd, b"x", 4 * PAGE_SIZE)
    with pytest.raises(PermissionError):
        os.posix_fallocate(memfd, 0, 5 * PAGE_SIZE)


def test_more_seals_may_follow(memfd: int) -> None:
    f_seal_future_write = 0x10
    mapping = Mapping(PAGE_SIZE)
    mapping.place(0, PAGE_SIZE, memfd, 0)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, f_seal_future_write)
    mapping.view[0] = 1  # who wrote before goes on
    with pytest.raises(PermissionError):
        Mapping(PAGE_SIZE).place(0, PAGE_SIZE, memfd, 0)
    with pytest.raises(PermissionError):
        os.pwrite(memfd, b"x", 0)


def test_a_descriptor_opened_read_only_never_writes(memfd: int) -> None:
    readonly = reopen_readonly(memfd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(readonly, b"x")
    with pytest.raises(PermissionError):
        Mapping(PAGE_SIZE).place(0, PAGE_SIZE, readonly, 0)
    mapping = Mapping(PAGE_SIZE)
    mapping.place(0, PAGE_SIZE, readonly, 0, write=False)
    os.pwrite(memfd, b"z", 0)
    assert mapping.view[0] == ord("z")
    assert not os.get_inheritable(readonly)
    os.close(readonly)


def test_a_memory_file_cannot_be_executed_where_the_kernel_can_say_so() -> None:
    fd = create_memfd("test", PAGE_SIZE)
    f_seal_exec = 0x20
    if memfd_seals(fd) & f_seal_exec:
        with pytest.raises(PermissionError):
            os.fchmod(fd, 0o700)
    os.close(fd)


def test_sizes_and_names_the_kernel_refuses_leave_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Invalid argument"):
        create_memfd("x" * 300, PAGE_SIZE)
    with pytest.raises(OSError, match="Invalid argument"):
        create_memfd("test", -1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_seals_of_what_is_no_memory_file_are_an_error() -> None:
    with open(os.devnull, "rb") as file, pytest.raises(OSError, match="Invalid argument"):
        memfd_seals(file.fileno())
