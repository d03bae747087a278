# SPDX-License-Identifier: Apache-2.0
"""The directory: who may publish and intend what, what matches what, what goes with whom, what each ack means."""

from __future__ import annotations

import ipaddress

import pytest

from ism.device.contract import Decision, Effect, PostEvent
from ism.ids import DevId, Gid
from ism.manager import directory as module
from ism.manager.directory import Directory, is_private, is_private_network, network_of
from ism.manager.metered import MeteredRegistry
from ism.manager.quota import Quota, TokenBucket
from ism.manager.registry import DomainRegistry
from ism.virtio.ism_spec import (
    Ack,
    ClaimReply,
    ClaimRequest,
    DirectoryEvent,
    EventType,
    IntendRequest,
    ListenerRequest,
    LookupReply,
    RetractRequest,
    StartRequest,
)

A, B, C = DevId(1), DevId(2), DevId(3)
PORT, CLIENT_PORT = 80, 40000


def packed(text: str) -> bytes:
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


class Rig:
    """A directory of three devices; commands by address texts. A decision is committed at once, as its ack is seen."""

    def __init__(self) -> None:
        self.directory = Directory()
        self.events: list[tuple[int, EventType, int, int]] = []
        for devid in (A, B, C):
            self.directory.add(devid)
            self.directory.set_scope(devid, "here")

    def carry_out(self, effects: object) -> None:
        for effect in effects:  # type: ignore[attr-defined]
            assert isinstance(effect, PostEvent)
            event = DirectoryEvent.unpack(effect.payload)
            self.events.append((effect.devid, EventType(event.ev_type), event.nonce, event.devid))

    def seen(self, decision: Decision) -> Ack:
        self.carry_out(decision.effects)
        if decision.commit is not None:
            self.carry_out(decision.commit())
        return decision.ack

    def publish(self, devid: DevId, address: str, port: int = PORT, scope: int = 0) -> Ack:
        return self.seen(self.directory.publish(devid, listener(address, port, scope)))

    def withdraw(self, devid: DevId, address: str, port: int = PORT, scope: int = 0) -> Ack:
        return self.seen(self.directory.withdraw(devid, listener(address, port, scope)))

    def lookup(self, devid: DevId, address: str, port: int = PORT, scope: int = 0) -> int:
        decision = self.directory.lookup(devid, listener(address, port, scope))
        if decision.ack is Ack.ENOENT:
            return 0
        assert decision.ack is Ack.OK
        return LookupReply.unpack(decision.reply).listeners

    def intend(
        self,
        devid: DevId,
        nonce: int,
        local: str,
        remote: str,
        *,
        ports: tuple[int, int] = (CLIENT_PORT, PORT),
        scope=0,
    ) -> Ack:
        request = IntendRequest(
            nonce=nonce,
            scope=scope,
            local_address=packed(local),
            remote_address=packed(remote),
            local_port=ports[0],
            remote_port=ports[1],
        )
        return self.seen(self.directory.intend(devid, request))

    def deciding(self, devid: DevId, local: str, remote: str, *, ports: tuple[int, int] = (PORT, CLIENT_PORT), scope=0):
        request = ClaimRequest(
            scope=scope,
            local_address=packed(local),
            remote_address=packed(remote),
            local_port=ports[0],
            remote_port=ports[1],
        )
        return self.directory.claim(devid, request)

    def claim(self, devid: DevId, local: str, remote: str, **options) -> tuple[int, int] | None:
        decision = self.deciding(devid, local, remote, **options)
        if self.seen(decision) is Ack.ENOENT:
            assert decision.reply == b""
            return None
        assert decision.ack is Ack.OK
        reply = ClaimReply.unpack(decision.reply)
        return reply.nonce, reply.devid

    def retract(self, devid: DevId, nonce: int) -> Ack:
        return self.seen(self.directory.retract(devid, RetractRequest(nonce=nonce)))

    def start(self, devid: DevId, nonce: int, client: DevId) -> Ack:
        return self.seen(self.directory.start(devid, StartRequest(nonce=nonce, devid=client)))

    def is_empty(self) -> bool:
        tables = self.directory._tables
        members = self.directory.members.values()
        return not (
            tables.listeners
            or tables.by_connection
            or tables.by_nonce
            or any(m.listeners or m.intents or m.claims or m.claimed_by for m in members)
        )


