# SPDX-License-Identifier: Apache-2.0
"""The VFIO transport against a VFIO kernel that lives in this process (`fake_vfio`)."""

from __future__ import annotations

import errno
import gc
import os
import select
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_vfio import BDF, FabricFunction, FakeVfio

from ism.driver import Device
from ism.driver.service import Service
from ism.driver.transport import Span
from ism.driver.vfio import VfioTransport
from ism.driver.vfio_iommu import IovaSpace, Linux
from ism.driver.vfio_open import normalize_bdf
from ism.driver.vfio_uapi import IovaRange, Irq
from ism.errors import DeviceGoneError, TransportError
from ism.eventfd import drain
from ism.memory import PAGE_SIZE, Mapping
from ism.testing import Fabric
from ism.virtio.ism_spec import Permission

MEMORY_ON = (2).to_bytes(2, "little")
WAYS = [{}, {"cdev": True}]
GIB = 1 << 30


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., tuple[FakeVfio, VfioTransport]]]:
    """Make a kernel with the given settings and open its device, with memory space switched on."""
    opened: list[VfioTransport] = []

    def made(**settings: object) -> tuple[FakeVfio, VfioTransport]:
        kernel = FakeVfio(tmp_path / f"kernel{len(opened)}", **settings)
        transport = open_on(kernel)
        opened.append(transport)
        transport.config_write(4, MEMORY_ON)
        return kernel, transport

    yield made
    for transport in opened:
        transport.close()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service("test")
    yield made
    made.close()


def open_on(kernel: FakeVfio, bdf: str = BDF, *, allow_no_iommu: bool = False) -> VfioTransport:
    return VfioTransport.open(bdf, allow_no_iommu=allow_no_iommu, kernel=kernel, places=kernel.places)


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


# -- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bdf", [BDF, "01:00.0", "01:00.0".upper()])
def test_an_address_without_a_domain_is_in_domain_0(tmp_path: Path, bdf: str) -> None:
    transport = open_on(FakeVfio(tmp_path), bdf)
    assert transport.name == "vfio:0000:01:00.0"
    transport.close()


def test_a_domain_of_more_than_four_digits_stays_as_it_is() -> None:
    assert normalize_bdf("10000:E1:00.7") == "10000:e1:00.7"


@pytest.mark.parametrize("bdf", ["", "1:0.0", "0000:00:04.8", "0000:00:20.0", "../../etc", "vfio:0000:00:04.0"])
def test_what_is_no_pci_address_is_refused(bdf: str) -> None:
    with pytest.raises(TransportError, match="is no PCI address"):
        VfioTransport.open(bdf)


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({}, ["container", "device", "group"]),
        ({"cdev": True}, ["cdev", "iommufd"]),
        ({"cdev": True, "iommufd": False}, ["container", "device", "group"]),
        ({"cdev": True, "no_right": {"vfio0"}}, ["container", "device", "group"]),
        ({"cdev": True, "no_right": {"iommu"}}, ["container", "device", "group"]),
    ],
)
def test_the_newer_way_is_taken_where_the_kernel_and_the_rights_allow_it(
    make: Callable[..., tuple[FakeVfio, VfioTransport]], settings: dict[str, object], files: list[str]
) -> None:
    kernel, transport = make(**settings)
    assert kernel.open_files == files
    transport.close()
    assert kernel.open_files == []


def refused(kernel: FakeVfio, match: str, *, allow_no_iommu: bool = False) -> TransportError:
    """Open in vain: the error names the device, nothing stays open."""
    before = kernel.open_files
    with pytest.raises(TransportError, match=match) as info:
        open_on(kernel, allow_no_iommu=allow_no_iommu)
    assert "vfio:0000:01:00.0" in str(info.value)
    assert kernel.open_files == before
    return info.value


