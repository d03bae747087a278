# SPDX-License-Identifier: Apache-2.0
"""The sysfs transport against a folder that looks like the kernel's, with plain files for configuration and BARs.

/dev/uioN is a FIFO here: readable when there is a count to read, as the kernel's node is. At the end the driver runs
over it as a whole: registers and memory are those of a device of the fabric, the interrupt takes its way through the
transport and a handler that does what uio_pci_generic's does.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ism.driver import Device, Region, open_device
from ism.driver.physical import HUGE_PAGE
from ism.driver.transport import DmaBuffer, Span
from ism.errors import DeviceGoneError, TransportError
from ism.eventfd import drain
from ism.memory import PAGE_SIZE, Mapping
from ism.pci_uio import UioTransport
from ism.testing import Fabric, InMemoryTransport
from ism.virtio.ism_spec import Permission

BDF = "0000:00:04.0"
CHUNK = 4096
SHARED = Permission.ATTACH | Permission.READ | Permission.WRITE
NO_BAR = "0x0000000000000000 0x0000000000000000 0x0000000000000000"


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    return with_function(tmp_path)


def with_function(sysfs: Path) -> Path:
    """Make the function's folder, as it is while no driver has it."""
    folder = sysfs / BDF
    folder.mkdir(parents=True)
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
    return sysfs


@pytest.fixture
def transport(sysfs: Path):
    transport = UioTransport(BDF, allow_no_iommu=True, sysfs=sysfs)
    yield transport
    transport.close()


@pytest.fixture
def node(sysfs: Path) -> Iterator[int]:
    kernel = bind(sysfs)
    yield kernel
    os.close(kernel)


def bind(sysfs: Path) -> int:
    """Bind the function to uio_pci_generic. Returns the kernel's end of /dev/uio5."""
    (sysfs / "uio_pci_generic").mkdir()
    (sysfs / BDF / "driver").symlink_to(sysfs / "uio_pci_generic")
    (sysfs / BDF / "uio/uio5").mkdir(parents=True)
    (sysfs / BDF / "irq").write_text("11\n")
    os.mkfifo(sysfs / "uio5")
    return os.open(sysfs / "uio5", os.O_RDWR | os.O_NONBLOCK)


def open_bound(sysfs: Path) -> UioTransport:
    return UioTransport(BDF, allow_no_iommu=True, sysfs=sysfs, dev=sysfs)


def readable(fd: int, timeout_s: float = 30.0) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def test_without_permission_to_go_without_iommu_it_explains_the_danger(sysfs: Path) -> None:
    with pytest.raises(TransportError, match=r"no IOMMU protection: every address .* physical .*ISM_ALLOW_NO_IOMMU=1"):
        UioTransport(BDF, allow_no_iommu=False, sysfs=sysfs)


@pytest.mark.parametrize("bdf", ["", "0:4.0", "0000:00:04.8", "../../etc"])
def test_what_is_no_pci_address_is_refused(bdf: str, sysfs: Path) -> None:
    with pytest.raises(ValueError, match="is no PCI address"):
        UioTransport(bdf, allow_no_iommu=True, sysfs=sysfs)


def test_an_absent_function_is_named(sysfs: Path) -> None:
    with pytest.raises(TransportError, match=r"uio:0000:00:05\.0"):
        UioTransport("0000:00:05.0", allow_no_iommu=True, sysfs=sysfs)


def test_a_function_that_a_kernel_driver_holds_is_refused_with_the_way_out(sysfs: Path, tmp_path: Path) -> None:
    (tmp_path / "virtio-pci").mkdir()
    (sysfs / BDF / "driver").symlink_to(tmp_path / "virtio-pci")
    with pytest.raises(TransportError, match=rf"by the kernel driver virtio-pci: run `ism bind {BDF} --driver uio"):
        UioTransport(BDF, allow_no_iommu=True, sysfs=sysfs)


def test_a_function_of_vfio_is_refused_with_its_right_name(sysfs: Path, tmp_path: Path) -> None:
    (tmp_path / "vfio-pci").mkdir()
    (sysfs / BDF / "driver").symlink_to(tmp_path / "vfio-pci")
    with pytest.raises(TransportError, match=rf"vfio-pci: name it vfio:{BDF}, or run"):
        UioTransport(BDF, allow_no_iommu=True, sysfs=sysfs)


def test_two_cannot_drive_one_function(transport: UioTransport, sysfs: Path) -> None:
    with pytest.raises(TransportError, match="in use by another process") as caught:
        UioTransport(BDF, allow_no_iommu=True, sysfs=sysfs)
    assert caught.value.errno == 16
    transport.close()
    UioTransport(BDF, allow_no_iommu=True, sysfs=sysfs).close()


