# SPDX-License-Identifier: Apache-2.0
"""Offers: an idle pair of regions is offered for one TCP connection, and taken or withdrawn, by one shared word.

The client of a coming connection writes its four-tuple into the header of a region that the server owns and that no
connection uses, then sets the word to OFFERED. The server, when it accepts a connection of exactly that four-tuple,
exchanges OFFERED for TAKEN; the client that waits no longer exchanges OFFERED for WITHDRAWN. A compare-and-exchange
succeeds for one of the two, so both know the same, and nobody has to be asked.

TAKEN stays for the whole life of the connection and after it, until the client offers the pair again: a server may be
done with a connection, and close it, before the client looks what became of its offer.

    client: four-tuple; full fence; state = OFFERED          server: state == OFFERED; full fence; four-tuple is mine?
    client: waits = 1; full fence; TAKEN? else sleep         server: OFFERED -> TAKEN (a full fence); waits == 1? ring

Either the server sees `waits`, or the client sees TAKEN. Both sides may write the page, and the other side is hostile:
every field is read once; a false one costs the liar this one connection. What a value means is decided above.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

from ism.shm.atomics import compare_exchange_u64
from ism.shm.header import Header
from ism.virtio import barrier

NONE, OFFERED, TAKEN, WITHDRAWN = range(4)
_IDLE = (NONE, TAKEN)

_STATE = Header.offset_of("offer_state")
_WAITS = Header.offset_of("offer_waits")
_TUPLE = slice(Header.offset_of("offer_scope"), Header.offset_of("offer_ports") + 4)
_FORMAT = struct.Struct("<Q16s16sHH")
assert _FORMAT.size == _TUPLE.stop - _TUPLE.start

Exchange = Callable[[int, int, int], int]
"""The compiled `exchange` (`ism.shm.load_kernels().exchange`)."""


def exchange(address: int, expected: int, desired: int) -> int:
    """Kernel: store `desired` at a word if it is `expected`; returns what it was. Sequentially consistent."""
    return compare_exchange_u64(address, expected, desired)


class SharedHeader(Protocol):
    """A region that both sides may write; mapped for as long as it is used here."""

    @property
    def address(self) -> int: ...
    @property
    def view(self) -> memoryview: ...


def connection_bytes(scope: int, local: bytes, local_port: int, remote: bytes, remote_port: int) -> bytes:
    """Encode a four-tuple as the client of the connection sees it; addresses of 16 bytes."""
    return _FORMAT.pack(scope, local, remote, local_port, remote_port)


def make(region: SharedHeader, connection: bytes, kernel: Exchange) -> bool:
    """Offer, as the writer of a region that no connection uses; False: its owner is giving it to another connection."""
    region.view[_TUPLE] = connection
    region.view[_WAITS : _WAITS + 8] = bytes(8)
    barrier.full()
    return _from_idle(region, OFFERED, kernel) in _IDLE


def _from_idle(region: SharedHeader, desired: int, kernel: Exchange) -> int:
    """Store `desired` if no connection is offered or reserved; returns what was there."""
    found = kernel(region.address + _STATE, NONE, desired)
    return kernel(region.address + _STATE, TAKEN, desired) if found == TAKEN else found


def reserve(region: SharedHeader, kernel: Exchange) -> bool:
    """Keep a region from being offered, as its owner, until `release`; False: it is offered."""
    return _from_idle(region, WITHDRAWN, kernel) != OFFERED


def release(region: SharedHeader, kernel: Exchange) -> None:
    """Let a region that was reserved be offered again, as its owner, while its writer does not know yet that it may."""
    kernel(region.address + _STATE, WITHDRAWN, NONE)


def state(region: SharedHeader) -> int:
    """Read how an offer stands. Ordering: acquire."""
    value: int = region.view[_STATE : _STATE + 8].cast("Q")[0]
    barrier.full()
    return value


def wait(region: SharedHeader) -> bool:
    """Say that the client sleeps until the offer is taken; tell whether it may (it is offered still)."""
    region.view[_WAITS : _WAITS + 8].cast("Q")[0] = 1
    barrier.full()
    return state(region) == OFFERED


def withdraw(region: SharedHeader, kernel: Exchange) -> bool:
    """Take an offer back; False: it is taken."""
    return kernel(region.address + _STATE, OFFERED, WITHDRAWN) != TAKEN


def matches(region: SharedHeader, connection: bytes) -> bool:
    """Whether exactly this connection is offered, for the owner of the region."""
    return state(region) == OFFERED and bytes(region.view[_TUPLE]) == connection


def take(region: SharedHeader, kernel: Exchange) -> bool:
    """Take an offer that matches; False: it was withdrawn in time."""
    return kernel(region.address + _STATE, OFFERED, TAKEN) == OFFERED


def client_sleeps(region: SharedHeader) -> bool:
    """Whether the client must be rung, after `take`."""
    barrier.full()  # on arm64 the exchange alone does not order its store before this load
    sleeps: int = region.view[_WAITS : _WAITS + 8].cast("Q")[0]
    return sleeps == 1
