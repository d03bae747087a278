# SPDX-License-Identifier: Apache-2.0
"""Several devices use the directory in any order, die and come back; a simple model says what each answer must be."""

from __future__ import annotations

import ipaddress
from collections import Counter
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ism.device.contract import Decision, PostEvent
from ism.ids import DevId
from ism.manager import directory as module
from ism.manager.directory import Directory, network_of
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

V4 = bytes(10) + b"\xff\xff"
NETWORK = V4 + bytes([127, 0, 0, 0])
LOOPBACK, OTHER_LOOPBACK, LINK_LOCAL = V4 + bytes([127, 0, 0, 1]), bytes(15) + b"\1", b"\xfe\x80" + bytes(13) + b"\7"
PUBLIC, BOUND = V4 + bytes([10, 0, 0, 1]), V4 + bytes([10, 0, 0, 2])
PRIVATE = {NETWORK, LOOPBACK, OTHER_LOOPBACK, LINK_LOCAL}
NAMESPACES = {1: "a", 2: "a", 3: "b", 4: "a"}
OWNER = 2
LIMIT = 3

devids = st.sampled_from(sorted(NAMESPACES))
addresses = st.sampled_from([LOOPBACK, PUBLIC, BOUND, OTHER_LOOPBACK, LINK_LOCAL, NETWORK])
ports = st.sampled_from([1, 2, 1, 2, 0])
scopes = st.sampled_from([0, 0, 0, 1])
nonces = st.sampled_from([1, 2, 3, 4, 5, 0])


@dataclass(frozen=True)
class Tuple:
    client: bytes
    client_port: int
    server: bytes
    server_port: int
    where: object


def where(devid: int, scope: int, *ends: bytes) -> object:
    return (NAMESPACES[devid], scope) if PRIVATE.intersection(ends) else None


class DirectoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.limits = module.MAX_LISTENERS, module.MAX_INTENTS, module.MAX_CLAIMS
        module.MAX_LISTENERS = module.MAX_INTENTS = module.MAX_CLAIMS = LIMIT  # type: ignore[misc]
        self.directory = Directory()
        self.listening: Counter[tuple[int, bytes, int, object]] = Counter()
        self.intents: dict[Tuple, tuple[int, int]] = {}
        self.claims: list[tuple[int, int, int]] = []
        self.fresh_nonce = 100
        self.told: Counter[tuple[int, EventType, int, int]] = Counter()
        self.expected: Counter[tuple[int, EventType, int, int]] = Counter()

    def teardown(self) -> None:
        module.MAX_LISTENERS, module.MAX_INTENTS, module.MAX_CLAIMS = self.limits  # type: ignore[misc]

    @initialize()
    def start(self) -> None:
        for devid in NAMESPACES:
            self.add(devid)
            self.publish(devid, PUBLIC, 1, 0)
            self.publish(devid, NETWORK, 2, 0)
        self.directory.bind(network_of(ipaddress.ip_network("10.0.0.2/32")), DevId(OWNER))

    def add(self, devid: int) -> None:
        self.directory.add(DevId(devid))
        self.directory.set_scope(DevId(devid), NAMESPACES[devid])

    def done(self, decision: Decision, *, seen: bool = True) -> Ack:
        effects = list(decision.effects)
        if decision.commit is not None and seen:
            effects += decision.commit()
        for effect in effects:
            assert isinstance(effect, PostEvent)
            event = DirectoryEvent.unpack(effect.payload)
            self.told[effect.devid, EventType(event.ev_type), event.nonce, event.devid] += 1
        if decision.ack is not Ack.OK:
            assert not effects
            assert decision.reply == b""
            assert decision.commit is None
        return decision.ack

    def publishers(self, address: bytes, port: int, there: object) -> set[int]:
        for place in (address, NETWORK) if address[:13] == NETWORK[:13] else (address,):
            found = {devid for devid, a, p, w in self.listening if (a, p, w) == (place, port, there)}
            if found:
                return found
        return set()

    @rule(devid=devids, address=st.one_of(addresses, st.just(bytes(16))), port=ports, scope=scopes)
    def publish(self, devid: int, address: bytes, port: int, scope: int) -> None:
        ack = self.done(self.directory.publish(DevId(devid), ListenerRequest(address=address, port=port, scope=scope)))
        place = (devid, address, port, where(devid, scope, address))
        if address == bytes(16) or not port or (address == BOUND and devid != OWNER):
            assert ack is Ack.ERR
        elif place not in self.listening and sum(place[0] == devid for place in self.listening) >= LIMIT:
            assert ack is Ack.ENOMEM
        else:
            assert ack is Ack.OK
            self.listening[place] += 1

    @rule(devid=devids, address=addresses, port=ports, scope=scopes)
    def withdraw(self, devid: int, address: bytes, port: int, scope: int) -> None:
        request = ListenerRequest(address=address, port=port, scope=scope)
        place = (devid, address, port, where(devid, scope, address))
        there = place in self.listening
        assert self.done(self.directory.withdraw(DevId(devid), request)) is (Ack.OK if there else Ack.ENOENT)
        if there:
            self.listening[place] -= 1
            self.listening += Counter()

    @rule(devid=devids, address=addresses, port=ports, scope=scopes)
    def lookup(self, devid: int, address: bytes, port: int, scope: int) -> None:
        decision = self.directory.lookup(DevId(devid), ListenerRequest(address=address, port=port, scope=scope))
        expected = len(self.publishers(address, port, where(devid, scope, address)))
        assert decision.ack is (Ack.OK if expected else Ack.ENOENT)
        assert not expected or LookupReply.unpack(decision.reply).listeners == expected

    @rule(devid=devids, port=st.integers(1, 3), data=st.data())
    @precondition(lambda self: self.listening)
    def intend_to_a_listener(self, devid: int, port: int, data: st.DataObject) -> None:
        _, remote, remote_port, there = data.draw(st.sampled_from(sorted(self.listening, key=repr)))
        scope = there[1] if isinstance(there, tuple) else 0
        self.fresh_nonce += 1
        self.intend(devid, self.fresh_nonce, PUBLIC, remote, (port, remote_port), scope)

    @rule(devid=devids, nonce=nonces, local=addresses, remote=addresses, ends=st.tuples(ports, ports), scope=scopes)
    def intend(self, devid: int, nonce: int, local: bytes, remote: bytes, ends: tuple[int, int], scope: int) -> None:
        request = IntendRequest(
            nonce=nonce,
            scope=scope,
            local_address=local,
            remote_address=remote,
            local_port=ends[0],
            remote_port=ends[1],
        )
        key = Tuple(local, ends[0], remote, ends[1], where(devid, scope, local, remote))
        if key in self.intents and self.intents[key][0] == devid:
            del self.intents[key]
        in_use = key in self.intents or nonce in [used for _, used in self.intents.values()]
        ack = self.done(self.directory.intend(DevId(devid), request))
        if not nonce or not all(ends) or in_use or (local == BOUND and devid != OWNER):
            assert ack is Ack.ERR
        elif not self.publishers(remote, ends[1], where(devid, scope, remote)):
            assert ack is Ack.ENOENT
        elif sum(maker == devid for maker, _ in self.intents.values()) >= LIMIT:
            assert ack is Ack.ENOMEM
        else:
            assert ack is Ack.OK
            self.intents[key] = devid, nonce

    @rule(
        devid=devids, local=addresses, remote=addresses, ends=st.tuples(ports, ports), scope=scopes, seen=st.booleans()
    )
    def claim(self, devid: int, local: bytes, remote: bytes, ends: tuple[int, int], scope: int, seen: bool) -> None:
        self.claim_one(devid, Tuple(remote, ends[0], local, ends[1], where(devid, scope, local, remote)), scope, seen)

    @rule(data=st.data(), seen=st.booleans())
    @precondition(lambda self: self.intents)
    def claim_an_intent(self, data: st.DataObject, seen: bool) -> None:
        key = data.draw(st.sampled_from(list(self.intents)))
        there = {place[0] for place in self.listening if place[2] == key.server_port}
        devid = data.draw(st.sampled_from(sorted(there or NAMESPACES)))
        scope = key.where[1] if isinstance(key.where, tuple) else 0
        if key.where in (None, (NAMESPACES[devid], scope)):
            self.claim_one(devid, key, scope, seen)

    def claim_one(self, devid: int, key: Tuple, scope: int, seen: bool) -> None:
        request = ClaimRequest(
            scope=scope,
            local_address=key.server,
            remote_address=key.client,
            local_port=key.server_port,
            remote_port=key.client_port,
        )
        there = where(devid, scope, key.server)
        places = (key.server, NETWORK) if key.server[:13] == NETWORK[:13] else (key.server,)
        listed = any((devid, place, key.server_port, there) in self.listening for place in places)
        decision = self.directory.claim(DevId(devid), request)
        ack = self.done(decision, seen=seen)
        if key not in self.intents or not listed:
            assert ack is Ack.ENOENT
            return
        client, nonce = self.intents[key]
        assert ack is Ack.OK
        reply = ClaimReply.unpack(decision.reply)
        assert (reply.nonce, reply.devid) == (nonce, client)
        if seen:
            del self.intents[key]
            self.expected[client, EventType.CLAIMED, nonce, devid] += 1
            self.claims = [claim for claim in self.claims if claim != (devid, nonce, client)]
            mine = [claim for claim in self.claims if claim[0] == devid]
            if len(mine) >= LIMIT:
                self.claims.remove(mine[0])
            self.claims.append((devid, nonce, client))

    @rule(devid=devids, nonce=nonces)
    def retract(self, devid: int, nonce: int) -> None:
        ack = self.done(self.directory.retract(DevId(devid), RetractRequest(nonce=nonce)))
        mine = [key for key, maker in self.intents.items() if maker == (devid, nonce)]
        assert ack is (Ack.OK if mine else Ack.ENOENT)
        for key in mine:
            del self.intents[key]

    @rule(data=st.data())
    @precondition(lambda self: self.intents)
    def retract_an_intent(self, data: st.DataObject) -> None:
        self.retract(*data.draw(st.sampled_from(list(self.intents.values()))))

    @rule(data=st.data())
    @precondition(lambda self: self.claims)
    def start_a_claim(self, data: st.DataObject) -> None:
        self.start_client(*data.draw(st.sampled_from(self.claims)))

    @rule(devid=devids, nonce=nonces, client=devids)
    def start_client(self, devid: int, nonce: int, client: int) -> None:
        ack = self.done(self.directory.start(DevId(devid), StartRequest(nonce=nonce, devid=client)))
        there = (devid, nonce, client) in self.claims
        assert ack is (Ack.OK if there else Ack.ENOENT)
        if there:
            self.claims.remove((devid, nonce, client))
            self.expected[client, EventType.START, nonce, devid] += 1

    @rule(devid=devids, removed=st.booleans(), now=st.integers(0, 4))
    def die(self, devid: int, removed: bool, now: int) -> None:
        if now:
            return
        if removed:
            self.directory.remove(DevId(devid))
            self.add(devid)
        else:
            self.directory.forget(DevId(devid))
        self.listening = Counter({place: n for place, n in self.listening.items() if place[0] != devid})
        self.intents = {key: maker for key, maker in self.intents.items() if maker[0] != devid}
        self.claims = [claim for claim in self.claims if devid not in (claim[0], claim[2])]

    @invariant()
    def everybody_is_told_what_happened_and_no_more(self) -> None:
        assert self.told == self.expected

    @invariant()
    def nothing_else_is_kept(self) -> None:
        tables, members = self.directory._tables, self.directory.members
        assert len(tables.by_connection) == len(tables.by_nonce) == len(self.intents)
        assert sum(len(member.intents) for member in members.values()) == len(self.intents)
        assert sum(len(member.listeners) for member in members.values()) == len(self.listening)
        assert sum(len(devids) for devids in tables.listeners.values()) == len(self.listening)
        assert all(tables.listeners.values())
        assert sum(len(member.claims) for member in members.values()) == len(self.claims)
        assert {(s, n, c) for c, member in members.items() for s, n in member.claimed_by} == set(self.claims)


TestDirectory = DirectoryMachine.TestCase
TestDirectory.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
