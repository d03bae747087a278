# SPDX-License-Identifier: Apache-2.0
"""Which instructions are the ordered accesses, and what does calling a kernel from Python cost?

First the machine code of every operation of `ism.shm.atomics` for x86-64 and arm64, with what was looked for; the code
generator for the other processor is part of every llvmlite, so both show on either. Then the cost of one call of an
otherwise empty kernel by the kinds of its arguments and by the way it is called, which decides how kernels take theirs.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import run
from numba import njit, types

from ism.perf import plots
from ism.shm import Endpoint, compile_kernels
from ism.shm.atomics import assembly, fence
from ism.shm.interop import ReadableBuffer, acquire_gil, current_cpu, monotonic_ns, release_gil

TARGETS = {"x86-64": "x86_64-unknown-linux-gnu", "arm64": "aarch64-unknown-linux-gnu"}
WANTED = {
    ("load_acquire_u64", "x86-64"): ("mov",),
    ("load_acquire_u64", "arm64"): ("ldar",),
    ("store_release_u64", "x86-64"): ("mov",),
    ("store_release_u64", "arm64"): ("stlr",),
    ("fence", "x86-64"): ("mfence", "lock"),
    ("fence", "arm64"): ("dmb ish",),
    ("pause", "x86-64"): ("pause",),
    ("pause", "arm64"): ("isb", "yield"),
}


def instructions() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for target, triple in TARGETS.items():
        for name, lines in assembly(triple).items():
            wanted = WANTED.get((name, target))
            holds = wanted is None or any(line.startswith(word) for word in wanted for line in lines)
            found.setdefault(name, {})[target] = lines
            verdict = "" if wanted is None else ("found " if holds else "MISSING ") + " or ".join(wanted)
            print(f"{name:18} {target:7} {'; '.join(lines):60.60} {verdict}")
    return found


def cost_ns(call: Callable[..., object], *arguments: object, rounds: int) -> float:
    """Best of five loops, loop overhead included."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(rounds):
            call(*arguments)
        best = min(best, (time.perf_counter() - start) / rounds)
    return best * 1e9


def one(a: int) -> int:
    return a


def four(a: int, b: int, c: int, d: int) -> int:
    return a + b + c + d


def array_length(a: int, b: Any) -> int:
    return a + len(b)


def buffer_length(a: int, b: Any) -> int:
    return a + b.length


def fenced(a: int) -> int:
    fence()
    return a


def without_gil(a: int) -> int:
    acquire_gil(release_gil())
    return a


def clock(a: int) -> int:
    return monotonic_ns()


def cpu(a: int) -> int:
    return current_cpu()


def calls(rounds: int) -> dict[str, float]:
    word, big = types.int64, 1 << 46
    data = bytes(64)
    compiled: dict[Callable[..., int], tuple[Any, Any]] = {}
    for function, arguments in (
        (one, (word,)),
        (four, (word,) * 4),
        (buffer_length, (word, ReadableBuffer)),
        (fenced, (word,)),
        (without_gil, (word,)),
        (clock, (word,)),
        (cpu, (word,)),
    ):
        dispatcher = njit(function)
        dispatcher.compile(arguments)
        compiled[function] = dispatcher, dispatcher.get_overload(arguments)
    arrays = njit(array_length)
    array = np.zeros(64, np.uint8)
    arrays(big, array)
    arrays(big, data)
    through_ctypes = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(("labs", ctypes.CDLL(None)))
    dispatcher_of = {function: pair[0] for function, pair in compiled.items()}
    overload_of = {function: pair[1] for function, pair in compiled.items()}
    rows: dict[str, tuple[Any, ...]] = {
        "Python function, 1 int": (one, big),
        "dispatcher, 1 int": (dispatcher_of[one], big),
        "dispatcher, 4 ints": (dispatcher_of[four], big, 1, 2, 3),
        "dispatcher, int and array": (arrays, big, array),
        "dispatcher, int and bytes": (arrays, big, data),
        "overload, 1 int": (overload_of[one], big),
        "overload, 4 ints": (overload_of[four], big, 1, 2, 3),
        "overload, int and any buffer": (overload_of[buffer_length], big, data),
        "the same, memoryview": (overload_of[buffer_length], big, memoryview(data)),
        "overload, 1 int, fence": (overload_of[fenced], big),
        "overload, 1 int, GIL given up": (overload_of[without_gil], big),
        "overload, 1 int, clock": (overload_of[clock], big),
        "overload, 1 int, CPU number": (overload_of[cpu], big),
        "ctypes call, 1 int": (through_ctypes, big),
    }
    costs = {name: cost_ns(*row, rounds=rounds) for name, row in rows.items()}
    costs.update(endpoint_calls(rounds))
    for name, cost in costs.items():
        print(f"{name:32} {cost:7.0f} ns")
    return costs


def endpoint_calls(rounds: int) -> dict[str, float]:
    """The same for whole endpoint calls, one thread playing both ends."""
    memory = [np.zeros((4096 + 65536) // 8 + 16, np.int64) for _ in range(2)]

    class Region:
        def __init__(self, array: Any) -> None:
            self.array, self.length = array, 4096 + 65536
            self.address = -(-array.ctypes.data // 128) * 128

    first, second = (Region(array) for array in memory)
    a = Endpoint(first, second, doorbell=lambda: None, max_spin_ns=0)
    b = Endpoint(second, first, doorbell=lambda: None, max_spin_ns=0)
    data, buffer = bytes(64), bytearray(64)

    def copy() -> None:
        a.send(data)
        b.recv(64)

    def copy_into() -> None:
        a.send(data)
        b.recv_into(buffer)

    return {
        "Endpoint.send + recv, 64 B": cost_ns(copy, rounds=rounds),
        "Endpoint.send + recv_into, 64 B": cost_ns(copy_into, rounds=rounds),
        "Endpoint.recv, nothing there": cost_ns(b.recv, 64, rounds=rounds),
    }


def body(quick: bool) -> dict[str, Any]:
    """Print instructions and costs."""
    compile_kernels(print)
    return {"instructions": instructions(), "call_ns": calls(1_000 if quick else 200_000)}


def chart(figures: dict[str, Any], path: str) -> None:
    """The costs of a call."""
    plots.bar_chart(path, "One call of a kernel from Python", "nanoseconds", "", {"call": figures["call_ns"]})


if __name__ == "__main__":
    run(__doc__ or "", body, chart)
