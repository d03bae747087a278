# SPDX-License-Identifier: Apache-2.0
"""Do long copies gain from non-temporal stores, and in pieces of which size should a long message be copied?

A non-temporal store goes past the caches. The writer of a ring never reads back what it wrote, so its cache lines look
wasted; but the reader wants them, and takes them from a cache sooner than from memory. Measured is the throughput of
the pair, two processes on two CPUs that copy through one ring with compiled loops and never sleep, when the writer,
the reader or both store past the caches; with a reader that reads what it got, and one that does not. The non-temporal
copy ends with a store fence before the cursor moves: a release store alone does not order such stores on x86-64.

The ring uses neither. Where this was measured (Zen 4, 1 MiB ring), messages of 64 KiB and 1 MiB were a quarter slower
with a writer that stores past the caches, and slower still with a reader that does; at 16 MiB, where both buffers have
left the caches anyhow, nothing was gained for the writer, and up to a fifth for the reader, who then finds none of the
message in its cache. Pieces of 16 to 512 KiB differed by less than the rounds did.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from harness import Figures, run, table
from llvmlite import ir

from ism.memory import Mapping, create_memfd
from ism.shm.atomics import load_acquire_u64, memcpy, pause, store_release_u64
from ism.shm.jit import cgutils, helper, intrinsic, kernel, numba_types

SIZES = (1 << 16, 1 << 20, 16 << 20)
PIECES = tuple(1 << bits for bits in range(14, 20))
PIECE = 128 << 10
RING = 1 << 20
_HEADER, _PRODUCER, _CONSUMER = 4096, 0, 128
_LANES, _UNROLLED = 4, 4
_CHUNK = 8 * _LANES * _UNROLLED


@intrinsic
def nontemporal_copy(typing_context: Any, destination: Any, source: Any, size: Any) -> Any:
    """Copy `size` bytes, a multiple of 128, to an address that is a multiple of 32, past the caches; then fence."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        word = ir.IntType(64)
        lanes = ir.VectorType(word, _LANES)
        mark = builder.module.add_metadata([ir.IntType(32)(1)])
        with cgutils.for_range(builder, builder.udiv(args[2], word(_CHUNK))) as loop:
            begin = builder.mul(loop.index, word(_CHUNK))
            values = []
            for step in range(_UNROLLED):
                at = builder.add(args[1], builder.add(begin, word(8 * _LANES * step)))
                value = builder.load(builder.inttoptr(at, lanes.as_pointer()))
                value.align = 1
                values.append(value)
            for step, value in enumerate(values):
                at = builder.add(args[0], builder.add(begin, word(8 * _LANES * step)))
                store = builder.store(value, builder.inttoptr(at, lanes.as_pointer()), align=8 * _LANES)
                store.set_metadata("nontemporal", mark)
        if builder.module.triple.startswith(("x86_64", "amd64")):
            fence = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse.sfence"
            )
            builder.call(fence, [])
        return context.get_dummy_value()

    return numba_types.void(numba_types.int64, numba_types.int64, numba_types.int64), codegen


@helper
def _copy(destination: int, source: int, size: int, nontemporal: int) -> None:
    if nontemporal != 0:
        nontemporal_copy(destination, source, size)
    else:
        memcpy(destination, source, size)


def push(region: int, cursor: int, source: int, size: int, piece: int, nontemporal: int) -> int:
    """Copy a message into the ring, piece by piece; the new cursor. The ring is a multiple of each piece."""
    end = cursor + size
    while cursor < end:
        count = min(end - cursor, piece)
        while RING - (cursor - load_acquire_u64(region + _CONSUMER)) < count:
            pause()
        _copy(region + _HEADER + cursor % RING, source, count, nontemporal)
        cursor += count
        source += count
        store_release_u64(region + _PRODUCER, cursor)
    return cursor


def pull(region: int, cursor: int, target: int, size: int, piece: int, nontemporal: int) -> int:
    """Copy a message out of the ring, piece by piece; the new cursor."""
    end = cursor + size
    while cursor < end:
        count = min(end - cursor, piece)
        while load_acquire_u64(region + _PRODUCER) - cursor < count:
            pause()
        _copy(target, region + _HEADER + cursor % RING, count, nontemporal)
        cursor += count
        target += count
        store_release_u64(region + _CONSUMER, cursor)
    return cursor


