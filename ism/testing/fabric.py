# SPDX-License-Identifier: Apache-2.0
"""One domain in one process: the registry and the functions are the manager's own, only the host around them is not.

Effects are carried out at once and in order, in the thread that caused them, under one lock. Doorbells always go
through the registry, as they do when a region has more than two holders. What a process client gets over sockets,
`InMemoryTransport` gets by call; the driver above cannot tell the difference.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ism.device.contract import (
    Effect,
    FunctionConfig,
    GuestMemoryError,
    Interrupt,
    MapChunks,
    PostEvent,
    SealWrites,
    UnmapChunks,
    WiringChanged,
)
from ism.device.function import IsmFunction, Work
from ism.device.interrupts import INTX
from ism.driver.transport import DmaBuffer, Span, Watcher
from ism.driver.window import ChunkWindow
from ism.errors import DeviceGoneError
from ism.eventfd import drain, make_eventfd, raise_eventfd
from ism.ids import DevId, Gid
from ism.manager.quota import Quota
from ism.manager.registry import DomainRegistry
from ism.manager.vectors import Intx
from ism.memory import PAGE_SIZE, Mapping, seal_writers
from ism.vfio_user.fds import Fd
from ism.virtio.ism_spec import DEFAULT_CHUNK_SIZE, IsmFeature, Permission

DEFAULT_QUOTA = Quota(bytes=1 << 30, regions=1024, attachments=1024)


class _Memory:
    """Guest memory of one function: what the transport allocated. Implements `GuestMemory`."""

    def __init__(self) -> None:
        self.buffers: dict[int, Mapping] = {}

    def _find(self, iova: int, length: int) -> memoryview:
        for base, mapping in self.buffers.items():
            if base <= iova and iova + length <= base + mapping.length:
                return mapping.view[iova - base : iova - base + length]
        raise GuestMemoryError(f"{length} bytes at iova {iova:#x} are not mapped")

    def read(self, iova: int, length: int) -> bytes:
        return bytes(self._find(iova, length))

    def write(self, iova: int, data: bytes | memoryview) -> None:
        self._find(iova, len(data))[:] = data

    def read_u16(self, iova: int) -> int:
        return self._find(iova, 2).cast("H")[0]

    def write_u16(self, iova: int, value: int) -> None:
        self._find(iova, 2).cast("H")[0] = value


class Fabric:
    """A domain to which in-memory devices are plugged.

    Attributes: `registry` (the manager's `DomainRegistry`).
    """

    def __init__(self, *, gid: int = 0x15A, chunk_size: int = DEFAULT_CHUNK_SIZE) -> None:
        self.registry = DomainRegistry(Gid(gid), chunk_size)
        self.lock = threading.RLock()
        self._ports: dict[DevId, InMemoryTransport] = {}
        self._effects: deque[Effect] = deque()
        self._busy = False
        self._next_devid = 1

    def plug(
        self,
        *,
        features: Iterable[int] = (IsmFeature.EVENT_IRQ, IsmFeature.EVENT_VQ, IsmFeature.DIRECTORY),
        vectors: int = 64,
        window_size: int = 1 << 28,
        quota: Quota = DEFAULT_QUOTA,
        namespace: int = 0,
    ) -> InMemoryTransport:
        """Make a device and return the transport to it.

        Args: `namespace`: what the directory takes for its network namespace; by default all are in one.
        """
        with self.lock:
            devid = DevId(self._next_devid)
            self._next_devid += 1
            self.registry.add_device(devid, window_size, quota)
            self.registry.directory.set_scope(devid, namespace)
            config = FunctionConfig(
                gid=self.registry.gid,
                devid=devid,
                chunk_size=self.registry.chunk_size,
                window_size=window_size,
                vectors=vectors,
                features=frozenset(int(bit) for bit in features),
                name=f"in-memory {devid}",
            )
            port = self._ports[devid] = InMemoryTransport(self, config)
            return port

    def unplug(self, devid: DevId) -> None:
        """Remove a device as if its client had died; its driver is told nothing."""
        with self.lock:
            if self._ports.pop(devid, None) is not None:
                self.carry_out(self.registry.remove_device(devid))

    def carry_out(self, effects: Iterable[Effect]) -> None:
        """Carry out effects, and those that they cause, in order."""
        with self.lock:
            self._effects.extend(effects)
            if self._busy:
                return
            self._busy = True
            try:
                while self._effects:
                    self._one(self._effects.popleft())
            finally:
                self._busy = False

    def _one(self, effect: Effect) -> None:
        match effect:
            case MapChunks():
                if (port := self._ports.get(effect.devid)) is not None:
                    port.window.map(
                        effect.offset,
                        effect.length,
                        effect.memory.fd,
                        effect.file_offset,
                        read=True,
                        write=bool(effect.rights & Permission.WRITE),
                    )
            case UnmapChunks():
                if (port := self._ports.get(effect.devid)) is not None:
                    port.window.unmap(effect.offset, effect.length)
            case SealWrites():
                seal_writers(effect.memory.fd)
            case Interrupt():
                if (port := self._ports.get(effect.devid)) is not None:
                    port.interrupt(effect.vector)
            case PostEvent():
                if (port := self._ports.get(effect.devid)) is not None:
                    self._effects.extend(port.function.post_event(effect.payload))
            case WiringChanged():
                pass  # every doorbell goes through the registry here


class InMemoryTransport:
    """One function by direct call. Implements `ism.driver.transport.Transport`.

    Attributes: `function` (the device side, for tests that look behind), `window`.
    """

    def __init__(self, fabric: Fabric, config: FunctionConfig) -> None:
        self._fabric, self._config = fabric, config
        self._memory = _Memory()
        self.window = ChunkWindow()
        self.function = IsmFunction(config, fabric.registry, self._memory)
        self._eventfds: dict[int, int] = {}
        self._intx = Intx()
        self._intx_fd = -1
        self._next_iova = 1 << 32
        self._on_gone: Callable[[str], None] | None = None
        self._lost: str | None = None
        self._paused = False
        self._withheld: list[tuple[int, int, bytes]] = []
        self._changed = threading.Condition()

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"in-memory:{self._config.devid:x}"

    @property
    def tells_of_loss(self) -> bool:
        """Yes: `lose` calls."""
        return True

    def start(self, watcher: Watcher, on_gone: Callable[[str], None]) -> None:
        """Nothing comes unasked here but interrupts."""
        self._on_gone = on_gone

    def lose(self, reason: str) -> None:
        """Make the device vanish, as a manager that dies does."""
        self._lost = reason
        self._unplug()
        on_gone, self._on_gone = self._on_gone, None
        if on_gone is not None:
            on_gone(reason)

    def pause(self) -> None:
        """Let the device see no posted write (commands, doorbells) until `resume`, as a stopped manager does."""
        with self._changed:
            self._paused = True

    def resume(self) -> None:
        """Let the device see what was withheld, in order."""
        with self._changed:
            self._paused = False
            writes, self._withheld = self._withheld, []
        for write in writes:
            self.bar_write(*write)

    def wait_withheld(self, count: int, timeout_s: float) -> bool:
        """Wait until that many writes are withheld; tell whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._withheld) >= count, timeout_s)

    def _check(self) -> None:
        if self._lost is not None:
            raise DeviceGoneError(f"{self.name}: {self._lost}")

    def answer_fds(self) -> Sequence[int]:
        """None: the fabric maps by itself."""
        return ()

    def config_read(self, offset: int, length: int) -> bytes:
        """Read PCI configuration space."""
        self._check()
        with self._fabric.lock:
            return self.function.config_read(offset, length)

    def config_write(self, offset: int, data: bytes) -> None:
        """Write PCI configuration space."""
        self._check()
        with self._fabric.lock:
            self._serve(self.function.config_write(offset, data))

    def bar_size(self, bar: int) -> int:
        """Bytes of the BAR."""
        return self.function.bar_size(bar)

    def bar_read(self, bar: int, offset: int, length: int) -> bytes:
        """Read registers."""
        self._check()
        with self._fabric.lock:
            return self.function.bar_read(bar, offset, length)

    def bar_write(self, bar: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write registers; commands that this notifies are done when it returns, unless the device is paused."""
        self._check()
        if posted:
            with self._changed:
                if self._paused:
                    self._withheld.append((bar, offset, data))
                    self._changed.notify_all()
                    return
        with self._fabric.lock:
            self._serve(self.function.bar_write(bar, offset, data))

    def _serve(self, work: Work) -> None:
        while True:
            self._fabric.carry_out(work.effects)
            for request in work.requests:
                self._fabric.carry_out(request.effects)
                self._fabric.carry_out(self.function.complete(request))
            if not work.more:
                return
            work = self.function.run()

    def map_spans(self, bar: int, spans: Sequence[Span]) -> Mapping:
        """Return one contiguous mapping of the spans."""
        return self.window.contiguous(spans)

    def vector_count(self) -> int:
        """MSI-X vectors."""
        return self._config.vectors

    def set_vectors(self, first: int, eventfds: Sequence[int | None]) -> None:
        """Bind eventfds to vectors."""
        self._check()
        with self._fabric.lock:
            for vector, fd in enumerate(eventfds, first):
                old = self._eventfds.pop(vector, None)
                if old is not None:
                    os.close(old)
                if fd is not None:
                    self._eventfds[vector] = os.dup(fd)  # a device has its own, whatever the driver closes
            self._fabric.carry_out(self.function.set_msix_enabled(bool(self._eventfds)))

    def interrupt(self, vector: int) -> None:
        """Raise a vector (the fabric's side)."""
        index = self.function.route(vector)
        if index == INTX:
            self._intx.signal()
            return
        fd = None if index is None else self._eventfds.get(index)
        if fd is not None:
            raise_eventfd(fd)

    def enable_intx(self) -> int | None:
        """Give INTA an eventfd."""
        self._check()
        with self._fabric.lock:
            if self._intx_fd < 0:
                self._intx_fd = make_eventfd()
                self._intx.set(Fd(os.dup(self._intx_fd)))
                self._intx.unmask(self.function.intx_asserted)
            return self._intx_fd

    def rearm_intx(self) -> None:
        """Drain the eventfd, then unmask INTA: an interrupt that is pending comes now."""
        self._check()
        drain(self._intx_fd)
        with self._fabric.lock:
            self._intx.unmask(self.function.intx_asserted)

    def dma_alloc(self, size: int) -> DmaBuffer:
        """Get zeroed memory for queues."""
        self._check()
        mapping = Mapping(-(-size // PAGE_SIZE) * PAGE_SIZE)
        with self._fabric.lock:
            iova = self._next_iova
            self._next_iova += mapping.length
            self._memory.buffers[iova] = mapping
        return DmaBuffer(iova, mapping)

    def dma_free(self, buffer: DmaBuffer) -> None:
        """Take the buffer out of the device's reach."""
        with self._fabric.lock:
            self._memory.buffers.pop(buffer.iova, None)

    def doorbell_fd(self, slot: int) -> int | None:
        """No doorbell is wired directly: all go through the notify area."""
        return None

    def reset(self) -> None:
        """Reset the function."""
        self._check()
        with self._fabric.lock:
            self._fabric.carry_out(self.function.reset())

    def close(self) -> None:
        """Unplug the device."""
        self._on_gone = None
        if self._lost is None:
            self._lost = "closed"
        self._unplug()
        if self._intx_fd >= 0:
            os.close(self._intx_fd)
            self._intx_fd = -1
        self.window.clear()

    def _unplug(self) -> None:
        with self._fabric.lock:
            self._fabric.unplug(self._config.devid)
            for fd in self._eventfds.values():
                os.close(fd)
            self._eventfds.clear()
            self._intx.set(None)
