# SPDX-License-Identifier: Apache-2.0
"""vfio-user parsers: what was encoded comes back, and arbitrary bytes are accepted or refused, nothing else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ism.layout import Struct
from ism.vfio_user import capabilities, map_channel_wire, payloads, wire
from ism.vfio_user.dma import DmaTable
from ism.vfio_user.errors import MalformedMessageError, VfioUserError
from ism.vfio_user.map_channel_wire import Packet, Window
from ism.vfio_user.payloads import IrqAction, IrqData, MmapArea, RegionInfo, RegionRange, RegionWrite, SetIrqs
from ism.vfio_user.wire import MessageReader

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
TABLES = [wire.Header, capabilities.VersionFixed, Packet] + [
    table
    for table in vars(payloads).values()
    if isinstance(table, type) and issubclass(table, Struct) and table is not Struct
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
@given(data=st.data())
def test_every_structure_comes_back_from_its_bytes(table: type[Struct], data: st.DataObject) -> None:
    numbers = {"B": 8, "H": 16, "I": 32, "Q": 64}
    values = {
        row.name: data.draw(
            st.integers(0, (1 << numbers[row.fmt]) - 1) if row.fmt in numbers else st.binary(min_size=8, max_size=8)
        )
        for row in table.FIELDS
    }
    value = table(**values)
    assert table.unpack(value.pack()) == value
    assert wire.codec_of(table).unpack(value.pack()) == tuple(values[row.name] for row in table.FIELDS)


@given(
    messages=st.lists(st.tuples(U16, U16, st.binary(max_size=60), st.integers(0, 2)), max_size=12),
    cuts=st.lists(st.integers(0, 900), max_size=20),
)
def test_a_stream_cut_anywhere_gives_the_same_messages_with_their_descriptors(
    messages: list[tuple[int, int, bytes, int]], cuts: list[int]
) -> None:
    """Pieces end where the kernel ends them: wherever it likes, and after each piece with descriptors."""
    reader: MessageReader[int] = MessageReader(max_message=100, max_fds=2)
    taken = []
    at = 0
    for number, (id, command, payload, fd_count) in enumerate(messages):
        data = wire.encode(id, command, payload)
        bounds = sorted({0, len(data), *(cut - at for cut in cuts if 0 < cut - at < len(data))})
        at += len(data)
        for start, end in pairwise(bounds):
            reader.feed(data[start:end], [number] * fd_count if start == 0 else ())
            while (message := reader.next_message()) is not None:
                taken.append((message.id, message.command, bytes(message.payload), len(message.fds)))
                assert set(message.fds) <= {number}
    assert taken == messages
    assert reader.buffered == 0
    assert reader.abandon() == []


@given(st.lists(st.tuples(st.binary(max_size=80), st.integers(0, 3)), max_size=20))
def test_a_reader_of_arbitrary_bytes_stays_bounded_and_loses_no_descriptor(pieces: list[tuple[bytes, int]]) -> None:
    reader: MessageReader[int] = MessageReader(max_message=64, max_fds=3)
    given_fds = taken_fds = 0
    failure: MalformedMessageError | None = None
    for data, fd_count in pieces:
        reader.feed(data, [7] * fd_count)
        given_fds += fd_count
        try:
            while (message := reader.next_message()) is not None:
                taken_fds += len(message.fds)
        except MalformedMessageError as error:
            failure = error
            break
        assert reader.buffered < 64
    assert failure is None or failure.fatal
    assert taken_fds + len(reader.abandon()) == given_fds


PARSERS: list[Callable[[bytes], Any]] = [
    payloads.parse_device_info,
    payloads.parse_irq_info,
    payloads.parse_region_info_request,
    payloads.parse_region_info_reply,
    payloads.parse_dma_unmap,
    payloads.parse_region_write_multi,
    capabilities.parse_version,
    map_channel_wire.parse_packet,
    lambda data: payloads.parse_set_irqs(data, 1),
    lambda data: payloads.parse_dma_map(data, 1, 4096),
    lambda data: payloads.parse_region_read(data, 100),
    lambda data: payloads.parse_region_write(data, 100),
    lambda data: payloads.parse_dma_read(data, 100),
    lambda data: payloads.parse_dma_write(data, 100),
    lambda data: payloads.parse_dma_read_reply(data, 0, 4),
    lambda data: payloads.parse_dma_write_reply(data, 0, 4),
    lambda data: payloads.parse_region_read_reply(data, RegionRange(0, 0, 4)),
    lambda data: payloads.parse_region_write_reply(data, RegionRange(0, 0, 4)),
    lambda data: map_channel_wire.parse_answer(data, 0, 1, 1),
]

SMALL_WORDS = st.lists(st.one_of(st.integers(0, 80), U32), max_size=24).map(
    lambda words: struct.pack(f"<{len(words)}I", *words)
)


@pytest.mark.parametrize("parse", PARSERS)
@given(data=st.one_of(st.binary(max_size=200), SMALL_WORDS))
def test_a_parser_accepts_or_refuses_and_nothing_else(parse: Callable[[bytes], Any], data: bytes) -> None:
    number = 1
    try:
        parse(data)
    except MalformedMessageError as error:
        number = error.errno
    assert 0 < number < 4096


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes", "write_multiple", "other"])


@given(document=JSON | st.fixed_dictionaries({"capabilities": JSON | st.dictionaries(KEYS, JSON)}))
def test_any_json_is_a_proposal_or_refused(document: Any) -> None:
    payload = struct.pack("<HH", 0, 0) + json.dumps(document).encode() + b"\0"
    try:
        _, _, found = capabilities.parse_version(payload)
    except MalformedMessageError:
        return
    assert 0 <= found.max_msg_fds <= 253
    assert found.max_data_xfer_size >= 1
    assert found.page_size & (found.page_size - 1) == 0
    assert found.page_size >= 1


@given(gaps=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 100)), max_size=20), argsz=st.integers(32, 500))
def test_region_info_comes_back_whole_or_says_what_it_needs(gaps: list[tuple[int, int]], argsz: int) -> None:
    areas, at = [], 0
    for gap, size in gaps:
        areas.append(MmapArea(offset=at + gap, size=size))
        at += gap + size
    info = RegionInfo(index=3, size=at, flags=7, offset=5, areas=tuple(areas))
    data, whole = payloads.encode_region_info(info, argsz)
    found, needed = payloads.parse_region_info_reply(data)
    assert whole == (needed <= argsz)
    assert len(data) <= argsz
    if whole:
        assert found == info
    else:
        again, whole = payloads.encode_region_info(info, needed)
        assert whole
        assert payloads.parse_region_info_reply(again)[0] == info


@given(
    data=st.sampled_from(IrqData),
    action=st.sampled_from(IrqAction),
    index=U32,
    start=U32,
    bools=st.lists(st.booleans()),
)
def test_set_irqs_comes_back(data: IrqData, action: IrqAction, index: int, start: int, bools: list[bool]) -> None:
    count = len(bools)
    request = SetIrqs(
        data=data,
        action=action,
        index=index,
        start=start,
        count=count,
        bools=tuple(bools) if data is IrqData.BOOL else (),
    )
    if count:
        assert payloads.parse_set_irqs(request.pack(), count if data is IrqData.EVENTFD else 0) == request


@given(st.lists(st.builds(RegionWrite, U32, st.integers(0, (1 << 64) - 9), st.binary(max_size=8)), max_size=20))
def test_writes_in_one_message_come_back(writes: list[RegionWrite]) -> None:
    assert payloads.parse_region_write_multi(payloads.encode_region_write_multi(writes)) == writes


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "find"]), st.integers(0, 30), st.integers(0, 12))))
def test_the_dma_table_agrees_with_a_plain_list(steps: list[tuple[str, int, int]]) -> None:
    table: DmaTable[int] = DmaTable(4)
    model: list[tuple[int, int]] = []
    for verb, address, size in steps:
        overlap = any(a < address + size and address < a + s for a, s in model)
        if verb == "add":
            try:
                table.add(address, size, address)
                assert size
                assert not overlap
                assert len(model) < 4
                model.append((address, size))
            except VfioUserError:
                assert not size or overlap or len(model) == 4
        elif verb == "remove":
            try:
                table.remove(address, size)
                model.remove((address, size))
            except VfioUserError:
                assert (address, size) not in model
        else:
            inside = [(a, s) for a, s in model if a <= address < a + s and address + size <= a + s]
            found = table.find(address, size)
            if size:
                assert (found is not None) == bool(inside)
        assert [(entry.address, entry.size) for entry in table] == sorted(model)


PAGES = st.one_of(st.integers(0, 40).map(lambda n: n * 4096), U64)


@given(
    type=st.integers(0, 7),
    offset=PAGES,
    length=PAGES,
    file_offset=PAGES,
    rights=st.integers(0, 4),
    fd_count=st.integers(0, 2),
)
def test_a_map_request_that_is_accepted_lies_inside_the_window(
    type: int, offset: int, length: int, file_offset: int, rights: int, fd_count: int
) -> None:
    packet = Packet(type=type, sequence=1, offset=offset, length=length, file_offset=file_offset, rights=rights)
    window = Window(4096, 32 * 4096)
    assert map_channel_wire.parse_packet(packet.pack()) == packet
    try:
        map_channel_wire.check_request(packet, fd_count, window)
    except MalformedMessageError:
        return
    assert fd_count == (1 if type in (2, 4) else 0)
    if type in (2, 3):
        assert offset % 4096 == length % 4096 == file_offset % 4096 == 0
        assert length > 0
        assert offset + length <= window.length
