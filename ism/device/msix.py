# SPDX-License-Identifier: Apache-2.0
"""The registers of BAR 1: MSI-X table and pending bit array (PCI local bus 3.0 section 6.8.2).

They behave as registers and decide nothing. A vfio-user client emulates the table it shows to its guest and never
writes the real one, so an interrupt is raised whatever the table here says: masking is the client's part, and the
pending bits always read zero. The capability in configuration space says whether MSI-X is on at all.
"""

from __future__ import annotations

from ism.device.bars import Layout, MsixEntry

_RESET_ENTRY = MsixEntry(control=1).pack()
"""Masked, with neither address nor data."""
_ENTRY_MASK = b"\xfc" + b"\xff" * 11 + b"\x01\x00\x00\x00"
"""Writable bits of one entry: the address is a multiple of 4, only the mask bit of the control word is writable."""


class MsixRegisters:
    """MSI-X table and pending bit array of one function.

    The table is kept only once somebody has written to it, which a vfio-user client never does: it is large.
    """

    def __init__(self, layout: Layout) -> None:
        """Start with every vector masked."""
        self._count = layout.table_length // MsixEntry.SIZE
        self._written: bytearray | None = None

    def reset(self) -> None:
        """Mask every vector, clear addresses and data."""
        self._written = None

    def _table(self) -> bytes | bytearray:
        return _RESET_ENTRY * self._count if self._written is None else self._written

    def read(self, offset: int, n: int) -> bytes:
        """Read `n` bytes of BAR 1 from `offset`; whatever is not the table reads zero."""
        return bytes(self._table()[offset : offset + n]).ljust(n, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Write to BAR 1: bits that are writable change, all else stays."""
        data = data[: max(0, self._count * MsixEntry.SIZE - offset)]
        if not data:
            return
        table = self._written
        if table is None:
            table = self._written = bytearray(self._table())
        for at, value in enumerate(data, offset):
            mask = _ENTRY_MASK[at % MsixEntry.SIZE]
            table[at] = table[at] & ~mask | value & mask
