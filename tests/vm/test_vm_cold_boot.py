# SPDX-License-Identifier: Apache-2.0
"""A guest switched on with what `ism qemu-args` prints: the device is there from the start, and there is no IOMMU."""

from __future__ import annotations

import subprocess
import sys

import pytest
from vm_rig import GuestDriver, InGuestError

from ism.guests.lab import Lab
from ism.guests.machine import Hardware
from ism.virtio.ism_spec import Permission

pytestmark = pytest.mark.vm
SHARED = int(Permission.READ | Permission.WRITE | Permission.ATTACH)


def qemu_command(lab: Lab, *arguments: str) -> str:
    """What a user pastes into a shell."""
    return subprocess.run(
        [
            sys.executable, "-m", "ism", "qemu-args", "a", "--memory", "512M", "--qemu", str(lab.qemu_program()),
            "--config", str(lab.folder / "ism.toml"), "--run-dir", str(lab.run_dir), *arguments,
        ],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip


def test_a_guest_boots_on_what_qemu_args_prints_and_drives_the_device_by_uio_without_an_iommu(make_lab) -> None:
    lab = make_lab()
    guest = lab.boot("a", Hardware(command=qemu_command(lab).rstrip(), iommu=False, append="ism.bare"))
    assert [device["client"]["agent"] for device in lab.devices() if device["connected"]] == [True]
    bdf = lab.find(guest)
    listed = guest.run(["ism", "devices"])
    assert f"{bdf}: bound to virtio-pci" in listed
    with pytest.raises(Exception, match="no IOMMU"):
        guest.run(["ism", "bind", bdf])
    assert "uio_pci_generic" in guest.run(["ism", "bind", bdf, "--driver", "uio_pci_generic"])
    assert "in use: uio_pci_generic" in guest.run(["lspci", "-k", "-s", bdf])
    guest.run(["sh", "-c", "echo 16 > /proc/sys/vm/nr_hugepages"])
    with pytest.raises(InGuestError, match="ISM_ALLOW_NO_IOMMU"):
        GuestDriver(guest, f"uio:{bdf}")
    other = GuestDriver(lab.add("b"))
    for name in (f"uio:{bdf}", f"uio:{bdf},intx"):
        driver = GuestDriver(guest, name, {"ISM_ALLOW_NO_IOMMU": "1"})
        token = driver.alloc("shared", 65536)
        driver.grant("shared", SHARED, other.devid)
        other.attach("shared", token)
        driver.write("shared", 4096, "from uio")
        assert other.read("shared", 4096, 8) == "from uio"
        other.write("shared", 8192, "from vfio")
        assert driver.read("shared", 8192, 9) == "from vfio"
        other.ring("shared")
        driver.wait_rung("shared")
        driver.ring("shared")
        other.wait_rung("shared")
        other.close("shared")
        driver("d.close()")
    assert f"{bdf} bound to virtio-pci" in guest.run(["ism", "unbind", bdf])
