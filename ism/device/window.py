# SPDX-License-Identifier: Apache-2.0
"""The chunks of one device's regions window: which are free, which area a notify slot belongs to.

It owns numbers only: nothing is mapped here and it knows no region. A caller plans, decides, then takes; planning
changes nothing, so that a refused command has nothing to undo (virtio-ism proposal, ALLOC_REGION and ATTACH_REGION:
an area is a run of chunks, listed in the linear order of the region). Slot i of the notify area is chunk i.

Free runs are kept merged and in two orders, by place and by length: planning one area is a binary search, and taking
or giving back one is a few insertions into sorted lists, with 65536 chunks and thousands of regions as well.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable

from ism.device.contract import AreaOf
from ism.ids import WindowOffset


class Window:
    """Allocator of chunks. Sizes and offsets are bytes at the surface, chunks inside.

    Attributes: `chunk_size`, `window_size`, `free_bytes`.
    """

    def __init__(self, chunk_size: int, window_size: int) -> None:
        """Start with every chunk free. Raises ValueError unless the window is a positive multiple of the chunk."""
        if chunk_size <= 0 or window_size <= 0 or window_size % chunk_size:
            raise ValueError(f"window of {window_size} bytes is not a positive multiple of the chunk of {chunk_size}")
        self.chunk_size = chunk_size
        self.window_size = window_size
        self.free_bytes = window_size
        chunks = window_size // chunk_size
        self._free: list[int] = [0]  # starts of the free runs, ascending; no two runs touch
        self._free_length: dict[int, int] = {0: chunks}
        self._by_length: list[tuple[int, int]] = [(chunks, 0)]
        self._taken: list[int] = []  # starts of the areas in use, ascending
        self._taken_length: dict[int, int] = {}

    @property
    def largest_run(self) -> int:
        """Bytes of the largest free run."""
        return self._by_length[-1][0] * self.chunk_size if self._by_length else 0

    def plan(self, size: int, max_areas: int) -> list[AreaOf] | None:
        """Find room for `size` bytes, rounded up to chunks; nothing is taken.

        One area when a run is long enough: the shortest such run, so that long ones stay. Otherwise the fewest
        possible areas, by ascending offset.

        Args:
            size: bytes, at least 1.
            max_areas: how many areas the requester can be told of. A room of more pieces is returned all the same:
                its length is what the requester must be able to take (E2BIG).

        Returns: disjoint areas with `size` rounded up to chunks in total, or None when less than that is free.
        Raises: ValueError for a size below 1 or a negative `max_areas`.
        """
        if size < 1 or max_areas < 0:
            raise ValueError(f"cannot plan {size} bytes in {max_areas} areas")
        wanted = -(-size // self.chunk_size)
        if wanted * self.chunk_size > self.free_bytes:
            return None
        pieces: list[tuple[int, int]] = []
        upto = len(self._by_length)  # runs from here on are in `pieces` already
        while wanted:
            fit = bisect_left(self._by_length, (wanted, 0), 0, upto)
            if fit < upto:
                pieces.append((self._by_length[fit][1], wanted))
                break
            upto -= 1
            length, start = self._by_length[upto]
            pieces.append((start, length))
            wanted -= length
        pieces.sort()
        return [self._area(start, length) for start, length in pieces]

    def take(self, areas: Iterable[AreaOf]) -> None:
        """Mark the areas as in use: all of them, or none when this raises.

        Raises: ValueError when an area is not made of free chunks of this window.
        """
        done: list[AreaOf] = []
        try:
            for area in areas:
                self._take(area)
                done.append(area)
        except ValueError:
            self.give_back(done)
            raise

    def give_back(self, areas: Iterable[AreaOf]) -> None:
        """Mark areas as free again, each exactly as it was taken. Raises ValueError for any other, changing nothing."""
        chunks = [self._chunks(area) for area in areas]
        starts = {start for start, _ in chunks}
        if len(starts) != len(chunks) or any(self._taken_length.get(start) != length for start, length in chunks):
            raise ValueError("an area given back is not one that was taken")
        for start, length in chunks:
            del self._taken[bisect_left(self._taken, start)]
            del self._taken_length[start]
            self._release(start, length)

    def area_at(self, slot: int) -> AreaOf | None:
        """Find the area in use that has chunk `slot`; None for a free chunk and for a slot outside the window."""
        at = bisect_right(self._taken, slot) - 1
        if at < 0:
            return None
        start = self._taken[at]
        length = self._taken_length[start]
        return self._area(start, length) if slot < start + length else None

    def _area(self, start: int, length: int) -> AreaOf:
        return AreaOf(WindowOffset(start * self.chunk_size), length * self.chunk_size)

    def _chunks(self, area: AreaOf) -> tuple[int, int]:
        start, odd_start = divmod(area.offset, self.chunk_size)
        length, odd_length = divmod(area.size, self.chunk_size)
        if odd_start or odd_length or start < 0 or length < 1 or area.offset + area.size > self.window_size:
            raise ValueError(f"area {area.offset:#x}+{area.size:#x} is not made of chunks of this window")
        return start, length

    def _take(self, area: AreaOf) -> None:
        start, length = self._chunks(area)
        at = bisect_right(self._free, start) - 1
        run = self._free[at] if at >= 0 else 0
        end = run + self._free_length[run] if at >= 0 else 0
        if start + length > end:
            raise ValueError(f"area {area.offset:#x}+{area.size:#x} is in use, or part of it")
        self._drop_run(at)
        if start > run:
            self._add_run(run, start - run)
        if end > start + length:
            self._add_run(start + length, end - start - length)
        insort(self._taken, start)
        self._taken_length[start] = length
        self.free_bytes -= area.size

    def _release(self, start: int, length: int) -> None:
        self.free_bytes += length * self.chunk_size
        after = bisect_left(self._free, start)
        if after < len(self._free) and self._free[after] == start + length:
            length += self._free_length[self._free[after]]
            self._drop_run(after)
        if after > 0:
            before = self._free[after - 1]
            if before + self._free_length[before] == start:
                length += start - before
                start = before
                self._drop_run(after - 1)
        self._add_run(start, length)

    def _drop_run(self, at: int) -> None:
        start = self._free.pop(at)
        length = self._free_length.pop(start)
        del self._by_length[bisect_left(self._by_length, (length, start))]

    def _add_run(self, start: int, length: int) -> None:
        insort(self._free, start)
        self._free_length[start] = length
        insort(self._by_length, (length, start))
