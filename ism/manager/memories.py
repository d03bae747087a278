# SPDX-License-Identifier: Apache-2.0
"""The regions' memory as the manager itself touches it: for trapped accesses, and to seal it against new writers.

The memory is the manager's own and cannot shrink, so its mappings never fault. Its bytes are hostile and mean nothing
here. The order of a seal: every writer whose mapping was announced has mapped (or is gone), the manager has a
writable mapping of its own for clients whose accesses are trapped, then F_SEAL_FUTURE_WRITE, then the first
read-only descriptor goes out (fcntl(2)).
"""

from __future__ import annotations

import weakref
from typing import Literal

import trio

from ism.device.contract import Memory
from ism.ids import DevId
from ism.manager.registry import DomainRegistry
from ism.memory import Mapping, seal_writers
from ism.virtio.ism_spec import Permission

_WORDS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Memories:
    """What the manager knows of live memory beyond the registry: own mappings, writers under way, seals to be made."""

    def __init__(self) -> None:
        self._views: weakref.WeakKeyDictionary[Memory, Mapping] = weakref.WeakKeyDictionary()
        self._writers: weakref.WeakKeyDictionary[Memory, int] = weakref.WeakKeyDictionary()
        self._to_seal: weakref.WeakSet[Memory] = weakref.WeakSet()
        self._writers_gone = trio.lowlevel.ParkingLot()

    def view(self, memory: Memory) -> memoryview:
        """Return the bytes of the memory, writable. Raises OSError when it cannot be mapped."""
        mapping = self._views.get(memory)
        if mapping is None:
            mapping = Mapping(memory.size)
            mapping.place(0, memory.size, memory.fd, 0)
            self._views[memory] = mapping
        return mapping.view

    def writer_begins(self, memory: Memory) -> None:
        """A client is being told to map the memory writable."""
        self._writers[memory] = self._writers.get(memory, 0) + 1

    def writer_ends(self, memory: Memory) -> None:
        """It has, or never will."""
        left = self._writers[memory] - 1
        if left:
            self._writers[memory] = left
            return
        del self._writers[memory]
        self._writers_gone.unpark_all()

    def require_seal(self, memory: Memory) -> None:
        """Note that no read-only descriptor may go out before the seal."""
        self._to_seal.add(memory)

    def may_share_readonly(self, memory: Memory) -> bool:
        """Seal if that is required and possible now; tell whether a read-only descriptor may go out. Raises OSError."""
        if memory in self._to_seal:
            if memory in self._writers:
                return False
            self.view(memory)
            seal_writers(memory.fd)
            self._to_seal.discard(memory)
        return True

    async def wait_writers_gone(self, memory: Memory) -> None:
        """Wait until no writer is under way. They are given a time limit by whoever waits for their answers."""
        while memory in self._writers:
            await self._writers_gone.park()


class TrappedWindow:
    """The regions window of one device for accesses by message. Implements `ism.device.function.WindowAccess`.

    Naturally aligned accesses of 1, 2, 4 and 8 bytes are single loads and stores.
    """

    def __init__(self, registry: DomainRegistry, devid: DevId, memories: Memories) -> None:
        self._registry, self._devid, self._memories = registry, devid, memories

    def read(self, offset: int, n: int) -> bytes:
        """Read exactly `n` bytes inside the window: zeros where nothing is mapped. Raises OSError."""
        out = bytearray(n)
        for done, size, view, at, rights in self._pieces(offset, n):
            if view is None or not rights:
                continue
            word = _WORDS.get(size)
            if word is not None and not at % size:
                out[done : done + size] = view[at : at + size].cast(word)[0].to_bytes(size, "little")
            else:
                out[done : done + size] = view[at : at + size]
        return bytes(out)

    def write(self, offset: int, data: bytes) -> None:
        """Write where the device has the right to, drop the rest. Raises OSError."""
        for done, size, view, at, rights in self._pieces(offset, len(data)):
            if view is None or not rights & Permission.WRITE:
                continue
            word = _WORDS.get(size)
            if word is not None and not at % size:
                view[at : at + size].cast(word)[0] = int.from_bytes(data[done : done + size], "little")
            else:
                view[at : at + size] = data[done : done + size]

    def _pieces(self, offset: int, n: int) -> list[tuple[int, int, memoryview | None, int, Permission]]:
        pieces: list[tuple[int, int, memoryview | None, int, Permission]] = []
        chunk_size = self._registry.chunk_size
        done = 0
        while done < n:
            piece = self._registry.piece_at(self._devid, offset + done)
            if piece is None:
                size = min(n - done, chunk_size - (offset + done) % chunk_size)
                pieces.append((done, size, None, 0, Permission(0)))
            else:
                size = min(n - done, piece.length)
                view = self._memories.view(piece.memory) if piece.rights else None
                pieces.append((done, size, view, piece.file_offset, piece.rights))
            done += size
        return pieces
