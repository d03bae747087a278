# SPDX-License-Identifier: Apache-2.0
"""A stream that goes on in another ring: how buffers grow when they limit throughput, and shrink when they idle.

Each direction begins in its *home* ring, behind the header. The header, with every word and sleep number in it, stays
there for the life of the connection; only the bytes may travel through another region, which is all ring. The receiver
owns that too, and decides that a direction grows; the sender decides at which byte it goes on there, and when it goes
home. Both happen at a cursor value, so nothing is lost, doubled or reordered:

    receiver                                        sender
    ring is often full: wants a larger one
    region allocated, granted; offer n in the
    header that it writes (token, bytes, then n)
                                                    finds too little room, sees n, attaches the region
                                                    next send: ring = n, base = its producer cursor X;
                                                    header: (n, X, then moves + 1); copies; producer > X
    sees producer > X, and with it the move:
    reads to X in the old ring; then ring = n,
    base = X; the old region is let go
                                                    idle, and everything consumed: ring = home, base = X';
                                                    header: (0, X', then moves + 1); region is let go
    sees the move: the region is let go

A cursor c lies at (c - base) modulo ring size. The sender's room is its ring less what it wrote there and the receiver
has not consumed; bytes of the ring before are unread only by the receiver, and the sender never writes there again. It
moves again only after the receiver has consumed a byte beyond its last move, which it cannot without following it: so
one move is under way at most, and the three words of a move are not changed while the receiver may look at them.

Memory order: the words of an offer, and of a move, are stored before the number that announces them, with release, and
that is loaded with acquire. A move is announced before the first byte behind it is published, so whoever acquired a
producer cursor beyond it finds it. What the receiver may not let go early: a region whose bytes are unread; it lets go
when it reads elsewhere. What the sender may not: the ring it writes.

Who may lie: a sender that names a ring it was not offered, or a cursor outside the ring, is found out as any that lies
about cursors is, and the connection ends. A receiver that names somebody else's region is refused when the sender
attaches (the layer above); one that offers rings of no use costs the sender a system call each. Growth costs the
receiver memory of its own, up to its own limit, however the sender behaves; a sender that never goes home keeps it.

Modelled in `docs/models/move.pml`.
"""

from __future__ import annotations

from typing import Any

from ism.shm.atomics import fence, load_acquire_u64, load_relaxed_u64, store_release_u64
from ism.shm.header import NEXT_BYTES, NEXT_CURSOR, NEXT_MOVES, NEXT_OFFER, NEXT_RING, NEXT_TOKEN
from ism.shm.header import PRODUCER as PRODUCER_AT
from ism.shm.jit import helper
from ism.shm.observe import cross, entry_error, note_move, writable
from ism.shm.park import after_consuming
from ism.shm.state import (
    ATTENTION,
    CONSUMER,
    FAILED_LIE,
    FAILED_SHUT,
    FATE,
    PEER_CONSUMER,
    POISONED,
    PRODUCER,
    RESERVED,
    RX_BUSY,
    RX_BYTES,
    RX_DRY,
    RX_FULL,
    RX_HEADER,
    RX_MARK,
    RX_MAY_GROW,
    RX_MOVE_AT,
    RX_MOVE_BYTES,
    RX_MOVE_RING,
    RX_MOVED,
    RX_NEXT_BYTES,
    RX_NEXT_OFFER,
    RX_NEXT_RING,
    RX_NEXT_TOKEN,
    RX_RING,
    SHUT,
    TX_AWAY,
    TX_BASE,
    TX_BUSY,
    TX_BYTES,
    TX_HEADER,
    TX_HOME_BYTES,
    TX_HOME_RING,
    TX_MOVES,
    TX_NEXT_BYTES,
    TX_NEXT_OFFER,
    TX_NEXT_RING,
    TX_OFFER_SEEN,
    TX_OFFERED_BYTES,
    TX_OFFERED_TOKEN,
    TX_RING,
    get,
    put,
)

_PERIOD_RINGS = 16
"""What is counted below is counted over so many ring sizes of bytes."""
_OFTEN = 4
_HOT_BYTES = 2 * 1024 * 1024
"""A ring smaller than this grows when it is full often; a larger one only if it is also empty often, so that each end
waits for the other: a reader that is merely slow would not gain."""


# Receiving ------------------------------------------------------------------------------------------------------


@helper
def _wants(state: Any, unread: int) -> int:
    """Count what tells whether a larger ring would help; ATTENTION once when it would."""
    if 4 * unread >= 3 * get(state, RX_BYTES):
        put(state, RX_FULL, get(state, RX_FULL) + 1)
    if get(state, CONSUMER) - get(state, RX_MARK) > _PERIOD_RINGS * get(state, RX_BYTES):
        put(state, RX_MARK, get(state, CONSUMER))
        put(state, RX_FULL, 0)
        put(state, RX_DRY, 0)
        return 0
    if get(state, RX_FULL) < _OFTEN:
        return 0
    if get(state, RX_BYTES) >= _HOT_BYTES and get(state, RX_DRY) < _OFTEN:
        return 0
    put(state, RX_MAY_GROW, 0)
    return ATTENTION


@helper
def after_reading(state: Any, unread: int) -> int:
    """Second half of a consumption, of `unread` bytes that were there: DOORBELL, ATTENTION, both or 0."""
    result = after_consuming(state)
    if get(state, RX_MAY_GROW) != 0:
        result |= _wants(state, unread)
    if get(state, RX_MOVED) != 0:
        put(state, RX_MOVED, 0)
        result |= ATTENTION
    return result


