# SPDX-License-Identifier: Apache-2.0
"""Whatever a device writes, the driver accepts it or raises a documented error, in bounded time."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from ism.driver.capabilities import Capabilities, find, identify
from ism.driver.control import ControlQueue, Placement
from ism.driver.events import Event, parse
from ism.driver.virtqueue import VirtQueue
from ism.errors import DeviceError, FeatureMismatchError, RemoteProtocolError
from ism.ids import Token
from ism.testing.scripted import QueueMemory, ScriptedDevice
from ism.virtio.ism_spec import Ack, AllocReply, Area, Permission
from ism.virtio.pci import CfgType, VirtioPciCap64
from ism.virtio.queue import USED_RING, UsedElem

U64 = st.integers(0, (1 << 64) - 1)


class Function:
    name = "random"

    def __init__(self, config: bytes, sizes: list[int]) -> None:
        self.config, self.sizes = config, sizes

    def config_read(self, offset: int, length: int) -> bytes:
        return self.config[offset : offset + length]

    def bar_size(self, bar: int) -> int:
        return self.sizes[bar]


SIZES = st.lists(st.sampled_from([0, 4096, 1 << 20, 1 << 40]), min_size=6, max_size=6)


def look(config: bytes, sizes: list[int]) -> None:
    function = Function(config, sizes)
    try:
        identify(function)
        caps = find(function)
    except (FeatureMismatchError, RemoteProtocolError):
        return
    assert isinstance(caps, Capabilities)
    for place in (caps.common, caps.notify, caps.isr, caps.device, caps.regions, caps.doorbells):
        assert place.length > 0
        assert place.offset + place.length <= sizes[place.bar]


@given(st.binary(max_size=256), SIZES)
def test_random_configuration_space_is_understood_or_refused(config: bytes, sizes: list[int]) -> None:
    look(config, sizes)


@st.composite
def plausible(draw: st.DrawFn) -> bytes:
    """Capabilities of the right kinds with random contents, chained at random places."""
    config = bytearray(draw(st.binary(min_size=256, max_size=256)))
    struct.pack_into("<HHHH", config, 0, 0x1AF4, 0x106C, 0, 0x10)
    kinds = [CfgType.COMMON_CFG, CfgType.NOTIFY_CFG, CfgType.ISR_CFG, CfgType.DEVICE_CFG]
    caps = [(kind, 0) for kind in kinds] + [(CfgType.SHARED_MEMORY_CFG, 1), (CfgType.SHARED_MEMORY_CFG, 2)]
    places = draw(st.permutations(range(0x40, 0xF0, 24)))[: len(caps)]
    small = st.integers(0, 4096)
    config[0x34] = places[0]
    for index, (kind, shmid) in enumerate(caps):
        following = places[index + 1] if index + 1 < len(caps) else draw(st.sampled_from([0, *places]))
        VirtioPciCap64(
            cap_next=following,
            cap_len=draw(st.sampled_from([24, 24, 24, 16, 20, 3, 255])),
            cfg_type=kind,
            bar=draw(st.integers(0, 7)) & draw(st.sampled_from([0, 7])),
            id=shmid,
            offset=draw(small),
            length=draw(small),
            offset_hi=draw(st.sampled_from([0, 0, 1, 0xFFFFFFFF])),
            length_hi=draw(st.sampled_from([0, 0, 1, 0xFFFFFFFF])),
        ).pack_into(config, places[index])
    return bytes(config)


@given(plausible(), SIZES)
def test_plausible_capabilities_are_understood_or_refused(config: bytes, sizes: list[int]) -> None:
    look(config, sizes)


@given(st.binary(max_size=64))
def test_events_are_understood_or_ignored(raw: bytes) -> None:
    event = parse(raw)
    assert event is None or isinstance(event, Event)


# -- replies


def ask(replies: list[bytes], written: list[int | None]) -> None:
    """Ask a device that answers with these bytes, and says that it has written this many, for a region."""
    memory = QueueMemory()
    script = list(zip(replies, written, strict=True))

    def notify() -> None:
        for chain in device.take():
            reply, length = script.pop(0) if script else (bytes([Ack.OK]), None)
            reply = reply[: chain.capacity]
            memory.at(chain.writable_iova, len(reply))[:] = reply
            device.give_back(chain.head, len(reply) if length is None else length)

    queue = ControlQueue(memory, 8, notify, poll=lambda: queue.reap())
    device = ScriptedDevice(memory, queue.queue)
    for call in (lambda: queue.alloc(4096), lambda: queue.attach(Token(1), Permission(0))):
        try:
            placement = call()
        except (DeviceError, RemoteProtocolError):
            continue
        assert isinstance(placement, Placement)
        assert placement.areas
    queue.close()
    assert memory.buffers == {}


LENGTHS = st.none() | st.integers(0, 600) | st.sampled_from([0xFFFFFFFF, 1 << 31])


@st.composite
def replies(draw: st.DrawFn) -> bytes:
    ack = draw(st.sampled_from([*Ack, 1, 77]))
    areas = draw(st.lists(st.tuples(U64, U64), max_size=35))
    num = draw(st.sampled_from([len(areas), len(areas), 0, 31, 40, 600, 1 << 20, (1 << 20) + 1, (1 << 64) - 1]))
    whole = AllocReply(token=draw(U64), num=num).pack() + b"".join(Area(offset=a, size=b).pack() for a, b in areas)
    return bytes([ack]) + whole[: draw(st.integers(0, len(whole))) if draw(st.booleans()) else len(whole)]


@settings(deadline=None)
@given(st.lists(st.tuples(replies() | st.binary(max_size=600), LENGTHS), min_size=1, max_size=8))
def test_every_reply_is_a_placement_or_a_documented_error(script: list[tuple[bytes, int | None]]) -> None:
    ask([reply for reply, _ in script], [length for _, length in script])


# -- used rings


@settings(deadline=None)
@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.integers(0, 9) | st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1)), max_size=8),
    st.integers(0, 0xFFFF) | st.integers(0, 8),
    st.booleans(),
)
def test_a_used_ring_is_believed_only_as_far_as_it_is_possible(
    under_way: int, elements: list[tuple[int, int]], used_idx: int, with_readable: bool
) -> None:
    memory = QueueMemory()
    queue = VirtQueue(memory, 8, slots=4, out_size=16 if with_readable else 0, in_size=32)
    device = ScriptedDevice(memory, queue)
    slots = {queue.free.pop() for _ in range(under_way)}
    for slot in slots:
        queue.submit(slot, b"x" if with_readable else b"", 32)
    for index, (head, written) in enumerate(elements):
        memory.at(queue.device + USED_RING + UsedElem.SIZE * index, UsedElem.SIZE)[:] = UsedElem(
            id=head, len=written
        ).pack()
    device.publish(used_idx)
    try:
        done = queue.reap()
    except RemoteProtocolError:
        return
    assert len(done) == used_idx <= under_way
    returned = [used.slot for used in done]
    assert len(set(returned)) == len(returned)
    assert set(returned) <= slots
    for used in done:
        assert len(queue.written(used.slot, used.written)) <= 32