def listener(address: str, port: int, scope: int) -> ListenerRequest:
    return ListenerRequest(address=packed(address), port=port, scope=scope)


@pytest.fixture
def rig() -> Rig:
    return Rig()


# -- listeners


def test_a_destination_is_published_as_often_as_it_was_and_not_once_more(rig: Rig) -> None:
    assert rig.lookup(A, "10.0.0.2") == 0
    assert rig.publish(B, "10.0.0.2") is Ack.OK
    assert rig.publish(B, "10.0.0.2") is Ack.OK
    assert rig.publish(C, "10.0.0.2") is Ack.OK
    assert rig.lookup(A, "10.0.0.2") == 2
    assert rig.lookup(A, "10.0.0.2", 81) == rig.lookup(A, "10.0.0.3") == 0
    assert [rig.withdraw(B, "10.0.0.2") for _ in range(3)] == [Ack.OK, Ack.OK, Ack.ENOENT]
    assert rig.lookup(A, "10.0.0.2") == 1
    assert rig.withdraw(C, "10.0.0.2") is Ack.OK
    assert rig.is_empty()


@pytest.mark.parametrize(("address", "port"), [("::", 80), ("0.0.0.0", 80), ("10.0.0.1", 0)])
def test_wildcards_and_port_zero_cannot_be_published(rig: Rig, address: str, port: int) -> None:
    assert rig.publish(A, address, port) is Ack.ERR
    assert rig.withdraw(A, address, port) is Ack.ENOENT
    assert rig.directory.members[A].stats.refused == 1
    assert rig.is_empty()


def test_the_same_ipv4_and_mapped_address_are_one_and_ipv6_is_another(rig: Rig) -> None:
    rig.publish(A, "::ffff:10.0.0.1")
    assert rig.lookup(B, "10.0.0.1") == 1
    assert rig.lookup(B, "::10.0.0.1") == 0


def test_listeners_have_a_quota_and_a_second_listener_of_one_place_costs_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LISTENERS", 2)
    assert [rig.publish(A, "10.0.0.1", port) for port in (1, 2, 3, 2)] == [Ack.OK, Ack.OK, Ack.ENOMEM, Ack.OK]
    assert rig.publish(B, "10.0.0.1", 3) is Ack.OK
    rig.withdraw(A, "10.0.0.1", 1)
    assert rig.publish(A, "10.0.0.1", 3) is Ack.OK


# -- what matches what


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("127.0.0.1", True),
        ("127.255.255.255", True),
        ("::1", True),
        ("fe80::1", True),
        ("febf::1", True),
        ("fec0::1", False),
        ("fe7f::1", False),
        ("128.0.0.1", False),
        ("126.255.255.255", False),
        ("::127.0.0.1", False),
        ("::2", False),
        ("10.0.0.1", False),
        ("fd00::1", False),
    ],
)
def test_loopback_and_link_local_are_private_to_a_namespace(address: str, private: bool) -> None:
    assert is_private(packed(address)) is private


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "fe80::7"])
def test_a_private_destination_is_found_in_its_own_scope_only(rig: Rig, address: str) -> None:
    rig.directory.set_scope(C, "elsewhere")
    rig.publish(B, address, scope=7)
    assert rig.lookup(A, address, scope=7) == 1
    assert rig.lookup(A, address, scope=8) == 0
    assert rig.lookup(C, address, scope=7) == 0
    assert rig.withdraw(B, address, scope=8) is Ack.ENOENT
    assert rig.intend(C, 1, address, address, scope=7) is Ack.ENOENT
    assert rig.intend(A, 1, address, address, scope=7) is Ack.OK
    assert rig.claim(C, address, address, scope=7) is None
    assert rig.claim(B, address, address, scope=8) is None
    assert rig.claim(B, address, address, scope=7) == (1, A)


