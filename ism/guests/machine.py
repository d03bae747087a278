# SPDX-License-Identifier: Apache-2.0
"""One virtual machine: a QEMU process, its command line, its end.

It owns the process and a folder with its sockets and its console log. A machine that is to be saved, and every one that
is restored from that state, must have the same command line but for what `Hardware` marks as free, so the command line
is made in one place. Devices that cannot be saved (vfio-user) or differ from guest to guest (network) are plugged in
after the start, into root ports that are there for them; or they are on the command line, in a machine that boots.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ism.errors import IsmError
from ism.guests.image import Image
from ism.guests.qmp import Qmp, QmpError
from ism.vmm.qemu import escaped

PORTS: Final = {"ism0": "256M", "ism1": "256M", "nic0": "4M", "disk0": "4M"}
"""Root ports by name, and how much address space behind each is kept for the BARs of what is plugged in later."""
_APPEND: Final = (
    "console=ttyS0 panic=-1 quiet tsc=reliable mitigations=off nokaslr no_timer_check lpj=4000000 cryptomgr.notests "
    "no5lvl random.trust_cpu=on 8250.nr_uarts=1 rcupdate.rcu_expedited=1 audit=0 nowatchdog"
)
_START_S: Final = 30.0
ENDS_WITH_PARENT: Final = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
"""Put before a command: the kernel kills it when the thread that starts it ends, however that comes."""


class MachineError(IsmError):
    """A virtual machine did not do what it should. Attributes: `name`."""

    def __init__(self, name: str, problem: str) -> None:
        self.name = name
        super().__init__(f"guest {name}: {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a machine is made of.

    Attributes: `memory_mib`; `command` (a shell command that starts QEMU with machine and memory, to which the rest is
    added; as `ism qemu-args` prints it); `vcpus`; `iommu` (an Intel IOMMU in front of the devices); `kvm`; `append`
    (more kernel arguments); `devices` (more QEMU options); `environment` (of the QEMU process); `wrapper` (a command
    that starts QEMU, such as `ip netns exec NAME`). The last three are free: a machine may be restored with others than
    it was saved with, as long as the devices of its state are there.
    """

    memory_mib: int = 512
    command: str = ""
    vcpus: int = 1
    iommu: bool = True
    kvm: bool = False
    append: str = ""
    devices: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    wrapper: Sequence[str] = ()

    def options(self, image: Image) -> list[str]:
        """Return what decides whether a saved state fits."""
        cpu = ["-accel", "kvm", "-cpu", "host"] if self.kvm else ["-accel", "tcg,thread=multi", "-cpu", "Nehalem"]
        iommu = ["-device", "intel-iommu,caching-mode=on"] if self.iommu else []
        append = f"{_APPEND} {'intel_iommu=on' if self.iommu else ''} {self.append}".strip()
        memory = [
            "-M", "q35", "-m", f"{self.memory_mib}M",
            "-object", f"memory-backend-memfd,id=ram0,size={self.memory_mib}M,share=on",
            "-machine", "memory-backend=ram0",
        ]  # fmt: skip
        options = [
            *([] if self.command else memory), *cpu, "-smp", str(self.vcpus),
            "-nodefaults", "-nographic", "-no-user-config", *iommu,
            "-drive", f"if=none,id=root0,format=raw,readonly=on,file={escaped(str(image.disk))}",
            "-device", "virtio-blk-pci,drive=root0,disable-legacy=on",
            "-kernel", str(image.kernel), "-initrd", str(image.ramdisk), "-append", append,
            "-device", "virtio-serial-pci,id=serial0",
        ]  # fmt: skip
        for number, (name, space) in enumerate(PORTS.items(), 1):
            options += ["-device", f"pcie-root-port,id={name},chassis={number},slot={number},pref64-reserve={space}"]
        return options


