# SPDX-License-Identifier: Apache-2.0
"""The event queue: buffers posted in advance, events parsed or counted."""

from __future__ import annotations

import logging

import pytest

from ism.driver.events import Event, EventQueue, parse
from ism.errors import RemoteProtocolError
from ism.testing.scripted import QueueMemory, ScriptedDevice
from ism.virtio.ism_spec import EventType, PeerEvent, UpdateEvent


class Rig:
    def __init__(self, size: int = 8) -> None:
        self.memory = QueueMemory()
        self.notified = 0
        self.events: list[Event] = []
        self.queue = EventQueue(self.memory, size, self._notify, self.events.append)
        self.device = ScriptedDevice(self.memory, self.queue.queue)
        self.queue.post_all()

    def _notify(self) -> None:
        self.notified += 1


def test_all_buffers_are_posted_and_posted_again_after_each_event() -> None:
    rig = Rig()
    chains = rig.device.take()
    assert len(chains) == 8
    assert all(chain.capacity == PeerEvent.SIZE for chain in chains)
    assert rig.notified == 1
    rig.device.answer(chains[0], UpdateEvent(offset=4096, devid=7).pack())
    rig.queue.reap()
    assert rig.events == [Event(EventType.UPDATE, 4096, 7, None)]
    (again,) = rig.device.take()
    assert again.head == chains[0].head
    assert rig.notified == 2


def test_peer_events_carry_who_and_how_many() -> None:
    rig = Rig()
    chains = rig.device.take()
    rig.device.answer(chains[0], PeerEvent(ev_type=EventType.ATTACH, offset=1, devid=2, peers=3).pack())
    rig.device.answer(chains[1], PeerEvent(ev_type=EventType.DETACH, offset=1, devid=2, peers=2).pack())
    rig.queue.reap()
    assert rig.events == [Event(EventType.ATTACH, 1, 2, 3), Event(EventType.DETACH, 1, 2, 2)]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        bytes(24),
        bytes(32),
        UpdateEvent(offset=1, devid=2).pack()[:23],
        PeerEvent(ev_type=EventType.ATTACH, offset=1, devid=2, peers=3).pack()[:31],
        PeerEvent(ev_type=EventType.ATTACH | EventType.DETACH, offset=1, devid=2, peers=3).pack(),
        UpdateEvent(ev_type=8, offset=1, devid=2).pack(),
        b"\xff" * 32,
    ],
)
def test_what_is_no_event_is_none(raw: bytes) -> None:
    assert parse(raw) is None


def test_unknown_events_are_counted_and_logged_ever_less_often(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            for chain in rig.device.take():
                rig.device.answer(chain, b"\xff" * 32)
            rig.queue.reap()
    assert rig.queue.unknown == 160
    assert rig.events == []
    assert len(caplog.records) == 8


def test_a_broken_used_ring_is_a_protocol_error() -> None:
    rig = Rig()
    rig.device.publish(1000)
    with pytest.raises(RemoteProtocolError):
        rig.queue.reap()


def test_after_close_nothing_is_posted_and_nothing_delivered() -> None:
    rig = Rig()
    chains = rig.device.take()
    rig.device.answer(chains[0], UpdateEvent(offset=4096, devid=7).pack())
    rig.queue.close()
    rig.queue.close()
    rig.queue.reap()
    rig.queue.post_all()
    assert rig.events == []
    assert len(rig.memory.freed) == 1