def test_an_absent_function_is_refused_with_the_command_that_lists_them(tmp_path: Path) -> None:
    kernel = FakeVfio(tmp_path)
    with pytest.raises(TransportError, match=r"vfio:0000:00:05\.0: there is no such PCI function; `lspci"):
        open_on(kernel, "00:05.0")


def test_a_function_that_another_driver_holds_is_refused_with_the_command_that_binds_it(tmp_path: Path) -> None:
    kernel = FakeVfio(tmp_path)
    kernel.bind("virtio-pci")
    error = refused(kernel, r"held by the kernel driver virtio-pci, not by vfio-pci: run `ism bind 0000:01:00\.0`")
    assert error.errno == errno.EBUSY


def test_a_function_that_no_driver_holds_is_refused_with_the_command_that_binds_it(tmp_path: Path) -> None:
    kernel = FakeVfio(tmp_path)
    kernel.bind(None)
    refused(kernel, r"held by no kernel driver, not by vfio-pci: run `ism bind")


def test_without_an_iommu_binding_alone_does_not_help_and_the_error_says_so(tmp_path: Path) -> None:
    kernel = FakeVfio(tmp_path)
    kernel.bind(None)
    (kernel.places.sysfs / BDF / "iommu_group").unlink()
    refused(kernel, r"needs an IOMMU: boot with an IOMMU .*intel_iommu=on.*uio:0000:01:00\.0")


def test_a_function_without_a_group_is_refused(tmp_path: Path) -> None:
    kernel = FakeVfio(tmp_path)
    (kernel.places.sysfs / BDF / "iommu_group").unlink()
    refused(kernel, "is in no IOMMU group; boot with an IOMMU")


@pytest.mark.parametrize("way", WAYS)
def test_a_device_that_somebody_has_open_is_refused(tmp_path: Path, way: dict[str, object]) -> None:
    kernel = FakeVfio(tmp_path, **way)
    first = open_on(kernel)
    error = refused(kernel, "another process, or a forked child of one, has the device open.*one function per process")
    assert error.errno == errno.EBUSY
    first.close()
    open_on(kernel).close()


@pytest.mark.parametrize("way", WAYS)
def test_a_group_with_functions_of_other_drivers_is_refused_with_their_names(
    tmp_path: Path, way: dict[str, object]
) -> None:
    kernel = FakeVfio(tmp_path, **way)
    kernel.add_neighbour("0000:01:00.1", "e1000e")
    kernel.add_neighbour("0000:00:01.0", "pcieport")
    refused(kernel, r"shares its IOMMU group with 0000:01:00\.1 \(e1000e\): a group is given away as a whole")


@pytest.mark.parametrize("file", ["7", "vfio"])
def test_a_file_that_may_not_be_opened_is_refused_with_its_owner_and_how_to_change_that(
    tmp_path: Path, file: str
) -> None:
    kernel = FakeVfio(tmp_path, no_right={file})
    error = refused(
        kernel, rf"{tmp_path}/dev/vfio/{file}: Permission denied: it belongs to \S+:\S+, mode 6\d\d; `chown`"
    )
    assert error.errno == errno.EACCES


def test_a_kernel_without_groups_names_the_device_file_that_may_not_be_opened(tmp_path: Path) -> None:
    kernel = FakeVfio(tmp_path, cdev=True, group=False, no_right={"vfio0"})
    refused(kernel, "devices/vfio0: Permission denied")


def test_a_group_whose_file_is_missing_is_refused_with_the_module(tmp_path: Path) -> None:
    kernel = FakeVfio(tmp_path, group=False)
    refused(kernel, "No such file or directory; load the module vfio-pci")


def test_a_kernel_without_the_type1_module_is_refused_with_its_name(tmp_path: Path) -> None:
    refused(FakeVfio(tmp_path, type1=False), "no VFIO_TYPE1v2_IOMMU: load the module vfio_iommu_type1")


