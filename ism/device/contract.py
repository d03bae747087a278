# SPDX-License-Identifier: Apache-2.0
"""What passes between an emulated device, the registry of regions behind it, and the host that serves both.

Three parties, none of which does I/O here:

- the *function* (`ism.device.function`) is one PCI function: registers, virtqueues, control commands. It parses what
  the guest wrote, asks the registry, and writes the reply. It trusts nothing from the guest.
- the *registry* (`ism.manager.registry`) owns every region of a host: memory, tokens, grants, quotas, who holds what.
- the *host* (`ism.manager.devices`, or the in-memory fabric of `ism.testing`) carries out effects in the order in which
  they were returned: it maps and unmaps chunks, raises interrupts, posts events, rewires doorbells.

Order that the host must keep: the effects of one `Outcome` that name the requesting device are in place before the
command is completed (a mapping exists before the ack that announces it, and is gone before the ack that ends it).
Effects on other devices are started in order but not waited for: a victim never waits for its peers.

One command, CLAIM, is decided only when it is completed, and takes effect once its ack is where the driver sees it
(`Decision.commit`): should the manager die, or the claimer's device break, then either nothing has happened, or the
claimer knows of it. The event that tells the client comes after it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ism.ids import DevId, Token, WindowOffset
from ism.virtio.ism_spec import (
    Ack,
    ClaimRequest,
    IntendRequest,
    ListenerRequest,
    Permission,
    RetractRequest,
    StartRequest,
)

READ_WRITE = Permission.READ | Permission.WRITE


class Memory:
    """The memory of one region: a sealed memory file. The descriptor is closed when nothing refers to this any more.

    Attributes: `fd` (borrowed: valid while this object is referenced), `size` (bytes).
    """

    __slots__ = ("__weakref__", "fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        """Take ownership of `fd`."""
        self.fd, self.size = fd, size

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


@dataclass(frozen=True, slots=True)
class AreaOf:
    """A run of chunks in one device's window (bytes)."""

    offset: WindowOffset
    size: int


@dataclass(frozen=True, slots=True)
class MapChunks:
    """Make `length` bytes of `memory` from `file_offset` appear at `offset` of the device's window, rights exact.

    Replaces what was mapped there (a narrowed right remaps). `rights` is READ, READ|WRITE (or WRITE, treated as both).
    """

    devid: DevId
    offset: WindowOffset
    length: int
    memory: Memory
    file_offset: int
    rights: Permission


@dataclass(frozen=True, slots=True)
class UnmapChunks:
    """Put zero pages over the chunks of the device's window."""

    devid: DevId
    offset: WindowOffset
    length: int


@dataclass(frozen=True, slots=True)
class SealWrites:
    """Allow no new writable mapping of `memory` from now on; the existing ones stay. Before a read-only mapping."""

    memory: Memory


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Raise MSI-X vector `vector` of the device (INTx when MSI-X is not enabled)."""

    devid: DevId
    vector: int


@dataclass(frozen=True, slots=True)
class PostEvent:
    """Put `payload` on the device's event queue when it has one; else drop it."""

    devid: DevId
    payload: bytes


@dataclass(frozen=True, slots=True)
class WiringChanged:
    """Holders or vectors of the region changed: whoever rings it must reach the others. Token may be dead by now."""

    token: Token


Effect = MapChunks | UnmapChunks | SealWrites | Interrupt | PostEvent | WiringChanged


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the registry decided about one command.

    `ack` OK: the change is made; the fields that the command's reply needs are set. Any other ack: nothing changed.
    `slots_needed` is set with E2BIG.
    """

    ack: Ack
    token: int = 0
    areas: Sequence[AreaOf] = ()
    slots_needed: int = 0
    effects: Sequence[Effect] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What the directory decided about one command.

    `reply` is the data behind the ack. `commit` makes the change, returns effects to be carried out, and is called at
    once when the ack is written, or never; without it the change is made already. Any ack but OK: nothing changed.
    """

    ack: Ack
    reply: bytes = b""
    effects: Sequence[Effect] = ()
    commit: Callable[[], Sequence[Effect]] | None = None


@dataclass(frozen=True, slots=True)
class Holder:
    """One device that holds a region: `slot` = index of its first chunk = its notify slot; `vector` None = unbound."""

    devid: DevId
    slot: int
    offset: WindowOffset
    vector: int | None


