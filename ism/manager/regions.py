# SPDX-License-Identifier: Apache-2.0
"""The records of the registry: a region, a device, and the attachment that ties one to the other.

They hold state and keep their own indexes consistent; decisions, acks and effects are made in `registry`. Nothing here
is shared with a guest: chunk offsets and rights are what the manager decided.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ism.device.contract import READ_WRITE, AreaOf, Interrupt, Memory
from ism.device.window import Window
from ism.ids import DevId, Token, WindowOffset
from ism.manager.quota import Account, Quota
from ism.virtio.ism_spec import Permission

NOTHING = Permission(0)


@dataclass(slots=True, eq=False)
class Region:
    """One region: its memory, what may be done with it, who holds it.

    Attributes: `alive`: the token can be attached and granted; False once the owner has let go. `sealed`: no new
    writer is possible. `default` and `grants` are permissions of devices without and with an entry of their own.
    """

    token: Token
    owner: DevId
    memory: Memory
    alive: bool = True
    sealed: bool = False
    default: Permission = NOTHING
    grants: dict[DevId, Permission] = field(default_factory=dict)
    holders: dict[DevId, Attachment] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes, a multiple of the domain's chunk size."""
        return self.memory.size

    def granted(self, devid: DevId) -> Permission:
        """Permissions of a device; the owner has all of them."""
        if devid == self.owner:
            return READ_WRITE | Permission.ATTACH | Permission.MANAGE
        return self.grants.get(devid, self.default)


@dataclass(slots=True, eq=False)
class Attachment:
    """One device's hold on one region: where it is in the device's window, and with which rights.

    `count` is how many attaches were not undone yet. `interrupt` is the effect that rings the bound vector.
    """

    device: Device
    region: Region
    areas: tuple[AreaOf, ...]
    rights: Permission
    count: int = 1
    interrupt: Interrupt | None = None

    @property
    def offset(self) -> WindowOffset:
        """Where the region begins in the device's window."""
        return self.areas[0].offset

    @property
    def vector(self) -> int | None:
        """The bound vector, None when there is none."""
        return self.interrupt.vector if self.interrupt is not None else None


@dataclass(slots=True)
class DeviceStats:
    """Counters of one device since it was added, or its last client came: commands refused, doorbells."""

    refused: int = 0
    doorbells: int = 0
    unknown_doorbells: int = 0


class Device:
    """One device: its window, what it holds, what that costs.

    Attributes: `can_reopen`: its client could open a file it was handed again for writing, so a read-only mapping
    needs the seal. `granted_in`: regions with an entry for this device. `by_area`: start of each area ->
    (attachment, offset of that area in the region).
    """

    __slots__ = (
        "account",
        "attachments",
        "by_area",
        "by_vector",
        "can_reopen",
        "devid",
        "granted_in",
        "stats",
        "window",
    )

    def __init__(self, devid: DevId, window: Window, quota: Quota, can_reopen: bool) -> None:
        self.devid = devid
        self.window = window
        self.account = Account(quota)
        self.can_reopen = can_reopen
        self.attachments: dict[Token, Attachment] = {}
        self.by_area: dict[int, tuple[Attachment, int]] = {}
        self.by_vector: dict[int, dict[Token, Attachment]] = {}
        self.granted_in: set[Region] = set()
        self.stats = DeviceStats()

    def hold(self, region: Region, areas: tuple[AreaOf, ...], rights: Permission) -> Attachment:
        """Take the areas and enter the attachment everywhere."""
        self.window.take(areas)
        attachment = Attachment(self, region, areas, rights)
        self.attachments[region.token] = attachment
        region.holders[self.devid] = attachment
        at = 0
        for area in areas:
            self.by_area[area.offset] = (attachment, at)
            at += area.size
        return attachment

    def release(self, attachment: Attachment) -> None:
        """Take back `hold`; the vector must be unbound."""
        assert attachment.interrupt is None
        for area in attachment.areas:
            del self.by_area[area.offset]
        self.window.give_back(attachment.areas)
        del attachment.region.holders[self.devid]
        del self.attachments[attachment.region.token]

    def at_slot(self, slot: int) -> Attachment | None:
        """Find whose chunk a notify slot is, None for a free or impossible one. Logarithmic."""
        area = self.window.area_at(slot)
        return None if area is None else self.by_area[area.offset][0]

    def bind(self, attachment: Attachment, vector: int | None) -> list[Token]:
        """Bind to a vector or unbind; return the other regions that begin or cease to share a vector by it."""
        disturbed: list[Token] = []
        token = attachment.region.token
        if attachment.interrupt is not None:
            users = self.by_vector[attachment.interrupt.vector]
            del users[token]
            if not users:
                del self.by_vector[attachment.interrupt.vector]
            elif len(users) == 1:
                disturbed.extend(users)
        attachment.interrupt = None
        if vector is not None:
            users = self.by_vector.setdefault(vector, {})
            if len(users) == 1:
                disturbed.extend(users)
            users[token] = attachment
            attachment.interrupt = Interrupt(self.devid, vector)
        return disturbed