def test_a_forked_child_keeps_neither_the_lock_nor_the_interrupt(sysfs: Path, node: int) -> None:
    transport = open_bound(sysfs)
    ready, told = os.pipe()
    end, wait = os.pipe()
    child = os.fork()
    if child == 0:
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in (transport._config, transport._uio)]
        os.write(told, b"y" if links == ["/dev/null"] * 2 else b"n")
        os.close(wait)
        os.read(end, 1)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"y"
        transport.close()
        open_bound(sysfs).close()
    finally:
        os.close(wait)
        os.waitpid(child, 0)
        for fd in (ready, told, end):
            os.close(fd)


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


def test_it_has_no_vectors_and_says_so(transport: UioTransport) -> None:
    assert transport.vector_count() == 0
    with pytest.raises(TransportError, match="no interrupt vectors"):
        transport.set_vectors(0, [0])


def test_a_function_that_no_driver_has_is_polled(transport: UioTransport) -> None:
    assert transport.enable_intx() is None


def test_a_function_without_an_interrupt_line_is_polled(sysfs: Path, node: int) -> None:
    (sysfs / BDF / "irq").write_text("0\n")
    transport = open_bound(sysfs)
    assert transport.enable_intx() is None
    transport.close()


def test_the_interrupt_comes_through_the_uio_node_and_is_allowed_again_in_the_command_register(
    sysfs: Path, node: int
) -> None:
    transport = open_bound(sysfs)
    line = transport.enable_intx()
    assert line is not None
    assert not readable(line, 0)
    transport.config_write(4, struct.pack("<H", 0x0406))  # as the kernel's handler leaves it
    os.write(node, struct.pack("<i", 1))
    assert readable(line)
    transport.rearm_intx()
    assert not readable(line, 0)
    assert transport.config_read(4, 2) == struct.pack("<H", 0x0006)
    transport.rearm_intx()  # another thread was faster: never sleeps
    transport.close()


def test_a_node_that_cannot_be_opened_is_named(sysfs: Path, node: int) -> None:
    (sysfs / "uio5").unlink()
    with pytest.raises(TransportError, match=r"uio5: No such file"):
        open_bound(sysfs)


def test_after_close_every_access_says_so(transport: UioTransport) -> None:
    transport.bar_read(0, 0, 4)
    transport.close()
    for access in (
        lambda: transport.config_read(0, 4),
        lambda: transport.config_write(4, b"\0\0"),
        lambda: transport.bar_read(0, 0, 4),
        lambda: transport.bar_write(0, 0, bytes(4)),
        lambda: transport.map_spans(4, [Span(0, PAGE_SIZE)]),
        lambda: transport.dma_alloc(1),
        transport.enable_intx,
        transport.rearm_intx,
        transport.reset,
    ):
        with pytest.raises(DeviceGoneError, match="is closed"):
            access()
    transport.close()


def test_reset_asks_the_kernel(transport: UioTransport, sysfs: Path) -> None:
    (sysfs / BDF / "reset").write_text("")
    transport.reset()
    assert (sysfs / BDF / "reset").read_text() == "1"
    (sysfs / BDF / "reset").unlink()
    (sysfs / BDF / "reset").mkdir()
    with pytest.raises(TransportError, match="the kernel cannot reset it"):
        transport.reset()


def test_queue_memory_is_named_by_its_physical_address(sysfs: Path, tmp_path: Path) -> None:
    pagemap = tmp_path / "pagemap"
    with pagemap.open("wb") as file:
        file.truncate(1 << 47 >> 12 << 3)  # sparse: an entry for each page there can be
    transport = UioTransport(BDF, allow_no_iommu=True, sysfs=sysfs, pagemap=pagemap)
    with pytest.raises(TransportError, match=r"CAP_SYS_ADMIN|huge page"):
        transport.dma_alloc(100)
    transport.close()


def test_more_than_a_huge_page_cannot_be_contiguous(transport: UioTransport) -> None:
    with pytest.raises(TransportError, match="no part of a huge page"):
        transport.dma_alloc(HUGE_PAGE + 1)


# -- its name


def test_open_device_knows_it_by_name_and_wants_to_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISM_ALLOW_NO_IOMMU", raising=False)
    for name in ("uio:ffff:00:04.0", "uio:ffff:00:04.0,intx"):
        with pytest.raises(TransportError, match="ISM_ALLOW_NO_IOMMU=1"):
            open_device(name)
    monkeypatch.setenv("ISM_ALLOW_NO_IOMMU", "1")
    with pytest.raises(TransportError, match=r"uio:ffff:00:04\.0: .*No such file"):
        open_device("uio:ffff:00:04.0")
    with pytest.raises(TransportError, match="ISM_ALLOW_NO_IOMMU=1"):
        open_device("uio:ffff:00:04.0", allow_no_iommu=False)


# -- the driver over it


