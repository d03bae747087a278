# SPDX-License-Identifier: Apache-2.0
"""Spin, sleep and wake: the store-fence-load handshake on both sides. Compiled helpers and kernels.

A reader with nothing to read, or a writer with no room, first spins, while spinning pays, and then parks: it
writes an odd sleep number into the peer's region, fences, looks once more, and only then sleeps on its doorbell.
The other side stores its cursor or flags, fences, and reads the sleep number. One of the two must see the other's
store, so no wake-up is lost; a number is rung at most once, so a sleep costs one doorbell. `docs/memory-order.md`
argues it, `docs/models/park.pml` is checked. Sleep numbers come from the peer and need no validation: the worst a
false one does is a doorbell that nobody needed, at most one per call.
"""

from __future__ import annotations

from typing import Any

from ism.shm.atomics import (
    fence,
    load_acquire_u32,
    load_acquire_u64,
    load_relaxed_u32,
    load_relaxed_u64,
    pause,
    store_relaxed_u32,
    store_release_u64,
)
from ism.shm.header import CONSUMER as CONSUMER_AT
from ism.shm.header import CPU, FLAGS, PRODUCER, READER_PARKED, STATE_FLAGS, WRITER_PARKED, Flags
from ism.shm.interop import acquire_gil, allowed_cpus, current_cpu, monotonic_ns, release_gil
from ism.shm.jit import helper
from ism.shm.observe import entry_error, peer_flags, readable, writable
from ism.shm.state import (
    CONSUMER,
    DOORBELL,
    FAILED_ARGUMENT,
    FAILED_SHUT,
    FATE,
    MAX_SPIN_NS,
    MY_CPU,
    OTHER_KERNEL,
    PEER_CONSUMER,
    PEER_FLAGS,
    PEER_KERNEL,
    PEER_PRODUCER,
    READER_RUNG,
    READER_SLEEP,
    RX_BUSY,
    RX_BYTES,
    RX_HEADER,
    RX_SPIN,
    SAME_KERNEL,
    SHUT,
    SPIN_BACKOFF,
    SPIN_BUDGET_NS,
    SPIN_SKIP,
    TX_BUSY,
    TX_BYTES,
    TX_HEADER,
    TX_SPIN,
    WINDOW,
    WRITER_RUNG,
    WRITER_SLEEP,
    get,
    put,
)

_SPINS_PER_WIN, _SPINS_SAVED = 2, 8
"""How many spins in vain one success pays for, and how many may be saved up."""
_FIRST_BACKOFF, _LAST_BACKOFF = 4, 256
"""Waits without a spin before the next trial, doubled after each trial that failed."""
BRIEF_NS = 2_000
"""How long a spin may keep the GIL: other threads wait."""
FAR_SPIN_FACTOR = 4
"""How much longer a spin may be when the peer is behind another kernel."""
_POLLS_PER_CLOCK = 16
_NO_MORE_ROOM = int(Flags.CLOSED | Flags.ABNORMAL_CLOSE)
"""Flags after which the peer never reads again, so that waiting for room is in vain."""


# Waking the peer ------------------------------------------------------------------------------------------------


@helper
def owes_reader(state: Any) -> int:
    """DOORBELL if the peer's reader sleeps and was not rung for this sleep. Call after the fence."""
    sleep = load_relaxed_u64(get(state, RX_HEADER) + READER_PARKED)
    if sleep & 1 != 0 and sleep != get(state, READER_RUNG):
        put(state, READER_RUNG, sleep)
        return DOORBELL
    return 0


@helper
def reader_sleeps(state: Any) -> bool:
    """Whether `owes_reader` would ring, as a hint: no fence, nothing is marked."""
    sleep = load_relaxed_u64(get(state, RX_HEADER) + READER_PARKED)
    return sleep & 1 != 0 and sleep != get(state, READER_RUNG)


@helper
def owes_writer(state: Any) -> int:
    """DOORBELL if the peer's writer sleeps and was not rung for this sleep. Call after the fence."""
    sleep = load_relaxed_u64(get(state, RX_HEADER) + WRITER_PARKED)
    if sleep & 1 != 0 and sleep != get(state, WRITER_RUNG):
        put(state, WRITER_RUNG, sleep)
        return DOORBELL
    return 0


@helper
def after_publishing(state: Any) -> int:
    """Second half of a publication: the producer cursor is stored, see whether the peer's reader sleeps."""
    fence()
    return owes_reader(state)


