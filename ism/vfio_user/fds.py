# SPDX-License-Identifier: Apache-2.0
"""File descriptors as owned values, and their passage over UNIX sockets.

Owns: `Fd`, which closes exactly once and warns when it was forgotten, and the only calls of this package to sendmsg
and recvmsg with SCM_RIGHTS. Never interprets bytes. The peer may send any number of descriptors with any byte: every
one received is either in the result or closed, all are close-on-exec, and loss is reported, not ignored.
Source: unix(7), cmsg(3), vfio-user specification "DMA_MAP" (descriptors as message meta-data).
"""

from __future__ import annotations

import array
import os
import select
import socket
import time
import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from ism.errors import DeviceGoneError
from ism.layout import Buffer
from ism.vfio_user.errors import DescriptorLimitError, VfioUserTimeoutError
from ism.vfio_user.wire import SCM_MAX_FD, FdLike

# as plain integers: operations on enumerated flags cost as much as the system call
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_RECV_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_MSG_TRUNC, _MSG_CTRUNC = int(socket.MSG_TRUNC), int(socket.MSG_CTRUNC)
_INT = array.array("i").itemsize
_CMSG_SPACE = [socket.CMSG_SPACE(count * _INT) for count in range(SCM_MAX_FD + 1)]


def number_of(fd: FdLike) -> int:
    """Descriptor number of a borrowed descriptor."""
    return fd if isinstance(fd, int) else fd.fileno()


class Fd:
    """One open file descriptor with exactly one owner.

    Args:
        number: an open descriptor, >= 0; its ownership passes to this object.
    Raises: ValueError for a negative number.
    """

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = -1
        if number < 0:
            raise ValueError(f"{number} is not an open descriptor")
        self._number = number

    @classmethod
    def copy_of(cls, fd: FdLike) -> Fd:
        """Duplicate a borrowed descriptor, close-on-exec. Raises OSError (EMFILE, EBADF)."""
        return cls(os.dup(number_of(fd)))

    @property
    def closed(self) -> bool:
        """Whether it was closed or detached."""
        return self._number < 0

    def fileno(self) -> int:
        """The number, still owned here; -1 once closed or detached."""
        return self._number

    def detach(self) -> int:
        """Give the number and its ownership to the caller. Raises ValueError when already closed."""
        number = self._number
        if number < 0:
            raise ValueError("the descriptor was already closed or detached")
        self._number = -1
        return number

    def dup(self) -> Fd:
        """A second owner of the same open file, close-on-exec. Raises OSError (EMFILE, EBADF)."""
        return Fd(os.dup(self._number))

    def close(self) -> None:
        """Close it; nothing happens the second time."""
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Fd {self._number}>" if self._number >= 0 else "<Fd closed>"

    def __del__(self) -> None:
        if self._number >= 0:
            warnings.warn(f"descriptor {self._number} was never closed", ResourceWarning, source=self, stacklevel=2)
            self.close()


def close_all(fds: Iterable[Fd]) -> None:
    """Close every one of them; those already closed or detached are left alone."""
    for fd in fds:
        fd.close()


class Received(NamedTuple):
    """What one receive brought: `size` in bytes (0 = end of stream), owned descriptors, and what was lost."""

    size: int
    fds: list[Fd]
    problem: DescriptorLimitError | None


def recv_message(sock: socket.socket, buffer: bytearray | memoryview, max_fds: int) -> Received:
    """Receive once, without blocking, into `buffer`, with up to `max_fds` descriptors.

    Args:
        sock: a UNIX socket, stream or SEQPACKET.
        buffer: filled from its start.
        max_fds: descriptors allowed with this receive, 0..253.
    Returns: bytes received (0 = end of stream), the descriptors (owned by the caller), and a `DescriptorLimitError`
        when some were lost or surplus: then none is left open. A packet longer than the buffer counts as the buffer
        plus one, so that a caller who expects an exact size sees a wrong one.
    Raises: BlockingIOError when nothing is there; OSError when the connection is broken.
    """
    count, ancillary, flags, _ = sock.recvmsg_into([buffer], _CMSG_SPACE[max_fds], _RECV_FLAGS)
    if flags & _MSG_TRUNC:
        count += 1
    if not ancillary:
        if flags & _MSG_CTRUNC:
            return Received(count, [], DescriptorLimitError(max_fds))
        return Received(count, [], None)
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % _INT])
    fds = [Fd(number) for number in numbers]
    if flags & _MSG_CTRUNC or len(fds) > max_fds:
        close_all(fds)
        return Received(count, [], DescriptorLimitError(max_fds))
    return Received(count, fds, None)


def send_some(sock: socket.socket, data: Buffer, fds: Sequence[FdLike] = ()) -> int:
    """Send once, without blocking: as many bytes as fit, and all of `fds` with the first of them.

    Returns: bytes sent, at least 1. The caller sends the rest without the descriptors, which are gone with these.
    Raises: BlockingIOError when nothing fits; OSError when the connection is broken (BrokenPipeError) or
        too many descriptors of this user are under way (ETOOMANYREFS): in each case nothing was sent.
    """
    if not fds:
        return sock.send(data, _SEND_FLAGS)
    rights = array.array("i", [number_of(fd) for fd in fds])
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], _SEND_FLAGS)


def send_message(sock: socket.socket, data: Buffer, fds: Sequence[FdLike] = (), *, timeout_s: float) -> None:
    """Send all of `data` and, exactly once, `fds`; wait while the peer does not read.

    Args:
        sock: a UNIX socket in any blocking mode.
        data: at least one byte; on a SEQPACKET socket one packet.
        fds: borrowed; at most 253.
        timeout_s: for the whole message, seconds.
    Raises: VfioUserTimeoutError when the peer did not read in time: then, unless nothing was sent, the stream is
        unusable; its attribute `sent` says how many bytes went out. DeviceGoneError when the peer is gone;
        other OSError as the kernel gives them.
    """
    view = memoryview(data).cast("B")
    sent, deadline = 0, time.monotonic() + timeout_s
    while sent < len(view):
        try:
            sent += send_some(sock, view[sent:], fds if sent == 0 else ())
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0 or not _wait(sock, select.POLLOUT, left):
                raise PartialSendError(sent, len(view), timeout_s) from None
        except (BrokenPipeError, ConnectionError) as error:
            raise DeviceGoneError(f"the peer closed the connection: {error.strerror}", error.errno or 0) from error


class PartialSendError(VfioUserTimeoutError):
    """The peer did not read in time. Attributes: `sent` (bytes that went out; 0 = the stream is still in step)."""

    def __init__(self, sent: int, size: int, timeout_s: float) -> None:
        self.sent = sent
        super().__init__(f"the peer read {sent} of {size} bytes within {timeout_s:g} s")


def _wait(sock: socket.socket, events: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(sock, events)
    return bool(poller.poll(max(1, round(timeout_s * 1000))))
