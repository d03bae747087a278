# SPDX-License-Identifier: Apache-2.0
"""Which device a program uses: an explicit name, else ISM_DEVICE, else the user's manager.

Names: `vfio-user:PATH` (socket of a device manager).
"""

from __future__ import annotations

import os

from ism import paths
from ism.driver.device import Device
from ism.driver.vfio_user import VfioUserTransport
from ism.errors import TransportError

ENVIRONMENT = "ISM_DEVICE"


def open_device(name: str | None = None) -> Device:
    """Open and initialise a virtio-ism device.

    Args: `name`: `vfio-user:PATH`; None looks at ISM_DEVICE, then for the user's manager.
    Raises: TransportError (nothing there, refused, unknown kind of name), FeatureMismatchError, RemoteProtocolError.
    """
    wanted = name or os.environ.get(ENVIRONMENT) or f"vfio-user:{paths.device_socket(paths.run_dir())}"
    kind, colon, where = wanted.partition(":")
    if kind != "vfio-user" or not colon or not where:
        origin = "" if name else f" (from {ENVIRONMENT})"
        raise TransportError(f"unknown device name {wanted!r}{origin}: expected vfio-user:PATH")
    return Device(VfioUserTransport.connect(where))
