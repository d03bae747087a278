# SPDX-License-Identifier: Apache-2.0
"""Control commands over the queue: framing, acks, used lengths, and what each does to the windows."""

from __future__ import annotations

import struct

import pytest
from device_rig import BOTH, CHUNK, WINDOW, Driver, Host

from ism.virtio.ism_spec import Ack, CommandClass, IsmFeature, Permission
from ism.virtio.pci import Status

ALLOC = struct.Struct("<BBQ")
ATTACH = struct.Struct("<BBQI")


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def driver(host: Host) -> Driver:
    return host.add(7).start()


def alloc(size: int) -> bytes:
    return ALLOC.pack(CommandClass.ALLOC, 0, size)


def test_alloc_replies_ack_token_and_areas(host: Host, driver: Driver) -> None:
    length, reply = driver.command(alloc(CHUNK + 1), 64)
    ack, token, num, offset, size = struct.unpack_from("<BQQQQ", reply)
    assert (ack, num, size) == (Ack.OK, 1, 2 * CHUNK)
    assert token != 0
    assert length == 1 + 16 + 16
    assert reply[length:] == b"\xee" * (64 - length)
    assert host.windows[7][offset].length == 2 * CHUNK


def test_a_region_is_mapped_before_its_ack_is_written(host: Host, driver: Driver) -> None:
    reply = driver.submit(alloc(CHUNK), 64)
    work = driver.notify()
    assert driver.ram.read(reply, 1) == b"\xee"
    assert driver.control.take_used() == []
    assert work.requests[0].effects
    host.finish(driver.function, work.requests[0])
    assert driver.ram.read(reply, 1) == b"\0"
    assert len(driver.control.take_used()) == 1


def test_the_reply_may_be_scattered_and_the_command_split_anywhere(driver: Driver) -> None:
    data = alloc(CHUNK)
    driver.ram.write(driver.buffers, data)
    out = driver.buffers + 0x100
    driver.control.add(
        [(driver.buffers, 1), (driver.buffers + 1, 4), (driver.buffers + 5, 5)],
        [(out, 1), (out + 0x20, 7), (out + 0x40, 100)],
    )
    driver.host.do(driver.function, driver.notify())
    assert driver.control.take_used() == [(0, 33)]
    joined = driver.ram.read(out, 1) + driver.ram.read(out + 0x20, 7) + driver.ram.read(out + 0x40, 25)
    assert struct.unpack_from("<B8xQQQ", joined) == (0, 1, 0, CHUNK)


def test_alloc_of_size_0_and_of_impossible_sizes_is_refused(driver: Driver) -> None:
    assert driver.command(alloc(0)) == (1, b"\xff" + b"\xee" * 1023)
    assert driver.ack(alloc((1 << 64) - 1)) == Ack.ENOMEM
    assert driver.ack(alloc(WINDOW + CHUNK)) == Ack.ENOSPC


def fragment(driver: Driver) -> None:
    """Leave only single free chunks, four of them."""
    tokens = [driver.alloc(CHUNK)[0] for _ in range(8)]
    driver.alloc(WINDOW - 8 * CHUNK)
    for token in tokens[::2]:
        assert driver.ack(struct.pack("<BBQ", CommandClass.DETACH, 0, token)) == Ack.OK


def test_too_small_a_reply_gets_e2big_with_the_number_of_slots_and_changes_nothing(host: Host, driver: Driver) -> None:
    fragment(driver)
    before = dict(host.windows[7])
    length, reply = driver.command(alloc(3 * CHUNK), 17 + 2 * 16 + 15)
    assert struct.unpack_from("<BQQ", reply) == (Ack.E2BIG, 0, 3)
    assert length == 17
    assert reply[length:] == b"\xee" * (len(reply) - length)
    assert host.windows[7] == before
    length, reply = driver.command(alloc(3 * CHUNK), 17 + 3 * 16)
    assert reply[0] == Ack.OK
    areas = list(struct.iter_unpack("<QQ", reply[17:length]))
    assert [size for _, size in areas] == [CHUNK] * 3


def test_attach_reports_e2big_with_num_at_offset_1(host: Host, driver: Driver) -> None:
    owner = host.add(8).start()
    token, _ = owner.alloc(3 * CHUNK)
    owner.grant_all(token)
    fragment(driver)
    length, reply = driver.command(ATTACH.pack(CommandClass.ATTACH, 0, token, 0), 9)
    assert (length, struct.unpack_from("<BQ", reply)) == (9, (Ack.E2BIG, 3))
    assert driver.ack(struct.pack("<BBQ", CommandClass.DETACH, 0, token)) == Ack.ENOENT
    length, reply = driver.command(ATTACH.pack(CommandClass.ATTACH, 0, token, 0), 9 + 48)
    assert (length, reply[0]) == (9 + 48, Ack.OK)


@pytest.mark.parametrize("capacity", [1, 2, 16])
def test_no_room_for_the_reply_s_fixed_fields_is_an_error_of_one_byte(
    host: Host, driver: Driver, capacity: int
) -> None:
    assert driver.command(alloc(CHUNK), capacity) == (1, b"\xff" + b"\xee" * (capacity - 1))
    assert host.windows[7] == {}
    assert host.registry.regions == {}


def test_attach_accepts_12_bytes_of_data_and_padding(host: Host, driver: Driver) -> None:
    peer = host.add(8).start()
    token, _ = driver.alloc(CHUNK)
    driver.grant_all(token)
    command = ATTACH.pack(CommandClass.ATTACH, 0, token, 3)
    assert peer.command(command)[0] == 9 + 16
    assert peer.ack(command + bytes(4)) == Ack.OK
    assert peer.ack(command + b"\xff" * 3000) == Ack.OK
    assert peer.ack(command[:-1]) == Ack.ERR


