# SPDX-License-Identifier: Apache-2.0
"""A device's life over every transport: regions, grants, doorbells, events, limits, the end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from transport_rig import CHUNK, PATIENCE_S, READ_WRITE, SHARED, Rig, readable, together

from ism.driver import Device, Region
from ism.driver.events import Event
from ism.errors import (
    DeviceError,
    LocalProtocolError,
    PermissionDeniedError,
    RemoteProtocolError,
    StaleRegionError,
)
from ism.eventfd import drain
from ism.ids import DevId, Token
from ism.virtio.ism_spec import EventType, IsmFeature, Permission
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


def test_initialisation_learns_names_sizes_and_features(rig: Rig) -> None:
    first, second = rig.device(), rig.device()
    assert first.gid == second.gid != 0
    assert first.devid != second.devid
    assert first.chunk_size == CHUNK
    assert {IsmFeature.EVENT_IRQ, IsmFeature.EVENT_VQ, 32} <= first.features
    assert first.gone is None


def test_a_fresh_region_is_zero_and_as_large_as_asked_for_in_chunks(rig: Rig) -> None:
    region = rig.device().alloc(CHUNK + 1)
    assert region.length == 2 * CHUNK == len(region.view)
    assert region.token != 0
    assert region.owned
    assert not any(region.view)


def test_both_ends_see_each_others_bytes(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    own = shared(owner, 3 * CHUNK)
    far = peer.attach(own.token)
    own.view[:4] = b"here"
    far.view[-5:] = b"there"
    assert far.view[:4] == b"here"
    assert own.view[-5:] == b"there"
    assert far.length == own.length
    assert not far.owned


def test_nobody_may_attach_a_fresh_region(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    region = owner.alloc(CHUNK)
    with pytest.raises(PermissionDeniedError, match="has not granted ATTACH") as caught:
        peer.attach(region.token)
    assert (caught.value.ack_name, caught.value.token) == ("PERM_EATTACH", region.token)


def test_a_grant_names_one_device_or_all(rig: Rig) -> None:
    owner, named, other = rig.device(), rig.device(), rig.device()
    region = owner.alloc(CHUNK)
    region.grant(SHARED, named.devid)
    assert named.attach(region.token)
    with pytest.raises(PermissionDeniedError):
        other.attach(region.token)
    region.grant(SHARED)
    assert other.attach(region.token)


def test_rights_beyond_the_grant_are_refused_by_name(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    region = owner.alloc(CHUNK)
    region.grant(Permission.ATTACH | Permission.READ, peer.devid)
    with pytest.raises(PermissionDeniedError, match="has not granted WRITE") as caught:
        peer.attach(region.token, READ_WRITE)
    assert caught.value.ack_name == "PERM_EWRITE"
    region.grant(Permission.ATTACH | Permission.WRITE, peer.devid)
    with pytest.raises(PermissionDeniedError, match="has not granted READ") as caught:
        peer.attach(region.token, Permission.READ)
    assert caught.value.ack_name == "PERM_EREAD"


def test_only_the_owner_or_a_manager_of_the_region_may_grant(rig: Rig) -> None:
    owner, helper, stranger = rig.device(), rig.device(), rig.device()
    region = owner.alloc(CHUNK, grants=[(SHARED | Permission.MANAGE, helper.devid)])
    with pytest.raises(DeviceError, match="GRANT SET_DEFAULT"):
        stranger.grant(region.token, SHARED)
    helper.grant(region.token, SHARED, stranger.devid)
    assert stranger.attach(region.token)


def test_a_grant_to_a_device_that_is_not_there_is_an_error_and_leaves_nothing_behind(
    make_rig: Callable[..., Rig],
) -> None:
    owner = make_rig(chunks=4).device()
    for _ in range(10):
        with pytest.raises(DeviceError):
            owner.alloc(CHUNK, grants=[(SHARED, DevId(0xDEAD))])
    assert owner.alloc(4 * CHUNK)


def test_a_read_only_view_refuses_stores(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    region = owner.alloc(CHUNK, grants=[(Permission.ATTACH | Permission.READ, peer.devid)])
    region.view[0] = 9
    far = peer.attach(region.token, Permission.READ)
    assert far.view[0] == 9
    with pytest.raises(TypeError):
        far.view[0] = 1


def test_losing_the_right_to_write_in_the_middle_of_it_harms_neither_side(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    region = owner.alloc(2 * CHUNK, grants=[(SHARED, peer.devid)])
    far = peer.attach(region.token)
    far.view[0] = 1
    region.grant(Permission.ATTACH | Permission.READ, peer.devid)
    peer.alloc(CHUNK).close()  # answered behind the new mapping, which is made in order
    far.view[0] = 2
    far.view[CHUNK] = 3
    assert (region.view[0], region.view[CHUNK]) == (1, 0)


def test_a_second_attach_counts_and_the_last_close_unmaps(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    own = shared(owner)
    first, second = peer.attach(own.token), peer.attach(own.token)
    assert first.address == second.address
    first.close()
    own.view[0] = 5
    assert second.view[0] == 5
    second.close()
    again = peer.attach(own.token)  # takes its turn behind the detach
    assert second.view[0] == 0
    assert again.view[0] == 5


def test_a_second_attach_can_bring_the_interrupt_that_the_first_did_without(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    own = shared(owner)
    plain = peer.attach(own.token)
    with pytest.raises(StaleRegionError):
        plain.fileno()
    told = peer.attach(own.token, interrupt=True)
    own.ring()
    wait_for_doorbell(told)


def test_attaching_a_region_of_ones_own_connects_a_device_with_itself(rig: Rig) -> None:
    device = rig.device()
    own = device.alloc(CHUNK)
    far = device.attach(own.token, READ_WRITE, offered_by=device.devid)
    far.view[7] = 7
    assert own.view[7] == 7
    far.ring()
    wait_for_doorbell(own)
    with pytest.raises(RemoteProtocolError, match="serves another connection"):
        device.attach(own.token, READ_WRITE, offered_by=device.devid)


def test_a_peer_cannot_offer_a_region_that_serves_somebody_else(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    own = owner.alloc(CHUNK, grants=[(SHARED, None)])
    with pytest.raises(RemoteProtocolError, match="serves another connection"):
        owner.attach(own.token, offered_by=peer.devid)
    far = peer.attach(own.token, offered_by=owner.devid)
    with pytest.raises(RemoteProtocolError, match="serves another connection"):
        peer.attach(own.token, offered_by=DevId(99))
    assert far.view[0] == 0


def test_the_owners_detach_kills_the_token_and_leaves_the_memory_to_its_holders(rig: Rig) -> None:
    owner, peer, late = rig.device(), rig.device(), rig.device()
    own = shared(owner)
    far = peer.attach(own.token)
    heard = Heard(far)
    own.view[0] = 3
    own.close()
    event = heard.next(EventType.DETACH)
    assert (event.kind, event.devid, event.peers) == (EventType.DETACH, owner.devid, 1)
    with pytest.raises(DeviceError, match="its owner let the region go") as caught:
        late.attach(own.token)
    assert caught.value.ack_name == "ENOENT"
    assert far.view[0] == 3


def test_an_unknown_token_is_an_error_by_name(rig: Rig) -> None:
    device = rig.device()
    for call in (lambda: device.attach(UNKNOWN), lambda: device.grant(UNKNOWN, SHARED)):
        with pytest.raises(DeviceError, match="0x123456789abcdef0") as caught:
            call()
        assert caught.value.ack_name == "ENOENT"


def test_a_closed_region_is_stale_and_close_is_idempotent(rig: Rig) -> None:
    region = rig.device().alloc(CHUNK)
    region.close()
    region.close()
    region.wake()
    for call in (region.fileno, region.ring, lambda: region.grant(SHARED)):
        with pytest.raises(StaleRegionError):
            call()


def test_values_that_no_field_can_hold_are_errors_of_the_caller(rig: Rig) -> None:
    device = rig.device()
    for size in (0, -1, 1 << 64):
        with pytest.raises(ValueError, match="impossible"):
            device.alloc(size)
    with pytest.raises(LocalProtocolError):
        device.attach(Token(-1))
    with pytest.raises(LocalProtocolError):
        device.grant(Token(1 << 64), SHARED)


# -- doorbells and events


def test_doorbells_go_both_ways_again_and_again(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    own = shared(owner)
    far = peer.attach(own.token, interrupt=True)
    for _ in range(50):
        far.ring()
        wait_for_doorbell(own)
        own.ring()
        wait_for_doorbell(far)


def test_a_doorbell_reaches_all_other_holders_and_not_the_one_who_rings(rig: Rig) -> None:
    owner, second, third = rig.device(), rig.device(), rig.device()
    own = shared(owner)
    others = [second.attach(own.token, interrupt=True), third.attach(own.token, interrupt=True)]
    everyone = [own, *others]
    for ringer in everyone:
        for region in everyone:
            drain(region.fileno())
        ringer.ring()
        for region in everyone:
            if region is not ringer:
                wait_for_doorbell(region)


def test_a_holder_that_goes_leaves_the_others_wired(rig: Rig) -> None:
    owner, second, third = rig.device(), rig.device(), rig.device()
    own = shared(owner)
    stays, goes = second.attach(own.token, interrupt=True), third.attach(own.token, interrupt=True)
    heard = Heard(own)
    goes.close()
    event = heard.next(EventType.DETACH)
    assert (event.kind, event.devid, event.peers) == (EventType.DETACH, third.devid, 2)
    stays.ring()
    wait_for_doorbell(own)
    own.ring()
    wait_for_doorbell(stays)


def test_attach_and_detach_of_peers_are_told_as_events(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    own = shared(owner)
    heard = Heard(own)
    far = peer.attach(own.token)
    event = heard.next()
    assert (event.kind, event.devid, event.peers) == (EventType.ATTACH, peer.devid, 2)
    far.close()
    event = heard.next()
    assert (event.kind, event.devid, event.peers) == (EventType.DETACH, peer.devid, 1)


def test_a_peer_that_vanishes_is_told_as_a_detach(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    own = shared(owner)
    heard = Heard(own)
    peer.attach(own.token)
    assert heard.next().kind == EventType.ATTACH
    peer.transport.close()
    assert heard.next(EventType.DETACH)


def test_a_callback_that_raises_costs_only_its_own_event(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    owner, peer = rig.device(), rig.device()
    own = shared(owner)
    came = threading.Semaphore(0)

    def callback(event: Event) -> None:
        came.release()
        raise ZeroDivisionError

    own.on_event(callback)
    for _ in range(3):
        peer.attach(own.token).close()
    for _ in range(6):
        assert came.acquire(timeout=PATIENCE_S)
    assert owner.alloc(CHUNK)
    assert "on_event callback failed" in caplog.text


def test_a_callback_may_close_regions_and_may_not_wait(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    own = shared(owner)
    far = peer.attach(own.token)
    outcome: list[Exception] = []
    done = threading.Event()

    def callback(event: Event) -> None:
        far.close()
        for call in (lambda: peer.alloc(CHUNK), lambda: peer.attach(own.token), peer.close):
            try:
                call()
            except Exception as exc:
                outcome.append(exc)
        done.set()

    far.on_event(callback)
    own.close()
    assert done.wait(PATIENCE_S)
    assert [type(exc) for exc in outcome] == [LocalProtocolError] * 3
    assert peer.alloc(CHUNK)


def test_wake_makes_a_regions_own_descriptor_readable(rig: Rig) -> None:
    region = rig.device().alloc(CHUNK)
    region.wake()
    wait_for_doorbell(region)


def test_without_interrupts_the_driver_polls_and_doorbells_arrive_as_events(rig: Rig) -> None:
    owner, peer = rig.device(interrupts=False), rig.device(interrupts=False)
    own = shared(owner)
    far = peer.attach(own.token, interrupt=True)
    heard = Heard(own)
    for _ in range(3):
        far.ring()
        wait_for_doorbell(own)
        own.ring()
        wait_for_doorbell(far)
    far.close()
    assert heard.next(EventType.DETACH)


def test_a_device_with_too_few_vectors_uses_its_interrupt_line(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(vectors=3)
    owner, peer = rig.device(), rig.device()
    assert owner.service._tick is None, "it polls"
    own = shared(owner)
    far = peer.attach(own.token, interrupt=True)
    far.ring()
    wait_for_doorbell(own)
    own.ring()
    wait_for_doorbell(far)


def test_many_rings_and_commands_at_once_lose_no_interrupt(rig: Rig) -> None:
    owner, peer = rig.device(), rig.device()
    own = [shared(owner) for _ in range(4)]
    far = [peer.attach(region.token, interrupt=True) for region in own]

    def play(mine: Region, theirs: Region) -> None:
        for _ in range(25):
            theirs.ring()
            wait_for_doorbell(mine)
            owner.alloc(CHUNK, interrupt=False).close()
            mine.ring()
            wait_for_doorbell(theirs)

    together([lambda ends=ends: play(*ends) for ends in zip(own, far, strict=True)])  # type: ignore[misc]
    assert owner.gone is None
    assert peer.gone is None


@pytest.mark.vectors
def test_when_vectors_run_out_events_take_their_place(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(vectors=6)
    owner, peer = rig.device(), rig.device()
    own = [shared(owner) for _ in range(6)]
    far = [peer.attach(region.token, interrupt=True) for region in own]
    assert [region.binding.vector for region in own] == [3, 4, -1, -1, -1, -1]
    for mine, theirs in zip(own, far, strict=True):
        theirs.ring()
        wait_for_doorbell(mine)
        mine.ring()
        wait_for_doorbell(theirs)
    for region in own + far:
        region.close()
    again = [owner.alloc(CHUNK) for _ in range(3)]
    assert sum(region.binding.vector < 0 for region in again) == 1


@pytest.mark.vectors
def test_a_region_without_interrupt_costs_no_vector(make_rig: Callable[..., Rig]) -> None:
    device = make_rig(vectors=5).device()
    for _ in range(5):
        device.alloc(CHUNK, interrupt=False)
    assert not device.alloc(CHUNK).binding.shared
