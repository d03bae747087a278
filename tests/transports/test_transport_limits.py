# SPDX-License-Identifier: Apache-2.0
"""A device at its limits and at its end, and devices with fewer features, over every transport."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from transport_rig import CHUNK, PATIENCE_S, SHARED, InMemoryRig, Rig, Shape, readable, together

from ism.driver import Device, Region
from ism.driver.events import Event
from ism.errors import (
    DeviceGoneError,
    FeatureMismatchError,
    QuotaError,
    StaleRegionError,
)
from ism.eventfd import drain
from ism.ids import Token
from ism.manager.quota import Quota
from ism.virtio.ism_spec import EventType, IsmFeature
from ism.virtio.pci import Status

UNKNOWN = Token(0x1234_5678_9ABC_DEF0)


def shared(owner: Device, size: int = CHUNK, **options: bool) -> Region:
    return owner.alloc(size, grants=[(SHARED, None)], **options)


def wait_for_doorbell(region: Region) -> None:
    assert readable(region.fileno()), "no doorbell came"
    assert drain(region.fileno())


def break_queue(device: Device) -> None:
    """Make the device find what no driver may do, a thousand chains at once, and wait until it has."""
    queue = device.control.queue
    queue._avail[1] = (queue._avail[1] + 1000) & 0xFFFF
    device._notify(0)
    assert device._pci.status & Status.NEEDS_RESET


class Heard:
    """Events of a region, as they come."""

    def __init__(self, region: Region) -> None:
        self._came = threading.Condition()
        self._events: list[Event] = []
        region.on_event(self._take)

    def _take(self, event: Event) -> None:
        with self._came:
            self._events.append(event)
            self._came.notify_all()

    def next(self, kind: EventType | None = None) -> Event:
        """Wait for the next event; with `kind`, events of other kinds, from before, are skipped."""
        with self._came:
            while True:
                assert self._came.wait_for(lambda: self._events, PATIENCE_S), "no event came"
                event = self._events.pop(0)
                if kind is None or event.kind == kind:
                    return event


# -- limits


def test_quota_and_window_are_errors_that_say_so_and_pass_with_a_detach(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(chunks=8, quota=Quota(bytes=16 * CHUNK, regions=3, attachments=1))
    device, peer = rig.device(), rig.device()
    regions = [device.alloc(2 * CHUNK) for _ in range(3)]
    with pytest.raises(QuotaError, match="quota") as caught:
        device.alloc(CHUNK)
    assert caught.value.ack_name == "ENOMEM"
    regions.pop().close()
    with pytest.raises(QuotaError, match="window has no free chunks") as caught:
        device.alloc(5 * CHUNK)
    assert caught.value.ack_name == "ENOSPC"
    regions.append(device.alloc(4 * CHUNK))
    for region in regions:
        region.grant(SHARED)
    far = peer.attach(regions[0].token)
    with pytest.raises(QuotaError):
        peer.attach(regions[1].token)
    far.close()
    assert peer.attach(regions[1].token)


def test_a_region_scattered_over_the_window_is_one_contiguous_mapping(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(chunks=128)
    owner, peer = rig.device(), rig.device()
    for device in (owner, peer):
        single = [device.alloc(CHUNK, interrupt=False) for _ in range(128)]
        for region in single[::2]:
            region.close()
    own = shared(owner, 50 * CHUNK)  # more areas than a reply slot has room for: E2BIG, then a larger buffer
    own.view[:] = b"".join(bytes([1 + chunk]) * CHUNK for chunk in range(50))
    far = peer.attach(own.token)
    assert far.view == own.view
    far.view[49 * CHUNK - 1 : 49 * CHUNK + 1] = b"ab"
    assert own.view[49 * CHUNK - 1 : 49 * CHUNK + 1] == b"ab"
    far.ring()
    wait_for_doorbell(own)
    few = shared(owner, 3 * CHUNK)
    assert peer.attach(few.token).length == 3 * CHUNK
    far.close()
    own.close()
    again = shared(owner, 61 * CHUNK)
    assert not any(again.view)
    assert not any(own.view)


def test_many_threads_have_commands_under_way_at_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(chunks=64)
    owner, peer = rig.device(), rig.device()

    def work(number: int) -> None:
        for _ in range(10):
            own = shared(owner, 2 * CHUNK, interrupt=bool(number & 1))
            own.view[0] = number
            far = peer.attach(own.token)
            again = peer.attach(own.token)
            assert far.view[0] == again.view[0] == number
            far.close()
            own.close()
            again.close()

    together([lambda number=number: work(number) for number in range(1, 9)])  # type: ignore[misc]
    for device in (owner, peer):
        assert device.alloc(64 * CHUNK)


def test_threads_may_attach_and_close_one_token_at_once(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    own = shared(owner)
    own.view[0] = 42

    def work() -> None:
        for _ in range(20):
            far = peer.attach(own.token)
            assert far.view[0] == 42
            far.close()

    together([work] * 4)
    assert peer.attach(own.token).view[0] == 42


def test_two_threads_that_close_one_region_detach_it_once(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    own = shared(owner)
    kept = peer.attach(own.token)
    for _ in range(20):
        together([peer.attach(own.token).close] * 3)
    own.view[0] = 1
    assert kept.view[0] == 1


# -- the end


def test_close_with_regions_open_lets_them_go_and_keeps_views_readable(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    own = shared(owner)
    far = peer.attach(own.token, interrupt=True)
    heard = Heard(own)
    peer.close()
    peer.close()
    assert heard.next(EventType.DETACH)
    assert len(bytes(far.view)) == CHUNK
    with pytest.raises(DeviceGoneError, match="closed"):
        peer.alloc(CHUNK)
    with pytest.raises(DeviceGoneError):
        far.ring()
    with pytest.raises(StaleRegionError):
        far.fileno()
    far.close()
    assert owner.alloc(CHUNK)


def test_close_while_commands_are_under_way_ends_all_of_them(rig: Rig) -> None:
    device = rig.device()
    started = threading.Barrier(4)

    def fill() -> None:
        while True:
            device.alloc(CHUNK)

    def work() -> None:
        started.wait(PATIENCE_S)
        with pytest.raises((DeviceGoneError, QuotaError)):
            fill()

    def close() -> None:
        started.wait(PATIENCE_S)
        device.close()

    together([work, work, work, close])


def test_a_device_that_needs_a_reset_says_so_to_everybody(rig: Rig) -> None:
    device = rig.device()
    region = device.alloc(CHUNK)
    region.view[0] = 8
    drain(region.fileno())
    break_queue(device)
    assert readable(region.fileno())
    with pytest.raises(DeviceGoneError, match="needs a reset"):
        device.alloc(CHUNK)
    assert device.gone is not None
    assert region.view[0] == 8
    region.close()


def test_a_polled_device_that_needs_a_reset_says_so_too(rig: Rig) -> None:
    device = rig.device(interrupts=False)
    region = device.alloc(CHUNK)
    break_queue(device)
    with pytest.raises(DeviceGoneError, match="needs a reset"):
        device.alloc(CHUNK)
    assert readable(region.fileno())


# -- devices with fewer features, which only the fabric can make


def test_a_device_without_any_feature_shares_memory_all_the_same() -> None:
    rig = InMemoryRig(Shape(), features=())
    owner, peer = rig.device(), rig.device()
    assert not {IsmFeature.EVENT_IRQ, IsmFeature.EVENT_VQ} & owner.features
    own = shared(owner, interrupt=False)
    far = peer.attach(own.token)
    far.view[0] = 1
    assert own.view[0] == 1
    own.ring()
    with pytest.raises(FeatureMismatchError, match="cannot tell of doorbells") as caught:
        owner.alloc(CHUNK)
    assert caught.value.missing == ("VIRTIO_ISM_F_EVENT_IRQ", "VIRTIO_ISM_F_EVENT_VQ")
    rig.close()


def test_a_device_without_event_queue_still_has_doorbells() -> None:
    rig = InMemoryRig(Shape(), features=(IsmFeature.EVENT_IRQ,))
    owner, peer = rig.device(), rig.device()
    own = shared(owner)
    far = peer.attach(own.token, interrupt=True)
    far.ring()
    wait_for_doorbell(own)
    rig.close()


def test_a_device_without_region_vectors_tells_of_doorbells_by_events() -> None:
    rig = InMemoryRig(Shape(), features=(IsmFeature.EVENT_VQ,))
    owner, peer = rig.device(), rig.device()
    own = shared(owner)
    far = peer.attach(own.token, interrupt=True)
    far.ring()
    wait_for_doorbell(own)
    own.ring()
    wait_for_doorbell(far)
    rig.close()
