# SPDX-License-Identifier: Apache-2.0
"""Finding the virtio structures: loops, ends cut off, places outside of their BAR, what is missing or unknown."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from ism.driver.capabilities import Location, find, identify, walk
from ism.driver.virtio_pci import VirtioPci, feature_name
from ism.errors import FeatureMismatchError, RemoteProtocolError
from ism.layout import Struct
from ism.virtio.pci import CfgType, MsixCap, VirtioPciCap, VirtioPciCap64, VirtioPciNotifyCap

BAR_SIZES = {0: 0x4000, 2: 0x1000, 4: 1 << 33}


class Function:
    """A configuration space made of the given capabilities, in that order, and BARs that read as nothing."""

    name = "made-up"

    def __init__(self, caps: Sequence[Struct], *, next_of_last: int = 0, status: int = 0x10) -> None:
        self.config = bytearray(256)
        struct.pack_into("<HHHH", self.config, 0, 0x1AF4, 0x106C, 0, status)
        at = 0x40
        self.config[0x34] = at if caps else 0
        self.places = []
        for index, cap in enumerate(caps):
            self.places.append(at)
            following = at + (cap.SIZE + 3 & ~3)
            cap.pack_into(self.config, at)
            self.config[at + 1] = following if index + 1 < len(caps) else next_of_last
            at = following

    def config_read(self, offset: int, length: int) -> bytes:
        return bytes(self.config[offset : offset + length])

    def bar_size(self, bar: int) -> int:
        return BAR_SIZES.get(bar, 0)


def capabilities() -> dict[str, Struct]:
    return {
        "common configuration": VirtioPciCap(cfg_type=CfgType.COMMON_CFG, offset=0, length=64),
        "queue notify area": VirtioPciNotifyCap(offset=0x3000, length=8, notify_off_multiplier=4),
        "ISR status": VirtioPciCap(cfg_type=CfgType.ISR_CFG, offset=0x1000, length=1),
        "device configuration": VirtioPciCap(cfg_type=CfgType.DEVICE_CFG, offset=0x2000, length=32),
        "shared memory 1 (regions)": VirtioPciCap64(bar=4, id=1, length=0, length_hi=2),
        "shared memory 2 (notify)": VirtioPciCap64(bar=2, id=2, offset=0x100, length=0x400),
    }


def test_every_structure_is_found_where_its_capability_says() -> None:
    caps = find(Function([MsixCap(), *capabilities().values()]))
    assert caps.common == Location(0, 0, 64)
    assert caps.notify == Location(0, 0x3000, 8)
    assert caps.notify_multiplier == 4
    assert caps.isr == Location(0, 0x1000, 1)
    assert caps.device == Location(0, 0x2000, 32)
    assert caps.regions == Location(4, 0, 1 << 33)
    assert caps.doorbells == Location(2, 0x100, 0x400)


@pytest.mark.parametrize("name", list(capabilities()))
def test_each_structure_that_is_missing_is_named(name: str) -> None:
    there = capabilities()
    del there[name]
    with pytest.raises(FeatureMismatchError, match="made-up lacks the virtio capabilities") as caught:
        find(Function(list(there.values())))
    assert caught.value.missing == (name,)


def test_a_function_without_capability_list_lacks_everything() -> None:
    for function in (Function([]), Function(list(capabilities().values()), status=0)):
        with pytest.raises(FeatureMismatchError) as caught:
            find(function)
        assert set(caught.value.missing) == set(capabilities())


def test_a_list_that_runs_in_a_circle_ends_after_one_round() -> None:
    function = Function(list(capabilities().values()), next_of_last=0x40)
    assert len(list(walk(bytes(function.config)))) == 6
    assert find(function).isr == Location(0, 0x1000, 1)
    function.config[0x41] = 0x40
    with pytest.raises(FeatureMismatchError):
        find(function)


@pytest.mark.parametrize("pointer", [0x01, 0x3C, 0x3F, 0xFC, 0xFF])
def test_a_pointer_to_nowhere_ends_the_list(pointer: int) -> None:
    assert find(Function(list(capabilities().values()), next_of_last=pointer)).isr.length == 1


def test_the_two_low_bits_of_a_pointer_do_not_count() -> None:
    function = Function(list(capabilities().values()))
    function.config[0x34] |= 3
    function.config[0x41] |= 1
    assert find(function).isr == Location(0, 0x1000, 1)


@pytest.mark.parametrize(("length", "missing"), [(64, 6), (65, 6), (100, 5), (128, 3), (180, 1)])
def test_a_configuration_space_that_is_cut_off_lacks_what_is_behind_the_end(length: int, missing: int) -> None:
    function = Function([MsixCap(), *capabilities().values()])
    del function.config[length:]
    with pytest.raises(FeatureMismatchError) as caught:
        find(function)
    assert list(caught.value.missing) == list(capabilities())[-missing:]


def test_a_configuration_space_without_header_is_a_protocol_error() -> None:
    function = Function([])
    del function.config[32:]
    with pytest.raises(RemoteProtocolError, match="32 bytes of configuration space"):
        find(function)
    del function.config[2:]
    with pytest.raises(RemoteProtocolError):
        identify(function)


@pytest.mark.parametrize("cap_len", [0, 1, 15, 255])
def test_a_capability_of_an_impossible_length_is_ignored(cap_len: int) -> None:
    function = Function([VirtioPciCap(cfg_type=CfgType.ISR_CFG, offset=7, length=1), *capabilities().values()])
    function.config[0x42] = cap_len
    assert find(function).isr == Location(0, 0x1000, 1)


def test_short_forms_of_longer_capabilities_are_ignored() -> None:
    short = [
        VirtioPciCap(cfg_type=CfgType.NOTIFY_CFG, length=8),
        VirtioPciCap(cfg_type=CfgType.SHARED_MEMORY_CFG, id=1, length=8),
    ]
    caps = find(Function([*short, *capabilities().values()]))
    assert caps.notify == Location(0, 0x3000, 8)
    assert caps.regions == Location(4, 0, 1 << 33)


def test_reserved_bars_and_unknown_types_are_ignored_and_the_first_of_a_type_counts() -> None:
    before = [
        VirtioPciCap(cfg_type=CfgType.ISR_CFG, bar=6, length=1),
        VirtioPciCap(cfg_type=77, length=1),
        VirtioPciCap(cfg_type=CfgType.VENDOR_CFG, length=1),
    ]
    behind = [VirtioPciCap(cfg_type=CfgType.ISR_CFG, offset=0x3000, length=1)]
    assert find(Function([*before, *capabilities().values(), *behind])).isr == Location(0, 0x1000, 1)


@pytest.mark.parametrize(
    ("name", "cap"),
    [
        ("common configuration", VirtioPciCap(cfg_type=CfgType.COMMON_CFG, offset=0x3FE0, length=64)),
        ("common configuration", VirtioPciCap(cfg_type=CfgType.COMMON_CFG, length=55)),
        ("queue notify area", VirtioPciNotifyCap(length=0)),
        ("queue notify area", VirtioPciNotifyCap(bar=1, length=4)),
        ("ISR status", VirtioPciCap(cfg_type=CfgType.ISR_CFG, offset=0xFFFFFFFF, length=0xFFFFFFFF)),
        ("device configuration", VirtioPciCap(cfg_type=CfgType.DEVICE_CFG, length=31)),
        ("shared memory 1 (regions)", VirtioPciCap64(bar=4, id=1, offset=1, length=0, length_hi=2)),
        ("shared memory 1 (regions)", VirtioPciCap64(bar=4, id=1, offset_hi=0xFFFFFFFF, length_hi=0xFFFFFFFF)),
        ("shared memory 2 (notify)", VirtioPciCap64(bar=2, id=2, length=0x1001)),
    ],
)
def test_a_structure_outside_of_its_bar_is_a_protocol_error(name: str, cap: Struct) -> None:
    there = capabilities()
    there[name] = cap
    with pytest.raises(RemoteProtocolError, match="does not fit BAR") as caught:
        find(Function(list(there.values())))
    assert caught.value.event == "capability"


def test_the_common_configuration_of_virtio_1_0_is_long_enough() -> None:
    there = capabilities()
    there["common configuration"] = VirtioPciCap(cfg_type=CfgType.COMMON_CFG, length=56)
    assert find(Function(list(there.values()))).common.length == 56


def test_feature_bits_have_the_names_of_the_specification() -> None:
    assert [feature_name(bit) for bit in (0, 1, 32, 33, 63)] == [
        "VIRTIO_ISM_F_EVENT_IRQ",
        "VIRTIO_ISM_F_EVENT_VQ",
        "VIRTIO_F_VERSION_1",
        "VIRTIO_F_ACCESS_PLATFORM",
        "feature bit 63",
    ]


def test_wide_registers_are_written_as_two_words() -> None:
    function = Function(list(capabilities().values()))
    written: list[tuple[int, int, bytes]] = []
    function.bar_write = lambda bar, offset, data, **_: written.append((bar, offset, data))  # type: ignore[attr-defined]
    VirtioPci(function, find(function))._write("queue_desc", 0x1122334455667788)
    assert written == [(0, 32, b"\x88\x77\x66\x55"), (0, 36, b"\x44\x33\x22\x11")]
