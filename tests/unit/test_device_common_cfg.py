# SPDX-License-Identifier: Apache-2.0
"""Common configuration: status machine, features, queue registers, odd accesses."""

from __future__ import annotations

import struct

import pytest
from device_rig import BOTH, EVENT_VQ, VERSION_1, Driver, Host, Ring

from ism.virtio.ism_spec import IsmFeature
from ism.virtio.pci import CommonCfg, Status

ACCESS_PLATFORM = 1 << 33


@pytest.fixture
def driver() -> Driver:
    return Host().add(7)


def at(name: str) -> int:
    return CommonCfg.offset_of(name)


def test_the_offered_features_are_the_transport_s_and_the_configured_ones() -> None:
    assert Host().add(1).offered() == VERSION_1 | ACCESS_PLATFORM | 0b11
    assert Host().add(1, features=frozenset()).offered() == VERSION_1 | ACCESS_PLATFORM
    assert Host().add(1, features=frozenset({IsmFeature.EVENT_IRQ})).offered() == VERSION_1 | ACCESS_PLATFORM | 1


def test_without_the_event_queue_feature_there_is_one_queue() -> None:
    assert Host().add(1, features=BOTH).get("num_queues") == 2
    assert Host().add(1, features=frozenset()).get("num_queues") == 1


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (VERSION_1, True),
        (VERSION_1 | ACCESS_PLATFORM | EVENT_VQ, True),
        (0, False),
        (EVENT_VQ, False),
        (VERSION_1 | 1 << 28, False),
        (VERSION_1 | 1 << 16, False),
        (VERSION_1 | 1 << 34, False),
    ],
)
def test_features_ok_holds_only_for_features_that_fit(driver: Driver, features: int, accepted: bool) -> None:
    driver.add_status(Status.ACKNOWLEDGE | Status.DRIVER)
    driver.accept(features)
    assert bool(driver.add_status(Status.FEATURES_OK) & Status.FEATURES_OK) is accepted
    assert driver.function.stats["refused_features"] == (not accepted)


def test_a_driver_may_accept_other_features_after_a_refusal(driver: Driver) -> None:
    driver.accept(0)
    assert not driver.add_status(Status.FEATURES_OK) & Status.FEATURES_OK
    driver.accept(VERSION_1)
    assert driver.add_status(Status.FEATURES_OK) & Status.FEATURES_OK


def test_feature_words_beyond_the_second_read_zero_and_accept_nothing(driver: Driver) -> None:
    driver.put("device_feature_select", 2)
    assert driver.get("device_feature") == 0
    driver.accept(VERSION_1)
    driver.put("driver_feature_select", 7)
    driver.put("driver_feature", 0)
    assert driver.get("driver_feature") == 0
    assert driver.add_status(Status.FEATURES_OK) & Status.FEATURES_OK
    driver.put("device_status", 0)
    driver.accept(VERSION_1)
    driver.put("driver_feature_select", 7)
    driver.put("driver_feature", 1)
    assert not driver.add_status(Status.FEATURES_OK) & Status.FEATURES_OK


def test_features_are_fixed_after_features_ok(driver: Driver) -> None:
    driver.accept(VERSION_1)
    driver.add_status(Status.FEATURES_OK)
    driver.accept(VERSION_1 | EVENT_VQ)
    driver.put("driver_feature_select", 0)
    assert driver.get("driver_feature") == 0


def test_driver_ok_needs_features_ok(driver: Driver) -> None:
    assert driver.add_status(Status.DRIVER_OK) == 0
    driver.accept(VERSION_1)
    assert driver.add_status(Status.FEATURES_OK | Status.DRIVER_OK) == Status.FEATURES_OK | Status.DRIVER_OK


def test_the_driver_sets_status_bits_and_clears_none_but_by_reset(driver: Driver) -> None:
    driver.put("device_status", Status.ACKNOWLEDGE)
    driver.put("device_status", Status.DRIVER)
    assert driver.status == Status.ACKNOWLEDGE | Status.DRIVER
    driver.put("device_status", 0xFF)
    assert driver.status == Status.ACKNOWLEDGE | Status.DRIVER | Status.FAILED
    driver.put("device_status", 0)
    assert driver.status == 0


def test_the_queue_registers_show_the_selected_queue(driver: Driver) -> None:
    for index in (0, 1):
        driver.put("queue_select", index)
        assert driver.get("queue_size") == 64
        assert driver.get("queue_notify_off") == index
        assert driver.get("queue_msix_vector") == 0xFFFF
        assert driver.get("queue_enable") == 0