@helper
def after_consuming(state: Any) -> int:
    """Second half of a consumption: the consumer cursor is stored, see whether the peer's writer sleeps.

    A writer is woken only for room worth waking up for: a window's worth, or all of the ring. The accepted producer
    cursor may be behind the true one, so this can ring early but never late. What is held back here is made up for
    by `park_reader`.
    """
    unread = get(state, PEER_PRODUCER) - get(state, CONSUMER)
    if unread != 0 and get(state, RX_BYTES) - unread < get(state, WINDOW):
        return 0
    fence()
    return owes_writer(state)


def ring_if_parked(state: Any, unused: int) -> int:
    """Kernel: fence, then DOORBELL if either of the peer's sides sleeps and was not rung."""
    if get(state, FATE) == SHUT:
        return FAILED_SHUT
    fence()
    return owes_reader(state) | owes_writer(state)


# Sleeping -------------------------------------------------------------------------------------------------------


def park_reader(state: Any, beyond: int) -> int:
    """Kernel: announce that this side's reader is about to sleep; 1 = sleep, 0 = do not, DOORBELL may be added.

    `beyond` bytes are known to the caller and not reason enough to stay awake.
    """
    error = entry_error(state, RX_BUSY)
    if error < 0:
        return error
    if beyond < 0 or beyond >= get(state, RX_BYTES):
        return FAILED_ARGUMENT
    sleep = (get(state, READER_SLEEP) + 1) | 1
    word = get(state, TX_HEADER) + READER_PARKED
    put(state, READER_SLEEP, sleep)
    store_release_u64(word, sleep)
    fence()
    flags = peer_flags(state)
    unread = readable(state)
    if flags >= 0 and 0 <= unread <= beyond and flags & STATE_FLAGS == 0:
        # Nothing more is consumed for a while: a writer that was not worth waking for so little must be told now.
        return 1 | owes_writer(state)
    put(state, READER_SLEEP, sleep + 1)
    store_release_u64(word, sleep + 1)
    return min(flags, unread, 0)


def park_writer(state: Any, beyond: int) -> int:
    """Kernel: announce that this side's writer is about to sleep; 1 = sleep, 0 = do not.

    `beyond` free bytes are known to the caller and not reason enough to stay awake.
    """
    error = entry_error(state, TX_BUSY)
    if error < 0:
        return error
    if beyond < 0 or beyond >= get(state, TX_BYTES):
        return FAILED_ARGUMENT
    sleep = (get(state, WRITER_SLEEP) + 1) | 1
    word = get(state, TX_HEADER) + WRITER_PARKED
    put(state, WRITER_SLEEP, sleep)
    store_release_u64(word, sleep)
    fence()
    flags = peer_flags(state)
    room = writable(state)
    if flags >= 0 and 0 <= room <= beyond and flags & _NO_MORE_ROOM == 0:
        return 1
    put(state, WRITER_SLEEP, sleep + 1)
    store_release_u64(word, sleep + 1)
    return min(flags, room, 0)


def unpark(state: Any, writer: int) -> int:
    """Kernel: announce that the reader (0) or the writer (1) is awake. Does nothing when it was, or after close."""
    if get(state, FATE) == SHUT:
        return 0
    own = WRITER_SLEEP if writer != 0 else READER_SLEEP
    at = WRITER_PARKED if writer != 0 else READER_PARKED
    sleep = get(state, own)
    if sleep & 1 != 0:
        put(state, own, sleep + 1)
        store_release_u64(get(state, TX_HEADER) + at, sleep + 1)
    return 0


# Spinning -------------------------------------------------------------------------------------------------------


@helper
def announce_cpu(state: Any) -> int:
    """Publish the CPU this thread is on, if it changed; returns its number."""
    cpu = current_cpu()
    if cpu + 1 != get(state, MY_CPU):
        put(state, MY_CPU, cpu + 1)
        store_relaxed_u32(get(state, TX_HEADER) + CPU, cpu + 1)
    return cpu


@helper
def _longest_ns(state: Any) -> int:
    """The longest spin: longer for a peer behind another kernel, whom it takes a trap and an interrupt to wake.

    The peer says which kernel it is behind. One that lies gets this side to spin in vain that long, until it learns.
    """
    longest = get(state, MAX_SPIN_NS)
    return FAR_SPIN_FACTOR * longest if get(state, PEER_KERNEL) == OTHER_KERNEL else longest


