# SPDX-License-Identifier: Apache-2.0
"""Rings in shared memory: one region per direction, compiled kernels, bounded spinning, sleep and wake.

Reading order: `header` (the page the peer writes), `state` (what only this side knows), `atomics`, `observe`
(validation), `park` (spin, sleep, wake), `ring` (copies), `endpoint` (the Python face). `interop` and `kernels` join
them to CPython and Numba. The argument for every ordering is in `docs/memory-order.md`. This is the only package that
imports Numba.
"""

from ism.shm.endpoint import MAX_SPIN_NS, Endpoint, Mapped, RxState, kernel_id
from ism.shm.header import HEADER_BYTES, Flags, Header
from ism.shm.kernels import compile_kernels

__all__ = [
    "Endpoint",
    "RxState",
    "Flags",
    "Mapped",
    "Header",
    "HEADER_BYTES",
    "MAX_SPIN_NS",
    "compile_kernels",
    "kernel_id",
]