def test_a_queue_that_is_not_there_has_size_0_and_ignores_writes(driver: Driver) -> None:
    driver.put("queue_select", 2)
    for name in ("queue_size", "queue_enable", "queue_desc"):
        driver.put(name, 1)
        assert driver.get(name) == 0
    assert driver.get("queue_msix_vector") == 0xFFFF
    assert driver.status == 0


@pytest.mark.parametrize(("size", "kept"), [(64, 64), (1, 1), (32, 32), (0, 64), (3, 64), (128, 64), (0xFFFF, 64)])
def test_a_queue_size_is_a_power_of_two_up_to_the_initial_one(driver: Driver, size: int, kept: int) -> None:
    driver.put("queue_size", size)
    assert driver.get("queue_size") == kept


@pytest.mark.parametrize("name", ["config_msix_vector", "queue_msix_vector"])
@pytest.mark.parametrize(("vector", "kept"), [(0, 0), (7, 7), (8, 0xFFFF), (0xFFFF, 0xFFFF)])
def test_a_vector_outside_the_table_reads_back_as_none(driver: Driver, name: str, vector: int, kept: int) -> None:
    driver.put(name, vector)
    assert driver.get(name) == kept


def test_addresses_can_be_written_in_halves_and_read_back(driver: Driver) -> None:
    driver.function.bar_write(0, at("queue_desc"), struct.pack("<I", 0x12345670))
    driver.function.bar_write(0, at("queue_desc") + 4, struct.pack("<I", 0x9))
    assert driver.get("queue_desc") == 0x9_1234_5670


def test_an_enabled_queue_keeps_its_registers(driver: Driver) -> None:
    driver.configure_queue(0, Ring(driver.ram, 0x100000, 32), 1)
    driver.put("queue_size", 16)
    driver.put("queue_desc", 0)
    driver.put("queue_enable", 0)
    assert (driver.get("queue_size"), driver.get("queue_desc"), driver.get("queue_enable")) == (32, 0x100000, 1)
    driver.put("queue_msix_vector", 2)
    assert driver.get("queue_msix_vector") == 2


@pytest.mark.parametrize(
    ("name", "address"),
    [("queue_desc", 8), ("queue_driver", 1), ("queue_device", 2), ("queue_desc", (1 << 64) - 16)],
)
def test_enabling_a_queue_at_an_impossible_address_needs_a_reset(driver: Driver, name: str, address: int) -> None:
    driver.put(name, address)
    driver.put("queue_enable", 1)
    assert driver.status & Status.NEEDS_RESET
    assert driver.get("queue_enable") == 0
    assert driver.function.stats["malformed_queues"] == 1


def test_reset_forgets_all_registers(driver: Driver) -> None:
    fresh = driver.function.bar_read(0, 0, 64)
    driver.start()
    driver.put("queue_select", 1)
    driver.put("device_status", 0)
    assert driver.function.bar_read(0, 0, 64) == fresh


def test_one_wide_write_changes_each_field_it_touches_in_order(driver: Driver) -> None:
    data = struct.pack("<BBHHH", Status.ACKNOWLEDGE, 0xFF, 1, 16, 3)  # status, generation, select, size, vector
    driver.function.bar_write(0, at("device_status"), data)
    assert driver.status == Status.ACKNOWLEDGE
    assert (driver.get("queue_select"), driver.get("queue_size"), driver.get("queue_msix_vector")) == (1, 16, 3)
    assert driver.get("config_generation") == 0


def test_a_write_inside_a_field_keeps_the_field_s_other_bytes(driver: Driver) -> None:
    driver.put("queue_desc", 0x1122334455667788)
    driver.function.bar_write(0, at("queue_desc") + 3, b"\xaa\xbb")
    assert driver.get("queue_desc") == 0x112233BBAA667788


def test_reads_across_fields_and_beyond_the_end_are_bytes_of_the_structure(driver: Driver) -> None:
    whole = driver.function.bar_read(0, 0, 64)
    for n in (1, 2, 4, 8):
        for offset in range(64):
            assert driver.function.bar_read(0, offset, n) == (whole + bytes(8))[offset : offset + n]
    assert driver.function.bar_read(0, 0x0FFC, 8) == bytes(8)
    assert driver.function.bar_read(0, 0x800, 4) == bytes(4)
