# SPDX-License-Identifier: Apache-2.0
"""Memory lent to the program: bytes that came, where they lie, and room to write what is to be sent. No event loop.

A `ReceiveLoan` shows bytes of the ring that this side receives in, a `SendLoan` room in the peer's; over TCP either is
ordinary memory, and behind it are the copies that a ring saves. A direction of a connection has one loan out at most,
and no ordinary call moves bytes of that direction meanwhile: it is refused, or waits for its turn. Whoever makes loans
sees to that: `ism.smc.channel` for threads, `ism.smc.trio_lending` for tasks, `ism.smc.lending_tcp` for plain sockets.

States of a loan:

    lent      `view` is the program's. `consume` and `commit` say how much of it counts; nothing happens yet.
    pinned    it was ended, but a slice, an array or another view of the memory lives: BufferError. What the end was to
              do is not done, so nothing is given back to the peer, published or used again. It is tried again by
              `release()`, and by the next call of the direction: BufferError from that one too, or it goes on.
    over      nothing refers to the memory any more; bytes were consumed, or sent. Further ends do nothing.

    lent -> over, lent -> pinned -> over

How it is known that nobody looks. A memoryview of an object, and all slices, arrays and views that are made of it, hold
one reference to that object together, until the last of them is gone. Each loan has such a memoryview of its own, so
the exporting object's reference count tells: it is smaller at the end than it was when the loan was made. (An exporter
for each loan would do too, but one that is a memoryview crashes CPython when it ends in a reference cycle.)

Closing does not wait for loans. The memory stays mapped for as long as something refers to it, whatever it may hold
then, and its region is not used for a later connection (`Connection.unread_lent`, `room_lent`).
"""

from __future__ import annotations

import errno
import operator
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ism.smc.connection import Connection

UNBOUNDED = (1 << 63) - 1


def _nothing() -> None:
    pass


class Loan:
    """Memory lent, until `release` or the end of the block. `len` of it is what was lent.

    Attributes: `view` (a memoryview of bytes, withdrawn at the end: using it then is ValueError), `thread` (which took
    it), `ended` (no longer the program's: pinned, or over).
    """

    __slots__ = (
        "_check_open",
        "_count",
        "_exporter",
        "_finish",
        "_holds",
        "_lock",
        "_references",
        "_size",
        "ended",
        "thread",
        "view",
    )

    def __init__(
        self,
        view: memoryview,
        finish: Callable[[int], None],
        *,
        check_open: Callable[[], None] = _nothing,
        lock: threading.Lock | None = None,
    ) -> None:
        """Lend `view`, whose reference to the object behind it nothing else shares.

        Args:
            finish: called once, with how many bytes count, when nothing refers to the memory any more.
            check_open: raises when the connection was closed here.
            lock: of the direction, held by this thread: let go when the loan has ended.
        """
        self._check_open, self._lock = check_open, lock
        self._finish: Callable[[int], None] | None = finish
        self._size = self._count = len(view)
        self._holds, self.thread = (False, 0) if lock is None else (True, threading.get_ident())
        self.ended = False
        self.view = view
        self._exporter = view.obj
        self._references = self._count_references()

    def __len__(self) -> int:
        return self._size

    def _count_references(self) -> int:
        return sys.getrefcount(self._exporter)

    def _say(self, count: int) -> None:
        count = operator.index(count)
        if self.ended:
            raise ValueError("the loan has ended")
        if not 0 <= count <= self._size:
            raise ValueError(f"{count} bytes are not part of the {self._size} that were lent")
        self._check_open()
        self._count = count

    def withdraw(self) -> None:
        """Have the end consume, or send, nothing, unless it is over."""
        self._count = 0

    @property
    def over(self) -> bool:
        """Whether what the end was to do is done, or under way."""
        return self._finish is None

    def settle(self) -> None:
        """End it, in the name of whoever has the direction. Raises BufferError (it is pinned), what `finish` does."""
        self.ended = True
        finish = self._finish
        if finish is None:
            return
        try:
            self.view.release()
            looked_at = self._count_references() >= self._references
        except BufferError:
            looked_at = True
        if looked_at and self._size:  # at the end of a stream there is nothing to look at
            raise BufferError(
                f"{self._size} bytes that were lent are still in use: let go of all slices, arrays, other views of them"
            )
        self._finish, self._exporter = None, b""
        finish(self._count)

    def release(self) -> None:
        """End the loan, as the end of the block does. Idempotent.

        Raises: BufferError (something made of `view` lives: let go of it and call this again, or go on: the next call
        of this direction tries too); of a `SendLoan`, what sending raises.
        """
        lock = self._lock
        if lock is None:
            self.settle()
        elif self._holds or (not self.over and lock.acquire(False)):  # else another thread has the turn, and settles it
            self._holds = False
            try:
                self.settle()
            finally:
                lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.release()
            return
        self.withdraw()
        try:
            self.release()
        except (BufferError, OSError):
            pass  # the error on its way comes first; what is pinned is found by the next call


class ReceiveLoan(Loan):
    """Bytes that came; empty at the end of the stream. The end of the block takes all of them, or as `consume` says.

    The peer can write them at any time, also while they are looked at: copy first what is checked before it is used.
    """

    __slots__ = ()

    def consume(self, count: int) -> None:
        """Take the first `count` bytes alone at the end of the block; the rest comes again. The last call counts.

        Raises: ValueError (not 0 to `len`, or the loan has ended); when closed OSError (EBADF), or ClosedResourceError.
        """
        self._say(count)


class SendLoan(Loan):
    """Room for bytes to send. The end of the block sends all of it, or as `commit` says.

    What it holds at first is left from earlier. The peer can read and write it at any time.
    """

    __slots__ = ()

    def commit(self, count: int) -> None:
        """Send the first `count` bytes alone at the end of the block. The last call counts. Raises as `consume`."""
        self._say(count)


# -- of a ring -------------------------------------------------------------------------------------------------------


def give_back(connection: Connection, count: int) -> None:
    """End the loan of received bytes. Raises OSError (ECONNABORTED); nothing when closed: nobody wants them back."""
    connection.unread_lent = False
    try:
        connection.consume(count)
    except OSError as exc:
        if exc.errno != errno.EBADF:
            raise


def publish(connection: Connection, count: int) -> None:
    """End the loan of room. Raises OSError, as sending does, unless nothing is sent."""
    connection.room_lent = False
    try:
        connection.commit(count)
    except OSError:
        if count:
            raise


def check_turn(loan: Loan | None) -> None:
    """Refuse to wait for a loan that this thread has itself. Raises OSError (EDEADLK)."""
    if loan is not None and not loan.ended and loan.thread == threading.get_ident():
        raise OSError(errno.EDEADLK, "this thread has memory of this direction lent: end that block first")


def view_size(max_bytes: int | None) -> int:
    """Return the limit that was asked for. Raises ValueError, TypeError."""
    return UNBOUNDED if max_bytes is None else _positive("max_bytes", max_bytes)


def room_size(size: int) -> int:
    """Return the size that was asked for. Raises ValueError, TypeError."""
    return _positive("size", size)


def _positive(name: str, value: int) -> int:
    value = operator.index(value)
    if value < 1:
        raise ValueError(f"{name} is {value}, must be 1 or more")
    return min(value, UNBOUNDED)
