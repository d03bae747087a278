# SPDX-License-Identifier: Apache-2.0
"""What the driver needs from whatever connects it to a PCI function: configuration, BARs, interrupts, DMA memory.

The driver above does not know which transport it has (kernel VFIO, vfio-user, UIO, in-memory); each transport knows
nothing of virtio. The device behind it is trusted: it is this guest's own. What it returns is still checked, because
an error that names the problem is worth more than a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ism.memory import Mapping


@dataclass(frozen=True, slots=True)
class Span:
    """`length` bytes at `offset` of a BAR."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class DmaBuffer:
    """Memory that the device can reach.

    Attributes: `iova` (address for the device), `mapping` (the same bytes in this process, zero at first).
    """

    iova: int
    mapping: Mapping


class Watcher(Protocol):
    """Runs callbacks when descriptors become readable (`ism.driver.service.Service`)."""

    def add(self, fd: int, callback: Callable[[], None], *, hangup_only: bool = False) -> None:
        """Call `callback` from the service thread whenever `fd` is readable, or with `hangup_only` when it hung up."""
        ...

    def remove(self, fd: int) -> None:
        """Stop watching. A callback that is running now may still finish."""
        ...


class Transport(Protocol):
    """One PCI function. Every method may be called from any thread and raises `TransportError` when the way is gone."""

    @property
    def name(self) -> str:
        """How the user named it, e.g. `vfio-user:/run/ism/device.sock`."""
        ...

    @property
    def tells_of_loss(self) -> bool:
        """Whether `on_gone` is called when the device dies; else its registers read all ones, and one has to look."""
        ...

    def start(self, watcher: Watcher, on_gone: Callable[[str], None]) -> None:
        """Begin background work on `watcher`; `on_gone(reason)` is called at most once, when the device is lost."""
        ...

    def answer_fds(self) -> Sequence[int]:
        """Descriptors, given to the watcher by `start`, on which the device asks for what a command needs."""
        ...

    def config_read(self, offset: int, length: int) -> bytes:
        """Read PCI configuration space."""
        ...

    def config_write(self, offset: int, data: bytes) -> None:
        """Write PCI configuration space."""
        ...

    def bar_size(self, bar: int) -> int:
        """Bytes of the BAR, 0 when the function does not have it."""
        ...

    def bar_read(self, bar: int, offset: int, length: int) -> bytes:
        """Read registers: `length` 1, 2, 4 or 8, naturally aligned, one access."""
        ...

    def bar_write(self, bar: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write registers, one access; `posted`: do not wait until the device has seen it."""
        ...

    def map_spans(self, bar: int, spans: Sequence[Span]) -> Mapping:
        """Map the parts of the BAR, side by side in the order given, into one contiguous range of addresses.

        The mapping is the driver's: it puts zero pages over it (`Mapping.clear`) when the region is let go.
        """
        ...

    def vector_count(self) -> int:
        """MSI-X vectors that can be bound to eventfds."""
        ...

    def set_vectors(self, first: int, eventfds: Sequence[int | None]) -> None:
        """Bind eventfds to the vectors `first`, `first + 1`, ...; None unbinds. The descriptors stay the caller's."""
        ...

    def enable_intx(self) -> int | None:
        """Route the interrupt line (INTx) to a descriptor, for functions without vectors; None when it has no line.

        The descriptor becomes readable when the line was asserted; no more interrupts come then until `rearm_intx`.
        It stays the transport's. The driver allows INTx in the command register itself.
        """
        ...

    def rearm_intx(self) -> None:
        """Make the descriptor of `enable_intx` unreadable and let interrupts through again.

        A line that is asserted still, or again, makes it readable at once: nothing is lost that was raised meanwhile.
        """
        ...

    def dma_alloc(self, size: int) -> DmaBuffer:
        """Get zeroed memory for queues; `size` is rounded up to pages."""
        ...

    def dma_free(self, buffer: DmaBuffer) -> None:
        """Take the buffer out of the device's reach."""
        ...

    def doorbell_fd(self, slot: int) -> int | None:
        """Return an eventfd that rings notify slot `slot` without a register write, or None. Stays the transport's."""
        ...

    def reset(self) -> None:
        """Reset the function."""
        ...

    def close(self) -> None:
        """Let the function go. Mappings that somebody still refers to read as they did or as zero."""
        ...
