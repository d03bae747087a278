# SPDX-License-Identifier: Apache-2.0
"""Pairs of asyncio's protocols, connected in one loop over TCP or over shared memory, and what is checked of a loop.

A check runs between four pairs of ends: TCP in asyncio's own loop, which is the reference; both ends over shared
memory; and an end of `ism.smc` with a plain one at the other, either way round.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from socket_pairs import LIMIT_S, LOOPBACK, manager_process

import ism.smc.asyncio
from ism.smc import default

SMC, TCP, PLAIN_CLIENT, PLAIN_SERVER = "SMC", "TCP", "a plain client", "a plain server"
KINDS = (TCP, SMC, PLAIN_CLIENT, PLAIN_SERVER)
BIG = random.Random(7).randbytes(5 << 20)
SOON_S = 0.2


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with manager_process(tmp_path_factory.mktemp("run")) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value) if value else patch.delenv(name, raising=False)
        default.close_default()
        yield
        default.close_default()


@pytest.fixture(name="kind", params=KINDS)
def every_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Recorder(asyncio.Protocol):
    """Records what its transport tells it. `kept_open` is what it answers to the end of the stream."""

    kept_open = False

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.transport: Any = None
        self.received = bytearray()
        self.made, self.ended, self.lost = loop.create_future(), loop.create_future(), loop.create_future()
        self.pauses, self.resumes = 0, 0
        self.changed = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.made.set_result(None)

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.received += data
        self.changed.set()

    def eof_received(self) -> bool:
        self.ended.set_result(None)
        self.changed.set()
        return self.kept_open

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)
        self.changed.set()

    def pause_writing(self) -> None:
        self.pauses += 1

    def resume_writing(self) -> None:
        self.resumes += 1
        self.changed.set()

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.changed.clear()
            await self.changed.wait()

    async def get(self, count: int) -> bytes:
        """Wait for so many bytes in all."""
        await self.until(lambda: len(self.received) >= count)
        return bytes(self.received)

    def closed(self) -> Awaitable[Exception | None]:
        return asyncio.shield(self.lost)


class Buffered(asyncio.BufferedProtocol):
    """Receives into a small buffer of its own."""

    def __init__(self) -> None:
        self.buffer, self.received = bytearray(1000), bytearray()
        self.lost = asyncio.get_running_loop().create_future()
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, count: int) -> None:
        self.received += self.buffer[:count]

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


class Rig:
    """Makes servers and connections of one kind in the running loop."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.loop = asyncio.get_running_loop()
        self._stack = contextlib.AsyncExitStack()
        self._accepted: list[Any] = []

    @property
    def mode(self) -> str:
        return SMC if self.kind == SMC else TCP

    async def serve(self, factory: Callable[[], Any], **options: Any) -> tuple[asyncio.Server, int]:
        """Listen. Returns the server and its port."""

        def make() -> Any:
            self._accepted.append(factory())
            return self._accepted[-1]

        if self.kind == PLAIN_SERVER:
            listener = socket.socket(proto=socket.IPPROTO_TCP)
            listener.bind((LOOPBACK, 0))
            server = await self.loop.create_server(make, sock=listener, **options)
        else:
            server = await self.loop.create_server(make, LOOPBACK, 0, **options)
        self._stack.callback(server.close)
        port: int = server.sockets[0].getsockname()[1] if server.sockets else 0
        return server, port

    async def connect(self, factory: Callable[[], Any], port: int, **options: Any) -> tuple[Any, Any]:
        if self.kind == PLAIN_CLIENT:
            sock = socket.socket(proto=socket.IPPROTO_TCP)
            sock.setblocking(False)
            try:
                await self.loop.sock_connect(sock, (LOOPBACK, port))
            except BaseException:
                sock.close()
                raise
            if options.get("ssl"):
                options.setdefault("server_hostname", LOOPBACK)
            return await self.loop.create_connection(factory, sock=sock, **options)
        return await self.loop.create_connection(factory, LOOPBACK, port, **options)

    async def pair(
        self, client: Callable[[], Any] = Recorder, server: Callable[[], Any] = Recorder, *, decided: bool = True
    ) -> tuple[Any, Any]:
        """Connect two protocols; with `decided`, it is known how their bytes travel. Returns (client's, server's)."""
        accepted = self.loop.create_future()

        def make() -> Any:
            protocol = server()
            accepted.set_result(protocol)
            return protocol

        listening, port = await self.serve(make)
        _, near = await self.connect(client, port)
        far = await accepted
        listening.close()
        while far.transport is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        self._stack.callback(self._abort, far)
        self._stack.callback(self._abort, near)
        if decided and self.kind != PLAIN_SERVER:  # whose client may know another server of that port, and wait to see
            while any(mode_of(one.transport) == "pending" for one in (near, far)):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            for one in (near, far):
                assert mode_of(one.transport) in (self.mode, None)
        return near, far

    def abandon(self) -> None:
        """Close nothing that was connected."""
        self._stack.pop_all()
        self._accepted.clear()

    @staticmethod
    def _abort(protocol: Any) -> None:
        transport = getattr(protocol, "transport", None)
        if transport is not None and not transport.is_closing():
            transport.abort()

    async def close(self) -> None:
        await self._stack.aclose()
        await _turns()  # who is waiting to be accepted is
        for protocol in self._accepted:
            self._abort(protocol)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=SOON_S)
        await _turns()


async def _turns() -> None:
    """Let the loop do what is due, and what follows from that."""
    for _ in range(20):
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)


@contextlib.contextmanager
def warns_of_a_transport() -> Iterator[None]:
    """Expect the warning of an unclosed transport, and maybe of its socket."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
        for _ in range(3):
            gc.collect()
            time.sleep(0.01)  # the driver's thread may hold something for a moment
    assert any("unclosed transport" in str(warning.message) for warning in seen)
    assert {warning.category for warning in seen} == {ResourceWarning}


def mode_of(transport: Any) -> str | None:
    """How the bytes travel; None for a transport that does not know of another way."""
    info = transport.get_extra_info("smc_info")
    return None if info is None else str(info.mode)


def run(kind: str, main: Callable[[Rig], Awaitable[None]], *, complaints: int = 0, debug: bool = False) -> None:
    """Run a check in a new loop: nothing hangs, and no more complaints reach the loop than are expected."""
    heard: list[dict[str, Any]] = []

    async def limited() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context))
        rig = Rig(kind)
        try:
            async with asyncio.timeout(LIMIT_S):
                await main(rig)
        finally:
            await rig.close()

    factory = asyncio.SelectorEventLoop if kind == TCP else ism.smc.asyncio.EventLoop
    with asyncio.Runner(loop_factory=factory, debug=debug) as runner:
        runner.run(limited())
    assert len(heard) == complaints, heard


class HalfClosing(Recorder):
    kept_open = True


class Echo(Recorder):
    """Sends back what it receives."""

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
