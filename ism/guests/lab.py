# SPDX-License-Identifier: Apache-2.0
"""A device manager and guests that are wired to it and to each other: the whole of the project on one host.

It owns a folder, a manager process, machines, and the network between them, and ends them all. Each guest has a device
socket of its own in the manager's configuration, its map agent in QEMU, and an address, 10.77.0.N. Two ways to wire:
a UNIX socket between two guests (`pair`, needs no rights), or a bridge in a network namespace of the lab's own, in
which processes of the host can be reached too (`bridge`, needs root).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from ism.guests.guest import Guest
from ism.guests.image import Image, prepare
from ism.guests.machine import ENDS_WITH_PARENT, Hardware, MachineError
from ism.guests.payload import load, options, payload, plug
from ism.guests.snapshot import boot, furnished_state, kvm_failed, kvm_works, restore, saved_state
from ism.guests.store import Progress, SetupError, Store, silent
from ism.vmm.agent import agent_library
from ism.vmm.qemu import escaped

Network = Literal["none", "pair", "bridge"]
HOST_ADDRESS: Final = "10.77.0.254"
_DEVICE_S: Final = 30.0
_KEPT: Final = 2
"""Entries of a kind that the cache keeps, those used last."""
_CONFIG: Final = """
[manager]
log_level = "info"
map_timeout_s = 20.0
[defaults]
window = "{window}"
vectors = {vectors}
{features}
"""


@dataclass(frozen=True, slots=True)
class Parts:
    """What guests are made from, ready: the image, the state of a guest that has this project, the project's disk."""

    store: Store
    image: Image
    hardware: Hardware
    state: Path
    payload: Path


def ready(store: Store | None = None, progress: Progress = silent, *, refresh: bool = False) -> Parts:
    """Fetch, build and boot what is not in the cache. Raises SetupError."""
    store = store or Store.default()
    agent_library()  # what it needs is missed now, not after a minute
    image = prepare(store, progress, refresh=refresh)
    hardware = Hardware(kvm=kvm_works(store, image, progress))
    try:
        warm = saved_state(store, image, hardware, progress)
    except SetupError:
        if not hardware.kvm:
            raise
        progress("KVM starts a kernel, but no guest: going on without it")
        kvm_failed(store, image)
        hardware = Hardware()
        warm = saved_state(store, image, hardware, progress)
    disk = payload(store, image, progress)
    furnished = furnished_state(store, image, hardware, warm, disk, progress)
    for prefix in ("furnished-", "payload-", "kernels-", "state-", "disk-", "root-", "tools-", "ramdisk-"):
        store.prune(prefix, _KEPT)
    return Parts(store, image, hardware, furnished, disk)


def address_of(number: int) -> str:
    """Return the IPv4 address of guest `number`, from 1."""
    return f"10.77.0.{number}"


