# SPDX-License-Identifier: Apache-2.0
"""How compiled kernels meet CPython and the C library: argument and result types, the GIL, the clock, the CPU number.

A kernel is called with the GIL held, takes a `RingState` (address of the endpoint's private words) and any object
with the buffer protocol (`ReadableBuffer`, `WritableBuffer`: no copy, no numpy array, released after the call), and
may return a Python object it made (`NewObject`). It lets other threads run only between `release_gil` and
`acquire_gil`, which it does for long copies and for spinning. Nothing here touches shared memory.

The type names carry a digest of the kernels' sources. Numba's on-disk cache notices a changed file only for the
file that holds the kernel itself; a changed header offset in another file would silently keep old machine code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.extending import models

from ism.shm.jit import attribute, boxes, cgutils, has_model, intrinsic, native_value, numba_types, unboxes

_I8P, _I32, _I64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
_KERNEL_SOURCES = ("atomics", "header", "interop", "jit", "kernels", "observe", "park", "ring", "state")
_PYBUF_SIMPLE, _PYBUF_WRITABLE = 0, 1
_PY_BUFFER_WORDS = 10
"""sizeof(Py_buffer) on 64-bit hosts, in words; word 0 is the address, word 2 the length in bytes."""
_CLOCK_MONOTONIC = 1
_CPU_MASK_WORDS = 128
"""Room for 8192 CPUs, as many as Linux can be built for."""


def _source_digest() -> str:
    digest = hashlib.sha256()
    for name in _KERNEL_SOURCES:
        digest.update(Path(__file__).with_name(name + ".py").read_bytes())
    return digest.hexdigest()[:16]


DIGEST = _source_digest()


class RingStateType(types.Type):
    """A Python int: address of an endpoint's private words. Attribute `address`."""

    def __init__(self) -> None:
        cast("Any", super()).__init__(name=f"ism.shm.RingState-{DIGEST}")


class BufferType(types.Type):
    """Any contiguous object with the buffer protocol. Attributes `address`, `length` (bytes)."""

    def __init__(self, writable: bool) -> None:
        self.writable = writable
        cast("Any", super()).__init__(name=f"ism.shm.{'Writable' if writable else 'Readable'}Buffer-{DIGEST}")


class NewObjectType(types.Type):
    """A strong reference to a Python object, or null with an exception set."""

    def __init__(self) -> None:
        cast("Any", super()).__init__(name=f"ism.shm.NewObject-{DIGEST}")


RingState: Any = cast("Any", RingStateType)()
ReadableBuffer: Any = cast("Any", BufferType)(writable=False)
WritableBuffer: Any = cast("Any", BufferType)(writable=True)
NewObject: Any = cast("Any", NewObjectType)()


