# SPDX-License-Identifier: Apache-2.0
"""`ism status`: ask the running manager what it holds."""

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
@click.option("--tokens", is_flag=True, help="Show tokens whole.")
def status(run_dir: Path | None, as_json: bool, tokens: bool) -> None:
    """Show devices, regions, attachments and bytes of the running manager."""
    from ism.manager import control

    reply = control.request(paths.control_socket(run_dir or paths.run_dir()), "status", tokens=tokens)["status"]
    if as_json:
        click.echo(json.dumps(reply, indent=2))
    else:
        _show(reply)


def _size(count: int) -> str:
    """Bytes for people, exact where it matters."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"


def _show(reply: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else 160  # a pipe has no width: show everything
    console = Console(highlight=False, width=width)
    sums = reply["totals"]
    console.print(
        f"manager pid {reply['pid']}, version {reply['version']}, up {reply['uptime_s']:.0f} s, {reply['run_dir']}"
    )
    console.print(
        f"devices {sums['devices']}, regions {sums['regions']}, "
        f"attachments {sums['attachments']}, bytes {sums['bytes']} ({_size(sums['bytes'])})"
    )
    devices = Table(title="devices")
    for column in ("domain", "name", "devid", "client", "regions", "attachments", "bytes", "quota"):
        devices.add_column(
            column, justify="right" if column in ("regions", "attachments", "bytes", "quota") else "left"
        )
    regions = Table(title="regions")
    for column in ("domain", "token", "owner", "size", "holders", "state"):
        regions.add_column(column, justify="right" if column in ("size", "holders") else "left")
    for domain in reply["domains"]:
        for device in domain["devices"]:
            client = device.get("client")
            devices.add_row(
                domain["name"],
                device["name"],
                device["devid"],
                f"pid {client['pid']}" if client else "-",
                str(device["regions"]),
                str(device["attachments"]),
                _size(device["bytes"]),
                _size(device["quota"]["bytes"]),
            )
        for region in domain["regions"]:
            state = "shared" if region["alive"] else "owner gone"
            regions.add_row(
                domain["name"],
                region["token"],
                region["owner"],
                _size(region["size"]),
                str(region["holders"]),
                f"{state}, writers sealed" if region["sealed"] else state,
            )
    for table in (devices, regions):
        if table.row_count:
            console.print(table)