class Lab:
    """A manager and guests. Use it as a context manager.

    Attributes: `parts`, `folder`, `run_dir` (the manager's), `guests` (by name), `manager` (its process).
    """

    def __init__(
        self,
        parts: Parts,
        names: Sequence[str] = ("a", "b"),
        *,
        network: Network = "none",
        window: str = "64 MiB",
        vectors: int = 32,
        features: str = "",
        config: str = "",
        start_manager: bool = True,
    ) -> None:
        """Start a manager with a device for each of `names`; guests come with `add`.

        Args: `features`: of the devices, as in the manager's configuration; `config`: more of that.
        Raises: MachineError.
        """
        self.parts, self.names, self.network = parts, tuple(names), network
        self.folder = Path(tempfile.mkdtemp(prefix="ism-lab-"))
        self.run_dir = self.folder / "run"
        self.guests: dict[str, Guest] = {}
        self._namespace = ""
        self._stack = contextlib.ExitStack()
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        offered = f"features = {features}" if features else ""
        text = _CONFIG.format(window=window, vectors=vectors, features=offered) + config
        for number, name in enumerate(self.names, 1):
            text += f'[[device]]\nname = "{name}"\naddresses = ["{address_of(number)}"]\n'
        (self.folder / "ism.toml").write_text(text)
        try:
            if network == "bridge":
                self._make_bridge()
            if start_manager:
                self.start_manager()
        except BaseException:
            self.close()
            raise

    # -- manager ----------------------------------------------------------------------------------------------------

    def start_manager(self) -> None:
        """Start the manager, and wait until it serves. Raises MachineError."""
        log = self._stack.enter_context((self.folder / "manager.log").open("ab"))
        self.manager = subprocess.Popen(
            [
                *ENDS_WITH_PARENT, sys.executable, "-m", "ism", "manager",
                "--run-dir", str(self.run_dir), "--config", str(self.folder / "ism.toml"),
            ],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        self._stack.callback(self._end_manager)
        deadline = time.monotonic() + _DEVICE_S
        control = self.run_dir / "control.sock"
        while True:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(str(control))
                    return
                except OSError:
                    pass
            if self.manager.poll() is not None or time.monotonic() > deadline:
                raise MachineError("manager", f"it does not serve: {self.manager_log()}")
            time.sleep(0.01)

    def manager_log(self) -> str:
        """Return the end of what the manager has written."""
        file = self.folder / "manager.log"
        return file.read_text(errors="replace")[-3000:] if file.exists() else "it was not started"

    def _end_manager(self) -> None:
        self.manager.terminate()
        try:
            self.manager.wait(10)
        except subprocess.TimeoutExpired:
            self.manager.kill()
            self.manager.wait()

    def environment(self) -> dict[str, str]:
        """Return the environment in which a process of the host finds this manager."""
        return {**os.environ, "ISM_RUN_DIR": str(self.run_dir), "ISM_DEVICE": ""}

    def host_command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs `argv` on the host, where the guests' network is (`bridge`)."""
        return [_program("ip"), "netns", "exec", self._namespace, *argv] if self._namespace else list(argv)

    def status(self) -> dict[str, Any]:
        """Return what `ism status --json` says. Raises MachineError."""
        done = subprocess.run(
            [sys.executable, "-m", "ism", "status", "--json", "--run-dir", str(self.run_dir)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise MachineError("manager", done.stderr.strip())
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def devices(self) -> list[dict[str, Any]]:
        """Return the devices of all domains, as `ism status` shows them. Raises MachineError."""
        return [device for domain in self.status()["domains"] for device in domain["devices"]]

    def wait_status(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = 30.0) -> None:
        """Wait until the manager's status is as wanted. Raises MachineError."""
        deadline = time.monotonic() + timeout_s
        while not wanted(status := self.status()):
            if time.monotonic() > deadline:
                raise MachineError("manager", f"its status does not come to what is waited for: {status['totals']}")

    def qemu_program(self) -> Path:
        """Return an executable that is this lab's QEMU, for commands that name one."""
        script = self.folder / "qemu-system-x86_64"
        command = shlex.join(self.parts.image.tools.command("usr/bin/qemu-system-x86_64"))
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)
        return script

    # -- guests -----------------------------------------------------------------------------------------------------

    def add(self, name: str, *, agent: bool = True, plain: bool = False) -> Guest:
        """Restore a guest and plug in its device, its network and this project; the device is bound to vfio-pci.

        Args: `agent`: QEMU has the map agent; `plain`: no device is plugged in.
        Raises: MachineError, with what QEMU, the guest and the manager have written.
        """
        parts, number = self.parts, self.names.index(name) + 1
        devices = [*options(parts.payload), *self._netdev(number)]
        wrapper = self.host_command(())
        hardware = replace(parts.hardware, devices=devices, environment=self._agent(agent), wrapper=wrapper)
        guest = restore(parts.image, hardware, parts.state, self.folder / name, name)
        self.guests[name] = guest
        self._stack.callback(guest.quit)
        try:
            self._connect(guest, number)
            if not plain:
                self.plug(guest)
                self.bind(guest)
        except MachineError as exc:
            raise MachineError(name, f"{exc}\n{guest.machine.log()}\n{self.manager_log()}") from exc
        return guest

    def boot(self, name: str, hardware: Hardware) -> Guest:
        """Boot a guest with hardware of its own, with this project on its second disk."""
        guest = boot(self.parts.image, hardware, self.folder / name, name)
        self.guests[name] = guest
        self._stack.callback(guest.quit)
        plug(guest, self.parts.payload)
        self._connect(guest, self.names.index(name) + 1)
        return guest

    def device_socket(self, name: str) -> Path:
        """Return the socket of a guest's device."""
        return self.run_dir / f"{name}.sock"

    def plug(self, guest: Guest) -> None:
        """Plug the guest's ISM device into its running machine."""
        socket_address = {"type": "unix", "path": str(self.device_socket(guest.name))}
        guest.machine.plug("vfio-user-pci", "ism", "ism0", socket=socket_address)

    def bind(self, guest: Guest, driver: str = "vfio-pci") -> str:
        """Bind the guest's device to a driver as a user would; returns its PCI address. Raises MachineError."""
        bdf = self.find(guest)
        bind = "from ism.cli import cli; cli(argument, standalone_mode=False)"
        guest.python(bind, ["bind", bdf, "--driver", driver])
        return bdf

    def find(self, guest: Guest) -> str:
        """Wait until the guest's kernel has seen its device; returns its PCI address. Raises MachineError."""
        found = """
            import glob, time
            deadline = time.monotonic() + argument
            result = None
            while not result and time.monotonic() < deadline:
                for path in glob.glob("/sys/bus/pci/devices/*/device"):
                    if open(path).read().strip() == "0x106c":
                        result = path.split("/")[-2]
                time.sleep(0.02)
        """
        bdf = guest.python(found, _DEVICE_S)
        if not bdf:
            raise MachineError(guest.name, "its kernel sees no 1af4:106c function")
        return str(bdf)

    def _connect(self, guest: Guest, number: int) -> None:
        """Plug in the network, and give the guest its address."""
        machine = guest.machine
        if self.network != "none":
            machine.plug("virtio-net-pci", "nic", "nic0", netdev="net0", mac=f"52:54:00:77:00:{number:02x}")
            self._bring_up(guest, number)

    def reboot(self, guest: Guest) -> None:
        """Reboot a guest, and set it up as `add` does: project, network, driver. Raises MachineError."""
        guest.reboot()
        load(guest)
        if self.network != "none":
            self._bring_up(guest, self.names.index(guest.name) + 1)
        self.bind(guest)

    def _bring_up(self, guest: Guest, number: int) -> None:
        """Give the guest its address."""
        up = """
            import os, subprocess, time
            deadline = time.monotonic() + 30
            while not os.path.exists("/sys/class/net/eth0") and time.monotonic() < deadline:
                time.sleep(0.01)
            subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)
            subprocess.run(["ip", "addr", "add", argument + "/24", "dev", "eth0"], check=True)
        """
        guest.python(up, address_of(number))

    def _agent(self, wanted: bool) -> dict[str, str]:
        return {"LD_PRELOAD": str(agent_library())} if wanted else {}

    # -- network ----------------------------------------------------------------------------------------------------

    def _netdev(self, number: int) -> list[str]:
        if self.network == "pair":
            path = escaped(str(self.folder / "wire.sock"))
            server = "on" if number == 1 else "off"
            return ["-netdev", f"stream,id=net0,server={server},addr.type=unix,addr.path={path}"]
        if self.network == "bridge":
            return ["-netdev", f"tap,id=net0,ifname=tap{number},script=no,downscript=no"]
        return []

    def _make_bridge(self) -> None:
        """Make a network namespace with a bridge, and a port of it for each guest."""
        name = f"ism-{secrets.token_hex(4)}"
        _ip("netns", "add", name)
        self._stack.callback(_ip, "netns", "delete", name)
        self._namespace = name
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", name, "addr", "add", f"{HOST_ADDRESS}/24", "dev", "bridge0")
        _ip("-n", name, "link", "set", "bridge0", "up")
        for number in range(1, len(self.names) + 1):
            _ip("-n", name, "tuntap", "add", f"tap{number}", "mode", "tap")
            _ip("-n", name, "link", "set", f"tap{number}", "master", "bridge0", "up")

    # -- end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _program(name: str) -> str:
    """Find a program that may be in a folder that users do not have in PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or name


def _ip(*arguments: str) -> None:
    """Run ip(8). Raises MachineError."""
    try:
        done = subprocess.run([_program("ip"), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as exc:
        raise MachineError("network", "there is no `ip`: apt-get install iproute2") from exc
    if done.returncode:
        raise MachineError("network", f"ip {' '.join(arguments)}: {done.stderr.strip()}")
