# SPDX-License-Identifier: Apache-2.0
"""The byte ring: kernels that copy into the peer's ring and out of this side's own, and move the cursors.

Positions come from this side's own private cursors, lengths from values `ism.shm.observe` validated, so no copy
leaves the ring whatever the peer writes. Data is written, then the producer cursor is stored with release; data is
read, then the consumer cursor is stored with release. Short copies keep the GIL; long ones give it up and move the
cursor piece by piece, so that both sides copy at the same time. The receiver never writes its own region: its
consumer cursor lies in the header of the region it sends to. Ring sizes need not be powers of two.
"""

from __future__ import annotations

from typing import Any

from ism.shm.atomics import fence, load_relaxed_u32, memcpy, store_release_u32, store_release_u64
from ism.shm.header import CONSUMER as CONSUMER_AT
from ism.shm.header import FLAGS, HELLO, KERNEL_ID, RING_BYTES, STATE_FLAGS, Flags
from ism.shm.header import PRODUCER as PRODUCER_AT
from ism.shm.interop import acquire_gil, bytes_address, new_bytes, none_object, release_gil
from ism.shm.jit import helper
from ism.shm.move import after_reading, go_on_elsewhere, is_offered
from ism.shm.observe import entry_error, peer_flags, readable, writable
from ism.shm.park import (
    after_publishing,
    announce_cpu,
    owes_reader,
    owes_writer,
    reader_sleeps,
    spin_briefly_for_data,
    spin_for_data,
    spin_for_room,
)
from ism.shm.state import (
    CONSUMER,
    FAILED_ARGUMENT,
    FAILED_LIE,
    FAILED_LOOK,
    FAILED_SHUT,
    FATE,
    FLAGS_TOLD,
    GATED,
    HELD,
    KERNEL,
    MY_FLAGS,
    PEER_CONSUMER,
    PEER_PRODUCER,
    POISONED,
    PRODUCER,
    RESERVED,
    RX_BASE,
    RX_BUSY,
    RX_BYTES,
    RX_DRY,
    RX_GATE,
    RX_HEADER,
    RX_OWED,
    RX_RING,
    SHORT,
    SHUT,
    SPIN,
    STATE_BITS,
    TX_BASE,
    TX_BUSY,
    TX_BYTES,
    TX_GATE,
    TX_HEADER,
    TX_NEXT_BYTES,
    TX_RING,
    get,
    put,
)

LONG_BYTES = 64 * 1024
"""Copies from this size on give up the GIL: they take microseconds, giving it up costs some 50 ns."""
PIECE_BYTES = 128 * 1024
"""A long copy moves the cursor after each piece, so that the other side need not wait for the whole of it."""

_ABNORMAL_CLOSE = int(Flags.ABNORMAL_CLOSE)

RX_EMPTY, RX_DATA, RX_EOF, RX_ABORTED = 0, 1, 2, 3


# Sending --------------------------------------------------------------------------------------------------------


@helper
def _copy_in(state: Any, source: int, count: int) -> None:
    """Copy `count` bytes, no more than are free, behind the producer cursor, and publish them."""
    ring, size = get(state, TX_RING), get(state, TX_BYTES)
    producer = get(state, PRODUCER)
    at = (producer - get(state, TX_BASE)) % size
    first = min(count, size - at)
    memcpy(ring + at, source, first)
    if count > first:
        memcpy(ring, source + first, count - first)
    put(state, PRODUCER, producer + count)
    store_release_u64(get(state, TX_HEADER) + PRODUCER_AT, producer + count)


@helper
def _copy_in_long(state: Any, source: int, length: int, room: int) -> int:
    """Copy piece by piece for as long as the peer makes room; returns the bytes copied. Runs without the GIL."""
    done = 0
    while done < length:
        if room <= 0:
            room = writable(state)
            if room <= 0:
                break  # full, or a lie that the next call will report
        piece = min(length - done, room, PIECE_BYTES)
        _copy_in(state, source + done, piece)
        done += piece
        room -= piece
    return done