class Machine:
    """A running QEMU.

    It ends with the thread that starts it, at the latest.
    Attributes: `name`, `folder` (its sockets and `console.log`), `process`, `qmp`.
    """

    def __init__(self, image: Image, hardware: Hardware, folder: Path, name: str, *, state: Path | None = None) -> None:
        """Start it: from `state` (then it is paused until `resume`), or to boot.

        Raises: MachineError with QEMU's own words when it does not start.
        """
        self.name, self.folder = name, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.command_socket, qmp_socket = folder / "command.sock", folder / "qmp.sock"
        for path in (self.command_socket, qmp_socket):
            if len(os.fsencode(path)) > 107:
                raise MachineError(name, f"the path {path} is too long for a UNIX socket; use a shorter folder")
            path.unlink(missing_ok=True)
        tools = image.tools.folder
        arguments: list[str | Path] = [
            "-L", tools / "usr/share/qemu", "-L", tools / "usr/share/seabios",
            *hardware.options(image),
            "-name", name, "-serial", f"file:{escaped(str(folder / 'console.log'))}",
            "-chardev", f"socket,id=command0,path={escaped(str(self.command_socket))},server=on,wait=off",
            "-device", "virtserialport,bus=serial0.0,chardev=command0,name=ism.command",
            "-qmp", f"unix:{escaped(str(qmp_socket))},server=on,wait=off",
            *hardware.devices, *(["-incoming", "defer"] if state else []),
        ]  # fmt: skip
        self.argv = [*hardware.wrapper, *image.tools.command("usr/bin/qemu-system-x86_64", *arguments)]
        if hardware.command:
            self.argv = ["sh", "-c", f"{hardware.command} {shlex.join(map(str, arguments))}"]
        self._log = (folder / "qemu.log").open("wb")
        self.process = subprocess.Popen(
            [*ENDS_WITH_PARENT, *self.argv],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True,
            env={
                **os.environ, "QEMU_MODULE_DIR": str(tools / "usr/lib/x86_64-linux-gnu/qemu"), **hardware.environment,
            },
        )  # fmt: skip
        try:
            self.qmp = self._connect(qmp_socket)
            if state:
                self._load(state)
        except BaseException:
            self.kill()
            raise

    def _connect(self, path: Path) -> Qmp:
        deadline = time.monotonic() + _START_S
        while True:
            if self.process.poll() is not None:
                raise MachineError(self.name, f"QEMU ended with {self.process.returncode}: {self.words()}")
            try:
                return Qmp(path)
            except (FileNotFoundError, ConnectionRefusedError) as exc:
                if time.monotonic() > deadline:
                    raise MachineError(self.name, "QEMU does not answer on its QMP socket") from exc
                time.sleep(0.01)
            except (OSError, QmpError) as exc:
                self.process.wait(_START_S)
                raise MachineError(self.name, f"QEMU ended with {self.process.returncode}: {self.words()}") from exc

    def words(self) -> str:
        """Return the last line QEMU itself has written."""
        lines = (self.folder / "qemu.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "without a word"

    def wait_log(self, wanted: str, timeout_s: float = 30.0) -> None:
        """Wait until QEMU has written something. Raises MachineError."""
        deadline = time.monotonic() + timeout_s
        while wanted not in (self.folder / "qemu.log").read_text(errors="replace"):
            if time.monotonic() > deadline:
                raise MachineError(self.name, f"QEMU does not write {wanted!r}: {self.words()}")
            time.sleep(0.01)

    def log(self) -> str:
        """Return the ends of what QEMU and the guest's kernel have written, for whoever looks into a failure."""
        return f"--- qemu.log\n{self.words()}\n--- console.log\n{self.console()[-3000:]}"

    def console(self) -> str:
        """Return what the guest's kernel has written to its console."""
        file = self.folder / "console.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def _load(self, state: Path) -> None:
        self._capability("mapped-ram")
        self.qmp.run("migrate-incoming", uri=f"file:{state}")
        self._wait_status({"paused", "postmigrate"}, "restoring")

    def save(self, state: Path) -> None:
        """Stop the machine and write its state to a file. Raises QmpError, MachineError."""
        self.qmp.run("stop")
        self._capability("mapped-ram")
        self.qmp.run("migrate", uri=f"file:{state}")
        deadline = time.monotonic() + 120
        while True:
            status = self.qmp.run("query-migrate")["status"]
            if status == "completed":
                return
            if status in ("failed", "cancelled") or time.monotonic() > deadline:
                raise MachineError(self.name, f"its state cannot be saved: migration {status}")
            time.sleep(0.02)

    def _capability(self, name: str) -> None:
        self.qmp.run("migrate-set-capabilities", capabilities=[{"capability": name, "state": True}])

    def _wait_status(self, wanted: set[str], what: str) -> None:
        deadline = time.monotonic() + 60
        while self.qmp.run("query-status")["status"] not in wanted:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise MachineError(self.name, f"{what} does not come to an end: {self.words()}")
            time.sleep(0.01)

    def resume(self) -> None:
        """Let the guest run."""
        self.qmp.run("cont")

    def plug(self, driver: str, ident: str, port: str, **properties: Any) -> None:
        """Plug a device into a root port of `PORTS`. Raises QmpError."""
        self.qmp.run("device_add", driver=driver, id=ident, bus=port, **properties)

    def kill(self) -> None:
        """End QEMU at once, as if it had crashed."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()
        if hasattr(self, "qmp"):
            self.qmp.close()

    def quit(self) -> None:
        """End QEMU in good order; a guest that is running is switched off."""
        try:
            self.qmp.run("quit")
            self.process.wait(10)
        except (OSError, QmpError, subprocess.TimeoutExpired):
            pass
        self.kill()
