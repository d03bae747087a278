# SPDX-License-Identifier: Apache-2.0
"""All regions of one domain: memory, tokens, grants, quotas, who holds what. The decisions behind the control commands.

It answers `ism.device.contract.Registry` and returns what must be done as effects; the only thing it does itself is to
have memory created. A command that is refused changed nothing. Follows the virtio-ism proposal (ALLOC, ATTACH, DETACH,
GRANT, EVENT_VECTOR); where it is silent, this is decided:

- A fresh region grants nothing to others. GRANT is for the owner and for devices with MANAGE, attached or not; it
  cannot name the owner, whose rights are fixed, nor a device that does not exist (both ERR). SET_DEFAULT replaces the
  default set; CLEAN_DEFAULT in it adds nothing, so alone it empties the set.
- Narrowing takes effect on live attachments, widening on later attaches only. An attachment left with neither READ
  nor WRITE is unmapped and stays attached until its holder detaches.
- The second attach of a device counts and returns the same areas, with the rights of the first; asking for more than
  those is PERM_EREAD or PERM_EWRITE: detach and attach again.
- The owner's last detach kills the token; peers keep the memory and are told by a DETACH event.
- A read-only mapping in a client that could open the file again for writing needs the file sealed against new
  writers. From then on an attach that wants WRITE, asked for or by default, is PERM_EWRITE: a region has either a
  fixed set of writers or no read-only readers.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ism.device.contract import (
    READ_WRITE,
    Effect,
    Holder,
    MapChunks,
    Memory,
    Outcome,
    PostEvent,
    SealWrites,
    UnmapChunks,
    WiringChanged,
)
from ism.device.window import Window
from ism.ids import DevId, Gid, Token
from ism.manager.directory import Directory
from ism.manager.quota import DomainAccount, Quota
from ism.manager.regions import NOTHING, Attachment, Device, Region
from ism.memory import create_memfd
from ism.virtio.ism_spec import Ack, EventType, PeerEvent, Permission, UpdateEvent

# Plain integers: the complement of a flag has only known bits, so it would let unknown ones through.
RW_BITS = int(READ_WRITE)
ALL_PERMISSIONS = int(READ_WRITE | Permission.ATTACH | Permission.MANAGE | Permission.CLEAN_DEFAULT)


def random_token() -> int:
    """Draw 64 bits from the operating system's generator."""
    return secrets.randbits(64)


@dataclass(frozen=True, slots=True)
class Piece:
    """What lies at an offset of a window: `length` bytes of `memory` from `file_offset`, with `rights`."""

    memory: Memory
    file_offset: int
    length: int
    rights: Permission


