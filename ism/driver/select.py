# SPDX-License-Identifier: Apache-2.0
"""Which device a program uses: an explicit name, else ISM_DEVICE, else a function bound to vfio-pci, else the manager.

| name | device |
|---|---|
| `vfio-user:PATH` | socket of a device manager |
| `vfio:BDF` | PCI function of this machine that is bound to vfio-pci |
| `uio:BDF` | one without an IOMMU, by sysfs |
| either with `,intx` | by its interrupt line, where it would be polled: the queues of UIO, and of few MSI-X vectors |

The line is not used unless it is asked for: QEMU takes the mapping of a BAR away for a second after each INTx, and what
was stored by traps then can arrive after what is stored in memory again.

The transports of PCI functions are imported when they are used: most programs use none.
"""

from __future__ import annotations

import errno
import os

from ism import paths
from ism.driver.device import Device
from ism.driver.function import VECTOR_REGIONS
from ism.driver.pci_sysfs import ALLOW_NO_IOMMU, VFIO_DRIVER, Sysfs, bound_to, foreign, full_bdf
from ism.driver.vfio_user import VfioUserTransport
from ism.errors import TransportError

ENVIRONMENT = "ISM_DEVICE"
_INTX = ",intx"
_EXPECTED = f"expected vfio-user:PATH, vfio:BDF[{_INTX}] or uio:BDF[{_INTX}], BDF like 0000:01:00.0 (see `ism devices`)"


def open_device(name: str | None = None, *, allow_no_iommu: bool | None = None) -> Device:
    """Open and initialise a virtio-ism device.

    Args:
        name: see the module's head; None looks at ISM_DEVICE, then for a function bound to vfio-pci (one that another
            process uses is passed over), then for the user's manager.
        allow_no_iommu: whether a device may be used that no IOMMU keeps to the memory it is given; None: whether
            ISM_ALLOW_NO_IOMMU is 1.
    Raises: TransportError (nothing there, refused, unknown kind of name), FeatureMismatchError, RemoteProtocolError.
    """
    if allow_no_iommu is None:
        allow_no_iommu = os.environ.get(ALLOW_NO_IOMMU) == "1"
    wanted = name or os.environ.get(ENVIRONMENT)
    if wanted:
        return _open(wanted, "" if name else f" (from {ENVIRONMENT})", allow_no_iommu=allow_no_iommu)
    busy: TransportError | None = None
    for bdf in bound_to(Sysfs(), VFIO_DRIVER):
        try:
            return _open_vfio(bdf, allow_no_iommu=allow_no_iommu)
        except TransportError as exc:
            if exc.errno != errno.EBUSY:
                raise
            busy = exc
    if busy is not None:
        raise busy
    return Device(VfioUserTransport.connect(paths.device_socket(paths.run_dir())))


def _open(name: str, origin: str, *, allow_no_iommu: bool) -> Device:
    kind, _, where = name.partition(":")
    if kind == "vfio-user" and where:
        return Device(VfioUserTransport.connect(where))
    bdf, intx = full_bdf(where.removesuffix(_INTX)), where.endswith(_INTX)
    other = foreign(Sysfs(), bdf) if bdf is not None else None
    if other is not None:
        raise TransportError(f"{name}{origin} is {other}, not a virtio-ism function; `ism devices` lists those")
    if kind == "vfio" and bdf is not None:
        return _open_vfio(bdf, allow_no_iommu=allow_no_iommu, intx=intx)
    if kind == "uio" and bdf is not None:
        from ism.pci_uio import UioTransport

        return Device(UioTransport(bdf, allow_no_iommu=allow_no_iommu), interrupts=intx)
    raise TransportError(f"unknown device name {name!r}{origin}: {_EXPECTED}")


def _open_vfio(bdf: str, *, allow_no_iommu: bool, intx: bool = False) -> Device:
    from ism.driver.vfio import VfioTransport

    transport = VfioTransport.open(bdf, allow_no_iommu=allow_no_iommu)
    try:
        interrupts = intx or transport.vector_count() > VECTOR_REGIONS
    except BaseException:
        transport.close()
        raise
    return Device(transport, interrupts=interrupts)
