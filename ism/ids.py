# SPDX-License-Identifier: Apache-2.0
"""Distinct integer types for numbers that must not be mixed up. They cost nothing at run time."""

from typing import NewType

Token = NewType("Token", int)
"""Name of a shared region, 64 bits from a CSPRNG, never 0 (virtio-ism: le64 token)."""

Gid = NewType("Gid", int)
"""Domain: devices with the same gid can share regions (virtio-ism config offset 0). Never 0."""

DevId = NewType("DevId", int)
"""One device inside its domain (virtio-ism config offset 8). Never 0."""

Iova = NewType("Iova", int)
"""Address as the device sees guest memory."""

WindowOffset = NewType("WindowOffset", int)
"""Byte offset inside shared memory region 1 (the regions window) of one device."""
