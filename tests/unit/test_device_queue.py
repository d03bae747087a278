# SPDX-License-Identifier: Apache-2.0
"""The device's side of a split virtqueue, against drivers that break each of its rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from device_rig import CHUNK, RAM_BASE, RAM_SIZE, Host, Ram, Ring

from ism.device.queue import DeviceQueue
from ism.errors import RemoteProtocolError
from ism.virtio.pci import Status
from ism.virtio.queue import AVAIL_F_NO_INTERRUPT, DescFlag

BUFFER = RAM_BASE + 0x10000
WRITE, NEXT = DescFlag.WRITE, DescFlag.NEXT


def queue(size: int = 8) -> tuple[DeviceQueue, Ring]:
    ram = Ram()
    ring = Ring(ram, RAM_BASE, size)
    q = DeviceQueue(0, 64, ram)
    q.size, q.desc, q.driver, q.device = size, ring.desc, ring.driver, ring.device
    q.enable()
    return q, ring


def test_an_empty_queue_has_no_chain() -> None:
    q, _ = queue()
    assert q.pop() is None


def test_a_chain_is_two_byte_streams() -> None:
    q, ring = queue()
    ring.ram.write(BUFFER, b"abcdefgh")
    head = ring.add([(BUFFER, 2), (BUFFER + 5, 3)], [(BUFFER + 64, 3), (BUFFER + 96, 5)])
    chain = q.pop()
    assert chain is not None
    assert (chain.head, chain.readable_size, chain.writable_size) == (head, 5, 8)
    assert q.read(chain, 100) == b"abfgh"
    assert q.read(chain, 3) == b"abf"
    assert q.push(chain, b"12345") is True
    assert ring.take_used() == [(head, 5)]
    assert ring.ram.read(BUFFER + 64, 4) == b"123\0"
    assert ring.ram.read(BUFFER + 96, 3) == b"45\0"


def test_indices_wrap_at_65536() -> None:
    q, ring = queue(4)
    for _ in range(65536 + 10):
        head = ring.add([(BUFFER, 2)], [(BUFFER, 1)])
        chain = q.pop()
        assert chain is not None
        assert chain.head == head
        q.push(chain, b"x")
    assert ring.used_idx() == 10


def test_chains_can_be_handed_back_in_any_order() -> None:
    q, ring = queue()
    heads = [ring.add([(BUFFER, 2)], [(BUFFER, 1)]) for _ in range(3)]
    chains = [q.pop() for _ in range(3)]
    for i in (2, 0, 1):
        chain = chains[i]
        assert chain is not None
        q.push(chain, b"")
    assert [head for head, _ in ring.take_used()] == [heads[2], heads[0], heads[1]]


def test_the_driver_can_ask_for_no_interrupt() -> None:
    q, ring = queue()
    for flags, wanted in ((AVAIL_F_NO_INTERRUPT, False), (0, True), (0xFFFE, True)):
        ring.ram.write_u16(ring.driver, flags)
        ring.add([(BUFFER, 2)], [(BUFFER, 1)])
        chain = q.pop()
        assert chain is not None
        assert q.push(chain, b"") is wanted


def test_a_full_queue_is_legal() -> None:
    q, ring = queue(8)
    for _ in range(8):
        ring.add([(BUFFER, 2)], [])
    assert q.available() == 8
    chains = [q.pop() for _ in range(8)]
    assert all(chains)
    assert q.pop() is None


def loop(ring: Ring) -> None:
    ring.set_desc(0, BUFFER, 1, NEXT, 1)
    ring.set_desc(1, BUFFER, 1, NEXT, 0)
    ring.offer(0)


def self_loop(ring: Ring) -> None:
    ring.set_desc(3, BUFFER, 1, NEXT, 3)
    ring.offer(3)


def head_out_of_range(ring: Ring) -> None:
    ring.offer(8)


def next_out_of_range(ring: Ring) -> None:
    ring.set_desc(0, BUFFER, 1, NEXT, 0xFFFF)
    ring.offer(0)


def zero_length(ring: Ring) -> None:
    ring.add([(BUFFER, 0)], [(BUFFER, 1)])


def too_long_in_total(ring: Ring) -> None:
    ring.add([(BUFFER, 0xFFFFFFFF), (BUFFER, 2)], [])


def address_wraps(ring: Ring) -> None:
    ring.add([((1 << 64) - 1, 2)], [])


def readable_behind_writable(ring: Ring) -> None:
    ring.set_desc(0, BUFFER, 1, WRITE | NEXT, 1)
    ring.set_desc(1, BUFFER, 1)
    ring.offer(0)


def indirect(ring: Ring) -> None:
    ring.set_desc(0, BUFFER, 16, DescFlag.INDIRECT)
    ring.offer(0)


def index_jumps(ring: Ring) -> None:
    ring.ram.write_u16(ring.driver + 2, 9)


def index_goes_back(ring: Ring) -> None:
    ring.ram.write_u16(ring.driver + 2, 0xFFFF)


HOSTILE = [
    loop,
    self_loop,
    head_out_of_range,
    next_out_of_range,
    zero_length,
    too_long_in_total,
    address_wraps,
    readable_behind_writable,
    indirect,
    index_jumps,
    index_goes_back,
]


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_malformed_chain_is_refused_with_bounded_work(attack: Callable[[Ring], None]) -> None:
    q, ring = queue(8)
    attack(ring)
    ring.ram.accesses = 0
    with pytest.raises(RemoteProtocolError, match="queue 0"):
        q.pop()
    assert ring.ram.accesses <= 2 + 8


def test_outstanding_chains_count_until_they_are_handed_back() -> None:
    q, ring = queue(8)
    for _ in range(8):
        ring.add([(BUFFER, 2)], [])
    chains = [q.pop() for _ in range(8)]
    ring.add([(BUFFER, 2)], [])
    with pytest.raises(RemoteProtocolError, match="ahead of used"):
        q.pop()
    assert chains[0] is not None
    q.push(chains[0], b"")
    assert q.pop() is not None


def test_an_index_that_goes_back_behind_popped_chains_is_refused() -> None:
    q, ring = queue(8)
    for _ in range(4):
        ring.add([(BUFFER, 2)], [])
        assert q.pop() is not None
    ring.ram.write_u16(ring.driver + 2, 2)
    with pytest.raises(RemoteProtocolError, match="went back"):
        q.available()


@pytest.mark.parametrize("area", ["desc", "driver", "device"])
@pytest.mark.parametrize("address", [0, RAM_BASE + RAM_SIZE, 1 << 40])
def test_areas_outside_guest_memory_are_refused_when_used(area: str, address: int) -> None:
    q, ring = queue(8)
    ring.add([(BUFFER, 2)], [(BUFFER, 2)])
    setattr(q, area, address)

    def serve() -> None:
        chain = q.pop()
        assert chain is not None
        q.push(chain, b"x")

    with pytest.raises(RemoteProtocolError, match="not mapped"):
        serve()


def test_buffers_outside_guest_memory_are_refused_when_used() -> None:
    q, ring = queue(8)
    ring.add([(0, 2)], [(0, 2)])
    chain = q.pop()
    assert chain is not None
    with pytest.raises(RemoteProtocolError, match="readable buffer"):
        q.read(chain, 2)
    with pytest.raises(RemoteProtocolError, match="writable buffer"):
        q.push(chain, b"x")


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_malformed_queue_needs_a_reset_and_interrupts_once(attack: Callable[[Ring], None]) -> None:
    host = Host()
    other = host.add(2).start()
    driver = host.add(7)
    driver.control = Ring(driver.ram, RAM_BASE, 8)
    driver.start()
    attack(driver.control)
    host.do(driver.function, driver.notify())
    assert driver.status & Status.NEEDS_RESET
    assert host.take_raised() == [(7, 0)]
    host.do(driver.function, driver.notify())
    assert host.take_raised() == []
    assert driver.function.stats["malformed_queues"] == 1
    assert driver.control.used_idx() == 0
    driver.put("device_status", Status.DRIVER_OK)
    assert driver.status & Status.NEEDS_RESET
    assert other.alloc(CHUNK)
    driver.start()
    assert driver.alloc(CHUNK)


def test_a_queue_of_one_entry_works() -> None:
    q, ring = queue(1)
    for _ in range(3):
        ring.set_desc(0, BUFFER, 4, WRITE)
        ring.offer(0)
        chain = q.pop()
        assert chain is not None
        q.push(chain, b"ab")
    assert ring.take_used() == [(0, 2)] * 3
