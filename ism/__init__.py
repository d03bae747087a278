# SPDX-License-Identifier: Apache-2.0
"""Sockets over shared memory between virtual machines and containers on one host.

The packages, bottom up: `ism.virtio` (constants and layouts), `ism.vfio_user` (the transport protocol),
`ism.driver` (the userspace guest driver), `ism.shm` (rings), `ism.smc` (sockets and streams), `ism.device` (the
emulated PCI function), `ism.manager` (the host-side device manager), `ism.cli` (the `ism` command).
"""

__version__ = "0.1.0"