def send(state: Any, data: Any, wait: int) -> int:
    """Kernel: copy what fits of `data` into the peer's ring; bytes copied, DOORBELL may be added.

    `wait`: of SPIN, GATED, SHORT. GATED: FAILED_LOOK, and nothing sent, when the caller has to look at the peer's flags
    before, or at its own state: so nobody has to who sends while all is well. SHORT: also when the gate is shut for
    another reason, room is lent, or not all of `data` can be sent with the GIL held; without SPIN the GIL is never
    given up then, so threads need no lock. A send that does not send all sets HELD, so that no short send of another
    thread comes in between; whoever cares has it cleared when the rest is sent, or given up.
    Of a long copy to a sleeping reader only the first piece is done, for the doorbell to be rung early.
    """
    error = entry_error(state, TX_BUSY)
    if error < 0:
        return error
    if wait & GATED != 0:
        flags = load_relaxed_u32(get(state, RX_HEADER) + FLAGS)
        if get(state, TX_GATE) & STATE_BITS != 0 or flags != get(state, FLAGS_TOLD):
            return FAILED_LOOK
    if wait & SHORT != 0 and (get(state, TX_GATE) != 0 or get(state, RESERVED) != 0):
        return FAILED_LOOK
    put(state, RESERVED, 0)
    length: int = data.length
    if length == 0:
        return 0
    attention = 0
    if get(state, TX_NEXT_BYTES) != 0:
        if wait & SHORT != 0:
            return FAILED_LOOK
        attention = go_on_elsewhere(state)
    room = get(state, TX_BYTES) - (get(state, PRODUCER) - max(get(state, PEER_CONSUMER), get(state, TX_BASE)))
    if room < length:
        room = writable(state)
        if room == 0 and wait & SPIN != 0 and spin_for_room(state):
            room = writable(state)
        if room < 0:
            return room
        attention |= is_offered(state)
        if room == 0 and wait & SHORT == 0:
            put(state, TX_GATE, get(state, TX_GATE) | HELD)
            return attention
    if wait & SHORT != 0 and (room < length or length >= LONG_BYTES):
        return FAILED_LOOK
    if min(length, room) < LONG_BYTES:
        done = min(length, room)
        _copy_in(state, data.address, done)
    else:
        if reader_sleeps(state):
            length = min(length, PIECE_BYTES)  # ring now: the reader wakes up while the caller copies the rest
        put(state, TX_BUSY, 1)
        thread = release_gil()
        done = _copy_in_long(state, data.address, length, room)
        acquire_gil(thread)
        put(state, TX_BUSY, 0)
    if done < data.length:
        put(state, TX_GATE, get(state, TX_GATE) | HELD)
    return done | attention | after_publishing(state)


def reserve(state: Any, wanted: int) -> int:
    """Kernel: lend up to `wanted` contiguous free bytes at the producer cursor; how many."""
    error = entry_error(state, TX_BUSY)
    if error < 0:
        return error
    if wanted < 0:
        return FAILED_ARGUMENT
    attention = 0
    if get(state, TX_NEXT_BYTES) != 0:
        attention = go_on_elsewhere(state)
    room = writable(state)
    if room < 0:
        return room
    if room < wanted:
        attention |= is_offered(state)
    at = (get(state, PRODUCER) - get(state, TX_BASE)) % get(state, TX_BYTES)
    granted = min(wanted, room, get(state, TX_BYTES) - at)
    put(state, RESERVED, granted)
    return granted | attention


def commit(state: Any, count: int) -> int:
    """Kernel: publish the first `count` bytes of what `reserve` lent; 0, DOORBELL may be added."""
    error = entry_error(state, TX_BUSY)
    if error < 0:
        return error
    if count < 0 or count > get(state, RESERVED):
        return FAILED_ARGUMENT
    put(state, RESERVED, 0)
    if count == 0:
        return 0
    producer = get(state, PRODUCER) + count
    put(state, PRODUCER, producer)
    store_release_u64(get(state, TX_HEADER) + PRODUCER_AT, producer)
    return after_publishing(state)