@pytest.mark.parametrize(("way", "module"), [({}, "vfio_iommu_type1"), ({"cdev": True}, "iommufd")])
def test_an_iommu_that_remaps_no_interrupts_is_refused_with_both_ways_out(
    tmp_path: Path, way: dict[str, object], module: str
) -> None:
    kernel = FakeVfio(tmp_path, remapping=False, **way)
    refused(kernel, f"intremap=on, or load the module {module} with allow_unsafe_interrupts=1")


def test_no_iommu_mode_is_refused_unless_asked_for_and_the_error_says_why(tmp_path: Path) -> None:
    kernel = FakeVfio(tmp_path, no_iommu=True)
    error = refused(kernel, "no IOMMU protection.*can reach all memory.*QEMU: -device intel-iommu.*allow_no_iommu=True")
    assert error.errno == errno.EPERM


def test_no_iommu_mode_that_is_asked_for_opens_the_group_made_for_it(tmp_path: Path) -> None:
    kernel = FakeVfio(tmp_path, no_iommu=True)
    transport = open_on(kernel, allow_no_iommu=True)
    assert transport.config_read(0, 4) == bytes.fromhex("f41a6c10")
    kernel.places.pagemap.write_bytes(b"")
    with pytest.raises(TransportError, match=r"CAP_SYS_ADMIN|nr_hugepages"):
        transport.dma_alloc(1)
    assert kernel.maps == {}
    transport.close()


# -- registers --------------------------------------------------------------------------------------------------------


def test_configuration_space_is_read_and_written(make: Callable[..., tuple[FakeVfio, VfioTransport]]) -> None:
    _, transport = make()
    assert len(transport.config_read(0, 256)) == 256
    transport.config_write(0x40, b"\xaa\xbb")
    assert transport.config_read(0x40, 3) == b"\xaa\xbb\0"


def test_configuration_space_has_an_end(make: Callable[..., tuple[FakeVfio, VfioTransport]]) -> None:
    _, transport = make()
    with pytest.raises(TransportError, match=r"8 bytes at 4092 are not in region 7 \(4096\)"):
        transport.config_read(4092, 8)


def test_bars_have_the_sizes_that_the_kernel_says(make: Callable[..., tuple[FakeVfio, VfioTransport]]) -> None:
    _, transport = make()
    assert [transport.bar_size(bar) for bar in range(-1, 7)] == [
        0,
        4 * PAGE_SIZE,
        512,
        PAGE_SIZE,
        0,
        16 * PAGE_SIZE,
        0,
        0,
    ]


@pytest.mark.parametrize(("bar", "mapped"), [(0, True), (1, False)])
def test_registers_are_one_access_mapped_where_the_kernel_maps_them(
    make: Callable[..., tuple[FakeVfio, VfioTransport]], bar: int, mapped: bool
) -> None:
    kernel, transport = make()
    kernel.log.clear()
    transport.bar_write(bar, 0x108, (0x1122334455667788).to_bytes(8, "little"))
    assert transport.bar_read(bar, 0x108, 4) == bytes.fromhex("88776655")
    assert transport.bar_read(bar, 0x10E, 2) == bytes.fromhex("2211")
    assert kernel.log == (["mmap 0"] if mapped else ["pwrite 1", "pread 1", "pread 1"])
    assert kernel.function.read(bar, 0x108, 8) == bytes.fromhex("8877665544332211")


def test_registers_that_the_kernel_promised_to_map_and_does_not_go_through_the_kernel(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
) -> None:
    kernel, transport = make()
    kernel.settings.mappable.clear()
    transport.bar_write(0, 16, b"\x07\0", posted=True)
    assert transport.bar_read(0, 16, 2) == b"\x07\0"
    assert kernel.log.count("pwrite 0") == 1


