# SPDX-License-Identifier: Apache-2.0
"""`ism qemu-args`: what to start QEMU with, so that its guest has devices of this host's manager."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ism import paths
from ism.errors import ConfigError, RemoteProtocolError, TransportError

if TYPE_CHECKING:
    from ism.manager.config import DeviceConfig, ManagerConfig

_DEFAULT_MEMORY = "2G"
_MIB = 1 << 20
_DEFAULTS = "(defaults)"


@click.command("qemu-args")
@click.argument("devices", metavar="DEVICE...", nargs=-1, required=True)
@click.option("--config", type=click.Path(path_type=Path), help="The manager's configuration; else it is asked.")
@click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), help="Run directory of the manager.")
@click.option("--memory", default=_DEFAULT_MEMORY, metavar="SIZE", show_default=True, help="Memory of the guest.")
@click.option("--iommu", is_flag=True, help="Put an Intel IOMMU before the devices; boot with intel_iommu=on.")
@click.option("--no-agent", is_flag=True, help="No library in QEMU: regions are reached by traps, slowly.")
@click.option("--agent-dir", type=click.Path(file_okay=False, path_type=Path), help="Where the map agent is kept.")
@click.option(
    "--id", "ident", metavar="ID", help="The id of the device in QEMU, where one is named.  [default: ism-DEVICE]"
)
@click.option("--bus", metavar="BUS", help="The bus of the device, such as a root port, where one is named.")
@click.option("--machine", metavar="TYPE", default="q35", show_default=True, help="QEMU's machine type.")
@click.option(
    "--qemu", metavar="PROGRAM", default="qemu-system-x86_64", show_default=True, help="QEMU, by name or path."
)
@click.option("--json", "as_json", is_flag=True, help='Print {"program", "environment", "arguments"}.')
@click.option("--libvirt", is_flag=True, help="Print the parts of a libvirt domain.")
def qemu_args(
    devices: tuple[str, ...],
    config: Path | None,
    run_dir: Path | None,
    memory: str,
    iommu: bool,
    no_agent: bool,
    agent_dir: Path | None,
    ident: str | None,
    bus: str | None,
    machine: str,
    qemu: str,
    as_json: bool,
    libvirt: bool,
) -> None:
    """Print the options and the environment for QEMU 11.1 or newer, whose guest is to have the DEVICEs.

    A DEVICE is the name of a [[device]] in the manager's configuration. What is printed is one command for a shell, to
    which the rest of the machine is added:

    \b
        sh -c "$(ism qemu-args vm1 --memory 4G) -accel kvm -cpu host -drive file=disk.qcow2"

    Several DEVICEs are for one guest: each serves one of its processes.
    """
    from ism.vmm.agent import agent_library
    from ism.vmm.qemu import VfioUserDevice, as_json_values, libvirt_domain, qemu_arguments

    if len(devices) > 1 and (ident is not None or bus is not None):
        raise click.UsageError("--id and --bus are of one device, and several are named")
    if as_json and libvirt:
        raise click.UsageError("--json and --libvirt exclude each other")
    settings = _running_config(run_dir, devices) if config is None else _config(config, run_dir)
    found = [_device(settings, name) for name in dict.fromkeys(devices)]
    bytes_of_memory = _size(memory)
    agent = None if no_agent else agent_library(agent_dir)
    try:
        wanted = [VfioUserDevice(one.socket.path, ident or f"ism-{one.name}", bus or "") for one in found]
        if libvirt:
            text = libvirt_domain(wanted, agent=agent, iommu=iommu)
        else:
            what = qemu_arguments(wanted, memory=bytes_of_memory, agent=agent, iommu=iommu, machine=machine)
            text = json.dumps(as_json_values(what, qemu), indent=2) if as_json else what.shell(qemu)
    except ValueError as exc:
        raise ConfigError("command line", "", str(exc)) from exc
    click.echo(text)
    if libvirt and agent is not None:
        _warn_of_private(agent)


def _config(file: Path, run_dir: Path | None) -> ManagerConfig:
    from ism.manager.config import load_config

    return load_config(file, (run_dir or paths.run_dir()).absolute())


def _running_config(run_dir: Path | None, names: Sequence[str]) -> ManagerConfig:
    """Read the configuration of the manager that runs, from the file it has read, with these devices in both."""
    from ism.manager import control
    from ism.manager.config import default_config, load_config

    where = paths.control_socket(run_dir or paths.run_dir())
    try:
        status = control.request(where, "status")["status"]
    except TransportError as exc:
        raise TransportError(f"{exc}, or name its configuration (--config)", exc.errno) from exc
    try:
        file, directory, pid = Path(status["config"]), Path(status["run_dir"]), int(status["pid"])
        there = {device["name"] for domain in status["domains"] for device in domain["devices"]}
    except (KeyError, TypeError, ValueError) as exc:
        raise RemoteProtocolError(f"the manager at {where} does not say what its configuration is") from exc
    if str(file) == _DEFAULTS:
        return default_config(directory)
    if not file.is_absolute() or not directory.is_absolute():
        raise TransportError(
            f"the manager pid {pid} was started with relative paths ({file}, {directory}): name them here too "
            "(--config, --run-dir)"
        )
    settings = load_config(file, directory)
    for name in names:
        if name not in there and any(device.name == name for device in settings.devices):
            raise TransportError(f"device {name!r} is in {file}, and the manager pid {pid} has not read it: restart it")
    return settings


def _device(settings: ManagerConfig, name: str) -> DeviceConfig:
    for device in settings.devices:
        if device.name == name:
            return device
    there = ", ".join(device.name for device in settings.devices)
    problem = f"there are: {there}" if there else "it has none; add a [[device]] with this name, and a socket_owner"
    raise ConfigError(settings.file, "device", f"there is no device {name!r}; {problem}")


def _size(text: str) -> int:
    from ism.manager.config_reader import TableReader

    option = TableReader("command line", "", {"--memory": text})
    size = option.size("--memory", 0, low=_MIB)
    if size % _MIB:
        option.fail("--memory", f"{size} bytes are not a number of MiB")
    return size


def _warn_of_private(agent: Path) -> None:
    """Tell when the user libvirt starts QEMU as, which is another one, may not reach the library."""
    for folder in agent.parents:
        if not folder.stat().st_mode & stat.S_IXOTH:
            click.echo(
                f"ism: {folder} is closed to other users, so a QEMU of libvirt's own user goes without {agent.name}: "
                "keep it elsewhere (--agent-dir /var/lib/ism)",
                err=True,
            )
            return
