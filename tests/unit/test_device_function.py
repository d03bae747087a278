# SPDX-License-Identifier: Apache-2.0
"""The function as a whole: notifications, completion, doorbells, interrupts, resets."""

from __future__ import annotations

import struct

import pytest
from device_rig import CHUNK, VERSION_1, WINDOW, Driver, Host

from ism.device.contract import Interrupt
from ism.device.function import COUNTERS
from ism.device.interrupts import INTX
from ism.errors import LocalProtocolError
from ism.virtio.ism_spec import CommandClass
from ism.virtio.pci import Status

ALLOC_ONE = struct.pack("<BBQ", CommandClass.ALLOC, 0, CHUNK)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def driver(host: Host) -> Driver:
    return host.add(7).start()


def test_completion_interrupts_on_the_control_queue_s_vector(host: Host, driver: Driver) -> None:
    driver.alloc(CHUNK)
    assert host.take_raised() == [(7, 1)]


def test_a_queue_without_a_vector_interrupts_nobody(host: Host, driver: Driver) -> None:
    driver.put("queue_select", 0)
    driver.put("queue_msix_vector", 0xFFFF)
    driver.alloc(CHUNK)
    assert host.take_raised() == []


def test_nothing_is_popped_before_driver_ok(host: Host) -> None:
    driver = host.add(7)
    driver.accept(VERSION_1)
    driver.add_status(Status.FEATURES_OK)
    driver.configure_queue(0, driver.control, 1)
    driver.submit(ALLOC_ONE, 64)
    assert driver.notify().requests == []
    driver.add_status(Status.DRIVER_OK)
    assert len(driver.notify().requests) == 1


def test_without_bus_mastering_no_queue_is_touched_and_what_waits_is_served_when_it_is_back(host: Host) -> None:
    driver = host.add(7)
    driver.start()
    driver.allow_dma(False)
    driver.submit(ALLOC_ONE, 64)
    before = driver.ram.read(driver.events.device, 256)
    assert driver.notify().requests == []
    assert driver.function.post_event(bytes(32)) == []
    assert driver.ram.read(driver.events.device, 256) == before
    assert driver.control.take_used() == []
    driver.allow_dma(True)
    assert len(driver.control.take_used()) == 1


def test_a_queue_that_is_not_enabled_is_not_served(host: Host) -> None:
    driver = host.add(7)
    driver.accept(VERSION_1)
    driver.add_status(Status.FEATURES_OK | Status.DRIVER_OK)
    assert driver.notify().requests == []
    assert not driver.status & Status.NEEDS_RESET


@pytest.mark.parametrize(("offset", "n"), [(0, 1), (0, 2), (0, 4), (0, 8), (1, 1), (2, 2)])
def test_a_write_of_any_width_on_the_notify_word_notifies(driver: Driver, offset: int, n: int) -> None:
    driver.submit(ALLOC_ONE, 64)
    assert len(driver.function.bar_write(0, 0x3000 + offset, b"\xff" * n).requests) == 1


@pytest.mark.parametrize(("offset", "n"), [(4, 4), (8, 4), (0xFF8, 8), (0x1000, 2)])
def test_a_write_elsewhere_does_not_notify_the_control_queue(driver: Driver, offset: int, n: int) -> None:
    driver.submit(ALLOC_ONE, 64)
    assert driver.function.bar_write(0, 0x3000 + offset, bytes(n)).requests == []


def test_a_notify_of_a_queue_that_is_not_there_is_counted(driver: Driver) -> None:
    driver.function.bar_write(0, 0x3008, b"\0\0")
    assert driver.function.stats["bad_notifies"] == 1


def test_commands_in_flight_complete_in_any_order(host: Host, driver: Driver) -> None:
    replies = [driver.submit(ALLOC_ONE, 64, slot=i) for i in range(3)]
    requests = driver.notify().requests
    assert len(requests) == 3
    for i in (1, 2, 0):
        host.finish(driver.function, requests[i])
        assert [driver.ram.read(r, 1)[0] for r in replies].count(0) == len(driver.control.take_used()) + [
            1,
            2,
            0,
        ].index(i)
    offsets = {struct.unpack_from("<Q", driver.ram.read(r + 17, 8))[0] for r in replies}
    assert len(offsets) == 3


def test_a_call_starts_a_bounded_number_of_commands_and_says_that_more_wait(host: Host) -> None:
    driver = host.add(7, chains_per_call=4).start()
    for i in range(10):
        driver.submit(ALLOC_ONE, 64, slot=i)
    works = [driver.notify(), driver.function.run(), driver.function.run(), driver.function.run()]
    assert [(len(w.requests), w.more) for w in works] == [(4, True), (4, True), (2, False), (0, False)]
    for work in works:
        for request in work.requests:
            host.finish(driver.function, request)
    assert len(driver.control.take_used()) == 10


