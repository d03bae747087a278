# SPDX-License-Identifier: Apache-2.0
"""Fakes that are real peers: the true device and registry behind an in-memory transport, in one process."""

from ism.testing.fabric import Fabric, InMemoryTransport

__all__ = ["Fabric", "InMemoryTransport"]
