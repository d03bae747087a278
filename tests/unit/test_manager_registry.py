# SPDX-License-Identifier: Apache-2.0
"""The decisions of the registry, one by one."""

from __future__ import annotations

import gc
import os
import resource

import pytest

from ism.device.contract import (
    READ_WRITE,
    AreaOf,
    Effect,
    Holder,
    Interrupt,
    MapChunks,
    Outcome,
    PostEvent,
    SealWrites,
    UnmapChunks,
    WiringChanged,
)
from ism.ids import DevId, Gid, Token, WindowOffset
from ism.manager.quota import Quota
from ism.manager.registry import DomainRegistry
from ism.virtio.ism_spec import Ack, EventType, PeerEvent, Permission, UpdateEvent

CHUNK = 4096
WINDOW = 64 * CHUNK
A, B, C = DevId(0xA), DevId(0xB), DevId(0xC)
PLENTY = Quota(bytes=1 << 40, regions=10_000, attachments=10_000)
ATTACH_RW = int(READ_WRITE | Permission.ATTACH)
ATTACH_RO = int(Permission.READ | Permission.ATTACH)


def registry(*devids: DevId, quota: Quota = PLENTY, bytes_limit: int = 0) -> DomainRegistry:
    made = DomainRegistry(Gid(1), CHUNK, bytes_limit=bytes_limit)
    for devid in devids or (A, B, C):
        made.add_device(devid, WINDOW, quota)
    return made


def region_of(reg: DomainRegistry, size: int = CHUNK, *, default: int = ATTACH_RW) -> Token:
    outcome = reg.alloc(A, size, 100)
    assert outcome.ack == Ack.OK
    token = Token(outcome.token)
    assert reg.grant_default(A, token, default).ack == Ack.OK
    return token


def kinds(effects: object) -> list[str]:
    return [type(effect).__name__ for effect in effects]  # type: ignore[attr-defined]


def events(effects: object) -> list[tuple[DevId, PeerEvent]]:
    posts = [effect for effect in effects if isinstance(effect, PostEvent)]  # type: ignore[attr-defined]
    return [(post.devid, PeerEvent.unpack(post.payload)) for post in posts]


def test_alloc_rounds_up_maps_read_write_and_names_the_region() -> None:
    reg = registry()
    outcome = reg.alloc(A, CHUNK + 1, 10)
    assert outcome.ack == Ack.OK
    assert outcome.token != 0
    assert list(outcome.areas) == [AreaOf(WindowOffset(0), 2 * CHUNK)]
    mapped = outcome.effects[0]
    assert isinstance(mapped, MapChunks)
    assert (mapped.devid, mapped.offset, mapped.length, mapped.file_offset) == (A, 0, 2 * CHUNK, 0)
    assert mapped.rights == READ_WRITE
    assert os.fstat(mapped.memory.fd).st_size == 2 * CHUNK
    assert outcome.effects[1] == WiringChanged(Token(outcome.token))


def test_a_region_of_several_areas_maps_each_at_its_place_in_the_file() -> None:
    reg = registry(A)
    blocks = [Token(reg.alloc(A, 16 * CHUNK, 1).token) for _ in range(4)]
    reg.detach(A, blocks[0])
    reg.detach(A, blocks[2])
    refused = reg.alloc(A, 32 * CHUNK, 1)
    assert (refused.ack, refused.slots_needed, refused.effects) == (Ack.E2BIG, 2, ())
    outcome = reg.alloc(A, 32 * CHUNK, 2)
    maps = [effect for effect in outcome.effects if isinstance(effect, MapChunks)]
    assert [(m.offset, m.length, m.file_offset) for m in maps] == [
        (0, 16 * CHUNK, 0),
        (32 * CHUNK, 16 * CHUNK, 16 * CHUNK),
    ]
    piece = reg.piece_at(A, 33 * CHUNK + 5)
    assert piece is not None
    assert (piece.file_offset, piece.length) == (17 * CHUNK + 5, 15 * CHUNK - 5)


