# SPDX-License-Identifier: Apache-2.0
"""`Device.directory` over the in-memory domain: calls, events, callbacks, and the last look when a device is lost."""

from __future__ import annotations

import errno
import queue
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from ism.driver import Device
from ism.driver.control import Command
from ism.driver.directory import Claim, Directory, FourTuple
from ism.driver.events import IntentEvent, parse
from ism.errors import (
    DeviceError,
    DeviceGoneError,
    LocalProtocolError,
    QuotaError,
    RemoteProtocolError,
    TransportError,
)
from ism.ids import DevId
from ism.manager import directory as service
from ism.testing import Fabric, InMemoryTransport
from ism.virtio.ism_spec import Ack, DirectoryEvent, EventType, IsmFeature, PeerEvent
from ism.virtio.pci import Status

PATIENCE_S = 30.0
V4 = bytes(10) + b"\xff\xff"
HERE, THERE, LOOPBACK = V4 + bytes([10, 0, 0, 1]), V4 + bytes([10, 0, 0, 2]), V4 + bytes([127, 0, 0, 1])
CONNECTION = FourTuple(HERE, 40000, THERE, 80, 5)
ACCEPTED = FourTuple(THERE, 80, HERE, 40000, 6)
NONCE = 0xFEDCBA9876543210


class Domain:
    def __init__(self) -> None:
        self.fabric = Fabric()
        self.devices: list[Device] = []

    def device(self, *, interrupts: bool = True, **options: object) -> Device:
        self.devices.append(Device(self.fabric.plug(**options), interrupts=interrupts))  # type: ignore[arg-type]
        return self.devices[-1]


@pytest.fixture
def domain() -> Iterator[Domain]:
    made = Domain()
    yield made
    for device in made.devices:
        device.close()


@pytest.fixture
def client(domain: Domain) -> Device:
    return domain.device()


@pytest.fixture
def server(domain: Domain) -> Device:
    made = domain.device()
    directory_of(made).publish(THERE, 80, 0)
    return made


def directory_of(device: Device) -> Directory:
    assert device.directory is not None
    return device.directory


def port(device: Device) -> InMemoryTransport:
    assert isinstance(device.transport, InMemoryTransport)
    return device.transport


class Heard:
    """Listens for a nonce."""

    def __init__(self, device: Device, nonce: int = NONCE) -> None:
        self.events: queue.SimpleQueue[tuple[EventType, int]] = queue.SimpleQueue()
        directory_of(device).listen(nonce, lambda kind, devid: self.events.put((kind, devid)))

    def next(self) -> tuple[EventType, int]:
        return self.events.get(timeout=PATIENCE_S)


def done(command: Command) -> Command:
    finished = threading.Event()
    command.then(finished.set)
    assert finished.wait(PATIENCE_S)
    return command


def claim(server: Device, connection: FourTuple = ACCEPTED) -> Claim | None:
    directory = directory_of(server)
    return directory.claimed(done(directory.claim_nowait(connection)))


@pytest.mark.parametrize("interrupts", [True, False])
def test_a_connection_is_announced_claimed_and_started(domain: Domain, interrupts: bool) -> None:
    client, server = (domain.device(interrupts=interrupts) for _ in range(2))
    directory_of(server).publish(THERE, 80, 0)
    assert directory_of(client).lookup(THERE, 80, 1) == 1
    heard = Heard(client)
    assert directory_of(client).intend(CONNECTION, NONCE)
    assert claim(server) == Claim(NONCE, client.devid)
    assert heard.next() == (EventType.CLAIMED, server.devid)
    assert directory_of(client).retract(NONCE) is False
    directory_of(server).start_nowait(Claim(NONCE, client.devid)).expect_ok()
    assert heard.next() == (EventType.START, server.devid)
    with pytest.raises(DeviceError) as caught:
        directory_of(server).start_nowait(Claim(NONCE, client.devid)).expect_ok()
    assert caught.value.ack_name == "ENOENT"


def test_every_call_that_waits_has_a_twin_that_does_not(client: Device, server: Device) -> None:
    directory = directory_of(client)
    directory.published(done(directory.publish_nowait(HERE, 1, 0)))
    assert directory.looked_up(done(directory.lookup_nowait(HERE, 1, 0))) == 1
    directory.withdraw(HERE, 1, 0).expect_ok()
    assert directory.looked_up(done(directory.lookup_nowait(HERE, 1, 0))) == 0
    assert directory.intended(done(directory.intend_nowait(CONNECTION, NONCE))) is True
    assert directory.intended(done(directory.intend_nowait(FourTuple(HERE, 1, HERE, 1, 0), 7))) is False
    assert directory.retracted(done(directory.retract_nowait(NONCE))) is True
    assert directory.retracted(done(directory.retract_nowait(NONCE))) is False
    assert claim(server) is None


