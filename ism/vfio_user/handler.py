# SPDX-License-Identifier: Apache-2.0
"""What a server needs from a device: the handler's verbs, and the limits it is served within.

Owns no behaviour. Follows the vfio-user specification; each verb stands for one command. Everything a handler is given
has been checked against the protocol and against what the handler itself said of its regions and interrupts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ism.vfio_user import wire
from ism.vfio_user.fds import Fd
from ism.vfio_user.payloads import DeviceInfo, DmaMap, DmaUnmap, IrqInfo, RegionInfo, SetIrqs


class DeviceHandler(Protocol):
    """One device as one client sees it. Calls come one at a time, in the order of the client's messages.

    Raises, for every verb but `closed`: VfioUserError(errno, text) to refuse, which becomes the error reply; any other
    Exception is logged and answered with EIO; the connection goes on either way.
    Cancellation: any await may be cancelled when the connection or the server ends.
    """

    async def version(self, capabilities: Mapping[str, Any], /) -> tuple[Mapping[str, Any], Sequence[Fd]]:
        """Capabilities to add to the VERSION reply, and descriptors to send with it.

        Args:
            capabilities: all keys the client proposed, unchecked.
        Returns: values for keys the client proposed, and descriptors that the server closes once sent.
        """
        ...

    async def device_info(self) -> DeviceInfo:
        """What the device is. Asked once per connection."""
        ...

    async def region_info(self, index: int, /) -> RegionInfo:
        """One region; `index` is below `num_regions`. Its size and flags must stay the same while connected.

        Returns: `fd` stays the handler's, and must stay open until the next call of this handler.
        """
        ...

    async def irq_info(self, index: int, /) -> IrqInfo:
        """One interrupt type; `index` is below `num_irqs`."""
        ...

    async def region_read(self, index: int, offset: int, count: int, /) -> bytes:
        """Exactly `count` bytes; the range is inside a readable region, `count` is at least 1."""
        ...

    async def region_write(self, index: int, offset: int, data: bytes, /) -> None:
        """Take `data`, at least 1 byte; the range is inside a writable region."""
        ...

    async def set_irqs(self, request: SetIrqs, fds: list[Fd], /) -> None:
        """Act on interrupts; the range is inside the type, `fds` has `count` items or none.

        Ownership of `fds` passes to the handler, unless it raises: then the server closes those still open.
        """
        ...

    async def dma_map(self, request: DmaMap, fd: Fd | None, /) -> None:
        """Memory the device may now use; no overlap with another. Ownership of `fd` as in `set_irqs`."""
        ...

    async def dma_unmap(self, request: DmaUnmap, /) -> None:
        """A map that ends: nothing may use it when this returns. `address` and `size` are those of a map."""
        ...

    async def reset(self) -> None:
        """Bring the device into the state it had at first. DMA maps stay."""
        ...

    async def closed(self) -> None:
        """The client is gone. Called exactly once, last, also when the server is cancelled; at most
        `Limits.close_timeout_s` long."""
        ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may ask for.

    Attributes: `max_msg_fds`, `max_data_xfer_size` (bytes), `max_dma_maps`, `pgsizes`, `write_multiple` are told to the
    client, as far as it knows them; QEMU refuses more than 16 descriptors and page sizes under 4096.
    `max_queued_messages`, `max_queued_bytes`: what a client may send while its own request waits for a DMA reply.
    `handshake_timeout_s`: until VERSION; `send_timeout_s`: until a client reads its replies; `dma_timeout_s`: for one
    DMA message; `close_timeout_s`: for the handler's `closed`.
    """

    max_msg_fds: int = 16
    max_data_xfer_size: int = wire.DEFAULT_MAX_DATA_XFER_SIZE
    max_dma_maps: int = 65535
    pgsizes: int = 4096
    write_multiple: bool = True
    max_queued_messages: int = 1024
    max_queued_bytes: int = 4 << 20
    handshake_timeout_s: float = 10.0
    send_timeout_s: float = 5.0
    dma_timeout_s: float = 5.0
    close_timeout_s: float = 5.0


@dataclass
class Stats:
    """Counters of one server, over all its clients. They only grow.

    Attributes: `connections`; `requests` (commands taken); `errors` (refused, all reasons); `malformed` (refused
    because the message was); `failures` (the handler raised something unexpected); `stray_replies`; `descriptors_lost`
    (messages); `dropped` (connections the server ended: garbage, flood, silence, a client that does not read).
    """

    connections: int = 0
    requests: int = 0
    errors: int = 0
    malformed: int = 0
    failures: int = 0
    stray_replies: int = 0
    descriptors_lost: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Peer:
    """Who connected, as the kernel vouches for it at that moment: process, user and group id."""

    pid: int
    uid: int
    gid: int