def test_a_refused_alloc_says_why_and_changes_nothing() -> None:
    reg = registry(A, quota=Quota(bytes=32 * CHUNK, regions=2, attachments=0))
    assert reg.alloc(A, 0, 10).ack == Ack.ERR
    assert reg.alloc(A, 33 * CHUNK, 10).ack == Ack.ENOMEM
    assert reg.alloc(A, (1 << 64) - 1, 10).ack == Ack.ENOMEM
    assert reg.alloc(A, CHUNK, 0).ack == Ack.E2BIG
    assert reg.alloc(A, CHUNK, 1).ack == Ack.OK
    assert reg.alloc(A, CHUNK, 1).ack == Ack.OK
    assert reg.alloc(A, CHUNK, 1).ack == Ack.ENOMEM
    device = reg.devices[A]
    assert (device.account.bytes, device.account.regions, device.window.free_bytes) == (
        2 * CHUNK,
        2,
        WINDOW - 2 * CHUNK,
    )
    assert device.stats.refused == 5


def test_a_full_window_is_enospc_and_a_full_domain_enomem() -> None:
    reg = registry(A, B, bytes_limit=WINDOW + CHUNK)
    assert reg.alloc(A, WINDOW, 1).ack == Ack.OK
    assert reg.alloc(A, CHUNK, 1).ack == Ack.ENOSPC
    assert reg.alloc(B, 2 * CHUNK, 1).ack == Ack.ENOMEM
    assert reg.alloc(B, CHUNK, 1).ack == Ack.OK


def test_a_host_without_memory_is_enomem_and_charges_nothing() -> None:
    def fail(name: str, size: int) -> int:
        raise OSError(24, "Too many open files")

    reg = DomainRegistry(Gid(1), CHUNK, create_memory=fail)
    reg.add_device(A, WINDOW, PLENTY)
    assert reg.alloc(A, CHUNK, 1).ack == Ack.ENOMEM
    assert reg.devices[A].account.bytes == reg.account.bytes == 0
    assert reg.devices[A].window.free_bytes == WINDOW


def test_token_zero_and_a_token_in_use_are_drawn_again() -> None:
    drawn = iter([0, 7, 7, 0, 8])
    reg = DomainRegistry(Gid(1), CHUNK, new_token=lambda: next(drawn))
    reg.add_device(A, WINDOW, PLENTY)
    assert [reg.alloc(A, CHUNK, 1).token for _ in range(2)] == [7, 8]


def test_a_dead_token_that_a_peer_still_holds_is_not_drawn_again() -> None:
    drawn = iter([7, 7, 8])
    reg = DomainRegistry(Gid(1), CHUNK, new_token=lambda: next(drawn))
    reg.add_device(A, WINDOW, PLENTY)
    reg.add_device(B, WINDOW, PLENTY)
    token = region_of(reg)
    assert reg.attach(B, token, 0, 1).ack == Ack.OK
    reg.detach(A, token)
    assert reg.alloc(A, CHUNK, 1).token == 8


def test_a_fresh_region_grants_nothing_to_others() -> None:
    reg = registry()
    token = Token(reg.alloc(A, CHUNK, 1).token)
    assert reg.attach(B, token, 0, 1).ack == Ack.PERM_EATTACH
    assert reg.grant_default(B, token, ATTACH_RW).ack == Ack.ERR


