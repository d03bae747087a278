# SPDX-License-Identifier: Apache-2.0
"""Loans of an `SmcStream`: what `receive_view` and `send_buffer` return. Part of `stream`, which it belongs to.

Entering does what a receive or a send does before it moves bytes: it waits for its turn, for the decision how bytes
travel, and for bytes or room. The direction stays taken until the block is left: other calls are refused as those of a
second task are (BusyResourceError). A loan that is pinned (see `ism.smc.lending`) keeps it too, until the next call of
that direction finds that nobody looks any more.

Checkpoints: entering sees cancellation. Entering `receive_view`, and leaving `send_buffer` without an exception, yields
as often as `amortise_checkpoints` says. Over TCP entering is a checkpoint in any case, and leaving `send_buffer` is a
`send_all`.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

import trio

from ism.errors import IsmError
from ism.smc.lending import Loan, ReceiveLoan, SendLoan, give_back, publish
from ism.smc.lending_tcp import PEEK, discard, memory, view_memory

if TYPE_CHECKING:
    from ism.smc.stream import SmcStream

L = TypeVar("L", bound=Loan)


class _Block(ABC, Generic[L]):
    """A block in which memory is lent."""

    __slots__ = ("_lent", "_size", "_stream")

    def __init__(self, stream: SmcStream, size: int) -> None:
        self._stream, self._size = stream, size
        self._lent: L | None = None

    @property
    def pinned(self) -> bool:
        """Whether the block is over, but its memory is looked at still, or was."""
        return self._lent is not None and self._lent.ended

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the loan; of one that is pinned, try it again. Raises BufferError: nothing has changed; trio's errors."""
        lent = self._lent
        assert lent is not None
        if kind is not None:
            lent.withdraw()
        try:
            lent.settle()
        except BufferError:
            if kind is None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                raise
            return  # pinned: the error on its way comes first, and the next call finds it
        except (IsmError, OSError) as exc:
            self._over()
            if kind is None:
                await self._stream._break(exc)
            return
        self._over()

    @abstractmethod
    def _over(self) -> None:
        """The loan is over: the direction is free again."""

    def _check_open(self) -> None:
        if self._stream._channel.closed:
            raise trio.ClosedResourceError("this stream is closed")


class ReceiveView(_Block[ReceiveLoan]):
    """Lends received bytes for a block."""

    __slots__ = ()

    async def __aenter__(self) -> ReceiveLoan:
        stream = self._stream
        if stream._receiving:
            await stream._turn(stream._view, "receiving from")
        stream._receiving = True
        try:
            channel = stream._channel
            connection = channel.connection
            if connection is None or channel.closed:
                connection = None if stream._plain is not None else await stream._receivable()
            if connection is None:
                lent = await self._look_at_tcp()
            else:
                if channel.receive_turns.due():
                    await channel.begin_receiving()
                else:
                    await trio.lowlevel.checkpoint_if_cancelled()
                while (view := connection.lend_unread(self._size)) is None:
                    await channel.wait_readable(connection)
                if not view:
                    await stream._before_the_end()
                    stream._check_usable()
                lent = ReceiveLoan(view, partial(give_back, connection), check_open=self._check_open)
        except BaseException as exc:
            stream._receiving = False
            if not isinstance(exc, IsmError | OSError):
                raise
            await (_break_tcp(exc) if stream._plain is not None else stream._break(exc))
        self._lent, stream._view = lent, self
        return lent

    async def _look_at_tcp(self) -> ReceiveLoan:
        stream = self._stream
        buffer = view_memory(self._size)
        tcp = stream._over_tcp.socket
        count = await tcp.recv_into(buffer, 0, PEEK)

        def finish(taken: int) -> None:
            if taken and tcp.fileno() >= 0:
                discard(stream._channel.raw().recv_into, buffer, taken)

        return ReceiveLoan(memoryview(buffer)[:count].toreadonly(), finish, check_open=self._check_open)

    def _over(self) -> None:
        if self._stream._view is self:  # else it was released early, and others have had their turn
            self._stream._receiving, self._stream._view = False, None


class SendBuffer(_Block[SendLoan]):
    """Lends room for bytes to send, for a block."""

    __slots__ = ("_unsent",)

    def __init__(self, stream: SmcStream, size: int) -> None:
        super().__init__(stream, size)
        self._unsent: memoryview | None = None

    async def __aenter__(self) -> SendLoan:
        stream = self._stream
        if stream._sending:
            await stream._turn(stream._buffer, "sending on")
        stream._sending = True
        try:
            channel = stream._channel
            connection = channel.connection
            if connection is None or channel.closed or channel.write_ended:
                connection = None if stream._plain is not None else await stream._sendable()
            if connection is None:
                lent = await self._make_room()
            else:
                await trio.lowlevel.checkpoint_if_cancelled()
                while not (view := connection.lend_room(self._size)):
                    if not await channel.wait_writable(connection):
                        await trio.lowlevel.checkpoint()
                lent = SendLoan(view, partial(publish, connection), check_open=self._check_open)
        except BaseException as exc:
            stream._sending = False
            if not isinstance(exc, IsmError | OSError):
                raise
            await stream._break(exc)
        self._lent, stream._buffer = lent, self
        return lent

    async def _make_room(self) -> SendLoan:
        tcp = self._stream._over_tcp
        await tcp.wait_send_all_might_not_block()
        if tcp.socket.did_shutdown_SHUT_WR:
            raise trio.ClosedResourceError("this side of the stream has sent its end")
        buffer = memory(self._size)

        def finish(count: int) -> None:
            self._unsent = memoryview(buffer)[:count] if count else None

        return SendLoan(memoryview(buffer), finish, check_open=self._check_open)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """As that of every block; over TCP it sends. Cancellation: an unknown part was sent then."""
        await super().__aexit__(kind, error, traceback)
        stream = self._stream
        unsent, self._unsent = self._unsent, None
        if unsent is not None:
            stream._sending = True
            try:
                await stream._over_tcp.send_all(unsent)
            finally:
                stream._sending = False
        elif kind is None and stream._channel.send_turns.due():
            await stream._channel.send_turns.over()

    def _over(self) -> None:
        if self._stream._buffer is self:
            self._stream._sending, self._stream._buffer = False, None


async def _break_tcp(exc: Exception) -> NoReturn:
    """Turn what TCP's socket raised into trio's error. Its call was the checkpoint."""
    if isinstance(exc, OSError) and exc.errno in (errno.EBADF, errno.ENOTSOCK):
        raise trio.ClosedResourceError("this stream is closed") from None
    raise trio.BrokenResourceError(f"the connection is broken: {exc}") from exc
