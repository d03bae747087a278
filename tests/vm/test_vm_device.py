# SPDX-License-Identifier: Apache-2.0
"""The function as an unmodified Linux kernel sees it, and the driver on kernel VFIO with an IOMMU, in two guests."""

from __future__ import annotations

import re

import pytest
from vm_rig import GuestDriver, InGuestError

from ism.virtio.ism_spec import Permission

pytestmark = pytest.mark.vm
READ, WRITE, ATTACH = int(Permission.READ), int(Permission.WRITE), int(Permission.ATTACH)


def test_the_guests_kernel_sees_the_function_with_its_capabilities_and_msix(make_lab) -> None:
    lab = make_lab(["a"], vectors=20)
    guest = lab.add("a", plain=True)
    lab.plug(guest)
    bdf = lab.find(guest)
    assert guest.run(["lspci", "-n", "-s", bdf]).split()[1:] == ["0580:", "1af4:106c", "(rev", "01)"]
    text = guest.run(["lspci", "-vv", "-s", bdf])
    assert re.search(r"MSI-X: Enable- Count=20 Masked-\s+Vector table: BAR=1 offset=00000000", text)
    for name, bar in (("CommonCfg", 0), ("Notify", 0), ("ISR", 0), ("DeviceCfg", 0)):
        assert re.search(rf"VirtIO: {name}\n\t\tBAR={bar} ", text), name
    assert re.search(r"BAR=4 offset=00000000 size=04000000", text)
    assert "Region 4: Memory at" in text
    assert "(64-bit, prefetchable) [size=64M]" in text


def test_two_guests_share_regions_through_vfio_pci_behind_an_iommu(make_lab) -> None:
    lab = make_lab()
    a, b = GuestDriver(lab.add("a")), GuestDriver(lab.add("b"))
    token = a.alloc("shared", 200_000)
    with pytest.raises(InGuestError, match="Permission"):
        b.attach("shared", token)
    a.grant("shared", READ | WRITE | ATTACH, b.devid)
    b.attach("shared", token)
    a.write("shared", 100_000, "from a")
    assert b.read("shared", 100_000, 6) == "from a"
    b.write("shared", 150_000, "from b")
    assert a.read("shared", 150_000, 6) == "from b"
    for _ in range(3):
        b.ring("shared")
        a.wait_rung("shared")
        a.ring("shared")
        b.wait_rung("shared")
    b.close("shared")
    a.write("shared", 100_000, "a once more")
    b.attach("shared", token)
    assert b.read("shared", 100_000, 11) == "a once more"
    a.close("shared")
    b.write("shared", 0, "b keeps the memory")
    assert b.read("shared", 0, 18) == "b keeps the memory"
    with pytest.raises(InGuestError, match="ENOENT"):
        a.attach("shared", token)


def test_a_guest_with_a_read_only_attachment_cannot_change_the_owners_memory(make_lab) -> None:
    lab = make_lab()
    a, b = GuestDriver(lab.add("a")), GuestDriver(lab.add("b"))
    token = a.alloc("shared", 65536)
    a.write("shared", 0, "written by its owner")
    a.grant("shared", READ | ATTACH, b.devid)
    with pytest.raises(InGuestError, match="Permission"):
        b.attach("shared", token, READ | WRITE)
    b.attach("shared", token, READ)
    assert b.read("shared", 0, 20) == "written by its owner"
    a.write("shared", 4096, "live")
    assert b.read("shared", 4096, 4) == "live"
    b.write("shared", 0, "overwritten by the other")
    assert a.read("shared", 0, 24) == "written by its owner...."
    a.write("shared", 8192, "still live")
    assert b.read("shared", 8192, 10) == "still live"


def test_memory_that_was_let_go_reads_as_zero_and_reaches_nobody(make_lab) -> None:
    lab = make_lab()
    a, b = GuestDriver(lab.add("a")), GuestDriver(lab.add("b"))
    token = a.alloc("shared", 65536)
    a.grant("shared", READ | WRITE | ATTACH, b.devid)
    b.attach("shared", token)
    b("address = r['shared'].address; keep = r['shared'].view")
    b.write("shared", 0, "mine")
    b("r.pop('shared').close()")
    b("other = d.alloc(65536); import ctypes; result = 0")
    assert b("result = ctypes.string_at(address, 4) == bytes(4)")  # the detach came before the alloc
    b("ctypes.memmove(address, b'lost', 4)")
    assert a.read("shared", 0, 4) == "mine"
    assert b("result = bytes(other.view[:4]) == bytes(4)")
