# SPDX-License-Identifier: Apache-2.0
"""Typed calls over any trio stream: `serve` answers with a service's methods, `connect` gives a proxy with the same.

A service is a class. Its public async methods are what can be called; their annotations say what msgspec lets through:
arguments are checked where they arrive, results too. Both ends name the same class (by name, in the hello).

One connection carries many calls at once, and answers come in the order in which they are ready. Each call is answered
exactly once, also a cancelled one; until then it counts as in flight. At the server a call is a task of its own with a
cancel scope, which the client's `Cancel` cancels. What a handler raises becomes a `Failure`, and ends nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar, cast

import msgspec
import trio
from frames import Frame, Frames, pack
from interface import (
    BadArgumentsError,
    CallCancelledError,
    Method,
    ServiceError,
    UnknownMethodError,
    describe,
    methods,
)
from messages import (
    Array,
    Call,
    Cancel,
    ConnectionLostError,
    Failure,
    Limits,
    ProtocolError,
    Result,
    RpcError,
    TooLargeError,
    decode,
    encode,
)

__all__ = [
    "connect",
    "serve",
    "Limits",
    "RpcError",
    "ConnectionLostError",
    "ProtocolError",
    "RemoteError",
    "BadResultError",
    "TooLargeError",
    "ServiceError",
    "UnknownMethodError",
    "BadArgumentsError",
    "CallCancelledError",
]

HELLO_S = 60.0

T = TypeVar("T")


class RemoteError(RpcError):
    """The server answered with an error. Attributes: `type` (name of the exception there), `message`, `data`."""

    def __init__(self, type_name: str, message: str, data: Any = None) -> None:
        super().__init__(f"{type_name}: {message}" if message else type_name)
        self.type, self.message, self.data = type_name, message, data


class BadResultError(RpcError):
    """The server's result is not what the method's annotation promises."""


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Let an RpcError of a nursery's tasks out as itself. Two tasks of one connection fail of one cause."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors, rest = group.split(RpcError)
        if errors is None:
            raise
        if rest is not None:
            raise rest from None  # cancelled at the same moment: then nobody asks any more why the connection broke
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__


# -- server ---------------------------------------------------------------------------------------------------------


async def serve(
    stream: trio.abc.Stream, service: object, limits: Limits | None = None, *, hello_s: float = HELLO_S
) -> None:
    """Answer one client's calls with the methods of `service` until it closes the connection; then close the stream.

    Handlers that still run then are cancelled.
    Raises: ConnectionLostError, ProtocolError. A server of many clients catches RpcError.
    """
    async with stream:
        frames = Frames(stream, limits or Limits())
        await frames.greet(type(service).__name__, first=False, within_s=hello_s)
        with _plain_errors():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(frames.send_forever)
                await _Server(frames, service, nursery).run()
                nursery.cancel_scope.cancel()


class _Server:
    def __init__(self, frames: Frames, service: Any, nursery: trio.Nursery) -> None:
        self._frames, self._service, self._nursery = frames, service, nursery
        self._methods: dict[str, Method] = methods(self._service.__class__)
        self._running: dict[int, trio.CancelScope] = {}

    async def run(self) -> None:
        decoder = msgspec.msgpack.Decoder(Call | Cancel)
        while (received := await self._frames.receive(decoder)) is not None:
            message, arrays = received
            if isinstance(message, Call):
                if message.number in self._running:
                    raise ProtocolError(f"the client used the number {message.number} for two calls at once")
                if len(self._running) + self._frames.waiting >= self._frames.limits.calls:
                    raise ProtocolError(f"the client has more than {self._frames.limits.calls} calls in flight")
                self._running[message.number] = trio.CancelScope()
                self._nursery.start_soon(self._answer, message, arrays)
            elif message.number in self._running:  # else it crossed the answer
                self._running[message.number].cancel()
            del received, message, arrays

    async def _answer(self, call: Call, arrays: list[Array]) -> None:
        number, scope = call.number, self._running[call.number]
        frame = None
        try:
            with scope:
                frame = await self._run(call, arrays)
            if frame is None:
                frame = self._failure(number, CallCancelledError("the client gave up this call"))
        except Exception as exc:
            frame = self._failure(number, exc)
        except BaseExceptionGroup as group:  # a nursery of the handler failed while this connection was ending
            raise (group.split(Exception)[1] or group) from None
        finally:
            del self._running[number]
        if frame is not None:
            self._frames.put(frame)

    async def _run(self, call: Call, arrays: list[Array]) -> Frame:
        method = self._methods.get(call.method)
        if method is None:
            raise UnknownMethodError(f"{type(self._service).__name__} has no method {call.method[:100]!r}")
        try:
            checked = decode(call.arguments, method.arguments, arrays)
        except Exception as exc:
            raise BadArgumentsError(f"{method.name}: {exc}") from exc
        arguments = {name: getattr(checked, name) for name in checked.__struct_fields__}
        value, found = encode(await getattr(self._service, method.name)(**arguments))
        return pack(Result(call.number, value), found, self._frames.accepted)

    def _failure(self, number: int, exc: Exception) -> Frame:
        kind, message, data = describe(exc)
        try:
            value, arrays = encode(data)
            return pack(Failure(number, kind, message, value), arrays, self._frames.accepted)
        except Exception:  # the data cannot be sent: the error matters more
            return pack(Failure(number, kind, message, encode(None)[0]), [], self._frames.accepted)


# -- client ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def connect(
    stream: trio.abc.Stream, service: type[T], limits: Limits | None = None, *, hello_s: float = HELLO_S
) -> AsyncIterator[T]:
    """Give a proxy with the methods of `service`; close the stream at the end of the block.

    Any number of tasks may call at once; more calls than the server accepts wait for their turn. A call raises
    RemoteError, ConnectionLostError, TooLargeError, BadResultError, and TypeError for what cannot be sent.
    Cancellation: a call ends at once, and its handler is cancelled; arrays under way are still sent to their end.
    Raises: ConnectionLostError, ProtocolError, before the block; later troubles of the connection are its calls'.
    """
    async with stream:
        frames = Frames(stream, limits or Limits())
        await frames.greet(service.__name__, first=True, within_s=hello_s)
        client, failed = _Client(frames), None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            try:
                yield cast(T, _Proxy(client, service))
            except BaseException as exc:
                failed = exc  # goes round the nursery, which would wrap it in a group
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed


class _Proxy:
    def __init__(self, client: _Client, service: type) -> None:
        for method in methods(service).values():
            setattr(self, method.name, functools.partial(client.call, method))


class _Pending:
    """A call in flight."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.answer: tuple[Result | Failure, list[Array]] | None = None


