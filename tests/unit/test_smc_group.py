# SPDX-License-Identifier: Apache-2.0
"""Link groups: what an ended connection leaves, who may have it again, and what is never given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ism.driver import Device, Region
from ism.ids import DevId, Gid
from ism.shm import compile_kernels, offer
from ism.shm.header import PRODUCER, Header
from ism.shm.kernels import load_kernels
from ism.smc import group as group_module
from ism.smc import handshake
from ism.smc.group import LinkGroups, link_groups, publish_released, release_idle
from ism.smc.handshake_machine import PeerAnswer
from ism.testing import Fabric
from ism.virtio.ism_spec import Permission

SIZE = 65536
RIGHTS = Permission.READ | Permission.WRITE | Permission.ATTACH
CLIENT, SERVER = bytes(15) + b"\1", bytes(15) + b"\2"
CONNECTION = offer.connection_bytes(0, CLIENT, 40000, SERVER, 80)
OTHER = offer.connection_bytes(0, CLIENT, 40001, SERVER, 80)
OFFER = Header.offset_of("offer_state")
FROM = (CLIENT, 0)


@dataclass
class Side:
    """One end: its device, its groups, its own region and the other's."""

    device: Device
    groups: LinkGroups
    own: Region
    attached: Region

    @property
    def devid(self) -> DevId:
        return DevId(self.device.devid)


class Ended:
    """Two devices with one connection between them that is about to end."""

    def __init__(self) -> None:
        compile_kernels()
        self.fabric = Fabric()
        one, two = Device(self.fabric.plug()), Device(self.fabric.plug())
        first = one.alloc(SIZE, grants=[(RIGHTS, DevId(two.devid))])
        second = two.alloc(SIZE, grants=[(RIGHTS, DevId(one.devid))])
        self.client = Side(one, link_groups(one), first, one.attach(second.token))
        self.server = Side(two, link_groups(two), second, two.attach(first.token))

    def keep(self, side: Side, peer: Side, *, address: tuple[bytes, int] | None = FROM) -> None:
        offer.release(side.own, load_kernels().exchange)
        answer = PeerAnswer(
            gid=Gid(peer.device.gid), devid=peer.devid, token=peer.own.token, size=SIZE, eid="X", link_id=0,
            first_contact=True, host="",
        )  # fmt: skip
        side.groups.keep(peer.devid, side.own, side.attached, answer, client=side is self.client, address=address)

    def keep_both(self, address: tuple[bytes, int] | None = FROM) -> None:
        self.keep(self.client, self.server)
        self.keep(self.server, self.client, address=address)

    @property
    def regions(self) -> int:
        return len(self.fabric.registry.regions)


@pytest.fixture
def ended() -> Iterator[Ended]:
    made = Ended()
    yield made
    for side in (made.client, made.server):
        release_idle(side.device)
        side.device.close()
    assert not made.regions