def read(address: int, size: int) -> int:
    """Read a message: what a program does with it at the least."""
    total = 0
    for at in range(address, address + size, 8):
        total += load_acquire_u64(at)
    return total


_SIX = numba_types.int64(*[numba_types.int64] * 6)
_TWO = numba_types.int64(numba_types.int64, numba_types.int64)


def _compiled(function: Callable[..., int], signature: Any) -> Callable[..., int]:
    dispatcher = kernel(function, cache=False)
    dispatcher.compile(signature)
    return dispatcher.get_overload(signature.args)  # type: ignore[no-any-return]


class Bench:
    """The compiled loops, the ring, and two CPUs."""

    def __init__(self, cpus: tuple[int, int]) -> None:
        self._push, self._pull = _compiled(push, _SIX), _compiled(pull, _SIX)
        self._read = _compiled(read, _TWO)
        self._cpus = cpus

    def throughput(
        self, size: int, total: int, *, piece: int = PIECE, writer: bool = False, reader: bool = False, reads: bool
    ) -> float:
        """GB/s of the pair, from the first byte sent to the last one received."""
        region = Mapping(_HEADER + RING)
        fd = create_memfd("bench", _HEADER + RING)
        region.place(0, region.length, fd, 0)
        rounds = max(2, total // size)
        child = os.fork()
        memory = np.ones(size // 8 + 16, np.int64)
        buffer = -(-memory.ctypes.data // 128) * 128
        cursor = 0
        if child == 0:
            status = 1
            try:
                os.sched_setaffinity(0, {self._cpus[1]})
                for _ in range(rounds):
                    cursor = self._pull(region.address, cursor, buffer, size, piece, reader)
                    if reads and self._read(buffer, size) != size // 8:
                        raise ValueError("other bytes came than were sent")
                status = 0
            finally:
                os._exit(status)
        os.sched_setaffinity(0, {self._cpus[0]})
        cursor = self._push(region.address, cursor, buffer, size, piece, writer)  # the reader is there, its pages too
        while load_acquire(region) < cursor:
            pass
        start = time.perf_counter()
        for _ in range(rounds - 1):
            cursor = self._push(region.address, cursor, buffer, size, piece, writer)
        _, status = os.waitpid(child, 0)
        took = time.perf_counter() - start
        os.close(fd)
        if status:
            raise SystemExit("the reader failed")
        return (rounds - 1) * size / took / 1e9


def load_acquire(region: Mapping) -> int:
    """The consumer cursor."""
    return int.from_bytes(region.view[_CONSUMER : _CONSUMER + 8], "little")


_WAYS = {"memcpy": (False, False), "writer": (True, False), "reader": (False, True), "both": (True, True)}


def _name(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def body(quick: bool) -> Figures:
    """Run the rounds and print the tables."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        print("needs two CPUs")
        return {"cpus": len(allowed)}
    bench = Bench((allowed[0], allowed[-1]))
    rounds, total = (1, 1 << 22) if quick else (15, 1 << 27)
    figures: Figures = {}
    try:
        for reads in (True, False):
            found: dict[tuple[int, str], list[float]] = {}
            for _ in range(rounds):
                for size in SIZES:
                    for way, (writer, reader) in _WAYS.items():
                        value = bench.throughput(size, total, writer=writer, reader=reader, reads=reads)
                        found.setdefault((size, way), []).append(value)
            _show(
                f"non-temporal stores, reader {'reads' if reads else 'does not read'} what it got, GB/s", found, figures
            )
        pieces: dict[tuple[int, str], list[float]] = {}
        for _ in range(rounds):
            for size in SIZES:
                for piece in PIECES:
                    value = bench.throughput(size, total, piece=min(piece, size), reads=True)
                    pieces.setdefault((size, _name(piece)), []).append(value)
        _show("memcpy in pieces of, GB/s", pieces, figures)
    finally:
        os.sched_setaffinity(0, allowed)
    return figures


def _show(title: str, found: dict[tuple[int, str], list[float]], figures: dict[str, Any]) -> None:
    ways = list(dict.fromkeys(way for _, way in found))
    rows = []
    for size in SIZES:
        values = [found[size, way] for way in ways]
        rows.append([_name(size), *(f"{statistics.median(v):.1f} ({min(v):.1f}..{max(v):.1f})" for v in values)])
    table(title, ("message", *ways), rows)
    figures[title] = {f"{_name(size)}, {way}": values for (size, way), values in found.items()}


if __name__ == "__main__":
    run(__doc__ or "", body)
