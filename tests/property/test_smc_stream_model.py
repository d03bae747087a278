# SPDX-License-Identifier: Apache-2.0
"""Two streams against a byte string: whatever is interleaved, nothing is lost, doubled or reordered.

Each direction has a task that sends and a task that receives; both follow random programs, with cancelled receives,
pauses and buffers of all kinds, and the ends of both directions come in any order. What was sent is the model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ism.driver import Device
from ism.smc import SmcStream, open_tcp_listeners, open_tcp_stream
from ism.testing import Fabric

LIMIT_S = 60
RING_BYTES = 16384 - 4096
_BYTES = random.Random(1).randbytes(1 << 20)

sizes = st.one_of(
    st.integers(0, 64),
    st.integers(1, 3 * RING_BYTES),
    st.sampled_from([1, RING_BYTES - 1, RING_BYTES, RING_BYTES + 1, 2 * RING_BYTES]),
)
sends = st.lists(
    st.tuples(sizes, st.sampled_from(["bytes", "bytearray", "view", "slice"]), st.integers(0, 3)), max_size=12
)
receives = st.lists(
    st.tuples(st.integers(1, 2 * RING_BYTES), st.integers(0, 3), st.one_of(st.none(), st.integers(0, 5))),
    min_size=1,
    max_size=8,
)


@dataclass
class Direction:
    """Programs of one direction, and what has happened in it."""

    sends: list[tuple[int, str, int]]
    receives: list[tuple[int, int, int | None]]
    sent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)


directions = st.builds(Direction, sends, receives)


@pytest.fixture(scope="module", params=["two devices", "one device"])
def devices(request: pytest.FixtureRequest) -> Iterator[tuple[Device, Device]]:
    fabric = Fabric(chunk_size=4096)
    first = Device(fabric.plug())
    second = first if request.param == "one device" else Device(fabric.plug())
    yield first, second
    first.close()
    second.close()
    assert not fabric.registry.regions


async def steps(count: int) -> None:
    for _ in range(count):
        await trio.lowlevel.checkpoint()


async def send(stream: SmcStream, direction: Direction) -> None:
    for size, kind, pause in direction.sends:
        at = len(direction.sent) % (len(_BYTES) - size)
        data = _BYTES[at : at + size]
        direction.sent += data
        given_data: Any = {
            "bytes": lambda data=data: data,
            "bytearray": lambda data=data: bytearray(data),
            "view": lambda data=data: memoryview(data),
            "slice": lambda data=data: memoryview(b"<<" + data + b">")[2:-1],
        }[kind]()
        await stream.send_all(given_data)
        await steps(pause)
    await stream.send_eof()


async def receive(stream: SmcStream, direction: Direction) -> None:
    async def give_up(scope: trio.CancelScope, patience: int) -> None:
        await steps(patience)
        scope.cancel()

    async with trio.open_nursery() as nursery:
        turn = 0
        while True:
            max_bytes, pause, patience = direction.receives[turn % len(direction.receives)]
            turn += 1
            with trio.CancelScope() as scope:
                if patience is not None and turn < 1000:
                    nursery.start_soon(give_up, scope, patience)
                data = await stream.receive_some(max_bytes)
                assert len(data) <= max_bytes
                assert direction.sent.startswith(data, len(direction.received))
                direction.received += data
                if not data:
                    break
            await steps(pause)
    assert await stream.receive_some() == b""


async def run(devices: tuple[Device, Device], there: Direction, back: Direction) -> None:
    with trio.fail_after(LIMIT_S):
        (listener,) = await open_tcp_listeners(0, host="127.0.0.1", smc="auto", device=devices[1], buffer_size=16384)
        async with listener:
            port = listener.socket.getsockname()[1]
            client = await open_tcp_stream("127.0.0.1", port, smc="auto", device=devices[0], buffer_size=16384)
            server = await listener.accept()
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(send, client, there)
            nursery.start_soon(receive, server, there)
            nursery.start_soon(send, server, back)
            nursery.start_soon(receive, client, back)
        assert client.smc_info().mode == server.smc_info().mode == "SMC"


@given(there=directions, back=directions)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_interleaved_every_byte_arrives_once_and_in_order(
    devices: tuple[Device, Device], there: Direction, back: Direction
) -> None:
    there, back = (Direction(program.sends, program.receives) for program in (there, back))
    trio.run(run, devices, there, back)
    assert there.received == there.sent
    assert back.received == back.sent