class DirectoryService(Protocol):
    """Who listens where, and which connections are about to be made. Every call is synchronous and takes constant time.

    A device's entries go when the registry resets or removes it.
    """

    def publish(self, devid: DevId, request: ListenerRequest) -> Decision:
        """Count one more listener of the device. Acks: ERR (wildcard, port 0, another device's address), ENOMEM."""
        ...

    def withdraw(self, devid: DevId, request: ListenerRequest) -> Decision:
        """Undo one `publish`. Ack: ENOENT."""
        ...

    def lookup(self, devid: DevId, request: ListenerRequest) -> Decision:
        """Reply how many devices publish the destination (LookupReply). Ack: ENOENT when none does."""
        ...

    def intend(self, devid: DevId, request: IntendRequest) -> Decision:
        """Record a connection that the device is about to make; its older intent of the same four-tuple goes anyway.

        Acks: ENOENT (nobody publishes the destination), ERR (nonce or port 0, nonce or four-tuple in use, another
        device's address), ENOMEM.
        """
        ...

    def claim(self, devid: DevId, request: ClaimRequest) -> Decision:
        """Find the intent of an accepted connection (ClaimReply); `commit` takes it and tells the client (CLAIMED).

        Ack: ENOENT (no such intent, or the device does not publish its destination).
        """
        ...

    def retract(self, devid: DevId, request: RetractRequest) -> Decision:
        """Remove an intent of the device. Ack: ENOENT when it is claimed, or was never made."""
        ...

    def start(self, devid: DevId, request: StartRequest) -> Decision:
        """Tell the client of an intent that the device has claimed (START), once. Ack: ENOENT."""
        ...


class Registry(Protocol):
    """The regions of one host, as a device's command handlers see them. Every call is synchronous and bounded."""

    @property
    def directory(self) -> DirectoryService:
        """The directory of the same devices."""
        ...

    def alloc(self, devid: DevId, size: int, max_areas: int) -> Outcome:
        """Make a region of `size` bytes rounded up to chunks, owned by and attached to `devid`, mapped read-write.

        Acks: ERR (size 0), ENOMEM (quota or host memory), ENOSPC (window full), E2BIG (more than `max_areas` areas).
        """
        ...

    def attach(self, devid: DevId, token: Token, rw_perm: int, max_areas: int) -> Outcome:
        """Attach with the rights `rw_perm` (0 = all that is granted). A further one counts, returns the same areas.

        Acks: ENOENT, PERM_EATTACH, PERM_EREAD, PERM_EWRITE, ERR (unknown rw_perm bits), ENOMEM, ENOSPC, E2BIG.
        """
        ...

    def detach(self, devid: DevId, token: Token) -> Outcome:
        """Undo one attach; the last one unmaps. By the owner: the token dies, peers keep the memory. Ack: ENOENT."""
        ...

    def grant_default(self, devid: DevId, token: Token, permissions: int) -> Outcome:
        """Set what devices without an entry may do. By owner or MANAGE holder. Acks: ENOENT, ERR."""
        ...

    def grant_device(self, devid: DevId, token: Token, permissions: int, peer: DevId) -> Outcome:
        """Set what one device may do; CLEAN_DEFAULT empties the default too. Acks: as `grant_default`."""
        ...

    def event_vector(self, devid: DevId, token: Token, vector: int | None) -> Outcome:
        """Bind the region's doorbell to a vector of `devid` (None unbinds). Ack: ENOENT; range: the caller checks."""
        ...

    def doorbell(self, devid: DevId, slot: int) -> Sequence[Effect]:
        """Tell all other holders of the region whose chunk `slot` is. Unknown slots: no effect, counted."""
        ...

    def reset(self, devid: DevId) -> Sequence[Effect]:
        """Release everything the device holds; tokens that it owned are dead. The device stays registered."""
        ...


class GuestMemory(Protocol):
    """Guest memory as the device reaches it through the DMA maps."""

    def read(self, iova: int, length: int) -> bytes:
        """Copy `length` bytes. Raises `GuestMemoryError` when the range is not mapped readable for the device."""
        ...

    def write(self, iova: int, data: bytes | memoryview) -> None:
        """Copy `data` to guest memory. Raises `GuestMemoryError` when the range is not mapped writable."""
        ...

    def read_u16(self, iova: int) -> int:
        """Load an aligned 16-bit word in one access (little-endian). Raises `GuestMemoryError`."""
        ...

    def write_u16(self, iova: int, value: int) -> None:
        """Store an aligned 16-bit word in one access (little-endian). Raises `GuestMemoryError`."""
        ...


class GuestMemoryError(Exception):
    """A guest address is outside the guest's DMA maps."""


@dataclass(slots=True)
class FunctionConfig:
    """How one device is built. Sizes in bytes.

    `window_size` is a power of two and a multiple of `chunk_size`; `vectors` is the MSI-X table size, 3..2048.
    """

    gid: int
    devid: DevId
    chunk_size: int
    window_size: int
    vectors: int
    features: frozenset[int] = field(default_factory=frozenset)
    name: str = ""