@pytest.mark.parametrize(
    ("granted", "asked", "ack", "rights"),
    [
        (ATTACH_RW, 0, Ack.OK, READ_WRITE),
        (ATTACH_RW, 1, Ack.OK, Permission.READ),
        (ATTACH_RO, 0, Ack.OK, Permission.READ),
        (ATTACH_RO, 2, Ack.PERM_EWRITE, None),
        (ATTACH_RO, 3, Ack.PERM_EWRITE, None),
        (int(Permission.WRITE | Permission.ATTACH), 3, Ack.PERM_EREAD, None),
        (int(Permission.WRITE | Permission.ATTACH), 0, Ack.OK, Permission.WRITE),
        (int(Permission.ATTACH), 0, Ack.PERM_EREAD, None),
        (int(READ_WRITE), 0, Ack.PERM_EATTACH, None),
        (ATTACH_RW, 4, Ack.ERR, None),
        (ATTACH_RW, 1 << 31, Ack.ERR, None),
    ],
)
def test_the_grant_bounds_what_an_attach_may_ask(granted: int, asked: int, ack: Ack, rights: Permission | None) -> None:
    reg = registry()
    token = region_of(reg, default=granted)
    outcome = reg.attach(B, token, asked, 1)
    assert outcome.ack == ack
    maps = [effect for effect in outcome.effects if isinstance(effect, MapChunks)]
    assert [m.rights for m in maps] == ([] if rights is None else [rights])


def test_an_entry_of_its_own_replaces_the_default_for_a_device() -> None:
    reg = registry()
    token = region_of(reg, default=ATTACH_RW)
    assert reg.grant_device(A, token, 0, B).ack == Ack.OK
    assert reg.attach(B, token, 0, 1).ack == Ack.PERM_EATTACH
    assert reg.attach(C, token, 0, 1).ack == Ack.OK


def test_clean_default_leaves_only_the_entries() -> None:
    reg = registry()
    token = region_of(reg, default=ATTACH_RW)
    assert reg.grant_device(A, token, ATTACH_RW | Permission.CLEAN_DEFAULT, B).ack == Ack.OK
    assert reg.attach(C, token, 0, 1).ack == Ack.PERM_EATTACH
    assert reg.attach(B, token, 0, 1).ack == Ack.OK
    assert reg.grant_default(A, token, int(Permission.CLEAN_DEFAULT)).ack == Ack.OK
    assert reg.attach(C, token, 0, 1).ack == Ack.PERM_EATTACH


def test_a_manager_of_a_region_may_grant_and_lose_that_right() -> None:
    reg = registry()
    token = region_of(reg, default=0)
    assert reg.grant_device(A, token, int(Permission.MANAGE), B).ack == Ack.OK
    assert reg.grant_device(B, token, ATTACH_RW, C).ack == Ack.OK
    assert reg.attach(C, token, 0, 1).ack == Ack.OK
    assert reg.grant_device(B, token, 0, A).ack == Ack.ERR
    assert reg.grant_device(A, token, 0, B).ack == Ack.OK
    assert reg.grant_device(B, token, 0, C).ack == Ack.ERR


def test_grants_with_unknown_bits_devices_or_tokens_are_refused() -> None:
    reg = registry()
    token = region_of(reg)
    assert reg.grant_default(A, token, 32).ack == Ack.ERR
    assert reg.grant_default(A, token, 1 << 63).ack == Ack.ERR
    assert reg.grant_device(A, token, 0, DevId(0)).ack == Ack.ERR
    assert reg.grant_device(A, token, 0, DevId(77)).ack == Ack.ERR
    assert reg.grant_default(A, Token(token ^ 1), 0).ack == Ack.ENOENT
    assert reg.attach(B, token, 0, 1).ack == Ack.OK


def test_narrowing_remaps_live_attachments_and_taking_all_unmaps_but_keeps_them() -> None:
    reg = registry()
    token = region_of(reg)
    reg.attach(B, token, 0, 1)
    narrowed = reg.grant_default(A, token, ATTACH_RO)
    assert kinds(narrowed.effects) == ["SealWrites", "MapChunks"]
    remap = narrowed.effects[1]
    assert isinstance(remap, MapChunks)
    assert (remap.devid, remap.rights) == (B, Permission.READ)
    assert kinds(reg.grant_default(A, token, ATTACH_RW).effects) == []
    assert reg.devices[B].attachments[token].rights == Permission.READ
    gone = reg.grant_device(A, token, 0, B)
    assert gone.effects == [UnmapChunks(B, WindowOffset(0), CHUNK)]
    assert token in reg.devices[B].attachments
    assert reg.attach(B, token, 0, 1).ack == Ack.PERM_EATTACH
    detached = reg.detach(B, token)
    assert detached.ack == Ack.OK
    assert "UnmapChunks" not in kinds(detached.effects)
    assert reg.devices[B].window.free_bytes == WINDOW


