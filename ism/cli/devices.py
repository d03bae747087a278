# SPDX-License-Identifier: Apache-2.0
"""`ism devices`: list the virtio-ism functions of this machine, and what each lacks for use."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from ism.cli.status import _size

if TYPE_CHECKING:
    from ism.driver.pci_sysfs import PciFunction, Problem


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def devices(as_json: bool) -> None:
    """List the virtio-ism functions (PCI 1af4:106c) of this machine, and what to do before a program can use them."""
    from ism.driver import pci_sysfs

    sysfs = pci_sysfs.Sysfs()
    found = [(function, pci_sysfs.problems(sysfs, function)) for function in pci_sysfs.find(sysfs)]
    if as_json:
        click.echo(json.dumps([_as_json(*one) for one in found], indent=2))
    elif found:
        _show(found)
    else:
        click.echo(
            "no virtio-ism function (PCI 1af4:106c) in this machine; processes and containers need none, they use the "
            "socket of an `ism manager`"
        )


def _as_json(function: PciFunction, problems: list[Problem]) -> dict[str, Any]:
    return {
        "bdf": function.bdf,
        "name": function.name,
        "vendor": f"{function.vendor:04x}",
        "device": f"{function.device:04x}",
        "driver": function.driver,
        "driver_override": function.override,
        "iommu_group": function.group,
        "no_iommu": function.no_iommu or function.group is None,
        "nodes": [str(node) for node in function.nodes],
        "vectors": function.vectors,
        "bars": {str(number): size for number, size in function.bars.items()},
        "problems": [{"problem": problem.text, "do": problem.do} for problem in problems],
    }


def _show(found: list[tuple[PciFunction, list[Problem]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, pad_edge=False)
    for column in ("Function", "Driver", "IOMMU", "Node", "Vectors", "BARs", "ISM_DEVICE"):
        table.add_column(column, justify="right" if column == "Vectors" else "left")
    for function, problems in found:
        no_iommu = function.group is None or function.no_iommu
        table.add_row(
            function.bdf,
            function.driver or "none",
            "none" if no_iommu else f"group {function.group}",
            ", ".join(map(str, function.nodes)) or "-",
            "?" if function.vectors is None else str(function.vectors),
            ", ".join(f"{number}: {_size(size)}" for number, size in function.bars.items()) or "-",
            (function.name or "-") if not problems else "not yet",
        )
    console.print(table)
    for function, problems in found:
        for problem in problems:
            console.print(f"{function.bdf}: {problem.text}: {problem.do}")