def test_completing_twice_is_the_host_s_bug(host: Host, driver: Driver) -> None:
    driver.submit(ALLOC_ONE, 64)
    [request] = driver.notify().requests
    host.finish(driver.function, request)
    with pytest.raises(LocalProtocolError):
        driver.function.complete(request)
    with pytest.raises(LocalProtocolError):
        driver.function.give_up(request)


def test_completion_after_a_reset_writes_nothing(host: Host, driver: Driver) -> None:
    reply = driver.submit(ALLOC_ONE, 64)
    [request] = driver.notify().requests
    host.carry_out(request.effects)
    driver.start()
    host.take_raised()
    assert host.windows[7] == {}
    assert driver.function.complete(request) == []
    assert driver.ram.read(reply, 1) == b"\xee"
    assert driver.control.take_used() == []
    assert driver.function.stats["abandoned_commands"] == 1


def test_giving_up_after_a_reset_does_not_touch_new_regions(host: Host, driver: Driver) -> None:
    driver.submit(ALLOC_ONE, 64)
    [request] = driver.notify().requests
    driver.start()
    token, _ = driver.alloc(CHUNK)
    assert driver.function.give_up(request) == []
    assert driver.function.complete(request) == []
    assert token in host.registry.regions


def test_a_reply_that_cannot_be_written_needs_a_reset(host: Host, driver: Driver) -> None:
    driver.ram.write(driver.buffers, ALLOC_ONE)
    driver.control.add([(driver.buffers, 10)], [(0, 64)])
    host.do(driver.function, driver.notify())
    assert driver.status & Status.NEEDS_RESET
    assert host.take_raised() == [(7, 0)]


def test_writing_status_0_releases_everything_the_device_held(host: Host, driver: Driver) -> None:
    peer = host.add(8).start()
    token, _ = driver.alloc(CHUNK)
    driver.grant_all(token)
    peer.attach(token)
    driver.put("device_status", 0)
    assert host.windows[7] == {}
    assert len(host.windows[8]) == 1
    driver.start()
    assert driver.ack(struct.pack("<BBQI", CommandClass.ATTACH, 0, token, 0)) != 0


def test_a_pci_reset_also_resets_configuration_space(host: Host, driver: Driver) -> None:
    driver.alloc(CHUNK)
    driver.function.config_write(4, b"\x06\x00")
    host.carry_out(driver.function.reset())
    assert host.windows[7] == {}
    assert driver.status == 0
    assert driver.function.config_read(4, 2) == b"\0\0"
    assert not driver.function.msix_enabled