def settle(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_own_region_is_given_again_once_its_writer_has_released_it_and_zeroed(ended: Ended) -> None:
    client, server = ended.client, ended.server
    client.own.view[PRODUCER] = 7
    ended.keep(client, server)
    assert client.groups.take_own(server.devid, SIZE) is None, "its writer may be writing still"
    publish_released(server.attached)
    assert client.groups.take_own(server.devid, SIZE) is client.own
    assert not any(client.own.view[:OFFER])
    assert (client.groups.made, client.groups.reused) == (1, 1)
    for region in (client.own, server.own, server.attached):
        region.close()


def test_whether_there_is_one_can_be_told_without_taking_it(ended: Ended) -> None:
    client, server = ended.client, ended.server
    ended.keep(client, server)
    assert not client.groups.has_own(server.devid, SIZE), "its writer may be writing still"
    publish_released(server.attached)
    assert client.groups.has_own(server.devid, SIZE)
    assert not client.groups.has_own(server.devid, 2 * SIZE)
    assert not client.groups.has_own(DevId(99), SIZE)
    assert client.groups.take_own(server.devid, SIZE) is client.own
    assert not client.groups.has_own(server.devid, SIZE)
    for region in (client.own, server.own, server.attached):
        region.close()


@pytest.mark.parametrize("left", [1, 2])
def test_a_region_is_made_ahead_only_where_the_peers_fits_beside_it(ended: Ended, left: int) -> None:
    device, peer = ended.client.device, ended.server.devid
    free = device.free_window // SIZE - left
    filling = device.alloc(free * SIZE, interrupt=False)
    assert handshake.must_allocate(device, SIZE, peer) == (left == 2)
    for region in (filling, ended.client.own, ended.client.attached, ended.server.own, ended.server.attached):
        region.close()


def test_neither_another_size_nor_another_peer_gets_it(ended: Ended) -> None:
    client, server = ended.client, ended.server
    ended.keep_both()
    assert client.groups.take_own(server.devid, 2 * SIZE) is None
    assert client.groups.take_own(DevId(99), SIZE) is None
    assert client.groups.take_attached(DevId(99), server.own.token) is None


def test_an_attached_region_is_given_once_and_only_by_its_owner_s_name(ended: Ended) -> None:
    client, server = ended.client, ended.server
    ended.keep_both()
    token = server.own.token
    assert client.groups.take_attached(server.devid, client.own.token) is None
    assert client.groups.take_attached(server.devid, token) is client.attached
    assert client.groups.take_attached(server.devid, token) is None
    client.attached.close()


def test_an_offer_is_taken_by_the_owner_for_exactly_that_connection(ended: Ended) -> None:
    client, server = ended.client, ended.server
    ended.keep_both()
    pair = client.groups.offer(server.devid, SIZE, CONNECTION)
    assert pair is not None
    assert (pair.own, pair.attached) == (client.own, client.attached)
    assert server.groups.take_offer(FROM, OTHER) is None
    taken = server.groups.take_offer(FROM, CONNECTION)
    assert taken is not None
    assert (taken.own, taken.attached) == (server.own, server.attached)
    assert offer.state(client.attached) == offer.TAKEN
    assert server.groups.take_offer(FROM, CONNECTION) is None
    for region in (*pair.regions(), *taken.regions()):
        region.close()


@pytest.mark.parametrize("address", [None, (SERVER, 0), (CLIENT, 1)])
def test_an_offer_is_not_looked_at_unless_the_manager_has_named_the_client_s_address(
    ended: Ended, address: tuple[bytes, int] | None
) -> None:
    client, server = ended.client, ended.server
    ended.keep_both(address)
    pair = client.groups.offer(server.devid, SIZE, CONNECTION)
    assert pair is not None
    assert server.groups.take_offer(FROM, CONNECTION) is None
    for region in pair.regions():
        region.close()


def test_an_offered_region_is_given_to_no_connection_and_one_that_is_given_cannot_be_offered(ended: Ended) -> None:
    client, server = ended.client, ended.server
    ended.keep_both()
    pair = client.groups.offer(server.devid, SIZE, CONNECTION)
    assert pair is not None
    assert server.groups.take_own(client.devid, SIZE) is None
    assert offer.withdraw(client.attached, load_kernels().exchange)
    assert server.groups.take_offer(FROM, CONNECTION) is None
    for region in pair.regions():
        region.close()


def test_a_region_in_use_cannot_be_offered(ended: Ended) -> None:
    client, server = ended.client, ended.server
    ended.keep_both()
    given = server.groups.take_own(client.devid, SIZE)  # for a connection announced by a message
    assert given is server.own
    assert client.groups.offer(server.devid, SIZE, CONNECTION) is None
    assert server.groups.take_offer(FROM, CONNECTION) is None
    given.close()


def test_only_the_side_that_had_connected_offers_and_only_the_other_takes(ended: Ended) -> None:
    client, server = ended.client, ended.server
    ended.keep_both()
    assert server.groups.offer(client.devid, SIZE, CONNECTION) is None
    assert offer.make(client.own, CONNECTION, load_kernels().exchange)
    assert client.groups.take_offer(FROM, CONNECTION) is None


def test_a_sleeping_client_is_rung(ended: Ended) -> None:
    client, server = ended.client, ended.server
    ended.keep_both()
    pair = client.groups.offer(server.devid, SIZE, CONNECTION)
    assert pair is not None
    assert offer.wait(client.attached)
    rung: list[int] = []
    client.device.service.add(
        client.own.fileno(), lambda: rung.append(client.device.service.remove(client.own.fileno()) or 1)
    )
    taken = server.groups.take_offer(FROM, CONNECTION)
    assert taken is not None
    settle(lambda: rung)
    for region in (*pair.regions(), *taken.regions()):
        region.close()


def test_a_peer_whose_device_is_gone_leaves_nothing_behind(ended: Ended) -> None:
    ended.keep_both()
    ended.server.groups.clear()
    ended.server.device.close()
    settle(lambda: not ended.regions)
    assert ended.client.groups.offer(ended.server.devid, SIZE, CONNECTION) is None


def test_no_more_than_so_many_are_kept(ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "MAX_PER_GROUP", 1)
    client, server = ended.client, ended.server
    ended.keep_both()
    another = client.device.alloc(SIZE, grants=[(RIGHTS, server.devid)])
    client.groups.keep(server.devid, another, None)
    settle(lambda: client.own.closed and client.attached.closed)


def test_where_an_exchange_is_not_atomic_nothing_is_kept_and_nothing_can_be_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = Ended()
    ended.server.device.atomic = False
    monkeypatch.setattr(ended.server, "groups", group_module.LinkGroups(keeps=ended.server.device.atomic))
    ended.keep_both()
    assert ended.server.own.closed
    assert ended.server.attached.closed
    assert not ended.server.groups.clear()
    assert ended.server.groups.take_offer(FROM, CONNECTION) is None
    for side in (ended.client, ended.server):
        side.device.close()
