# SPDX-License-Identifier: Apache-2.0
"""The interrupts of one device as its client wants them: eventfds per MSI-X vector, and INTA.

It owns the client's eventfds and what is pending for vectors that have none yet. Whether an interrupt goes out by MSI-X
or by INTA is the function's decision. Follows the vfio-user specification, "DEVICE_SET_IRQS", and vfio.h. A
descriptor from a client may be anything: only eventfds are kept. The client shares their file descriptions and could
make a write to a full one sleep, so they are raised by a call that never does.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from ism.eventfd import raise_eventfd
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd

_EVENTFD_LINK = "anon_inode:[eventfd]"


def is_eventfd(fd: int) -> bool:
    """Tell whether a descriptor is an eventfd, without asking whoever serves the file behind it."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == _EVENTFD_LINK
    except OSError:
        return False


def check_eventfds(fds: Sequence[Fd]) -> None:
    """Refuse descriptors that are no eventfds. Raises VfioUserError (EINVAL)."""
    for fd in fds:
        if not is_eventfd(fd.fileno()):
            raise VfioUserError(errno.EINVAL, "a descriptor for an interrupt is not an eventfd")


class Vectors:
    """The MSI-X vectors of one device. `count` vectors."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._fds: dict[int, Fd] = {}
        self._pending: set[int] = set()

    def __bool__(self) -> bool:
        """Whether any vector has an eventfd."""
        return bool(self._fds)

    @property
    def bound(self) -> int:
        """How many vectors have an eventfd."""
        return len(self._fds)

    def get(self, vector: int) -> Fd | None:
        """Return the eventfd of a vector: the same object for as long as it is not replaced."""
        return self._fds.get(vector)

    def set(self, start: int, fds: Sequence[Fd]) -> None:
        """Give vectors from `start` on an eventfd each, whose ownership passes here. What was pending is raised."""
        for vector, fd in enumerate(fds, start):
            self._take(vector)
            self._fds[vector] = fd
            if vector in self._pending:
                self.signal(vector)

    def unset(self, start: int, count: int) -> None:
        """Take eventfds away."""
        for vector in range(start, start + count):
            self._take(vector)

    def signal(self, vector: int) -> None:
        """Raise a vector; without an eventfd it is pending until it gets one."""
        fd = self._fds.get(vector)
        if fd is None:
            if 0 <= vector < self.count:
                self._pending.add(vector)
            return
        self._pending.discard(vector)
        raise_eventfd(fd.fileno())

    def clear(self) -> None:
        """Take all eventfds away and forget what is pending."""
        for vector in list(self._fds):
            self._take(vector)
        self._pending.clear()

    def _take(self, vector: int) -> None:
        fd = self._fds.pop(vector, None)
        if fd is not None:
            fd.close()


class Intx:
    """INTA of one device: one eventfd, masked by each interrupt until the client unmasks it (vfio.h AUTOMASKED)."""

    def __init__(self) -> None:
        self._fd: Fd | None = None
        self._masked = False

    def set(self, fd: Fd | None) -> None:
        """Give it an eventfd, whose ownership passes here, or take it away; unmasked either way."""
        if self._fd is not None:
            self._fd.close()
        self._fd = fd
        self._masked = False

    def signal(self) -> None:
        """Raise it unless it is masked, and mask it."""
        if self._fd is not None and not self._masked:
            self._masked = True
            raise_eventfd(self._fd.fileno())

    def mask(self) -> None:
        """Raise nothing until it is unmasked."""
        self._masked = True

    def unmask(self, asserted: bool) -> None:
        """Let it through again, at once when it is `asserted`."""
        self._masked = False
        if asserted:
            self.signal()
