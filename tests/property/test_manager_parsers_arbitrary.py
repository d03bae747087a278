# SPDX-License-Identifier: Apache-2.0
"""What clients send to the manager itself: control requests of any kind, and accesses to any DMA maps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given, settings
from hypothesis import strategies as st

from ism.device.contract import GuestMemoryError
from ism.errors import RemoteProtocolError
from ism.manager import dma
from ism.manager.control import decode_request, encode_line
from ism.manager.dma import GuestRam
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd

PAGE = 4096
PAGES = 4
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["op", "x"]), inner, max_size=2),
    max_leaves=5,
)


@given(
    st.one_of(st.binary(max_size=80), st.text(max_size=40).map(str.encode), json_values.map(lambda v: encode_line(v)))
)
def test_any_line_is_a_request_or_refused(line: bytes) -> None:
    try:
        found = decode_request(line)
    except RemoteProtocolError:
        return
    assert isinstance(found["op"], str)
    assert decode_request(encode_line(found)) == found


@contextmanager
def ram_of(files: list[Fd]) -> Iterator[GuestRam]:
    ram = GuestRam()
    parts = dma.PART_BYTES
    dma.PART_BYTES = 2 * PAGE
    try:
        yield ram
    finally:
        dma.PART_BYTES = parts
        ram.clear()
        for fd in files:
            fd.close()


maps = st.tuples(
    st.just("map"),
    st.integers(0, PAGES - 1),
    st.integers(1, 2),
    st.integers(0, 1),
    st.integers(0, 4),
    st.booleans(),
    st.booleans(),
)
unmaps = st.tuples(st.just("unmap"), st.integers(0, PAGES - 1), st.integers(1, 2))
accesses = st.tuples(st.sampled_from(["read", "write"]), st.integers(0, PAGES * PAGE), st.integers(0, 2 * PAGE))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(maps, maps, unmaps, accesses, accesses), min_size=10, max_size=40))
def test_guest_memory_is_what_the_maps_say_and_nothing_else(steps: list[tuple[str, int, int]]) -> None:
    """The model: for each guest page, which file page stands behind it, with which rights."""
    files = [Fd(os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) for _ in range(2)]
    content = [bytearray(os.urandom(5 * PAGE)) for _ in files]
    for fd, data in zip(files, content, strict=True):
        os.pwrite(fd.fileno(), data, 0)
    pages: dict[int, tuple[int, int, bool, bool]] = {}
    live: set[tuple[int, int]] = set()
    with ram_of(files) as ram:
        for kind, *arguments in steps:
            if kind == "map":
                first, count, file, offset, readable, writable = arguments
                fits = offset + count <= 5 and not any(first + page in pages for page in range(count))
                fd = files[file].dup()
                try:
                    ram.add(
                        first * PAGE, count * PAGE, fd, offset * PAGE, readable=bool(readable), writable=bool(writable)
                    )
                except VfioUserError:
                    fd.close()
                    assert not fits
                    continue
                assert fits
                live.add((first, count))
                for page in range(count):
                    pages[first + page] = (file, offset + page, bool(readable), bool(writable))
            elif kind == "unmap":
                first, count = arguments
                try:
                    ram.remove(first * PAGE, count * PAGE)
                except VfioUserError:
                    assert (first, count) not in live
                    continue
                live.remove((first, count))
                for page in range(count):
                    del pages[first + page]
            else:
                address, length = arguments
                right = 2 if kind == "read" else 3
                touched = range(address // PAGE, -(-(address + length) // PAGE)) if length else range(0)
                allowed = all(page in pages and pages[page][right] for page in touched)
                data = os.urandom(length)
                try:
                    if kind == "read":
                        assert ram.read(address, length) == model_bytes(pages, content, address, length)
                    else:
                        ram.write(address, data)
                except GuestMemoryError:
                    assert not allowed
                    for file, fd in enumerate(files):  # the part before the first bad page may have been written
                        content[file][:] = os.pread(fd.fileno(), 5 * PAGE, 0)
                    continue
                assert allowed
                if kind == "write":
                    for at in range(length):
                        file, page, _, _ = pages[(address + at) // PAGE]
                        content[file][page * PAGE + (address + at) % PAGE] = data[at]
        for fd, data in zip(files, content, strict=True):
            assert os.pread(fd.fileno(), 5 * PAGE, 0) == data


def model_bytes(
    pages: dict[int, tuple[int, int, bool, bool]], content: list[bytearray], address: int, length: int
) -> bytes:
    out = bytearray()
    while len(out) < length:
        number, inside = divmod(address + len(out), PAGE)
        file, page, _, _ = pages[number]
        size = min(length - len(out), PAGE - inside)
        out += content[file][page * PAGE + inside : page * PAGE + inside + size]
    return bytes(out)
