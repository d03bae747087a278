# SPDX-License-Identifier: Apache-2.0
"""Bringing the two ends of a TCP connection together in the manager's directory: addresses, PUBLISH, INTEND, CLAIM.

Owns what has to be known of a socket for that (four-tuple, network namespace) and the order of the commands. It makes
`Link`s and says in words why there is none. What must be waited for is yielded as a command, so that a thread and a
trio task use the same steps: `steps.send(None)` after each command is done, or its time is up.

A client has to know its four-tuple before it connects: it asks the kernel for the source address by connecting a
datagram socket, which sends nothing, and binds to a port that the kernel chooses. Should connecting choose another
address all the same (the program has bound the socket to an interface, say), nobody claims the one that was intended. A
destination that was never seen in the directory is looked up first, so that a connection to a plain server costs one
command and is bound to nothing.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

from ism.driver import Device
from ism.driver.control import Command
from ism.driver.directory import Directory, FourTuple
from ism.errors import DeviceError, IsmError, TransportError
from ism.ids import DevId
from ism.shm import offer
from ism.smc import handshake
from ism.smc import link as link_module
from ism.smc.addresses import local_addresses, packed
from ism.smc.diagnosis import Diagnosis
from ism.smc.group import link_groups
from ism.smc.link import Link
from ism.smc.policy import Policy
from ism.virtio.ism_spec import EventType

COMMAND_WAIT_S = 1.0
"""How long a connect waits for the manager's answer before it goes on in TCP."""

_SO_NETNS_COOKIE = 71
_IP_BIND_ADDRESS_NO_PORT = 24
_V4_MAPPED = bytes(10) + b"\xff\xff"
LOOPBACK_NET = _V4_MAPPED + bytes([127, 0, 0, 0])
"""Stands for every address of 127/8 in the directory."""
_LINK_LOCAL = frozenset(bytes([0xFE, byte]) for byte in range(0x80, 0xC0))
_V6_LOOPBACK = bytes(15) + b"\1"
_KNOWN_S = 60.0
_ALONE_S = 1.0
"""How long it is believed that one device alone serves a destination."""
_MAX_KNOWN = 1024

Steps = Generator[Command, None, "Link | Fallback"]


class RawSocket(Protocol):
    """What is asked of a TCP socket here; `socket.socket` without its timeout."""

    @property
    def family(self) -> int: ...
    def fileno(self) -> int: ...
    def getsockname(self) -> Any: ...
    def getsockopt(self, level: int, option: int, buflen: int, /) -> Any: ...
    def bind(self, address: Any, /) -> object: ...


@dataclass(frozen=True, slots=True)
class Fallback:
    """Why a connection is plain TCP from the start: CLC diagnosis and words."""

    code: int
    why: str


OFF = Fallback(Diagnosis.CNFERR, "shared memory is switched off for this socket")
IN_LINE = Fallback(Diagnosis.OPTUNSUPP, "urgent data is to be put in line (SO_OOBINLINE)")
NO_DIRECTORY = Fallback(Diagnosis.PEERNOSMC, "the device has no directory, and the peer is not in ISM_SMC_PEERS")
NOT_LISTED = Fallback(Diagnosis.PEERNOSMC, link_module.NOT_LISTED)


def no_device(exc: Exception) -> Fallback:
    """Why, when no device could be opened."""
    return Fallback(Diagnosis.NOSMCDDEV, f"no virtio-ism device: {exc}")


def scope_of(sock: RawSocket) -> int:
    """Name the socket's network namespace: a number of this kernel, 0 where the kernel does not say."""
    try:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")
    except OSError:
        return 0


# -- the client ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Destination:
    """What is known of a destination: until when, when it was looked up last, who listens there.

    Attributes: `listeners` (devices that publish it); `device` (that has served the last connection).
    """

    until_s: float
    seen_s: float
    listeners: int
    device: DevId | None = None


