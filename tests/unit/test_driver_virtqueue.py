# SPDX-License-Identifier: Apache-2.0
"""The driver's side of a queue against a device that does as it should, and against one that lies."""

from __future__ import annotations

import struct

import pytest

from ism.driver.virtqueue import VirtQueue, usable_entries
from ism.errors import RemoteProtocolError
from ism.testing.scripted import QueueMemory, ScriptedDevice
from ism.virtio.queue import USED_F_NO_NOTIFY


class Rig:
    def __init__(self, size: int = 8, *, slots: int = 4, out_size: int = 16, in_size: int = 32) -> None:
        self.memory = QueueMemory()
        self.queue = VirtQueue(self.memory, size, slots=slots, out_size=out_size, in_size=in_size)
        self.device = ScriptedDevice(self.memory, self.queue)

    def submit(self, readable: bytes = b"hello", writable: int = 32) -> int:
        slot = self.queue.free.pop()
        self.queue.submit(slot, readable, writable)
        return slot


def test_areas_are_aligned_as_the_specification_demands_and_do_not_overlap() -> None:
    for size in (2, 4, 64, 256):
        queue = Rig(size, slots=1).queue
        assert queue.desc % 16 == queue.driver % 2 == queue.device % 4 == 0
        assert queue.desc + 16 * size <= queue.driver
        assert queue.driver + 6 + 2 * size <= queue.device


def test_a_command_goes_out_and_its_reply_comes_back() -> None:
    rig = Rig()
    slot = rig.submit(b"question")
    (chain,) = rig.device.take()
    assert (chain.readable, chain.capacity) == (b"question", 32)
    assert rig.queue.reap() == []
    rig.device.answer(chain, b"answer")
    (used,) = rig.queue.reap()
    assert (used.slot, used.written) == (slot, 6)
    assert rig.queue.written(slot, used.written) == b"answer"
    rig.queue.release(slot)
    assert slot in rig.queue.free


def test_chains_may_come_back_in_any_order() -> None:
    rig = Rig()
    slots = [rig.submit(bytes([number])) for number in range(4)]
    chains = rig.device.take()
    for chain in reversed(chains):
        rig.device.answer(chain, chain.readable)
    used = rig.queue.reap()
    assert [entry.slot for entry in used] == slots[::-1]
    assert [rig.queue.written(entry.slot, 1)[0] for entry in used] == [3, 2, 1, 0]


def test_a_queue_without_readable_part_posts_buffers_of_one_descriptor() -> None:
    rig = Rig(4, slots=4, out_size=0)
    for _ in range(4):
        rig.submit(b"")
    chains = rig.device.take()
    assert sorted(chain.head for chain in chains) == [0, 1, 2, 3]
    assert all(not chain.readable and chain.capacity == 32 for chain in chains)
    rig.device.answer(chains[2], b"event")
    (used,) = rig.queue.reap()
    assert rig.queue.written(used.slot, used.written) == b"event"


def test_indices_wrap_around_at_65536() -> None:
    rig = Rig(2, slots=1)
    for number in range(0x10000 + 5):
        slot = rig.submit(b"x")
        (chain,) = rig.device.take()
        rig.device.give_back(chain.head, 0)
        (used,) = rig.queue.reap()
        assert used.slot == slot, number
        rig.queue.release(slot)


def test_a_device_that_polls_is_not_notified() -> None:
    rig = Rig()
    assert rig.queue.submit(rig.queue.free.pop(), b"a", 1)
    rig.device.set_used_flags(USED_F_NO_NOTIFY)
    assert not rig.queue.submit(rig.queue.free.pop(), b"b", 1)
    rig.device.set_used_flags(0xFFFE)  # bits that do not exist
    assert rig.queue.submit(rig.queue.free.pop(), b"c", 1)


def test_a_long_reply_goes_to_a_buffer_of_its_own() -> None:
    rig = Rig()
    buffer = rig.memory.dma_alloc(8192)
    slot = rig.queue.free.pop()
    rig.queue.submit(slot, b"many", 8192, indirect_in=buffer)
    (chain,) = rig.device.take()
    assert (chain.writable_iova, chain.capacity) == (buffer.iova, 8192)


def test_a_length_beyond_the_buffer_reads_no_further_than_the_buffer() -> None:
    rig = Rig()
    slot = rig.submit()
    rig.queue.preset(slot, 0xFF)
    (chain,) = rig.device.take()
    rig.device.give_back(chain.head, 0xFFFFFFFF)
    (used,) = rig.queue.reap()
    assert used.written == 0xFFFFFFFF
    assert rig.queue.written(slot, used.written) == b"\xff" + bytes(31)


@pytest.mark.parametrize("head", [1, 3, 5, 6, 7, 8, 255, 0xFFFF, 0xFFFFFFFF])
def test_a_chain_that_the_device_does_not_have_is_a_protocol_error(head: int) -> None:
    rig = Rig(8, slots=4)
    slots = [rig.submit() for _ in range(3)]
    assert sorted(slots) == [0, 1, 2]
    rig.device.give_back(head, 0)
    with pytest.raises(RemoteProtocolError, match="which it does not have"):
        rig.queue.reap()


def test_a_chain_given_back_twice_is_a_protocol_error_also_within_one_look() -> None:
    for looks in (1, 2):
        rig = Rig()
        rig.submit()
        rig.submit()
        first, _ = rig.device.take()
        rig.device.give_back(first.head, 1)
        if looks == 2:
            assert len(rig.queue.reap()) == 1
        rig.device.give_back(first.head, 1)
        with pytest.raises(RemoteProtocolError, match="which it does not have"):
            rig.queue.reap()


@pytest.mark.parametrize("used_idx", [2, 3, 100, 0x8000, 0xFFFF])
def test_a_used_index_beyond_the_chains_under_way_is_a_protocol_error(used_idx: int) -> None:
    rig = Rig()
    rig.submit()
    rig.device.publish(used_idx)
    with pytest.raises(RemoteProtocolError, match="1 are under way") as caught:
        rig.queue.reap()
    assert caught.value.event == "used index"


def test_a_returned_slot_cannot_be_returned_again_before_it_was_used_again() -> None:
    rig = Rig()
    slot = rig.submit()
    rig.device.give_back(rig.device.take()[0].head, 1)
    rig.queue.reap()
    rig.queue.release(slot)
    rig.device.publish(2)
    with pytest.raises(RemoteProtocolError):
        rig.queue.reap()


def test_the_memory_is_given_back_at_the_end() -> None:
    rig = Rig()
    rig.queue.close()
    assert rig.memory.buffers == {}


@pytest.mark.parametrize(("size", "slots"), [(0, 1), (1, 1), (3, 1), (6, 1), (8, 0), (8, 5), (1 << 16, 1), (-8, 1)])
def test_impossible_sizes_are_refused(size: int, slots: int) -> None:
    with pytest.raises(ValueError, match="do not fit a queue"):
        Rig(size, slots=slots)


def test_the_queue_size_used_is_a_power_of_two_within_both_limits() -> None:
    assert [usable_entries(size, 64) for size in (0, 1, 2, 3, 63, 64, 65, 32768)] == [0, 1, 2, 2, 32, 64, 64, 64]


def test_indices_are_stored_little_endian_where_the_device_looks_for_them() -> None:
    rig = Rig()
    rig.submit()
    rig.submit()
    assert struct.unpack("<HH", rig.memory.at(rig.queue.driver, 4)) == (0, 2)
