# SPDX-License-Identifier: Apache-2.0
"""The userspace driver of a virtio-ism device: needs neither trio nor Numba, usable from any thread.

Reading order: `transport` (what it stands on), `capabilities` and `virtio_pci` (registers), `virtqueue`, `control`
and `events` (queues), `function` (initialised and served), `region` and `device` (regions on top), `select` (which
device a program uses).
"""

from ism.driver.device import Device
from ism.driver.region import Region
from ism.driver.select import open_device
from ism.driver.transport import Transport

__all__ = ["Device", "Region", "Transport", "open_device"]