@pytest.mark.parametrize(
    ("offset", "length"), [(1, 2), (2, 4), (0, 3), (4 * PAGE_SIZE - 4, 8), (4 * PAGE_SIZE, 1), (-4, 4)]
)
def test_an_access_that_is_no_register_access_is_refused(
    make: Callable[..., tuple[FakeVfio, VfioTransport]], offset: int, length: int
) -> None:
    _, transport = make()
    with pytest.raises(TransportError, match="no register access"):
        transport.bar_read(0, offset, length)


def test_an_access_while_memory_space_is_off_is_refused_and_no_bus_error(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
) -> None:
    _, transport = make()
    transport.bar_read(0, 0, 4)
    for command in (b"\0\0", b"\x05\0"):
        transport.config_write(4, command)
        with pytest.raises(TransportError, match="memory space is off"):
            transport.bar_read(0, 0, 4)
    transport.config_write(4, b"\x06\0")
    transport.bar_read(0, 0, 4)


# -- regions ----------------------------------------------------------------------------------------------------------


def test_spans_of_a_bar_are_mapped_side_by_side(make: Callable[..., tuple[FakeVfio, VfioTransport]]) -> None:
    kernel, transport = make()
    for page in range(4):
        kernel.function.write(4, page * PAGE_SIZE, bytes([page]))
    mapping = transport.map_spans(4, [Span(3 * PAGE_SIZE, PAGE_SIZE), Span(PAGE_SIZE, 2 * PAGE_SIZE)])
    assert mapping.length == 3 * PAGE_SIZE
    assert [mapping.view[page * PAGE_SIZE] for page in range(3)] == [3, 1, 2]
    mapping.view[7] = 9
    assert kernel.function.read(4, 3 * PAGE_SIZE + 7, 1) == b"\x09"


def test_a_mapping_that_was_cleared_is_the_devices_no_more(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
) -> None:
    kernel, transport = make()
    mapping = transport.map_spans(4, [Span(0, PAGE_SIZE)])
    mapping.clear()
    mapping.view[0] = 1
    assert kernel.function.read(4, 0, 1) == b"\0"


@pytest.mark.parametrize("settings", [{"mappable": {0}}, {"sparse": {4: [(0, PAGE_SIZE), (2 * PAGE_SIZE, PAGE_SIZE)]}}])
def test_a_span_that_the_kernel_does_not_map_is_refused_with_the_likely_reason(
    make: Callable[..., tuple[FakeVfio, VfioTransport]], settings: dict[str, object]
) -> None:
    _, transport = make(**settings)
    with pytest.raises(TransportError, match=r"BAR 4 cannot be mapped at 4096\+4096; does QEMU run with the map agent"):
        transport.map_spans(4, [Span(PAGE_SIZE, PAGE_SIZE)])


def test_the_areas_that_a_bar_can_be_mapped_in_are_used(make: Callable[..., tuple[FakeVfio, VfioTransport]]) -> None:
    _, transport = make(sparse={4: [(0, PAGE_SIZE), (2 * PAGE_SIZE, 2 * PAGE_SIZE)]})
    assert transport.map_spans(4, [Span(3 * PAGE_SIZE, PAGE_SIZE), Span(0, PAGE_SIZE)]).length == 2 * PAGE_SIZE


@pytest.mark.parametrize("spans", [[], [Span(0, 100)], [Span(100, PAGE_SIZE)]])
def test_spans_that_are_not_made_of_pages_are_refused(
    make: Callable[..., tuple[FakeVfio, VfioTransport]], spans: list[Span]
) -> None:
    _, transport = make()
    with pytest.raises(TransportError, match="are no pages of a BAR"):
        transport.map_spans(4, spans)


def test_what_the_kernel_refuses_to_map_is_an_error_that_names_the_limit(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
) -> None:
    kernel, transport = make()
    kernel.settings.mappable.clear()
    with pytest.raises(TransportError, match=r"cannot be mapped in 1 parts \(vm\.max_map_count"):
        transport.map_spans(4, [Span(0, PAGE_SIZE)])


