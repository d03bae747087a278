# SPDX-License-Identifier: Apache-2.0
"""QEMU's options and environment for virtual machines with virtio-ism devices, for a shell, as JSON, or for libvirt.

It says what the devices need and nothing else of the machine: a vfio-user client per device, guest memory that is a
shared memory file (the manager reads the queues there), the map agent in LD_PRELOAD, and the virtual IOMMU if the guest
is to have one. It looks at no file and starts nothing. QEMU 11.1 or newer; options are those of its manual page.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

MEMORY_ID: Final = "ism-ram"
PROGRAM: Final = "qemu-system-x86_64"
MACHINE: Final = "q35"
MIB: Final = 1 << 20
LIBVIRT_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_SOCKET_PATH_MAX = 107
_NOT_IN_XML = re.compile("[\x00-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, slots=True)
class VfioUserDevice:
    """One device of a machine: the manager's `socket` for it, QEMU's `id`, and the `bus` it is on ("": any)."""

    socket: Path
    id: str
    bus: str = ""

    def __post_init__(self) -> None:
        """Raises: ValueError for what QEMU would refuse or take for something else."""
        path = str(self.socket)
        if not self.socket.is_absolute() or len(os.fsencode(path)) > _SOCKET_PATH_MAX:
            raise ValueError(f"{path!r} is no absolute path of at most {_SOCKET_PATH_MAX} bytes")
        if any("\ud800" <= letter <= "\udfff" for letter in path):
            raise ValueError(f"{path!r} is not UTF-8, as QEMU wants it")
        for text in (self.id, self.bus or self.id):
            if not _ID.fullmatch(text):
                raise ValueError(f"{text!r} is no name in QEMU: a letter, then letters, digits, '.', '_' or '-'")

    def json(self) -> str:
        """Return the value of `-device`: JSON, in which no character of a path means anything."""
        bus = {"bus": self.bus} if self.bus else {}
        socket = {"type": "unix", "path": str(self.socket)}
        return json.dumps({"driver": "vfio-user-pci", "id": self.id, **bus, "socket": socket})


@dataclass(frozen=True, slots=True)
class QemuArguments:
    """What QEMU is started with: `environment` to add, and `arguments` after its name."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def shell(self, program: str = PROGRAM) -> str:
        """Return one command for a POSIX shell, an option a line; more options may be written behind it."""
        lines = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        lines.append(shlex.quote(program))
        for argument in self.arguments:
            if argument.startswith("-"):
                lines.append(f"  {shlex.quote(argument)}")
            else:
                lines[-1] += f" {shlex.quote(argument)}"
        return " \\\n".join(lines)


def qemu_arguments(
    devices: Sequence[VfioUserDevice],
    *,
    memory: int,
    agent: Path | None,
    iommu: bool = False,
    machine: str = MACHINE,
) -> QemuArguments:
    """Return what a machine with these devices needs.

    Args:
        memory: of the guest, bytes, whole MiB.
        agent: the map agent's library; None: without it the device's memory is reached by trapped accesses.
        iommu: an Intel IOMMU in front of all devices; its guest needs `intel_iommu=on`.
        machine: QEMU's machine type.
    Raises: ValueError.
    """
    if memory < MIB or memory % MIB:
        raise ValueError(f"{memory} bytes are not a number of MiB")
    size = f"{memory // MIB}M"
    options = [
        ("-machine", f"{escaped(machine)},memory-backend={MEMORY_ID}"),
        ("-m", size),
        ("-object", f"memory-backend-memfd,id={MEMORY_ID},size={size},share=on"),
    ]
    if iommu:
        # remapped interrupts are what vfio-pci asks for in the guest; with KVM they take the split interrupt controller
        options.append(("-machine", "kernel-irqchip=split"))
        options.append(("-device", "intel-iommu,intremap=on,caching-mode=on"))
    options += [("-device", device.json()) for device in devices]
    return QemuArguments(tuple(word for option in options for word in option), _environment(agent))


def escaped(value: str) -> str:
    """Return a value as it is written in an option of the form key=value,key=value: commas twice."""
    return value.replace(",", ",,")


def libvirt_domain(devices: Sequence[VfioUserDevice], *, agent: Path | None, iommu: bool = False) -> str:
    """Return the parts of a libvirt domain that its devices need, as a `<domain>` with nothing else in it.

    Args: as `qemu_arguments`. Raises: ValueError for a path that XML cannot hold.
    """
    ElementTree.register_namespace("qemu", LIBVIRT_NAMESPACE)
    domain = ElementTree.Element("domain", type="kvm")
    backing = _add(domain, "memoryBacking")
    _add(backing, "source", type="memfd")
    _add(backing, "access", mode="shared")
    if iommu:
        _add(_add(domain, "features"), "ioapic", driver="qemu")
        _add(_add(_add(domain, "devices"), "iommu", model="intel"), "driver", intremap="on", caching_mode="on")
    command = _add(domain, f"{{{LIBVIRT_NAMESPACE}}}commandline")
    for device in devices:
        for word in ("-device", device.json()):
            _add(command, f"{{{LIBVIRT_NAMESPACE}}}arg", value=word)
    for name, value in _environment(agent).items():
        _add(command, f"{{{LIBVIRT_NAMESPACE}}}env", name=name, value=value)
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode")


def _add(parent: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    for value in attributes.values():
        if _NOT_IN_XML.search(value):
            raise ValueError(f"{value!r} cannot be written in XML")
    return ElementTree.SubElement(parent, tag, attributes)


def _environment(agent: Path | None) -> dict[str, str]:
    return {} if agent is None else {"LD_PRELOAD": str(agent)}


def as_json_values(what: QemuArguments, program: str = PROGRAM) -> dict[str, Any]:
    """Return it as values that JSON has: `program`, `environment`, `arguments`."""
    return {"program": program, "environment": dict(what.environment), "arguments": list(what.arguments)}