class Known:
    """Destinations that were in the directory lately: those are not looked up again before an INTEND."""

    def __init__(self) -> None:
        self._seen: dict[tuple[bytes, int], Destination] = {}

    def get(self, key: tuple[bytes, int]) -> Destination | None:
        """Return what is known of an address and port, None when it must be looked up."""
        found = self._seen.get(key)
        return found if found is not None and time.monotonic() < found.until_s else None

    def note(self, key: tuple[bytes, int], listeners: int) -> None:
        """Note how many devices publish it; none: forget it."""
        now = time.monotonic()
        if not listeners:
            self._seen.pop(key, None)
            return
        if len(self._seen) >= _MAX_KNOWN:
            self._seen.clear()
        found = self._seen.setdefault(key, Destination(now, now, listeners))
        found.until_s, found.seen_s, found.listeners = now + _KNOWN_S, now, listeners

    def served(self, key: tuple[bytes, int], device: DevId) -> None:
        """Note which device has served a connection."""
        found = self._seen.get(key)
        if found is not None:
            found.device = device


_known: weakref.WeakKeyDictionary[Device, Known] = weakref.WeakKeyDictionary()


def connect_steps(device: Device, sock: RawSocket, address: Any, policy: Policy, make: MakeLink) -> Steps:
    """Prepare a TCP socket that is about to be connected to `address` (numeric).

    Returns: the link, to be told when TCP is `connected`; or why there is none. The socket may be bound by then.
    """
    try:
        there = _Destination(sock, address)
    except (OSError, ValueError) as exc:
        return Fallback(Diagnosis.CNFERR, f"the destination {address!r} cannot be looked up: {exc}")
    link: Link | None = None
    directory = device.directory
    required = policy.mode == "require"
    if policy.configured(there.remote_text, there.remote_port) or (required and directory is None):
        return _agreed(make(device))
    if directory is None:
        return NO_DIRECTORY
    known = _known.setdefault(device, Known())
    key = (there.remote, there.remote_port)
    scope = scope_of(sock)
    try:
        record = known.get(key)
        if record is None:
            command = directory.lookup_nowait(*key, scope)
            yield command
            if not command.done:
                return Fallback(Diagnosis.INTERR, "the device manager does not answer")
            listeners = directory.looked_up(command)
            known.note(key, listeners)
            if not listeners:
                return _agreed(make(device)) if required else NOT_LISTED
        local, port = there.bound()
        link = make(device)
        link.served_by = lambda devid: known.served(key, devid)
        if record is not None and _offer(link, record, local, port, there, scope, policy):
            if time.monotonic() > record.seen_s + _ALONE_S:
                _look_again(directory, known, key, scope)
            return link
        nonce = secrets.randbits(64) or 1
        directory.listen(nonce, _weakly(link))
        link.intended(directory, nonce)
        # not waited for: the manager has it before the server, which accepts later, can claim
        command = directory.intend_nowait(FourTuple(local, port, there.remote, there.remote_port, scope), nonce)
        link.intending(command, lambda: known.note(key, 0))
        return link
    except (IsmError, OSError) as exc:
        if link is not None:
            link.close()
        if isinstance(exc, DeviceError):
            return Fallback(Diagnosis.MEM, f"the directory refused: {exc}")
        return Fallback(Diagnosis.INTERR, f"the directory could not be asked: {exc}")


def _agreed(link: Link) -> Link:
    """Take a link for one whose peer uses shared memory: configured, or required at both ends."""
    link.agreed()
    return link