def test_any_other_destination_is_found_from_every_scope(rig: Rig) -> None:
    rig.directory.set_scope(C, "elsewhere")
    rig.publish(B, "10.0.0.2", scope=7)
    assert rig.lookup(C, "10.0.0.2", scope=8) == 1
    assert rig.intend(C, 1, "10.0.0.1", "10.0.0.2", scope=8) is Ack.OK
    assert rig.claim(B, "10.0.0.2", "10.0.0.1", scope=9) == (1, C)


def test_a_private_source_keeps_a_connection_in_its_scope_though_the_destination_is_everybodys(rig: Rig) -> None:
    rig.directory.set_scope(C, "elsewhere")
    for devid in (B, C):
        rig.publish(devid, "10.0.0.2")
    assert rig.intend(A, 1, "127.0.0.1", "10.0.0.2") is Ack.OK
    assert rig.claim(C, "10.0.0.2", "127.0.0.1") is None
    assert rig.claim(B, "10.0.0.2", "127.0.0.1") == (1, A)


def test_the_loopback_network_stands_for_each_of_its_addresses_behind_an_exact_one(rig: Rig) -> None:
    rig.publish(B, "127.0.0.0")
    assert rig.lookup(A, "127.0.0.1") == rig.lookup(A, "127.9.9.9") == 1
    assert rig.lookup(A, "127.0.0.1", scope=1) == rig.lookup(A, "127.0.0.1", 81) == rig.lookup(A, "::1") == 0
    for devid in (A, C):
        rig.publish(devid, "127.0.0.1")
    assert rig.lookup(A, "127.0.0.1") == 2
    assert rig.intend(A, 1, "127.0.0.1", "127.0.0.1") is Ack.OK
    assert rig.claim(B, "127.0.0.1", "127.0.0.1") == (1, A)


# -- intents


def test_an_intent_is_claimed_once_by_who_publishes_its_destination_and_the_client_is_told(rig: Rig) -> None:
    rig.publish(B, "10.0.0.2")
    assert rig.intend(A, 77, "10.0.0.1", "10.0.0.2") is Ack.OK
    assert rig.claim(C, "10.0.0.2", "10.0.0.1") is None
    assert rig.claim(B, "10.0.0.2", "10.0.0.1", ports=(PORT, CLIENT_PORT + 1)) is None
    assert rig.claim(B, "10.0.0.2", "10.0.0.1", ports=(PORT + 1, CLIENT_PORT)) is None
    assert rig.claim(B, "10.0.0.1", "10.0.0.2", ports=(CLIENT_PORT, PORT)) is None
    assert rig.events == []
    assert rig.claim(B, "10.0.0.2", "10.0.0.1") == (77, A)
    assert rig.events == [(A, EventType.CLAIMED, 77, B)]
    assert rig.claim(B, "10.0.0.2", "10.0.0.1") is None
    assert rig.retract(A, 77) is Ack.ENOENT
    assert rig.directory.members[B].stats.claims == 1


def test_what_is_retracted_cannot_be_claimed_and_only_its_maker_retracts_it(rig: Rig) -> None:
    rig.publish(B, "10.0.0.2")
    rig.intend(A, 77, "10.0.0.1", "10.0.0.2")
    assert rig.retract(B, 77) is Ack.ENOENT
    assert rig.retract(A, 78) is Ack.ENOENT
    assert rig.retract(A, 77) is Ack.OK
    assert rig.retract(A, 77) is Ack.ENOENT
    assert rig.claim(B, "10.0.0.2", "10.0.0.1") is None
    assert rig.events == []
    assert rig.directory.members[A].stats.retractions == 1


def test_a_claim_changes_nothing_before_its_ack_is_seen(rig: Rig) -> None:
    rig.publish(B, "10.0.0.2")
    rig.intend(A, 77, "10.0.0.1", "10.0.0.2")
    lost = rig.deciding(B, "10.0.0.2", "10.0.0.1")
    assert lost.ack is Ack.OK
    assert lost.effects == ()
    assert rig.retract(A, 77) is Ack.OK
    assert rig.directory.members[B].stats.claims == 0