class Handler:
    """The kernel's side of an interrupt, as uio_pci_generic does it. Attributes: `count` (interrupts until now)."""

    def __init__(self, port: InMemoryTransport, node: int) -> None:
        self._function, self._node, self.count = port.function, node, 0
        port.interrupt = self.interrupt  # type: ignore[method-assign]

    def interrupt(self, vector: int) -> None:
        """pci_check_and_mask_intx: is it this function's, and may it interrupt? Then forbid it and count."""
        self._function.route(vector)
        command, status = struct.unpack("<HH", self._function.config_read(4, 4))
        if status & 0x8 and not command & 0x400:
            self._function.config_write(4, struct.pack("<H", command | 0x400))
            self.count += 1
            os.write(self._node, struct.pack("<i", self.count))


class Bridged(UioTransport):
    """The transport, with registers and memory of a device of the fabric in place of the kernel's files."""

    port: InMemoryTransport

    def config_read(self, offset: int, length: int) -> bytes:
        return self.port.config_read(offset, length)

    def config_write(self, offset: int, data: bytes) -> None:
        self.port.config_write(offset, data)

    def bar_size(self, bar: int) -> int:
        return self.port.bar_size(bar)

    def bar_read(self, bar: int, offset: int, length: int) -> bytes:
        return self.port.bar_read(bar, offset, length)

    def bar_write(self, bar: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        self.port.bar_write(bar, offset, data, posted=posted)

    def map_spans(self, bar: int, spans: Sequence[Span]) -> Mapping:
        return self.port.map_spans(bar, spans)

    def dma_alloc(self, size: int) -> DmaBuffer:
        return self.port.dma_alloc(size)

    def dma_free(self, buffer: DmaBuffer) -> None:
        self.port.dma_free(buffer)

    def close(self) -> None:
        super().close()
        if hasattr(self, "port"):
            self.port.close()


class Machine:
    """Functions bound to uio_pci_generic. Attributes: `handlers`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._fabric = folder, Fabric(chunk_size=CHUNK)
        self.handlers: list[Handler] = []
        self._devices: list[Device] = []
        self._nodes: list[int] = []

    def device(self, *, interrupts: bool = True) -> Device:
        sysfs = with_function(self._folder / str(len(self._nodes)))
        self._nodes.append(bind(sysfs))
        transport = Bridged(BDF, allow_no_iommu=True, sysfs=sysfs, dev=sysfs)
        transport.port = self._fabric.plug(window_size=64 * CHUNK)
        self.handlers.append(Handler(transport.port, self._nodes[-1]))
        self._devices.append(Device(transport, interrupts=interrupts))
        return self._devices[-1]

    def close(self) -> None:
        for device in self._devices:
            device.close()
        for node in self._nodes:
            os.close(node)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.close()


def ring_and_wait(far: Region, own: Region) -> None:
    far.ring()
    assert readable(own.fileno()), "no doorbell came"
    assert drain(own.fileno())


def test_the_driver_lives_on_the_interrupt_alone(machine: Machine) -> None:
    one, other = machine.device(), machine.device()
    own = one.alloc(CHUNK, grants=[(SHARED, None)])
    far = other.attach(own.token, interrupt=True)
    for number in range(20):
        far.view[0] = number
        ring_and_wait(far, own)
        assert own.view[0] == number
        ring_and_wait(own, far)
    assert one.service._tick_s >= 1, "it polls"
    assert all(handler.count > 20 for handler in machine.handlers)


def test_waiting_threads_and_the_service_thread_share_the_interrupt(machine: Machine) -> None:
    one, other = machine.device(), machine.device()
    own = one.alloc(CHUNK, grants=[(SHARED, None)])
    far = other.attach(own.token, interrupt=True)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                one.alloc(CHUNK, interrupt=False).close()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        ring_and_wait(far, own)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a command is never answered"
    assert failures == []


def test_while_it_is_polled_the_line_is_forbidden_since_others_may_share_it(machine: Machine) -> None:
    one, other = machine.device(interrupts=False), machine.device(interrupts=False)
    own = one.alloc(CHUNK, grants=[(SHARED, None)])
    ring_and_wait(other.attach(own.token), own)
    assert [handler.count for handler in machine.handlers] == [0, 0]
    assert int.from_bytes(one.transport.config_read(4, 2), "little") == 0x0406


def test_an_interrupt_that_cannot_be_served_any_more_is_the_end_of_the_device(machine: Machine) -> None:
    device = machine.device()
    region = device.alloc(CHUNK)
    assert isinstance(device.transport, Bridged)
    device.transport.port.lose("unplugged")
    os.write(machine._nodes[0], struct.pack("<i", 9))  # the kernel wakes whoever sleeps on the node
    assert readable(region.fileno())
    with pytest.raises(DeviceGoneError, match="its interrupt cannot be served"):
        device.alloc(CHUNK)