class _Client:
    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._numbers = itertools.count()
        self._pending: dict[int, _Pending] = {}
        self._slots = trio.Semaphore(frames.accepted.calls, max_value=frames.accepted.calls)
        self._lost: RpcError | None = None

    async def run(self) -> None:
        lost: RpcError = ConnectionLostError("the connection was closed here")
        try:
            with _plain_errors():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._frames.send_forever)
                    nursery.start_soon(self._receive)
        except RpcError as exc:
            lost = exc
        finally:
            self._lost = lost
            for number in list(self._pending):
                self._finish(number, None)

    async def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(Result | Failure)
        while (received := await self._frames.receive(decoder)) is not None:
            if received[0].number not in self._pending:
                raise ProtocolError(f"the server answered call {received[0].number}, which nobody made")
            self._finish(received[0].number, received)
            del received
        raise ConnectionLostError("the server closed the connection")

    def _finish(self, number: int, answer: tuple[Result | Failure, list[Array]] | None) -> None:
        pending = self._pending.pop(number)
        pending.answer = answer
        pending.over.set()
        self._slots.release()

    async def call(self, method: Method, /, *args: Any, **kwargs: Any) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        value, arrays = encode(method.signature.bind(*args, **kwargs).arguments)
        number = next(self._numbers)
        frame = pack(Call(number, method.name, value), arrays, self._frames.accepted)
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            await self._slots.acquire()
        if self._lost is not None:
            self._slots.release()
            await trio.lowlevel.checkpoint()
            raise ConnectionLostError(f"{method.name}: {self._lost}") from self._lost
        pending = self._pending[number] = _Pending()
        self._frames.put(frame)
        try:
            await pending.over.wait()
        except BaseException:
            self._give_up(number, frame)
            raise
        return self._outcome(method, pending)

    def _give_up(self, number: int, frame: Frame) -> None:
        if number in self._pending:
            if self._frames.withdraw(frame):
                self._finish(number, None)
            else:
                self._frames.put(pack(Cancel(number), [], self._frames.accepted))

    def _outcome(self, method: Method, pending: _Pending) -> Any:
        if pending.answer is None:
            raise ConnectionLostError(f"{method.name}: {self._lost}") from self._lost
        message, arrays = pending.answer
        if isinstance(message, Result):
            try:
                return decode(message.value, method.result, arrays)
            except Exception as exc:
                raise BadResultError(f"the server's result of {method.name} is not what it should be: {exc}") from exc
        try:
            data = decode(message.data, Any, arrays)
        except Exception:
            data = None  # the error itself matters more
        raise RemoteError(message.kind, message.message, data)
