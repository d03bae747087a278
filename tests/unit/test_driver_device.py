# SPDX-License-Identifier: Apache-2.0
"""`Device` where several things happen at once, and where its device misbehaves. Ordinary life: tests/transports."""

from __future__ import annotations

import logging
import os
import select
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from ism.driver import Device, Region
from ism.driver.control import Command, Placement
from ism.driver.transport import Span
from ism.driver.virtio_pci import VirtioPci
from ism.errors import DeviceGoneError, QuotaError, RemoteProtocolError, StaleRegionError, TransportError
from ism.eventfd import drain, raise_eventfd
from ism.ids import Token
from ism.manager.quota import Quota
from ism.testing import Fabric, InMemoryTransport
from ism.virtio.ism_spec import Config, Permission
from ism.virtio.queue import USED_IDX

CHUNK = 4096
CHUNKS = 16
PATIENCE_S = 30.0
SHARED = Permission.ATTACH | Permission.READ | Permission.WRITE


class Domain:
    def __init__(self) -> None:
        self.fabric = Fabric(chunk_size=CHUNK)
        self.devices: list[Device] = []

    def plug(self) -> InMemoryTransport:
        return self.fabric.plug(window_size=CHUNKS * CHUNK, vectors=8, quota=Quota(1 << 30, 100, 100))

    def device(self, *, interrupts: bool = True) -> Device:
        self.devices.append(Device(self.plug(), interrupts=interrupts))
        return self.devices[-1]


@pytest.fixture
def domain() -> Iterator[Domain]:
    made = Domain()
    yield made
    for device in made.devices:
        device.close()


def port(device: Device) -> InMemoryTransport:
    assert isinstance(device.transport, InMemoryTransport)
    return device.transport


def in_thread(call: Callable[[], object]) -> Future[object]:
    """Run `call` in a thread; the future has what it returns or raises."""
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return future


def readable(region: Region) -> bool:
    poller = select.poll()
    poller.register(region.fileno(), select.POLLIN)
    return bool(poller.poll(PATIENCE_S * 1000))


# -- several things at once


def test_close_of_a_region_does_not_wait_for_an_attach_of_the_same_token(domain: Domain) -> None:
    owner, peer = domain.device(), domain.device()
    own = owner.alloc(CHUNK, grants=[(SHARED, None)])
    first = peer.attach(own.token)
    port(peer).pause()
    second = in_thread(lambda: peer.attach(own.token))
    assert port(peer).wait_withheld(1, PATIENCE_S)
    first.close()  # its turn comes behind the attach, whose thread takes care of it
    port(peer).resume()
    region = second.result(PATIENCE_S)
    assert isinstance(region, Region)
    own.view[0] = 5
    assert region.view[0] == 5
    region.close()
    again = peer.attach(own.token)
    assert again.address != region.address  # both had gone, so the region was unmapped in between
    assert again.view[0] == 5


def test_an_attach_waits_for_a_close_of_the_same_token_and_maps_anew(domain: Domain) -> None:
    owner, peer = domain.device(), domain.device()
    own = owner.alloc(CHUNK, grants=[(SHARED, None)])
    first = peer.attach(own.token)
    port(peer).pause()
    first.close()
    second = in_thread(lambda: peer.attach(own.token))
    assert port(peer).wait_withheld(1, PATIENCE_S)
    port(peer).resume()
    region = second.result(PATIENCE_S)
    assert isinstance(region, Region)
    assert region.address != first.address
    own.view[0] = 6
    assert (first.view[0], region.view[0]) == (0, 6)


def test_many_closes_of_one_token_stand_in_line_and_each_is_done(domain: Domain) -> None:
    owner, peer = domain.device(), domain.device()
    own = owner.alloc(CHUNK, grants=[(SHARED, None)])
    regions = [peer.attach(own.token) for _ in range(10)]
    port(peer).pause()
    for region in regions:
        region.close()
    port(peer).resume()
    again = peer.attach(own.token)
    again.close()
    assert len(domain.fabric.registry.regions[own.token].holders) == 1


