# SPDX-License-Identifier: Apache-2.0
"""The commands of class DIRECTORY on the control queue: bytes, the feature, the order of a claim's ack and event."""

from __future__ import annotations

import struct

import pytest
from device_rig import BOTH, RAM_BASE, RAM_SIZE, VERSION_1, Driver, Host

from ism.device.contract import Effect, PostEvent
from ism.device.function import Request
from ism.virtio.ism_spec import Ack, CommandClass, DirectoryEvent, EventType, IsmFeature
from ism.virtio.pci import Status

FEATURES = BOTH | {IsmFeature.DIRECTORY}
CLIENT, SERVER = 7, 8
NONCE = 0x1122334455667788
HERE, THERE = bytes(range(16)), bytes(range(16, 32))
PUBLISH, WITHDRAW, LOOKUP, INTEND, CLAIM, RETRACT, START = (bytes([CommandClass.DIRECTORY, n]) for n in range(7))
PLACE = struct.pack("<16sHHIQ", THERE, 80, 0xFFFF, 0xFFFFFFFF, 9)
INTENT = struct.pack("<QQ16s16sHHI", NONCE, 9, HERE, THERE, 40000, 80, 0xFFFFFFFF)
ACCEPTED = struct.pack("<QQ16s16sHHI", 9, 0xFFFFFFFF, THERE, HERE, 80, 40000, 0xFFFFFFFF)
CLAIMED = DirectoryEvent(ev_type=EventType.CLAIMED, nonce=NONCE, devid=SERVER).pack()


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def client(host: Host) -> Driver:
    made = host.add(CLIENT, features=FEATURES).start()
    made.post_event_buffers(8)
    return made


@pytest.fixture
def server(host: Host) -> Driver:
    return host.add(SERVER, features=FEATURES).start()


def submitted(driver: Driver, readable: bytes) -> Request:
    driver.submit(readable, 64)
    (request,) = driver.notify().requests
    return request


def intended(client: Driver, server: Driver) -> None:
    assert server.ack(PUBLISH + PLACE) == Ack.OK
    assert client.ack(INTEND + INTENT) == Ack.OK


def events_of(effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, PostEvent)]


def test_each_command_s_bytes_and_its_reply_s(host: Host, client: Driver, server: Driver) -> None:
    assert client.command(LOOKUP + PLACE)[1][0] == Ack.ENOENT
    assert server.command(PUBLISH + PLACE)[0] == 1
    assert client.command(LOOKUP + PLACE, 9) == (9, b"\0" + struct.pack("<Q", 1))
    assert client.command(INTEND + INTENT)[0] == 1
    assert server.command(CLAIM + ACCEPTED, 17) == (17, b"\0" + struct.pack("<QQ", NONCE, CLIENT))
    assert client.take_events() == [CLAIMED] == [struct.pack("<QQQQ", 1 << 16, NONCE, SERVER, 0)]
    assert server.command(START + struct.pack("<QQ", NONCE, CLIENT))[1][0] == Ack.OK
    assert client.take_events() == [struct.pack("<QQQQ", 1 << 17, NONCE, SERVER, 0)]
    assert client.ack(RETRACT + struct.pack("<Q", NONCE)) == Ack.ENOENT
    assert server.ack(WITHDRAW + PLACE) == Ack.OK
    assert client.ack(INTEND + INTENT) == Ack.ENOENT
    assert server.command(CLAIM + ACCEPTED) == (1, bytes([Ack.ENOENT]) + b"\xee" * 1023)


def test_a_reply_that_has_no_room_is_refused_before_anything_happens(client: Driver, server: Driver) -> None:
    intended(client, server)
    assert server.command(CLAIM + ACCEPTED, 16)[1][0] == Ack.ERR
    assert client.command(LOOKUP + PLACE, 8)[1][0] == Ack.ERR
    assert client.take_events() == []
    assert client.ack(RETRACT + struct.pack("<Q", NONCE)) == Ack.OK


@pytest.mark.parametrize("size", [0, 7, 8, 31])
def test_data_that_is_too_short_is_an_error(server: Driver, size: int) -> None:
    for command in (PUBLISH, WITHDRAW, LOOKUP, INTEND, CLAIM, START):
        assert server.ack(command + bytes(min(size, 15 if command == START else size))) == Ack.ERR
    assert server.ack(RETRACT + bytes(min(size, 7))) == Ack.ERR
    assert server.function.stats["unknown_commands"] == 0


def test_the_class_is_unknown_unless_the_feature_is_negotiated(host: Host) -> None:
    without = host.add(1).start()
    declined = host.add(2, features=FEATURES).start(features=VERSION_1 | 1 << IsmFeature.EVENT_VQ)
    for driver in (without, declined):
        for number in range(7):
            assert driver.ack(bytes([CommandClass.DIRECTORY, number]) + bytes(64)) == Ack.ERR
        assert driver.function.stats["unknown_commands"] == 7
    assert not without.offered() >> IsmFeature.DIRECTORY & 1
    assert declined.offered() >> IsmFeature.DIRECTORY & 1
    assert list(host.registry.directory.listeners()) == []


def test_a_command_behind_the_last_is_unknown(server: Driver) -> None:
    assert server.ack(bytes([CommandClass.DIRECTORY, 7]) + bytes(64)) == Ack.ERR
    assert server.function.stats["unknown_commands"] == 1