def writable_bytes(state: Any, wait: int) -> int:
    """Kernel: free bytes in the peer's ring; with `wait` after spinning, if there were none."""
    error = entry_error(state, TX_BUSY)
    if error < 0:
        return error
    room = writable(state)
    if room == 0 and wait != 0 and spin_for_room(state):
        room = writable(state)
    return room


# Receiving ------------------------------------------------------------------------------------------------------


@helper
def _copy_out(state: Any, destination: int, count: int) -> None:
    """Copy `count` bytes, no more than are unread, from the consumer cursor on, and give their space back."""
    ring, size = get(state, RX_RING), get(state, RX_BYTES)
    consumer = get(state, CONSUMER)
    at = (consumer - get(state, RX_BASE)) % size
    first = min(count, size - at)
    memcpy(destination, ring + at, first)
    if count > first:
        memcpy(destination + first, ring, count - first)
    put(state, CONSUMER, consumer + count)
    store_release_u64(get(state, TX_HEADER) + CONSUMER_AT, consumer + count)


@helper
def _copy_out_long(state: Any, destination: int, length: int, unread: int) -> int:
    """Copy piece by piece for as long as the peer delivers; returns the bytes copied. Runs without the GIL."""
    done = 0
    while done < length:
        if unread <= 0:
            unread = readable(state)
            if unread <= 0:
                break  # empty, or a lie that the next call will report
        piece = min(length - done, unread, PIECE_BYTES)
        _copy_out(state, destination + done, piece)
        done += piece
        unread -= piece
    return done


@helper
def _unread(state: Any, wanted: int, wait: int) -> int:
    """Bytes to read, after spinning if there were none and `wait` allows it. Negative: the call must end so."""
    error = entry_error(state, RX_BUSY)
    if error < 0:
        return error
    if wait & SHORT != 0 and get(state, RX_GATE) != 0:
        return FAILED_LOOK
    if wanted <= 0:
        return 0
    unread = get(state, PEER_PRODUCER) - get(state, CONSUMER)
    if unread < wanted:
        unread = readable(state)
        if unread == 0 and wait & SHORT != 0:
            if wait & SPIN != 0 and spin_briefly_for_data(state):
                put(state, RX_DRY, get(state, RX_DRY) + 1)  # in vain, the receive that follows counts it
                unread = readable(state)
        elif unread == 0:
            put(state, RX_DRY, get(state, RX_DRY) + 1)
            if wait & SPIN != 0 and spin_for_data(state):
                unread = readable(state)
    if wait & SHORT != 0 and min(unread, wanted) >= LONG_BYTES:
        return FAILED_LOOK
    return unread


@helper
def _copy_out_any(state: Any, destination: int, count: int, length: int, unread: int) -> int:
    """Copy `count` bytes, or up to `length` when the copy is long, choosing whether to keep the GIL."""
    if count < LONG_BYTES:
        _copy_out(state, destination, count)
        return count
    put(state, RX_BUSY, 1)
    thread = release_gil()
    done = _copy_out_long(state, destination, length, unread)
    acquire_gil(thread)
    put(state, RX_BUSY, 0)
    return done


def recv(state: Any, max_bytes: int, wait: int) -> Any:
    """Kernel: a new bytes object with up to `max_bytes`, or None, for whatever reason: see `receive_error`.

    DOORBELL and ATTENTION are added to RX_OWED, where they stay until somebody has taken them by `take_owed`: threads
    that receive in turns need not know whose they were.
    `wait`: of SPIN and SHORT, as for `send`. Both: a spin of `BRIEF_NS` at most, with the GIL held.
    """
    unread = _unread(state, max_bytes, wait)
    if unread <= 0:
        return none_object()
    count = min(unread, max_bytes)
    data = new_bytes(count)
    address = bytes_address(data)
    if address == 0:
        return data
    _copy_out_any(state, address, count, count, unread)
    put(state, RX_OWED, get(state, RX_OWED) | after_reading(state, unread))
    return data