def shared(host: Host, count: int) -> tuple[list[Driver], list[int]]:
    """Let `count` devices hold one region of two chunks, each bound to vector 3; returns drivers and slots."""
    drivers = [host.add(10 + i).start() for i in range(count)]
    token, [(offset, _)] = drivers[0].alloc(2 * CHUNK)
    drivers[0].grant_all(token)
    slots = [offset // CHUNK]
    for driver in drivers[1:]:
        driver.alloc(CHUNK)  # so that the region lies at different offsets
        slots.append(driver.attach(token)[0][0] // CHUNK)
    for driver in drivers:
        assert driver.bind(token, 3) == 0
    host.take_raised()
    return drivers, slots


def test_a_doorbell_reaches_all_other_holders(host: Host) -> None:
    drivers, slots = shared(host, 3)
    drivers[1].ring_doorbell(slots[1])
    assert sorted(host.take_raised()) == [(10, 3), (12, 3)]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_doorbell_write_of_up_to_4_bytes_rings_one_slot_whatever_its_value(host: Host, n: int) -> None:
    drivers, slots = shared(host, 2)
    drivers[0].ring_doorbell(slots[0], bytes(n))
    assert host.take_raised() == [(11, 3)]


def test_a_doorbell_write_of_8_bytes_rings_both_slots(host: Host) -> None:
    drivers, slots = shared(host, 2)
    drivers[0].ring_doorbell(slots[0], bytes(8))
    assert host.take_raised() == [(11, 3), (11, 3)]


def test_any_chunk_of_a_region_is_its_doorbell(host: Host) -> None:
    drivers, slots = shared(host, 2)
    drivers[0].ring_doorbell(slots[0] + 1)
    assert host.take_raised() == [(11, 3)]


def test_doorbells_out_of_range_or_too_wide_are_ignored_and_counted(host: Host, driver: Driver) -> None:
    slots = WINDOW // CHUNK
    for offset, n in ((4 * slots, 4), (1 << 40, 1), (0, 9), (0, 1 << 20)):
        assert driver.function.bar_write(2, offset, bytes(n)).effects == []
    assert driver.function.stats["bad_doorbells"] == 4
    assert driver.function.stats["doorbells"] == 0


def test_the_notify_area_reads_zero(driver: Driver) -> None:
    driver.ring_doorbell(0)
    assert driver.function.bar_read(2, 0, 8) == bytes(8)


def test_a_doorbell_of_a_free_chunk_reaches_nobody(host: Host, driver: Driver) -> None:
    driver.ring_doorbell(5)
    assert host.take_raised() == []


# without MSI-X


def pci_status(driver: Driver) -> int:
    return int.from_bytes(driver.function.config_read(6, 2), "little")


def test_without_msix_a_used_buffer_sets_the_isr_and_raises_inta(host: Host) -> None:
    driver = host.add(7).start(msix=False)
    driver.alloc(CHUNK)
    assert host.take_raised() == [(7, INTX)]
    assert pci_status(driver) & 8
    assert driver.function.intx_asserted
    assert driver.function.bar_read(0, 0x1000, 1) == b"\1"
    assert driver.function.bar_read(0, 0x1000, 1) == b"\0"
    assert not pci_status(driver) & 8
    assert not driver.function.intx_asserted


def test_without_msix_needs_reset_sets_the_configuration_bit(host: Host) -> None:
    driver = host.add(7).start(msix=False)
    driver.control.offer(64)
    host.do(driver.function, driver.notify())
    assert driver.function.bar_read(0, 0x1000, 4) == b"\2\0\0\0"
    assert host.take_raised() == [(7, INTX)]


def test_intx_disabled_in_the_command_register_is_raised_when_enabled_again(host: Host) -> None:
    driver = host.add(7).start(msix=False)
    driver.function.config_write(4, b"\x06\x04")
    driver.alloc(CHUNK)
    assert host.take_raised() == []
    assert pci_status(driver) & 8
    host.do(driver.function, driver.function.config_write(4, b"\x06\x00"))
    assert host.take_raised() == [(7, INTX)]
    host.do(driver.function, driver.function.config_write(4, b"\x06\x00"))
    assert host.take_raised() == []


def test_without_msix_a_doorbell_raises_inta_and_the_queue_bit(host: Host) -> None:
    drivers, slots = shared(host, 2)
    host.carry_out(drivers[1].function.set_msix_enabled(False))
    drivers[0].ring_doorbell(slots[0])
    assert host.take_raised() == [(11, INTX)]
    assert drivers[1].function.bar_read(0, 0x1000, 1) == b"\1"


def test_with_msix_the_isr_stays_clear(driver: Driver) -> None:
    driver.alloc(CHUNK)
    assert driver.function.bar_read(0, 0x1000, 1) == b"\0"
    assert not pci_status(driver) & 8


def test_turning_msix_off_with_something_pending_raises_inta(host: Host) -> None:
    driver = host.add(7).start(msix=False)
    driver.alloc(CHUNK)
    host.take_raised()
    assert driver.function.set_msix_enabled(True) == []
    assert not driver.function.intx_asserted
    assert [type(e) for e in driver.function.set_msix_enabled(False)] == [Interrupt]


def test_an_isr_read_clears_only_where_it_begins_at_the_register(host: Host) -> None:
    driver = host.add(7).start(msix=False)
    driver.alloc(CHUNK)
    assert driver.function.bar_read(0, 0x0FFC, 8) == bytes(8)
    assert driver.function.bar_read(0, 0x1001, 4) == bytes(4)
    assert driver.function.bar_read(0, 0x1000, 4) == b"\1\0\0\0"


# the regions window, trapped


class Trapped:
    def __init__(self) -> None:
        self.data = bytearray(WINDOW)

    def read(self, offset: int, n: int) -> bytes:
        return bytes(self.data[offset : offset + n])

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data


def test_trapped_accesses_to_the_regions_window_go_to_the_host(host: Host) -> None:
    driver = host.add(7, window=Trapped())
    driver.function.bar_write(4, 16, b"abc")
    assert driver.function.bar_read(4, 15, 5) == b"\0abc\0"
    assert driver.function.bar_read(4, WINDOW - 2, 4) == bytes(4)
    driver.function.bar_write(4, WINDOW - 2, b"abcd")
    assert driver.function.bar_read(4, WINDOW - 4, 4) == bytes(4)


def test_without_a_host_for_the_window_it_reads_zero(driver: Driver) -> None:
    driver.function.bar_write(4, 0, b"abc")
    assert driver.function.bar_read(4, 0, 3) == bytes(3)


def test_every_counter_is_there_from_the_start(host: Host) -> None:
    driver = host.add(7)
    assert driver.function.stats == dict.fromkeys(COUNTERS, 0)
    driver.start()
    driver.alloc(CHUNK)
    assert set(driver.function.stats) == set(COUNTERS)


def test_a_driver_that_breaks_its_queue_again_and_again_does_not_fill_the_log(
    host: Host, driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(100):
        driver.start()
        driver.control.offer(64)
        host.do(driver.function, driver.notify())
    assert len(caplog.records) == 7
