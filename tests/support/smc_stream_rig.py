# SPDX-License-Identifier: Apache-2.0
"""Pairs of connected streams for tests: SMC over in-memory devices, and plain TCP, which is the reference.

A rig checks at its end that nothing is left: no region in the registry, no file descriptor in the process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import trio

from ism.driver import Device
from ism.shm import compile_kernels
from ism.smc import SmcListener, SmcSocket, SmcStream, open_tcp_listeners, open_tcp_stream
from ism.smc.group import release_idle
from ism.smc.policy import Mode
from ism.testing import Fabric
from ism.virtio.ism_spec import IsmFeature

LIMIT_S = 30
BUFFER = 65536

Pair = tuple[Any, Any]


def bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Give an async test a time limit, so that what never comes fails instead of hanging."""

    @functools.wraps(test)
    async def limited(*args: Any, **kwargs: Any) -> None:
        with trio.fail_after(LIMIT_S):
            await test(*args, **kwargs)

    return limited


def open_descriptors() -> list[str]:
    """What every descriptor of this process refers to, without /dev/null, which the driver opens once and keeps."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(name for name in found if name != os.devnull)


class TcpRig:
    """Plain TCP on the loopback interface."""

    smc = False

    async def fresh_pair(self) -> Pair:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            client = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
            return client, await listener.accept()

    pair = fresh_pair


class SmcRig:
    """SMC between two in-memory devices, or two ends of one device.

    Attributes: `mode` (what both ends say of shared memory: without a directory "require", as nobody tells them).
    """

    smc = True

    def __init__(
        self,
        *,
        directory: bool = False,
        mode: Mode | None = None,
        one_device: bool = False,
        buffer_size: int = BUFFER,
        chunk_size: int = 65536,
    ) -> None:
        compile_kernels()  # not in the middle of the first handshake, whose patience tests shorten
        self.mode: Mode = mode or ("auto" if directory else "require")
        self.fabric = Fabric(chunk_size=chunk_size)
        self._features = [IsmFeature.EVENT_IRQ, IsmFeature.EVENT_VQ] + [IsmFeature.DIRECTORY] * directory
        self.client_device = self.plug()
        self.server_device = self.client_device if one_device else self.plug()
        self.buffer_size = buffer_size

    def plug(self, **options: Any) -> Device:
        """One more device like the others."""
        return Device(self.fabric.plug(features=self._features, **options))

    @property
    def client_options(self) -> dict[str, Any]:
        """What makes a client's stream or socket use this rig."""
        return {"smc": self.mode, "device": self.client_device, "buffer_size": self.buffer_size}

    @property
    def server_options(self) -> dict[str, Any]:
        """What makes a server's stream or socket use this rig."""
        return {**self.client_options, "device": self.server_device}

    async def listen(self, **options: Any) -> SmcListener:
        (listener,) = await open_tcp_listeners(0, host="127.0.0.1", **{**self.server_options, **options})
        return listener

    async def connect(self, port: int, **options: Any) -> SmcStream:
        return await open_tcp_stream("127.0.0.1", port, **{**self.client_options, **options})

    async def fresh_pair(self) -> tuple[SmcStream, SmcStream]:
        """Connected by TCP, before the handshake."""
        async with await self.listen() as listener:
            client = await self.connect(port_of(listener))
            return client, await listener.accept()

    async def pair(self) -> tuple[SmcStream, SmcStream]:
        """After the handshake."""
        client, server = await self.fresh_pair()
        await shake_hands(client, server)
        return client, server

    @property
    def regions(self) -> int:
        """Regions that the registry knows."""
        return len(self.fabric.registry.regions)

    def let_go(self) -> None:
        """Give back the regions that are kept for later connections."""
        for device in (self.client_device, self.server_device):
            release_idle(device)

    def close(self) -> None:
        self.client_device.close()
        self.server_device.close()


def port_of(listener: SmcListener) -> int:
    port: int = listener.socket.getsockname()[1]
    return port


def tcp_of(stream: SmcStream | SmcListener) -> trio.socket.SocketType:
    """The TCP socket underneath."""
    assert isinstance(stream.socket, SmcSocket)
    return stream.socket.channel.tcp


async def shake_hands(*streams: SmcStream) -> None:
    """Finish the handshake on all of them."""
    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(stream.do_handshake)


@contextlib.contextmanager
def leak_checked(**options: Any) -> Iterator[SmcRig]:
    """Lend an SMC rig; at the end no region may be left in its registry, no descriptor in this process."""
    before = open_descriptors()
    rig = SmcRig(**options)
    try:
        yield rig
        rig.let_go()
        patience = time.monotonic() + LIMIT_S  # the last command may be under way in the driver's thread
        while rig.regions and time.monotonic() < patience:
            time.sleep(0.001)
            rig.let_go()  # a connection that was dropped is closed in a thread, and lends its regions then
        assert not rig.regions, "regions are left"
    finally:
        rig.close()
    after = open_descriptors()
    assert after == before, f"descriptors before {before}, after {after}"


async def receive_all(stream: Any, max_bytes: int | None = None) -> bytes:
    """Everything up to the end of the stream."""
    parts = []
    while part := await stream.receive_some(max_bytes):
        parts.append(bytes(part))
    return b"".join(parts)


async def receive_exactly(stream: Any, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = await stream.receive_some(count - len(data))
        assert part, f"the stream ended after {len(data)} of {count} bytes"
        data += part
    return bytes(data)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does and tells nobody. The caller's time limit bounds it."""
    while not condition():  # noqa: ASYNC110 (no event is set)
        await trio.sleep(0.001)