@has_model(RingStateType)
class _RingStateModel(models.StructModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        cast("Any", super()).__init__(manager, kind, [("address", numba_types.int64)])


@has_model(BufferType)
class _BufferModel(models.StructModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        cast("Any", super()).__init__(manager, kind, [("address", numba_types.int64), ("length", numba_types.int64)])


has_model(NewObjectType)(models.OpaqueModel)
attribute(RingStateType, "address", "address")
attribute(BufferType, "address", "address")
attribute(BufferType, "length", "length")


def _c_function(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Value:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


@unboxes(RingStateType)
def _unbox_state(kind: RingStateType, obj: ir.Value, c: Any) -> Any:
    state = cgutils.create_struct_proxy(kind)(c.context, c.builder)
    state.address = c.pyapi.long_as_longlong(obj)
    return native_value(state._getvalue(), is_error=cgutils.is_not_null(c.builder, c.pyapi.err_occurred()))


@unboxes(BufferType)
def _unbox_buffer(kind: BufferType, obj: ir.Value, c: Any) -> Any:
    builder = c.builder
    buffer = cgutils.alloca_once(builder, ir.ArrayType(_I64, _PY_BUFFER_WORDS))
    opaque = builder.bitcast(buffer, _I8P)
    get = _c_function(builder, "PyObject_GetBuffer", _I32, c.pyapi.pyobj, _I8P, _I32)
    release = _c_function(builder, "PyBuffer_Release", ir.VoidType(), _I8P)
    wanted = _PYBUF_WRITABLE if kind.writable else _PYBUF_SIMPLE
    failed = cgutils.is_not_null(builder, builder.call(get, [obj, opaque, _I32(wanted)]))
    native = cgutils.create_struct_proxy(kind)(c.context, builder)
    with cgutils.if_likely(builder, builder.not_(failed)):
        native.address = builder.load(cgutils.gep_inbounds(builder, buffer, 0, 0))
        native.length = builder.load(cgutils.gep_inbounds(builder, buffer, 0, 2))

    def cleanup() -> None:
        builder.call(release, [opaque])

    return native_value(native._getvalue(), is_error=failed, cleanup=cleanup)


@boxes(NewObjectType)
def _box_object(kind: NewObjectType, value: ir.Value, c: Any) -> ir.Value:
    return c.builder.bitcast(value, c.pyapi.pyobj)


@intrinsic
def _new_bytes(typing_context: Any, length: Any) -> Any:
    """Make an uninitialised bytes object of `length` bytes; null with MemoryError set when there is no memory."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        make = _c_function(builder, "PyBytes_FromStringAndSize", _I8P, _I8P, _I64)
        return builder.call(make, [ir.Constant(_I8P, None), args[0]])

    return NewObject(numba_types.int64), codegen


@intrinsic
def _bytes_address(typing_context: Any, obj: Any) -> Any:
    """Address of the contents of a bytes object made by `new_bytes`, 0 for null."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        entry = builder.block
        with builder.if_then(cgutils.is_not_null(builder, args[0])):
            contents = _c_function(builder, "PyBytes_AsString", _I8P, _I8P)
            address = builder.ptrtoint(builder.call(contents, [args[0]]), _I64)
            made = builder.block
        result = builder.phi(_I64)
        result.add_incoming(_I64(0), entry)
        result.add_incoming(address, made)
        return result

    return numba_types.int64(NewObject), codegen


@intrinsic
def _none_object(typing_context: Any) -> Any:
    """A new reference to None."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        pyapi = context.get_python_api(builder)
        return builder.bitcast(pyapi.make_none(), _I8P)

    return NewObject(), codegen


@intrinsic
def _release_gil(typing_context: Any) -> Any:
    """Let other threads run; returns what `acquire_gil` needs. No Python object may be touched in between."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        save = _c_function(builder, "PyEval_SaveThread", _I8P)
        return builder.ptrtoint(builder.call(save, []), _I64)

    return numba_types.int64(), codegen


@intrinsic
def _acquire_gil(typing_context: Any, thread: Any) -> Any:
    """Wait until this thread may touch Python objects again."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        restore = _c_function(builder, "PyEval_RestoreThread", ir.VoidType(), _I8P)
        builder.call(restore, [builder.inttoptr(args[0], _I8P)])
        return context.get_dummy_value()

    return numba_types.void(numba_types.int64), codegen


@intrinsic
def _monotonic_ns(typing_context: Any) -> Any:
    """CLOCK_MONOTONIC in ns, through the C library: the cycle counter's name and rate differ between processors."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        timespec = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        clock = _c_function(builder, "clock_gettime", _I32, _I32, _I8P)
        builder.call(clock, [_I32(_CLOCK_MONOTONIC), builder.bitcast(timespec, _I8P)])
        seconds = builder.load(cgutils.gep_inbounds(builder, timespec, 0, 0))
        return builder.add(
            builder.mul(seconds, _I64(10**9)), builder.load(cgutils.gep_inbounds(builder, timespec, 0, 1))
        )

    return numba_types.int64(), codegen


@intrinsic
def _current_cpu(typing_context: Any) -> Any:
    """Number of the CPU this thread runs on, -1 when the kernel does not say."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return builder.sext(builder.call(_c_function(builder, "sched_getcpu", _I32), []), _I64)

    return numba_types.int64(), codegen


@intrinsic
def _allowed_cpus(typing_context: Any) -> Any:
    """How many CPUs this thread may use now, 0 when the kernel does not say."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        mask = cgutils.alloca_once(builder, ir.ArrayType(_I64, _CPU_MASK_WORDS))
        total = cgutils.alloca_once_value(builder, _I64(0))
        get = _c_function(builder, "sched_getaffinity", _I32, _I32, _I64, _I8P)
        failed = builder.call(get, [_I32(0), _I64(8 * _CPU_MASK_WORDS), builder.bitcast(mask, _I8P)])
        known = builder.icmp_signed("==", failed, _I32(0))
        with builder.if_then(known), cgutils.for_range(builder, _I64(_CPU_MASK_WORDS)) as loop:
            word = builder.load(cgutils.gep_inbounds(builder, mask, 0, loop.index))
            builder.store(builder.add(builder.load(total), builder.ctpop(word)), total)
        return builder.load(total)

    return numba_types.int64(), codegen


release_gil: Callable[[], int] = _release_gil
acquire_gil: Callable[[int], None] = _acquire_gil
monotonic_ns: Callable[[], int] = _monotonic_ns
current_cpu: Callable[[], int] = _current_cpu
allowed_cpus: Callable[[], int] = _allowed_cpus
bytes_address: Callable[[Any], int] = _bytes_address
new_bytes: Callable[[int], Any] = _new_bytes
none_object: Callable[[], Any] = _none_object
