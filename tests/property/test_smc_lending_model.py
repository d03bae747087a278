# SPDX-License-Identifier: Apache-2.0
"""Lent and copied calls mixed at random against a byte string: nothing is lost, doubled, reordered or seen too early.

Each direction has a task that sends and one that receives. Blocks take a part, or end in an exception; some leave
a slice behind that is let go a few steps later; what was sent is the model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ism.driver import Device
from ism.smc import SmcStream, open_tcp_listeners, open_tcp_stream
from ism.testing import Fabric

LIMIT_S = 60
RING_BYTES = 16384 - 4096
_BYTES = random.Random(2).randbytes(1 << 18)

sizes = st.one_of(
    st.integers(1, 64),
    st.integers(1, 2 * RING_BYTES),
    st.sampled_from([RING_BYTES - 1, RING_BYTES, RING_BYTES + 1]),
)
how = st.sampled_from(["copy", "copy into", "all", "part", "nothing", "raise", "early", "pin"])
steps_of_one = st.lists(st.tuples(how, sizes, st.integers(0, 255), st.integers(0, 3)), min_size=1, max_size=16)


class Boom(Exception):
    """Raised by a block."""


@dataclass
class Direction:
    """Programs of one direction, and what has happened in it."""

    sends: list[tuple[str, int, int, int]]
    receives: list[tuple[str, int, int, int]]
    sent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)

    def next_bytes(self, count: int) -> bytes:
        """What the sender sends next: so it is known by its place."""
        at = len(self.sent) % (len(_BYTES) - count)
        return _BYTES[at : at + count]


directions = st.builds(Direction, steps_of_one, steps_of_one)


@pytest.fixture(scope="module", params=["SMC", "TCP"])
def devices(request: pytest.FixtureRequest) -> Iterator[tuple[Device, Device] | None]:
    if request.param == "TCP":
        yield None
        return
    fabric = Fabric(chunk_size=4096)
    first, second = Device(fabric.plug()), Device(fabric.plug())
    yield first, second
    first.close()
    second.close()
    assert not fabric.registry.regions


async def pause(count: int) -> None:
    for _ in range(count):
        await trio.lowlevel.checkpoint()


def part_of(kind: str, there: int, share: int) -> int:
    return {"part": there * share // 255, "nothing": 0}.get(kind, there)


async def send(stream: SmcStream, direction: Direction) -> None:
    for kind, size, share, steps in direction.sends:
        if kind.startswith("copy"):
            data = direction.next_bytes(size)
            direction.sent += data
            await stream.send_all(data if kind == "copy" else memoryview(bytearray(data)))
        elif kind == "pin":
            await send_and_keep(stream, direction, size, steps)
        else:
            try:
                async with stream.send_buffer(size) as room:
                    assert 1 <= len(room) <= size
                    count = part_of(kind, len(room), share)
                    room.view[:count] = direction.next_bytes(count)
                    room.commit(count)
                    await pause(steps)
                    if kind == "raise":
                        raise Boom
                    direction.sent += room.view[:count]
                    if kind == "early":
                        room.release()
                        await pause(steps)
            except Boom:
                pass
        await pause(steps)
    await stream.send_eof()


async def send_and_keep(stream: SmcStream, direction: Direction, size: int, steps: int) -> None:
    kept = None
    with pytest.raises(BufferError):
        async with stream.send_buffer(size) as room:
            kept = room.view[:]
    await pause(steps)
    with pytest.raises(BufferError):
        await stream.send_all(b"refused")
    kept[:] = direction.next_bytes(len(kept))  # not sent yet
    direction.sent += kept
    kept.release()


async def receive(stream: SmcStream, direction: Direction) -> None:
    turn = 0
    while True:
        kind, size, share, steps = direction.receives[turn % len(direction.receives)]
        turn += 1
        await pause(steps)
        if kind == "copy" or (kind in ("nothing", "part", "raise") and turn > 64):
            data = await stream.receive_some(size)
        elif kind == "copy into":
            buffer = bytearray(size)
            data = bytes(buffer[: await stream.receive_some_into(buffer)])
        elif kind == "pin":
            data = await receive_and_keep(stream, size, steps)
        else:
            data = await receive_lent(stream, kind, size, share, steps)
            if data is None:
                continue
        direction.received += data
        if not data:
            return


async def receive_lent(stream: SmcStream, kind: str, size: int, share: int, steps: int) -> bytes | None:
    """Returns what was consumed, b"" at the end; None: nothing was."""
    try:
        async with stream.receive_view(size) as lent:
            assert len(lent) <= size
            if not lent:
                return b""
            count = part_of(kind, len(lent), share)
            lent.consume(count)
            before = bytes(lent.view)
            await pause(steps)
            assert bytes(lent.view) == before, "what is lent stays"
            if kind == "raise":
                raise Boom
            if kind == "early":
                lent.release()
                await pause(steps)
    except Boom:
        return None
    return before[:count] or None


async def receive_and_keep(stream: SmcStream, size: int, steps: int) -> bytes:
    async with stream.receive_view(size) as lent:
        if not lent:
            return b""
        lent.consume(0)
    kept = None
    with pytest.raises(BufferError):
        async with stream.receive_view(size) as lent:
            kept = lent.view[:]
    before = bytes(kept)
    await pause(steps)
    with pytest.raises(BufferError):
        await stream.receive_some()
    assert bytes(kept) == before, "what is looked at stays"
    kept.release()
    return before


async def connected(devices: tuple[Device, Device] | None) -> tuple[SmcStream, SmcStream]:
    options = {"smc": "off"} if devices is None else {"smc": "require", "buffer_size": 16384}
    ends = (None, None) if devices is None else devices
    (listener,) = await open_tcp_listeners(0, host="127.0.0.1", device=ends[1], **options)  # type: ignore[arg-type]
    async with listener:
        port = listener.socket.getsockname()[1]
        client = await open_tcp_stream("127.0.0.1", port, device=ends[0], **options)  # type: ignore[arg-type]
        return client, await listener.accept()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(there=directions, back=directions, amortised=st.booleans())
def test_what_is_lent_and_what_is_copied_are_one_stream(
    devices: tuple[Device, Device] | None, there: Direction, back: Direction, amortised: bool
) -> None:
    for direction in (there, back):
        direction.sent.clear()
        direction.received.clear()

    async def main() -> None:
        with trio.fail_after(LIMIT_S):
            client, server = await connected(devices)
            async with client, server:
                client.amortise_checkpoints = server.amortise_checkpoints = amortised
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send, client, there)
                    nursery.start_soon(receive, server, there)
                    nursery.start_soon(send, server, back)
                    nursery.start_soon(receive, client, back)

    trio.run(main)
    for direction in (there, back):
        assert direction.received == direction.sent
