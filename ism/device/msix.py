# SPDX-License-Identifier: Apache-2.0
"""The registers of BAR 1: MSI-X table and pending bit array (PCI local bus 3.0 section 6.8.2).

They behave as registers and decide nothing. A vfio-user client emulates the table it shows to its guest and never
writes the real one, so an interrupt is raised whatever the table here says: masking is the client's part, and the
pending bits always read zero. The capability in configuration space says whether MSI-X is on at all.
"""

from __future__ import annotations

from ism.device.bars import Layout, MsixEntry

_ENTRY_MASK = b"\xfc" + b"\xff" * 11 + b"\x01\x00\x00\x00"
"""Writable bits of one entry: the address is a multiple of 4, only the mask bit of the control word is writable."""


class MsixRegisters:
    """MSI-X table and pending bit array of one function."""

    def __init__(self, layout: Layout) -> None:
        """Start with every vector masked."""
        self._layout = layout
        self._table = bytearray(layout.table_length)
        self.reset()

    def reset(self) -> None:
        """Mask every vector, clear addresses and data."""
        self._table[:] = MsixEntry(control=1).pack() * (self._layout.table_length // MsixEntry.SIZE)

    def read(self, offset: int, n: int) -> bytes:
        """Read `n` bytes of BAR 1 from `offset`; whatever is not the table reads zero."""
        return bytes(self._table[offset : offset + n]).ljust(n, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Write to BAR 1: bits that are writable change, all else stays."""
        for at, value in enumerate(data[: max(0, len(self._table) - offset)], offset):
            mask = _ENTRY_MASK[at % MsixEntry.SIZE]
            self._table[at] = self._table[at] & ~mask | value & mask
