# SPDX-License-Identifier: Apache-2.0
"""Payloads: layouts against the specification, and one test per check."""

from __future__ import annotations

import errno
import struct

import pytest

from ism.vfio_user import payloads
from ism.vfio_user.errors import MalformedMessageError
from ism.vfio_user.payloads import (
    IrqAction,
    IrqData,
    MmapArea,
    RegionFlag,
    RegionInfo,
    RegionRange,
    RegionWrite,
    SetIrqs,
)

AREAS = (MmapArea(offset=0, size=4096), MmapArea(offset=8192, size=8192))
MAPPED = RegionInfo(index=4, size=1 << 16, flags=7, offset=0, areas=AREAS)


def test_region_info_with_sparse_areas_has_the_capability_chain_of_vfio_h() -> None:
    data, whole = payloads.encode_region_info(MAPPED, 4096)
    assert whole
    assert data[:32] == struct.pack("<IIIIQQ", 80, 7 | 8, 4, 32, 1 << 16, 0)
    assert data[32:48] == struct.pack("<HHIII", 1, 1, 0, 2, 0)
    assert data[48:] == struct.pack("<QQQQ", 0, 4096, 8192, 8192)
    info, needed = payloads.parse_region_info_reply(data)
    assert (info, needed) == (MAPPED, 80)


def test_region_info_with_a_small_argsz_is_the_fixed_part_and_says_what_is_needed() -> None:
    data, whole = payloads.encode_region_info(MAPPED, 79)
    assert not whole
    assert data == struct.pack("<IIIIQQ", 80, 7, 4, 0, 1 << 16, 0)
    info, needed = payloads.parse_region_info_reply(data)
    assert (info.areas, needed) == ((), 80)


def test_region_info_without_areas_has_no_capability() -> None:
    data, whole = payloads.encode_region_info(RegionInfo(index=0, size=256, flags=3), 32)
    assert whole
    assert data == struct.pack("<IIIIQQ", 32, 3, 0, 0, 256, 0)


def caps(*parts: bytes, cap_offset: int = 32, size: int = 1 << 16) -> bytes:
    tail = b"".join(parts)
    return struct.pack("<IIIIQQ", 32 + len(tail), 15, 0, cap_offset, size, 0) + tail


def sparse(count: int, *areas: tuple[int, int], next: int = 0) -> bytes:
    return struct.pack("<HHIII", 1, 1, next, count, 0) + b"".join(struct.pack("<QQ", *area) for area in areas)


