# SPDX-License-Identifier: Apache-2.0
"""From one client's commands to its device handler and back: negotiation, validation, replies, the end.

Owns the order of things: VERSION first, then one command after the other, `closed` last. Checks every range against
what the handler said of its regions and interrupts, so that it sees no impossible request. Never touches a socket
(`connection`). Follows the vfio-user specification. A command that cannot be served is answered with an errno; only
a stream that cannot be followed ends the connection.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import trio

from ism.errors import LocalProtocolError
from ism.vfio_user import payloads, wire
from ism.vfio_user.capabilities import Capabilities, encode_version, parse_version
from ism.vfio_user.connection import Connection, logger
from ism.vfio_user.errors import (
    ClientGoneError,
    DescriptorLimitError,
    MalformedMessageError,
    VfioUserError,
    VfioUserTimeoutError,
)
from ism.vfio_user.fds import Fd, close_all
from ism.vfio_user.handler import DeviceHandler
from ism.vfio_user.payloads import DeviceInfo, DmaUnmap, IrqAction, IrqData, RegionFlag, RegionInfo
from ism.vfio_user.wire import Command, FdLike, Message

_READ_REPLY: Final = wire.codec_of(wire.Header, payloads.RegionAccess)
_COMMANDS_PER_TURN: Final = 32
_LONGEST_TURN_S: Final = 0.001
"""One client is served no longer than this, or one command, before the others have their turn."""
"""After so many commands without a wait, other clients get their turn."""

_TAKES_FDS: Final = frozenset({int(Command.DMA_MAP), int(Command.DEVICE_SET_IRQS)})
_REFUSED: Final = {
    int(Command.DEVICE_GET_REGION_IO_FDS): "region I/O by descriptor is not offered",
    int(Command.DIRTY_PAGES): "dirty page tracking is not offered",
}


_REFUSALS: Final = (VfioUserError, MalformedMessageError, DescriptorLimitError, VfioUserTimeoutError)


def _errno_of(error: VfioUserError | MalformedMessageError | DescriptorLimitError | VfioUserTimeoutError) -> int:
    return error.errno if 0 < error.errno < 4096 else errno.EIO


class Session:
    """One client's conversation with its device."""

    def __init__(self, connection: Connection, handler: DeviceHandler) -> None:
        self._connection, self._handler = connection, handler
        self._stats = connection.stats
        self._device: DeviceInfo | None = None
        self._regions: dict[int, tuple[int, int]] = {}  # index -> size, flags
        self._serve: dict[int, Callable[[Message[Fd]], Awaitable[bytes]]] = {
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.REGION_WRITE_MULTI: self._region_write_multi,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.DEVICE_RESET: self._reset,
        }
        self._reply_fds: tuple[FdLike, ...] = ()

    async def run(self) -> None:
        """Serve until the client is gone. The caller closes the connection afterwards."""
        try:
            if await self._handshake():
                await self._loop()
        except ClientGoneError:
            pass  # counted and logged where it was noticed
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + self._close_timeout_s()) as scope:
                try:
                    await self._handler.closed()
                except Exception:
                    self._stats.failures += 1
                    logger.exception("the device handler failed in closed()")
            if scope.cancelled_caught:
                self._stats.failures += 1
                logger.error("the device handler did not finish closed() in %g s", self._close_timeout_s())

    def _close_timeout_s(self) -> float:
        return self._connection.limits.close_timeout_s

    async def _loop(self) -> None:
        connection = self._connection
        turn, turn_ends_s = 0, time.perf_counter() + _LONGEST_TURN_S
        while True:
            try:
                message = await connection.next_request()
            except MalformedMessageError as error:
                await self._refuse_stream(error)
                return
            if message is None:
                return
            await self._handle(message)
            turn += 1
            if turn == _COMMANDS_PER_TURN or time.perf_counter() > turn_ends_s:
                await trio.lowlevel.checkpoint()
                turn, turn_ends_s = 0, time.perf_counter() + _LONGEST_TURN_S

    async def _refuse_stream(self, error: MalformedMessageError) -> None:
        self._stats.malformed += 1
        self._stats.errors += 1
        if error.header is not None:
            await self._connection.send(wire.encode_error(*error.header, error.errno))
        self._connection.drop(str(error))

    # VERSION

    async def _handshake(self) -> bool:
        connection = self._connection
        with trio.move_on_after(connection.limits.handshake_timeout_s) as scope:
            try:
                message = await connection.next_request()
            except MalformedMessageError as error:
                await self._refuse_stream(error)
                return False
        if scope.cancelled_caught:
            connection.drop(f"no VERSION for {connection.limits.handshake_timeout_s:g} s")
            return False
        if message is None:
            return False
        try:
            reply, fds = await self._version(message)
        except _REFUSALS as error:
            self._count(message, error)
            refused = _errno_of(error)
        except ClientGoneError:
            raise
        except Exception:
            self._failed(message)
            refused = errno.EIO
        else:
            try:
                await self._reply(message, wire.encode_reply(message.id, Command.VERSION, reply), fds)
            finally:
                close_all(fds)
            return True
        close_all(message.fds)
        await connection.send(wire.encode_error(message.id, message.command, refused))
        connection.drop("no VERSION was agreed on")
        return False

    async def _version(self, message: Message[Fd]) -> tuple[bytes, tuple[Fd, ...]]:
        if message.command != Command.VERSION:
            raise MalformedMessageError(f"the first message is {wire.command_name(message.command)}, not VERSION")
        if message.flags or message.fds or message.problem is not None:
            raise MalformedMessageError("VERSION with flags or descriptors")
        major, minor, proposed = parse_version(message.payload)
        if major != wire.MAJOR:
            raise MalformedMessageError(
                f"protocol version {major}.{minor}; this server speaks {wire.MAJOR}.{wire.MINOR}"
            )
        limits = self._connection.limits
        # The reply is a subset of what was proposed: a key is answered only when the client knows it.
        offered: dict[str, Any] = {
            "max_msg_fds": limits.max_msg_fds,
            "max_data_xfer_size": limits.max_data_xfer_size,
            "max_dma_maps": min(limits.max_dma_maps, proposed.max_dma_maps),
            "pgsizes": limits.pgsizes,
            "write_multiple": limits.write_multiple and proposed.write_multiple,
        }
        reply = {key: value for key, value in offered.items() if key in proposed.raw}
        self._connection.negotiated(proposed)
        extra, fds = await self._handler.version(proposed.raw)
        try:
            return encode_version(wire.MAJOR, min(minor, wire.MINOR), self._merged(reply, extra, proposed, fds)), tuple(
                fds
            )
        except BaseException:
            close_all(fds)
            raise

    def _merged(self, reply: dict[str, Any], extra: Any, proposed: Capabilities, fds: Any) -> dict[str, Any]:
        unknown = [key for key in extra if key not in proposed.raw]
        if unknown:
            raise LocalProtocolError(f"the handler answers capabilities the client did not propose: {unknown}")
        if len(fds) > proposed.max_msg_fds:
            raise LocalProtocolError(
                f"the handler sends {len(fds)} descriptors; the client takes {proposed.max_msg_fds}"
            )
        return {**reply, **extra}

    # One command

    async def _handle(self, message: Message[Fd]) -> None:
        self._stats.requests += 1
        try:
            if message.flags & ~wire.FLAG_NO_REPLY:
                wire.check_command(message)
            if message.problem is not None:
                raise message.problem
            serve = self._serve.get(message.command)
            if serve is None:
                raise self._not_served(message.command)
            if message.fds and message.command not in _TAKES_FDS:
                raise MalformedMessageError(
                    f"{wire.command_name(message.command)} with {len(message.fds)} descriptors, none expected"
                )
            if message.fds and len(message.fds) > self._connection.limits.max_msg_fds:
                raise MalformedMessageError(f"{len(message.fds)} descriptors in one message")
            reply = await serve(message)
        except _REFUSALS as error:
            close_all(message.fds)
            self._count(message, error)
            reply = wire.encode_error(message.id, message.command, _errno_of(error))
        except Exception as error:
            close_all(message.fds)
            if isinstance(error, ClientGoneError) and self._connection.over is not None:
                return
            self._failed(message)
            reply = wire.encode_error(message.id, message.command, errno.EIO)
        except BaseException:
            close_all(message.fds)
            raise
        fds, self._reply_fds = self._reply_fds, ()
        if not message.flags & wire.FLAG_NO_REPLY:
            await self._reply(message, reply, fds)

    async def _reply(self, message: Message[Fd], reply: bytes, fds: Sequence[FdLike]) -> None:
        try:
            await self._connection.send(reply, fds)
        except VfioUserError as error:  # its descriptors cannot be sent
            self._failed(message)
            await self._connection.send(wire.encode_error(message.id, message.command, _errno_of(error)))

    def _not_served(self, command: int) -> Exception:
        if command in _REFUSED:
            return VfioUserError(errno.ENOTSUP, _REFUSED[command])
        if command in (Command.VERSION, Command.DMA_READ, Command.DMA_WRITE):
            return MalformedMessageError(f"{wire.command_name(command)} is not for the server to take now")
        return VfioUserError(errno.ENOSYS, "no such command")

    def _count(self, message: Message[Fd], error: Exception) -> None:
        self._stats.errors += 1
        if isinstance(error, MalformedMessageError):
            self._stats.malformed += 1
        elif isinstance(error, DescriptorLimitError):
            self._stats.descriptors_lost += 1
        logger.info(
            "vfio-user client pid %d: %s refused: %s",
            self._connection.peer.pid,
            wire.command_name(message.command),
            error,
        )

    def _failed(self, message: Message[Fd]) -> None:
        self._stats.errors += 1
        self._stats.failures += 1
        logger.exception("the device handler failed in %s", wire.command_name(message.command))

    # Commands; each returns its whole reply

    async def _region_read(self, message: Message[Fd]) -> bytes:
        offset, region, size = payloads.parse_region_read(message.payload, self._connection.limits.max_data_xfer_size)
        await self._check_access(region, offset, size, RegionFlag.READ)
        data = await self._handler.region_read(region, offset, size) if size else b""
        if len(data) != size:
            raise LocalProtocolError(f"the handler returned {len(data)} bytes for a read of {size}")
        return (
            _READ_REPLY.pack(
                message.id, Command.REGION_READ, _READ_REPLY.size + size, wire.FLAG_TYPE_REPLY, 0, offset, region, size
            )
            + data
        )

    async def _region_write(self, message: Message[Fd]) -> bytes:
        (offset, region, size), data = payloads.parse_region_write(
            message.payload, self._connection.limits.max_data_xfer_size
        )
        await self._check_access(region, offset, size, RegionFlag.WRITE)
        if size:
            await self._handler.region_write(region, offset, data)
        return _READ_REPLY.pack(
            message.id, Command.REGION_WRITE, _READ_REPLY.size, wire.FLAG_TYPE_REPLY, 0, offset, region, size
        )

    async def _region_write_multi(self, message: Message[Fd]) -> bytes:
        if not (self._connection.limits.write_multiple and self._connection.capabilities.write_multiple):
            raise VfioUserError(errno.ENOTSUP, "write_multiple was not negotiated")
        writes = payloads.parse_region_write_multi(message.payload)
        for done, write in enumerate(writes, 1):
            await self._check_access(write.region, write.offset, len(write.data), RegionFlag.WRITE)
            if write.data:
                await self._handler.region_write(write.region, write.offset, write.data)
            if done % _COMMANDS_PER_TURN == 0:
                await trio.lowlevel.checkpoint()
        return wire.encode_reply(message.id, message.command, payloads.MultiWriteCount(wr_cnt=len(writes)).pack())

    async def _check_access(self, region: int, offset: int, size: int, right: RegionFlag) -> None:
        known = self._regions.get(region)
        if known is None:
            await self._ask_region(region)
            known = self._regions[region]
        if offset + size > known[0]:
            raise VfioUserError(
                errno.EINVAL, f"{size} bytes at {offset:#x} are beyond region {region} of {known[0]:#x} bytes"
            )
        if not known[1] & int(right):
            raise VfioUserError(errno.EPERM, f"region {region} may not be {'read' if right == 1 else 'written'}")

    async def _ask_region(self, index: int) -> RegionInfo:
        device = await self._ask_device()
        if index >= device.num_regions:
            raise VfioUserError(errno.EINVAL, f"region {index}; the device has {device.num_regions}")
        info = await self._handler.region_info(index)
        self._regions[index] = (info.size, int(info.flags))
        return info

    async def _ask_device(self) -> DeviceInfo:
        if self._device is None:
            self._device = await self._handler.device_info()
        return self._device

    async def _device_info(self, message: Message[Fd]) -> bytes:
        payloads.parse_device_info(message.payload)
        device = await self._ask_device()
        reply = DeviceInfo(flags=device.flags, num_regions=device.num_regions, num_irqs=device.num_irqs)
        return wire.encode_reply(message.id, message.command, reply.pack())

    async def _region_info(self, message: Message[Fd]) -> bytes:
        request = payloads.parse_region_info_request(message.payload)
        info = await self._ask_region(request.index)
        if info.index != request.index:
            raise LocalProtocolError(f"the handler answered region {info.index} when asked for {request.index}")
        if (info.fd is not None) != bool(info.flags & RegionFlag.MMAP):
            raise LocalProtocolError(f"region {info.index}: the MMAP flag and a descriptor go together")
        payload, whole = payloads.encode_region_info(info, request.argsz)
        if whole and info.fd is not None:
            if self._connection.capabilities.max_msg_fds < 1:
                raise VfioUserError(errno.ENOTSUP, "the client takes no descriptors")
            self._reply_fds = (info.fd,)
        return wire.encode_reply(message.id, message.command, payload)

    async def _irq_info(self, message: Message[Fd]) -> bytes:
        request = payloads.parse_irq_info(message.payload)
        info = await self._ask_irq(request.index)
        reply = payloads.IrqInfo(flags=info.flags, index=request.index, count=info.count)
        return wire.encode_reply(message.id, message.command, reply.pack())

    async def _ask_irq(self, index: int) -> payloads.IrqInfo:
        device = await self._ask_device()
        if index >= device.num_irqs:
            raise VfioUserError(errno.EINVAL, f"interrupt type {index}; the device has {device.num_irqs}")
        return await self._handler.irq_info(index)

    async def _set_irqs(self, message: Message[Fd]) -> bytes:
        request = payloads.parse_set_irqs(message.payload, len(message.fds))
        info = await self._ask_irq(request.index)
        if request.start + request.count > info.count:
            raise VfioUserError(
                errno.EINVAL,
                f"interrupts {request.start}..{request.start + request.count} of type {request.index}, which has "
                f"{info.count}",
            )
        if request.action is not IrqAction.TRIGGER and not info.flags & payloads.IrqFlag.MASKABLE:
            raise VfioUserError(errno.EINVAL, f"interrupt type {request.index} cannot be masked")
        if request.data is IrqData.EVENTFD and not info.flags & payloads.IrqFlag.EVENTFD:
            raise VfioUserError(errno.EINVAL, f"interrupt type {request.index} takes no eventfds")
        await self._handler.set_irqs(request, message.fds)
        return wire.encode_reply(message.id, message.command)

    async def _dma_map(self, message: Message[Fd]) -> bytes:
        connection = self._connection
        page_size = connection.limits.pgsizes & -connection.limits.pgsizes
        request = payloads.parse_dma_map(message.payload, len(message.fds), page_size)
        connection.dma_maps.check(request.address, request.size)
        await self._handler.dma_map(request, message.fds[0] if message.fds else None)
        connection.dma_maps.add(request.address, request.size, request)
        return wire.encode_reply(message.id, message.command)

    async def _dma_unmap(self, message: Message[Fd]) -> bytes:
        maps = self._connection.dma_maps
        request = payloads.parse_dma_unmap(message.payload)
        ending = list(maps) if request.flags else maps.within(request.address, request.size)
        ended = 0
        turn_ends_s = trio.current_time() + _LONGEST_TURN_S
        for entry in reversed(ending):  # from the end: nothing behind it has to move up
            await self._handler.dma_unmap(DmaUnmap(flags=0, address=entry.address, size=entry.size))
            maps.remove(entry.address, entry.size)
            ended += entry.size
            if trio.current_time() >= turn_ends_s:
                await trio.lowlevel.checkpoint()
                turn_ends_s = trio.current_time() + _LONGEST_TURN_S
        answer = request if request.flags else DmaUnmap(flags=0, address=request.address, size=ended)
        return wire.encode_reply(message.id, message.command, answer.pack())

    async def _reset(self, message: Message[Fd]) -> bytes:
        if message.payload:
            raise MalformedMessageError(f"DEVICE_RESET with {len(message.payload)} bytes of payload")
        await self._handler.reset()
        return wire.encode_reply(message.id, message.command)
