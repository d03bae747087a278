# SPDX-License-Identifier: Apache-2.0
"""Several devices do anything in any order; a simple model says what the registry must then hold and charge."""

from __future__ import annotations

import gc
import itertools
import os
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ism.device.contract import MapChunks, UnmapChunks, WiringChanged
from ism.ids import DevId, Gid, Token
from ism.manager.quota import Quota
from ism.manager.registry import DomainRegistry
from ism.virtio.ism_spec import Ack

CHUNK = 4096
WINDOW = 16 * CHUNK
QUOTA = Quota(bytes=8 * CHUNK, regions=4, attachments=3)
DOMAIN_BYTES = 20 * CHUNK
READ, WRITE, ATTACH, MANAGE, CLEAN = 1, 2, 4, 8, 16

devids = st.integers(1, 4)
any_u64 = st.one_of(st.integers(0, 40), st.integers(0, (1 << 64) - 1))


@dataclass
class ModelRegion:
    """`holders`: devid -> [count, rights]."""

    owner: int
    chunks: int
    alive: bool = True
    sealed: bool = False
    default: int = 0
    grants: dict[int, int] = field(default_factory=dict)
    holders: dict[int, list[int]] = field(default_factory=dict)

    def granted(self, devid: int) -> int:
        return 15 if devid == self.owner else self.grants.get(devid, self.default)


class RegistryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.fds: set[int] = set()
        counter = itertools.count(1)
        self.registry = DomainRegistry(
            Gid(1), CHUNK, bytes_limit=DOMAIN_BYTES, create_memory=self.create, new_token=lambda: next(counter) % 50
        )
        self.regions: dict[int, ModelRegion] = {}
        self.present: set[int] = set()
        self.mapped: dict[int, dict[int, int]] = {}

    def create(self, name: str, size: int) -> int:
        fd = os.memfd_create(name)
        self.fds.add(os.fstat(fd).st_ino)
        return fd

    @initialize()
    def start(self) -> None:
        for devid in range(1, 5):
            self.add(devid)

    def add(self, devid: int) -> None:
        self.registry.add_device(DevId(devid), WINDOW, QUOTA)
        self.present.add(devid)
        self.mapped[devid] = {}

    def carry_out(self, effects: object) -> None:
        """Do what a host would with the windows: a chunk is mapped at most once, an unmap hits what is mapped."""
        for effect in effects:  # type: ignore[attr-defined]
            if isinstance(effect, MapChunks):
                for chunk in range(effect.offset // CHUNK, (effect.offset + effect.length) // CHUNK):
                    self.mapped[effect.devid][chunk] = int(effect.rights)
            elif isinstance(effect, UnmapChunks):
                for chunk in range(effect.offset // CHUNK, (effect.offset + effect.length) // CHUNK):
                    assert self.mapped[effect.devid].pop(chunk)

    def charged(self, devid: int) -> int:
        return sum(
            region.chunks * CHUNK
            for region in self.regions.values()
            if (region.alive and region.owner == devid) or (not region.alive and devid in region.holders)
        )

    def attachments(self, devid: int) -> int:
        return sum(devid in region.holders and region.owner != devid for region in self.regions.values())

    def owned(self, devid: int) -> int:
        return sum(region.alive and region.owner == devid for region in self.regions.values())

    def used(self, devid: int) -> int:
        return sum(region.chunks for region in self.regions.values() if devid in region.holders)

    def release(self, devid: int, token: int) -> None:
        region = self.regions[token]
        del region.holders[devid]
        if devid == region.owner:
            region.alive = False
        if not region.holders:
            del self.regions[token]

    @rule(devid=devids, size=st.one_of(st.integers(0, 6 * CHUNK), any_u64), slots=st.integers(0, 3))
    def alloc(self, devid: int, size: int, slots: int) -> None:
        if devid not in self.present:
            return
        outcome = self.registry.alloc(DevId(devid), size, slots)
        chunks = -(-size // CHUNK)
        domain = sum(region.chunks for region in self.regions.values()) * CHUNK
        if not size:
            assert outcome.ack == Ack.ERR
        elif (
            self.charged(devid) + chunks * CHUNK > QUOTA.bytes
            or self.owned(devid) >= QUOTA.regions
            or domain + chunks * CHUNK > DOMAIN_BYTES
        ):
            assert outcome.ack == Ack.ENOMEM
        elif self.used(devid) + chunks > WINDOW // CHUNK:
            assert outcome.ack == Ack.ENOSPC
        elif outcome.ack == Ack.E2BIG:
            assert outcome.slots_needed > slots
        else:
            assert outcome.ack == Ack.OK
            assert outcome.token
            assert outcome.token not in self.regions
            self.regions[outcome.token] = ModelRegion(devid, chunks, holders={devid: [1, 3]})
        if outcome.ack != Ack.OK:
            assert not outcome.effects
        self.carry_out(outcome.effects)

    @rule(devid=devids, token=any_u64, perm=st.one_of(st.integers(0, 3), any_u64), slots=st.integers(0, 3))
    def attach(self, devid: int, token: int, perm: int, slots: int) -> None:
        if devid not in self.present:
            return
        outcome = self.registry.attach(DevId(devid), Token(token), perm & 0xFFFFFFFF, slots)
        perm &= 0xFFFFFFFF
        region = self.regions.get(token)
        if outcome.ack != Ack.OK:
            assert not outcome.effects
        if region is None or not region.alive:
            assert outcome.ack == Ack.ENOENT
            return
        if perm > 3:
            assert outcome.ack == Ack.ERR
            return
        granted = region.granted(devid)
        if not granted & ATTACH:
            assert outcome.ack == Ack.PERM_EATTACH
            return
        allowed = region.holders[devid][1] if devid in region.holders else granted & 3
        wanted = perm or allowed
        if not wanted or wanted & ~allowed & READ:
            assert outcome.ack == Ack.PERM_EREAD
        elif wanted & ~allowed & WRITE:
            assert outcome.ack == Ack.PERM_EWRITE
        elif devid in region.holders:
            if outcome.ack == Ack.OK:
                region.holders[devid][0] += 1
            else:
                assert outcome.ack == Ack.E2BIG
                assert outcome.slots_needed > slots
        elif wanted & WRITE and region.sealed:
            assert outcome.ack == Ack.PERM_EWRITE
        elif self.attachments(devid) >= QUOTA.attachments or self.charged(devid) > QUOTA.bytes:
            assert outcome.ack == Ack.ENOMEM
        elif self.used(devid) + region.chunks > WINDOW // CHUNK:
            assert outcome.ack == Ack.ENOSPC
        elif outcome.ack != Ack.E2BIG:
            assert outcome.ack == Ack.OK
            region.holders[devid] = [1, wanted]
            region.sealed |= not wanted & WRITE
        self.carry_out(outcome.effects)

    @rule(devid=devids, token=any_u64)
    def detach(self, devid: int, token: int) -> None:
        if devid not in self.present:
            return
        outcome = self.registry.detach(DevId(devid), Token(token))
        region = self.regions.get(token)
        if region is None or devid not in region.holders:
            assert outcome.ack == Ack.ENOENT
            return
        assert outcome.ack == Ack.OK
        region.holders[devid][0] -= 1
        if not region.holders[devid][0]:
            self.release(devid, token)
        self.carry_out(outcome.effects)

    @rule(devid=devids, token=any_u64, permissions=st.one_of(st.integers(0, 31), any_u64), peer=st.integers(0, 5))
    def grant(self, devid: int, token: int, permissions: int, peer: int) -> None:
        """`peer` 0 sets the default."""
        if devid not in self.present:
            return
        if peer:
            outcome = self.registry.grant_device(DevId(devid), Token(token), permissions, DevId(peer))
        else:
            outcome = self.registry.grant_default(DevId(devid), Token(token), permissions)
        region = self.regions.get(token)
        if region is None or not region.alive:
            assert outcome.ack == Ack.ENOENT
            return
        if permissions > 31 or not region.granted(devid) & MANAGE:
            assert outcome.ack == Ack.ERR
            return
        if peer and (peer == region.owner or peer not in self.present):
            assert outcome.ack == Ack.ERR
            return
        assert outcome.ack == Ack.OK
        if peer:
            region.grants[peer] = permissions & 15
            if permissions & CLEAN:
                region.default = 0
        else:
            region.default = permissions & 15
        for holder, held in region.holders.items():
            narrowed = held[1] & region.granted(holder)
            if narrowed != held[1]:
                held[1] = narrowed
                region.sealed |= narrowed == READ
        self.carry_out(outcome.effects)

    @rule(devid=devids, token=any_u64, vector=st.one_of(st.none(), st.integers(0, 3)))
    def bind(self, devid: int, token: int, vector: int | None) -> None:
        if devid not in self.present:
            return
        outcome = self.registry.event_vector(DevId(devid), Token(token), vector)
        region = self.regions.get(token)
        held = region is not None and devid in region.holders
        assert outcome.ack == (Ack.OK if held else Ack.ENOENT)
        assert all(isinstance(effect, WiringChanged) for effect in outcome.effects)

    @rule(devid=devids, slot=st.integers(0, 20))
    def ring(self, devid: int, slot: int) -> None:
        if devid not in self.present:
            return
        effects = self.registry.doorbell(DevId(devid), slot)
        piece = self.registry.piece_at(DevId(devid), slot * CHUNK)
        if piece is None:
            assert not effects

    @rule(devid=devids)
    def reset(self, devid: int) -> None:
        if devid not in self.present:
            return
        self.carry_out(self.registry.reset(DevId(devid)))
        for token in [token for token, region in self.regions.items() if devid in region.holders]:
            self.release(devid, token)

    @rule(devid=devids)
    def come_or_go(self, devid: int) -> None:
        if devid not in self.present:
            self.add(devid)
            return
        self.carry_out(self.registry.remove_device(DevId(devid)))
        self.present.discard(devid)
        for token in [token for token, region in self.regions.items() if devid in region.holders]:
            self.release(devid, token)
        for region in self.regions.values():
            region.grants.pop(devid, None)

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        assert {int(token) for token in self.registry.regions} == set(self.regions)
        assert self.registry.account.bytes == sum(region.chunks * CHUNK for region in self.regions.values())
        for token, region in self.regions.items():
            real = self.registry.regions[Token(token)]
            assert {
                int(devid): [held.count, int(held.rights)] for devid, held in real.holders.items()
            } == region.holders
            assert (real.alive, real.sealed) == (region.alive, region.sealed)
        assert set(self.registry.devices) == self.present
        for devid in self.present:
            device = self.registry.devices[DevId(devid)]
            assert device.account.bytes == self.charged(devid)
            assert device.account.regions == self.owned(devid)
            assert device.account.attachments == self.attachments(devid)
            assert device.window.free_bytes == WINDOW - self.used(devid) * CHUNK
            assert sum(len(users) for users in device.by_vector.values()) == sum(
                held.vector is not None for held in device.attachments.values()
            )
            rights = {
                chunk: int(held.rights)
                for held in device.attachments.values()
                for area in held.areas
                for chunk in range(area.offset // CHUNK, (area.offset + area.size) // CHUNK)
                if held.rights
            }
            assert self.mapped[devid] == rights

    def teardown(self) -> None:
        for devid in sorted(self.present):
            self.registry.remove_device(DevId(devid))
        assert not self.registry.regions
        assert self.registry.account.bytes == 0
        gc.collect()
        still_open = {os.stat(f"/proc/self/fd/{fd}").st_ino for fd in os.listdir("/proc/self/fd") if _is_open(fd)}
        assert not self.fds & still_open


def _is_open(fd: str) -> bool:
    try:
        os.stat(f"/proc/self/fd/{fd}")
    except OSError:
        return False
    return "/memfd:" in os.readlink(f"/proc/self/fd/{fd}")


TestRegistryModel = RegistryMachine.TestCase
TestRegistryModel.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
