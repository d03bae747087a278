# SPDX-License-Identifier: Apache-2.0
"""Workloads over a trio stream: ping-pong for latency, a one-way stream for throughput.

The client side decides and measures; the server side (`serve`) does what the client asks. Throughput ends at the
receiver's acknowledgement of the last byte, never at the sender's last write. Nothing here knows which transport the
stream has.
"""

from __future__ import annotations

import statistics
import struct
import time
from dataclasses import dataclass

import trio

_REQUEST = struct.Struct("<BxxxIQ")
_PING, _SINK = 1, 2
_MAX_SIZE = 1 << 26


async def receive_exactly(stream: trio.abc.ReceiveStream, count: int) -> bytearray:
    """Receive `count` bytes. Raises EOFError when the stream ends before."""
    data = bytearray()
    while len(data) < count:
        part = await stream.receive_some(count - len(data))
        if not part:
            raise EOFError(f"the stream ended after {len(data)} of {count} bytes")
        data += part
    return data


async def serve(stream: trio.abc.Stream) -> None:
    """Answer measurement requests until the client closes. Raises EOFError, ValueError on a broken request."""
    async with stream:
        while True:
            first = await stream.receive_some(1)
            if not first:
                return
            head = bytes(first) + bytes(await receive_exactly(stream, _REQUEST.size - 1))
            kind, size, count = _REQUEST.unpack(head)
            if not 1 <= size <= _MAX_SIZE:
                raise ValueError(f"message size {size} is not between 1 and {_MAX_SIZE}")
            if kind == _PING:
                for _ in range(count):
                    await stream.send_all(await receive_exactly(stream, size))
            elif kind == _SINK:
                left = size * count
                while left:
                    part = await stream.receive_some(min(left, 1 << 16))
                    if not part:
                        raise EOFError(f"the stream ended {left} bytes early")
                    left -= len(part)
                await stream.send_all(b"\x06")
            else:
                raise ValueError(f"unknown measurement {kind}")


@dataclass(frozen=True)
class Latency:
    """Round-trip times of one run, in seconds."""

    p50: float
    p99: float
    rounds: int


async def ping_pong(stream: trio.abc.Stream, *, size: int, rounds: int, warm_up: int = 100) -> Latency:
    """Measure round trips of `size` bytes, one at a time."""
    message = bytes(size)
    await stream.send_all(_REQUEST.pack(_PING, size, rounds + warm_up))
    times = []
    clock = time.perf_counter
    for _ in range(rounds + warm_up):
        start = clock()
        await stream.send_all(message)
        await receive_exactly(stream, size)
        times.append(clock() - start)
    times = sorted(times[warm_up:])
    return Latency(statistics.median(times), times[min(len(times) - 1, len(times) * 99 // 100)], rounds)


async def one_way(stream: trio.abc.Stream, *, size: int, total: int) -> float:
    """Measure throughput of `total` bytes in messages of `size`; returns bytes per second, acknowledged."""
    count = max(1, total // size)
    message = bytes(size)
    await stream.send_all(_REQUEST.pack(_SINK, size, count))
    start = time.perf_counter()
    for _ in range(count):
        await stream.send_all(message)
    await receive_exactly(stream, 1)
    return size * count / (time.perf_counter() - start)
