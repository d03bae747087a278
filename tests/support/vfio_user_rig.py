# SPDX-License-Identifier: Apache-2.0
"""A small device behind `serve_connection`, and a client that sends whatever bytes a test wants.

Both are real peers over a socket pair. The device has region 0 (256 bytes, readable and writable), region 1 (64 KiB,
mappable in two areas), region 2 (16 bytes, read-only), region 3 (absent) and interrupt types 0 (4 eventfds) and 1 (1,
maskable, no eventfds).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio
import trio.testing

from ism.vfio_user import wire
from ism.vfio_user.capabilities import encode_version
from ism.vfio_user.connection import Connection
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd, close_all, recv_message, send_some
from ism.vfio_user.handler import Limits, Stats
from ism.vfio_user.payloads import DeviceInfo, DmaMap, DmaUnmap, IrqInfo, MmapArea, RegionInfo, SetIrqs
from ism.vfio_user.server import HandlerFactory, serve_connection, serve_unix
from ism.vfio_user.wire import Command, FdLike, Message, MessageReader

QEMU_CAPABILITIES = {
    "migration": {"pgsize": 4096, "max_bitmap_size": 268435456},
    "max_msg_fds": 16,
    "max_data_xfer_size": 1048576,
    "pgsizes": 4096,
    "max_dma_maps": 65535,
    "write_multiple": True,
}
"""What stock QEMU proposes."""


class Device:
    """Implements `DeviceHandler`; `log` has every call that is not a plain read or write."""

    def __init__(self, connection: Connection | None = None) -> None:
        self.connection = connection
        self.memory = bytearray(256)
        self.file = Fd(os.memfd_create("region"))
        os.ftruncate(self.file.fileno(), 1 << 16)
        self.log: list[tuple[Any, ...]] = []
        self.fds: list[Fd] = []
        self.on_write: Callable[[int, bytes], Any] | None = None
        self.version_reply: tuple[Mapping[str, Any], Sequence[Fd]] = ({}, [])
        self.gone = trio.Event()

    async def version(self, capabilities: Mapping[str, Any], /) -> tuple[Mapping[str, Any], Sequence[Fd]]:
        self.log.append(("version", dict(capabilities)))
        return self.version_reply

    async def device_info(self) -> DeviceInfo:
        return DeviceInfo(flags=3, num_regions=4, num_irqs=2)

    async def region_info(self, index: int, /) -> RegionInfo:
        if index == 1:
            areas = (MmapArea(offset=0, size=4096), MmapArea(offset=8192, size=4096))
            return RegionInfo(index=1, size=1 << 16, flags=7, areas=areas, fd=self.file)
        return RegionInfo(index=index, size=(256, 0, 16, 0)[index], flags=(3, 0, 1, 0)[index])

    async def irq_info(self, index: int, /) -> IrqInfo:
        return IrqInfo(flags=(1, 2)[index], index=index, count=(4, 1)[index])

    async def region_read(self, index: int, offset: int, count: int, /) -> bytes:
        if index == 2:
            raise ZeroDivisionError("a bug in the device")
        return bytes(self.memory[offset : offset + count])

    async def region_write(self, index: int, offset: int, data: bytes, /) -> None:
        if data[:4] == b"EBSY":
            raise VfioUserError(errno.EBUSY, "busy")
        if self.on_write is not None:
            await self.on_write(offset, data)
        self.memory[offset : offset + len(data)] = data

    async def set_irqs(self, request: SetIrqs, fds: list[Fd], /) -> None:
        self.log.append(("set_irqs", request, len(fds)))
        self.fds += fds

    async def dma_map(self, request: DmaMap, fd: Fd | None, /) -> None:
        if request.address == 0xBAD000:
            raise VfioUserError(errno.EPERM, "not that one")
        self.log.append(("dma_map", request.address, request.size, fd is not None))
        if fd is not None:
            self.fds.append(fd)

    async def dma_unmap(self, request: DmaUnmap, /) -> None:
        self.log.append(("dma_unmap", request.address, request.size))

    async def reset(self) -> None:
        self.log.append(("reset",))

    async def closed(self) -> None:
        self.log.append(("closed",))
        self.file.close()
        close_all(self.fds)
        self.gone.set()


class RawClient:
    """The client's end of a socket pair, byte by byte."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.reader: MessageReader[Fd] = MessageReader(max_message=1 << 22, max_fds=16)

    async def send(self, data: bytes, fds: Sequence[FdLike] = ()) -> None:
        while data:
            try:
                data = data[send_some(self.sock, data, fds) :]
                fds = ()
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock.fileno())

    async def receive(self) -> Message[Fd] | None:
        """The next message, None at the end of the stream."""
        buffer = bytearray(1 << 16)
        while (message := self.reader.next_message()) is None:
            await trio.lowlevel.wait_readable(self.sock.fileno())
            try:
                received = recv_message(self.sock, buffer, 16)
            except ConnectionResetError:
                return None
            if received.size == 0:
                return None
            self.reader.feed(memoryview(buffer)[: received.size], received.fds)
        return message

    async def call(self, command: int, payload: bytes = b"", fds: Sequence[FdLike] = (), *, id: int = 7) -> Message[Fd]:
        """Send one command and return its reply, which must echo id and command."""
        await self.send(wire.encode(id, command, payload), fds)
        reply = await self.receive()
        assert reply is not None
        assert (reply.id, reply.command, reply.is_reply) == (id, command, True)
        return reply

    async def refused(self, command: int, payload: bytes = b"", fds: Sequence[FdLike] = ()) -> int:
        """Send one command that must be refused; returns the errno."""
        reply = await self.call(command, payload, fds)
        assert reply.flags == wire.FLAG_TYPE_REPLY | wire.FLAG_ERROR
        assert reply.payload == b""
        return reply.error

    async def negotiate(self, capabilities: Mapping[str, Any] = QEMU_CAPABILITIES) -> Message[Fd]:
        return await self.call(Command.VERSION, encode_version(0, 0, capabilities))

    def close(self) -> None:
        close_all(self.reader.abandon())
        self.sock.close()