# -- queue memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_queue_memory_is_zero_and_the_device_sees_what_is_stored_there(
    make: Callable[..., tuple[FakeVfio, VfioTransport]], way: dict[str, object]
) -> None:
    kernel, transport = make(**way)
    buffers = [transport.dma_alloc(size) for size in (1, PAGE_SIZE + 1, PAGE_SIZE)]
    assert [buffer.iova for buffer in buffers] == [4 * GIB, 4 * GIB + 2 * PAGE_SIZE, 4 * GIB + PAGE_SIZE]
    for number, buffer in enumerate(buffers):
        assert not any(buffer.mapping.view)
        buffer.mapping.view[5] = number + 1
        assert kernel.dma_read(buffer.iova + 5, 1) == bytes([number + 1])


@pytest.mark.parametrize("way", WAYS)
def test_memory_that_was_freed_is_out_of_the_devices_reach_and_its_address_is_used_again(
    make: Callable[..., tuple[FakeVfio, VfioTransport]], way: dict[str, object]
) -> None:
    kernel, transport = make(**way)
    first, second = transport.dma_alloc(1), transport.dma_alloc(1)
    transport.dma_free(first)
    transport.dma_free(first)
    with pytest.raises(KeyError):
        kernel.dma_read(first.iova, 1)
    assert transport.dma_alloc(1).iova == first.iova
    assert kernel.dma_read(second.iova, 1) == b"\0"


def test_large_memory_is_made_of_huge_pages_where_there_are_any_and_of_others_where_not(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
) -> None:
    kernel, transport = make()
    buffer = transport.dma_alloc(1 << 20)
    assert buffer.mapping.length in (1 << 20, 1 << 21)
    buffer.mapping.view[-1] = 7
    assert kernel.dma_read(buffer.iova + buffer.mapping.length - 1, 1) == b"\x07"


@pytest.mark.parametrize("way", WAYS)
def test_memory_beyond_the_memlock_limit_is_refused_with_the_limit_and_leaves_no_address_taken(
    make: Callable[..., tuple[FakeVfio, VfioTransport]], way: dict[str, object]
) -> None:
    kernel, transport = make(memlock=2 * PAGE_SIZE, **way)
    with pytest.raises(TransportError, match=r"12288 bytes.*the memlock limit is .*: raise it \(ulimit -l") as info:
        transport.dma_alloc(3 * PAGE_SIZE)
    assert info.value.errno == errno.ENOMEM
    assert transport.dma_alloc(2 * PAGE_SIZE).iova == 4 * GIB
    assert list(kernel.maps) == [4 * GIB]


@pytest.mark.parametrize("way", WAYS)
def test_addresses_come_from_the_ranges_that_the_iommu_maps(
    make: Callable[..., tuple[FakeVfio, VfioTransport]], way: dict[str, object]
) -> None:
    ranges = [(0, PAGE_SIZE - 1), (GIB, GIB + 2 * PAGE_SIZE - 1), (8 * GIB, 8 * GIB + PAGE_SIZE - 1)]
    _, transport = make(iova=ranges, **way)
    assert [transport.dma_alloc(1).iova for _ in range(3)] == [8 * GIB, GIB, GIB + PAGE_SIZE]
    with pytest.raises(TransportError, match="the IOMMU maps no 4096 bytes more"):
        transport.dma_alloc(1)


def test_more_ranges_than_were_expected_are_asked_for_again(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
) -> None:
    ranges = [(number * GIB, number * GIB + PAGE_SIZE - 1) for number in range(5, 105)]
    _, transport = make(cdev=True, iova=ranges)
    assert transport.dma_alloc(1).iova == 5 * GIB


def test_a_kernel_that_says_no_ranges_gets_addresses_that_every_iommu_maps(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
) -> None:
    _, transport = make(says_iova=False)
    assert transport.dma_alloc(1).iova == 4 * GIB


