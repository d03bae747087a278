# SPDX-License-Identifier: Apache-2.0
"""`ism ss`: list the connections of this host's processes, as ss and smcss do: SMC, or TCP and why."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ism import paths


@click.command()
@click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), help="Run directory of the manager.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-a", "--all", "everything", is_flag=True, help="Listening sockets too.")
@click.option("-s", "--summary", is_flag=True, help="Numbers only: connections by mode, fallbacks by reason.")
def ss(run_dir: Path | None, as_json: bool, everything: bool, summary: bool) -> None:
    """List the connections that use shared memory, and those that fell back to TCP, with the reason."""
    from ism.smc.monitor import ask_all

    processes = ask_all((run_dir or paths.run_dir()) / "ss")
    for process in processes:
        process["connections"] = [one for one in process["connections"] if everything or one["state"] != "LISTEN"]
    if as_json:
        click.echo(json.dumps(processes, indent=2))
    elif summary:
        _summarise(processes)
    else:
        _show(processes)


def _address(address: Any) -> str:
    if not address:
        return "*"
    host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
    return f"{host}:{address[1]}"


def _mode(one: dict[str, Any]) -> str:
    return one["mode"] if not one["code"] else f"{one['mode']} 0x{one['code']:08x} {one['reason']}"


def _show(processes: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, pad_edge=False)
    right = ("Recv-Buf", "Send-Buf", "Received", "Sent", "PID")
    for column in (
        "State", "Local Address", "Peer Address", "Mode", "Recv-Buf", "Send-Buf", "Received", "Sent", "Peer-Device",
        "PID", "Program",
    ):  # fmt: skip
        table.add_column(column, justify="right" if column in right else "left")
    for process in processes:
        for one in process["connections"]:
            table.add_row(
                one["state"],
                _address(one["local"]),
                _address(one["remote"]),
                _mode(one),
                *(str(one[name]) if one["mode"] == "SMC" else "-" for name in ("receive_buffer", "send_buffer")),
                *(str(one[name]) if one["mode"] == "SMC" else "-" for name in ("received", "sent")),
                f"{one['peer_devid']:#x}" if one["peer_devid"] else "-",
                str(process["pid"]),
                process["program"],
            )
    console.print(table)


def _summarise(processes: list[dict[str, Any]]) -> None:
    modes: dict[str, int] = {}
    reasons: dict[str, int] = {}
    for process in processes:
        for one in process["connections"]:
            modes[one["mode"]] = modes.get(one["mode"], 0) + 1
        for reason, count in process["fallbacks"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    click.echo(f"processes {len(processes)}, " + ", ".join(f"{mode} {count}" for mode, count in sorted(modes.items())))
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        click.echo(f"TCP since the processes started: {count} ({reason})")
