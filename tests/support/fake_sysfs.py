# SPDX-License-Identifier: Apache-2.0
"""A /sys with a kernel behind it that reacts to writes as Linux does to those of `ism bind`: a tree of real files.

What it knows of drivers, as in the kernel: virtio-pci has the ids 1af4:1000-107f; vfio-pci and uio_pci_generic have
none, so they take a function by driver_override only; vfio-pci refuses one without an IOMMU group, unless unsafe mode
is on. drivers_probe succeeds whether or not a driver was found; a driver's `unbind` and `bind` do not.
Source: Linux drivers/base/bus.c, drivers/base/dd.c, drivers/pci/pci-driver.c, drivers/vfio.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ism.device.bars import Layout
from ism.device.config_space import ConfigSpace
from ism.device.contract import FunctionConfig
from ism.driver.pci_sysfs import Sysfs
from ism.ids import DevId, Gid

OURS = "0000:01:00.0"
_UNSAFE = "module/vfio/parameters/enable_unsafe_noiommu_mode"


def configuration(vectors: int) -> bytes:
    """Configuration space of our own device."""
    config = FunctionConfig(Gid(1), DevId(1), 65536, 1 << 26, vectors, frozenset({0, 1}), "fake")
    return bytes(ConfigSpace(Layout(config)).read(0, 256))


class FakeSysfs(Sysfs):
    """`Sysfs` over a made-up tree.

    Attributes: `writes` (paths and texts, in order), `refuse` (path endings whose writes fail with EIO), `modules`
    (what modprobe finds), `loads` (what it was asked for), `root_user`, `limit` (of locked memory).
    """

    def __init__(self, folder: Path, *, loaded: tuple[str, ...] = ("vfio-pci", "uio_pci_generic")) -> None:
        super().__init__(folder / "sys", folder / "dev", folder / "proc")
        for path in (self.root / "bus/pci/devices", self.root / "bus/pci/drivers", self.dev / "vfio", self.proc):
            path.mkdir(parents=True)
        self.put("bus/pci/drivers_probe", "")
        self.writes: list[tuple[str, str]] = []
        self.refuse: set[str] = set()
        self.modules = {"vfio-pci", "uio_pci_generic"}
        self.loads: list[str] = []
        self.root_user, self.limit = True, -1
        self.free_huge_pages(16)
        for name in ("virtio-pci", "ahci", *loaded):
            self._register(name)

    # -- how a test arranges it ---------------------------------------------------------------------------------

    def put(self, path: str, text: str) -> None:
        """Make an attribute, without any reaction."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def plug(
        self,
        bdf: str = OURS,
        *,
        ids: tuple[str, str] = ("0x1af4", "0x106c"),
        group: int | None = None,
        driver: str | None = "virtio-pci",
    ) -> None:
        """Add a function that a driver has."""
        at = self.root / "devices/pci0000:00" / bdf
        at.mkdir(parents=True)
        (at / "vendor").write_text(f"{ids[0]}\n")
        (at / "device").write_text(f"{ids[1]}\n")
        (at / "driver_override").write_text("(null)\n")
        (at / "config").write_bytes(configuration(64))
        rows = [
            "0xfe000000 0xfe003fff 0x40200",
            "0 0 0",
            "0xc000 0xc0ff 0x40101",
            "0 0 0",
            "0x8000000000 0x8003ffffff 0x14220c",
        ]
        (at / "resource").write_text("\n".join([*rows, "0 0 0", "0 0 0"]) + "\n")
        (self.root / "bus/pci/devices" / bdf).symlink_to(at)
        if group is not None:
            members = self.root / "kernel/iommu_groups" / str(group) / "devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / bdf).symlink_to(at)
            (at / "iommu_group").symlink_to(members.parent)
        if driver is not None:
            self._attach(driver, bdf)

    def allow_unsafe_vfio(self) -> None:
        """Set the module parameter that lets VFIO do without an IOMMU."""
        self.put(_UNSAFE, "Y\n")

    def free_huge_pages(self, count: int) -> None:
        """Say how many huge pages there are; locked pages may move."""
        self.put("kernel/mm/hugepages/hugepages-2048kB/free_hugepages", f"{count}\n")
        (self.proc / "sys/vm").mkdir(parents=True, exist_ok=True)
        (self.proc / "sys/vm/compact_unevictable_allowed").write_text("1\n")

    def open_in_process(self, node: Path, pid: int, program: str) -> None:
        """Make it look as if a process had a device node open."""
        fds = self.proc / str(pid) / "fd"
        fds.mkdir(parents=True)
        (fds.parent / "comm").write_text(f"{program}\n")
        (fds / "3").symlink_to(node)

    def driver_of(self, bdf: str = OURS) -> str | None:
        """The driver that has the function."""
        return self.link(f"bus/pci/devices/{bdf}/driver")

    def override_of(self, bdf: str = OURS) -> str:
        """What driver_override reads."""
        return self.read(f"bus/pci/devices/{bdf}/driver_override")

    # -- what the code under test sees --------------------------------------------------------------------------

    @property
    def is_root(self) -> bool:
        return self.root_user

    @property
    def memlock(self) -> int:
        return self.limit

    def load_module(self, name: str) -> str | None:
        self.loads.append(name)
        if name not in self.modules:
            return f"modprobe: FATAL: Module {name} not found."
        self._register(name)
        return None

    def write(self, path: str, text: str) -> None:
        self.writes.append((path, text))
        if not (self.root / path).exists():
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if any(path.endswith(ending) for ending in self.refuse):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        match path.split("/"):
            case ["bus", "pci", "devices", _, "driver_override"]:
                (self.root / path).write_text(f"{text.strip() or '(null)'}\n")
            case ["bus", "pci", "drivers", driver, "unbind"]:
                if self.driver_of(text) != driver:
                    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
                self._detach(driver, text)
            case ["bus", "pci", "drivers", driver, "bind"]:
                if self.driver_of(text) is not None or not self._matches(driver, text):
                    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
                if not self._attach(driver, text):
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            case ["bus", "pci", "drivers_probe"]:
                self._probe(text)
            case _:
                raise AssertionError(f"a write to {path}, which no kernel has")

    # -- the kernel ---------------------------------------------------------------------------------------------

    def _register(self, driver: str) -> None:
        for name in ("bind", "unbind", "new_id"):
            self.put(f"bus/pci/drivers/{driver}/{name}", "")
        if driver == "vfio-pci" and not self.exists(_UNSAFE):
            self.put(_UNSAFE, "N\n")

    def _probe(self, bdf: str) -> None:
        if not self.exists(f"bus/pci/devices/{bdf}"):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if self.driver_of(bdf) is None:
            any(self._matches(driver, bdf) and self._attach(driver, bdf) for driver in self.entries("bus/pci/drivers"))

    def _matches(self, driver: str, bdf: str) -> bool:
        override = self.override_of(bdf)
        if override != "(null)":
            return override == driver
        vendor, device = (int(self.read(f"bus/pci/devices/{bdf}/{name}"), 16) for name in ("vendor", "device"))
        return driver == "virtio-pci" and vendor == 0x1AF4 and 0x1000 <= device <= 0x107F

    def _attach(self, driver: str, bdf: str) -> bool:
        at = self.root / "bus/pci/devices" / bdf
        group = self.link(f"bus/pci/devices/{bdf}/iommu_group")
        if driver == "vfio-pci":
            if group is None:
                if self.read(_UNSAFE) != "Y":
                    return False
                group = "0"
                made = self.root / "kernel/iommu_groups/0"
                (made / "devices").mkdir(parents=True)
                (made / "name").write_text("vfio-noiommu\n")
                (at / "iommu_group").symlink_to(made)
                (self.dev / "vfio/noiommu-0").touch()
            else:
                (self.dev / "vfio" / group).touch()
        elif driver == "uio_pci_generic":
            (at / "uio/uio0").mkdir(parents=True)
            (self.dev / "uio0").touch()
        (at / "driver").symlink_to(self.root / "bus/pci/drivers" / driver)
        (self.root / "bus/pci/drivers" / driver / bdf).symlink_to(at.resolve())
        return True

    def _detach(self, driver: str, bdf: str) -> None:
        at = self.root / "bus/pci/devices" / bdf
        (at / "driver").unlink()
        (self.root / "bus/pci/drivers" / driver / bdf).unlink()
        group = self.link(f"bus/pci/devices/{bdf}/iommu_group")
        if driver == "uio_pci_generic":
            (at / "uio/uio0").rmdir()
            (at / "uio").rmdir()
            (self.dev / "uio0").unlink()
        elif driver == "vfio-pci" and (self.dev / "vfio/noiommu-0").exists():
            (at / "iommu_group").unlink()
            (self.dev / "vfio/noiommu-0").unlink()
        elif driver == "vfio-pci" and group is not None:
            (self.dev / "vfio" / group).unlink()
