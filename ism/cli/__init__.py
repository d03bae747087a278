# SPDX-License-Identifier: Apache-2.0
"""The `ism` command. A module a sub-command or two, imported only when it is called: `ism --help` loads no Numba."""

from __future__ import annotations

import importlib
import sys

import click

from ism import __version__
from ism.errors import ConfigError, IsmError

_COMMANDS = {
    "bind": "Hand a virtio-ism PCI function to programs.",
    "demo": "Send a file between two processes over shared memory, and compare with TCP.",
    "devices": "List the virtio-ism PCI functions of this machine, and what each lacks for use.",
    "manager": "Run the device manager of this host.",
    "perf": "Measure throughput and latency between two ends, as iperf3 and sockperf do.",
    "qemu-args": "Print what QEMU is started with, so that its guest has a device.",
    "run": "Run a Python program with its TCP sockets over shared memory.",
    "ss": "List connections: over shared memory, or TCP and why.",
    "status": "Show devices, regions, attachments and bytes of the running manager.",
    "unbind": "Give a virtio-ism PCI function back to the kernel.",
    "vm": "Virtual machines of its own: set them up, a demo and measurements between two of them.",
}
_MODULES = {"unbind": "bind"}
"""Where a sub-command is that has no module of its own name; `-` is `_` there."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command = getattr(importlib.import_module(f"ism.cli.{_MODULES.get(name, name)}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ism")
def cli() -> None:
    """Sockets over shared memory between virtual machines and containers on one host."""


def main() -> None:
    """Entry point: errors of this package become one line and a status (2 for bad configuration, 1 otherwise)."""
    try:
        cli(prog_name="ism")
    except IsmError as exc:
        click.echo(f"ism: {exc}", err=True)
        sys.exit(2 if isinstance(exc, ConfigError) else 1)
