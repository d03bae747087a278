# SPDX-License-Identifier: Apache-2.0
"""What happens when QEMU, a guest, its driver or the manager comes late, goes, or comes back."""

from __future__ import annotations

import os
import signal

import pytest
from vm_programs import SEND, SERVE
from vm_rig import GuestDriver, InGuestError

from ism.guests.guest import GuestProgramError
from ism.guests.lab import address_of
from ism.guests.machine import Hardware, Machine, MachineError
from ism.guests.qmp import QmpError
from ism.virtio.ism_spec import Permission

pytestmark = pytest.mark.vm
PORT = 9000
A = address_of(1)
SHARED = int(Permission.READ | Permission.WRITE | Permission.ATTACH)


def test_qemu_that_starts_before_the_manager_says_what_is_missing_and_ends(make_lab) -> None:
    lab = make_lab(["a"], start_manager=False)
    device = f'{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{lab.device_socket("a")}"}}}}'
    with pytest.raises(MachineError, match=r"QEMU ended.*Failed to connect to .*a\.sock"):
        Machine(lab.parts.image, Hardware(devices=["-device", device]), lab.folder / "early", "early")


def test_a_device_plugged_before_the_manager_runs_can_be_plugged_again_afterwards(make_lab) -> None:
    lab = make_lab(["a"], start_manager=False)
    guest = lab.add("a", plain=True)
    with pytest.raises(QmpError, match="Failed to connect"):
        lab.plug(guest)
    lab.start_manager()
    lab.plug(guest)
    lab.bind(guest)
    GuestDriver(guest).alloc("one", 65536)


def test_a_second_qemu_is_told_that_the_device_is_in_use(make_lab) -> None:
    lab = make_lab(["a", "b"])
    lab.add("a")
    other = lab.add("b", plain=True)
    with pytest.raises(QmpError, match="busy"):
        other.machine.plug("vfio-user-pci", "ism", "ism0", socket={"type": "unix", "path": str(lab.device_socket("a"))})


def test_a_killed_qemu_leaves_nothing_and_its_device_serves_the_next_one(make_lab) -> None:
    lab = make_lab()
    a, b = lab.add("a"), GuestDriver(lab.add("b"))
    driver = GuestDriver(a)
    token = driver.alloc("shared", 65536)
    driver.grant("shared", SHARED, b.devid)
    b.attach("shared", token)
    driver.write("shared", 0, "what was shared")
    a.kill()
    lab.wait_status(lambda status: status["totals"]["connected"] == 1)
    assert b.read("shared", 0, 15) == "what was shared"
    b.close("shared")
    lab.wait_status(lambda status: status["totals"]["regions"] == 0)
    again = GuestDriver(lab.add("a"))
    assert again.devid == driver.devid
    again.alloc("shared", 65536)


def test_a_killed_program_gives_the_device_to_the_next_program_of_the_guest(make_lab) -> None:
    lab = make_lab(["a"])
    guest = lab.add("a")
    first = GuestDriver(guest)
    first.alloc("one", 65536)
    with pytest.raises(InGuestError, match="in use"):
        GuestDriver(guest)
    first.kill()
    second = GuestDriver(guest)
    second.alloc("two", 65536)
    assert [device["regions"] for device in lab.devices() if device["connected"]] == [1]


def test_unbinding_the_driver_under_a_program_ends_the_device_for_it(make_lab) -> None:
    lab = make_lab(["a"])
    guest = lab.add("a")
    bdf = lab.find(guest)
    driver = GuestDriver(guest)
    driver.alloc("one", 65536)
    unbind = guest.start(["sh", "-c", f"echo {bdf} > /sys/bus/pci/drivers/vfio-pci/unbind"])
    gone = "import time\nfor _ in range(3000):\n    if d.gone: break\n    time.sleep(0.01)\nresult = d.gone"
    assert "kernel" in driver(gone)
    driver("r.clear(); d.close()")
    assert unbind.wait() == 0


def test_the_managers_death_leaves_mapped_memory_alone_and_programs_are_told(make_lab) -> None:
    lab = make_lab()
    seldom = {"_LOOK_INTERVAL_S": "3600"}
    a, b = (GuestDriver(lab.add(name), constants=seldom) for name in ("a", "b"))
    token = a.alloc("shared", 65536)
    a.grant("shared", SHARED, b.devid)
    b.attach("shared", token)
    os.kill(lab.manager.pid, signal.SIGKILL)
    lab.manager.wait()
    for guest in lab.guests.values():  # an access that is under way while QEMU finds out can end QEMU
        guest.machine.wait_log("failed to read header: EOF")
    a.write("shared", 0, "still shared")
    assert b.read("shared", 0, 12) == "still shared"
    for driver in (a, b):
        driver("function._LOOK_INTERVAL_S = d._next_look_s = 0.05\nd.service.every(0.05, d._look)")
        with pytest.raises(InGuestError, match="its registers read all ones: the device manager is gone"):
            driver("import time\nfor _ in range(600):\n    d.check_usable()\n    time.sleep(0.05)")
    with pytest.raises(InGuestError, match="the device manager is gone"):
        b.alloc("more", 65536)
    assert b.read("shared", 0, 12) == "still shared"


def test_a_guest_reset_releases_everything_it_held(make_lab) -> None:
    lab = make_lab(["a"])
    guest = lab.add("a")
    driver = GuestDriver(guest)
    driver.alloc("one", 65536)
    driver.alloc("two", 1 << 20)
    guest.machine.qmp.run("system_reset")
    lab.wait_status(lambda status: status["totals"]["regions"] == 0)
    assert [device["connected"] for device in lab.devices()] == [True]


def test_programs_fall_back_to_tcp_when_the_device_is_in_use_or_the_manager_gone(make_lab) -> None:
    lab = make_lab(network="pair")
    a, b = lab.add("a"), lab.add("b")
    holder = GuestDriver(b)
    server = a.start_python(SERVE, {"host": A, "port": PORT})
    server.wait_line("listening")
    sent = b.python(SEND, {"host": A, "port": PORT, "mib": 1}, timeout_s=120)
    assert (sent["same"], sent["mode"]) == (True, "TCP")
    server.result()
    with pytest.raises(GuestProgramError, match="in use"):
        b.python(SEND, {"host": A, "port": PORT, "mib": 1}, env={"ISM_SMC": "require"}, timeout_s=120)
    holder("d.close()")
