# SPDX-License-Identifier: Apache-2.0
"""What is mapped in the regions window of a process client: the mapping side of the map channel.

The manager says MAP and UNMAP (service thread); the driver asks for the mapping of a region's areas (any thread).
Each MAP becomes an address range of its own, which is never used for another region while anything refers to it.
A MAP over chunks that are mapped already replaces their pages in place; UNMAP puts zero pages in place, at once,
whoever still holds a view. Offsets here are offsets in the window.

A region's owner may take the right to write away from a peer at any moment, in the middle of the peer's store. So pages
that are replaced by read-only ones become private copies on write: the peer's stores reach nobody and never fault.
"""

from __future__ import annotations

import bisect
import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ism.driver.transport import Span
from ism.errors import TransportError
from ism.eventfd import make_eventfd
from ism.memory import PAGE_SIZE, Mapping


@dataclass(slots=True)
class _Piece:
    """Chunks [offset, offset + length) of the window, at `at` of `mapping`.

    `whole`: they are one shared mapping of one file, so that they can be shown a second time.
    """

    offset: int
    length: int
    mapping: Mapping
    at: int
    whole: bool = True

    @property
    def end(self) -> int:
        return self.offset + self.length


class ChunkWindow:
    """The live mappings of one device's window. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offsets: list[int] = []
        self._pieces: dict[int, _Piece] = {}

    def __len__(self) -> int:
        return len(self._offsets)

    def _overlapping(self, offset: int, length: int) -> list[_Piece]:
        index = max(bisect.bisect_right(self._offsets, offset) - 1, 0)
        found = []
        while index < len(self._offsets) and self._offsets[index] < offset + length:
            piece = self._pieces[self._offsets[index]]
            if piece.end > offset:
                found.append(piece)
            index += 1
        return found

    def _add(self, piece: _Piece) -> None:
        bisect.insort(self._offsets, piece.offset)
        self._pieces[piece.offset] = piece

    def _forget(self, piece: _Piece) -> None:
        del self._offsets[bisect.bisect_left(self._offsets, piece.offset)]
        del self._pieces[piece.offset]

    def map(self, offset: int, length: int, fd: int, file_offset: int, *, read: bool, write: bool) -> None:
        """Map part of a memory file at window `offset`; the descriptor stays the caller's.

        Raises: OSError (EINVAL: not made of pages, or partly over chunks that are mapped and partly not).
        """
        if offset < 0 or length <= 0 or (offset | length | file_offset) % PAGE_SIZE:
            raise OSError(errno.EINVAL, f"MAP of {length} bytes at {offset} is not made of pages")
        with self._lock:
            pieces = self._overlapping(offset, length)
            if not pieces:
                mapping = Mapping.of_file(length, fd, file_offset, read=read, write=write)
                self._add(_Piece(offset, length, mapping, 0))
                return
            covered = sum(min(piece.end, offset + length) - max(piece.offset, offset) for piece in pieces)
            if covered != length:
                raise OSError(errno.EINVAL, "MAP over chunks of which only some are mapped")
            for piece in pieces:
                start, end = max(offset, piece.offset), min(offset + length, piece.end)
                at, from_ = piece.at + start - piece.offset, file_offset + start - offset
                if write:
                    piece.mapping.place(at, end - start, fd, from_, read=read, write=True)
                    piece.whole = end - start == piece.length
                else:
                    piece.mapping.place_private(at, end - start, fd, from_)
                    piece.whole = False

    def unmap(self, offset: int, length: int) -> None:
        """Put zero pages over what is mapped in the range, and forget it.

        Raises: OSError (EINVAL: not made of pages).
        """
        if offset < 0 or length <= 0 or (offset | length) % PAGE_SIZE:
            raise OSError(errno.EINVAL, f"UNMAP of {length} bytes at {offset} is not made of pages")
        with self._lock:
            for piece in self._overlapping(offset, length):
                start, end = max(offset, piece.offset), min(offset + length, piece.end)
                piece.mapping.clear(piece.at + start - piece.offset, end - start)
                self._forget(piece)
                if piece.offset < start:
                    self._add(_Piece(piece.offset, start - piece.offset, piece.mapping, piece.at, piece.whole))
                if end < piece.end:
                    self._add(_Piece(end, piece.end - end, piece.mapping, piece.at + end - piece.offset, piece.whole))

    def contiguous(self, spans: Sequence[Span]) -> Mapping:
        """Return one mapping that shows the spans side by side, and nothing else. For each span once.

        Raises: TransportError when a span is not what the manager has mapped, was part of another mapping, or, one of
            several, was changed meanwhile.
        """
        with self._lock:
            pieces: list[_Piece] = []
            seen: set[int] = set()
            for span in spans:
                piece = self._pieces.get(span.offset)
                if piece is None or piece.length != span.length:
                    raise TransportError(
                        f"the device manager announced an area at {span.offset}+{span.length} but mapped nothing; "
                        "it offers no map channel, or is of another version"
                    )
                if piece.mapping.length != piece.length or span.offset in seen:
                    raise TransportError(
                        f"the device manager announced the area at {span.offset}+{span.length} for two regions"
                    )
                seen.add(span.offset)
                pieces.append(piece)
            if len(pieces) == 1:
                return pieces[0].mapping
            if not all(piece.whole for piece in pieces):
                raise TransportError("the rights to the region were changed while it was mapped; attach again")
            try:
                whole = Mapping(sum(span.length for span in spans))
                at = 0
                for piece in pieces:
                    whole.share(at, piece.mapping)
                    at += piece.length
            except OSError as exc:
                raise TransportError(
                    f"cannot map {len(pieces)} areas side by side: {exc}; raise vm.max_map_count", exc.errno or 0
                ) from exc
            at = 0
            for piece in pieces:
                piece.mapping, piece.at = whole, at
                at += piece.length
            return whole

    def clear(self) -> None:
        """Forget everything; mappings live on as long as somebody refers to them."""
        with self._lock:
            self._offsets.clear()
            self._pieces.clear()


class DoorbellTable:
    """Eventfds by notify slot. Descriptor numbers, once used for a doorbell, always stay eventfds until `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: dict[int, int] = {}
        self._spare: list[int] = []
        self._blind = -1
        self._closed = False

    def get(self, slot: int) -> int | None:
        """Eventfd of the slot, or None. No lock: a stale answer is an eventfd all the same."""
        return self._slots.get(slot)

    def set(self, slot: int, fd: int) -> None:
        """Wire the slot to a duplicate of `fd`; the descriptor stays the caller's.

        Raises: OSError (ESHUTDOWN: closed, EINVAL: no eventfd, EMFILE).
        """
        if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]":
            raise OSError(errno.EINVAL, "a doorbell must be an eventfd")
        with self._lock:
            if self._closed:
                raise OSError(errno.ESHUTDOWN, "the device is closed")
            if self._blind < 0:
                self._blind = self._make_blind()
            target = self._slots.get(slot)
            if target is None and self._spare:
                target = self._spare.pop()
            if target is None:
                target = os.dup(fd)
            else:
                os.dup2(fd, target, inheritable=False)
            self._slots[slot] = target

    @staticmethod
    def _make_blind() -> int:
        try:
            return make_eventfd()
        except TransportError as exc:
            raise OSError(exc.errno, str(exc)) from exc

    def unset(self, slot: int) -> None:
        """Unwire the slot."""
        with self._lock:
            target = self._slots.pop(slot, None)
            if target is not None:
                # whoever took the number a moment ago may still ring: it must be an eventfd that wakes nobody
                os.dup2(self._blind, target, inheritable=False)
                self._spare.append(target)

    def close(self) -> None:
        """Close all of them; nobody may ring any more."""
        with self._lock:
            self._closed = True
            for fd in (*self._slots.values(), *self._spare, self._blind):
                if fd >= 0:
                    os.close(fd)
            self._slots.clear()
            self._spare.clear()
            self._blind = -1