def test_a_narrowed_default_does_not_touch_a_device_with_its_own_entry_nor_the_owner() -> None:
    reg = registry()
    token = region_of(reg)
    reg.grant_device(A, token, ATTACH_RW, B)
    reg.attach(B, token, 0, 1)
    assert reg.grant_default(A, token, 0).effects == []


def test_a_second_attach_counts_and_returns_the_same_areas() -> None:
    reg = registry()
    token = region_of(reg)
    first = reg.attach(B, token, 1, 1)
    again = reg.attach(B, token, 0, 1)
    assert (again.ack, again.areas, again.effects) == (Ack.OK, first.areas, ())
    assert reg.attach(B, token, 3, 1).ack == Ack.PERM_EWRITE
    assert reg.attach(B, token, 0, 0).ack == Ack.E2BIG
    assert reg.devices[B].account.attachments == 1
    assert reg.detach(B, token).effects == []
    assert kinds(reg.detach(B, token).effects) == ["UnmapChunks", "PostEvent", "WiringChanged"]
    assert reg.detach(B, token).ack == Ack.ENOENT


def test_the_token_dies_with_the_last_detach_of_an_owner_that_attached_twice() -> None:
    reg = registry()
    token = region_of(reg)
    assert reg.attach(A, token, 3, 1).ack == Ack.OK
    reg.detach(A, token)
    assert reg.attach(B, token, 0, 1).ack == Ack.OK
    reg.detach(A, token)
    assert reg.attach(C, token, 0, 1).ack == Ack.ENOENT


def test_attach_and_detach_are_told_to_all_other_holders_with_their_own_offsets() -> None:
    reg = registry()
    reg.alloc(A, 3 * CHUNK, 1)
    token = region_of(reg)
    reg.alloc(B, 5 * CHUNK, 1)
    attached = reg.attach(B, token, 0, 1)
    assert events(attached.effects) == [(A, PeerEvent(ev_type=EventType.ATTACH, offset=3 * CHUNK, devid=B, peers=2))]
    assert events(reg.attach(C, token, 0, 1).effects) == [
        (A, PeerEvent(ev_type=EventType.ATTACH, offset=3 * CHUNK, devid=C, peers=3)),
        (B, PeerEvent(ev_type=EventType.ATTACH, offset=5 * CHUNK, devid=C, peers=3)),
    ]
    assert events(reg.detach(A, token).effects) == [
        (B, PeerEvent(ev_type=EventType.DETACH, offset=5 * CHUNK, devid=A, peers=2)),
        (C, PeerEvent(ev_type=EventType.DETACH, offset=0, devid=A, peers=2)),
    ]


def test_the_owner_goes_at_once_and_its_charge_moves_to_each_who_still_holds() -> None:
    reg = registry()
    token = region_of(reg, 4 * CHUNK)
    reg.attach(B, token, 0, 1)
    reg.attach(C, token, 0, 1)
    accounts = [reg.devices[devid].account for devid in (A, B, C)]
    assert [account.bytes for account in accounts] == [4 * CHUNK, 0, 0]
    reg.detach(A, token)
    assert [account.bytes for account in accounts] == [0, 4 * CHUNK, 4 * CHUNK]
    assert reg.account.bytes == 4 * CHUNK
    assert reg.event_vector(B, token, 3).ack == Ack.OK
    reg.detach(B, token)
    assert [account.bytes for account in accounts] == [0, 0, 4 * CHUNK]
    reg.detach(C, token)
    assert [account.bytes for account in accounts] == [0, 0, 0]
    assert reg.account.bytes == 0
    assert not reg.regions


