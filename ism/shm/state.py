# SPDX-License-Identifier: Apache-2.0
"""The private words of one endpoint: its own cursors, what it last accepted from the peer, its spin budgets.

One block of 64-bit words in this process's own memory, never shared, so nothing in it can be forged: a kernel that
needs to know how far it has read or written looks here and never into the region. The block is grouped by who
changes it (setup, sending, receiving), each group on its own cache lines, because a thread that sends and a thread
that receives may run at once. Words are read and written by kernels through `get` and `put`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from ism.shm.header import LINE_BYTES
from ism.shm.jit import intrinsic, numba_types

# setup, and what both directions share; changed with the GIL held
RX_HEADER, TX_HEADER = 0, 1
FATE, LIE_FIELD, LIE_OBSERVED, LIE_LOWEST, LIE_HIGHEST = 2, 3, 4, 5, 6
HELLO_SEEN, PEER_FLAGS, MY_FLAGS = 7, 8, 9
MAX_SPIN_NS, KERNEL, PEER_KERNEL, MY_CPU = 10, 11, 12, 14
# sending
TX_RING, TX_BYTES, PRODUCER, PEER_CONSUMER, TX_BUSY = 16, 17, 18, 19, 20
RESERVED, WRITER_SLEEP, READER_RUNG, TX_SPIN = 21, 22, 23, 24
TX_BASE, TX_HOME_RING, TX_HOME_BYTES, TX_OFFER_SEEN = 32, 33, 34, 35
TX_NEXT_OFFER, TX_NEXT_RING, TX_NEXT_BYTES, TX_MOVES, TX_AWAY = 36, 37, 38, 39, 40
TX_OFFERED_TOKEN, TX_OFFERED_BYTES, TX_GATE, FLAGS_TOLD = 41, 42, 43, 44
# receiving
RX_RING, RX_BYTES, CONSUMER, PEER_PRODUCER, RX_BUSY = 48, 49, 50, 51, 52
WINDOW, READER_SLEEP, WRITER_RUNG, RX_SPIN, RX_OWED = 53, 54, 55, 56, 60
RX_BASE, RX_HOME_RING, RX_HOME_BYTES, RX_OFFERS, RX_MAY_GROW = 64, 65, 66, 67, 68
RX_NEXT_OFFER, RX_NEXT_RING, RX_NEXT_BYTES, RX_NEXT_TOKEN = 69, 70, 71, 72
RX_MOVES, RX_MOVE_AT, RX_MOVE_RING, RX_MOVE_BYTES, RX_MOVED = 73, 74, 75, 76, 77
RX_MARK, RX_FULL, RX_DRY, RX_GATE = 78, 79, 80, 81

WORDS = 96

# words of one spin budget, counted from TX_SPIN or RX_SPIN
SPIN_BUDGET_NS, SPIN_SKIP, SPIN_BACKOFF = 0, 1, 2

# values of PEER_KERNEL: whether the peer's threads are scheduled by the kernel that schedules ours
UNKNOWN_KERNEL, SAME_KERNEL, OTHER_KERNEL = 0, 1, 2

# values of FATE
ALIVE, POISONED, SHUT = 0, 1, 2

# bits of the last argument of `send` and `recv`: spin when there is nothing to do; refuse to send when one of the
# gate's STATE_BITS is set, or there are flags not told; refuse when any bit of it is set, and what is no one short copy
SPIN, GATED, SHORT = 1, 2, 4

# bits of the gates: the lowest are about this end's state, which matters to every send; the others to short calls alone
NOT_SENDING, PEER_GONE, HELD = 1, 2, 4
STATE_BITS = NOT_SENDING | PEER_GONE

# results of kernels below zero, and the bits that ask the caller to ring the doorbell, or to see to its buffers
FAILED_LIE, FAILED_SHUT, FAILED_BUSY, FAILED_ARGUMENT, FAILED_LOOK = -1, -2, -3, -4, -5
DOORBELL = 1 << 62
ATTENTION = 1 << 61
"""Asks the caller to look at its buffers: one is wanted, offered, or no longer used (`ism.shm.move`)."""


def new_block() -> npt.NDArray[np.int64]:
    """Allocate the zeroed words of one endpoint, on a cache-line boundary."""
    raw = np.zeros(WORDS + LINE_BYTES // 8, np.int64)
    skip = -raw.ctypes.data % LINE_BYTES // 8
    return raw[skip : skip + WORDS]


@intrinsic
def private_load(typing_context: Any, state: Any, word: Any) -> Any:
    """Value of one private word."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return builder.load(_address(builder, args))

    return numba_types.int64(state, numba_types.int64), codegen


@intrinsic
def private_store(typing_context: Any, state: Any, word: Any, value: Any) -> Any:
    """Set one private word."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        builder.store(args[2], _address(builder, args))
        return context.get_dummy_value()

    return numba_types.void(state, numba_types.int64, numba_types.int64), codegen


def _address(builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
    kind = ir.IntType(64)
    base = builder.extract_value(args[0], 0)
    return builder.inttoptr(builder.add(base, builder.mul(args[1], kind(8))), kind.as_pointer())


get: Callable[[Any, int], int] = private_load
put: Callable[[Any, int, int], None] = private_store