def offer_ring(state: Any, length: int) -> int:
    """Kernel: offer the peer the ring that RX_NEXT_* describe, of `length` bytes; 0, or why not."""
    fate = get(state, FATE)
    if fate == SHUT:
        return FAILED_SHUT
    if fate == POISONED:
        return FAILED_LIE
    fence()  # a receive may run without the GIL, and look as soon as there is a length
    put(state, RX_NEXT_BYTES, length)
    header = get(state, TX_HEADER)
    store_release_u64(header + NEXT_TOKEN, get(state, RX_NEXT_TOKEN))
    store_release_u64(header + NEXT_BYTES, length)
    store_release_u64(header + NEXT_OFFER, get(state, RX_NEXT_OFFER))
    return 0


def follow(state: Any, unused: int) -> int:
    """Kernel: see whether the peer has moved though nothing was sent since; 0, ATTENTION may be added."""
    error = entry_error(state, RX_BUSY)
    if error < 0:
        return error
    if get(state, RX_MOVE_BYTES) == 0 and note_move(state) < 0:
        return FAILED_LIE
    if get(state, RX_MOVE_BYTES) != 0 and cross(state) < 0:
        return FAILED_LIE
    if get(state, RX_MOVED) == 0:
        return 0
    put(state, RX_MOVED, 0)
    return ATTENTION


def readable_beyond(state: Any, unused: int) -> int:
    """Kernel: bytes in the ring that the peer has moved to, while those in the ring before are not all read."""
    error = entry_error(state, RX_BUSY)
    if error < 0 or get(state, RX_MOVE_BYTES) == 0:
        return error
    left = cross(state)
    if left < 0 or get(state, RX_MOVE_BYTES) == 0:
        return min(left, 0)
    producer = load_acquire_u64(get(state, RX_HEADER) + PRODUCER_AT)
    return min(max(producer - get(state, RX_MOVE_AT), 0), get(state, RX_MOVE_BYTES))


def uses(state: Any, ring: int) -> int:
    """Kernel: 1 when the ring at that address is in use, or may be; 0: never again; 2: cannot be said in mid-call."""
    if get(state, RX_BUSY) != 0 or get(state, TX_BUSY) != 0:
        return 2
    if ring in (get(state, RX_RING), get(state, TX_RING)):
        return 1
    if get(state, RX_NEXT_BYTES) != 0 and ring == get(state, RX_NEXT_RING):
        return 1
    if get(state, RX_MOVE_BYTES) != 0 and ring == get(state, RX_MOVE_RING):
        return 1
    return 1 if get(state, TX_NEXT_BYTES) != 0 and ring == get(state, TX_NEXT_RING) else 0


# Sending --------------------------------------------------------------------------------------------------------


@helper
def is_offered(state: Any) -> int:
    """ATTENTION if the peer has offered a ring that was not looked at."""
    offer = load_relaxed_u64(get(state, RX_HEADER) + NEXT_OFFER)
    return ATTENTION if offer != get(state, TX_OFFER_SEEN) else 0


def read_offer(state: Any, unused: int) -> int:
    """Kernel: take note of what the peer offers, in TX_OFFERED_*; 1 when it is new, else 0. Any values may come."""
    error = entry_error(state, TX_BUSY)
    if error < 0:
        return error
    header = get(state, RX_HEADER)
    offer = load_acquire_u64(header + NEXT_OFFER)
    if offer == get(state, TX_OFFER_SEEN):
        return 0
    put(state, TX_OFFERED_TOKEN, load_acquire_u64(header + NEXT_TOKEN))
    put(state, TX_OFFERED_BYTES, load_acquire_u64(header + NEXT_BYTES))
    put(state, TX_OFFER_SEEN, offer)
    return 1


@helper
def _move(state: Any, offer: int, ring: int, length: int) -> None:
    producer = get(state, PRODUCER)
    moves = get(state, TX_MOVES) + 1
    put(state, TX_RING, ring)
    put(state, TX_BYTES, length)
    put(state, TX_BASE, producer)
    put(state, TX_MOVES, moves)
    put(state, TX_AWAY, 1 if offer != 0 else 0)
    header = get(state, TX_HEADER)
    store_release_u64(header + NEXT_RING, offer)
    store_release_u64(header + NEXT_CURSOR, producer)
    store_release_u64(header + NEXT_MOVES, moves)


@helper
def _may_move(state: Any) -> bool:
    """Whether the receiver has followed the last move: it has consumed what was sent behind it."""
    return writable(state) >= 0 and (get(state, TX_MOVES) == 0 or get(state, PEER_CONSUMER) > get(state, TX_BASE))


@helper
def go_on_elsewhere(state: Any) -> int:
    """Move to the ring that is ready, unless the last move is still under way; ATTENTION when it was done."""
    if not _may_move(state):
        return 0
    _move(state, get(state, TX_NEXT_OFFER), get(state, TX_NEXT_RING), get(state, TX_NEXT_BYTES))
    put(state, TX_NEXT_BYTES, 0)
    return ATTENTION


def go_home(state: Any, unused: int) -> int:
    """Kernel: go back to the home ring if everything sent is consumed; 1 when it was done, else 0. Rings nobody."""
    error = entry_error(state, TX_BUSY)
    if error < 0:
        return error
    if get(state, TX_AWAY) == 0 or get(state, TX_NEXT_BYTES) != 0 or get(state, RESERVED) != 0:
        return 0
    if writable(state) < 0:
        return FAILED_LIE
    if get(state, PEER_CONSUMER) != get(state, PRODUCER) or not _may_move(state):
        return 0
    _move(state, 0, get(state, TX_HOME_RING), get(state, TX_HOME_BYTES))
    return 1