def test_a_driver_without_an_event_queue_can_claim_and_one_that_is_claimed_learns_it_by_retracting(host: Host) -> None:
    features = frozenset({IsmFeature.DIRECTORY})
    client, server = (host.add(devid, features=features).start() for devid in (CLIENT, SERVER))
    intended(client, server)
    assert server.ack(CLAIM + ACCEPTED) == Ack.OK
    assert client.function.stats["events_dropped"] == 1
    assert client.ack(RETRACT + struct.pack("<Q", NONCE)) == Ack.ENOENT


# -- the order of ack and event


def test_the_client_is_told_only_when_the_server_s_ack_is_on_its_ring(
    host: Host, client: Driver, server: Driver
) -> None:
    intended(client, server)
    request = submitted(server, CLAIM + ACCEPTED)
    assert request.effects == ()
    assert server.control.used_idx() == 1
    effects = server.function.complete(request)
    assert server.control.used_idx() == 2
    assert client.take_events() == []
    assert effects[-1:] == events_of(effects) == [PostEvent(CLIENT, CLAIMED)]
    host.carry_out(effects)
    assert client.take_events() == [CLAIMED]


def test_a_claim_is_decided_when_it_is_completed_so_a_retract_in_between_wins(
    host: Host, client: Driver, server: Driver
) -> None:
    intended(client, server)
    request = submitted(server, CLAIM + ACCEPTED)
    assert client.ack(RETRACT + struct.pack("<Q", NONCE)) == Ack.OK
    assert events_of(server.function.complete(request)) == []
    assert server.ram.read(server.buffers + 0x1000, 1)[0] == Ack.ENOENT
    assert server.function.stats["refused_commands"] == 1


def test_of_two_claims_under_way_the_first_to_be_completed_wins(host: Host, client: Driver, server: Driver) -> None:
    intended(client, server)
    for slot in (0, 1):
        server.submit(CLAIM + ACCEPTED, 64, slot)
    first, second = server.notify().requests
    assert events_of(server.function.complete(second))
    assert not events_of(server.function.complete(first))
    acks = [server.ram.read(server.buffers + 0x2000 * slot + 0x1000, 1)[0] for slot in (0, 1)]
    assert acks == [Ack.ENOENT, Ack.OK]


def test_a_claim_of_a_device_that_was_reset_meanwhile_never_happens(host: Host, client: Driver, server: Driver) -> None:
    intended(client, server)
    request = submitted(server, CLAIM + ACCEPTED)
    server.start()
    assert server.function.complete(request) == []
    assert client.ack(RETRACT + struct.pack("<Q", NONCE)) == Ack.OK


def test_a_claim_of_a_driver_that_gave_up_meanwhile_never_happens(host: Host, client: Driver, server: Driver) -> None:
    intended(client, server)
    request = submitted(server, CLAIM + ACCEPTED)
    server.add_status(Status.FAILED)
    assert server.function.complete(request) == []
    assert server.function.stats["abandoned_commands"] == 1
    assert client.ack(RETRACT + struct.pack("<Q", NONCE)) == Ack.OK


def test_a_claim_that_the_host_gives_up_never_happens(host: Host, client: Driver, server: Driver) -> None:
    intended(client, server)
    request = submitted(server, CLAIM + ACCEPTED)
    assert server.function.give_up(request) == []
    assert events_of(server.function.complete(request)) == []
    assert server.ram.read(server.buffers + 0x1000, 1)[0] == Ack.ENOMEM
    assert client.ack(RETRACT + struct.pack("<Q", NONCE)) == Ack.OK


def test_a_claim_whose_ack_cannot_be_written_never_happens(host: Host, client: Driver, server: Driver) -> None:
    intended(client, server)
    request = submitted(server, CLAIM + ACCEPTED)
    ring, server.function._queues[0].device = server.control.device, RAM_BASE + RAM_SIZE
    assert events_of(server.function.complete(request)) == []
    assert server.status & Status.NEEDS_RESET
    server.function._queues[0].device = ring
    assert server.control.used_idx() == 1
    assert client.ack(RETRACT + struct.pack("<Q", NONCE)) == Ack.OK


def test_a_claim_whose_ack_is_written_stands_though_the_ring_is_broken_behind_it(
    host: Host, client: Driver, server: Driver
) -> None:
    intended(client, server)
    request = submitted(server, CLAIM + ACCEPTED)
    server.function._queues[0].driver = RAM_BASE + RAM_SIZE  # where the driver says whether it wants an interrupt
    effects = server.function.complete(request)
    assert server.status & Status.NEEDS_RESET
    assert server.control.used_idx() == 2
    assert events_of(effects) == [PostEvent(CLIENT, CLAIMED)]
    assert client.ack(RETRACT + struct.pack("<Q", NONCE)) == Ack.ENOENT


def test_a_driver_that_gave_up_is_served_no_queue_until_it_resets_and_its_doorbells_still_ring(host: Host) -> None:
    driver, peer = host.add(CLIENT, features=FEATURES).start(), host.add(SERVER, features=FEATURES).start()
    token, areas = driver.alloc(4096)
    driver.grant_all(token)
    peer.attach(token)
    peer.bind(token, 3)
    driver.post_event_buffers(8)
    driver.take_events()
    driver.add_status(Status.FAILED)
    driver.submit(PUBLISH + PLACE, 64)
    assert driver.notify().requests == []
    host.carry_out(driver.function.post_event(CLAIMED))
    assert driver.take_events() == []
    host.take_raised()
    driver.ring_doorbell(areas[0][0] // 4096)
    assert host.take_raised() == [(SERVER, 3)]
    driver.start()
    assert driver.ack(PUBLISH + PLACE) == Ack.OK