def test_nothing_is_recorded_for_a_destination_that_nobody_publishes(rig: Rig) -> None:
    assert rig.intend(A, 77, "10.0.0.1", "10.0.0.2") is Ack.ENOENT
    assert rig.is_empty()


def test_a_destination_that_is_withdrawn_meanwhile_is_not_claimed(rig: Rig) -> None:
    rig.publish(B, "10.0.0.2")
    rig.intend(A, 77, "10.0.0.1", "10.0.0.2")
    rig.withdraw(B, "10.0.0.2")
    assert rig.claim(B, "10.0.0.2", "10.0.0.1") is None
    assert rig.retract(A, 77) is Ack.OK


@pytest.mark.parametrize(
    ("nonce", "ports"), [(0, (CLIENT_PORT, PORT)), (1, (0, PORT)), (1, (CLIENT_PORT, 0)), (5, (1, PORT))]
)
def test_an_intent_needs_ports_and_a_nonce_of_its_own(rig: Rig, nonce: int, ports: tuple[int, int]) -> None:
    rig.publish(B, "10.0.0.2")
    assert rig.intend(C, 5, "10.0.0.3", "10.0.0.2") is Ack.OK
    assert rig.intend(A, nonce, "10.0.0.1", "10.0.0.2", ports=ports) is Ack.ERR
    assert rig.directory.members[A].stats.refused == 1
    assert not rig.directory.members[A].intents


def test_a_four_tuple_that_another_device_intends_is_refused(rig: Rig) -> None:
    rig.publish(B, "10.0.0.2")
    assert rig.intend(A, 1, "10.0.0.1", "10.0.0.2") is Ack.OK
    assert rig.intend(C, 2, "10.0.0.1", "10.0.0.2") is Ack.ERR
    assert rig.claim(B, "10.0.0.2", "10.0.0.1") == (1, A)
    assert rig.intend(C, 2, "10.0.0.1", "10.0.0.2") is Ack.OK


def test_a_new_intent_of_a_four_tuple_replaces_the_devices_old_one(rig: Rig) -> None:
    rig.publish(B, "10.0.0.2")
    rig.intend(A, 1, "10.0.0.1", "10.0.0.2")
    assert rig.intend(A, 2, "10.0.0.1", "10.0.0.2") is Ack.OK
    assert rig.retract(A, 1) is Ack.ENOENT
    assert rig.intend(A, 2, "10.0.0.1", "10.0.0.2") is Ack.OK
    assert rig.claim(B, "10.0.0.2", "10.0.0.1") == (2, A)


def test_a_refused_intent_ends_the_old_one_of_its_four_tuple_too(rig: Rig) -> None:
    rig.publish(B, "10.0.0.2")
    rig.intend(A, 1, "10.0.0.1", "10.0.0.2")
    assert rig.intend(A, 0, "10.0.0.1", "10.0.0.2") is Ack.ERR
    assert rig.claim(B, "10.0.0.2", "10.0.0.1") is None