def test_addresses_are_aligned_and_holes_between_them_are_filled() -> None:
    space = IovaSpace([IovaRange(start=4 * GIB, end=5 * GIB - 1)])
    page, huge = space.take(4096, 4096), space.take(2 << 20, 2 << 20)
    assert (page, huge) == (4 * GIB, 4 * GIB + (2 << 20))
    assert space.take(4096, 4096) == 4 * GIB + 4096
    space.give(4 * GIB)
    assert space.take(8192, 4096) == 4 * GIB + 8192
    assert space.take(4096, 4096) == 4 * GIB


# -- interrupts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_vector_raises_the_eventfd_that_is_bound_to_it(
    make: Callable[..., tuple[FakeVfio, VfioTransport]], dynamic: bool
) -> None:
    kernel, transport = make(dynamic=dynamic)
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    assert transport.vector_count() == 16
    transport.set_vectors(0, fds[:3])
    transport.set_vectors(9, fds[3:])
    for vector, fd in zip((0, 1, 2, 9), fds, strict=True):
        kernel.interrupt(vector)
        assert [readable(one) for one in fds] == [one == fd for one in fds]
        drain(fd)
    transport.set_vectors(1, [None])
    kernel.interrupt(1)
    assert not readable(fds[1])
    assert kernel.triggers(Irq.VFIO_PCI_MSIX_IRQ_INDEX) == [0, 2, 9]
    for fd in fds:
        os.close(fd)


def test_a_kernel_that_adds_no_vectors_later_is_asked_once_for_all_of_them(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
) -> None:
    kernel, transport = make(dynamic=False, irqs_left=5)
    assert transport.vector_count() == transport.vector_count() == 5
    assert kernel.log.count("VFIO_DEVICE_SET_IRQS") == 2
    with pytest.raises(TransportError, match="has 5 vectors, not 1 from 5 on"):
        transport.set_vectors(5, [None])


def test_a_kernel_that_has_too_few_vectors_left_is_an_error_that_says_how_many(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
) -> None:
    _, transport = make(irqs_left=2)
    with pytest.raises(TransportError, match="the kernel has 2 interrupt vectors for it"):
        transport.set_vectors(0, [None] * 3)
    transport.set_vectors(0, [None])


def test_a_function_without_vectors_has_none_and_refuses_to_bind_any(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
) -> None:
    _, transport = make(vectors=0)
    assert transport.vector_count() == 0
    with pytest.raises(TransportError, match="has 0 vectors"):
        transport.set_vectors(0, [None])


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_interrupt_line_is_silent_from_an_interrupt_until_it_is_rearmed_and_loses_none(
    make: Callable[..., tuple[FakeVfio, VfioTransport]], dynamic: bool
) -> None:
    kernel, transport = make(vectors=2, dynamic=dynamic)
    assert transport.vector_count() == 2
    fd = transport.enable_intx()
    assert fd is not None
    assert transport.enable_intx() == fd
    kernel.interrupt_line()
    assert drain(fd)
    kernel.interrupt_line()
    assert not readable(fd)
    transport.rearm_intx()
    assert readable(fd)
    transport.rearm_intx()
    assert not readable(fd)


def test_a_function_without_an_interrupt_line_says_so(make: Callable[..., tuple[FakeVfio, VfioTransport]]) -> None:
    _, transport = make(has_intx=False)
    assert transport.enable_intx() is None


@pytest.mark.parametrize(
    ("index", "reason"),
    [(Irq.VFIO_PCI_REQ_IRQ_INDEX, "wants the device back"), (Irq.VFIO_PCI_ERR_IRQ_INDEX, "reported a fatal error")],
)
def test_whoever_must_know_is_told_once_when_the_device_is_lost(
    make: Callable[..., tuple[FakeVfio, VfioTransport]], service: Service, index: Irq, reason: str
) -> None:
    kernel, transport = make()
    said: list[str] = []
    told = os.eventfd(0)
    transport.start(service, lambda reason: (said.append(reason), os.eventfd_write(told, 1)))
    kernel.raise_special(index)
    os.eventfd_read(told)
    assert len(said) == 1
    assert reason in said[0]
    assert kernel.triggers(index) == []
    os.close(told)


