# SPDX-License-Identifier: Apache-2.0
"""How a client rings its peers without a message: which eventfd stands behind each of its notify slots.

Owns the fan-out eventfds and the decision who gets which eventfd. It never rings a vector itself: a ring goes
through the registry, as one by register does. A write to the notify register always works; this is the fast way.

- Exactly two hold the region, and the peer has a vector for it alone, with an eventfd: the peer's own eventfd, so
  that a wake-up is one write and the manager is not on the way.
- Exactly two, and the peer has bound no vector (yet): none; rings by register become UPDATE events.
- Otherwise: an eventfd of the manager, one per region and holder, so that the one who rings is not rung itself.

Whoever exchanges one eventfd for another loses nothing: until the client has confirmed the new one its rings may go
to the old one, so once it has, all others are rung once more, which tells them at worst what they knew.

A client shares the file description of its fan-out eventfd and could make a read of it sleep. So it is never read: it
is watched edge-triggered, where each write is an event of its own (epoll(7)).
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import trio

from ism.ids import DevId, Token
from ism.manager.registry import DomainRegistry
from ism.vfio_user.fds import Fd

EVENTS_PER_TURN = 16


class FanOut:
    """Eventfds that the manager listens on: one epoll instance and one task for all of them."""

    def __init__(self) -> None:
        """Make the epoll instance. Raises OSError."""
        self._epoll = select.epoll()
        self._rings: dict[int, Callable[[], None]] = {}

    def __len__(self) -> int:
        return len(self._rings)

    def open(self, ring: Callable[[], None]) -> Fd:
        """Make an eventfd; `ring` is called after writes to it. End it with `forget`. Raises OSError."""
        fd = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        try:
            self._epoll.register(fd.fileno(), select.EPOLLIN | select.EPOLLET)
        except OSError:
            fd.close()
            raise
        self._rings[fd.fileno()] = ring
        return fd

    def forget(self, fd: Fd) -> None:
        """Listen no longer, and close the manager's copy."""
        del self._rings[fd.fileno()]
        self._epoll.unregister(fd.fileno())  # the client's copy would keep it in the set
        fd.close()

    async def run(self) -> None:
        """Ring, for ever. Each turn is bounded, and others run between turns."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for number, _ in self._epoll.poll(0, EVENTS_PER_TURN):
                ring = self._rings.get(number)
                if ring is not None:
                    ring()

    def close(self) -> None:
        """Close the epoll instance; `run` must have ended."""
        for number in self._rings:
            self._epoll.unregister(number)
        self._rings.clear()
        self._epoll.close()


@dataclass(frozen=True, slots=True)
class Wire:
    """What a client was given for a slot: the peer's eventfd, or one of the manager's (`fans_out`)."""

    slot: int
    fd: Fd
    fans_out: bool


class Wired(Protocol):
    """What the decision needs to know of a device that a client is connected to."""

    def exclusive_eventfd(self, vector: int) -> Fd | None:
        """Return the eventfd of a vector that is in use for one region only, None when there is no such."""
        ...

    def rewire(self, token: Token) -> None:
        """See to it, in time, that the client has the eventfd that `wish` says."""
        ...


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client should have for a region: `slot`, and the peer's eventfd, or None for one that fans out."""

    slot: int
    peer_fd: Fd | None


def wish(registry: DomainRegistry, devices: Mapping[DevId, Wired], devid: DevId, token: Token) -> Wish | None:
    """Say which eventfd a device's client should have for a region; None for none at all. Constant time."""
    region = registry.regions.get(token)
    own = region.holders.get(devid) if region is not None else None
    if region is None or own is None or len(region.holders) < 2:
        return None
    slot = own.offset // registry.chunk_size
    if len(region.holders) > 2:
        return Wish(slot, None)
    peer = next(holder for holder in region.holders.values() if holder is not own)
    if peer.vector is None:
        return None
    connected = devices.get(peer.device.devid)
    return Wish(slot, connected.exclusive_eventfd(peer.vector) if connected is not None else None)


class Wiring:
    """Which devices may have an eventfd for which region, so that a change of holders concerns only whom it must."""

    def __init__(self, registry: DomainRegistry, devices: Mapping[DevId, Wired]) -> None:
        self._registry, self._devices = registry, devices
        self._known: dict[Token, set[DevId]] = {}

    def changed(self, token: Token) -> None:
        """Holders or vectors of the region changed: have everybody look whose eventfd may have to be another one.

        While more than two hold the region, all of them fan out: then only who came or went is concerned.
        """
        region = self._registry.regions.get(token)
        known = self._known.pop(token, set())
        now = set(region.holders) if region is not None else set()
        if now:
            self._known[token] = now
        for devid in now ^ known if len(now) > 2 and len(known) > 2 else now | known:
            device = self._devices.get(devid)
            if device is not None:
                device.rewire(token)
