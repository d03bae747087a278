# SPDX-License-Identifier: Apache-2.0
"""Which MSI-X vector tells of which region: one vector and one eventfd a region, as long as there are vectors.

When all but the last are taken (`exhausted`), a device with an event queue binds further regions to none: UPDATE events
wake exactly the one that was rung. Without an event queue they share the last one: the service thread reads its eventfd
and passes each interrupt on to every region bound to it (virtio-ism: several regions may share a vector, callbacks
tolerate spurious calls), so that a ring costs as much as there are such regions.

A vector that is free again gets a new eventfd with its next region: the old one was given to a peer, who may keep it,
drain it, and so swallow the wake-ups of whoever came next.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from ism.driver.transport import Transport, Watcher
from ism.errors import DeviceGoneError, TransportError
from ism.eventfd import drain, make_eventfd, raise_eventfd

__all__ = ["Binding", "Vectors", "drain", "make_eventfd"]


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
        self._fds: set[int] = set()
        self._shared_fd = -1
        self._sharers: set[int] = set()
        self._closed = False

    @property
    def exhausted(self) -> bool:
        """Whether the next region would share a vector with others."""
        with self._lock:
            return not self._idle and self._next == self._last

    def acquire(self) -> Binding:
        """Return an interrupt for a new region.

        Raises: TransportError (no vectors at all, or no descriptors), DeviceGoneError (closed).
        """
        with self._lock:
            if self._closed:
                raise DeviceGoneError(f"{self._transport.name} is closed")
            if self._idle:
                fd = self._bound_eventfd(self._idle[-1])
                return Binding(self._idle.pop(), fd, shared=False)
            if self._next > self._last:
                raise TransportError(f"{self._transport.name} has no interrupt vectors for regions")
            if self._next < self._last:
                fd = self._bound_eventfd(self._next)
                self._next += 1
                return Binding(self._next - 1, fd, shared=False)
            if self._shared_fd < 0:
                self._share_last()
            fd = make_eventfd()
            self._fds.add(fd)
            self._sharers.add(fd)
            return Binding(self._last, fd, shared=True)

    def _bound_eventfd(self, vector: int) -> int:
        fd = make_eventfd()
        try:
            self._transport.set_vectors(vector, [fd])
        except BaseException:
            os.close(fd)
            raise
        self._fds.add(fd)
        return fd

    def _share_last(self) -> None:
        fd = self._bound_eventfd(self._last)
        try:
            self._watcher.add(fd, self._fan_out)
        except BaseException:
            self._fds.discard(fd)
            os.close(fd)
            raise
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
            for fd in self._fds:
                os.close(fd)
            self._fds.clear()
            self._idle.clear()
            self._sharers.clear()