class DomainRegistry:
    """The regions of one domain. Every call is synchronous and bounded by the holders of the region that it names.

    Attributes: `gid`, `chunk_size`, `account` (bytes of the domain), `devices`, `regions` (both to be read only);
    `directory` (who of these devices listens where).
    """

    def __init__(
        self,
        gid: Gid,
        chunk_size: int,
        *,
        bytes_limit: int = 0,
        create_memory: Callable[[str, int], int] = create_memfd,
        new_token: Callable[[], int] = random_token,
    ) -> None:
        """Start empty.

        Args:
            gid: the domain, not 0.
            chunk_size: unit of allocation, bytes.
            bytes_limit: bytes of all regions together, 0 = no limit.
            create_memory: makes a sealed memory file from a name and a size; may raise OSError.
            new_token: draws a random 64-bit number.
        """
        self.gid = gid
        self.chunk_size = chunk_size
        self.account = DomainAccount(bytes_limit)
        self.directory = Directory()
        self.devices: dict[DevId, Device] = {}
        self.regions: dict[Token, Region] = {}
        self._create_memory = create_memory
        self._new_token = new_token

    # -- devices ---------------------------------------------------------------------------------------------------

    def add_device(self, devid: DevId, window_size: int, quota: Quota, *, can_reopen: bool = True) -> Device:
        """Make a device known: it can be granted rights and use the commands.

        Args: `can_reopen` False only when its client never gets a descriptor (trapped access).
        Raises: ValueError for devid 0, one that is known, or a window that is no multiple of the chunk size.
        """
        if not devid or devid in self.devices:
            raise ValueError(f"devid {devid:#x} is 0 or already in domain {self.gid:#x}")
        device = Device(devid, Window(self.chunk_size, window_size), quota, can_reopen)
        self.devices[devid] = device
        self.directory.add(devid)
        return device

    def remove_device(self, devid: DevId) -> Sequence[Effect]:
        """Release everything the device holds and forget it, with the grants that name it."""
        effects = self.reset(devid)
        self.directory.remove(devid)
        device = self.devices.pop(devid)
        for region in device.granted_in:
            del region.grants[devid]
        return effects

    # -- commands --------------------------------------------------------------------------------------------------

    def alloc(self, devid: DevId, size: int, max_areas: int) -> Outcome:
        """Make a region of `size` bytes rounded up to chunks, owned by and attached to `devid`, mapped read-write."""
        device = self.devices[devid]
        if size <= 0:
            return self._refuse(device, Ack.ERR)
        size = -(-size // self.chunk_size) * self.chunk_size
        if not device.account.may_own(size) or not self.account.may_add(size):
            return self._refuse(device, Ack.ENOMEM)
        areas = device.window.plan(size, max_areas)
        if areas is None:
            return self._refuse(device, Ack.ENOSPC)
        if len(areas) > max_areas:
            return self._refuse(device, Ack.E2BIG, len(areas))
        try:
            memory = Memory(self._create_memory(f"ism:{devid:x}", size), size)
        except OSError:
            return self._refuse(device, Ack.ENOMEM)
        token = Token(self._new_token())
        while not token or token in self.regions:
            token = Token(self._new_token())
        region = Region(token, devid, memory)
        self.regions[token] = region
        device.account.own(size)
        self.account.add(size)
        attachment = device.hold(region, tuple(areas), READ_WRITE)
        effects: list[Effect] = []
        self._map(attachment, effects)
        effects.append(WiringChanged(token))
        return Outcome(Ack.OK, token, attachment.areas, effects=effects)

    def attach(self, devid: DevId, token: Token, rw_perm: int, max_areas: int) -> Outcome:
        """Attach with the rights `rw_perm` (0 = all that is granted). One more attach counts: the same areas."""
        device = self.devices[devid]
        region = self.regions.get(token)
        if region is None or not region.alive:
            return self._refuse(device, Ack.ENOENT)
        if rw_perm & ~RW_BITS:
            return self._refuse(device, Ack.ERR)
        granted = region.granted(devid)
        if not granted & Permission.ATTACH:
            return self._refuse(device, Ack.PERM_EATTACH)
        held = region.holders.get(devid)
        allowed = held.rights if held is not None else granted & READ_WRITE
        wanted = Permission(rw_perm) or allowed
        if not wanted or wanted & ~allowed & Permission.READ:
            return self._refuse(device, Ack.PERM_EREAD)
        if wanted & ~allowed:
            return self._refuse(device, Ack.PERM_EWRITE)
        if held is not None:
            if len(held.areas) > max_areas:
                return self._refuse(device, Ack.E2BIG, len(held.areas))
            held.count += 1
            return Outcome(Ack.OK, token, held.areas)
        if wanted & Permission.WRITE and region.sealed:
            return self._refuse(device, Ack.PERM_EWRITE)
        if not device.account.may_attach():
            return self._refuse(device, Ack.ENOMEM)
        areas = device.window.plan(region.size, max_areas)
        if areas is None:
            return self._refuse(device, Ack.ENOSPC)
        if len(areas) > max_areas:
            return self._refuse(device, Ack.E2BIG, len(areas))
        device.account.attach()
        attachment = device.hold(region, tuple(areas), wanted)
        effects: list[Effect] = []
        self._map(attachment, effects)
        self._tell(region, EventType.ATTACH, devid, effects)
        effects.append(WiringChanged(token))
        return Outcome(Ack.OK, token, attachment.areas, effects=effects)

    def detach(self, devid: DevId, token: Token) -> Outcome:
        """Undo one attach; the last one unmaps. By the owner: the token dies, peers keep the memory."""
        device = self.devices[devid]
        attachment = device.attachments.get(token)
        if attachment is None:
            return self._refuse(device, Ack.ENOENT)
        effects: list[Effect] = []
        attachment.count -= 1
        if not attachment.count:
            self._release(attachment, effects)
        return Outcome(Ack.OK, token, effects=effects)

    def grant_default(self, devid: DevId, token: Token, permissions: int) -> Outcome:
        """Set what devices without an entry may do. For owner and MANAGE holders."""
        device = self.devices[devid]
        region, ack = self._managed(devid, token, permissions)
        if region is None:
            return self._refuse(device, ack)
        region.default = Permission(permissions) & ~Permission.CLEAN_DEFAULT
        effects: list[Effect] = []
        self._narrow(region, region.holders.values(), effects)
        return Outcome(Ack.OK, token, effects=effects)

    def grant_device(self, devid: DevId, token: Token, permissions: int, peer: DevId) -> Outcome:
        """Set what one device may do; CLEAN_DEFAULT empties the default too."""
        device = self.devices[devid]
        region, ack = self._managed(devid, token, permissions)
        if region is None:
            return self._refuse(device, ack)
        if peer == region.owner or peer not in self.devices:
            return self._refuse(device, Ack.ERR)
        region.grants[peer] = Permission(permissions) & ~Permission.CLEAN_DEFAULT
        self.devices[peer].granted_in.add(region)
        effects: list[Effect] = []
        if permissions & Permission.CLEAN_DEFAULT:
            region.default = NOTHING
            self._narrow(region, region.holders.values(), effects)
        elif peer in region.holders:
            self._narrow(region, (region.holders[peer],), effects)
        return Outcome(Ack.OK, token, effects=effects)

    def event_vector(self, devid: DevId, token: Token, vector: int | None) -> Outcome:
        """Bind the region's doorbell to a vector of `devid` (None unbinds)."""
        device = self.devices[devid]
        attachment = device.attachments.get(token)
        if attachment is None:
            return self._refuse(device, Ack.ENOENT)
        if attachment.vector == vector:
            return Outcome(Ack.OK, token)
        disturbed = device.bind(attachment, vector)
        effects: list[Effect] = [WiringChanged(token)]
        effects.extend(WiringChanged(other) for other in disturbed)
        return Outcome(Ack.OK, token, effects=effects)

    def doorbell(self, devid: DevId, slot: int) -> Sequence[Effect]:
        """Tell all other holders of the region whose chunk `slot` is. Unknown slots: no effect, counted."""
        device = self.devices[devid]
        attachment = device.at_slot(slot)
        if attachment is None:
            device.stats.unknown_doorbells += 1
            return ()
        device.stats.doorbells += 1
        return self._ring(attachment)

    def ring(self, devid: DevId, token: Token) -> Sequence[Effect]:
        """Do as `doorbell` does, for a device that rang by other means. Not a holder (any more): no effect."""
        device = self.devices.get(devid)
        attachment = device.attachments.get(token) if device is not None else None
        if device is None or attachment is None:
            return ()
        device.stats.doorbells += 1
        return self._ring(attachment)

    def reset(self, devid: DevId) -> Sequence[Effect]:
        """Release everything the device holds; tokens that it owned are dead. The device stays known."""
        effects: list[Effect] = []
        for attachment in list(self.devices[devid].attachments.values()):
            self._release(attachment, effects)
        self.directory.forget(devid)
        return effects

    # -- what the host asks ----------------------------------------------------------------------------------------

    def holders(self, token: Token) -> Sequence[Holder]:
        """List who holds the region now, dead or alive; nobody for an unknown token. Linear in the holders."""
        region = self.regions.get(token)
        if region is None:
            return ()
        return [
            Holder(devid, held.offset // self.chunk_size, held.offset, held.vector)
            for devid, held in region.holders.items()
        ]

    def shares_vector(self, devid: DevId, vector: int) -> bool:
        """Tell whether more than one region of the device is bound to the vector."""
        return len(self.devices[devid].by_vector.get(vector, ())) > 1

    def tokens_on_vector(self, devid: DevId, vector: int) -> Sequence[Token]:
        """List the regions of the device that are bound to the vector."""
        return tuple(self.devices[devid].by_vector.get(vector, ()))

    def piece_at(self, devid: DevId, offset: int) -> Piece | None:
        """Find what lies at a byte of a device's window, up to the end of its area; None for zero pages."""
        device = self.devices[devid]
        area = device.window.area_at(offset // self.chunk_size)
        if area is None:
            return None
        attachment, file_offset = device.by_area[area.offset]
        inside = offset - area.offset
        return Piece(attachment.region.memory, file_offset + inside, area.size - inside, attachment.rights)

    # -- inner -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _refuse(device: Device, ack: Ack, slots_needed: int = 0) -> Outcome:
        device.stats.refused += 1
        return Outcome(ack, slots_needed=slots_needed)

    def _managed(self, devid: DevId, token: Token, permissions: int) -> tuple[Region | None, Ack]:
        region = self.regions.get(token)
        if region is None or not region.alive:
            return None, Ack.ENOENT
        if permissions & ~ALL_PERMISSIONS or not region.granted(devid) & Permission.MANAGE:
            return None, Ack.ERR
        return region, Ack.OK

    @staticmethod
    def _map(attachment: Attachment, effects: list[Effect]) -> None:
        region, device = attachment.region, attachment.device
        if not attachment.rights & Permission.WRITE and device.can_reopen and not region.sealed:
            region.sealed = True
            effects.append(SealWrites(region.memory))
        at = 0
        for area in attachment.areas:
            effects.append(MapChunks(device.devid, area.offset, area.size, region.memory, at, attachment.rights))
            at += area.size

    @staticmethod
    def _unmap(attachment: Attachment, effects: list[Effect]) -> None:
        devid = attachment.device.devid
        effects.extend(UnmapChunks(devid, area.offset, area.size) for area in attachment.areas)

    def _narrow(self, region: Region, affected: Iterable[Attachment], effects: list[Effect]) -> None:
        for attachment in affected:
            rights = attachment.rights & region.granted(attachment.device.devid)
            if rights == attachment.rights:
                continue
            attachment.rights = rights
            if rights:
                self._map(attachment, effects)
            else:
                self._unmap(attachment, effects)

    def _release(self, attachment: Attachment, effects: list[Effect]) -> None:
        device, region = attachment.device, attachment.region
        if attachment.rights:
            self._unmap(attachment, effects)
        effects.extend(WiringChanged(token) for token in device.bind(attachment, None))
        device.release(attachment)
        if device.devid == region.owner:
            region.alive = False
            device.account.disown(region.size)
            for holder in region.holders.values():
                holder.device.account.inherit(region.size)
            for peer in region.grants:
                self.devices[peer].granted_in.discard(region)
            region.grants.clear()
        else:
            device.account.detach(0 if region.alive else region.size)
        self._tell(region, EventType.DETACH, device.devid, effects)
        if not region.holders:
            self.account.remove(region.size)
            del self.regions[region.token]
        effects.append(WiringChanged(region.token))

    @staticmethod
    def _tell(region: Region, kind: EventType, devid: DevId, effects: list[Effect]) -> None:
        peers = len(region.holders)
        for holder in region.holders.values():
            if holder.device.devid != devid:
                event = PeerEvent(ev_type=kind, offset=holder.offset, devid=devid, peers=peers)
                effects.append(PostEvent(holder.device.devid, event.pack()))

    @staticmethod
    def _ring(attachment: Attachment) -> Sequence[Effect]:
        devid = attachment.device.devid
        effects: list[Effect] = []
        for holder in attachment.region.holders.values():
            if holder is attachment:
                continue
            if holder.interrupt is not None:
                effects.append(holder.interrupt)
            else:
                event = UpdateEvent(offset=holder.offset, devid=devid)
                effects.append(PostEvent(holder.device.devid, event.pack()))
        return effects
