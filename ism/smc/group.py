# SPDX-License-Identifier: Apache-2.0
"""Link groups: what connections between the same two devices can use again, so that a short one needs no command.

A link group is all connections of one device with one peer device. When a connection ends, its two regions need not:

- the *own* region (the peer writes it) is granted to that peer alone, bound to an interrupt and attached by the peer.
  It is `idle` once the peer has published RELEASED in it, and is zeroed by its owner before it is announced again.
- the *attached* region (the peer owns it) stays attached until its owner lets it go or announces it again.

    own:       in use -> limbo (closed here; the peer may still write) -> idle -> in use
    attached:  in use -> cached -> in use

Who owns which bytes: the header and ring of a region belong to its writer, the peer, until the peer's RELEASED, then to
the owner until it announces the token, then to the peer again; the announcement is a message over TCP, which orders
the zeroes before the peer's hello word. RELEASED is stored when no thread of the writer is inside a kernel and none can
enter any more, so an honest peer writes nothing after it.

Who may lie: a peer that writes after its RELEASED spoils connections with itself, no others: the region was never
granted to anybody else, its eventfd never given to anybody else. It cannot make this side write anywhere it should not.
An attached region is used again only when the device that owns it names it, and only while no connection uses it.

Offers (`ism.shm.offer`): a client offers a whole pair for its next connection, in shared memory, and the server takes
it when it accepts: decision and handshake in one word, without the manager and without a message. Only the pairs of
connections from the same client address are looked at, of which the manager has once said that it is the peer's: a peer
that offers somebody else's connection is one that could have intended it too.

Bounds: so many regions per group and per device; the oldest goes first. A peer whose device detaches is forgotten.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from ism.driver import Device, Region
from ism.driver.events import Event
from ism.errors import IsmError
from ism.eventfd import drain
from ism.ids import DevId, Token
from ism.shm import offer
from ism.shm.header import FLAGS, HEADER_BYTES, LINE_BYTES, RELEASED, WORDS_BYTES
from ism.shm.kernels import load_kernels
from ism.smc.handshake_machine import PeerAnswer
from ism.virtio import barrier
from ism.virtio.ism_spec import EventType

MAX_PER_GROUP = 16
MAX_PER_DEVICE = 64
_ZEROES = bytes(WORDS_BYTES)
"""The header words that a writer sets; the rest of the page is never read."""
_RING_ZEROES = bytes(WORDS_BYTES - LINE_BYTES)
"""Those before the offer."""
assert WORDS_BYTES < HEADER_BYTES

Address = tuple[bytes, int]
"""Address of a host and its network namespace."""


@dataclass(slots=True, eq=False)
class Pair:
    """The two regions of a connection that has ended here; either may have been taken since.

    Attributes: `answer` (the peer's), `client` (this side had connected, and may offer them; else it may take them: so
    the two sides, which may be one process, never do both at once), `address` (of the client, as the manager knows it).
    """

    own: Region | None
    attached: Region | None
    answer: PeerAnswer | None = None
    client: bool = False
    address: Address | None = None

    def regions(self) -> Iterator[Region]:
        """Those that are there."""
        if self.own is not None:
            yield self.own
        if self.attached is not None:
            yield self.attached

    def whole(self) -> tuple[Region, Region] | None:
        """Both regions, when both are there and usable, and what the peer said is known."""
        own, attached = self.own, self.attached
        if own is None or attached is None or self.answer is None or own.closed or attached.closed:
            return None
        return own, attached


@dataclass(slots=True)
class _Group:
    pairs: list[Pair] = field(default_factory=list)

    def drop_empty(self, pair: Pair) -> None:
        if pair.own is None and pair.attached is None:
            self.pairs.remove(pair)


class LinkGroups:
    """The link groups of one device. Thread-safe; nothing here waits for the device.

    Attributes: `reused`, `made` (own regions that were there, or had to be allocated); `taken` (offers of peers).
    """

    def __init__(self, *, keeps: bool = True) -> None:
        """Args: `keeps`: False where an exchange in a region is not atomic, so that no region may be offered."""
        self._keeps = keeps
        self._lock = threading.RLock()
        self._groups: OrderedDict[DevId, _Group] = OrderedDict()
        self._count = 0
        self.reused = self.made = self.taken = 0

    # -- single regions, announced by CLC ----------------------------------------------------------------------------

    def take_own(self, peer: DevId, size: int) -> Region | None:
        """Return an own region of `size` bytes that is granted to `peer` and zeroed, or None."""
        with self._lock:
            region = self._pop_own(peer, size)
            if region is None:
                self.made += 1
                return None
            self.reused += 1
        region.view[: len(_RING_ZEROES)] = _RING_ZEROES  # not the offer: it is reserved, and stays so
        drain(region.fileno())
        region.on_event(None)
        return region

    def has_own(self, peer: DevId, size: int) -> bool:
        """Whether `take_own` would find one, as far as can be told without taking it."""
        with self._lock:
            group = self._groups.get(peer)
            owns = [pair.own for pair in group.pairs] if group is not None else []
            return any(own is not None and own.length == size and not own.closed and _released(own) for own in owns)

    def made_own(self) -> None:
        """Count an own region that was made without `take_own` having been asked for one."""
        with self._lock:
            self.made += 1

    def _pop_own(self, peer: DevId, size: int) -> Region | None:
        group = self._groups.get(peer)
        if group is None:
            return None
        self._groups.move_to_end(peer)
        # one whose other half is gone first: whole pairs can be offered
        for pair in sorted(group.pairs, key=lambda pair: pair.attached is not None):
            own = pair.own
            if own is None or own.length != size or own.closed or not _released(own):
                continue
            if offer.reserve(own, load_kernels().exchange):  # else the peer offers it for a connection under way
                pair.own = None
                group.drop_empty(pair)
                self._drop_if_empty(peer)
                self._count -= 1
                return own
        return None

    def take_attached(self, peer: DevId, token: Token) -> Region | None:
        """Return the region of the peer with that token, when it is attached still and no connection uses it."""
        with self._lock:
            region = self._pop_attached(peer, token)
        if region is not None:
            region.on_event(None)
        return region

    def _pop_attached(self, peer: DevId, token: Token) -> Region | None:
        group = self._groups.get(peer)
        for pair in group.pairs if group is not None else ():
            region = pair.attached
            if region is not None and region.token == token:
                assert group is not None
                pair.attached = None
                group.drop_empty(pair)
                self._drop_if_empty(peer)
                self._count -= 1
                return region
        return None

    # -- pairs, offered in shared memory -----------------------------------------------------------------------------

    def offer(self, peer: DevId, size: int, connection: bytes) -> Pair | None:
        """Client: offer a pair of regions to the peer for a connection that is about to be made.

        Args: `connection`: from `ism.shm.offer.connection_bytes`.
        Returns: the pair, the caller's from now on, its own region zeroed; None when there is none.
        """
        with self._lock:
            pair = self._pop_pair(peer, size)
        if pair is None or (both := pair.whole()) is None:
            return None
        own, attached = both
        own.view[: len(_ZEROES)] = _ZEROES
        drain(own.fileno())
        if not offer.make(attached, connection, load_kernels().exchange):
            own.close()
            attached.close()
            return None
        self.reused += 1
        return pair

    def _pop_pair(self, peer: DevId, size: int) -> Pair | None:
        group = self._groups.get(peer)
        for pair in group.pairs if group is not None else ():
            both = pair.whole()
            if pair.client and both is not None and both[0].length == size and _released(both[0]):
                assert group is not None
                group.pairs.remove(pair)
                self._drop_if_empty(peer)
                self._count -= 2
                return pair
        return None

    def take_offer(self, address: Address, connection: bytes) -> Pair | None:
        """Server: take the pair that a peer has offered for a connection that was accepted.

        Args: `address`: of the client, as `keep` was told; `connection`: from `ism.shm.offer.connection_bytes`.
        Returns: the pair, the caller's from now on; None when no peer of that address offers it (any more).
        """
        with self._lock:
            pair = self._find_offer(address, connection)
        if pair is None or (both := pair.whole()) is None:
            return None
        own, attached = both
        own.view[: len(_RING_ZEROES)] = _RING_ZEROES
        if not offer.take(own, load_kernels().exchange):
            own.close()
            attached.close()
            return None
        self.taken += 1
        if offer.client_sleeps(own):
            try:
                attached.ring()
            except (IsmError, OSError):
                pass  # it looks when its time is up
        return pair

    def _find_offer(self, address: Address, connection: bytes) -> Pair | None:
        for peer, group in self._groups.items():
            for pair in group.pairs:
                both = None if pair.client or pair.address != address else pair.whole()
                if both is not None and offer.matches(both[0], connection) and _released(both[0]):
                    group.pairs.remove(pair)
                    self._drop_if_empty(peer)
                    self._count -= 2
                    return pair
        return None

    def _drop_if_empty(self, peer: DevId) -> None:
        if not self._groups[peer].pairs:
            del self._groups[peer]

    # -- keeping -----------------------------------------------------------------------------------------------------

    def keep(
        self,
        peer: DevId,
        own: Region,
        attached: Region | None,
        answer: PeerAnswer | None = None,
        *,
        client: bool = False,
        address: Address | None = None,
    ) -> None:
        """Take over the regions of a connection that has ended here.

        Args: `attached`: the peer's region, which no thread of this side writes any more: RELEASED is published in it.
            `answer`: what the peer said of itself; `client`: whether this side had connected;
            `address`: of the client, when the manager has said that connections from it are the peer's.
        """
        if not self._keeps:
            own.close()
            if attached is not None:
                attached.close()
            return
        drop: list[Region] = []
        pair = Pair(own, attached, answer, client, address)
        with self._lock:
            own.on_event(_Watch(self, peer, own))
            if attached is not None:
                attached.on_event(_Watch(self, peer, attached))
                publish_released(attached)  # with the lock held: the peer may name it, in another thread, at once
            group = self._groups.setdefault(peer, _Group())
            self._groups.move_to_end(peer)
            group.pairs.append(pair)
            self._count += len(list(pair.regions()))
            while len(group.pairs) > MAX_PER_GROUP:
                oldest = list(group.pairs.pop(0).regions())
                self._count -= len(oldest)
                drop += oldest
            for other in [other for other in self._groups if other != peer]:
                if self._count <= MAX_PER_DEVICE:
                    break
                drop += self._forget(other)
            for region in drop:
                region.close()  # with the lock held: whoever does not find it here may attach it at once

    def gone(self, peer: DevId, region: Region) -> None:
        """Note that the peer has detached from a region that is kept here (called by the driver)."""
        with self._lock:
            group = self._groups.get(peer)
            for pair in group.pairs if group is not None else ():
                if pair.own is region:
                    pair.own = None
                elif pair.attached is region:
                    pair.attached = None
                else:
                    continue
                assert group is not None
                group.drop_empty(pair)
                self._drop_if_empty(peer)
                self._count -= 1
                break
            else:
                return
        region.close()

    def clear(self) -> bool:
        """Let everything go. Returns whether there was anything."""
        with self._lock:
            drop = [region for peer in list(self._groups) for region in self._forget(peer)]
            for region in drop:
                region.close()
        return bool(drop)

    def _forget(self, peer: DevId) -> list[Region]:
        drop = [region for pair in self._groups.pop(peer).pairs for region in pair.regions()]
        self._count -= len(drop)
        return drop


class _Watch:
    """What a kept region does when its peer leaves it. The driver holds it, and it holds the groups weakly."""

    __slots__ = ("_groups", "_peer", "_region")

    def __init__(self, groups: LinkGroups, peer: DevId, region: Region) -> None:
        self._groups, self._peer, self._region = weakref.ref(groups), peer, weakref.ref(region)

    def __call__(self, event: Event) -> None:
        groups, region = self._groups(), self._region()
        if event.kind == EventType.DETACH and event.devid == self._peer and groups is not None and region is not None:
            groups.gone(self._peer, region)


def _released(region: Region) -> bool:
    """Whether the peer, who writes this region, has promised to write it no more."""
    flags = int.from_bytes(region.view[FLAGS : FLAGS + 4], "little")
    if not flags & RELEASED:
        return False
    barrier.full()
    return True


def publish_released(region: Region) -> None:
    """Promise the owner of an attached region that this side writes it no more: its last store there."""
    barrier.full()
    region.view[FLAGS : FLAGS + 4].cast("I")[0] |= RELEASED


_by_device: weakref.WeakKeyDictionary[Device, LinkGroups] = weakref.WeakKeyDictionary()
_by_device_lock = threading.Lock()


def _after_fork() -> None:
    global _by_device_lock  # noqa: PLW0603 (a lock belongs to one process)
    _by_device_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def link_groups(device: Device) -> LinkGroups:
    """Return the link groups of a device."""
    with _by_device_lock:
        groups = _by_device.get(device)
        if groups is None:
            groups = _by_device[device] = LinkGroups(keeps=device.atomic)
        return groups


def release_idle(device: Device) -> None:
    """Let go of what is kept for later connections of a device. Its connections are not touched."""
    try:
        link_groups(device).clear()
    except IsmError:
        pass  # the device is gone, and everything with it
