# SPDX-License-Identifier: Apache-2.0
"""What two programs say to each other over a pair of streams, in every order that may matter to a handshake."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from smc_stream_rig import receive_all, receive_exactly

from ism.smc import SmcStream

HELLO, REPLY = b"hello " * 1000, b"reply " * 1000

Talk = Callable[[Any, Any], Awaitable[None]]


async def client_first(client: Any, server: Any) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, HELLO)
        assert await receive_exactly(server, len(HELLO)) == HELLO
        nursery.start_soon(server.send_all, REPLY)
        assert await receive_exactly(client, len(REPLY)) == REPLY


async def server_first(client: Any, server: Any) -> None:
    await client_first(server, client)


async def client_waits_before_the_server_speaks(client: Any, server: Any) -> None:
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            assert await receive_exactly(client, len(HELLO)) == HELLO

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked(0.02)
        await server.send_all(HELLO)


async def server_waits_before_the_client_speaks(client: Any, server: Any) -> None:
    await client_waits_before_the_server_speaks(server, client)


async def both_at_once(client: Any, server: Any) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, HELLO)
        nursery.start_soon(server.send_all, REPLY)
        assert await receive_exactly(server, len(HELLO)) == HELLO
        assert await receive_exactly(client, len(REPLY)) == REPLY


async def only_ends(client: Any, server: Any) -> None:
    await client.send_eof()
    assert await receive_all(server) == b""
    await server.send_eof()
    assert await receive_all(client) == b""


ORDERS = [
    client_first,
    server_first,
    client_waits_before_the_server_speaks,
    server_waits_before_the_client_speaks,
    both_at_once,
    only_ends,
]
in_any_order = pytest.mark.parametrize("talk", ORDERS, ids=lambda talk: talk.__name__)


async def finished(talk: Talk, client: Any, server: Any) -> None:
    """Talk, end both directions and close."""
    async with client, server:
        await talk(client, server)
        for one, other in ((client, server), (server, client)):
            await one.send_eof()
            assert await receive_all(other) == b""


def agree(client: SmcStream, server: SmcStream) -> str:
    mode = client.smc_info().mode
    assert server.smc_info().mode == mode
    return mode