class Served:
    """One served connection: `raw` its client, `device` its handler."""

    def __init__(self, raw: RawClient, device: Device, stats: Stats, connection: Connection) -> None:
        self.raw, self.device, self.stats, self.connection = raw, device, stats, connection


@contextlib.asynccontextmanager
async def served(*, negotiate: bool = True, limits: Limits | None = None) -> AsyncIterator[Served]:
    """Serve one `Device` to one `RawClient`; at the end the server must notice that the client left."""
    ours, theirs = socket.socketpair()
    stats, made = Stats(), []

    def factory(connection: Connection) -> Device:
        device = Device(connection)
        made.append((device, connection))
        return device

    raw = RawClient(ours)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: serve_connection(theirs, factory, limits=limits, stats=stats))
            await trio.testing.wait_all_tasks_blocked()
            device, connection = made[0]
            try:
                if negotiate:
                    assert (await raw.negotiate()).error == 0
                yield Served(raw, device, stats, connection)
            finally:
                raw.close()
        assert device.log[-1] == ("closed",)
        assert device.log.count(("closed",)) == 1


class ServerThread:
    """A trio server in a thread of its own, for blocking clients. `devices` are the handlers made so far."""

    def __init__(self, path: Path, *, limits: Limits | None = None, factory: HandlerFactory | None = None) -> None:
        self.path, self.limits, self.stats = path, limits, Stats()
        self.devices: list[Device] = []
        self.factory = factory or self._make
        self._started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))

    def _make(self, connection: Connection) -> Device:
        self.devices.append(Device(connection))
        return self.devices[-1]

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._serve)
                self._started.set()

    async def _serve(self, task_status: Any) -> None:
        await serve_unix(self.path, self.factory, limits=self.limits, stats=self.stats, task_status=task_status)

    def call(self, async_fn: Callable[..., Any], *args: Any) -> Any:
        """Run something in the server's event loop."""
        return trio.from_thread.run(async_fn, *args, trio_token=self._token)

    def stop(self) -> None:
        """End the server, and with it every connection."""
        if self._thread.is_alive():
            self._token.run_sync_soon(self._scope.cancel)
            self._thread.join(10)
            assert not self._thread.is_alive()

    def __enter__(self) -> ServerThread:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
