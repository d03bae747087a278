# SPDX-License-Identifier: Apache-2.0
"""`SmcStream` against trio's own suite for half-closeable streams: however it is made, whatever carries its bytes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from smc_stream_rig import SmcRig, leak_checked, port_of, shake_hands

import ism.smc
from ism.smc import SmcStream

LIMIT_S = 120


@pytest.fixture(params=["two devices", "one device", "no directory", "TCP"])
def rig(request: pytest.FixtureRequest) -> Iterator[SmcRig]:
    directory = request.param != "no directory"
    mode: Any = "off" if request.param == "TCP" else None
    with leak_checked(one_device=request.param == "one device", directory=directory, mode=mode) as made:
        yield made


async def by_helpers(rig: SmcRig) -> tuple[SmcStream, SmcStream]:
    """Made by `open_tcp_listeners` and `open_tcp_stream`."""
    return await rig.fresh_pair()


async def by_sockets(rig: SmcRig) -> tuple[SmcStream, SmcStream]:
    """Made from sockets, as trio's are."""
    listener = ism.smc.socket(**rig.server_options)
    await listener.bind(("127.0.0.1", 0))
    listener.listen()
    async with ism.smc.SocketListener(listener):
        client = ism.smc.socket(**rig.client_options)
        await client.connect(listener.getsockname())
        server, _ = await listener.accept()
        return ism.smc.SocketStream(client), ism.smc.SocketStream(server)


async def by_listener(rig: SmcRig) -> tuple[SmcStream, SmcStream]:
    """Made by `SocketListener.accept` and from a connected socket."""
    async with await rig.listen() as made, ism.smc.SocketListener(made.socket) as listener:
        client = ism.smc.socket(**rig.client_options)
        await client.connect(("127.0.0.1", port_of(made)))
        return ism.smc.SocketStream(client), await listener.accept()


def clog(stream: SmcStream) -> None:
    """Fill what is between the two ends."""
    if stream.connection is not None:
        while stream.connection.send(bytes(4096)):
            pass
        return
    sock = trio.socket.fromfd(stream.socket.fileno(), trio.socket.AF_INET, trio.socket.SOCK_STREAM)
    with sock, contextlib.suppress(BlockingIOError):
        while True:
            sock._sock.send(bytes(1 << 20))  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [by_helpers, by_sockets, by_listener], ids=lambda make: make.__name__)
async def test_trios_suite_for_half_closeable_streams_passes(rig: SmcRig, make: Callable[[SmcRig], Any]) -> None:
    flip = itertools.count()

    async def stream_maker() -> tuple[SmcStream, SmcStream]:
        one, other = await make(rig)
        await shake_hands(one, other)
        assert one.smc_info().mode == other.smc_info().mode == ("TCP" if rig.mode == "off" else "SMC")
        return (one, other) if next(flip) % 2 else (other, one)

    async def clogged_stream_maker() -> tuple[SmcStream, SmcStream]:
        pair = await stream_maker()
        for stream in pair:
            clog(stream)
        return pair

    with trio.fail_after(LIMIT_S):
        await trio.testing.check_half_closeable_stream(stream_maker, clogged_stream_maker)