def test_intents_have_a_quota_which_a_replaced_one_does_not_need(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_INTENTS", 2)
    rig.publish(B, "10.0.0.2")
    acks = [rig.intend(A, port, "10.0.0.1", "10.0.0.2", ports=(port, PORT)) for port in (1, 2, 3)]
    assert acks == [Ack.OK, Ack.OK, Ack.ENOMEM]
    assert rig.intend(A, 4, "10.0.0.1", "10.0.0.2", ports=(2, PORT)) is Ack.OK
    assert rig.intend(C, 5, "10.0.0.1", "10.0.0.2", ports=(3, PORT)) is Ack.OK
    rig.retract(A, 1)
    assert rig.intend(A, 6, "10.0.0.1", "10.0.0.2", ports=(1, PORT)) is Ack.OK


# -- START


def claimed(rig: Rig, nonce: int, *, client: DevId = A, port: int = CLIENT_PORT) -> None:
    rig.publish(B, "10.0.0.2")
    assert rig.intend(client, nonce, "10.0.0.1", "10.0.0.2", ports=(port, PORT)) is Ack.OK
    assert rig.claim(B, "10.0.0.2", "10.0.0.1", ports=(PORT, port)) == (nonce, client)


def test_the_server_that_claimed_starts_the_client_once(rig: Rig) -> None:
    claimed(rig, 77)
    rig.events.clear()
    assert rig.start(C, 77, A) is Ack.ENOENT
    assert rig.start(B, 78, A) is Ack.ENOENT
    assert rig.start(B, 77, C) is Ack.ENOENT
    assert rig.start(B, 77, A) is Ack.OK
    assert rig.start(B, 77, A) is Ack.ENOENT
    assert rig.events == [(A, EventType.START, 77, B)]


def test_two_clients_that_use_one_nonce_in_turn_are_told_apart(rig: Rig) -> None:
    claimed(rig, 77, client=A)
    claimed(rig, 77, client=C)
    rig.events.clear()
    assert rig.start(B, 77, A) is Ack.OK
    assert rig.start(B, 77, C) is Ack.OK
    assert [devid for devid, *_ in rig.events] == [A, C]


def test_a_server_remembers_its_latest_claims_only(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CLAIMS", 2)
    for nonce in (1, 2, 1, 3):
        claimed(rig, nonce)
    assert [rig.start(B, nonce, A) for nonce in (2, 1, 3)] == [Ack.ENOENT, Ack.OK, Ack.OK]
    assert rig.directory.members[A].claimed_by == set()


# -- bound addresses


def bind(rig: Rig, text: str, devid: DevId) -> None:
    rig.directory.bind(network_of(ipaddress.ip_network(text)), devid)


@pytest.mark.parametrize(
    ("network", "inside", "outside"), [("10.0.0.0/24", "10.0.0.9", "10.0.1.9"), ("fd00::/64", "fd00::9", "fd01::9")]
)
def test_a_bound_address_is_its_devices_alone_and_any_other_is_free(
    rig: Rig, network: str, inside: str, outside: str
) -> None:
    bind(rig, network, A)
    assert rig.publish(B, inside) is Ack.ERR
    assert rig.publish(A, inside) is Ack.OK
    assert rig.publish(B, outside) is Ack.OK
    assert rig.intend(B, 1, inside, outside) is Ack.ERR
    assert rig.intend(A, 1, inside, outside) is Ack.OK
    assert rig.intend(B, 2, outside, inside) is Ack.OK
    assert rig.lookup(C, inside) == 1


def test_the_longest_prefix_counts(rig: Rig) -> None:
    bind(rig, "10.0.0.0/8", A)
    bind(rig, "10.0.0.7/32", B)
    bind(rig, "0.0.0.0/0", C)
    assert rig.publish(A, "10.0.0.7") is Ack.ERR
    assert rig.publish(B, "10.0.0.7") is Ack.OK
    assert rig.publish(A, "10.0.0.8") is Ack.OK
    assert rig.publish(A, "11.0.0.8") is Ack.ERR
    assert rig.publish(C, "11.0.0.8") is Ack.OK
    assert rig.publish(A, "fd00::1") is Ack.OK


def test_everybody_has_loopback_whatever_is_bound(rig: Rig) -> None:
    bind(rig, "::/0", A)
    assert rig.publish(B, "10.0.0.1") is Ack.ERR
    assert rig.publish(B, "127.0.0.1") is Ack.OK
    assert rig.publish(B, "::1") is Ack.OK


def test_a_network_has_one_device(rig: Rig) -> None:
    bind(rig, "10.0.0.0/8", A)
    bind(rig, "::ffff:10.0.0.0/104", A)
    with pytest.raises(ValueError, match="bound to another device"):
        bind(rig, "10.0.0.0/8", B)


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("127.0.0.0/8", True),
        ("127.0.0.1/32", True),
        ("::1/128", True),
        ("fe80::/10", True),
        ("fe80::/9", False),
        ("126.0.0.0/7", False),
        ("::/0", False),
        ("10.0.0.0/8", False),
    ],
)
def test_a_network_that_every_namespace_has_is_told_from_others(text: str, private: bool) -> None:
    assert is_private_network(network_of(ipaddress.ip_network(text))) is private


