# SPDX-License-Identifier: Apache-2.0
"""Validated reads of the words the peer writes: hello, flags, cursors. Compiled helpers, called by other kernels.

The peer may write anything at any time, also between two reads. So each word is read exactly once, with acquire,
checked against the private words of `ism.shm.state`, and only then accepted there. A value outside its bounds is a
lie: it is recorded (which word, what was read, what would have been right), the endpoint is poisoned, and every later
call fails the same way. Nothing outside the header page is read here, and nothing is written but private words.
"""

from __future__ import annotations

from typing import Any

from ism.shm.atomics import fence, load_acquire_u32, load_acquire_u64
from ism.shm.header import CONSUMER as CONSUMER_AT
from ism.shm.header import (
    FLAGS,
    HELLO,
    KERNEL_ID,
    KNOWN_FLAGS,
    NEXT_CURSOR,
    NEXT_MOVES,
    NEXT_RING,
    PRODUCER,
    RING_BYTES,
)
from ism.shm.jit import helper
from ism.shm.state import (
    ALIVE,
    CONSUMER,
    FAILED_BUSY,
    FAILED_LIE,
    FAILED_SHUT,
    FATE,
    HELLO_SEEN,
    KERNEL,
    LIE_FIELD,
    LIE_HIGHEST,
    LIE_LOWEST,
    LIE_OBSERVED,
    OTHER_KERNEL,
    PEER_CONSUMER,
    PEER_FLAGS,
    PEER_KERNEL,
    PEER_PRODUCER,
    POISONED,
    RX_BASE,
    RX_BYTES,
    RX_DRY,
    RX_FULL,
    RX_HEADER,
    RX_HOME_BYTES,
    RX_HOME_RING,
    RX_MARK,
    RX_MOVE_AT,
    RX_MOVE_BYTES,
    RX_MOVE_RING,
    RX_MOVED,
    RX_MOVES,
    RX_NEXT_BYTES,
    RX_NEXT_OFFER,
    RX_NEXT_RING,
    RX_RING,
    SAME_KERNEL,
    SHUT,
    TX_BASE,
    TX_BYTES,
    WINDOW,
    get,
    put,
)
from ism.shm.state import PRODUCER as MY_PRODUCER


@helper
def entry_error(state: Any, busy_word: int) -> int:
    """0 when a call may begin, else the result it must end with. `busy_word`: TX_BUSY or RX_BUSY."""
    fate = get(state, FATE)
    if fate == SHUT:
        return FAILED_SHUT
    if fate == POISONED:
        return FAILED_LIE
    if get(state, busy_word) != 0:
        return FAILED_BUSY
    return 0


@helper
def lie(state: Any, field: int, observed: int, lowest: int, highest: int) -> int:
    """Record what the peer wrote into the header word at offset `field`, poison the endpoint."""
    if get(state, FATE) == ALIVE:  # what a closed endpoint reads is nobody's lie
        put(state, LIE_FIELD, field)
        put(state, LIE_OBSERVED, observed)
        put(state, LIE_LOWEST, lowest)
        put(state, LIE_HIGHEST, highest)
        put(state, FATE, POISONED)
    return FAILED_LIE


@helper
def greet(state: Any) -> int:
    """Check, once, who wrote the header; called when any other word of it was seen to be set. 0 or FAILED_LIE.

    The peer writes the hello word with release before it stores any other word with release, so whoever acquired
    one of those must find the hello word.
    """
    header = get(state, RX_HEADER)
    hello = load_acquire_u64(header)
    if hello != HELLO:
        return lie(state, 0, hello, HELLO, HELLO)
    ring_bytes = load_acquire_u64(header + RING_BYTES)
    if ring_bytes != get(state, RX_BYTES):
        return lie(state, RING_BYTES, ring_bytes, get(state, RX_BYTES), get(state, RX_BYTES))
    mine, theirs = get(state, KERNEL), load_acquire_u64(header + KERNEL_ID)
    if mine != 0 and theirs != 0:
        put(state, PEER_KERNEL, SAME_KERNEL if theirs == mine else OTHER_KERNEL)
    put(state, HELLO_SEEN, 1)
    return 0


@helper
def peer_flags(state: Any) -> int:
    """Read the peer's flags with acquire: everything it wrote before setting them is visible. FAILED_LIE if cleared."""
    flags = load_acquire_u32(get(state, RX_HEADER) + FLAGS) & KNOWN_FLAGS
    seen = get(state, PEER_FLAGS)
    if flags == seen:
        return flags
    if seen & ~flags != 0:
        return lie(state, FLAGS, flags, seen | flags, KNOWN_FLAGS)
    if get(state, HELLO_SEEN) == 0 and greet(state) < 0:
        return FAILED_LIE
    put(state, PEER_FLAGS, flags)
    return flags


WINDOW_BYTES = 64 * 1024
"""Room worth waking a writer for; a fourth of a ring that is not four times as large."""


