# SPDX-License-Identifier: Apache-2.0
"""The sysfs transport against a folder that looks like the kernel's, with plain files for configuration and BARs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ism.driver.transport import Span
from ism.errors import TransportError
from ism.memory import PAGE_SIZE
from ism.pci_uio import UioTransport, physical_address

BDF = "0000:00:04.0"
NO_BAR = "0x0000000000000000 0x0000000000000000 0x0000000000000000"


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    folder = tmp_path / BDF
    folder.mkdir()
    (folder / "config").write_bytes(bytes(range(256)))
    rows = [
        "0x00000000febf0000 0x00000000febf3fff 0x0000000000040200",
        NO_BAR,
        "0x000000000000c000 0x000000000000c0ff 0x0000000000040101",
        NO_BAR,
        "0x0000008000000000 0x0000008000003fff 0x000000000014220c",
        NO_BAR,
        NO_BAR,
    ]
    (folder / "resource").write_text("\n".join(rows) + "\n")
    (folder / "resource0").write_bytes(bytes(4 * PAGE_SIZE))
    (folder / "resource4").write_bytes(b"".join(bytes([page]) * PAGE_SIZE for page in range(4)))
    return tmp_path


@pytest.fixture
def transport(sysfs: Path):
    transport = UioTransport(BDF, allow_no_iommu=True, sysfs=sysfs)
    yield transport
    transport.close()


def test_without_permission_to_go_without_iommu_it_explains_the_danger(sysfs: Path) -> None:
    with pytest.raises(TransportError, match="no IOMMU protection"):
        UioTransport(BDF, allow_no_iommu=False, sysfs=sysfs)


@pytest.mark.parametrize("bdf", ["", "00:04.0", "0000:00:04.8", "../../etc"])
def test_what_is_no_pci_address_is_refused(bdf: str, sysfs: Path) -> None:
    with pytest.raises(ValueError, match="is no PCI address"):
        UioTransport(bdf, allow_no_iommu=True, sysfs=sysfs)


def test_an_absent_function_is_named(sysfs: Path) -> None:
    with pytest.raises(TransportError, match=r"uio:0000:00:05\.0"):
        UioTransport("0000:00:05.0", allow_no_iommu=True, sysfs=sysfs)


def test_a_function_that_a_kernel_driver_holds_is_refused_with_the_way_out(sysfs: Path, tmp_path: Path) -> None:
    (tmp_path / "virtio-pci").mkdir()
    (sysfs / BDF / "driver").symlink_to(tmp_path / "virtio-pci")
    with pytest.raises(TransportError, match=r"held by the kernel driver virtio-pci: unbind it"):
        UioTransport(BDF, allow_no_iommu=True, sysfs=sysfs)


def test_configuration_space_is_read_and_written(transport: UioTransport) -> None:
    assert transport.config_read(16, 4) == bytes([16, 17, 18, 19])
    transport.config_write(16, b"\xaa\xbb")
    assert transport.config_read(16, 4) == b"\xaa\xbb\x12\x13"


def test_bar_sizes_come_from_the_resource_file_and_io_bars_do_not_count(transport: UioTransport) -> None:
    assert [transport.bar_size(bar) for bar in range(7)] == [0x4000, 0, 0, 0, 0x4000, 0, 0]


def test_registers_are_read_and_written_in_one_access_of_their_width(transport: UioTransport, sysfs: Path) -> None:
    transport.bar_write(0, 0x1008, (0x1122334455667788).to_bytes(8, "little"))
    assert transport.bar_read(0, 0x1008, 4) == bytes.fromhex("88776655")
    assert transport.bar_read(0, 0x100E, 2) == bytes.fromhex("2211")
    assert (sysfs / BDF / "resource0").read_bytes()[0x1008:0x1010] == bytes.fromhex("8877665544332211")


@pytest.mark.parametrize(("offset", "length"), [(1, 2), (2, 4), (0, 3), (0x3FFC, 8), (0x4000, 1)])
def test_an_access_that_is_no_register_access_is_refused(transport: UioTransport, offset: int, length: int) -> None:
    with pytest.raises(TransportError, match="no register access"):
        transport.bar_read(0, offset, length)


def test_spans_of_a_bar_are_mapped_side_by_side(transport: UioTransport) -> None:
    mapping = transport.map_spans(4, [Span(2 * PAGE_SIZE, PAGE_SIZE), Span(PAGE_SIZE, PAGE_SIZE)])
    assert mapping.length == 2 * PAGE_SIZE
    assert mapping.view[0] == 2
    assert mapping.view[PAGE_SIZE] == 1


def test_it_has_no_interrupts_and_says_so(transport: UioTransport) -> None:
    assert transport.vector_count() == 0
    with pytest.raises(TransportError, match="interrupts=False"):
        transport.set_vectors(0, [0])


@pytest.mark.skipif(os.geteuid() != 0, reason="physical addresses are shown to root only")
def test_queue_memory_of_a_page_is_locked_and_has_its_physical_address(transport: UioTransport) -> None:
    buffer = transport.dma_alloc(100)
    assert buffer.mapping.length == PAGE_SIZE
    assert buffer.iova % PAGE_SIZE == 0
    assert buffer.iova == physical_address(buffer.mapping.address) != 0
    locked = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmLck")]
    assert int(locked[0].split()[1]) >= PAGE_SIZE // 1024


def test_a_page_whose_frame_the_kernel_hides_is_an_error_that_says_what_is_missing(tmp_path: Path) -> None:
    hidden = tmp_path / "pagemap"
    hidden.write_bytes((1 << 63).to_bytes(8, "little") * 16)
    with pytest.raises(TransportError, match="CAP_SYS_ADMIN"):
        physical_address(3 * PAGE_SIZE, hidden)


def test_more_than_a_huge_page_cannot_be_contiguous(transport: UioTransport) -> None:
    with pytest.raises(TransportError, match="exceed a huge page"):
        transport.dma_alloc(4 << 20)