def test_rights_decide_what_a_peer_may_attach(host: Host, driver: Driver) -> None:
    peer = host.add(8).start()
    token, _ = driver.alloc(CHUNK)

    def attach(rights: int) -> int:
        return peer.ack(ATTACH.pack(CommandClass.ATTACH, 0, token, rights))

    assert attach(0) == Ack.PERM_EATTACH
    driver.grant_all(token, Permission.READ | Permission.ATTACH)
    assert attach(3) == Ack.PERM_EWRITE
    assert attach(4) == Ack.ERR
    [(offset, _)] = peer.attach(token)
    assert host.windows[8][offset].rights == Permission.READ


def test_grants_can_name_one_device(host: Host, driver: Driver) -> None:
    peer, other = host.add(8).start(), host.add(9).start()
    token, _ = driver.alloc(CHUNK)
    grant = struct.pack("<BBQQQ", CommandClass.GRANT, 1, token, 5, 8)
    assert driver.command(grant) == (1, b"\0" + b"\xee" * 1023)
    assert peer.attach(token)
    assert other.ack(ATTACH.pack(CommandClass.ATTACH, 0, token, 0)) == Ack.PERM_EATTACH
    assert driver.ack(grant[:-1]) == Ack.ERR


def test_detach_unmaps_before_its_ack_is_written(host: Host, driver: Driver) -> None:
    token, [(offset, _)] = driver.alloc(CHUNK)
    assert offset in host.windows[7]
    reply = driver.submit(struct.pack("<BBQ", CommandClass.DETACH, 0, token), 1)
    [request] = driver.notify().requests
    host.carry_out(request.effects)
    assert host.windows[7] == {}
    assert driver.ram.read(reply, 1) == b"\xee"
    host.carry_out(driver.function.complete(request))
    assert driver.control.take_used()[0][1] == 1
    assert driver.ram.read(reply, 1) == b"\0"
    assert driver.ack(struct.pack("<BBQ", CommandClass.DETACH, 0, token)) == Ack.ENOENT


@pytest.mark.parametrize(("vector", "ack"), [(0, 0), (7, 0), (0xFFFF, 0), (8, 255), (0x1_0000, 255), (1 << 63, 255)])
def test_event_vector_takes_vectors_of_the_table_and_none(driver: Driver, vector: int, ack: int) -> None:
    token, _ = driver.alloc(CHUNK)
    assert driver.bind(token, vector) == ack


def test_event_vector_of_an_unknown_region_is_enoent(driver: Driver) -> None:
    assert driver.bind(12345, 1) == Ack.ENOENT


def test_event_vector_is_an_error_on_a_device_without_the_feature() -> None:
    driver = Host().add(7, features=frozenset({IsmFeature.EVENT_VQ})).start()
    token, _ = driver.alloc(CHUNK)
    assert driver.bind(token, 1) == Ack.ERR


def test_event_vector_works_for_a_driver_that_negotiates_no_device_feature() -> None:
    driver = Host().add(7, features=BOTH).start(features=1 << 32)
    token, _ = driver.alloc(CHUNK)
    assert driver.bind(token, 1) == Ack.OK


@pytest.mark.parametrize("header", [b"\0\1", b"\1\1", b"\2\1", b"\3\2", b"\4\1", b"\5\0", b"\xff\xff", b"\x20\0"])
def test_unknown_classes_and_commands_are_errors_and_counted(driver: Driver, header: bytes) -> None:
    assert driver.command(header + bytes(64)) == (1, b"\xff" + b"\xee" * 1023)
    assert driver.function.stats["unknown_commands"] == 1
    assert driver.function.stats["refused_commands"] == 1


@pytest.mark.parametrize(
    ("header", "size"), [(b"\0\0", 8), (b"\1\0", 12), (b"\2\0", 8), (b"\3\0", 16), (b"\3\1", 24), (b"\4\0", 16)]
)
def test_data_that_is_too_short_is_an_error(driver: Driver, header: bytes, size: int) -> None:
    for n in (0, 1, size - 1):
        assert driver.ack(header + bytes(n)) == Ack.ERR
    assert driver.function.stats["unknown_commands"] == 0


@pytest.mark.parametrize(("readable", "capacity"), [(b"", 64), (b"\0", 64), (alloc(CHUNK), 0)])
def test_a_chain_that_cannot_be_a_command_needs_a_reset(
    host: Host, driver: Driver, readable: bytes, capacity: int
) -> None:
    driver.submit(readable, capacity)
    host.do(driver.function, driver.notify())
    assert driver.status & Status.NEEDS_RESET
    assert driver.control.take_used() == []
    assert host.registry.regions == {}
    assert host.take_raised() == [(7, 0)]


def test_a_command_the_host_cannot_carry_out_is_given_up(host: Host, driver: Driver) -> None:
    reply = driver.submit(alloc(CHUNK), 64)
    [request] = driver.notify().requests
    host.carry_out(driver.function.give_up(request, Ack.ENOMEM))
    host.carry_out(driver.function.complete(request))
    assert driver.ram.read(reply, 2) == b"\x0c\xee"
    assert driver.control.take_used() == [(0, 1)]
    assert host.registry.regions == {}
    assert driver.function.stats["refused_commands"] == 1


def test_a_second_attach_that_is_given_up_leaves_the_first(host: Host, driver: Driver) -> None:
    token, _ = driver.alloc(CHUNK)
    driver.submit(ATTACH.pack(CommandClass.ATTACH, 0, token, 0), 64)
    [request] = driver.notify().requests
    host.carry_out(driver.function.give_up(request))
    host.carry_out(driver.function.complete(request))
    assert token in host.registry.regions
    assert len(host.windows[7]) == 1
