# SPDX-License-Identifier: Apache-2.0
"""PCI configuration space and what follows from a FunctionConfig."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc

import pytest
from device_rig import BOTH, CHUNK, WINDOW, Driver, Host

from ism.device.bars import Layout
from ism.device.contract import FunctionConfig
from ism.device.interrupts import INTX
from ism.device.msix import MsixRegisters
from ism.ids import DevId
from ism.virtio.ism_spec import Config, IsmFeature
from ism.virtio.pci import VirtioPciCfgCap

GOOD = FunctionConfig(gid=1, devid=DevId(2), chunk_size=CHUNK, window_size=WINDOW, vectors=8, features=BOTH)


@pytest.fixture
def driver() -> Driver:
    return Host().add(7)


def u16(driver: Driver, at: int) -> int:
    return int.from_bytes(driver.function.config_read(at, 2), "little")


def u32(driver: Driver, at: int) -> int:
    return int.from_bytes(driver.function.config_read(at, 4), "little")


def find_cap(driver: Driver, cfg_type: int) -> int:
    at = driver.function.config_read(0x34, 1)[0]
    while at:
        cap_id, following, _, kind = driver.function.config_read(at, 4)
        if cap_id == 9 and kind == cfg_type:
            return at
        at = following
    raise LookupError(cfg_type)


def test_the_identity_is_that_of_a_modern_device(driver: Driver) -> None:
    assert (u16(driver, 0), u16(driver, 2)) == (0x1AF4, 0x106C)
    assert driver.function.config_read(8, 4) == bytes([1, 0x00, 0x80, 0x05])
    assert u16(driver, 0x2C) == 0x1AF4
    assert u16(driver, 0x2E) >= 0x40
    assert driver.function.config_read(0x3D, 1) == b"\1"


@pytest.mark.parametrize(
    ("at", "size", "flags"), [(0x10, 0x4000, 0), (0x14, 0x2000, 0), (0x18, 0x1000, 0), (0x1C, 0, 0)]
)
def test_a_bar_tells_its_size_when_all_ones_are_written(driver: Driver, at: int, size: int, flags: int) -> None:
    driver.function.config_write(at, b"\xff\xff\xff\xff")
    assert u32(driver, at) == (-size & 0xFFFFFFFF) | flags
    driver.function.config_write(at, struct.pack("<I", 0xFE000123))
    assert u32(driver, at) == (0xFE000000 if size else 0)


def test_the_regions_window_is_a_64_bit_prefetchable_bar_of_any_size() -> None:
    driver = Host().add(7, window_size=1 << 35)
    driver.function.config_write(0x20, b"\xff" * 8)
    assert u32(driver, 0x20) == 0xC
    assert u32(driver, 0x24) == 0xFFFFFFF8
    small = Host().add(7)
    small.function.config_write(0x20, b"\xff" * 8)
    assert u32(small, 0x20) == (-WINDOW & 0xFFFFFFFF) | 0xC
    assert u32(small, 0x24) == 0xFFFFFFFF
    assert [small.function.bar_size(i) for i in range(7)] == [0x4000, 0x2000, 0x1000, 0, WINDOW, 0, 0]


def test_read_only_registers_keep_their_value(driver: Driver) -> None:
    before = driver.function.config_read(0, 256)
    driver.function.config_write(0, b"\xff" * 256)
    after = driver.function.config_read(0, 256)
    writable = {*range(0x10, 0x1C), *range(0x20, 0x28), 0x04, 0x05, 0x0C, 0x3C}
    cfg = find_cap(driver, 5)
    writable |= {cfg + 4, *range(cfg + 8, cfg + 20)}
    writable |= {i for i in range(256) if before[i : i + 2] == b"\x11\x00" and i >= 0x40 for i in (i + 3,)}
    assert {i for i in range(256) if before[i] != after[i]} <= writable
    assert u16(driver, 4) == 0x0546  # memory, bus master, parity, SERR, INTx disable
    assert u16(driver, 6) == 0x0010


def test_the_status_register_bits_cannot_be_written(driver: Driver) -> None:
    driver.function.config_write(6, b"\xff\xff")
    assert u16(driver, 6) == 0x0010


def test_accesses_beyond_the_end_read_zero_and_write_nothing(driver: Driver) -> None:
    assert driver.function.config_read(250, 20)[6:] == bytes(14)
    assert driver.function.config_read(4096, 4) == bytes(4)
    before = driver.function.config_read(0, 256)
    driver.function.config_write(256, b"\xff" * 8)
    driver.function.config_write(4000, b"\xff")
    assert driver.function.config_read(0, 256) == before


def test_capabilities_are_aligned_inside_config_space_and_end(driver: Driver) -> None:
    kinds = []
    at = driver.function.config_read(0x34, 1)[0]
    while at:
        assert at % 4 == 0
        assert 0x40 <= at <= 0xFC
        cap_id, following, length, cfg_type = driver.function.config_read(at, 4)
        kinds.append((cap_id, length if cap_id == 9 else 12, cfg_type if cap_id == 9 else None))
        at = following
    assert kinds == [
        (9, 16, 1),
        (9, 20, 2),
        (9, 16, 3),
        (9, 16, 4),
        (9, 20, 5),
        (9, 24, 8),
        (9, 24, 8),
        (0x11, 12, None),
    ]


def test_the_config_access_capability_reads_and_writes_a_bar(driver: Driver) -> None:
    cap = find_cap(driver, 5)
    driver.function.config_write(cap + 4, b"\0")
    driver.function.config_write(cap + 8, struct.pack("<II", 0x2000, 4))  # device configuration: gid
    assert driver.function.config_read(cap + 16, 4) == struct.pack("<I", 0x51)
    driver.function.config_write(cap + 8, struct.pack("<II", 20, 1))  # device status
    driver.function.config_write(cap + 16, b"\1\xff\xff\xff")
    assert driver.status == 1
    assert driver.function.config_read(cap + 16, 1) == b"\1"


@pytest.mark.parametrize(("offset", "length"), [(0x2000, 0), (0x2000, 3), (0x2000, 8), (0x2001, 4), (0x2001, 2)])
def test_the_config_access_capability_ignores_accesses_the_driver_may_not_make(
    driver: Driver, offset: int, length: int
) -> None:
    cap = find_cap(driver, 5)
    driver.function.config_write(cap + 8, struct.pack("<II", offset, length))
    driver.function.config_write(cap + 16, b"abcd")
    assert driver.function.config_read(cap + 16, 4) == b"abcd"


def test_the_config_access_capability_can_notify_a_queue(driver: Driver) -> None:
    driver.start()
    driver.submit(b"\0\0" + struct.pack("<Q", CHUNK), 64)
    cap = find_cap(driver, 5)
    driver.function.config_write(cap + 4, b"\0")
    driver.function.config_write(cap + 8, struct.pack("<II", 0x3000, 2))
    work = driver.function.config_write(cap + 16, b"\0\0")
    assert len(work.requests) == 1


def test_the_config_access_capability_names_an_absent_bar(driver: Driver) -> None:
    cap = find_cap(driver, 5)
    driver.function.config_write(cap + 4, b"\xff")
    driver.function.config_write(cap + 8, struct.pack("<II", 0, 4))
    assert driver.function.config_read(cap + 16, 4) == bytes(4)
    assert driver.function.config_write(cap + 16, b"\0\0\0\0").requests == []
    assert cap + VirtioPciCfgCap.SIZE <= 256


def test_the_device_configuration_holds_the_manager_s_numbers_and_is_read_only(driver: Driver) -> None:
    driver.function.bar_write(0, 0x2000, b"\xff" * 32)
    config = Config.unpack(driver.function.bar_read(0, 0x2000, 32))
    assert config == Config(gid=0x51, devid=7, chunk_size=CHUNK, notify_size=4)
    assert driver.function.bar_read(0, 0x2000 + 30, 8) == bytes(8)


def test_the_msix_table_behaves_as_registers(driver: Driver) -> None:
    function = driver.function
    assert function.bar_read(1, 0, 16) == bytes(12) + b"\1\0\0\0"
    function.bar_write(1, 16, b"\xff" * 16)
    assert function.bar_read(1, 16, 16) == b"\xfc" + b"\xff" * 11 + b"\1\0\0\0"
    function.bar_write(1, 16 * 8, b"\xff" * 8)  # one past the last entry
    assert function.bar_read(1, 16 * 8, 8) == bytes(8)
    function.bar_write(1, 0x1000, b"\xff" * 8)
    assert function.bar_read(1, 0x1000, 8) == bytes(8)
    assert function.bar_read(1, 32, 16) == bytes(12) + b"\1\0\0\0"
    function.reset()
    assert function.bar_read(1, 16, 16) == bytes(12) + b"\1\0\0\0"


def test_an_msix_table_that_nobody_writes_takes_no_memory() -> None:
    registers = MsixRegisters(Layout(dataclasses.replace(GOOD, vectors=2048)))
    tracemalloc.start()
    try:
        registers.read(0, 1 << 15)
        registers.write(1 << 15, b"beyond the end")
        registers.reset()
        assert tracemalloc.get_traced_memory()[0] < 1 << 14
        registers.write(0, b"\xff")
        assert tracemalloc.get_traced_memory()[0] > 1 << 15
    finally:
        tracemalloc.stop()


def test_msix_is_turned_on_by_configuration_writes_and_by_the_client(driver: Driver) -> None:
    function = driver.function
    at = next(
        i
        for i in range(0x40, 256, 4)
        if function.config_read(i, 1) == b"\x11" and function.config_read(i + 1, 1) == b"\0"
    )
    assert u16(driver, at + 2) == 7
    assert function.route(3) == INTX
    function.config_write(at + 2, struct.pack("<H", 0x8000))
    assert function.msix_enabled
    assert u16(driver, at + 2) == 0x8007
    assert function.route(3) == 3
    assert function.route(8) is None
    function.set_msix_enabled(False)
    assert u16(driver, at + 2) == 0x0007
    assert function.route(3) == INTX


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chunk_size", 2048),
        ("chunk_size", 12288),
        ("window_size", CHUNK * 3),
        ("window_size", CHUNK // 2),
        ("window_size", 0),
        ("window_size", 1 << 63),
        ("window_size", 1 << 42),
        ("vectors", 2),
        ("vectors", 2049),
        ("gid", 0),
        ("devid", 0),
        ("devid", 1 << 64),
        ("features", frozenset({IsmFeature.RECLAIM})),
        ("features", frozenset({5})),
    ],
)
def test_a_configuration_no_function_can_have_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Layout(dataclasses.replace(GOOD, **{field: value}))


@pytest.mark.parametrize("vectors", [3, 64, 65, 256, 257, 2048])
def test_table_and_pending_bits_fit_their_bar(vectors: int) -> None:
    layout = Layout(dataclasses.replace(GOOD, vectors=vectors))
    assert layout.table_length <= layout.pba_offset
    assert layout.pba_offset + layout.pba_length <= layout.bar_size(1)
    assert not layout.bar_size(1) & (layout.bar_size(1) - 1)
