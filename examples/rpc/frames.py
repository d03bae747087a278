# SPDX-License-Identifier: Apache-2.0
"""Messages and arrays on a trio stream.

A frame is four bytes of length, that many bytes of one message, then the bytes of the arrays that the message lists,
in that order. Array bytes go from the array's own memory to the stream, and from there into the memory of a new array.

The peer is hostile: every length is compared with this side's limits before memory is set aside for it. Whatever a peer
sends gives a message or a ProtocolError.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn, TypeVar

import msgspec
import numpy as np
import trio
from messages import (
    DTYPES,
    HELLO_BYTES,
    VERSION,
    Array,
    ArrayHead,
    Call,
    Cancel,
    ConnectionLostError,
    Failure,
    Hello,
    Limits,
    ProtocolError,
    Result,
    TooLargeError,
)

_LENGTH = struct.Struct("<I")
_READ_AHEAD = 4096
_BATCH = 65536

M = TypeVar("M")


@dataclasses.dataclass(eq=False)
class Frame:
    """A message ready to be sent: its head, then each array's memory."""

    head: bytes
    arrays: list[Array]


def pack(message: Hello | Call | Cancel | Result | Failure, arrays: list[Array], accepted: Limits) -> Frame:
    """Make a frame of a message. Raises TooLargeError when the peer does not accept it."""
    if arrays:
        if len(arrays) > accepted.arrays:
            raise TooLargeError(f"{len(arrays)} arrays in one message, the peer accepts {accepted.arrays}")
        if (size := sum(array.nbytes for array in arrays)) > accepted.array_bytes:
            raise TooLargeError(f"arrays of {size} bytes in one message, the peer accepts {accepted.array_bytes}")
        heads = [ArrayHead(array.dtype.str, array.shape, array.nbytes) for array in arrays]
        message = msgspec.structs.replace(message, arrays=heads)
    header = msgspec.msgpack.encode(message)
    if len(header) > accepted.header_bytes:
        raise TooLargeError(f"a message of {len(header)} bytes, the peer accepts {accepted.header_bytes}")
    return Frame(_LENGTH.pack(len(header)) + header, arrays)


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


