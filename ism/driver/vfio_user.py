# SPDX-License-Identifier: Apache-2.0
"""Transport over a vfio-user socket: how a process (container, test, program on the host) reaches its device.

Registers travel as messages. Regions arrive as descriptors on the map channel, whose messages the service thread
answers (`ism.driver.window`). Queue memory is a memory file whose descriptor the device gets with the DMA map.
The far side is the device manager, which this guest trusts; what it says is still checked by `ism.vfio_user`.

A forked child inherits the sockets, and with them it would keep the device alive after its parent's death. So in the
child they are replaced by /dev/null at once; nothing is said on them, which would be heard as the parent's word.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable, Sequence

from ism.driver.transport import DmaBuffer, Span, Watcher
from ism.driver.window import ChunkWindow, DoorbellTable
from ism.errors import DeviceGoneError, IsmError, RemoteProtocolError, TransportError
from ism.eventfd import DESCRIPTOR_ADVICE, drain, make_eventfd
from ism.memory import PAGE_SIZE, Mapping, create_memfd
from ism.vfio_user.client import Client
from ism.vfio_user.errors import VfioUserError, VfioUserTimeoutError
from ism.vfio_user.fds import Fd
from ism.vfio_user.map_channel import MapChannelClient, client_capability, take_channel
from ism.vfio_user.payloads import IrqAction, IrqData, IrqFlag, SetIrqs

_CONFIG_REGION = 7
_IRQ_INTX, _IRQ_MSIX = 0, 2
_FIRST_IOVA = 1 << 32
_TIMEOUT_S = 5.0
_GONE = "the device manager is gone; connections that exist go on, new ones need a manager"


class _Handler:
    """Answers the map channel: what the manager says, done at once."""

    def __init__(self, window: ChunkWindow, doorbells: DoorbellTable) -> None:
        self._window, self._doorbells = window, doorbells

    def hello(self, page_size: int, window: int) -> None:
        if page_size % PAGE_SIZE and PAGE_SIZE % page_size:
            raise OSError(errno.EINVAL, "page sizes do not fit")

    def map(self, offset: int, length: int, file_offset: int, rights: int, fd: Fd) -> None:
        with fd:
            self._window.map(offset, length, fd.fileno(), file_offset, read=bool(rights & 1), write=bool(rights & 2))

    def unmap(self, offset: int, length: int) -> None:
        self._window.unmap(offset, length)

    def doorbell(self, slot: int, fd: Fd) -> None:
        with fd:
            self._doorbells.set(slot, fd.fileno())

    def undoorbell(self, slot: int) -> None:
        self._doorbells.unset(slot)


class VfioUserTransport:
    """A virtio-ism function behind a vfio-user socket. Implements `ism.driver.transport.Transport`."""

    def __init__(self, client: Client, name: str) -> None:
        """Take over a negotiated client. Raises RemoteProtocolError (no usable map channel)."""
        self._client, self._name = client, name
        self._bar_sizes: dict[int, int] = {}
        self._window, self._doorbells = ChunkWindow(), DoorbellTable()
        channel = take_channel(client)
        self._channel = None if channel is None else MapChannelClient(channel, _Handler(self._window, self._doorbells))
        self._iova_lock = threading.Lock()
        self._next_iova = _FIRST_IOVA
        self._intx_fd, self._intx_automasked = -1, False
        self._watcher: Watcher | None = None
        self._watched: list[int] = []
        self._on_gone: Callable[[str], None] | None = None
        _open.add(self)

    @classmethod
    def connect(cls, path: str | os.PathLike[str], *, timeout_s: float = _TIMEOUT_S) -> VfioUserTransport:
        """Connect to a device manager's socket.

        Args: `timeout_s`: how long each register access may take, seconds.
        Raises: TransportError saying who should be listening there; RemoteProtocolError when somebody else does.
        """
        where = os.fspath(path)
        try:
            client = Client.connect(where, capabilities=client_capability(), timeout_s=timeout_s)
        except VfioUserTimeoutError as exc:
            raise TransportError(
                f"whoever listens on {where} does not answer; is it the socket of an `ism manager`, and does it run?",
                exc.errno,
            ) from exc
        except RemoteProtocolError as exc:
            raise RemoteProtocolError(
                f"whoever listens on {where} does not speak vfio-user; name the socket of an `ism manager`: {exc}"
            ) from exc
        except DeviceGoneError as exc:
            raise DeviceGoneError(
                f"whoever listens on {where} closed the connection; is it an `ism manager`, and has it room for one "
                f"more client (its log says)? {exc}",
                exc.errno,
            ) from exc
        except OSError as exc:
            raise TransportError(f"no socket for {where}: {exc.strerror}; {DESCRIPTOR_ADVICE}", exc.errno or 0) from exc
        except TransportError as exc:
            if exc.errno == errno.EBUSY:
                raise TransportError(
                    f"the device behind {where} has another client: end that one, or use a socket of fresh devices",
                    exc.errno,
                ) from exc
            if exc.errno in (errno.ENOENT, errno.ECONNREFUSED):
                raise TransportError(
                    f"no device manager listens on {where}: run `ism manager`, or name a device in ISM_DEVICE",
                    exc.errno,
                ) from exc
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                raise TransportError(f"no descriptor is left for {where}: {DESCRIPTOR_ADVICE}", exc.errno) from exc
            raise
        try:
            return cls(client, f"vfio-user:{where}")
        except BaseException:
            client.close()
            raise

    @property
    def name(self) -> str:
        """How the user named it."""
        return self._name

    @property
    def tells_of_loss(self) -> bool:
        """Yes: the connection hangs up."""
        return True

    def start(self, watcher: Watcher, on_gone: Callable[[str], None]) -> None:
        """Answer the map channel and watch for the manager's death."""
        self._watcher, self._on_gone = watcher, on_gone
        self._watch(self._client.fileno(), self._on_hang_up, hangup_only=True)
        if self._channel is not None:
            self._watch(self._channel.fileno(), self._on_channel)

    def answer_fds(self) -> Sequence[int]:
        """The map channel: a region is mapped before its command is acknowledged."""
        return self._watched[1:]

    def _watch(self, fd: int, callback: Callable[[], None], *, hangup_only: bool = False) -> None:
        """Watch a duplicate: the sockets may be closed, and their numbers used again, by other threads meanwhile."""
        assert self._watcher is not None
        try:
            own = os.dup(fd)
        except OSError as exc:
            raise TransportError(
                f"cannot watch {self._name}: {exc.strerror}; {DESCRIPTOR_ADVICE}", exc.errno or 0
            ) from exc
        self._watched.append(own)
        self._watcher.add(own, callback, hangup_only=hangup_only)

    def _abandon(self) -> None:
        """In a forked child: let go of what would keep the device alive, without a word."""
        fds = [*self._watched, self._client.fileno()]
        if self._channel is not None:
            fds.append(self._channel.fileno())
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in fds:
            if fd >= 0:
                os.dup2(null, fd, inheritable=False)
        os.close(null)

    def _unwatch(self) -> None:
        watched, self._watched = self._watched, []
        for fd in watched:
            if self._watcher is not None:
                self._watcher.remove(fd)
            os.close(fd)

    def _on_channel(self) -> None:
        assert self._channel is not None
        try:
            alive = self._channel.process()
        except IsmError as exc:
            self._lost(f"the map channel broke: {exc}")
            return
        if not alive:
            self._lost(_GONE)

    def _on_hang_up(self) -> None:
        self._lost(_GONE)

    def _lost(self, reason: str) -> None:
        self._unwatch()
        on_gone, self._on_gone = self._on_gone, None
        if on_gone is not None:
            on_gone(reason)

    # -- registers ----------------------------------------------------------------------------------------------

    def config_read(self, offset: int, length: int) -> bytes:
        """Read PCI configuration space."""
        return self._client.region_read(_CONFIG_REGION, offset, length)

    def config_write(self, offset: int, data: bytes) -> None:
        """Write PCI configuration space."""
        self._client.region_write(_CONFIG_REGION, offset, data)

    def bar_size(self, bar: int) -> int:
        """Bytes of the BAR, 0 when the function does not have it."""
        if bar not in self._bar_sizes:
            try:
                info = self._client.region_info(bar)
            except VfioUserError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                return 0
            if info.fd is not None:
                info.fd.close()
            self._bar_sizes[bar] = info.size
        return self._bar_sizes[bar]

    def bar_read(self, bar: int, offset: int, length: int) -> bytes:
        """Read registers."""
        return self._client.region_read(bar, offset, length)

    def bar_write(self, bar: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write registers."""
        try:
            self._client.region_write(bar, offset, data, posted=posted)
        except DeviceGoneError as exc:
            raise DeviceGoneError(f"{_GONE}: {exc}", exc.errno) from exc

    # -- memory -------------------------------------------------------------------------------------------------

    def map_spans(self, bar: int, spans: Sequence[Span]) -> Mapping:
        """Return one contiguous mapping of the spans, which the manager mapped through the channel."""
        return self._window.contiguous(spans)

    def dma_alloc(self, size: int) -> DmaBuffer:
        """Get zeroed memory for queues, shared with the device by descriptor."""
        length = -(-size // PAGE_SIZE) * PAGE_SIZE
        try:
            fd = create_memfd("ism-queue", length)
        except OSError as exc:
            raise TransportError(
                f"cannot make queue memory: {exc.strerror}; {DESCRIPTOR_ADVICE}", exc.errno or 0
            ) from exc
        try:
            mapping = Mapping(length)
            mapping.place(0, length, fd, 0)
            with self._iova_lock:
                iova = self._next_iova
                self._next_iova += length
            self._client.dma_map(iova, length, fd=fd, memory=mapping.view)
        except OSError as exc:
            raise TransportError(f"cannot map {length} bytes of queue memory: {exc.strerror}", exc.errno or 0) from exc
        finally:
            os.close(fd)
        return DmaBuffer(iova, mapping)

    def dma_free(self, buffer: DmaBuffer) -> None:
        """Take the buffer out of the device's reach."""
        try:
            self._client.dma_unmap(buffer.iova, buffer.mapping.length)
        except (DeviceGoneError, RemoteProtocolError):
            pass  # with the connection went the device's reach

    # -- interrupts ---------------------------------------------------------------------------------------------

    def vector_count(self) -> int:
        """MSI-X vectors that can be bound to eventfds."""
        try:
            return self._client.irq_info(_IRQ_MSIX).count
        except VfioUserError:
            return 0

    def set_vectors(self, first: int, eventfds: Sequence[int | None]) -> None:
        """Bind eventfds to vectors."""
        self._client.set_irq_eventfds(_IRQ_MSIX, first, eventfds)

    def enable_intx(self) -> int | None:
        """Give INTA an eventfd."""
        if self._intx_fd >= 0:
            return self._intx_fd
        try:
            info = self._client.irq_info(_IRQ_INTX)
        except VfioUserError:
            return None
        if not info.count or not info.flags & IrqFlag.EVENTFD:
            return None
        fd = make_eventfd()
        try:
            self._client.set_irq_eventfds(_IRQ_INTX, 0, [fd])
        except BaseException:
            os.close(fd)
            raise
        self._intx_fd = fd
        self._intx_automasked = bool(info.flags & IrqFlag.AUTOMASKED)
        return fd

    def rearm_intx(self) -> None:
        """Drain the eventfd, then unmask INTA: an interrupt that is pending comes now."""
        drain(self._intx_fd)
        if self._intx_automasked:
            self._client.set_irqs(SetIrqs(data=IrqData.NONE, action=IrqAction.UNMASK, index=_IRQ_INTX, count=1))

    def doorbell_fd(self, slot: int) -> int | None:
        """Return the eventfd that the manager wired to the slot, or None."""
        return self._doorbells.get(slot)

    # -- the end ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Reset the function."""
        self._client.reset()

    def close(self) -> None:
        """Close the socket: the manager takes everything back."""
        _open.discard(self)
        self._on_gone = None
        self._unwatch()
        self._client.close()
        if self._channel is not None:
            self._channel.close()
        if self._intx_fd >= 0:
            os.close(self._intx_fd)
            self._intx_fd = -1
        self._window.clear()
        self._doorbells.close()


_open: weakref.WeakSet[VfioUserTransport] = weakref.WeakSet()


def _after_fork() -> None:
    for transport in list(_open):
        try:
            transport._abandon()
        except OSError:
            pass  # no descriptor is left to do it with: the child is about to fail anyway
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)
