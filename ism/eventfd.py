# SPDX-License-Identifier: Apache-2.0
"""Eventfds: made, drained and raised, without ever sleeping in one.

An eventfd of a region is not private: for a direct doorbell its descriptor is given to the peer, and with it the open
file description. A hostile peer can therefore clear O_NONBLOCK, fill the counter or empty it, at any moment. What it
can reach this way is its own connection only, as long as no call here depends on the flag:

- `drain` reads with RWF_NOWAIT, which holds for the one call whatever the flags say (Linux 5.8).
- `raise_eventfd` does not write: a write has no such flag and would sleep while the counter is full. The kernel adds
  to an eventfd without sleeping when an asynchronous read completes (IOCB_FLAG_RESFD, io_submit(2)), so an empty read
  of /dev/null is submitted instead. Where the kernel has no asynchronous I/O, the counter is polled before it is
  written: that leaves a window of a microsecond which only a peer that attacks can hit.

Usable from any thread and signal handler: each call works on a block that it alone has. A forked child starts anew.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import select
import struct
import threading

from ism.errors import TransportError

DESCRIPTOR_ADVICE = "raise the descriptor limit (ulimit -n, or LimitNOFILE= of the unit)"

_SYSCALLS = {"x86_64": (206, 209, 208), "aarch64": (0, 2, 4)}
"""Numbers of io_setup, io_submit, io_getevents."""
_IOCB = struct.Struct("<QIiHhIQQqQII")
"""struct iocb (linux/aio_abi.h): data, key, rw_flags, opcode, priority, fildes, buf, nbytes, offset, reserved, flags,
resfd."""
_IOCB_CMD_PREAD = 0
_IOCB_FLAG_RESFD = 1
_RESFD = struct.Struct("<I")
_RESFD_AT = _IOCB.size - _RESFD.size
_IN_FLIGHT = 64
_EVENT_SIZE = 32
_NONE, _ONE, _ALL = ctypes.c_long(0), ctypes.c_long(1), ctypes.c_long(_IN_FLIGHT)


def make_eventfd() -> int:
    """Return a new non-blocking eventfd owned by the caller. Raises TransportError naming the limit."""
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as exc:
        raise TransportError(f"cannot make an eventfd: {exc.strerror}; {DESCRIPTOR_ADVICE}", exc.errno or 0) from exc


def drain(fd: int) -> bool:
    """Reset an eventfd; returns whether it was set. Never sleeps."""
    try:
        os.preadv(fd, (bytearray(8),), -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
        return _drain_polled(fd)
    return True


def _drain_polled(fd: int) -> bool:
    if not _ready(fd, select.POLLIN):
        return False
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True


def _ready(fd: int, events: int) -> bool:
    poller = select.poll()
    poller.register(fd, events)
    return bool(poller.poll(0))


class _Block:
    """What one call to the kernel needs: a request, the array that names it, room for events."""

    __slots__ = ("array", "events", "request", "timeout")

    def __init__(self, null: int) -> None:
        self.request = ctypes.create_string_buffer(_IOCB.size)
        at = ctypes.addressof(self.request)
        _IOCB.pack_into(self.request, 0, 0, 0, 0, _IOCB_CMD_PREAD, 0, null, at, 0, 0, 0, _IOCB_FLAG_RESFD, 0)
        self.array = (ctypes.c_void_p * 1)(at)
        self.events = ctypes.create_string_buffer(_EVENT_SIZE * _IN_FLIGHT)
        self.timeout = ctypes.create_string_buffer(16)


class Raiser:
    """Adds to eventfds through one asynchronous I/O context.

    Attributes: `asynchronous` (False: the kernel has none, see the module's head).
    """

    def __init__(self, *, asynchronous: bool = True) -> None:
        self.asynchronous = False
        # the GIL is kept: each call is a fraction of a microsecond, less than giving it up would cost
        self._syscall = ctypes.PyDLL(None, use_errno=True).syscall
        self._context = ctypes.c_ulong(0)
        self._blocks: list[_Block] = []
        numbers = _SYSCALLS.get(platform.machine()) if asynchronous else None
        if numbers is None:
            return
        setup, self._submit, self._getevents = (ctypes.c_long(number) for number in numbers)
        try:
            self._null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        if self._syscall(setup, _ALL, ctypes.byref(self._context)) == 0:
            self.asynchronous = True
        else:
            os.close(self._null)

    def raise_eventfd(self, fd: int) -> None:
        """Add 1 to an eventfd, or nothing when it is full. Raises OSError (EBADF, EINVAL: no eventfd)."""
        if not self.asynchronous:
            self._write(fd)
            return
        try:
            block = self._blocks.pop()
        except IndexError:
            block = _Block(self._null)
        try:
            _RESFD.pack_into(block.request, _RESFD_AT, fd)
            for _ in range(_IN_FLIGHT):
                if self._syscall(self._submit, self._context, _ONE, block.array) == 1:
                    return
                code = ctypes.get_errno()
                if code != errno.EAGAIN:
                    raise OSError(code, f"descriptor {fd} cannot be raised: {os.strerror(code)}")
                # the results of earlier calls fill the context: take them out
                self._syscall(self._getevents, self._context, _NONE, _ALL, block.events, block.timeout)
            self._write(fd)
        finally:
            self._blocks.append(block)

    @staticmethod
    def _write(fd: int) -> None:
        if _ready(fd, select.POLLOUT):
            try:
                os.eventfd_write(fd, 1)
            except BlockingIOError:
                pass  # full: the wake-up is pending already


_raiser: Raiser | None = None
_raiser_lock = threading.Lock()


def raise_eventfd(fd: int) -> None:
    """Make an eventfd readable. Never sleeps. Raises OSError (EBADF, EINVAL: no eventfd).

    Ordering: stores made before are visible to whoever wakes (the system call orders them).
    """
    (_raiser or _make_raiser()).raise_eventfd(fd)


def _make_raiser() -> Raiser:
    global _raiser  # noqa: PLW0603 (one context a process)
    with _raiser_lock:
        if _raiser is None:
            _raiser = Raiser()
        return _raiser


def _after_fork() -> None:
    global _raiser, _raiser_lock
    _raiser, _raiser_lock = None, threading.Lock()  # a context belongs to one address space


os.register_at_fork(after_in_child=_after_fork)