def take_owed(state: Any, unused: int) -> int:
    """Kernel: what receives have left to be done, DOORBELL, ATTENTION or both; it is the caller's now."""
    owed = get(state, RX_OWED)
    put(state, RX_OWED, 0)
    return owed


def receive_error(state: Any, unused: int) -> int:
    """Kernel: why no receive can succeed, or 0."""
    return entry_error(state, RX_BUSY)


def change_gates(state: Any, change: int) -> int:
    """Kernel: set and clear bits of the gates; `change`: bytes TX to set, TX to clear, RX to set, RX to clear."""
    put(state, TX_GATE, (get(state, TX_GATE) | change & 0xFF) & ~(change >> 8 & 0xFF))
    put(state, RX_GATE, (get(state, RX_GATE) | change >> 16 & 0xFF) & ~(change >> 24 & 0xFF))
    return 0


def recv_into(state: Any, buffer: Any, wait: int) -> int:
    """Kernel: copy what is there into `buffer`; bytes copied, DOORBELL may be added."""
    length: int = buffer.length
    unread = _unread(state, length, wait)
    if unread <= 0:
        return unread
    done = _copy_out_any(state, buffer.address, min(unread, length), length, unread)
    return done | after_reading(state, unread)


def readable_bytes(state: Any, wait: int) -> int:
    """Kernel: bytes to read; with `wait` after spinning, if there were none."""
    if wait != 0:
        return _unread(state, get(state, RX_BYTES) + 1, wait)  # more than are known of: so the peer is asked
    error = entry_error(state, RX_BUSY)
    return error if error < 0 else readable(state)


def consume(state: Any, count: int) -> int:
    """Kernel: give back the first `count` bytes of what was seen; 0, DOORBELL may be added."""
    error = entry_error(state, RX_BUSY)
    if error < 0:
        return error
    consumer = get(state, CONSUMER) + count
    if count < 0 or consumer > get(state, PEER_PRODUCER):
        return FAILED_ARGUMENT
    if count == 0:
        return 0
    unread = get(state, PEER_PRODUCER) - get(state, CONSUMER)
    put(state, CONSUMER, consumer)
    store_release_u64(get(state, TX_HEADER) + CONSUMER_AT, consumer)
    return after_reading(state, unread)


# Flags and state ------------------------------------------------------------------------------------------------


def flags_of_peer(state: Any, unused: int) -> int:
    """Kernel: the peer's flags, acquired."""
    fate = get(state, FATE)
    if fate == SHUT:
        return FAILED_SHUT
    return FAILED_LIE if fate == POISONED else peer_flags(state)


def rx_state(state: Any, unused: int) -> int:
    """Kernel: RX_EMPTY, RX_DATA, RX_EOF or RX_ABORTED.

    The flags are acquired before the producer cursor. The peer published its last byte before it set a flag, so
    whoever saw the flag first and then an empty ring has read everything.
    """
    error = entry_error(state, RX_BUSY)
    if error < 0:
        return error
    flags = peer_flags(state)
    if flags < 0:
        return flags
    unread = readable(state)
    if unread != 0:
        return min(unread, RX_DATA)
    if flags & _ABNORMAL_CLOSE != 0:
        return RX_ABORTED
    return RX_EOF if flags & STATE_FLAGS != 0 else RX_EMPTY


def set_flags(state: Any, bits: int) -> int:
    """Kernel: add flags, released after everything published; 0, DOORBELL may be added."""
    fate = get(state, FATE)
    if fate == SHUT:
        return FAILED_SHUT
    flags = get(state, MY_FLAGS) | bits
    put(state, MY_FLAGS, flags)
    store_release_u32(get(state, TX_HEADER) + FLAGS, flags)
    fence()
    return owes_reader(state) | owes_writer(state)


def start(state: Any, unused: int) -> int:
    """Kernel: write this side's constants into the peer's region, the hello word last."""
    header = get(state, TX_HEADER)
    announce_cpu(state)
    store_release_u64(header + RING_BYTES, get(state, TX_BYTES))
    store_release_u64(header + KERNEL_ID, get(state, KERNEL))
    store_release_u64(header, HELLO)
    return 0
