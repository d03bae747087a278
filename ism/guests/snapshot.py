# SPDX-License-Identifier: Apache-2.0
"""Boot a guest once, keep its state, and start every other one from there.

It owns what a state fits: the same QEMU, image and hardware, so they name its place in the cache. A restored guest has
the randomness, the clock and the name of every other one; `restore` gives it its own before anybody can use it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ism.guests.guest import Guest
from ism.guests.image import Image
from ism.guests.machine import Hardware, Machine, MachineError
from ism.guests.payload import plug
from ism.guests.qmp import QmpError
from ism.guests.store import Progress, SetupError, Store, key_of

_KVM_PROBE_S = 25.0


def saved_state(store: Store, image: Image, hardware: Hardware, progress: Progress) -> Path:
    """Return the file with the state of a guest that is warm. Raises SetupError when it does not boot."""
    key = key_of(image.key, *hardware.options(image))

    def build(place: Path) -> None:
        progress("booting a guest, to be saved when it is warm (half a minute)")
        with tempfile.TemporaryDirectory(prefix="ism-vm-") as folder:
            guest = None
            try:
                guest = boot(image, hardware, Path(folder), "warm")
                guest.machine.save(place)
            except (MachineError, QmpError) as exc:
                raise SetupError("booting a guest", str(exc)) from exc
            finally:
                if guest is not None:
                    guest.quit()

    return store.entry(f"state-{key}", build)


def furnished_state(
    store: Store, image: Image, hardware: Hardware, state: Path, disk: Path, progress: Progress
) -> Path:
    """Return the file with the state of a guest that has this project's disk and has loaded it. Raises SetupError."""
    key = key_of(state.name, disk.name)

    def build(place: Path) -> None:
        progress("loading this project into a guest, to be saved")
        with tempfile.TemporaryDirectory(prefix="ism-vm-") as folder:
            guest = None
            try:
                guest = restore(image, hardware, state, Path(folder), "warm")
                plug(guest, disk)
                guest.machine.save(place)
            except (MachineError, QmpError) as exc:
                raise SetupError("loading this project into a guest", str(exc)) from exc
            finally:
                if guest is not None:
                    guest.quit()

    return store.entry(f"furnished-{key}", build)


def restore(image: Image, hardware: Hardware, state: Path, folder: Path, name: str) -> Guest:
    """Start a guest from its state; it is warm, and has randomness, clock and name of its own. Raises MachineError."""
    machine = Machine(image, hardware, folder, name, state=state)
    try:
        guest = Guest(machine)
        machine.resume()
        guest.personalize()
    except BaseException:
        machine.kill()
        raise
    return guest


def boot(image: Image, hardware: Hardware, folder: Path, name: str) -> Guest:
    """Start a guest as a computer is switched on. Raises MachineError."""
    machine = Machine(image, hardware, folder, name)
    try:
        guest = Guest(machine)
        guest.wait_ready()
        guest.personalize()
    except BaseException:
        machine.kill()
        raise
    return guest


def kvm_works(store: Store, image: Image, progress: Progress) -> bool:
    """Tell whether guests can run on this processor itself: start a kernel and see; remembered until a reboot.

    ISM_VM_ACCEL says it without a trial: `kvm` or `tcg`. Raises SetupError for anything else there.
    """
    wanted = os.environ.get("ISM_VM_ACCEL", "")
    if wanted not in ("", "kvm", "tcg"):
        raise SetupError("accelerator", f"ISM_VM_ACCEL is {wanted!r}, must be kvm or tcg")
    if wanted or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return wanted == "kvm"
    answer = _kvm_answer(store, image)
    if not answer.exists():
        progress("trying KVM")
        answer.write_text("works" if _try_kvm(image) else "does not work")
    return answer.read_text() == "works"


def kvm_failed(store: Store, image: Image) -> None:
    """Remember that KVM does not work after all."""
    _kvm_answer(store, image).write_text("does not work")


def _kvm_answer(store: Store, image: Image) -> Path:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return store.path(f"kvm-{key_of(boot_id, *sorted(image.versions.items()))}")


def _try_kvm(image: Image) -> bool:
    folder = Path(tempfile.mkdtemp(prefix="ism-vm-"))
    machine = None
    try:
        machine = Machine(image, Hardware(kvm=True, append="ism.cold ism.bare ism.off"), folder, "kvm")
        machine.process.wait(_KVM_PROBE_S)
        return machine.process.returncode == 0 and "ism: off" in machine.console()
    except (MachineError, subprocess.TimeoutExpired):
        return False
    finally:
        if machine is not None:
            machine.kill()
        shutil.rmtree(folder, ignore_errors=True)