def test_closing_more_regions_than_there_are_chains_waits_for_none(domain: Domain) -> None:
    device = domain.device()
    regions = [device.alloc(CHUNK) for _ in range(CHUNKS)]
    chains = device.control.queue.slots
    device.control.queue.free[:] = device.control.queue.free[:2]
    port(device).pause()
    for region in regions:
        region.close()
    port(device).resume()
    assert device.alloc(CHUNKS * CHUNK)
    assert chains == 32


def test_an_alloc_that_finds_no_room_waits_for_what_is_being_let_go(domain: Domain) -> None:
    device = domain.device()
    region = device.alloc(CHUNKS * CHUNK)
    with pytest.raises(QuotaError):
        device.alloc(CHUNK)
    port(device).pause()
    region.close()
    wanted = in_thread(lambda: device.alloc(CHUNKS * CHUNK))
    assert port(device).wait_withheld(2, PATIENCE_S)
    port(device).resume()
    assert wanted.result(PATIENCE_S)


def test_commands_under_way_end_with_a_lost_device(domain: Domain) -> None:
    device = domain.device()
    port(device).pause()
    waiting = [in_thread(lambda: device.alloc(CHUNK)) for _ in range(3)]
    assert port(device).wait_withheld(3, PATIENCE_S)
    port(device).lose("the host is on fire")
    for future in waiting:
        with pytest.raises(DeviceGoneError, match="the host is on fire"):
            future.result(PATIENCE_S)


def test_commands_under_way_end_with_a_closed_device(domain: Domain) -> None:
    device = domain.device()
    own = device.alloc(CHUNK)
    port(device).pause()
    waiting = [in_thread(lambda: device.alloc(CHUNK)), in_thread(lambda: device.attach(own.token))]
    assert port(device).wait_withheld(2, PATIENCE_S)
    waiting.append(in_thread(lambda: device.attach(own.token)))  # stands behind the other attach
    device.close()
    for future in waiting:
        with pytest.raises(DeviceGoneError):
            future.result(PATIENCE_S)


def test_regions_that_are_closed_after_the_loss_give_their_memory_back(domain: Domain) -> None:
    device = domain.device()
    region = device.alloc(CHUNK)
    region.view[0] = 1
    port(device).lose("gone")
    assert region.view[0] == 1
    region.close()
    assert region.view[0] == 0
    assert not device._held
    assert not device._in_transition


def test_an_event_for_a_region_that_was_just_closed_is_nobodys(domain: Domain) -> None:
    owner, peer = domain.device(interrupts=False), domain.device()
    own = owner.alloc(CHUNK, grants=[(SHARED, None)])
    far = peer.attach(own.token)
    number = own.fileno()
    stop = threading.Event()

    def ring() -> None:
        while not stop.is_set():
            far.ring()

    ringing = in_thread(ring)
    own.close()
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]  # one takes the number
    for _ in range(50):
        region = owner.alloc(CHUNK)
        region.close()
    stop.set()
    ringing.result(PATIENCE_S)
    assert owner.alloc(CHUNK)
    assert owner.gone is None
    assert number >= 0
    for fd in opened:
        os.close(fd)