# -- what goes with whom


def test_with_a_device_go_its_listeners_intents_and_claims_and_what_others_claimed_of_it(rig: Rig) -> None:
    claimed(rig, 1, client=A)
    claimed(rig, 2, client=C, port=1)
    rig.publish(A, "127.0.0.1")
    rig.intend(A, 3, "10.0.0.1", "10.0.0.2", ports=(3, PORT))
    rig.directory.forget(A)
    assert rig.lookup(A, "127.0.0.1") == 0
    assert rig.claim(B, "10.0.0.2", "10.0.0.1", ports=(PORT, 3)) is None
    assert rig.start(B, 1, A) is Ack.ENOENT
    assert rig.start(B, 2, C) is Ack.OK
    claimed(rig, 4, client=C, port=4)
    rig.intend(C, 5, "10.0.0.1", "10.0.0.2", ports=(5, PORT))
    rig.directory.remove(B)
    assert B not in rig.directory.members
    assert rig.lookup(C, "10.0.0.2") == 0
    assert rig.retract(C, 5) is Ack.OK
    assert rig.is_empty()


def test_a_registry_resets_and_removes_what_its_devices_have_in_the_directory() -> None:
    registry = DomainRegistry(Gid(1), 4096)
    for devid in (A, B):
        registry.add_device(devid, 1 << 20, Quota(1, 1, 1))
    for devid in (A, B):
        assert registry.directory.publish(devid, listener("10.0.0.1", PORT, 0)).ack is Ack.OK
    registry.reset(A)
    assert [devid for _, _, devid in registry.directory.listeners()] == [B]
    registry.remove_device(B)
    assert list(registry.directory.listeners()) == []
    assert set(registry.directory.members) == {A}


def test_every_command_is_counted_and_over_the_rate_only_those_that_give_back_get_through() -> None:
    registry = DomainRegistry(Gid(1), 4096)
    for devid in (A, B):
        registry.add_device(devid, 1 << 20, Quota(1, 1, 1))
        registry.directory.set_scope(devid, 0)
    bucket = TokenBucket(3)
    metered = MeteredRegistry(registry, bucket, lambda: 0.0)
    place = listener("10.0.0.1", PORT, 0)
    intent = IntendRequest(
        nonce=9, local_address=packed("10.0.0.1"), remote_address=packed("10.0.0.1"), local_port=1, remote_port=PORT
    )
    claim = ClaimRequest(
        local_address=packed("10.0.0.1"), remote_address=packed("10.0.0.1"), local_port=PORT, remote_port=1
    )
    directory = metered.directory
    assert directory.publish(A, place).ack is Ack.OK
    assert directory.lookup(A, place).ack is Ack.OK
    assert directory.intend(A, intent).ack is Ack.OK
    assert directory.publish(A, place).ack is Ack.ENOMEM
    assert directory.lookup(A, place).ack is Ack.ENOMEM
    assert directory.intend(A, intent).ack is Ack.ENOMEM
    assert directory.claim(A, claim).ack is Ack.ENOMEM
    assert directory.start(A, StartRequest(nonce=9, devid=A)).ack is Ack.ENOMEM
    assert metered.over_rate == 5
    assert directory.withdraw(A, place).ack is Ack.OK
    assert directory.retract(A, RetractRequest(nonce=9)).ack is Ack.OK
    assert metered.over_rate == 5


def test_effects_are_values_that_name_the_client(rig: Rig) -> None:
    rig.publish(B, "10.0.0.2")
    rig.intend(A, 77, "10.0.0.1", "10.0.0.2")
    commit = rig.deciding(B, "10.0.0.2", "10.0.0.1").commit
    assert commit is not None
    effects: list[Effect] = list(commit())
    event = DirectoryEvent(ev_type=1 << 16, nonce=77, devid=B).pack()
    assert effects == [PostEvent(A, event)]
    assert len(event) == 32