def test_attachments_have_a_quota_and_the_owner_does_not_need_it() -> None:
    reg = registry(quota=Quota(bytes=1 << 30, regions=10, attachments=1))
    first, second = region_of(reg), region_of(reg)
    assert reg.attach(B, first, 0, 1).ack == Ack.OK
    assert reg.attach(B, second, 0, 1).ack == Ack.ENOMEM
    assert reg.attach(A, second, 0, 1).ack == Ack.OK
    reg.detach(B, first)
    assert reg.attach(B, second, 0, 1).ack == Ack.OK


def test_a_device_over_its_bytes_attaches_nothing_more() -> None:
    reg = registry(quota=Quota(bytes=4 * CHUNK, regions=10, attachments=10))
    first = region_of(reg, 4 * CHUNK)
    reg.alloc(B, CHUNK, 1)
    assert reg.attach(B, first, 0, 1).ack == Ack.OK
    reg.detach(A, first)
    second = region_of(reg)
    assert reg.attach(B, second, 0, 1).ack == Ack.ENOMEM
    assert reg.alloc(B, CHUNK, 1).ack == Ack.ENOMEM


def test_a_read_only_attach_seals_the_region_once_and_later_writers_are_refused() -> None:
    reg = registry()
    token = region_of(reg)
    first = reg.attach(B, token, 1, 1)
    assert kinds(first.effects) == ["SealWrites", "MapChunks", "PostEvent", "WiringChanged"]
    sealed = first.effects[0]
    assert isinstance(sealed, SealWrites)
    assert sealed.memory is reg.regions[token].memory
    assert reg.attach(C, token, 0, 1).ack == Ack.PERM_EWRITE
    assert reg.attach(C, token, 2, 1).ack == Ack.PERM_EWRITE
    assert kinds(reg.attach(C, token, 1, 1).effects) == ["MapChunks", "PostEvent", "PostEvent", "WiringChanged"]


def test_a_device_without_descriptors_reads_without_the_seal() -> None:
    reg = registry(A, C)
    reg.add_device(B, WINDOW, PLENTY, can_reopen=False)
    token = region_of(reg)
    assert kinds(reg.attach(B, token, 1, 1).effects) == ["MapChunks", "PostEvent", "WiringChanged"]
    assert reg.attach(C, token, 3, 1).ack == Ack.OK


def test_a_doorbell_reaches_all_others_by_vector_or_by_event() -> None:
    reg = registry()
    token = region_of(reg, 4 * CHUNK)
    reg.attach(B, token, 0, 1)
    reg.alloc(C, CHUNK, 1)
    reg.attach(C, token, 0, 1)
    reg.event_vector(B, token, 9)
    effects = reg.doorbell(A, 3)
    assert effects == [Interrupt(B, 9), PostEvent(C, UpdateEvent(offset=CHUNK, devid=A).pack())]
    assert reg.doorbell(B, 0) == [
        PostEvent(A, UpdateEvent(offset=0, devid=B).pack()),
        PostEvent(C, UpdateEvent(offset=CHUNK, devid=B).pack()),
    ]
    assert reg.ring(A, token) == effects


def test_a_doorbell_on_a_free_or_impossible_slot_is_counted_and_does_nothing() -> None:
    reg = registry()
    region_of(reg)
    for slot in (1, 63, 64, 1 << 40, -1):
        assert reg.doorbell(A, slot) == ()
    assert reg.devices[A].stats.unknown_doorbells == 5
    assert reg.ring(B, Token(99)) == ()
    assert reg.ring(DevId(99), Token(99)) == ()


