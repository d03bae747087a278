# SPDX-License-Identifier: Apache-2.0
"""How far apart two CPUs are at this moment, and how fast each of them is.

The machine underneath may move virtual CPUs about, and let others run on the other half of their cores; all figures go
with that. So it is looked at before each sample. A word goes to the other CPU and back, through a cache line each way:
both ends spin, in compiled code, and give up after a bounded number of looks. Then each end counts in plain Python.
"""

from __future__ import annotations

import time
from typing import Any, Final

from ism.memory import PAGE_SIZE, Mapping
from ism.shm.atomics import load_acquire_u64, store_release_u64
from ism.shm.jit import kernel

ROUNDS: Final = 2000
_HELLO: Final = 1
_LOOKS: Final = 3_000_000
"""Before giving up: some milliseconds. Two ends on one CPU would take as long for each round."""
_FAR_LINE: Final = 128


def _bounce(mine: int, theirs: int, base: int, rounds: int, leads: int, looks: int) -> int:
    """Play `rounds` rounds, with so many looks in all; how many went well."""
    left = looks
    for number in range(rounds):
        wanted = base + number + 1
        if leads:
            store_release_u64(mine, wanted)
        while load_acquire_u64(theirs) != wanted:
            left -= 1
            if left == 0:
                return number
        if not leads:
            store_release_u64(mine, wanted)
    return rounds


_COUNTS: Final = 10_000
_TRIES: Final = 5


def count_s() -> float:
    """Return the seconds that one turn of a small loop in Python takes on this CPU now, the best of a few tries."""
    best_s = float("inf")
    for _ in range(_TRIES):
        began_s = time.perf_counter()
        number = 0
        for turn in range(_COUNTS):
            number += turn & 7
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s / _COUNTS


_kernel: Any = None


def _compiled() -> Any:
    global _kernel  # noqa: PLW0603 (compiled once a process, when first needed)
    if _kernel is None:
        try:
            _kernel = kernel(_bounce, cache=True)
        except RuntimeError:
            _kernel = kernel(_bounce, cache=False)
    return _kernel


class Probe:
    """One end. The shared page comes from a memory file that both ends have."""

    def __init__(self, fd: int, *, near: bool) -> None:
        """Map the page and compile. Raises OSError."""
        self._mapping = Mapping(PAGE_SIZE)
        self._mapping.place(0, PAGE_SIZE, fd, 0)
        here, there = self._mapping.address, self._mapping.address + _FAR_LINE
        self._mine, self._theirs = (here, there) if near else (there, here)
        self._near, self._base = near, 0
        _compiled()(self._mine, self._theirs, 0, 0, 1, 1)

    def run(self) -> float | None:
        """Play with the other end, which must do so now too. Returns seconds a round trip; None: it was not there."""
        bounce, leads = _compiled(), int(self._near)
        base, self._base = self._base, self._base + _HELLO + ROUNDS
        met = any(bounce(self._mine, self._theirs, base, _HELLO, leads, _LOOKS) for _ in range(20))
        if not met:
            return None
        began_s = time.perf_counter()
        done = bounce(self._mine, self._theirs, base + _HELLO, ROUNDS, leads, _LOOKS)
        took_s = time.perf_counter() - began_s
        return took_s / ROUNDS if done == ROUNDS else None
