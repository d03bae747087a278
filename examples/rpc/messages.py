# SPDX-License-Identifier: Apache-2.0
"""What the two ends of an RPC connection say to each other: errors, limits, messages, and values with arrays in them.

Everything is msgpack, from and to the types below. Where a value contains an array, its msgpack has an extension with
the array's number: the array itself travels behind the message (`frames`).
"""

from __future__ import annotations

import struct
import typing
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Raw, Struct
from numpy.typing import NDArray

VERSION = 1
HELLO_BYTES = 4096
SMALLEST_HEADER = 16384
"""Every peer must accept messages of this size: a failure always fits."""

ARRAY_EXTENSION = 1
_NUMBER = struct.Struct("<I")

_SCALARS: tuple[type[np.generic], ...] = (
    *(np.bool_, np.float16, np.float32, np.float64, np.complex64, np.complex128),
    *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
)
DTYPES = {dtype.str: dtype for scalar in _SCALARS for dtype in (np.dtype(scalar), np.dtype(scalar).newbyteorder())}
"""The arrays that travel, by the name that travels: a name that is not here is refused, none is ever parsed."""

Array = NDArray[Any]


class RpcError(Exception):
    """Whatever goes wrong with a call or a connection."""


class ConnectionLostError(RpcError):
    """The connection ended, or was closed here. Whether the server has run the call is not known."""


class ProtocolError(RpcError):
    """The peer sent what it must not."""


class TooLargeError(RpcError):
    """A message or its arrays are larger than the other side accepts; nothing was sent."""


class Limits(Struct, frozen=True):
    """What one side accepts in one connection. At worst it holds about `calls` times `array_bytes`."""

    header_bytes: Annotated[int, Meta(ge=SMALLEST_HEADER, le=2**32 - 1)] = 1 << 20
    array_bytes: Annotated[int, Meta(ge=0)] = 64 << 20  # all arrays of one message together
    arrays: Annotated[int, Meta(ge=0)] = 16
    calls: Annotated[int, Meta(ge=1)] = 32  # a call is in flight until its answer has come, also when cancelled


class ArrayHead(Struct, array_like=True):
    """One array behind a message."""

    dtype: str
    shape: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=32)]
    nbytes: Annotated[int, Meta(ge=0)]


class Hello(Struct, tag="ism-rpc"):
    """First message of either side. Fields may be added in later versions, so it is a map."""

    version: int
    service: str
    limits: Limits


class Call(Struct, tag="call", array_like=True):
    """Client to server. `arguments` is a map by name."""

    number: Annotated[int, Meta(ge=0)]
    method: str
    arguments: Raw
    arrays: list[ArrayHead] = []


class Cancel(Struct, tag="cancel", array_like=True):
    """Client to server: nobody waits for this call any more. It is answered all the same."""

    number: Annotated[int, Meta(ge=0)]


class Result(Struct, tag="result", array_like=True):
    """Server to client."""

    number: Annotated[int, Meta(ge=0)]
    value: Raw
    arrays: list[ArrayHead] = []


class Failure(Struct, tag="failure", array_like=True):
    """Server to client: the name of the exception's type, its message, and data if it has any."""

    number: Annotated[int, Meta(ge=0)]
    kind: str
    message: str
    data: Raw
    arrays: list[ArrayHead] = []


# -- values ---------------------------------------------------------------------------------------------------------


def encode(value: object) -> tuple[Raw, list[Array]]:
    """Return msgpack of a value, and the arrays in it, C-contiguous (copied if they were not).

    Raises: TypeError, ValueError and others of msgspec for what cannot be sent.
    """
    arrays: list[Array] = []

    def hook(item: object) -> object:
        if isinstance(item, np.generic):
            return item.item()
        if not isinstance(item, np.ndarray) or isinstance(item, np.ma.MaskedArray):
            raise TypeError(f"cannot send a {type(item).__name__}")
        if item.dtype.str not in DTYPES:
            raise TypeError(f"cannot send an array of dtype {item.dtype}")
        arrays.append(item if item.flags.c_contiguous else item.copy(order="C"))
        return msgspec.msgpack.Ext(ARRAY_EXTENSION, _NUMBER.pack(len(arrays) - 1))

    return Raw(msgspec.msgpack.encode(value, enc_hook=hook)), arrays


def decode(raw: Raw, kind: Any, arrays: list[Array]) -> Any:
    """Return the value of type `kind` that msgpack and arrays make.

    Raises: msgspec.ValidationError, and anything else (ValueError, IndexError, RecursionError, ...) for bad input.
    """

    def extension(code: int, data: memoryview) -> Array:
        if code != ARRAY_EXTENSION or len(data) != _NUMBER.size:
            raise ValueError(f"extension {code} of {len(data)} bytes is none of this protocol")
        number: int = _NUMBER.unpack(data)[0]
        if number >= len(arrays):
            raise ValueError(f"array {number} is missing")
        return arrays[number]

    return msgspec.msgpack.decode(raw, type=kind, ext_hook=extension, dec_hook=_check_custom)


def _check_custom(kind: Any, value: object) -> object:
    """Check an array's dtype against `NDArray[scalar]`; msgspec itself checks that it is an array."""
    if typing.get_origin(kind) is np.ndarray and isinstance(value, np.ndarray):
        (scalar,) = typing.get_args(typing.get_args(kind)[1]) or (Any,)
        wanted = [each for each in typing.get_args(scalar) or (scalar,) if issubclass(each, np.generic)]
        if wanted and not issubclass(value.dtype.type, tuple(wanted)):
            raise ValueError(f"Expected array of `{' | '.join(each.__name__ for each in wanted)}`, got `{value.dtype}`")
    return value