@helper
def _granted_ns(state: Any, base: int) -> int:
    """How long this wait may spin: the longest time or, when it cannot help or has not paid, 0.

    Nothing in between: a shorter spin costs less, but misses every peer that is slower, and then costs for nothing.
    """
    longest = _longest_ns(state)
    if longest == 0:
        return 0
    cpu = announce_cpu(state)
    peer = load_relaxed_u32(get(state, RX_HEADER) + CPU)
    kernel = get(state, PEER_KERNEL)
    if kernel == SAME_KERNEL and peer == cpu + 1:
        return 0  # the peer cannot run while this thread spins
    elsewhere = kernel == OTHER_KERNEL or (kernel == SAME_KERNEL and peer != 0)
    if not elsewhere and allowed_cpus() == 1:
        return 0  # one CPU, and the peer is not known to be on another
    if get(state, base + SPIN_BUDGET_NS) > 0:
        return longest
    skip = get(state, base + SPIN_SKIP) - 1
    put(state, base + SPIN_SKIP, skip)
    return longest if skip <= 0 else 0


@helper
def _adapt(state: Any, base: int, granted: int, won: bool) -> None:
    """Account for a spin. The budget is the time that may yet be spun in vain: successes earn it, failures use it up.

    So of the time spent spinning a bounded part is in vain, a peer that is late now and then is spun for all the same,
    and one that is always late is tried ever more seldom.
    """
    budget = get(state, base + SPIN_BUDGET_NS)
    if won:
        put(state, base + SPIN_BUDGET_NS, min(budget + _SPINS_PER_WIN * granted, _SPINS_SAVED * granted))
        put(state, base + SPIN_BACKOFF, _FIRST_BACKOFF)
        return
    if budget <= granted:
        backoff = max(get(state, base + SPIN_BACKOFF), _FIRST_BACKOFF)
        put(state, base + SPIN_SKIP, backoff)
        put(state, base + SPIN_BACKOFF, min(2 * backoff, _LAST_BACKOFF))
    put(state, base + SPIN_BUDGET_NS, max(budget - granted, 0))


@helper
def _spin(cursor: int, cursor_seen: int, flags: int, flags_seen: int, budget_ns: int) -> bool:
    """Poll until the cursor or the flags word differs from what was seen, or the time is up. Any value may come."""
    deadline = monotonic_ns() + budget_ns
    while True:
        for _ in range(_POLLS_PER_CLOCK):
            if load_acquire_u64(cursor) != cursor_seen or load_acquire_u32(flags) != flags_seen:
                return True
            pause()
        if monotonic_ns() >= deadline:
            return False


@helper
def spin_for_data(state: Any) -> bool:
    """Wait for the peer's producer cursor to move, without the GIL; False when the budget is used up."""
    header = get(state, RX_HEADER)
    flags = load_relaxed_u32(header + FLAGS)
    if flags & STATE_FLAGS != 0 or get(state, PEER_FLAGS) & STATE_FLAGS != 0:
        return False
    granted = _granted_ns(state, RX_SPIN)
    if granted == 0:
        return False
    put(state, RX_BUSY, 1)
    thread = release_gil()
    won = _spin(header + PRODUCER, get(state, PEER_PRODUCER), header + FLAGS, flags, granted)
    acquire_gil(thread)
    put(state, RX_BUSY, 0)
    _adapt(state, RX_SPIN, granted, won)
    return won


@helper
def spin_briefly_for_data(state: Any) -> bool:
    """As `spin_for_data`, for so short a time that the GIL is kept, and only while spinning pays.

    An answer that takes a microsecond comes while it would be given up, and the caller went another way.
    """
    header = get(state, RX_HEADER)
    flags = load_relaxed_u32(header + FLAGS)
    if flags & STATE_FLAGS != 0 or get(state, PEER_FLAGS) & STATE_FLAGS != 0:
        return False
    if get(state, RX_SPIN + SPIN_BUDGET_NS) <= 0:
        return False
    granted = _granted_ns(state, RX_SPIN)
    if granted == 0:
        return False
    won = _spin(header + PRODUCER, get(state, PEER_PRODUCER), header + FLAGS, flags, min(granted, BRIEF_NS))
    if won:
        _adapt(state, RX_SPIN, granted, won)
    return won


@helper
def spin_for_room(state: Any) -> bool:
    """Wait for the peer's consumer cursor to move, without the GIL; False when the budget is used up."""
    header = get(state, RX_HEADER)
    flags = load_relaxed_u32(header + FLAGS)
    if flags & _NO_MORE_ROOM != 0 or get(state, PEER_FLAGS) & _NO_MORE_ROOM != 0:
        return False
    granted = _granted_ns(state, TX_SPIN)
    if granted == 0:
        return False
    put(state, TX_BUSY, 1)
    thread = release_gil()
    won = _spin(header + CONSUMER_AT, get(state, PEER_CONSUMER), header + FLAGS, flags, granted)
    acquire_gil(thread)
    put(state, TX_BUSY, 0)
    _adapt(state, TX_SPIN, granted, won)
    return won