def test_an_interrupted_alloc_leaves_no_region_behind(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    device = domain.device()
    port(device).pause()

    def interrupt(self: Command) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Command, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            device.alloc(CHUNKS * CHUNK)
    (given_up,) = (command for command, _ in device.control._pending.values())
    detached = threading.Event()
    given_up.then(detached.set)  # behind the callback that detaches
    port(device).resume()
    assert detached.wait(PATIENCE_S)
    assert device.alloc(CHUNKS * CHUNK)


# -- a device that misbehaves


@pytest.mark.parametrize(
    ("areas", "match"),
    [
        ([Span(0, CHUNK), Span(0, CHUNK)], "two areas over one chunk"),
        ([Span(CHUNK, 2 * CHUNK), Span(0, 2 * CHUNK)], "two areas over one chunk"),
        ([Span(CHUNKS * CHUNK, CHUNK)], "not made of chunks inside the window"),
        ([Span((1 << 64) - CHUNK, CHUNK)], "not made of chunks inside the window"),
        ([Span(0, (CHUNKS + 1) * CHUNK)], "not made of chunks inside the window"),
        ([Span(100, CHUNK)], "not made of chunks inside the window"),
        ([Span(0, CHUNK - 1)], "not made of chunks inside the window"),
        ([Span(0, 0)], "not made of chunks inside the window"),
        ([Span(0, CHUNK)], "4096 bytes, 8192 were asked for"),
    ],
)
def test_areas_that_cannot_be_are_refused_and_given_back(
    domain: Domain, monkeypatch: pytest.MonkeyPatch, areas: list[Span], match: str
) -> None:
    device = domain.device()
    real = device.control.alloc
    monkeypatch.setattr(device.control, "alloc", lambda size: Placement(real(size).token, areas))
    with pytest.raises(RemoteProtocolError, match=match):
        device.alloc(2 * CHUNK)
    assert domain.fabric.registry.regions == {}


def test_areas_that_the_transport_did_not_map_are_an_error_and_given_back(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = domain.device()
    real = device.control.alloc
    monkeypatch.setattr(device.control, "alloc", lambda size: Placement(real(size).token, [Span(4 * CHUNK, CHUNK)]))
    with pytest.raises(TransportError, match="mapped nothing"):
        device.alloc(CHUNK)
    assert domain.fabric.registry.regions == {}


def test_one_place_for_two_regions_is_refused(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    device = domain.device()
    device.alloc(CHUNK)
    real = device.control.alloc
    monkeypatch.setattr(device.control, "alloc", lambda size: Placement(real(size).token, [Span(0, CHUNK)]))
    with pytest.raises(RemoteProtocolError, match="is, or is where, another one is"):
        device.alloc(CHUNK)
    assert len(domain.fabric.registry.regions) == 1


@pytest.mark.parametrize("interrupts", [True, False])
def test_a_used_ring_that_lies_ends_the_device_and_says_why(domain: Domain, interrupts: bool) -> None:
    device = domain.device(interrupts=interrupts)
    region = device.alloc(CHUNK)
    drain(region.fileno())
    port(device).pause()
    waiting = in_thread(lambda: device.alloc(CHUNK))
    assert port(device).wait_withheld(1, PATIENCE_S)
    queue = device.control.queue
    at = queue.device - queue.desc + USED_IDX
    queue._view[at : at + 2] = struct.pack("<H", 0x7777)
    if interrupts:
        raise_eventfd(device._queue_fds[1])
    with pytest.raises(DeviceGoneError, match="chains, 1 are under way"):
        waiting.result(PATIENCE_S)
    assert readable(region)
    with pytest.raises(DeviceGoneError, match="1 are under way"):
        device.alloc(CHUNK)


@pytest.mark.parametrize("chunk_size", [0, 1, 2048, 12288, 2 * CHUNKS * CHUNK, 1 << 63])
def test_a_chunk_size_that_cannot_be_is_a_protocol_error(
    domain: Domain, monkeypatch: pytest.MonkeyPatch, chunk_size: int
) -> None:
    config = Config(gid=1, devid=1, chunk_size=chunk_size, notify_size=4)
    monkeypatch.setattr(VirtioPci, "read_config", lambda self: config)
    with pytest.raises(RemoteProtocolError, match="chunk_size"):
        domain.device()


@pytest.mark.parametrize(
    ("notify_size", "slot", "expected"),
    [(0, 3, (3, 1)), (1, 5, (5, 1)), (4, 2, (8, 4)), (5, 1, (5, 1)), (8, 1, (8, 4))],
)
def test_the_notify_slot_is_written_at_its_stride_and_aligned(
    domain: Domain, monkeypatch: pytest.MonkeyPatch, notify_size: int, slot: int, expected: tuple[int, int]
) -> None:
    config = Config(gid=1, devid=1, chunk_size=CHUNK, notify_size=notify_size)
    monkeypatch.setattr(VirtioPci, "read_config", lambda self: config)
    device = domain.device()
    written: list[tuple[int, int]] = []
    monkeypatch.setattr(
        device.transport, "bar_write", lambda bar, offset, data, **_: written.append((offset, len(data)))
    )
    device.ring_slot(slot)
    assert written == [expected]


@pytest.mark.parametrize("slot", [CHUNKS, 1 << 40])
def test_a_slot_outside_of_the_notify_area_is_not_written(domain: Domain, slot: int) -> None:
    with pytest.raises(RemoteProtocolError, match="outside the notify area"):
        domain.device().ring_slot(slot)


def test_a_device_that_cannot_be_notified_is_gone(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    device = domain.device()
    region = device.alloc(CHUNK)

    def refuse(*_: object, **__: object) -> None:
        raise TransportError("the bus is stuck")

    monkeypatch.setattr(device.transport, "bar_write", refuse)
    with pytest.raises(TransportError, match="the bus is stuck"):
        device.alloc(CHUNK)
    assert device.gone is not None
    assert "the bus is stuck" in device.gone
    region.close()
    with pytest.raises(StaleRegionError):
        region.ring()


def test_a_status_that_cannot_be_read_is_logged_and_ends_nothing(
    domain: Domain, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = domain.device()

    def refuse(*_: object) -> bytes:
        raise TransportError("slow")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(device.transport, "bar_read", refuse)
        device._on_config_change()
    assert "status cannot be read: slow" in caplog.text
    assert device.alloc(CHUNK)


def test_a_step_of_closing_that_fails_stops_no_other(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    device = Device(domain.plug())
    device.alloc(CHUNK)

    def refuse(*_: object) -> None:
        raise TransportError("no")

    monkeypatch.setattr(device.transport, "dma_free", refuse)
    device.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not any("ism-driver" in thread.name for thread in threading.enumerate())


def test_a_token_of_another_domain_is_unknown(domain: Domain) -> None:
    other = Domain()
    region = other.device().alloc(CHUNK, grants=[(SHARED, None)])
    with pytest.raises(Exception, match="ENOENT"):
        domain.device().attach(Token(region.token))
    other.devices[0].close()


def test_a_device_that_nobody_tells_of_is_found_dead_by_its_registers(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InMemoryTransport, "tells_of_loss", property(lambda _: False))
    monkeypatch.setattr("ism.driver.function._LOOK_INTERVAL_S", 0.01)
    device = domain.device()
    region = device.alloc(CHUNK)
    dead = threading.Event()
    read = InMemoryTransport.bar_read
    monkeypatch.setattr(
        InMemoryTransport, "bar_read", lambda self, *a: b"\xff" * a[2] if dead.is_set() else read(self, *a)
    )
    other = domain.device()
    device.alloc(CHUNK).close()
    dead.set()
    readable, _, _ = select.select([region], [], [], PATIENCE_S)
    assert readable  # whoever waits for a doorbell is woken
    with pytest.raises(DeviceGoneError, match="read all ones"):
        device.check_usable()
    with pytest.raises(TransportError, match="read all ones"):
        device.alloc(CHUNK)
    dead.clear()
    other.close()


def test_a_device_that_is_looked_at_seldom_is_not_looked_at_with_every_interrupt(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InMemoryTransport, "tells_of_loss", property(lambda _: False))
    monkeypatch.setattr("ism.driver.function._LOOK_INTERVAL_S", 3600)
    device = domain.device()
    reads: list[tuple[object, ...]] = []
    read = InMemoryTransport.bar_read

    def counted(self: InMemoryTransport, *access: int) -> bytes:
        reads.append(access)
        return read(self, *access)

    monkeypatch.setattr(InMemoryTransport, "bar_read", counted)
    peer = domain.device()
    reads.clear()
    for _ in range(20):
        region = device.alloc(CHUNK, grants=[(SHARED, None)])
        peer.attach(region.token).close()
        region.close()
    assert reads == []