def test_a_function_that_reports_no_bus_errors_is_watched_for_the_rest(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
    service: Service,
) -> None:
    kernel, transport = make(express=False)
    transport.start(service, lambda reason: None)
    assert kernel.triggers(Irq.VFIO_PCI_REQ_IRQ_INDEX) == [0]
    assert kernel.triggers(Irq.VFIO_PCI_ERR_IRQ_INDEX) == []


def test_no_doorbell_has_an_eventfd_and_no_command_needs_one_served(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
) -> None:
    _, transport = make()
    assert transport.doorbell_fd(0) is None
    assert transport.answer_fds() == ()


# -- the end ----------------------------------------------------------------------------------------------------------


def test_reset_resets_the_function(make: Callable[..., tuple[FakeVfio, VfioTransport]]) -> None:
    _, transport = make()
    transport.bar_write(0, 0, b"\x01")
    transport.reset()
    assert transport.bar_read(0, 0, 1) == b"\0"


def test_a_function_that_cannot_be_reset_says_so(make: Callable[..., tuple[FakeVfio, VfioTransport]]) -> None:
    _, transport = make(resets=False)
    with pytest.raises(TransportError, match="no way to reset it"):
        transport.reset()


def test_close_ends_interrupts_then_memory_then_descriptors_and_nothing_is_left(
    tmp_path: Path, service: Service
) -> None:
    gc.collect()
    before = os.listdir("/proc/self/fd")
    kernel = FakeVfio(tmp_path)
    transport = open_on(kernel)
    transport.start(service, lambda reason: None)
    fd = os.eventfd(0)
    transport.set_vectors(0, [fd])
    transport.dma_alloc(1)
    kernel.log.clear()
    transport.close()
    assert kernel.log == ["VFIO_DEVICE_SET_IRQS"] * 3 + ["VFIO_IOMMU_UNMAP_DMA"]
    assert kernel.open_files == []
    assert kernel.maps == {}
    transport.close()
    os.close(fd)
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


def test_close_takes_the_device_away_from_views_that_are_left(tmp_path: Path) -> None:
    kernel = FakeVfio(tmp_path)
    transport = open_on(kernel)
    kernel.function.write(4, 0, b"\x05")
    held = transport.map_spans(4, [Span(0, PAGE_SIZE)])
    view = transport.map_spans(4, [Span(0, PAGE_SIZE)]).view[:16]
    assert held.view[0] == view[0] == 5
    assert maps_of_the_device() == 2
    transport.close()
    assert maps_of_the_device() == 0
    assert held.view[0] == view[0] == 0


def test_close_leaves_addresses_alone_that_are_somebody_elses_by_then(tmp_path: Path) -> None:
    transport = open_on(FakeVfio(tmp_path))
    for _ in range(10):
        transport.map_spans(4, [Span(0, PAGE_SIZE)])
    others = [memoryview(bytearray(b"\1" * PAGE_SIZE)) for _ in range(10)]
    assert len(transport._placed) == 1
    transport.close()
    assert all(other[0] == 1 for other in others)