def test_a_vector_that_becomes_shared_or_ceases_to_be_rewires_the_other_region() -> None:
    reg = registry()
    one, two = region_of(reg), region_of(reg)
    assert reg.event_vector(A, one, 5).effects == [WiringChanged(one)]
    assert reg.event_vector(A, one, 5).effects == ()
    assert set(reg.event_vector(A, two, 5).effects) == {WiringChanged(one), WiringChanged(two)}
    assert reg.shares_vector(A, 5)
    assert set(reg.tokens_on_vector(A, 5)) == {one, two}
    assert set(reg.event_vector(A, two, None).effects) == {WiringChanged(one), WiringChanged(two)}
    assert not reg.shares_vector(A, 5)
    assert reg.holders(one) == [Holder(A, 0, WindowOffset(0), 5)]
    assert reg.event_vector(B, one, 5).ack == Ack.ENOENT


def test_reset_releases_everything_and_the_device_stays_known() -> None:
    reg = registry()
    owned = region_of(reg)
    other = Token(reg.alloc(B, CHUNK, 1).token)
    reg.grant_default(B, other, ATTACH_RW)
    reg.attach(A, other, 0, 1)
    reg.attach(A, other, 0, 1)
    reg.attach(B, owned, 0, 1)
    effects: list[Effect] = list(reg.reset(A))
    assert [effect.devid for effect in effects if isinstance(effect, UnmapChunks)] == [A, A]
    assert not reg.devices[A].attachments
    assert reg.devices[A].window.free_bytes == WINDOW
    assert reg.devices[A].account.bytes == reg.devices[A].account.attachments == 0
    assert reg.attach(C, owned, 0, 1).ack == Ack.ENOENT
    assert reg.alloc(A, CHUNK, 1).ack == Ack.OK


def test_a_removed_device_leaves_no_grant_behind() -> None:
    reg = registry()
    token = region_of(reg, default=0)
    reg.grant_device(A, token, ATTACH_RW, B)
    reg.remove_device(B)
    assert not reg.regions[token].grants
    reg.add_device(B, WINDOW, PLENTY)
    assert reg.attach(B, token, 0, 1).ack == Ack.PERM_EATTACH
    with pytest.raises(ValueError):
        reg.add_device(B, WINDOW, PLENTY)


def test_the_memory_file_is_closed_when_the_last_holder_has_gone() -> None:
    reg = registry()
    token = region_of(reg)
    fd = reg.regions[token].memory.fd
    reg.attach(B, token, 0, 1)
    reg.detach(A, token)
    os.fstat(fd)
    outcome: Outcome | None = reg.detach(B, token)
    assert outcome is not None
    del outcome
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_one_region_with_a_thousand_holders_stays_exact() -> None:
    reg = DomainRegistry(Gid(1), CHUNK, create_memory=lambda name, size: os.memfd_create(name))
    devids = [DevId(number) for number in range(1, 1102)]
    for devid in devids:
        reg.add_device(devid, 4096 * CHUNK, PLENTY)
    token = Token(reg.alloc(devids[0], CHUNK, 1).token)
    reg.grant_default(devids[0], token, ATTACH_RW)
    for devid in devids[1:]:
        assert reg.attach(devid, token, 0, 1).ack == Ack.OK
        reg.event_vector(devid, token, 1)
    assert len(reg.doorbell(devids[0], 0)) == 1100
    assert len(reg.holders(token)) == 1101
    for devid in devids:
        reg.remove_device(devid)
    assert reg.account.bytes == 0


def test_one_device_with_thousands_of_regions_stays_exact() -> None:
    reg = DomainRegistry(Gid(1), CHUNK, create_memory=lambda name, size: os.open("/dev/null", os.O_RDONLY))
    reg.add_device(A, 4096 * CHUNK, PLENTY)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = min(4096, soft - 200)
    tokens = [Token(reg.alloc(A, CHUNK, 1).token) for _ in range(count)]
    assert len(set(tokens)) == count
    assert reg.ring(A, tokens[-1]) == []
    assert len(reg.reset(A)) == 2 * count
    assert reg.account.bytes == 0
    assert reg.devices[A].window.largest_run == 4096 * CHUNK
