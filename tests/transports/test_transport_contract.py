# SPDX-License-Identifier: Apache-2.0
"""What every `Transport` does, asked of it directly, without the driver above."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

import pytest
from transport_rig import CHUNK, Rig, readable

from ism.driver import Transport, capabilities
from ism.driver.service import Service
from ism.driver.transport import Span
from ism.driver.virtio_pci import VirtioPci
from ism.errors import TransportError
from ism.memory import PAGE_SIZE
from ism.virtio.pci import CommonCfg, Feature, Isr, Status


@pytest.fixture
def transport(rig: Rig) -> Iterator[Transport]:
    service = Service("test")
    made = rig.transport()
    made.start(service, lambda reason: None)
    yield made
    service.close()


@pytest.fixture
def pci(transport: Transport) -> VirtioPci:
    return VirtioPci(transport, capabilities.find(transport))


def test_it_identifies_itself_as_a_virtio_ism_function(transport: Transport) -> None:
    capabilities.identify(transport)
    assert struct.unpack("<HH", transport.config_read(0, 4)) == (0x1AF4, 0x106C)
    assert transport.name


def test_config_space_reads_the_same_in_any_width(transport: Transport) -> None:
    whole = transport.config_read(0, 256)
    assert len(whole) == 256
    for width in (1, 2, 4):
        parts = b"".join(transport.config_read(at, width) for at in range(0, 64, width))
        assert parts == whole[:64]


def test_config_writes_stick_where_bits_are_writable_and_nowhere_else(transport: Transport) -> None:
    transport.config_write(4, (0x6).to_bytes(2, "little"))
    assert transport.config_read(4, 2) == b"\x06\0"
    transport.config_write(0, b"\xff\xff")
    assert transport.config_read(0, 2) == b"\xf4\x1a"


def test_bars_have_the_sizes_that_the_capabilities_need(transport: Transport) -> None:
    caps = capabilities.find(transport)
    assert transport.bar_size(caps.regions.bar) == 256 * CHUNK
    assert transport.bar_size(caps.doorbells.bar) >= 256 * 4
    for bar in range(6):
        size = transport.bar_size(bar)
        assert size == 0 or size & (size - 1) == 0
    assert transport.bar_size(3) == 0


def test_registers_keep_what_was_written_to_them(pci: VirtioPci) -> None:
    place, transport = pci.caps.common, pci.transport
    at = place.offset + CommonCfg.offset_of("driver_feature_select")
    for value in (1, 0):
        transport.bar_write(place.bar, at, value.to_bytes(4, "little"))
        assert transport.bar_read(place.bar, at, 4) == value.to_bytes(4, "little")
    pci.reset()
    pci.add_status(Status.ACKNOWLEDGE)
    pci.add_status(Status.DRIVER)
    assert pci.status == Status.ACKNOWLEDGE | Status.DRIVER


def test_a_posted_write_is_seen_by_the_read_that_follows(pci: VirtioPci) -> None:
    place, transport = pci.caps.common, pci.transport
    at = place.offset + CommonCfg.offset_of("device_feature_select")
    for value in (1, 0, 1):
        transport.bar_write(place.bar, at, value.to_bytes(4, "little"), posted=True)
        assert transport.bar_read(place.bar, at, 4) == value.to_bytes(4, "little")


def test_reset_brings_the_function_to_its_first_state(pci: VirtioPci) -> None:
    pci.reset()
    pci.add_status(Status.ACKNOWLEDGE)
    pci.transport.reset()
    assert pci.status == 0


def test_the_isr_status_reads_zero_when_nothing_happened(pci: VirtioPci) -> None:
    pci.read_isr()
    assert pci.read_isr() == 0


def test_vectors_can_be_bound_and_unbound(transport: Transport) -> None:
    assert transport.vector_count() == 16
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(16)]
    transport.set_vectors(0, fds)
    transport.set_vectors(3, [None, None, fds[5]])
    transport.set_vectors(0, [None] * 16)
    for fd in fds:
        os.close(fd)


def assert_line(pci: VirtioPci) -> None:
    """Have the device find a broken queue, of which it tells by a configuration interrupt."""
    pci.reset()
    pci.add_status(Status.ACKNOWLEDGE)
    pci.add_status(Status.DRIVER)
    pci.negotiate(frozenset({int(Feature.VERSION_1)}), frozenset())
    pci.add_status(Status.DRIVER_OK)
    pci.enable_queue(0, size=2, desc=1, driver=0, device=0, vector=None)


def test_the_interrupt_line_is_readable_until_the_isr_status_was_read_and_it_is_armed_again(pci: VirtioPci) -> None:
    line = pci.transport.enable_intx()
    assert line is not None
    assert pci.transport.enable_intx() == line
    pci.transport.config_write(4, b"\x06\0")
    assert not readable(line, 0)
    assert_line(pci)
    assert readable(line)
    pci.transport.rearm_intx()
    assert readable(line), "an asserted line must interrupt again"
    assert pci.read_isr() == Isr.CONFIG
    pci.transport.rearm_intx()
    assert not readable(line, 0)
    assert_line(pci)
    assert readable(line)


def test_what_interrupts_while_the_line_is_not_armed_interrupts_as_soon_as_it_is(pci: VirtioPci) -> None:
    line = pci.transport.enable_intx()
    assert line is not None
    pci.transport.config_write(4, b"\x06\0")
    assert_line(pci)
    assert readable(line)
    pci.read_isr()
    assert_line(pci)
    pci.transport.rearm_intx()
    assert readable(line)


def test_a_line_that_the_command_register_forbids_interrupts_when_it_is_allowed(pci: VirtioPci) -> None:
    line = pci.transport.enable_intx()
    assert line is not None
    pci.transport.config_write(4, b"\x06\x04")
    assert_line(pci)
    assert not readable(line, 0)
    pci.transport.config_write(4, b"\x06\0")
    assert readable(line)


def test_dma_memory_is_zeroed_made_of_pages_and_never_overlaps(transport: Transport) -> None:
    buffers = [transport.dma_alloc(size) for size in (1, PAGE_SIZE, PAGE_SIZE + 1)]
    end = 0
    for buffer in sorted(buffers, key=lambda buffer: buffer.iova):
        assert buffer.iova >= end
        assert buffer.mapping.length % PAGE_SIZE == 0
        assert not any(buffer.mapping.view)
        end = buffer.iova + buffer.mapping.length
    assert buffers[2].mapping.length == 2 * PAGE_SIZE
    for buffer in buffers:
        transport.dma_free(buffer)


def test_no_area_is_mapped_before_the_device_has_given_one(transport: Transport) -> None:
    with pytest.raises(TransportError, match="mapped nothing"):
        transport.map_spans(capabilities.find(transport).regions.bar, [Span(0, CHUNK)])


def test_no_doorbell_is_wired_for_a_slot_without_region(transport: Transport) -> None:
    assert transport.doorbell_fd(0) is None


def test_after_close_every_access_says_that_the_way_is_gone(rig: Rig) -> None:
    transport = rig.transport()
    transport.close()
    accesses: list[Callable[[], object]] = [
        lambda: transport.config_read(0, 4),
        lambda: transport.config_write(4, b"\0\0"),
        lambda: transport.bar_read(0, 0, 4),
        lambda: transport.bar_write(0, 0, bytes(4)),
        lambda: transport.dma_alloc(1),
        lambda: transport.set_vectors(0, [None]),
        transport.enable_intx,
        transport.reset,
    ]
    for access in accesses:
        with pytest.raises(TransportError):
            access()
    transport.close()
