# SPDX-License-Identifier: Apache-2.0
"""`SmcStream` against trio's own suite for half-closeable streams, over real devices in one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from ism.driver.device import Device
from ism.smc import SmcStream, open_tcp_listeners, open_tcp_stream
from ism.testing import Fabric


@pytest.fixture(params=["two devices", "one device"])
def devices(request: pytest.FixtureRequest) -> Iterator[tuple[Device, Device]]:
    fabric = Fabric()
    first = Device(fabric.plug())
    second = first if request.param == "one device" else Device(fabric.plug())
    yield first, second
    first.close()
    second.close()


async def make_pair(devices: tuple[Device, Device], buffer_size: int) -> tuple[SmcStream, SmcStream]:
    (listener,) = await open_tcp_listeners(0, host="127.0.0.1", device=devices[1], buffer_size=buffer_size)
    async with listener:
        port = listener.socket.getsockname()[1]
        client = await open_tcp_stream("127.0.0.1", port, device=devices[0], buffer_size=buffer_size)
        server = await listener.accept()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    return client, server


async def test_trios_suite_for_half_closeable_streams_passes(devices: tuple[Device, Device]) -> None:
    flip = itertools.count()

    async def stream_maker() -> tuple[SmcStream, SmcStream]:
        pair = await make_pair(devices, 65536)
        return pair if next(flip) % 2 else (pair[1], pair[0])

    async def clogged_stream_maker() -> tuple[SmcStream, SmcStream]:
        one, other = await stream_maker()
        for stream in (one, other):
            assert stream.connection is not None
            while stream.connection.send(bytes(4096)):
                pass
        return one, other

    with trio.fail_after(60):
        await trio.testing.check_half_closeable_stream(stream_maker, clogged_stream_maker)
