# SPDX-License-Identifier: Apache-2.0
"""What vfio-user messages carry: one table per structure, one parser and one encoder per message.

Owns the layouts and every check that needs no knowledge of the device: sizes, counts, flags, overflow. Never looks at a
header (`wire`) and never at device state. Follows the vfio-user specification and, for the structures it borrows,
the Linux header vfio.h. Whatever is parsed here comes from the other side and may lie: a parser returns checked
values or raises `MalformedMessageError` with the errno an error reply should carry.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

from ism.layout import Buffer, Struct, field
from ism.vfio_user.errors import MalformedMessageError
from ism.vfio_user.wire import FdLike, codec_of

U64: Final = 1 << 64


class DeviceFlag(enum.IntFlag):
    """Flags of `DeviceInfo` (vfio.h VFIO_DEVICE_FLAGS_*)."""

    RESET = 1
    PCI = 2


class RegionFlag(enum.IntFlag):
    """Flags of a region (vfio.h VFIO_REGION_INFO_FLAG_*). CAPS is set and read by the codec alone."""

    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


class IrqFlag(enum.IntFlag):
    """Flags of `IrqInfo` (vfio.h VFIO_IRQ_INFO_*)."""

    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4
    NORESIZE = 8


class IrqData(enum.IntEnum):
    """What a SET_IRQS message carries for each interrupt (vfio.h VFIO_IRQ_SET_DATA_*)."""

    NONE = 1
    BOOL = 2
    EVENTFD = 4


class IrqAction(enum.IntEnum):
    """What a SET_IRQS message does, or announces by eventfd (vfio.h VFIO_IRQ_SET_ACTION_*)."""

    MASK = 8
    UNMASK = 16
    TRIGGER = 32


DMA_MAP_READ: Final = 1
DMA_MAP_WRITE: Final = 2
DMA_UNMAP_ALL: Final = 2
"""Flag of DMA_UNMAP (vfio.h VFIO_DMA_UNMAP_FLAG_ALL): every map, address and size 0."""

CAP_SPARSE_MMAP: Final = 1
MAX_REGION_INFO: Final = 1 << 16
"""Longest region information a client accepts, bytes: room for about 4000 areas."""

MULTI_WRITE_DATA: Final = 8


class DeviceInfo(Struct, size=16):
    """DEVICE_GET_INFO, request and reply."""

    argsz: int = field("I", 0, "request: reply bytes accepted; reply: bytes needed", default=16)
    flags: int = field("I", 4, "DeviceFlag bits")
    num_regions: int = field("I", 8, "regions, indices 0..n-1")
    num_irqs: int = field("I", 12, "interrupt types, indices 0..n-1")


class RegionInfoFixed(Struct, size=32):
    """DEVICE_GET_REGION_INFO, request, and the reply before its capabilities."""

    argsz: int = field("I", 0, "request: reply bytes accepted; reply: bytes needed", default=32)
    flags: int = field("I", 4, "RegionFlag bits")
    index: int = field("I", 8, "region index")
    cap_offset: int = field("I", 12, "offset of the first capability from the start of this structure, 0 = none")
    size: int = field("Q", 16, "bytes; 0 = the region does not exist")
    offset: int = field("Q", 24, "added to an area's offset to get the file offset to mmap")


class CapHeader(Struct, size=8):
    """Start of a capability of a region."""

    id: int = field("H", 0, "1 = sparse mmap")
    version: int = field("H", 2, "of the capability")
    next: int = field("I", 4, "offset of the next capability from the start of RegionInfoFixed, 0 = last")


class SparseHeader(Struct, size=8):
    """Sparse mmap capability after its CapHeader; the areas follow."""

    nr_areas: int = field("I", 0, "areas that follow")


class SparseArea(Struct, size=16):
    """One part of a region that may be mapped."""

    offset: int = field("Q", 0, "within the region, bytes")
    size: int = field("Q", 8, "bytes")


class IrqInfo(Struct, size=16):
    """DEVICE_GET_IRQ_INFO, request and reply."""

    argsz: int = field("I", 0, "request: reply bytes accepted; reply: bytes needed", default=16)
    flags: int = field("I", 4, "IrqFlag bits")
    index: int = field("I", 8, "interrupt type")
    count: int = field("I", 12, "interrupts of this type")


class IrqSetFixed(Struct, size=20):
    """DEVICE_SET_IRQS before its data; the eventfds travel as descriptors."""

    argsz: int = field("I", 0, "payload bytes")
    flags: int = field("I", 4, "one IrqData bit and one IrqAction bit")
    index: int = field("I", 8, "interrupt type")
    start: int = field("I", 12, "first interrupt")
    count: int = field("I", 16, "interrupts; 0 with NONE and TRIGGER = disable the type")


class DmaMap(Struct, size=32):
    """DMA_MAP, request; the reply is empty."""

    argsz: int = field("I", 0, "size of this structure", default=32)
    flags: int = field("I", 4, "bit 0 the server may read, bit 1 it may write")
    offset: int = field("Q", 8, "in the file of the descriptor sent along, bytes; 0 without one")
    address: int = field("Q", 16, "where the device sees it")
    size: int = field("Q", 24, "bytes")

    @property
    def readable(self) -> bool:
        """Whether the server may read it."""
        return bool(self.flags & DMA_MAP_READ)

    @property
    def writable(self) -> bool:
        """Whether the server may write it."""
        return bool(self.flags & DMA_MAP_WRITE)


class DmaUnmap(Struct, size=24):
    """DMA_UNMAP, request; the reply repeats it."""

    argsz: int = field("I", 0, "reply bytes accepted", default=24)
    flags: int = field("I", 4, "0, or bit 1: every map")
    address: int = field("Q", 8, "exactly that of a map")
    size: int = field("Q", 16, "exactly that of the map")


class RegionAccess(Struct, size=16):
    """REGION_READ and REGION_WRITE, both ways; data follows in the read reply and in the write request."""

    offset: int = field("Q", 0, "within the region, bytes")
    region: int = field("I", 8, "region index")
    count: int = field("I", 12, "bytes of data")


class DmaAccess(Struct, size=16):
    """DMA_READ and DMA_WRITE, both ways; data follows in the read reply and in the write request."""

    address: int = field("Q", 0, "within a DMA map")
    count: int = field("Q", 8, "bytes of data")


class MultiWriteCount(Struct, size=8):
    """REGION_WRITE_MULTI: start of the request, and the reply."""

    wr_cnt: int = field("Q", 0, "writes that follow; in the reply, writes made")


class MultiWriteItem(Struct, size=24):
    """REGION_WRITE_MULTI: one write."""

    offset: int = field("Q", 0, "within the region, bytes")
    region: int = field("I", 8, "region index")
    count: int = field("I", 12, "bytes of data used, 0..8")
    data: bytes = field("8s", 16, "data, zero-padded")


REGION_ACCESS: Final = codec_of(RegionAccess)
DMA_ACCESS: Final = codec_of(DmaAccess)
_MULTI_ITEM: Final = codec_of(MultiWriteItem)


class RegionRange(NamedTuple):
    """`size` bytes at `offset` of a region, known not to wrap. Whether the region has them is not known here."""

    offset: int
    region: int
    size: int


class RegionWrite(NamedTuple):
    """One write of REGION_WRITE or REGION_WRITE_MULTI."""

    region: int
    offset: int
    data: bytes


@dataclass(frozen=True, kw_only=True)
class MmapArea:
    """Part of a region that may be mapped: `offset` within the region and `size`, bytes."""

    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class RegionInfo:
    """A region.

    Attributes: `index`; `size` bytes (0 = none); `flags`; `offset` (file offset of the region's start in `fd`);
    `areas` (the parts that may be mapped; empty with the MMAP flag = all of it); `fd` (a server borrows it from its
    handler; None without MMAP).
    """

    index: int
    size: int = 0
    flags: int = 0
    offset: int = 0
    areas: tuple[MmapArea, ...] = ()
    fd: FdLike | None = None


@dataclass(frozen=True, kw_only=True)
class SetIrqs:
    """A checked SET_IRQS request. `bools` has `count` items when `data` is BOOL, else it is empty."""

    data: IrqData
    action: IrqAction
    index: int
    start: int = 0
    count: int = 0
    bools: tuple[bool, ...] = ()

    @property
    def disables(self) -> bool:
        """Whether it disables all interrupts of the type (count 0, NONE, TRIGGER)."""
        return self.count == 0

    def pack(self) -> bytes:
        """The payload. The eventfds are not part of it."""
        tail = bytes(self.bools)
        fixed = IrqSetFixed(
            argsz=IrqSetFixed.SIZE + len(tail),
            flags=int(self.data) | int(self.action),
            index=self.index,
            start=self.start,
            count=self.count,
        )
        return fixed.pack() + tail


S = TypeVar("S", bound=Struct)


def _fixed(table: type[S], payload: Buffer, what: str) -> S:
    if len(payload) < table.SIZE:
        raise MalformedMessageError(f"{what}: payload of {len(payload)} bytes, {table.SIZE} needed")
    return table.unpack(payload)


def _with_argsz(table: type[S], payload: Buffer, what: str) -> S:
    value = _fixed(table, payload, what)
    argsz: int = value.argsz  # type: ignore[attr-defined]
    if argsz < table.SIZE:
        raise MalformedMessageError(f"{what}: argsz {argsz}, at least {table.SIZE} needed")
    return value


def parse_device_info(payload: Buffer) -> DeviceInfo:
    """DEVICE_GET_INFO, either way. Raises MalformedMessageError when short, or argsz is."""
    return _with_argsz(DeviceInfo, payload, "DEVICE_GET_INFO")


def parse_irq_info(payload: Buffer) -> IrqInfo:
    """DEVICE_GET_IRQ_INFO, either way. Raises MalformedMessageError when short, or argsz is."""
    return _with_argsz(IrqInfo, payload, "DEVICE_GET_IRQ_INFO")


def parse_region_info_request(payload: Buffer) -> RegionInfoFixed:
    """DEVICE_GET_REGION_INFO request. Raises MalformedMessageError when short, or argsz is less than the fixed part."""
    return _with_argsz(RegionInfoFixed, payload, "DEVICE_GET_REGION_INFO")


def encode_region_info(info: RegionInfo, argsz: int) -> tuple[bytes, bool]:
    """DEVICE_GET_REGION_INFO reply.

    Args:
        argsz: what the client accepts, at least 32.
    Returns: the payload, and whether it is all of it. When `argsz` is too small it is the fixed part alone, without
        the capability flag and to be sent without the descriptor, but with the size needed in its argsz.
    """
    areas = info.areas if info.flags & RegionFlag.MMAP else ()
    caps = b""
    if areas:
        caps = CapHeader(id=CAP_SPARSE_MMAP, version=1, next=0).pack() + SparseHeader(nr_areas=len(areas)).pack()
        caps += b"".join(SparseArea(offset=area.offset, size=area.size).pack() for area in areas)
    needed = RegionInfoFixed.SIZE + len(caps)
    whole = needed <= argsz
    with_caps = bool(caps) and whole
    fixed = RegionInfoFixed(
        argsz=needed,
        flags=(info.flags & ~RegionFlag.CAPS) | (RegionFlag.CAPS if with_caps else 0),
        index=info.index,
        cap_offset=RegionInfoFixed.SIZE if with_caps else 0,
        size=info.size,
        offset=info.offset,
    )
    return fixed.pack() + (caps if with_caps else b""), whole


def parse_region_info_reply(payload: Buffer) -> tuple[RegionInfo, int]:
    """DEVICE_GET_REGION_INFO reply.

    Returns: the region without its descriptor, and the argsz needed for all of it (more than the payload: ask again).
    Raises: MalformedMessageError for a chain that leaves the payload or turns back, areas that leave the region,
        overlap or are empty.
    """
    fixed = _with_argsz(RegionInfoFixed, payload, "region info")
    if fixed.argsz > MAX_REGION_INFO:
        raise MalformedMessageError(f"region info of {fixed.argsz} bytes; at most {MAX_REGION_INFO} are accepted")
    areas: tuple[MmapArea, ...] = ()
    if fixed.flags & RegionFlag.CAPS and fixed.argsz <= len(payload):
        areas = _parse_caps(payload, fixed)
    info = RegionInfo(
        index=fixed.index,
        size=fixed.size,
        flags=fixed.flags & ~RegionFlag.CAPS,
        offset=fixed.offset,
        areas=areas,
    )
    return info, fixed.argsz


def _parse_caps(payload: Buffer, fixed: RegionInfoFixed) -> tuple[MmapArea, ...]:
    areas: list[MmapArea] = []
    at, end = fixed.cap_offset, RegionInfoFixed.SIZE
    while at:
        if at < end or at + CapHeader.SIZE > len(payload):
            raise MalformedMessageError(f"region capability at {at}, outside [{end}, {len(payload)}) or backwards")
        header = CapHeader.unpack(payload, at)
        end = at + CapHeader.SIZE
        if header.id == CAP_SPARSE_MMAP and header.version == 1:
            if end + SparseHeader.SIZE > len(payload):
                raise MalformedMessageError("sparse mmap capability ends beyond the message")
            count = SparseHeader.unpack(payload, end).nr_areas
            end += SparseHeader.SIZE
            if count > (len(payload) - end) // SparseArea.SIZE:
                raise MalformedMessageError(f"{count} sparse areas do not fit into {len(payload) - end} bytes")
            for _ in range(count):
                area = SparseArea.unpack(payload, end)
                end += SparseArea.SIZE
                areas.append(MmapArea(offset=area.offset, size=area.size))
        at = header.next
    areas.sort(key=lambda area: area.offset)
    last = 0
    for item in areas:
        if item.size == 0 or item.offset < last or item.offset + item.size > fixed.size:
            raise MalformedMessageError(
                f"sparse area of {item.size:#x} bytes at {item.offset:#x} is empty, overlaps another or leaves the "
                f"region of {fixed.size:#x} bytes"
            )
        last = item.offset + item.size
    return tuple(areas)


def parse_set_irqs(payload: Buffer, fd_count: int) -> SetIrqs:
    """DEVICE_SET_IRQS request.

    Args:
        fd_count: descriptors that came with it: none, or one per interrupt.
    Raises: MalformedMessageError for anything but one data and one action bit, a size that does not fit them, a start
        without a count, or descriptors that do not fit.
    """
    fixed = _with_argsz(IrqSetFixed, payload, "DEVICE_SET_IRQS")
    try:
        data, action = IrqData(fixed.flags & 0x7), IrqAction(fixed.flags & ~0x7)
    except ValueError:
        raise MalformedMessageError(
            f"DEVICE_SET_IRQS flags {fixed.flags:#x}: one data bit and one action bit needed"
        ) from None
    tail = len(payload) - IrqSetFixed.SIZE
    if data is IrqData.BOOL:
        fits = tail == fixed.count
    elif data is IrqData.EVENTFD:
        fits = tail in (0, 4 * fixed.count)  # some clients leave the array of the ioctl in
    else:
        fits = tail == 0
    if not fits:
        raise MalformedMessageError(f"DEVICE_SET_IRQS: {tail} bytes of {data.name} data for {fixed.count} interrupts")
    if fixed.count == 0 and (fixed.start or data is not IrqData.NONE or action is not IrqAction.TRIGGER):
        raise MalformedMessageError("DEVICE_SET_IRQS: count 0 goes with start 0, NONE and TRIGGER only")
    if fd_count and (data is not IrqData.EVENTFD or fd_count != fixed.count):
        raise MalformedMessageError(f"DEVICE_SET_IRQS: {fd_count} descriptors for {fixed.count} {data.name} interrupts")
    bools: tuple[bool, ...] = ()
    if data is IrqData.BOOL:
        bools = tuple(bool(octet) for octet in memoryview(payload)[IrqSetFixed.SIZE :])
    return SetIrqs(data=data, action=action, index=fixed.index, start=fixed.start, count=fixed.count, bools=bools)


def parse_dma_map(payload: Buffer, fd_count: int, page_size: int) -> DmaMap:
    """DMA_MAP request.

    Args:
        fd_count: descriptors that came with it, at most 1.
        page_size: smallest page size both sides agreed on.
    Raises: MalformedMessageError for unknown flags, an empty, wrapping or unaligned range, or surplus descriptors.
    """
    request = _with_argsz(DmaMap, payload, "DMA_MAP")
    if request.flags & ~(DMA_MAP_READ | DMA_MAP_WRITE):
        raise MalformedMessageError(f"DMA_MAP flags {request.flags:#x}: only read (1) and write (2) are known")
    if request.size == 0 or request.address + request.size > U64 or request.offset + request.size > U64 >> 1:
        raise MalformedMessageError(f"DMA_MAP of {request.size:#x} bytes at {request.address:#x} is empty or wraps")
    if (request.address | request.size | request.offset) % page_size:
        raise MalformedMessageError(
            f"DMA_MAP of {request.size:#x} bytes at {request.address:#x}, file offset {request.offset:#x}: "
            f"not aligned to {page_size}"
        )
    if fd_count > 1:
        raise MalformedMessageError(f"DMA_MAP with {fd_count} descriptors, at most 1")
    return request


def parse_dma_unmap(payload: Buffer) -> DmaUnmap:
    """DMA_UNMAP, either way. Raises MalformedMessageError for unknown flags, or the all flag with a range."""
    request = _with_argsz(DmaUnmap, payload, "DMA_UNMAP")
    if request.flags & ~DMA_UNMAP_ALL:
        raise MalformedMessageError(f"DMA_UNMAP flags {request.flags:#x}: only all (2) is known", errno=errno.ENOTSUP)
    if request.flags and (request.address or request.size):
        raise MalformedMessageError("DMA_UNMAP of all maps goes with address and size 0")
    return request


def _checked_range(offset: int, region: int, count: int, limit: int, what: str) -> RegionRange:
    if count > limit:
        raise MalformedMessageError(f"{what} of {count} bytes; at most {limit} are accepted", errno=errno.E2BIG)
    if offset + count > U64:
        raise MalformedMessageError(f"{what} of {count} bytes at {offset:#x} wraps")
    return RegionRange(offset, region, count)


def parse_region_read(payload: Buffer, limit: int) -> RegionRange:
    """REGION_READ request of at most `limit` bytes. Raises MalformedMessageError."""
    if len(payload) != RegionAccess.SIZE:
        raise MalformedMessageError(f"REGION_READ: payload of {len(payload)} bytes, {RegionAccess.SIZE} expected")
    offset, region, count = REGION_ACCESS.unpack(payload)
    return _checked_range(offset, region, count, limit, "REGION_READ")


def parse_region_write(payload: Buffer, limit: int) -> tuple[RegionRange, bytes]:
    """REGION_WRITE request of at most `limit` bytes, with its data. Raises MalformedMessageError."""
    if len(payload) < RegionAccess.SIZE:
        raise MalformedMessageError(f"REGION_WRITE: payload of {len(payload)} bytes, {RegionAccess.SIZE} needed")
    offset, region, count = REGION_ACCESS.unpack_from(payload)
    if len(payload) != RegionAccess.SIZE + count:
        raise MalformedMessageError(
            f"REGION_WRITE: count {count} with {len(payload) - RegionAccess.SIZE} bytes of data"
        )
    return _checked_range(offset, region, count, limit, "REGION_WRITE"), bytes(payload[RegionAccess.SIZE :])


def parse_region_write_multi(payload: Buffer) -> list[RegionWrite]:
    """REGION_WRITE_MULTI request. Raises MalformedMessageError unless the count fits and every write has 0..8 bytes."""
    count = _fixed(MultiWriteCount, payload, "REGION_WRITE_MULTI").wr_cnt
    if len(payload) != MultiWriteCount.SIZE + count * MultiWriteItem.SIZE:
        raise MalformedMessageError(f"REGION_WRITE_MULTI: {count} writes in {len(payload)} bytes")
    writes = []
    for offset, region, length, data in _MULTI_ITEM.iter_unpack(memoryview(payload)[MultiWriteCount.SIZE :]):
        if length > MULTI_WRITE_DATA:
            raise MalformedMessageError(f"REGION_WRITE_MULTI: one write of {length} bytes, at most {MULTI_WRITE_DATA}")
        if offset + length > U64:
            raise MalformedMessageError(f"REGION_WRITE_MULTI: one write of {length} bytes at {offset:#x} wraps")
        writes.append(RegionWrite(region, offset, data[:length]))
    return writes


def encode_region_write_multi(writes: Sequence[RegionWrite]) -> bytes:
    """REGION_WRITE_MULTI request. Raises `struct.error` for a number out of range; data is at most 8 bytes each."""
    assert all(len(write.data) <= MULTI_WRITE_DATA for write in writes)
    return MultiWriteCount(wr_cnt=len(writes)).pack() + b"".join(
        _MULTI_ITEM.pack(write.offset, write.region, len(write.data), write.data) for write in writes
    )


def parse_dma_read(payload: Buffer, limit: int) -> tuple[int, int]:
    """DMA_READ request: address and count, at most `limit`. Raises MalformedMessageError."""
    if len(payload) != DmaAccess.SIZE:
        raise MalformedMessageError(f"DMA_READ: payload of {len(payload)} bytes, {DmaAccess.SIZE} expected")
    address, count = DMA_ACCESS.unpack(payload)
    return _checked_range(address, 0, count, limit, "DMA_READ")[::2]


def parse_dma_write(payload: Buffer, limit: int) -> tuple[int, bytes]:
    """DMA_WRITE request: address and data, at most `limit` bytes. Raises MalformedMessageError."""
    if len(payload) < DmaAccess.SIZE:
        raise MalformedMessageError(f"DMA_WRITE: payload of {len(payload)} bytes, {DmaAccess.SIZE} needed")
    address, count = DMA_ACCESS.unpack_from(payload)
    if len(payload) != DmaAccess.SIZE + count:
        raise MalformedMessageError(f"DMA_WRITE: count {count} with {len(payload) - DmaAccess.SIZE} bytes of data")
    _checked_range(address, 0, count, limit, "DMA_WRITE")
    return address, bytes(payload[DmaAccess.SIZE :])


def parse_dma_read_reply(payload: Buffer, address: int, count: int) -> bytes:
    """DMA_READ reply: the data. Raises MalformedMessageError unless it repeats the request and has all the data."""
    if len(payload) != DmaAccess.SIZE + count or DMA_ACCESS.unpack_from(payload) != (address, count):
        raise MalformedMessageError(f"DMA_READ reply does not answer a read of {count} bytes at {address:#x}")
    return bytes(payload[DmaAccess.SIZE :])


def parse_dma_write_reply(payload: Buffer, address: int, count: int) -> None:
    """DMA_WRITE reply.

    The specification gives the count 8 bytes in one place and 4 in another, and QEMU sends the header alone: all three
    are accepted. Raises MalformedMessageError when what is there does not repeat the request.
    """
    whole = DMA_ACCESS.pack(address, count)
    if bytes(payload) not in (b"", whole, whole[:12]):
        raise MalformedMessageError(f"DMA_WRITE reply does not answer a write of {count} bytes at {address:#x}")


def parse_region_read_reply(payload: Buffer, wanted: RegionRange) -> bytes:
    """REGION_READ reply: the data. Raises MalformedMessageError unless it repeats the request and has all the data."""
    if len(payload) != RegionAccess.SIZE + wanted.size or REGION_ACCESS.unpack_from(payload) != wanted:
        raise MalformedMessageError(
            f"REGION_READ reply does not answer a read of {wanted.size} bytes at {wanted.offset:#x} of region "
            f"{wanted.region}"
        )
    return bytes(payload[RegionAccess.SIZE :])


def parse_region_write_reply(payload: Buffer, wanted: RegionRange) -> None:
    """REGION_WRITE reply. Raises MalformedMessageError unless it repeats the request."""
    if len(payload) != RegionAccess.SIZE or REGION_ACCESS.unpack_from(payload) != wanted:
        raise MalformedMessageError(
            f"REGION_WRITE reply does not answer a write of {wanted.size} bytes at {wanted.offset:#x} of region "
            f"{wanted.region}"
        )