class Frames:
    """The frames of one stream: a queue of those to send, and those that come, one by one.

    Attributes: `limits` (what this side accepts), `accepted` (what the peer does, known after its hello).
    """

    def __init__(self, stream: trio.abc.Stream, limits: Limits) -> None:
        self.limits, self.accepted = limits, Limits()
        self._stream = stream
        self._queue: collections.deque[Frame] = collections.deque()
        self._idle = trio.lowlevel.ParkingLot()
        self._buffer = bytearray()
        into: Callable[[memoryview], Awaitable[int]] | None = getattr(stream, "receive_some_into", None)
        self._receive_into = into or self._receive_and_copy

    async def greet(self, service: str, *, first: bool, within_s: float) -> None:
        """Exchange hellos, so that both sides know they speak of the same service. One side is first."""
        hello = pack(Hello(VERSION, service, self.limits), [], Limits())
        theirs = None
        with trio.move_on_after(within_s) as scope:
            if first:
                await self._send(hello.head)
            theirs = await self.receive(msgspec.msgpack.Decoder(Hello), HELLO_BYTES)
            if theirs is None:
                raise ConnectionLostError("the peer closed the connection before it said hello")
            if not first:
                await self._send(hello.head)  # before it is judged: so both sides can say what is wrong
        if scope.cancelled_caught or theirs is None:
            raise ProtocolError(f"no hello within {within_s} s")
        if theirs[0].version != VERSION:
            raise ProtocolError(f"the peer speaks version {theirs[0].version}, this side {VERSION}")
        if theirs[0].service != service:
            raise ProtocolError(f"the peer speaks of service {theirs[0].service[:100]!r}, this side of {service!r}")
        self.accepted = theirs[0].limits

    @property
    def waiting(self) -> int:
        """How many frames wait to be sent."""
        return len(self._queue)

    def put(self, frame: Frame) -> None:
        """Send a frame after those put before. Its arrays must not change until the call is over."""
        self._queue.append(frame)
        self._idle.unpark()

    def withdraw(self, frame: Frame) -> bool:
        """Do not send this frame, if it is not under way yet; returns whether that is so."""
        try:
            self._queue.remove(frame)
        except ValueError:
            return False
        return True

    async def send_forever(self) -> NoReturn:
        """Send what is put, small frames together. Raises ConnectionLostError. Cancellation: close the stream."""
        while True:
            while not self._queue:
                await self._idle.park()
            for piece in self._next_batch():
                await self._send(piece)

    def _next_batch(self) -> Iterator[bytearray | memoryview]:
        """Take frames out of the queue, up to the first with arrays, and give what is to be sent of them."""
        batch, arrays = bytearray(), list[Array]()
        while self._queue and not arrays and len(batch) < _BATCH:
            frame = self._queue.popleft()
            batch += frame.head
            arrays = frame.arrays
        yield batch
        yield from (_bytes_of(array) for array in arrays if array.nbytes)

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise ConnectionLostError(f"the connection is lost: {exc}") from exc

    async def receive(
        self, decoder: msgspec.msgpack.Decoder[M], header_bytes: int | None = None
    ) -> tuple[M, list[Array]] | None:
        """Return the next message and its arrays, None at the end of the stream.

        Raises: ProtocolError, ConnectionLostError. Cancellation: only before the first byte of a frame.
        """
        if not await self._fill(_LENGTH.size):
            return None
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        if length > (header_bytes or self.limits.header_bytes):
            raise ProtocolError(f"the peer announced a message of {length} bytes, more than this side accepts")
        if not await self._fill(length):
            raise ConnectionLostError("the connection ended in the middle of a message")
        try:
            message = decoder.decode(self._take(length))
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise ProtocolError(f"the peer sent a message that is none: {exc}") from exc
        heads: list[ArrayHead] = getattr(message, "arrays", [])
        return message, [await self._receive_array(*each) for each in self._check(heads)]

    def _check(self, heads: list[ArrayHead]) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
        """Return dtype and shape of each array. Nothing is allocated before all are known to be right."""
        if len(heads) > self.limits.arrays:
            raise ProtocolError(f"the peer announced {len(heads)} arrays, more than this side accepts")
        checked = []
        for head in heads:
            dtype = DTYPES.get(head.dtype)
            if dtype is None:
                raise ProtocolError(f"the peer announced an array of dtype {head.dtype[:100]!r}")
            if dtype.itemsize * math.prod(max(length, 1) for length in head.shape) > self.limits.array_bytes:
                raise ProtocolError("the peer announced an array of a shape larger than this side accepts")
            if dtype.itemsize * math.prod(head.shape) != head.nbytes:
                raise ProtocolError("the peer announced an array whose shape and bytes disagree")
            checked.append((dtype, head.shape))
        if sum(head.nbytes for head in heads) > self.limits.array_bytes:
            raise ProtocolError("the peer announced arrays larger than this side accepts")
        return checked

    async def _receive_array(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        try:
            array = np.empty(shape, dtype)
        except MemoryError as exc:
            raise ProtocolError(f"no memory for an array of the peer: {exc}") from exc
        if array.nbytes:
            view = _bytes_of(array)
            ahead = self._take(min(len(view), len(self._buffer)))
            view[: len(ahead)] = ahead
            view = view[len(ahead) :]
            while view:
                try:
                    count = await self._receive_into(view)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                    raise ConnectionLostError(f"the connection is lost: {exc}") from exc
                if not count:
                    raise ConnectionLostError("the connection ended in the middle of an array")
                view = view[count:]
        return array

    async def _receive_and_copy(self, view: memoryview) -> int:
        data = await self._stream.receive_some(min(len(view), 1 << 20))
        view[: len(data)] = data
        return len(data)

    async def _fill(self, count: int) -> bool:
        """Have `count` bytes in the buffer; False when the stream ends before the first of them."""
        while len(self._buffer) < count:
            try:
                # little ahead: the array that may follow is to be received in its own memory
                data = await self._stream.receive_some(max(_READ_AHEAD, count - len(self._buffer)))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise ConnectionLostError(f"the connection is lost: {exc}") from exc
            if not data and not self._buffer:
                return False
            if not data:
                raise ConnectionLostError("the connection ended in the middle of a message")
            self._buffer += data
        return True

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken
