# SPDX-License-Identifier: Apache-2.0
"""`ism bind` and `ism unbind`: hand a virtio-ism function to programs, and back to the kernel. Root only."""

from __future__ import annotations

import click


@click.command()
@click.argument("bdf")
@click.option(
    "--driver",
    type=click.Choice(["vfio-pci", "uio_pci_generic"]),
    default="vfio-pci",
    show_default=True,
    help="vfio-pci needs an IOMMU; uio_pci_generic lets the device reach all memory.",
)
@click.option("--any", "anything", is_flag=True, help="Also a function that is no virtio-ism device.")
def bind(bdf: str, driver: str, anything: bool) -> None:
    """Bind the PCI function BDF (such as 0000:01:00.0, see `ism devices`) to a driver that hands it to programs.

    It lasts until `ism unbind` or the next boot. When a step fails, the former driver gets the function back.
    """
    from ism.driver import pci_sysfs

    sysfs = pci_sysfs.Sysfs()
    pci_sysfs.bind(sysfs, bdf, driver, anything=anything, say=click.echo)
    for problem in pci_sysfs.problems(sysfs, pci_sysfs.look(sysfs, bdf)):
        click.echo(f"still to do: {problem.text}: {problem.do}")


@click.command()
@click.argument("bdf")
@click.option("--any", "anything", is_flag=True, help="Also a function that is no virtio-ism device.")
def unbind(bdf: str, anything: bool) -> None:
    """Give the PCI function BDF back to the driver that the kernel chooses for it."""
    from ism.driver import pci_sysfs

    pci_sysfs.unbind(pci_sysfs.Sysfs(), bdf, anything=anything, say=click.echo)
