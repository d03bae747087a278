# SPDX-License-Identifier: Apache-2.0
"""Ordered memory access on integer addresses: the only place of this package that emits fences or atomic accesses.

Each operation is declared once as a function that emits LLVM IR. The kernels get it as a Numba intrinsic; the very
same emitter can be compiled for any target (`assembly`), which is how the tests prove for x86-64 and for arm64 that
acquire, release and the full fence become the instructions that `docs/memory-order.md` relies on. Nothing here knows
the header or the ring, and nothing here validates: an address that is not mapped kills the process.

Loads and stores are single instructions of their width on naturally aligned addresses (LLVM LangRef, "Atomic Memory
Ordering Constraints"); a misaligned address is a bug of the caller.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import llvmlite.binding as llvm
from llvmlite import ir

from ism.shm.jit import intrinsic, numba_types

if sys.byteorder != "little" or sys.maxsize < 2**32:
    raise ImportError(
        f"ism.shm needs a 64-bit little-endian processor (x86-64 or arm64), this is {platform.machine()}: "
        "use plain TCP sockets here"
    )

_I8, _I32, _I64, _VOID = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.VoidType()

Emitter = Callable[[ir.IRBuilder, Sequence[ir.Value]], ir.Value | None]
Load = Callable[[int], int]
Store = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One ordered access: every argument and the result are 64-bit integers; `emit` writes its IR."""

    name: str
    arguments: tuple[str, ...]
    returns: bool
    emit: Emitter


OPERATIONS: list[Operation] = []


def _pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type = _I8) -> ir.Value:
    return builder.inttoptr(address, kind.as_pointer())


def _load(kind: ir.IntType, ordering: str) -> Emitter:
    def emit(builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        value = builder.load_atomic(_pointer(builder, args[0], kind), ordering, kind.width // 8)
        return value if kind.width == 64 else builder.zext(value, _I64)

    return emit


def _store(kind: ir.IntType, ordering: str) -> Emitter:
    def emit(builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        value = args[1] if kind.width == 64 else builder.trunc(args[1], kind)
        builder.store_atomic(value, _pointer(builder, args[0], kind), ordering, kind.width // 8)

    return emit


def _fence(builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    builder.fence("seq_cst")


def _pause(builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    """Emit the spin hint as an LLVM intrinsic; inline assembly would abort without an initialised parser.

    On arm64 `yield` retires at once on the cores in use; `isb` delays by tens of nanoseconds as x86's `pause` does.
    """
    machine = builder.module.triple.partition("-")[0] or platform.machine()
    if machine in {"aarch64", "arm64"}:
        barrier = _declare(builder, "llvm.aarch64.isb", _VOID, [_I32])
        builder.call(barrier, [_I32(15)])
    elif machine in {"x86_64", "amd64", "AMD64"}:
        builder.call(_declare(builder, "llvm.x86.sse2.pause", _VOID, []), [])


def _exchange(builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
    result = builder.cmpxchg(_pointer(builder, args[0], _I64), args[1], args[2], "seq_cst", "seq_cst")
    return builder.extract_value(result, 0)


def _memcpy(builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    function = _declare(builder, "memcpy", _I8.as_pointer(), [_I8.as_pointer(), _I8.as_pointer(), _I64])
    builder.call(function, [_pointer(builder, args[0]), _pointer(builder, args[1]), args[2]])


def _declare(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Value:
    existing = builder.module.globals.get(name)
    return existing or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _operation(name: str, arguments: tuple[str, ...], *, returns: bool, emit: Emitter) -> Any:
    """Register the operation and return its Numba intrinsic."""
    operation = Operation(name, arguments, returns, emit)
    OPERATIONS.append(operation)
    result = numba_types.int64 if returns else numba_types.void

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        value = emit(builder, args)
        return context.get_dummy_value() if value is None else value

    # Numba matches an intrinsic by its parameter list, so each arity needs a function of its own.
    if len(arguments) == 0:

        def typed(typing_context: Any) -> Any:
            return result(), codegen
    elif len(arguments) == 1:

        def typed(typing_context: Any, a: Any) -> Any:  # type: ignore[misc]
            return result(numba_types.int64), codegen
    elif len(arguments) == 2:

        def typed(typing_context: Any, a: Any, b: Any) -> Any:  # type: ignore[misc]
            return result(numba_types.int64, numba_types.int64), codegen
    else:

        def typed(typing_context: Any, a: Any, b: Any, c: Any) -> Any:  # type: ignore[misc]
            return result(numba_types.int64, numba_types.int64, numba_types.int64), codegen

    typed.__name__ = typed.__qualname__ = name
    return intrinsic(typed)


def _load_operation(name: str, kind: ir.IntType, ordering: str) -> Load:
    return cast("Load", _operation(name, ("address",), returns=True, emit=_load(kind, ordering)))


def _store_operation(name: str, kind: ir.IntType, ordering: str) -> Store:
    return cast("Store", _operation(name, ("address", "value"), returns=False, emit=_store(kind, ordering)))


load_acquire_u64 = _load_operation("load_acquire_u64", _I64, "acquire")
load_acquire_u32 = _load_operation("load_acquire_u32", _I32, "acquire")
load_relaxed_u64 = _load_operation("load_relaxed_u64", _I64, "monotonic")
load_relaxed_u32 = _load_operation("load_relaxed_u32", _I32, "monotonic")
store_release_u64 = _store_operation("store_release_u64", _I64, "release")
store_release_u32 = _store_operation("store_release_u32", _I32, "release")
store_relaxed_u32 = _store_operation("store_relaxed_u32", _I32, "monotonic")
fence: Callable[[], None] = _operation("fence", (), returns=False, emit=_fence)
compare_exchange_u64: Callable[[int, int, int], int] = _operation(
    "compare_exchange_u64", ("address", "expected", "desired"), returns=True, emit=_exchange
)
pause: Callable[[], None] = _operation("pause", (), returns=False, emit=_pause)
memcpy: Callable[[int, int, int], None] = _operation(
    "memcpy", ("destination", "source", "bytes"), returns=False, emit=_memcpy
)


def assembly(triple: str) -> dict[str, list[str]]:
    """Compile every operation for `triple` and return its instructions.

    Args:
        triple: LLVM target triple, for instance "aarch64-unknown-linux-gnu"; need not be this machine's.

    Returns:
        Instructions without directives, by operation name.

    Raises:
        OSError, RuntimeError: this LLVM build has no back end for the triple.
    """
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(opt=3, reloc="pic")
    module = ir.Module("atomics")
    module.triple = triple
    for operation in OPERATIONS:
        kind = ir.FunctionType(_I64 if operation.returns else _VOID, [_I64] * len(operation.arguments))
        function = ir.Function(module, kind, "op." + operation.name)
        builder = ir.IRBuilder(function.append_basic_block())
        value = operation.emit(builder, function.args)
        if operation.returns:
            builder.ret(value)
        else:
            builder.ret_void()
    text = machine.emit_assembly(llvm.parse_assembly(str(module)))
    listing: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        code = line.partition("//")[0].partition("# ")[0].rstrip()
        label = code.strip('":')
        if label.startswith("op."):
            current = listing.setdefault(label.removeprefix("op."), [])
        elif code.startswith("\t") and not code.startswith("\t."):
            current.append(" ".join(code.split()))
    return listing
