# SPDX-License-Identifier: Apache-2.0
"""A blocking vfio-user client: plain calls, any number of threads, no event loop.

Owns one verb per command and the memory behind its DMA maps. Never interprets a region; leaves socket and threads to
`request_channel`. Follows the vfio-user specification. The server may lie in every byte: every reply is parsed before
it is used, and the server reaches no memory but what `dma_map` named.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from ism.errors import DeviceGoneError, LocalProtocolError, RemoteProtocolError, TransportError
from ism.layout import Buffer
from ism.vfio_user import payloads, wire
from ism.vfio_user.capabilities import Capabilities, encode_version, parse_version
from ism.vfio_user.dma_memory import Backing, DmaCallbacks, DmaMemory
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd, close_all
from ism.vfio_user.payloads import (
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    IrqAction,
    IrqData,
    IrqInfo,
    RegionInfo,
    RegionInfoFixed,
    RegionRange,
    RegionWrite,
    SetIrqs,
)
from ism.vfio_user.request_channel import RequestChannel
from ism.vfio_user.wire import Command, FdLike, Message

_ACCESS: Final = wire.codec_of(wire.Header, payloads.RegionAccess)
_FIRST_ARGSZ: Final = 4096

OWN_CAPABILITIES: Final[Mapping[str, Any]] = {
    "max_msg_fds": 16,
    "max_data_xfer_size": wire.DEFAULT_MAX_DATA_XFER_SIZE,
    "max_dma_maps": 65535,
    "pgsizes": 4096,
    "write_multiple": True,
}
"""What a client proposes unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class ClientRegionInfo(RegionInfo):
    """A region as a client sees it: `fd`, when the region can be mapped, is the caller's to close."""

    fd: Fd | None = None


class Client:
    """One connection to a vfio-user server, version negotiated.

    Args:
        sock: a connected UNIX stream socket; its ownership passes to the client, also when this fails.
        capabilities: keys to propose in addition to, or instead of, `OWN_CAPABILITIES`.
        timeout_s: how long each call may take unless it says otherwise, seconds.
        name: how errors call the server.
    Raises: TransportError when the server is gone, silent or refuses; RemoteProtocolError for a reply that is none.

    Attributes: `capabilities` (the server's), `version` (major, minor).
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        capabilities: Mapping[str, Any] | None = None,
        timeout_s: float = 5.0,
        name: str = "vfio-user server",
    ) -> None:
        proposal = {**OWN_CAPABILITIES, **(capabilities or {})}
        self._own = Capabilities(
            max_msg_fds=min(proposal["max_msg_fds"], wire.SCM_MAX_FD),
            max_data_xfer_size=proposal["max_data_xfer_size"],
        )
        self._name = name
        self._version_fds: list[Fd] = []
        self._channel = RequestChannel(
            sock,
            name=name,
            timeout_s=timeout_s,
            max_message=2 * wire.HEADER_SIZE + max(self._own.max_data_xfer_size, payloads.MAX_REGION_INFO),
            max_fds=self._own.max_msg_fds,
            answer=self._answer,
        )
        self._dma = DmaMemory(65535)
        self.capabilities = Capabilities(max_msg_fds=0)
        self.version = (wire.MAJOR, wire.MINOR)
        try:
            self._negotiate(proposal)
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        capabilities: Mapping[str, Any] | None = None,
        timeout_s: float = 5.0,
    ) -> Self:
        """Connect to a server's socket and negotiate.

        Args:
            path: of a UNIX stream socket somebody listens on.
            capabilities, timeout_s: as for the class.
        Raises: TransportError when nobody listens there or the connection may not be made; and as the class.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(os.fspath(path))
        except OSError as error:
            sock.close()
            raise TransportError(
                f"cannot connect to {os.fspath(path)}: {error.strerror or error}; is its server running, and may this "
                "user open the socket?",
                error.errno or 0,
            ) from error
        return cls(sock, capabilities=capabilities, timeout_s=timeout_s, name=os.fspath(path))

    def _negotiate(self, proposal: Mapping[str, Any]) -> None:
        reply = self._channel.request(Command.VERSION, encode_version(wire.MAJOR, wire.MINOR, proposal))
        self._version_fds = reply.fds
        major, minor, capabilities = parse_version(reply.payload)
        if major != wire.MAJOR or minor > wire.MINOR:
            raise RemoteProtocolError(
                f"{self._name} answered version {major}.{minor} to a proposal of {wire.MAJOR}.{wire.MINOR}"
            )
        self.version, self.capabilities = (major, minor), capabilities
        self._channel.peer_max_fds = capabilities.max_msg_fds
        self._dma = DmaMemory(capabilities.max_dma_maps)

    def take_version_fds(self) -> list[Fd]:
        """Descriptors that came with the VERSION reply, once; the caller owns them. Not taken, `close` closes them."""
        fds, self._version_fds = self._version_fds, []
        return fds

    def fileno(self) -> int:
        """The socket, for waiting until `process` has something to do; -1 when closed."""
        return self._channel.fileno()

    def device_info(self) -> DeviceInfo:
        """What the device is and has. Raises as every call here: see `region_read`."""
        return payloads.parse_device_info(
            self._channel.request(
                Command.DEVICE_GET_INFO, DeviceInfo(flags=0, num_regions=0, num_irqs=0).pack()
            ).payload
        )

    def region_info(self, index: int) -> ClientRegionInfo:
        """One region, with its descriptor and areas when it can be mapped.

        Returns: `fd` in it is the caller's to close.
        Raises: as `region_read`; VfioUserError (EINVAL) for an index the device does not have.
        """
        argsz = _FIRST_ARGSZ
        for _ in range(2):
            request = RegionInfoFixed(argsz=argsz, flags=0, index=index, cap_offset=0, size=0, offset=0)
            reply = self._channel.request(Command.DEVICE_GET_REGION_INFO, request.pack())
            try:
                info, needed = payloads.parse_region_info_reply(reply.payload)
                if info.index != index:
                    raise RemoteProtocolError(f"{self._name} answered region {info.index} when asked for {index}")
                if needed <= len(reply.payload):
                    fd = reply.fds.pop(0) if reply.fds and info.flags & payloads.RegionFlag.MMAP else None
                    return ClientRegionInfo(
                        index=index, size=info.size, flags=info.flags, offset=info.offset, areas=info.areas, fd=fd
                    )
            finally:
                close_all(reply.fds)
            argsz = needed
        raise RemoteProtocolError(f"{self._name} keeps asking for a bigger reply to region info {index}")

    def irq_info(self, index: int) -> IrqInfo:
        """One interrupt type. Raises as `region_read`; VfioUserError (EINVAL) for a type the device does not have."""
        request = IrqInfo(flags=0, index=index, count=0)
        info = payloads.parse_irq_info(self._channel.request(Command.DEVICE_GET_IRQ_INFO, request.pack()).payload)
        if info.index != index:
            raise RemoteProtocolError(f"{self._name} answered interrupt type {info.index} when asked for {index}")
        return info

    def set_irqs(self, request: SetIrqs, fds: Sequence[FdLike] = ()) -> None:
        """Send one SET_IRQS.

        Args:
            request: with EVENTFD data, `count` is the number of `fds`, or `fds` is empty to take eventfds away.
            fds: borrowed; the server gets its own copies.
        Raises: as `region_read`; LocalProtocolError for more descriptors than the server takes in one message.
        """
        self._channel.request(Command.DEVICE_SET_IRQS, request.pack(), fds)

    def set_irq_eventfds(self, index: int, start: int, fds: Sequence[FdLike | None]) -> None:
        """Give interrupts `start`.. of a type an eventfd each; None takes one away. In as many messages as needed.

        Raises: as `set_irqs`. Interrupts before the one that failed keep what they were given.
        """
        at = 0
        while at < len(fds):
            given = fds[at] is not None
            end = at + 1
            most = at + max(1, self.capabilities.max_msg_fds) if given else len(fds)
            while end < min(most, len(fds)) and (fds[end] is not None) == given:
                end += 1
            run = fds[at:end]
            request = SetIrqs(
                data=IrqData.EVENTFD, action=IrqAction.TRIGGER, index=index, start=start + at, count=len(run)
            )
            self.set_irqs(request, [fd for fd in run if fd is not None])
            at += len(run)

    def disable_irqs(self, index: int) -> None:
        """Take away every eventfd of an interrupt type. Raises as `region_read`."""
        self.set_irqs(SetIrqs(data=IrqData.NONE, action=IrqAction.TRIGGER, index=index))

    def region_read(self, index: int, offset: int, count: int, *, timeout_s: float | None = None) -> bytes:
        """Read `count` bytes at `offset` of a region.

        Raises: VfioUserError with the errno of an error reply; VfioUserTimeoutError; DeviceGoneError when the
            server is gone (at once, in every thread); RemoteProtocolError when it broke the protocol;
            LocalProtocolError for more bytes than may go in one message.
        """
        wanted = RegionRange(offset, index, count)
        self._check_count(count)
        payload = payloads.REGION_ACCESS.pack(offset, index, count)
        reply = self._channel.request(Command.REGION_READ, payload, timeout_s=timeout_s)
        return payloads.parse_region_read_reply(reply.payload, wanted)

    def region_write(
        self, index: int, offset: int, data: Buffer, *, posted: bool = False, timeout_s: float | None = None
    ) -> None:
        """Write `data` at `offset` of a region.

        Args:
            posted: do not wait, and learn of no refusal. Order with later calls of this thread is kept.
        Raises: as `region_read`; a posted write only when it could not be sent.
        """
        count = len(data)
        self._check_count(count)
        if posted:
            head = _ACCESS.pack(
                0, Command.REGION_WRITE, _ACCESS.size + count, wire.FLAG_NO_REPLY, 0, offset, index, count
            )
            self._channel.send(head + data, timeout_s=timeout_s)
            return
        payload = payloads.REGION_ACCESS.pack(offset, index, count) + data
        reply = self._channel.request(Command.REGION_WRITE, payload, timeout_s=timeout_s)
        payloads.parse_region_write_reply(reply.payload, RegionRange(offset, index, count))

    def region_write_multi(self, writes: Sequence[RegionWrite], *, posted: bool = True) -> None:
        """Make several writes of at most 8 bytes each with one message, in order.

        Raises: as `region_write`; LocalProtocolError when the server did not offer it or a write is too long.
        """
        if not self.capabilities.write_multiple:
            raise LocalProtocolError(f"{self._name} does not take REGION_WRITE_MULTI (no write_multiple capability)")
        if any(len(write.data) > payloads.MULTI_WRITE_DATA for write in writes):
            raise LocalProtocolError(f"a write of REGION_WRITE_MULTI has at most {payloads.MULTI_WRITE_DATA} bytes")
        payload = payloads.encode_region_write_multi(writes)
        self._check_count(len(payload))
        if posted:
            self._channel.send(wire.encode(0, Command.REGION_WRITE_MULTI, payload, no_reply=True))
            return
        reply = self._channel.request(Command.REGION_WRITE_MULTI, payload)
        if reply.payload != payload[: payloads.MultiWriteCount.SIZE]:
            raise RemoteProtocolError(f"{self._name} did not confirm all {len(writes)} writes")

    def dma_map(
        self,
        iova: int,
        size: int,
        *,
        fd: FdLike | None = None,
        offset: int = 0,
        read: bool = True,
        write: bool = True,
        memory: Buffer | DmaCallbacks | None = None,
    ) -> None:
        """Let the server use memory of this process, at address `iova`.

        Args:
            iova, size: page multiples; no overlap with another map.
            fd: borrowed; given, the server may map the memory itself, from `offset` in its file (a page multiple).
            read, write: what the server may do.
            memory: the same memory here, as a buffer or as callbacks, for a server that asks by message; it must stay
                until the map ends. Not given, `fd` is mapped for that purpose.
        Raises: as `region_read`; VfioUserError (EEXIST, ENOSPC, EINVAL); OSError when `fd` cannot be mapped;
            ValueError for a `memory` that is too short, or read-only when `write`.
        """
        backing = Backing(size, memory, fd, offset, read=read, write=write)
        try:
            self._dma.add(iova, size, backing)
        except BaseException:
            backing.release()
            raise
        flags = (payloads.DMA_MAP_READ if read else 0) | (payloads.DMA_MAP_WRITE if write else 0)
        request = DmaMap(flags=flags, offset=offset if fd is not None else 0, address=iova, size=size)
        try:
            self._channel.request(Command.DMA_MAP, request.pack(), () if fd is None else (fd,))
        except BaseException:
            self._dma.remove(iova, size)
            raise

    def dma_unmap(self, iova: int, size: int) -> None:
        """End a map; when this returns the server no longer uses the memory.

        Raises: as `region_read`; VfioUserError (ENOENT) unless `iova` and `size` are those of a map. When the
            server refuses, or is silent, the map stays; when it is gone, the map is gone.
        """
        self._dma.check_known(iova, size)
        try:
            self._channel.request(Command.DMA_UNMAP, DmaUnmap(flags=0, address=iova, size=size).pack())
        except (DeviceGoneError, RemoteProtocolError):
            self._dma.remove(iova, size)  # nobody is left to use it
            raise
        self._dma.remove(iova, size)

    def reset(self, *, timeout_s: float | None = None) -> None:
        """Reset the device. Raises as `region_read`."""
        self._channel.request(Command.DEVICE_RESET, b"", timeout_s=timeout_s)

    def process(self) -> bool:
        """Serve what the server sent, without waiting; for when `fileno()` is readable and no call is under way.

        Returns: False when the connection is over. When another thread is reading, that one serves.
        Raises: RemoteProtocolError when the server broke the protocol.
        """
        return self._channel.process()

    def close(self) -> None:
        """End the connection; every call under way fails at once. Nothing happens the second time."""
        self._channel.close()
        close_all(self.take_version_fds())
        self._dma.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_count(self, count: int) -> None:
        limit = min(self.capabilities.max_data_xfer_size, self._own.max_data_xfer_size)
        if count > limit:
            raise LocalProtocolError(f"{count} bytes in one message; {self._name} takes {limit}: split the access")

    def _answer(self, message: Message[Fd]) -> bytes:
        limit = self._own.max_data_xfer_size
        if message.command == Command.DMA_READ:
            address, count = payloads.parse_dma_read(message.payload, limit)
            return payloads.DMA_ACCESS.pack(address, count) + self._dma.read(address, count)
        if message.command == Command.DMA_WRITE:
            address, data = payloads.parse_dma_write(message.payload, limit)
            self._dma.write(address, data)
            return payloads.DMA_ACCESS.pack(address, len(data))
        raise VfioUserError(errno.ENOSYS, "not a request for clients")
