# SPDX-License-Identifier: Apache-2.0
"""The table of a client's DMA maps, as both sides keep it.

Owns the rules: maps do not overlap, an unmap ends whole maps, an access lies inside one map. Holds one value per
map and never looks into it. Follows the vfio-user specification, "DMA_MAP" and "DMA_UNMAP". The addresses are the
client's and may be anything; they are checked here before they index anything.
"""

from __future__ import annotations

import bisect
import errno
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from ism.vfio_user.errors import VfioUserError

V = TypeVar("V")

ADDRESS_SPACE = 1 << 64


class DmaEntry(NamedTuple, Generic[V]):
    """One map: `address` and `size` in bytes, `value` as the owner of the table gave it."""

    address: int
    size: int
    value: V


class DmaTable(Generic[V]):
    """Maps sorted by address. `max_entries` bounds it."""

    def __init__(self, max_entries: int = 65535) -> None:
        self._max = max_entries
        self._starts: list[int] = []
        self._entries: list[DmaEntry[V]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[DmaEntry[V]]:
        return iter(tuple(self._entries))

    def check(self, address: int, size: int) -> None:
        """Raise VfioUserError when `add` would: EINVAL (empty, beyond 64 bits), EEXIST (overlap), ENOSPC (full)."""
        if size <= 0 or address < 0 or address + size > ADDRESS_SPACE:
            raise VfioUserError(errno.EINVAL, f"map of {size:#x} bytes at {address:#x}")
        place = bisect.bisect_right(self._starts, address)
        if place and self._end(place - 1) > address:
            raise VfioUserError(errno.EEXIST, f"{address:#x} is mapped already")
        if place < len(self._starts) and address + size > self._starts[place]:
            raise VfioUserError(errno.EEXIST, f"{self._starts[place]:#x} is mapped already")
        if len(self._entries) >= self._max:
            raise VfioUserError(errno.ENOSPC, f"{self._max} maps exist, the most this table takes")

    def add(self, address: int, size: int, value: V) -> None:
        """Enter one map. Raises as `check`."""
        self.check(address, size)
        place = bisect.bisect_right(self._starts, address)
        self._starts.insert(place, address)
        self._entries.insert(place, DmaEntry(address, size, value))

    def get(self, address: int, size: int) -> DmaEntry[V]:
        """The map of exactly this address and size. Raises VfioUserError (ENOENT) when there is none."""
        return self._entries[self._place(address, size)]

    def within(self, address: int, size: int) -> list[DmaEntry[V]]:
        """The maps that an unmap of this range ends: those inside it; none is fine, as for kernel VFIO's type1 v2.

        Raises: VfioUserError (EINVAL): the range is empty, or an end of it cuts a map in two.
        """
        if size <= 0:
            raise VfioUserError(errno.EINVAL, f"unmap of {size} bytes at {address:#x}")
        end = address + size
        first = bisect.bisect_left(self._starts, address)
        beyond = bisect.bisect_left(self._starts, end)
        if (first and self._end(first - 1) > address) or (beyond > first and self._end(beyond - 1) > end):
            raise VfioUserError(errno.EINVAL, f"unmap of {size:#x} bytes at {address:#x} cuts a map in two")
        return self._entries[first:beyond]

    def remove(self, address: int, size: int) -> DmaEntry[V]:
        """Take out the map of exactly this address and size. Raises VfioUserError (ENOENT) when there is none."""
        place = self._place(address, size)
        del self._starts[place]
        return self._entries.pop(place)

    def find(self, address: int, count: int) -> DmaEntry[V] | None:
        """The map that holds all of `count` bytes at `address`, None when no single one does."""
        place = bisect.bisect_right(self._starts, address) - 1
        if place < 0 or count < 0 or address + count > self._end(place):
            return None
        return self._entries[place]

    def clear(self) -> list[DmaEntry[V]]:
        """Empty the table and return what it held."""
        entries = self._entries
        self._starts, self._entries = [], []
        return entries

    def _end(self, place: int) -> int:
        entry = self._entries[place]
        return entry.address + entry.size

    def _place(self, address: int, size: int) -> int:
        place = bisect.bisect_left(self._starts, address)
        if place < len(self._starts) and self._entries[place][:2] == (address, size):
            return place
        raise VfioUserError(errno.ENOENT, f"no map of exactly {size:#x} bytes at {address:#x}")