def maps_of_the_device() -> int:
    return sum("fake-device" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_after_close_every_access_says_that_the_way_is_gone(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
    service: Service,
) -> None:
    _, transport = make()
    transport.close()
    accesses: list[Callable[[], object]] = [
        lambda: transport.config_read(0, 4),
        lambda: transport.config_write(4, b"\0\0"),
        lambda: transport.bar_read(0, 0, 4),
        lambda: transport.bar_write(0, 0, bytes(4)),
        lambda: transport.map_spans(4, [Span(0, PAGE_SIZE)]),
        lambda: transport.dma_alloc(1),
        lambda: transport.set_vectors(0, [None]),
        transport.vector_count,
        transport.enable_intx,
        transport.rearm_intx,
        transport.reset,
        lambda: transport.start(service, lambda reason: None),
    ]
    for access in accesses:
        with pytest.raises(DeviceGoneError, match="is closed"):
            access()


def test_a_device_that_was_unplugged_is_gone(make: Callable[..., tuple[FakeVfio, VfioTransport]]) -> None:
    kernel, transport = make()

    def gone(*_: object) -> bytes:
        raise OSError(errno.ENODEV, "No such device")

    kernel.pread = gone  # type: ignore[method-assign]
    with pytest.raises(DeviceGoneError, match="4 bytes at 0 of region 7 cannot be read: No such device"):
        transport.config_read(0, 4)


def test_a_forked_child_has_neither_the_device_nor_queue_memory_but_regions(
    make: Callable[..., tuple[FakeVfio, VfioTransport]],
    service: Service,
) -> None:
    kernel, transport = make()
    transport.start(service, lambda reason: None)
    region, queue = transport.map_spans(4, [Span(0, PAGE_SIZE)]), transport.dma_alloc(1)
    transport.bar_write(0, 0, b"\x02")
    region.view[0] = queue.mapping.view[0] = 1
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert kernel.open_files == []
            assert queue.mapping.view[0] == 0
            queue.mapping.view[0] = region.view[0] = 3
            with pytest.raises(DeviceGoneError, match="before a fork"):
                transport.bar_read(0, 0, 1)
            transport.dma_free(queue)
            transport.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert queue.mapping.view[0] == 1
    assert region.view[0] == 3
    assert transport.bar_read(0, 0, 1) == b"\x02"


def test_the_system_calls_are_made_on_the_descriptors_that_they_are_given(tmp_path: Path) -> None:
    linux, path = Linux(), tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE_SIZE))
    fd = linux.open(path)
    assert not os.get_inheritable(fd)
    assert linux.pwrite(fd, b"abc", PAGE_SIZE) == 3
    assert linux.pread(fd, 2, PAGE_SIZE + 1) == b"bc"
    mapping = Mapping(PAGE_SIZE)
    linux.place(mapping, 0, PAGE_SIZE, fd, PAGE_SIZE)
    mapping.view[0] = ord("x")
    assert path.read_bytes()[PAGE_SIZE : PAGE_SIZE + 3] == b"xbc"
    linux.close(fd)
    read, write = os.pipe()
    os.write(write, b"12345")
    answer = bytearray(2000)  # more than the interpreter copies
    assert linux.ioctl(read, termios.FIONREAD, answer) == 0
    assert int.from_bytes(answer[:4], "little") == 5
    with pytest.raises(OSError, match="Inappropriate ioctl"):
        linux.ioctl(read, 0x3B64, 0)
    os.close(read)
    os.close(write)


# -- the driver on top ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"cdev": True}, {"dynamic": False}])
def test_two_devices_share_a_region_through_it(tmp_path: Path, settings: dict[str, object]) -> None:
    fabric = Fabric(chunk_size=PAGE_SIZE)
    kernels = [
        FakeVfio(
            tmp_path / str(number),
            FabricFunction(fabric.plug(vectors=16, window_size=256 * PAGE_SIZE)),
            mappable={4},
            **settings,
        )
        for number in range(2)
    ]
    one, other = (Device(open_on(kernel)) for kernel in kernels)
    shared = Permission.ATTACH | Permission.READ | Permission.WRITE
    region = one.alloc(10000, grants=[(shared, other.devid)])
    theirs = other.attach(region.token)
    theirs.view[:5] = b"hello"
    theirs.ring()
    assert select.select([region], [], [], 10)[0]
    assert bytes(region.view[:5]) == b"hello"
    one.close()
    other.close()
    assert [kernel.open_files for kernel in kernels] == [[], []]
