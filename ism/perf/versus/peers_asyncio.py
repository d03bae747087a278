# SPDX-License-Identifier: Apache-2.0
"""Peers in asyncio: its streams over TCP, with the standard library's event loop and with uvloop's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ism.perf.versus.figures import Figures, Script
from ism.perf.versus.peers_sockets import HOST, Peer, Say
from ism.perf.versus.talk_async import Line, answer, ask

_LIMIT: Final = 1 << 20
"""How much a reader holds; the default of 64 KiB would make large messages slow."""


class Tcp:
    """Streams over TCP. Attributes: `make_loop` (None: the standard library's)."""

    def __init__(self, make_loop: Callable[[], Any] | None = None) -> None:
        self.make_loop = make_loop

    def serve(self, directory: Path, size: int, say: Say) -> None:
        with asyncio.Runner(loop_factory=self.make_loop) as runner:
            runner.run(self._serve(say))

    def run(self, address: Any, script: Script) -> Figures:
        with asyncio.Runner(loop_factory=self.make_loop) as runner:
            return runner.run(self._run(address, script))

    @staticmethod
    async def _serve(say: Say) -> None:
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await answer(_line(reader, writer))
            except BaseException as exc:
                over.set_exception(exc)
            else:
                over.set_result(None)
            finally:
                writer.close()

        server = await asyncio.start_server(accepted, HOST, 0, limit=_LIMIT)
        async with server:
            say(server.sockets[0].getsockname())
            await over

    @staticmethod
    async def _run(address: Any, script: Script) -> Figures:
        reader, writer = await asyncio.open_connection(*address, limit=_LIMIT)
        try:
            return await ask(_line(reader, writer), script)
        finally:
            writer.close()
            await writer.wait_closed()


def _line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Line:
    write, drain = writer.write, writer.drain

    async def send(data: Any) -> None:
        write(data)
        await drain()

    return Line(send, reader.read)


def _uvloop() -> Any:
    import uvloop

    return uvloop.new_event_loop()


PEERS: Final[dict[str, Peer]] = {"tcp-asyncio": Tcp(), "uvloop": Tcp(_uvloop)}
