# SPDX-License-Identifier: Apache-2.0
"""The event queue: buffers, backlog, merging, small buffers."""

from __future__ import annotations

import pytest
from device_rig import CHUNK, VERSION_1, Driver, Host

from ism.device.events import BACKLOG_EVENTS, BACKLOG_UPDATES
from ism.virtio.ism_spec import EventType, PeerEvent, UpdateEvent
from ism.virtio.pci import Status
from ism.virtio.queue import USED_F_NO_NOTIFY, USED_FLAGS


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def driver(host: Host) -> Driver:
    return host.add(7).start()


def update(offset: int, devid: int = 8) -> bytes:
    return UpdateEvent(offset=offset, devid=devid).pack()


def detach(offset: int) -> bytes:
    return PeerEvent(ev_type=EventType.DETACH, offset=offset, devid=8, peers=1).pack()


def post(driver: Driver, payload: bytes) -> None:
    driver.host.carry_out(driver.function.post_event(payload))


def test_an_event_takes_a_buffer_and_interrupts_on_the_queue_s_vector(host: Host, driver: Driver) -> None:
    driver.post_event_buffers(2)
    post(driver, update(0))
    post(driver, detach(CHUNK))
    assert driver.take_events() == [update(0), detach(CHUNK)]
    assert host.take_raised() == [(7, 2), (7, 2)]


def test_events_wait_for_buffers_in_order(host: Host, driver: Driver) -> None:
    for i in range(3):
        post(driver, detach(i * CHUNK))
    assert host.take_raised() == []
    driver.post_event_buffers(2)
    assert driver.take_events() == [detach(0), detach(CHUNK)]
    assert host.take_raised() == [(7, 2)]
    driver.post_event_buffers(1)
    assert driver.take_events() == [detach(2 * CHUNK)]


def test_a_waiting_update_says_what_a_second_one_would(driver: Driver) -> None:
    for event in (update(0), update(CHUNK), update(0, devid=9), detach(0), detach(0), update(0)):
        post(driver, event)
    driver.post_event_buffers(10)
    assert driver.take_events() == [update(0), update(CHUNK), detach(0), detach(0)]
    assert driver.function.stats["events_merged"] == 2
    post(driver, update(0))
    assert driver.take_events() == [update(0)]


def test_the_backlog_is_bounded_and_drops_are_counted(driver: Driver) -> None:
    for i in range(BACKLOG_EVENTS + 5):
        post(driver, detach(i))
    assert driver.function.stats["events_dropped"] == 5
    for _ in range(BACKLOG_EVENTS // 64 + 1):
        driver.post_event_buffers(64 if driver.function.stats["events_posted"] < BACKLOG_EVENTS else 1)
        driver.take_events()
    assert driver.function.stats["events_posted"] == BACKLOG_EVENTS


def test_events_that_wait_crowd_out_no_update_and_updates_have_a_bound_too(driver: Driver) -> None:
    for i in range(BACKLOG_EVENTS):
        post(driver, detach(i))
    for i in range(BACKLOG_UPDATES):
        post(driver, update(i))
    assert driver.function.stats["events_dropped"] == 0
    post(driver, update(BACKLOG_UPDATES))
    post(driver, detach(BACKLOG_EVENTS))
    assert driver.function.stats["events_dropped"] == 2
    driver.post_event_buffers(1)
    assert driver.take_events() == [detach(0)]
    post(driver, detach(BACKLOG_EVENTS))
    assert driver.function.stats["events_dropped"] == 2


def test_the_driver_need_not_notify_of_buffers_while_no_event_waits_for_one(driver: Driver) -> None:
    def spared() -> bool:
        return driver.ram.read_u16(driver.events.device + USED_FLAGS) == USED_F_NO_NOTIFY

    assert not spared(), "the device does not know yet that it has nothing to send"
    driver.post_event_buffers(1)
    assert spared()
    post(driver, detach(0))
    assert spared()
    post(driver, detach(CHUNK))
    assert not spared(), "this one waits for a buffer"
    driver.post_event_buffers(1)
    assert spared()
    assert driver.take_events() == [detach(0), detach(CHUNK)]


def test_a_buffer_of_which_the_device_was_not_told_is_found_by_the_next_event(driver: Driver) -> None:
    driver.post_event_buffers(1)
    driver.events.add([], [(driver.buffers + 0x10000 + 64 * driver.events.next_desc, 32)])
    post(driver, detach(0))
    post(driver, detach(CHUNK))
    assert driver.take_events() == [detach(0), detach(CHUNK)]


def test_a_buffer_that_is_too_small_comes_back_empty_and_the_event_is_dropped(driver: Driver) -> None:
    driver.post_event_buffers(1, size=24)
    driver.post_event_buffers(1)
    post(driver, detach(0))
    post(driver, update(0))
    assert driver.take_events() == [b"", update(0)]
    assert driver.function.stats["events_dropped"] == 1


def test_a_buffer_of_24_bytes_is_enough_for_an_update(driver: Driver) -> None:
    driver.post_event_buffers(1, size=24)
    post(driver, update(0))
    assert driver.take_events() == [update(0)]


def test_without_the_feature_negotiated_events_are_dropped(host: Host) -> None:
    driver = host.add(7).start(features=VERSION_1)
    driver.post_event_buffers(1)
    post(driver, update(0))
    assert driver.take_events() == []
    assert driver.function.stats["events_dropped"] == 1


def test_a_device_without_the_queue_drops_events(host: Host) -> None:
    driver = host.add(7, features=frozenset()).start()
    post(driver, update(0))
    assert driver.function.stats["events_dropped"] == 1


def test_a_reset_forgets_the_backlog(driver: Driver) -> None:
    post(driver, update(0))
    driver.start()
    driver.post_event_buffers(2)
    post(driver, update(0))
    assert driver.take_events() == [update(0)]


def test_a_malformed_event_queue_needs_a_reset(host: Host, driver: Driver) -> None:
    driver.events.offer(64)
    post(driver, update(0))
    assert driver.status & Status.NEEDS_RESET
    assert host.take_raised() == [(7, 0)]


def test_a_malformed_event_queue_is_found_on_notify_as_well(host: Host, driver: Driver) -> None:
    post(driver, update(0))
    driver.events.offer(64)
    host.do(driver.function, driver.notify(1))
    assert driver.status & Status.NEEDS_RESET


def test_a_doorbell_of_a_region_without_a_vector_is_an_update_event(host: Host, driver: Driver) -> None:
    peer = host.add(8).start()
    token, [(offset, _)] = driver.alloc(CHUNK)
    driver.grant_all(token)
    driver.post_event_buffers(4)
    [(peer_offset, _)] = peer.attach(token)
    assert [e[0] for e in driver.take_events()] == [EventType.ATTACH]
    peer.ring_doorbell(peer_offset // CHUNK)
    assert driver.take_events() == [update(offset, devid=8)]