def _offer(
    link: Link, record: Destination, local: bytes, port: int, there: _Destination, scope: int, policy: Policy
) -> bool:
    """Offer regions of an earlier connection to the one device that serves the destination; tell whether there are any.

    With several devices behind one address nobody knows which one accepts: the directory does.
    """
    if (
        record.listeners != 1
        or record.device is None
        or there.remote[:2] in _LINK_LOCAL
        or link.device.gone is not None
        or policy.mode == "require"  # an offer cannot be made good by the directory when it is not taken
    ):
        return False
    connection = offer.connection_bytes(_seen_scope(local, scope), local, port, there.remote, there.remote_port)
    size = handshake.region_size(link.device, policy.buffer_size)
    pair = link_groups(link.device).offer(record.device, size, connection)
    if pair is None:
        return False
    link.offered(pair)
    return True


def _look_again(directory: Directory, known: Known, key: tuple[bytes, int], scope: int) -> None:
    """Have the number of listeners brought up to date, for connections to come."""
    command = directory.lookup_nowait(*key, scope)
    known.note(key, 1)

    def done() -> None:
        with contextlib.suppress(IsmError):
            known.note(key, directory.looked_up(command))

    command.then(done)


def _seen_scope(address: bytes, scope: int) -> int:
    """Return what both ends of a connection call its network namespace: it counts for loopback addresses alone."""
    loopback = address[:13] == LOOPBACK_NET[:13] or address == _V6_LOOPBACK
    return scope if loopback else 0


class MakeLink(Protocol):
    """Makes the link of a socket."""

    def __call__(self, device: Device, /) -> Link: ...


def _weakly(link: Link) -> Any:
    reference = weakref.ref(link)

    def call(kind: EventType, devid: DevId) -> None:
        alive = reference()
        if alive is not None:
            alive.on_directory(kind, devid)

    return call


class _Destination:
    """The four-tuple of a connection that is yet to be made."""

    def __init__(self, sock: RawSocket, address: Any) -> None:
        self._sock = sock
        bound = sock.getsockname()
        with contextlib.closing(socket.SocketType(sock.family, socket.SOCK_DGRAM)) as probe:
            if not ipaddress.ip_address(bound[0].partition("%")[0]).is_unspecified:
                probe.bind((bound[0], 0, *bound[2:]))
            probe.connect(address)  # sends nothing: the kernel looks up the route and the source address
            self._source = probe.getsockname()
            remote = probe.getpeername()
        self._bound = bound
        self.remote, self.remote_text, self.remote_port = packed(remote[0]), remote[0], remote[1]

    def bound(self) -> tuple[bytes, int]:
        """Return the local address, and the port, that is bound now if it was not."""
        port = self._bound[1]
        if not port:
            _let_bind_choose_a_port(self._sock)
            # a port alone: connecting chooses the address, as it would have, and as the probe was told
            self._sock.bind((self._bound[0], 0, *self._bound[2:]))
            port = self._sock.getsockname()[1]
        return packed(self._source[0]), port


def _let_bind_choose_a_port(sock: RawSocket) -> None:
    """Undo what a program may have asked for, as trio does when it is given a local address: a port at connect only."""
    raw = link_module.raw_socket(sock.family, sock.fileno())
    try:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 0)
    finally:
        raw.detach()


# -- the server ------------------------------------------------------------------------------------------------------


