# SPDX-License-Identifier: Apache-2.0
"""The directory of one domain: who listens where, and which TCP connections are about to be made. Sans-io.

It answers `ism.device.contract.DirectoryService`. Its purpose is to let both ends of a TCP connection know whether it
uses SMC: a client's *intent* is either claimed by the server or retracted by the client, never both
(`docs/directory.md`). It knows addresses only as the bytes on the wire, and trusts no device: an entry is charged to
the device that made it, and goes with it.

Decided here:

- Loopback and link-local addresses mean something only inside one network namespace. A four-tuple or destination with
  one matches only the same scope: what the manager knows of the device's namespace, and what the device says of it.
  All other addresses match in the whole domain.
- The network address of 127/8, published, stands for every address of it.
- An address that the configuration binds to a device is its alone, the longest prefix counts; an address that is bound
  to nobody is free for all. Loopback and link-local addresses are never bound.
- A device's new intent of a four-tuple ends its old one, also when the new one is refused: the old socket is gone.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from ism.device.contract import Decision, Effect, PostEvent
from ism.ids import DevId
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

MAX_LISTENERS: Final = 4096
MAX_INTENTS: Final = 4096
MAX_CLAIMS: Final = 1024
"""Of one device."""

ADDRESS_BITS: Final = 128
ANY: Final = bytes(16)
MAPPED: Final = bytes(10) + b"\xff\xff"
"""What an IPv4 address begins with."""
ANY_V4: Final = MAPPED + bytes(4)
LOOPBACK_V4: Final = MAPPED + b"\x7f"
LOOPBACK_V4_NETWORK: Final = MAPPED + b"\x7f\0\0\0"
LOOPBACK_V6: Final = bytes(15) + b"\1"

Network = tuple[int, int]
"""Prefix length, and the prefix as a number; IPv4 as v4-mapped IPv6."""
Scope = tuple[Hashable, int] | None
Destination = tuple[bytes, int, Scope]
Connection = tuple[bytes, int, bytes, int, Scope]
"""Address and port of the client, address and port of the server, scope."""


@dataclass(frozen=True, slots=True)
class Intent:
    """A connection that the device `devid` is about to make."""

    nonce: int
    devid: DevId
    connection: Connection


@dataclass(slots=True)
class DirectoryStats:
    """Counters of one device: claims it made, intents it retracted, commands refused with ERR or ENOMEM."""

    claims: int = 0
    retractions: int = 0
    refused: int = 0


class Member:
    """What one device has in the directory.

    Attributes: `scope` (what the manager knows of its network namespace), `stats`; `listeners` (published destinations
    and how often), `intents` (by nonce), `claims` (of intents of others: nonce and client's device, oldest first),
    `claimed_by` (its own intents: server's device and nonce).
    """

    __slots__ = ("claimed_by", "claims", "intents", "listeners", "scope", "stats")

    def __init__(self, scope: Hashable) -> None:
        self.scope = scope
        self.listeners: dict[Destination, int] = {}
        self.intents: dict[int, Intent] = {}
        self.claims: OrderedDict[tuple[int, DevId], None] = OrderedDict()
        self.claimed_by: set[tuple[DevId, int]] = set()
        self.stats = DirectoryStats()


@dataclass(slots=True)
class _Tables:
    listeners: dict[Destination, dict[DevId, None]] = field(default_factory=dict)
    by_connection: dict[Connection, Intent] = field(default_factory=dict)
    by_nonce: dict[int, Intent] = field(default_factory=dict)


class Directory:
    """Implements `ism.device.contract.DirectoryService`. Commands take constant time.

    Attributes: `members` (by devid; to be read only).
    """

    def __init__(self) -> None:
        self.members: dict[DevId, Member] = {}
        self._tables = _Tables()
        self._bound: dict[int, dict[int, DevId]] = {}
        self._prefixes: tuple[int, ...] = ()

    # -- devices ---------------------------------------------------------------------------------------------------

    def add(self, devid: DevId) -> None:
        """Make a device known; its scope is its own until `set_scope`."""
        self.members[devid] = Member(("device", devid))

    def set_scope(self, devid: DevId, scope: Hashable) -> None:
        """Say what network namespace the client of a device is in; entries made before keep theirs."""
        self.members[devid].scope = scope

    def bind(self, network: Network, devid: DevId) -> None:
        """Let only `devid` publish, or connect from, the addresses of a network.

        Raises: ValueError when the same network is bound to another device.
        """
        prefix, number = network
        if self._bound.setdefault(prefix, {}).setdefault(number, devid) != devid:
            raise ValueError(f"network {number:#x} of {prefix} bits is bound to another device")
        self._prefixes = tuple(sorted(self._bound, reverse=True))

    def forget(self, devid: DevId) -> None:
        """Remove what a device has, because it is reset or gone; also what others claimed of it."""
        member = self.members[devid]
        for destination in list(member.listeners):
            self._unlist(devid, member, destination)
        for intent in list(member.intents.values()):
            self._drop(intent)
        for nonce, client in list(member.claims):
            self._unclaim(devid, nonce, client)
        for server, nonce in list(member.claimed_by):
            self._unclaim(server, nonce, devid)

    def remove(self, devid: DevId) -> None:
        """Forget a device altogether."""
        self.forget(devid)
        del self.members[devid]

    # -- commands --------------------------------------------------------------------------------------------------

    def publish(self, devid: DevId, request: ListenerRequest) -> Decision:
        """Count one more listener of the device at an address and port."""
        member = self.members[devid]
        if request.address in (ANY, ANY_V4) or not request.port or not self._may_use(devid, request.address):
            return _refuse(member, Ack.ERR)
        destination = _destination(request.address, request.port, member.scope, request.scope)
        if destination not in member.listeners and len(member.listeners) >= MAX_LISTENERS:
            return _refuse(member, Ack.ENOMEM)
        member.listeners[destination] = member.listeners.get(destination, 0) + 1
        self._tables.listeners.setdefault(destination, {})[devid] = None
        return Decision(Ack.OK)

    def withdraw(self, devid: DevId, request: ListenerRequest) -> Decision:
        """Undo one `publish`."""
        member = self.members[devid]
        destination = _destination(request.address, request.port, member.scope, request.scope)
        if destination not in member.listeners:
            return Decision(Ack.ENOENT)
        member.listeners[destination] -= 1
        if not member.listeners[destination]:
            self._unlist(devid, member, destination)
        return Decision(Ack.OK)

    def lookup(self, devid: DevId, request: ListenerRequest) -> Decision:
        """Tell how many devices publish a destination."""
        there = self._listeners(_destination(request.address, request.port, self.members[devid].scope, request.scope))
        if not there:
            return Decision(Ack.ENOENT)
        return Decision(Ack.OK, LookupReply(listeners=len(there)).pack())

    def intend(self, devid: DevId, request: IntendRequest) -> Decision:
        """Record a connection that the device is about to make."""
        member, tables = self.members[devid], self._tables
        client = (request.local_address, request.local_port)
        server = (request.remote_address, request.remote_port)
        connection = _connection(*client, *server, member.scope, request.scope)
        old = tables.by_connection.get(connection)
        if old is not None and old.devid == devid:
            self._drop(old)
            old = None
        if (
            not request.nonce
            or not request.local_port
            or not request.remote_port
            or not self._may_use(devid, client[0])
        ):
            return _refuse(member, Ack.ERR)
        if old is not None or request.nonce in tables.by_nonce:
            return _refuse(member, Ack.ERR)
        if not self._listeners(_destination(*server, member.scope, request.scope)):
            return Decision(Ack.ENOENT)
        if len(member.intents) >= MAX_INTENTS:
            return _refuse(member, Ack.ENOMEM)
        intent = Intent(request.nonce, devid, connection)
        member.intents[request.nonce] = tables.by_nonce[request.nonce] = tables.by_connection[connection] = intent
        return Decision(Ack.OK)

    def claim(self, devid: DevId, request: ClaimRequest) -> Decision:
        """Find the intent of a connection that the device has accepted; `commit` takes it, and tells the client."""
        member = self.members[devid]
        client = (request.remote_address, request.remote_port)
        server = (request.local_address, request.local_port)
        intent = self._tables.by_connection.get(_connection(*client, *server, member.scope, request.scope))
        destination = _destination(*server, member.scope, request.scope)
        if intent is None or not any(place in member.listeners for place in _places(destination)):
            return Decision(Ack.ENOENT)
        found = intent

        def commit() -> Sequence[Effect]:
            self._drop(found)
            self._enter_claim(devid, found)
            member.stats.claims += 1
            event = DirectoryEvent(ev_type=EventType.CLAIMED, nonce=found.nonce, devid=devid)
            return (PostEvent(found.devid, event.pack()),)

        return Decision(Ack.OK, ClaimReply(nonce=found.nonce, devid=found.devid).pack(), commit=commit)

    def retract(self, devid: DevId, request: RetractRequest) -> Decision:
        """Remove an intent of the device."""
        member = self.members[devid]
        intent = member.intents.get(request.nonce)
        if intent is None:
            return Decision(Ack.ENOENT)
        self._drop(intent)
        member.stats.retractions += 1
        return Decision(Ack.OK)

    def start(self, devid: DevId, request: StartRequest) -> Decision:
        """Tell the client of an intent that the device has claimed, once."""
        client = DevId(request.devid)
        if (request.nonce, client) not in self.members[devid].claims:
            return Decision(Ack.ENOENT)
        self._unclaim(devid, request.nonce, client)
        event = DirectoryEvent(ev_type=EventType.START, nonce=request.nonce, devid=devid)
        return Decision(Ack.OK, effects=(PostEvent(client, event.pack()),))

    # -- what the host asks ----------------------------------------------------------------------------------------

    def listeners(self) -> Iterator[tuple[bytes, int, DevId]]:
        """List address, port and device of everything that is published."""
        for (address, port, _scope), devids in self._tables.listeners.items():
            for devid in devids:
                yield address, port, devid

    # -- inner -----------------------------------------------------------------------------------------------------

    def _may_use(self, devid: DevId, address: bytes) -> bool:
        if is_private(address):
            return True
        for prefix in self._prefixes:
            owner = self._bound[prefix].get(_prefix(address, prefix))
            if owner is not None:
                return owner == devid
        return True

    def _listeners(self, destination: Destination) -> dict[DevId, None]:
        for place in _places(destination):
            there = self._tables.listeners.get(place)
            if there is not None:
                return there
        return {}

    def _unlist(self, devid: DevId, member: Member, destination: Destination) -> None:
        del member.listeners[destination]
        there = self._tables.listeners[destination]
        del there[devid]
        if not there:
            del self._tables.listeners[destination]

    def _drop(self, intent: Intent) -> None:
        del self._tables.by_connection[intent.connection]
        del self._tables.by_nonce[intent.nonce]
        del self.members[intent.devid].intents[intent.nonce]

    def _enter_claim(self, server: DevId, intent: Intent) -> None:
        claims = self.members[server].claims
        claims.pop((intent.nonce, intent.devid), None)
        if len(claims) >= MAX_CLAIMS:
            self._unclaim(server, *next(iter(claims)))
        claims[intent.nonce, intent.devid] = None
        self.members[intent.devid].claimed_by.add((server, intent.nonce))

    def _unclaim(self, server: DevId, nonce: int, client: DevId) -> None:
        del self.members[server].claims[nonce, client]
        self.members[client].claimed_by.discard((server, nonce))


def is_private(address: bytes) -> bool:
    """Tell whether an address means something only inside one network namespace: loopback, IPv6 link-local."""
    link_local = address[0] == 0xFE and address[1] & 0xC0 == 0x80
    return link_local or address == LOOPBACK_V6 or address.startswith(LOOPBACK_V4)


def network_of(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> Network:
    """Write a network as the directory does."""
    packed, prefix = network.network_address.packed, network.prefixlen
    if len(packed) == 4:
        packed, prefix = MAPPED + packed, prefix + 8 * len(MAPPED)
    return prefix, _prefix(packed, prefix)


def is_private_network(network: Network) -> bool:
    """Tell whether all addresses of a network are private (`is_private`)."""
    prefix, number = network
    first = number << ADDRESS_BITS - prefix
    last = first | (1 << ADDRESS_BITS - prefix) - 1
    return is_private(first.to_bytes(16, "big")) and is_private(last.to_bytes(16, "big"))


def _prefix(address: bytes, prefix: int) -> int:
    return int.from_bytes(address, "big") >> ADDRESS_BITS - prefix


def _destination(address: bytes, port: int, known: Hashable, told: int) -> Destination:
    return address, port, (known, told) if is_private(address) else None


def _places(destination: Destination) -> Iterator[Destination]:
    """What can be published for a destination: itself, and for IPv4 loopback the whole network."""
    yield destination
    address, port, scope = destination
    if address.startswith(LOOPBACK_V4):
        yield LOOPBACK_V4_NETWORK, port, scope


def _connection(
    client: bytes, client_port: int, server: bytes, server_port: int, known: Hashable, told: int
) -> Connection:
    private = is_private(client) or is_private(server)
    return client, client_port, server, server_port, (known, told) if private else None


def _refuse(member: Member, ack: Ack) -> Decision:
    member.stats.refused += 1
    return Decision(ack)