@helper
def note_move(state: Any) -> int:
    """Accept that the peer goes on in another ring of this side's, if it said so; 0 or FAILED_LIE. See `ism.shm.move`.

    From here on the accepted producer cursor is where it moved, until all before that is read (`cross`).
    """
    header = get(state, RX_HEADER)
    moves = load_acquire_u64(header + NEXT_MOVES)
    if moves == get(state, RX_MOVES):
        return 0
    if moves != get(state, RX_MOVES) + 1:
        return lie(state, NEXT_MOVES, moves, get(state, RX_MOVES), get(state, RX_MOVES) + 1)
    if get(state, HELLO_SEEN) == 0 and greet(state) < 0:
        return FAILED_LIE
    ring, at = load_acquire_u64(header + NEXT_RING), load_acquire_u64(header + NEXT_CURSOR)
    accepted, consumer = get(state, PEER_PRODUCER), get(state, CONSUMER)
    step = at - accepted
    if step < 0 or step > get(state, RX_BYTES) - (accepted - consumer):
        return lie(state, NEXT_CURSOR, at, accepted, consumer + get(state, RX_BYTES))
    if ring == 0 and get(state, RX_RING) != get(state, RX_HOME_RING):
        put(state, RX_MOVE_RING, get(state, RX_HOME_RING))
        put(state, RX_MOVE_BYTES, get(state, RX_HOME_BYTES))
    elif ring != 0 and ring == get(state, RX_NEXT_OFFER) and get(state, RX_NEXT_BYTES) != 0:
        fence()  # the length was stored last, perhaps just now, for a peer that names the offer before it can know it
        put(state, RX_MOVE_RING, get(state, RX_NEXT_RING))
        put(state, RX_MOVE_BYTES, get(state, RX_NEXT_BYTES))
        put(state, RX_NEXT_BYTES, 0)
    else:
        return lie(state, NEXT_RING, ring, 0, get(state, RX_NEXT_OFFER))
    put(state, RX_MOVE_AT, at)
    put(state, RX_MOVES, moves)
    put(state, PEER_PRODUCER, at)
    return 0


@helper
def cross(state: Any) -> int:
    """Read on in the ring that the peer moved to, if all before is read; bytes to read in either, or FAILED_LIE."""
    at, consumer = get(state, RX_MOVE_AT), get(state, CONSUMER)
    producer = load_acquire_u64(get(state, RX_HEADER) + PRODUCER)  # it moved before: no less than `at`
    beyond = producer - at
    if beyond < 0 or beyond > get(state, RX_MOVE_BYTES):
        return lie(state, PRODUCER, producer, at, at + get(state, RX_MOVE_BYTES))
    if consumer != at:
        return at - consumer
    put(state, RX_RING, get(state, RX_MOVE_RING))
    put(state, RX_BYTES, get(state, RX_MOVE_BYTES))
    put(state, RX_BASE, at)
    put(state, WINDOW, max(1, min(get(state, RX_MOVE_BYTES) // 4, WINDOW_BYTES)))
    put(state, RX_MOVE_BYTES, 0)
    put(state, RX_MOVED, 1)
    put(state, RX_MARK, at)
    put(state, RX_FULL, 0)
    put(state, RX_DRY, 0)
    put(state, PEER_PRODUCER, producer)
    return beyond


@helper
def readable(state: Any) -> int:
    """Read the peer's producer cursor with acquire; returns bytes to read in the ring in use, or FAILED_LIE.

    The difference to the last accepted value is taken in wrapping 64-bit arithmetic and must lie between 0 and the
    free space: one comparison refuses what goes back, what overtakes the ring, and values above 2**63. Whoever
    acquired a cursor beyond the place where the peer changed rings acquired the news of that with it.
    """
    accepted = get(state, PEER_PRODUCER)
    consumer = get(state, CONSUMER)
    header = get(state, RX_HEADER)
    producer = load_acquire_u64(header + PRODUCER)
    if producer == accepted:
        return accepted - consumer
    if get(state, RX_MOVE_BYTES) != 0:
        return cross(state)
    if load_acquire_u64(header + NEXT_MOVES) != get(state, RX_MOVES):
        return FAILED_LIE if note_move(state) < 0 else cross(state)
    step = producer - accepted
    if step < 0 or step > get(state, RX_BYTES) - (accepted - consumer):
        return lie(state, PRODUCER, producer, accepted, consumer + get(state, RX_BYTES))
    if get(state, HELLO_SEEN) == 0 and greet(state) < 0:
        return FAILED_LIE
    put(state, PEER_PRODUCER, producer)
    return producer - consumer


@helper
def writable(state: Any) -> int:
    """Read the peer's consumer cursor with acquire; returns free bytes in the outgoing ring, or FAILED_LIE.

    The acquire orders the peer's reads of the ring before the writes that will reuse the space.
    """
    accepted = get(state, PEER_CONSUMER)
    producer = get(state, MY_PRODUCER)
    consumer = load_acquire_u64(get(state, RX_HEADER) + CONSUMER_AT)
    if consumer != accepted:
        step = consumer - accepted
        if step < 0 or step > producer - accepted:
            return lie(state, CONSUMER_AT, consumer, accepted, producer)
        if get(state, HELLO_SEEN) == 0 and greet(state) < 0:
            return FAILED_LIE
        put(state, PEER_CONSUMER, consumer)
        accepted = consumer
    return get(state, TX_BYTES) - (producer - max(accepted, get(state, TX_BASE)))
