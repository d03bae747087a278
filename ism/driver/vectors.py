# SPDX-License-Identifier: Apache-2.0
"""Which MSI-X vector tells of which region: one vector and one eventfd a region, as long as there are vectors.

When all but the last are taken (`exhausted`), a device with an event queue binds further regions to none: UPDATE events
wake exactly the one that was rung. Without an event queue they share the last one: the service thread reads its eventfd
and passes each interrupt on to every region bound to it (virtio-ism: several regions may share a vector, callbacks
tolerate spurious calls), so that a ring costs as much as there are such regions.

A vector that is free again gets a new eventfd with its next region: the old one was given to a peer, who may keep it,
drain it, and so swallow the wake-ups of whoever came next.

To bind an eventfd is a round trip to the device. So the more regions there are, the more vectors are bound at once, for
those that come next (`_ready`): up to an eighth more than there are regions. No peer ever saw those eventfds.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from ism.driver.transport import Transport, Watcher
from ism.errors import DeviceGoneError, TransportError
from ism.eventfd import drain, make_eventfd, raise_eventfd

__all__ = ["Binding", "Vectors", "drain", "make_eventfd"]


_AHEAD_PART, _MOST_AT_ONCE = 8, 8


@dataclass(slots=True)
class Binding:
    """An interrupt of one region: `vector` to tell the device, `fd` readable when a peer rang (borrowed)."""

    vector: int
    fd: int
    shared: bool


class Vectors:
    """The vectors `first` .. `count` - 1 of a function, handed out to regions. Thread-safe."""

    def __init__(self, transport: Transport, watcher: Watcher, first: int, count: int) -> None:
        self._transport, self._watcher = transport, watcher
        self._lock = threading.Lock()
        self._next, self._last = first, count - 1
        self._idle: list[int] = []
        self._ready: list[Binding] = []
        self._fds: set[int] = set()
        self._shared_fd = -1
        self._sharers: set[int] = set()
        self._closed = False

    @property
    def exhausted(self) -> bool:
        """Whether the next region would share a vector with others."""
        with self._lock:
            return not self._ready and not self._idle and self._next == self._last

    def acquire(self) -> Binding:
        """Return an interrupt for a new region.

        Raises: TransportError (no vectors at all, or no descriptors), DeviceGoneError (closed).
        """
        with self._lock:
            if self._closed:
                raise DeviceGoneError(f"{self._transport.name} is closed")
            if not self._ready:
                self._bind_more()
            if self._ready:
                binding = self._ready.pop()
                self._fds.add(binding.fd)
                return binding
            if self._next > self._last:
                raise TransportError(f"{self._transport.name} has no interrupt vectors for regions")
            if self._shared_fd < 0:
                self._share_last()
            fd = make_eventfd()
            self._fds.add(fd)
            self._sharers.add(fd)
            return Binding(self._last, fd, shared=True)

    def _bind_more(self) -> None:
        """Bind some of the vectors that are free, if any are."""
        first, count = self._free_run(1 + min(len(self._fds) // _AHEAD_PART, _MOST_AT_ONCE - 1))
        if not count:
            return
        try:
            fds = self._bound_eventfds(first, count)
        except DeviceGoneError:
            raise
        except TransportError:
            if count == 1:
                raise
            count = 1  # of whatever so many are too much, one may not be
            fds = self._bound_eventfds(first, 1)
        taken = range(first, first + count)
        if first == self._next:
            self._next += count
        else:
            self._idle = [vector for vector in self._idle if vector not in taken]
        self._ready = [Binding(vector, fd, shared=False) for vector, fd in zip(taken, fds, strict=True)][::-1]

    def _free_run(self, most: int) -> tuple[int, int]:
        """The first of the free vectors, and how many from it on are, up to `most`: those that came back first."""
        if not self._idle:
            return self._next, min(most, max(0, self._last - self._next))
        idle = set(self._idle)
        first = self._idle[-1]
        while first - 1 in idle:
            first -= 1
        count = 1
        while count < most and first + count in idle:
            count += 1
        return first, count

    def _bound_eventfds(self, first: int, count: int) -> list[int]:
        fds: list[int] = []
        try:
            for _ in range(count):
                fds.append(make_eventfd())
            self._transport.set_vectors(first, fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def _share_last(self) -> None:
        (fd,) = self._bound_eventfds(self._last, 1)
        try:
            self._watcher.add(fd, self._fan_out)
        except BaseException:
            os.close(fd)
            raise
        self._fds.add(fd)
        self._shared_fd = fd

    def release(self, binding: Binding) -> None:
        """Take an interrupt back; the device has unbound it.

        The vector is used again, its eventfd never: a peer that got it for its doorbell may have kept it.
        """
        with self._lock:
            if self._closed or binding.fd not in self._fds:
                return
            if not binding.shared:
                self._idle.append(binding.vector)
            self._sharers.discard(binding.fd)
            self._fds.discard(binding.fd)
            os.close(binding.fd)

    def _fan_out(self) -> None:
        with self._lock:
            if not self._closed and drain(self._shared_fd):
                for fd in self._sharers:
                    raise_eventfd(fd)

    def wake_all(self) -> None:
        """Make every region's descriptor readable: the device is gone, and whoever sleeps must look."""
        with self._lock:
            for fd in self._fds:
                raise_eventfd(fd)

    def close(self) -> None:
        """Close all eventfds; nobody may use a binding any more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._shared_fd >= 0:
                self._watcher.remove(self._shared_fd)
            for fd in (*self._fds, *(binding.fd for binding in self._ready)):
                os.close(fd)
            self._fds.clear()
            self._ready.clear()
            self._idle.clear()
            self._sharers.clear()
