# SPDX-License-Identifier: Apache-2.0
"""The instructions behind each ordered access, on both processor families, and that they do what they say here."""

from __future__ import annotations

import ctypes

import pytest
from numba import njit

from ism.shm import atomics

ARM64, X86_64 = "aarch64-unknown-linux-gnu", "x86_64-unknown-linux-gnu"


def instructions(triple: str, name: str) -> list[str]:
    return [line.split()[0] for line in atomics.assembly(triple)[name]]


def test_every_operation_compiles_for_both_processors() -> None:
    names = {operation.name for operation in atomics.OPERATIONS}
    assert set(atomics.assembly(ARM64)) == set(atomics.assembly(X86_64)) == names


@pytest.mark.parametrize("width", ["u32", "u64"])
def test_arm64_acquires_with_ldar_and_releases_with_stlr(width: str) -> None:
    assert instructions(ARM64, f"load_acquire_{width}") == ["ldar", "ret"]
    assert instructions(ARM64, f"store_release_{width}") == ["stlr", "ret"]
    register = {"u32": "w0", "u64": "x0"}[width]
    assert atomics.assembly(ARM64)[f"load_acquire_{width}"][0].split()[1] == register + ","


def test_the_full_fence_is_dmb_ish_on_arm64() -> None:
    assert atomics.assembly(ARM64)["fence"] == ["dmb ish", "ret"]


def test_the_full_fence_is_mfence_or_a_locked_instruction_on_x86() -> None:
    first = instructions(X86_64, "fence")[0]
    assert first in {"mfence", "lock"}


@pytest.mark.parametrize(("width", "move"), [("u32", "movl"), ("u64", "movq")])
def test_x86_loads_and_stores_are_one_plain_move(width: str, move: str) -> None:
    assert instructions(X86_64, f"load_acquire_{width}") == [move, "retq"]
    assert instructions(X86_64, f"store_release_{width}") == [move, "retq"]


def test_the_spin_hint_needs_no_inline_assembly() -> None:
    assert instructions(X86_64, "pause")[0] == "pause"
    assert instructions(ARM64, "pause")[0] == "isb"


def test_operations_read_and_write_exactly_their_width() -> None:
    @njit
    def poke(address: int) -> int:
        atomics.store_release_u32(address, -1)
        atomics.store_release_u64(address + 8, -2)
        atomics.store_relaxed_u32(address + 20, 7)
        atomics.fence()
        atomics.pause()
        atomics.memcpy(address + 24, address + 8, 8)
        return (
            atomics.load_acquire_u32(address)
            + atomics.load_relaxed_u32(address + 4)
            + atomics.load_acquire_u64(address + 8)
            + atomics.load_relaxed_u64(address + 16)
        )

    words = (ctypes.c_uint64 * 4)()
    total = poke(ctypes.addressof(words))
    assert list(words) == [2**32 - 1, 2**64 - 2, 7 << 32, 2**64 - 2]
    assert total == (2**32 - 1) + 0 - 2 + (7 << 32)


def test_the_fence_is_in_the_machine_code_numba_makes_here() -> None:
    @njit("int64(int64)")
    def fenced(value: int) -> int:
        atomics.fence()
        return value

    (text,) = fenced.inspect_asm().values()
    assert any(word in text for word in ("mfence", "lock\t\torl", "lock orl", "dmb\tish"))