def test_an_unpublished_destination_is_neither_found_nor_recorded(client: Device) -> None:
    directory = directory_of(client)
    assert directory.lookup(THERE, 80, 0) == 0
    assert directory.intend(CONNECTION, NONCE) is False
    assert directory.retract(NONCE) is False


def test_loopback_is_found_only_by_those_of_one_namespace_who_name_one_scope(domain: Domain) -> None:
    server, near, far = domain.device(namespace=1), domain.device(namespace=1), domain.device(namespace=2)
    directory_of(server).publish(V4 + bytes([127, 0, 0, 0]), 80, 5)
    assert [directory_of(device).lookup(LOOPBACK, 80, 5) for device in (near, far)] == [1, 0]
    assert directory_of(near).lookup(LOOPBACK, 80, 6) == 0


def test_refusals_are_errors_that_say_what_to_do(
    client: Device, server: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(client)
    with pytest.raises(DeviceError, match=r"PUBLISH: ERR: .*belongs to another device"):
        directory.publish(bytes(16), 80, 0)
    with pytest.raises(DeviceError, match="INTEND: ERR"):
        directory.intend(CONNECTION, 0)
    monkeypatch.setattr(service, "MAX_LISTENERS", 0)
    monkeypatch.setattr(service, "MAX_INTENTS", 0)
    with pytest.raises(QuotaError, match="raise its quota"):
        directory.publish(HERE, 80, 0)
    with pytest.raises(QuotaError):
        directory.intend(CONNECTION, NONCE)


@pytest.mark.parametrize("address", [b"", bytes(4), bytes(15), bytes(17)])
def test_an_address_has_sixteen_bytes(client: Device, address: bytes) -> None:
    directory = directory_of(client)
    for call in (
        lambda: directory.publish(address, 80, 0),
        lambda: directory.intend_nowait(FourTuple(address, 1, THERE, 80, 0), 1),
        lambda: directory.claim_nowait(FourTuple(THERE, 80, address, 1, 0)),
    ):
        with pytest.raises(LocalProtocolError, match="16 bytes"):
            call()


def test_values_that_do_not_fit_are_the_caller_s_error(client: Device) -> None:
    with pytest.raises(LocalProtocolError, match="cannot be encoded"):
        directory_of(client).publish(HERE, 65536, 0)
    with pytest.raises(LocalProtocolError, match="cannot be encoded"):
        directory_of(client).retract(1 << 64)


def test_an_answer_cannot_be_read_before_it_is_there(client: Device) -> None:
    directory = directory_of(client)
    port(client).pause()
    command = directory.claim_nowait(ACCEPTED)
    for read in (directory.claimed, directory.intended, directory.retracted, directory.published, directory.looked_up):
        with pytest.raises(LocalProtocolError, match="not answered yet"):
            read(command)
    port(client).resume()
    assert directory.claimed(done(command)) is None


def test_a_reply_that_is_cut_short_is_a_protocol_error(client: Device) -> None:
    command = Command("CLAIM", 0)
    command.finish(bytes(16))
    with pytest.raises(RemoteProtocolError, match="ends after 16 bytes"):
        directory_of(client).claimed(command)


@pytest.mark.parametrize(
    "features",
    [(), (IsmFeature.EVENT_IRQ, IsmFeature.EVENT_VQ), (IsmFeature.EVENT_IRQ, IsmFeature.DIRECTORY)],
)
def test_without_both_features_there_is_no_directory(domain: Domain, features: tuple[int, ...]) -> None:
    assert domain.device(features=features).directory is None


# -- events and callbacks


def test_an_event_may_come_before_the_answer_to_intend_is_seen(client: Device, server: Device) -> None:
    heard = Heard(client)
    command = directory_of(client).intend_nowait(CONNECTION, NONCE)
    assert claim(server) == Claim(NONCE, client.devid)
    assert heard.next() == (EventType.CLAIMED, server.devid)
    assert directory_of(client).intended(done(command)) is True


def test_events_that_nobody_listens_for_are_dropped_and_counted(client: Device, server: Device) -> None:
    directory = directory_of(client)
    heard, ignored = Heard(client, 1), Heard(client, 2)
    for nonce in (2, 3, 1):
        directory.intend(FourTuple(HERE, nonce, THERE, 80, 0), nonce)
    directory.forget(2)
    directory.forget(99)
    for nonce in (2, 3, 1):
        assert claim(server, FourTuple(THERE, 80, HERE, nonce, 0)) == Claim(nonce, client.devid)
    assert heard.next() == (EventType.CLAIMED, server.devid)
    assert directory.unknown_events == 2
    assert ignored.events.empty()


def test_a_nonce_has_one_listener(client: Device) -> None:
    Heard(client)
    with pytest.raises(ValueError, match="already"):
        Heard(client)
    directory_of(client).forget(NONCE)
    Heard(client)


def test_a_callback_that_raises_keeps_no_event_from_others(client: Device, server: Device) -> None:
    def fail(kind: EventType, devid: DevId) -> None:
        raise OSError("no")

    directory = directory_of(client)
    directory.listen(1, fail)
    heard = Heard(client, 2)
    for nonce in (1, 2):
        directory.intend(FourTuple(HERE, nonce, THERE, 80, 0), nonce)
        claim(server, FourTuple(THERE, 80, HERE, nonce, 0))
    assert heard.next() == (EventType.CLAIMED, server.devid)


def test_a_callback_uses_what_does_not_wait_and_is_refused_what_does(client: Device, server: Device) -> None:
    results: queue.SimpleQueue[object] = queue.SimpleQueue()
    directory = directory_of(client)

    def refused(call: Callable[[], object]) -> bool:
        try:
            call()
        except LocalProtocolError as exc:
            return "may not wait" in str(exc)
        return False

    def callback(kind: EventType, devid: DevId) -> None:
        waiting = [
            lambda: directory.publish(HERE, 1, 0),
            lambda: directory.lookup(HERE, 1, 0),
            lambda: directory.intend(CONNECTION, 1),
            lambda: directory.retract(1),
        ]
        results.put([refused(call) for call in waiting])
        directory.retract_nowait(NONCE).then(lambda: results.put("retracted"))
        directory.withdraw(HERE, 1, 0).then(lambda: results.put("withdrawn"))

    directory.listen(NONCE, callback)
    directory.intend(CONNECTION, NONCE)
    claim(server)
    assert results.get(timeout=PATIENCE_S) == [True] * 4
    assert {results.get(timeout=PATIENCE_S) for _ in range(2)} == {"retracted", "withdrawn"}


@pytest.mark.parametrize("length", [24, 31, 32])
def test_events_of_the_directory_are_parsed_whole(length: int) -> None:
    raw = DirectoryEvent(ev_type=EventType.START, nonce=NONCE, devid=3).pack()
    assert parse(raw[:length]) == (IntentEvent(EventType.START, NONCE, 3) if length == 32 else None)
    assert parse(PeerEvent(ev_type=EventType.START | EventType.CLAIMED, offset=1, devid=2, peers=3).pack()) is None


def test_more_commands_than_chains_stand_in_line(client: Device, server: Device) -> None:
    directory = directory_of(client)
    port(client).pause()
    commands = [directory.intend_nowait(FourTuple(HERE, n, THERE, 80, 0), n) for n in range(1, 101)]
    port(client).resume()
    assert all(directory.intended(done(command)) for command in commands)


# -- the end


def silent(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no interrupt of the device arrive: what it writes lies there until somebody looks."""
    monkeypatch.setattr(port(device), "interrupt", lambda vector: None)


def test_a_claim_that_was_acknowledged_is_seen_though_the_manager_died_at_once(
    client: Device, server: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory_of(client).intend(CONNECTION, NONCE)
    silent(server, monkeypatch)
    command = directory_of(server).claim_nowait(ACCEPTED)
    assert not command.done
    port(server).lose("the device manager is gone")
    assert directory_of(server).claimed(done(command)) == Claim(NONCE, client.devid)


def test_an_event_that_was_written_is_delivered_before_commands_fail(
    client: Device, server: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(client)
    order: queue.SimpleQueue[str] = queue.SimpleQueue()
    directory.listen(NONCE, lambda kind, devid: order.put(kind.name or ""))
    directory.intend(CONNECTION, NONCE)
    silent(client, monkeypatch)
    claim(server)
    port(client).pause()
    command = directory.retract_nowait(NONCE)
    command.then(lambda: order.put("retract"))
    port(client).lose("the device manager is gone")
    assert [order.get(timeout=PATIENCE_S) for _ in range(2)] == ["CLAIMED", "retract"]
    with pytest.raises(DeviceGoneError, match="the device manager is gone"):
        directory.retracted(command)


def test_a_claim_that_the_manager_never_saw_has_failed_and_new_ones_are_refused(client: Device, server: Device) -> None:
    directory_of(client).intend(CONNECTION, NONCE)
    port(server).pause()
    directory = directory_of(server)
    sent = directory.claim_nowait(ACCEPTED)
    in_line = [directory.claim_nowait(ACCEPTED) for _ in range(100)]
    port(server).lose("the device manager is gone")
    for command in (sent, *in_line):
        with pytest.raises(DeviceGoneError, match="the device manager is gone"):
            directory.claimed(done(command))
    with pytest.raises(DeviceGoneError, match="the device manager is gone"):
        directory.claim_nowait(ACCEPTED)
    assert directory_of(client).retract(NONCE) is True


def test_a_driver_that_gives_its_device_up_stops_it_before_the_last_look(
    client: Device, server: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory_of(client).intend(CONNECTION, NONCE)
    transport, directory = port(server), directory_of(server)
    transport.pause()
    command = directory.claim_nowait(ACCEPTED)
    server._on_gone("the map channel broke")  # the manager itself lives
    with pytest.raises(DeviceGoneError):
        directory.claimed(done(command))
    assert transport.function.status & Status.FAILED
    transport.resume()
    assert directory_of(client).retract(NONCE) is True


def test_a_claim_whose_notify_failed_is_seen_when_another_notify_led_the_device_to_it(
    client: Device, server: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory_of(client).intend(CONNECTION, NONCE)
    transport, real = port(server), port(server).bar_write
    silent(server, monkeypatch)

    def late(bar: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        real(bar, offset, data)
        if posted:
            raise DeviceGoneError("the socket is closed")

    monkeypatch.setattr(transport, "bar_write", late)
    command = directory_of(server).claim_nowait(ACCEPTED)
    assert directory_of(server).claimed(done(command)) == Claim(NONCE, client.devid)
    assert server.gone is not None


def test_a_claim_is_seen_when_its_device_is_closed(
    client: Device, server: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(server)
    directory_of(client).intend(CONNECTION, NONCE)
    silent(server, monkeypatch)
    answered = directory.claim_nowait(ACCEPTED)
    port(server).pause()
    unseen = directory.claim_nowait(ACCEPTED)
    server.close()
    assert directory.claimed(answered) == Claim(NONCE, client.devid)
    with pytest.raises(DeviceGoneError, match="closed"):
        directory.claimed(unseen)


@pytest.mark.parametrize("closed", [True, False])
def test_of_a_claim_under_way_in_a_device_that_cannot_be_stopped_nobody_can_say(
    client: Device, server: Device, monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    transport, directory = port(server), directory_of(server)
    transport.pause()
    sent = directory.claim_nowait(ACCEPTED)
    in_line = [directory.claim_nowait(ACCEPTED) for _ in range(100)][-1]

    def stuck(bar: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        raise TransportError("no answer within 5 s", errno.ETIMEDOUT)

    monkeypatch.setattr(transport, "bar_write", stuck)
    if closed:
        server.close()
    else:
        server._on_gone("the map channel broke")
    with pytest.raises(TransportError) as caught:
        directory.claimed(done(sent))
    assert not isinstance(caught.value, DeviceGoneError)
    with pytest.raises(DeviceGoneError):
        directory.claimed(done(in_line))


def test_with_a_device_go_its_listeners_and_intents(domain: Domain, client: Device, server: Device) -> None:
    extra = domain.device()
    directory_of(extra).publish(HERE, 81, 0)
    directory_of(extra).intend(CONNECTION, NONCE)
    extra.close()
    assert directory_of(client).lookup(HERE, 81, 0) == 0
    assert claim(server) is None


def test_a_lost_device_s_entries_are_gone_for_the_others(client: Device, server: Device) -> None:
    directory_of(client).intend(CONNECTION, NONCE)
    port(client).lose("killed")
    assert claim(server) is None
    port(server).lose("killed")
    with pytest.raises(DeviceGoneError):
        directory_of(server).withdraw(THERE, 80, 0)


def test_the_acks_have_words_of_the_directory(client: Device) -> None:
    command = Command("RETRACT", 0)
    command.finish(struct.pack("B", Ack.ENOSPC))
    with pytest.raises(DeviceError, match="RETRACT: ENOSPC"):
        directory_of(client).retracted(command)