@pytest.mark.parametrize(
    "reply",
    [
        caps(sparse(0), cap_offset=31),
        caps(sparse(0), cap_offset=44),
        caps(sparse(0), cap_offset=1 << 31),
        caps(sparse(1)),
        caps(sparse(1 << 31, (0, 4096))),
        caps(sparse(1, (0, 0))),
        caps(sparse(1, (0, (1 << 16) + 1))),
        caps(sparse(1, ((1 << 64) - 1, 2))),
        caps(sparse(2, (0, 4096), (4095, 4096))),
        caps(sparse(0, next=32)),
        caps(sparse(1, (0, 4096), next=40)),
        caps(struct.pack("<HHI", 9, 1, 40), struct.pack("<HHI", 9, 1, 32)),
        struct.pack("<IIIIQQ", 1 << 20, 7, 4, 0, 1 << 16, 0),
        b"short",
        struct.pack("<IIIIQQ", 31, 7, 4, 0, 1 << 16, 0),
    ],
)
def test_a_lying_region_info_reply_is_refused(reply: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        payloads.parse_region_info_reply(reply)


def test_unknown_capabilities_are_passed_over() -> None:
    info, _ = payloads.parse_region_info_reply(caps(struct.pack("<HHI", 9, 7, 40), sparse(1, (0, 4096))))
    assert info.areas == (MmapArea(offset=0, size=4096),)


@pytest.mark.parametrize(
    ("payload", "fd_count"),
    [
        (b"", 0),
        (struct.pack("<IIIII", 19, 33, 0, 0, 1), 0),  # argsz
        (struct.pack("<IIIII", 20, 32, 0, 0, 1), 0),  # no data bit
        (struct.pack("<IIIII", 20, 1, 0, 0, 1), 0),  # no action bit
        (struct.pack("<IIIII", 20, 35, 0, 0, 1), 0),  # two data bits
        (struct.pack("<IIIII", 20, 0x19, 0, 0, 1), 0),  # two action bits
        (struct.pack("<IIIII", 20, 0x61, 0, 0, 1), 0),  # unknown bit
        (struct.pack("<IIIII", 20, 33, 0, 0, 1) + b"x", 0),  # NONE with data
        (struct.pack("<IIIII", 20, 34, 0, 0, 2) + b"x", 0),  # one BOOL for two
        (struct.pack("<IIIII", 20, 36, 0, 0, 2) + bytes(4), 2),  # half an array
        (struct.pack("<IIIII", 20, 36, 0, 0, 2), 1),  # one eventfd for two
        (struct.pack("<IIIII", 20, 33, 0, 0, 1), 1),  # NONE with an eventfd
        (struct.pack("<IIIII", 20, 33, 0, 1, 0), 0),  # disable from 1
        (struct.pack("<IIIII", 20, 36, 0, 0, 0), 0),  # no interrupt, eventfds
        (struct.pack("<IIIII", 20, 9, 0, 0, 0), 0),  # no interrupt, mask
    ],
)
def test_a_set_irqs_that_contradicts_itself_is_refused(payload: bytes, fd_count: int) -> None:
    with pytest.raises(MalformedMessageError):
        payloads.parse_set_irqs(payload, fd_count)


@pytest.mark.parametrize("action", list(IrqAction))
@pytest.mark.parametrize("data", list(IrqData))
def test_every_data_goes_with_every_action(data: IrqData, action: IrqAction) -> None:
    bools = (True, False) if data is IrqData.BOOL else ()
    request = SetIrqs(data=data, action=action, index=2, start=1, count=2, bools=bools)
    assert payloads.parse_set_irqs(request.pack(), 2 if data is IrqData.EVENTFD else 0) == request
    assert request.pack()[:20] == struct.pack("<IIIII", 20 + len(bools), data | action, 2, 1, 2)


def test_disabling_a_type_is_count_zero_with_none_and_trigger() -> None:
    request = payloads.parse_set_irqs(struct.pack("<IIIII", 20, 33, 2, 0, 0), 0)
    assert request.disables


@pytest.mark.parametrize(
    ("flags", "offset", "address", "size", "fds"),
    [
        (4, 0, 0, 4096, 0),
        (3, 0, 0, 0, 0),
        (3, 0, (1 << 64) - 4096, 8192, 0),
        (3, 0, 1, 4096, 0),
        (3, 0, 0, 4095, 0),
        (3, 512, 0, 4096, 1),
        (3, (1 << 63) - 4096, 0, 8192, 1),
        (3, 0, 0, 4096, 2),
    ],
)
def test_an_impossible_dma_map_is_refused(flags: int, offset: int, address: int, size: int, fds: int) -> None:
    with pytest.raises(MalformedMessageError):
        payloads.parse_dma_map(struct.pack("<IIQQQ", 32, flags, offset, address, size), fds, 4096)


def test_dma_map_up_to_the_very_end_of_the_address_space_is_accepted() -> None:
    request = payloads.parse_dma_map(struct.pack("<IIQQQ", 32, 1, 0, (1 << 64) - 4096, 4096), 0, 4096)
    assert request.readable
    assert not request.writable


def test_dma_unmap_knows_the_all_flag_alone() -> None:
    assert payloads.parse_dma_unmap(struct.pack("<IIQQ", 24, 2, 0, 0)).flags == payloads.DMA_UNMAP_ALL
    for flags, address in ((2, 4096), (1, 0), (4, 0)):
        with pytest.raises(MalformedMessageError):
            payloads.parse_dma_unmap(struct.pack("<IIQQ", 24, flags, address, 0))


def test_the_argsz_of_every_request_must_cover_its_fixed_part() -> None:
    for parse, size in (
        (payloads.parse_device_info, 16),
        (payloads.parse_irq_info, 16),
        (payloads.parse_region_info_request, 32),
        (payloads.parse_dma_unmap, 24),
    ):
        parse(struct.pack("<I", size) + bytes(size - 4))
        with pytest.raises(MalformedMessageError):
            parse(struct.pack("<I", size - 1) + bytes(size - 4))
        with pytest.raises(MalformedMessageError):
            parse(struct.pack("<I", size) + bytes(size - 5))


def test_reads_and_writes_must_agree_on_their_count() -> None:
    access = struct.Struct("<QII")
    assert payloads.parse_region_read(access.pack(8, 1, 4), 4) == RegionRange(8, 1, 4)
    assert payloads.parse_region_write(access.pack(8, 1, 4) + b"abcd", 4) == (RegionRange(8, 1, 4), b"abcd")
    with pytest.raises(MalformedMessageError) as caught:
        payloads.parse_region_read(access.pack(8, 1, 5), 4)
    assert caught.value.errno == errno.E2BIG
    for bad in (access.pack(8, 1, 4) + b"x", access.pack((1 << 64) - 1, 1, 4), b""):
        with pytest.raises(MalformedMessageError):
            payloads.parse_region_read(bad, 4)
    for bad in (access.pack(8, 1, 4) + b"abc", access.pack(8, 1, 1 << 31), access.pack(8, 1, 5) + b"abcde", b""):
        with pytest.raises(MalformedMessageError):
            payloads.parse_region_write(bad, 4)


def test_write_multi_has_items_of_24_bytes_with_up_to_8_of_data() -> None:
    writes = [RegionWrite(1, 2, b"abc"), RegionWrite(3, 4, b""), RegionWrite(5, 6, b"12345678")]
    data = payloads.encode_region_write_multi(writes)
    assert data[:32] == struct.pack("<QQII", 3, 2, 1, 3) + b"abc" + bytes(5)
    assert payloads.parse_region_write_multi(data) == writes
    for bad in (
        data[:-1],
        data + b"x",
        b"",
        struct.pack("<Q", 1 << 60),
        struct.pack("<QQII", 1, 2, 1, 9) + bytes(8),
        struct.pack("<QQII", 1, (1 << 64) - 1, 1, 2) + bytes(8),
    ):
        with pytest.raises(MalformedMessageError):
            payloads.parse_region_write_multi(bad)


def test_dma_replies_must_repeat_the_request() -> None:
    head = struct.pack("<QQ", 0x1000, 4)
    assert payloads.parse_dma_read_reply(head + b"abcd", 0x1000, 4) == b"abcd"
    for bad in (head + b"abc", head, struct.pack("<QQ", 0x1000, 5) + b"abcd", struct.pack("<QQ", 0x1001, 4) + b"abcd"):
        with pytest.raises(MalformedMessageError):
            payloads.parse_dma_read_reply(bad, 0x1000, 4)


def test_a_dma_write_reply_may_be_as_short_as_qemus() -> None:
    head = struct.pack("<QQ", 0x1000, 4)
    for good in (b"", head, head[:12]):
        payloads.parse_dma_write_reply(good, 0x1000, 4)
    for bad in (head[:8], head + b"x", struct.pack("<QQ", 0x1000, 5)):
        with pytest.raises(MalformedMessageError):
            payloads.parse_dma_write_reply(bad, 0x1000, 4)


def test_flags_have_the_values_of_vfio_h() -> None:
    assert [int(flag) for flag in RegionFlag] == [1, 2, 4, 8]
    assert [int(flag) for flag in payloads.IrqFlag] == [1, 2, 4, 8]
    assert [int(flag) for flag in payloads.DeviceFlag] == [1, 2]