class Publication:
    """What a listening socket has in the directory. Not thread-safe.

    Attributes: `device`, `policy`, `pid` (a forked child that accepts publishes anew, with a device of its own).
    """

    def __init__(self, device: Device, sock: RawSocket, policy: Policy) -> None:
        """Prepare; nothing is published yet."""
        self.device, self.policy, self.pid = device, policy, os.getpid()
        self._address = sock.getsockname()
        self._scope = scope_of(sock)
        self._published: set[bytes] = set()
        self._lock = threading.Lock()
        self._claims = 0  # under way
        self._ended = False
        self._v6only = True
        if sock.family == socket.AF_INET6:
            with contextlib.suppress(OSError):
                option = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 4)
                self._v6only = bool(int.from_bytes(option, "little"))

    def publish_steps(self) -> Generator[Command, None, None]:
        """Publish the address, or all of this host's that a wildcard stands for. Raises IsmError when none could be."""
        directory = self.device.directory
        if directory is None:
            return
        failure: IsmError | None = None
        for address in self._addresses():
            command = directory.publish_nowait(address, self._address[1], self._scope)
            yield command
            if not command.done:
                failure = TransportError("the device manager does not answer")
                command.then(self._undo(address))  # should it be published later
                continue
            try:
                directory.published(command)
                self._published.add(address)
            except IsmError as exc:
                failure = exc
        if not self._published and failure is not None:
            raise failure

    def _undo(self, address: bytes) -> Callable[[], None]:
        def undo() -> None:
            directory = self.device.directory
            if directory is not None:
                with contextlib.suppress(IsmError):
                    directory.withdraw(address, self._address[1], self._scope)

        return undo

    def _addresses(self) -> list[bytes]:
        host = self._address[0]
        address = ipaddress.ip_address(host.partition("%")[0])
        if not address.is_unspecified:
            return [packed(host)]
        v4 = address.version == 4 or not self._v6only
        found = [LOOPBACK_NET] if v4 else []
        for one in local_addresses():
            is_v4 = one.startswith(_V4_MAPPED)
            if (is_v4 and v4 and one[12] != 127) or (not is_v4 and address.version == 6):
                found.append(one)
        return found

    def _publish_too(self, directory: Directory, address: bytes) -> None:
        with self._lock:
            if address in self._published:
                return
            self._published.add(address)
        command = directory.publish_nowait(address, self._address[1], self._scope)

        def done() -> None:
            try:
                directory.published(command)
            except IsmError:
                self._published.discard(address)

        command.then(done)

    def withdraw(self) -> None:
        """Take everything back, once the claims under way are decided: those need the address. Never waits."""
        if self.pid != os.getpid():
            return  # the parent's, whose thread may hold the lock in this copy
        with self._lock:
            self._ended = True
            if self._claims:
                return
        self._withdraw()

    def _claim_done(self) -> None:
        with self._lock:
            self._claims -= 1
            if self._claims or not self._ended:
                return
        self._withdraw()

    def _withdraw(self) -> None:
        published, self._published = self._published, set()
        if self.pid != os.getpid():
            return
        directory = self.device.directory
        if directory is None:
            return
        for address in published:
            with contextlib.suppress(IsmError):
                directory.withdraw(address, self._address[1], self._scope)

    def accepted(self, sock: RawSocket, peer: Any, make: MakeLink) -> Link | Fallback:
        """Begin to decide about a connection that was accepted; never waits."""
        local = sock.getsockname()
        directory = self.device.directory
        required = self.policy.mode == "require"
        if self.policy.configured(peer[0], local[1]) or (required and directory is None):
            return _agreed(make(self.device))
        if directory is None:
            return NO_DIRECTORY
        here = packed(local[0])
        listed = here in self._published or (here[:13] == LOOPBACK_NET[:13] and LOOPBACK_NET in self._published)
        client = (packed(peer[0]), _seen_scope(here, self._scope))
        if self.device.gone is None:
            connection = offer.connection_bytes(client[1], client[0], peer[1], here, local[1])
            pair = link_groups(self.device).take_offer(client, connection)
            if pair is not None:
                link = make(self.device)
                link.taken(pair)
                return link
        try:
            if not listed:
                # an address that this host has since lately: connections from now on find it in the directory
                if ipaddress.ip_address(self._address[0].partition("%")[0]).is_unspecified:
                    self._publish_too(directory, here)
                return _agreed(make(self.device)) if required else NOT_LISTED
            command = directory.claim_nowait(FourTuple(here, local[1], packed(peer[0]), peer[1], self._scope))
            with self._lock:
                self._claims += 1
            command.then(self._claim_done)
        except IsmError as exc:
            return Fallback(Diagnosis.INTERR, f"the directory could not be asked: {exc}")
        link = make(self.device)
        link.client_address = client
        link.claiming(directory, command)
        return link
