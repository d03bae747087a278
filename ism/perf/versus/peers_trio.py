# SPDX-License-Identifier: Apache-2.0
"""Peers in trio: its own TCP and UNIX streams, and ours with either kind of checkpoint."""

from __future__ import annotations

import socket as std
from pathlib import Path
from typing import Any, Final

import trio

from ism.perf.versus.figures import Figures, Script
from ism.perf.versus.peers_sockets import HOST, Peer, Say, require_shared_memory
from ism.perf.versus.talk_async import Line, answer, ask


class Tcp:
    """trio's streams over TCP."""

    def serve(self, directory: Path, size: int, say: Say) -> None:
        trio.run(self._serve, directory, say)

    def run(self, address: Any, script: Script) -> Figures:
        return trio.run(self._run, address, script)

    async def _serve(self, directory: Path, say: Say) -> None:
        async with await self.listen(directory) as listener:
            say(listener.socket.getsockname())
            stream = await listener.accept()
        async with stream:
            await answer(await self.line(stream))

    async def _run(self, address: Any, script: Script) -> Figures:
        async with await self.connect(address) as stream:
            return await ask(await self.line(stream), script)

    async def listen(self, directory: Path) -> Any:
        """Return a listener."""
        return (await trio.open_tcp_listeners(0, host=HOST))[0]

    async def connect(self, address: Any) -> Any:
        """Return a stream."""
        return await trio.open_tcp_stream(*address)

    async def line(self, stream: Any) -> Line:
        """Return what the workloads use."""
        return Line(stream.send_all, stream.receive_some)


class Unix(Tcp):
    """trio's streams over UNIX sockets."""

    async def listen(self, directory: Path) -> Any:
        sock = trio.socket.socket(std.AF_UNIX)
        path = directory / "unix-trio"
        path.unlink(missing_ok=True)
        await sock.bind(str(path))
        sock.listen(1)
        return trio.SocketListener(sock)

    async def connect(self, address: Any) -> Any:
        return await trio.open_unix_socket(address)


class Ours(Tcp):
    """`ism.smc`'s streams. Attributes: `amortised` (checkpoints)."""

    def __init__(self, *, amortised: bool = False) -> None:
        self.amortised = amortised

    async def listen(self, directory: Path) -> Any:
        from ism.smc import open_tcp_listeners

        return (
            await open_tcp_listeners(0, host=HOST, smc="require", amortise_checkpoints=self.amortised)
        )[0]  # fmt: skip

    async def connect(self, address: Any) -> Any:
        from ism.smc import open_tcp_stream

        return await open_tcp_stream(*address, smc="require", amortise_checkpoints=self.amortised)

    async def line(self, stream: Any) -> Line:
        await stream.do_handshake()
        require_shared_memory(stream.smc_info())
        return await super().line(stream)


PEERS: Final[dict[str, Peer]] = {
    "tcp-trio": Tcp(),
    "unix-trio": Unix(),
    "smc-trio": Ours(),
    "smc-trio-amortised": Ours(amortised=True),
}
