# SPDX-License-Identifier: Apache-2.0
"""The RPC example: its library in one process, against good and hostile peers, and the whole of it as processes.

One file for one example, though a long one: its parts, by subject, use the same service and the same peers.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from smc_stream_rig import TcpRig, leak_checked
from test_examples import run_dir, running  # noqa: F401

RPC = Path(__file__).parents[2] / "examples" / "rpc"
sys.path.insert(0, str(RPC))

import rpc  # noqa: E402
from service import Compute  # noqa: E402

LIMIT_S = 60


def bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Give an async test a time limit, so that what never comes fails instead of hanging."""

    @functools.wraps(test)
    async def limited(*args: Any, **kwargs: Any) -> None:
        with trio.fail_after(LIMIT_S):
            await test(*args, **kwargs)

    return limited


# -- a service that the test holds in its hands ---------------------------------------------------------------------


class Item(msgspec.Struct):
    name: str
    weights: NDArray[np.float64]
    tags: list[str] = []


class MoodError(rpc.ServiceError):
    pass


class WordlessError(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


class Desk:
    def __init__(self) -> None:
        self.started: dict[str, trio.Event] = {}
        self.gates: dict[str, trio.Event] = {}
        self.ended: dict[str, trio.Event] = {}
        self.cancelled: list[str] = []
        self.running = self.most = 0

    def expect(self, *names: str) -> None:
        for name in names:
            self.started[name], self.gates[name], self.ended[name] = trio.Event(), trio.Event(), trio.Event()

    async def hold(self, name: str, *, shielded: bool = False) -> str:
        """Wait until the test opens the gate of this name."""
        self.running += 1
        self.most = max(self.most, self.running)
        self.started[name].set()
        try:
            with trio.CancelScope(shield=shielded):
                await self.gates[name].wait()
        except trio.Cancelled:
            self.cancelled.append(name)
            raise
        finally:
            self.running -= 1
            self.ended[name].set()
        return name

    async def echo(self, text: str) -> str:
        return text

    async def change(self, item: Item, factor: float = 2.0, *, tag: str | None = None) -> Item:
        return Item(item.name, item.weights * factor, item.tags + ([tag] if tag else []))

    async def mirror(self, value: Any) -> Any:
        return value

    async def doubles(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        return array

    async def write(self, array: NDArray[np.uint8]) -> NDArray[np.uint8]:
        array[:] = 7
        return array

    async def zeros(self, count: int) -> NDArray[np.uint8]:
        return np.zeros(count, np.uint8)

    async def nothing(self) -> None:
        pass

    async def fail(self, how: str) -> str:
        match how:
            case "mood":
                raise MoodError("not today", {"until": 5, "array": np.arange(3)})
            case "value":
                raise ValueError("of no value")
            case "key":
                raise KeyError("k")
            case "wordless":
                raise WordlessError
            case "surrogate":
                raise OSError("no file \udcff")
            case "long":
                raise ValueError("\U0001f40d" * 100_000)
            case "data":
                raise MoodError("with data that cannot be sent", object())
            case "large data":
                raise MoodError("with too much data", "x" * (2 << 20))
            case "group":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.fail, "value")
            case "result":
                return object()  # type: ignore[return-value]
            case "large result":
                return "x" * (2 << 20)
        return how

    def not_async(self) -> None: ...

    async def _private(self) -> None: ...


@contextlib.asynccontextmanager
async def talking(
    desk: Desk, *, streams: Any = None, server: rpc.Limits | None = None, client: rpc.Limits | None = None
) -> AsyncIterator[Desk]:
    mine, theirs = streams or trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rpc.serve, theirs, desk, server)
        async with rpc.connect(mine, Desk, client) as proxy:
            yield proxy


def named(name: str) -> Callable[[type], type]:
    def rename(service: type) -> type:
        service.__name__ = name
        return service

    return rename


# -- calls ----------------------------------------------------------------------------------------------------------


@bounded
async def test_values_go_there_and_back_as_the_annotations_say() -> None:
    async with talking(Desk()) as desk:
        assert await desk.echo("ü") == "ü"
        assert await desk.nothing() is None
        item = Item("a", np.arange(3.0))
        for changed, factor, tags in (
            (await desk.change(item), 2, []),
            (await desk.change(item, 3), 3, []),
            (await desk.change(tag="t", item=item, factor=4), 4, ["t"]),
        ):
            assert type(changed) is Item
            assert (changed.name, changed.tags, changed.weights.tolist()) == ("a", tags, [0, factor, 2 * factor])
        assert await desk.mirror({"a": [1, None, b"x", np.float32(0.5)]}) == {"a": [1, None, b"x", 0.5]}


@bounded
async def test_answers_come_in_the_order_in_which_they_are_ready() -> None:
    served, order = Desk(), []
    served.expect("a", "b", "c")
    async with talking(served) as desk, trio.open_nursery() as nursery:

        async def call(name: str) -> None:
            order.append(await desk.hold(name))
            if len(order) < 3:
                served.gates["cba"[len(order)]].set()

        for name in "abc":
            nursery.start_soon(call, name)
        for name in "abc":
            await served.started[name].wait()
        assert await desk.echo("meanwhile") == "meanwhile"
        served.gates["c"].set()
    assert order == ["c", "b", "a"]


@bounded
async def test_more_calls_than_the_server_accepts_wait_for_their_turn() -> None:
    served, names = Desk(), [str(number) for number in range(7)]
    served.expect(*names)
    async with talking(served, server=rpc.Limits(calls=3)) as desk, trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(desk.hold, name)
        await trio.testing.wait_all_tasks_blocked()
        assert served.running == 3
        for gate in served.gates.values():
            gate.set()
    assert served.most == 3
    assert all(ended.is_set() for ended in served.ended.values())


@pytest.mark.parametrize("kind", ["lockstep", "tcp", "smc"])
@bounded
async def test_it_works_on_any_stream(kind: str) -> None:
    with contextlib.ExitStack() as stack:
        if kind == "lockstep":
            streams = trio.testing.lockstep_stream_pair()
        else:
            rig: Any = TcpRig() if kind == "tcp" else stack.enter_context(leak_checked())
            streams = await rig.fresh_pair()
        served = Desk()
        served.expect("x")
        large = np.random.default_rng(1).random((333, 1001))  # several times what the buffers of a stream hold
        async with talking(served, streams=streams) as desk:
            results = []

            async def mirror() -> None:
                results.append(await desk.mirror([large, "and", large[::2]]))

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(mirror)
                assert await desk.echo("small") == "small"
            assert len(results) == 5
            for first, word, second in results:
                assert word == "and"
                assert np.array_equal(first, large)
                assert np.array_equal(second, large[::2])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(desk.hold, "x")
                await served.started["x"].wait()
                nursery.cancel_scope.cancel()
            await served.ended["x"].wait()
            assert served.cancelled == ["x"]
            assert await desk.echo("end") == "end"  # nothing is unread any more, so closing is no reset


@bounded
async def test_an_error_of_the_block_comes_out_as_itself() -> None:
    async with trio.open_nursery() as nursery:
        mine, theirs = trio.testing.memory_stream_pair()
        nursery.start_soon(rpc.serve, theirs, Desk())
        with pytest.raises(ValueError, match="mine"):  # noqa: PT012
            async with rpc.connect(mine, Desk) as desk:
                await desk.nothing()
                raise ValueError("mine")
        mine, theirs = trio.testing.memory_stream_pair()
        nursery.start_soon(rpc.serve, theirs, Desk())
        with trio.CancelScope() as scope:
            async with rpc.connect(mine, Desk):
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught


class Naked:
    async def method(self, argument) -> None:  # type: ignore[no-untyped-def]
        ...


class Silent:
    async def method(self):  # type: ignore[no-untyped-def]
        ...


class Variadic:
    async def method(self, *arguments: int) -> None: ...


@pytest.mark.parametrize("service", [Naked, Silent, Variadic])
@bounded
async def test_a_class_without_full_annotations_is_no_service(service: type) -> None:
    with pytest.raises(TypeError, match="method"):
        async with rpc.connect(Peer(hello(service=service.__name__)), service):
            pass


# -- arrays ---------------------------------------------------------------------------------------------------------

ARRAYS = {
    "scalar": np.array(2.5),
    "empty": np.empty((0,)),
    "empty in a dimension": np.empty((3, 0, 2), np.int16),
    "bool": np.array([True, False]),
    "complex": np.array([1j, 2]),
    "half": np.arange(5, dtype=np.float16),
    "big-endian": np.arange(5, dtype=">i4"),
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "every second": np.arange(20)[::2],
    "backwards": np.arange(20)[::-1],
    "broadcast": np.broadcast_to(np.arange(3), (4, 3)),
    "read-only": np.frombuffer(b"abcdef", np.uint8),
    "32 dimensions": np.zeros((1,) * 32),
}


@pytest.mark.parametrize("name", ARRAYS)
@bounded
async def test_an_array_arrives_as_it_was(name: str) -> None:
    array = ARRAYS[name]
    async with talking(Desk()) as desk:
        back = await desk.mirror({"nested": [array, 1]})
        assert np.array_equal(back["nested"][0], array)
        assert (back["nested"][0].dtype, back["nested"][0].shape) == (array.dtype, array.shape)
        assert back["nested"][0].flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.array([object()]),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.zeros(2, "datetime64[s]"),
        np.zeros(2, [("a", "i4")]),
        np.zeros(2, np.longdouble),
        np.ma.masked_array([1, 2], [True, False]),
    ],
    ids=lambda array: f"{type(array).__name__} {array.dtype}",
)
@bounded
async def test_an_array_that_does_not_travel_is_refused_at_home(array: Any) -> None:
    async with talking(Desk()) as desk:
        with pytest.raises(TypeError, match="cannot send"):
            await desk.mirror(array)
        assert await desk.echo("still here") == "still here"


class Watched(trio.abc.Stream):
    """A stream with `receive_some_into`, which remembers the memory that was sent from and received into."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.sent: list[tuple[int, int]] = []
        self.into: list[tuple[int, int]] = []
        self.gate: trio.Event | None = None

    async def send_all(self, data: Any) -> None:
        if self.gate is not None:
            await self.gate.wait()
        self.sent.append(span(data))
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self._stream.receive_some(max_bytes)

    async def receive_some_into(self, buffer: memoryview) -> int:
        data = await self._stream.receive_some(min(len(buffer), 10_000))
        buffer[: len(data)] = data
        self.into.append((span(buffer)[0], len(data)))
        return len(data)

    async def aclose(self) -> None:
        await self._stream.aclose()


def span(buffer: Any) -> tuple[int, int]:
    view = np.frombuffer(buffer, np.uint8)
    return view.ctypes.data, view.size


@bounded
async def test_array_bytes_are_sent_from_the_array_and_received_into_the_array() -> None:
    mine, theirs = trio.testing.memory_stream_pair()
    watched = Watched(mine)
    array = np.random.default_rng(2).random(50_000)
    async with talking(Desk(), streams=(watched, theirs)) as desk:
        back = await desk.doubles(array)
    assert np.array_equal(back, array)
    assert (array.ctypes.data, array.nbytes) in watched.sent
    assert sum(length for _, length in watched.into) >= array.nbytes - 4096
    begin, end = back.ctypes.data, back.ctypes.data + back.nbytes
    assert all(begin <= at and at + length <= end for at, length in watched.into)


@bounded
async def test_what_a_handler_does_to_an_array_stays_there() -> None:
    array = np.zeros(5, np.uint8)
    async with talking(Desk()) as desk:
        assert (await desk.write(array)).tolist() == [7] * 5
    assert array.tolist() == [0] * 5


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("mood", "MoodError", "not today"),
        ("value", "ValueError", "of no value"),
        ("group", "ValueError", "of no value"),
        ("key", "KeyError", "'k'"),
        ("wordless", "WordlessError", "an exception without words"),
        ("surrogate", "OSError", "no file ?"),
        ("long", "ValueError", "\U0001f40d" * 1000),
        ("data", "MoodError", "with data that cannot be sent"),
        ("large data", "MoodError", "with too much data"),
        ("result", "TypeError", "cannot send a object"),
        ("large result", "TooLargeError", None),
    ],
)
@bounded
async def test_what_a_handler_raises_reaches_the_caller_and_ends_nothing_else(
    how: str, kind: str, message: str | None
) -> None:
    async with talking(Desk()) as desk:
        with pytest.raises(rpc.RemoteError) as caught:
            await desk.fail(how)
        assert caught.value.type == kind
        assert message in (None, caught.value.message)
        if how == "mood":
            assert caught.value.data.pop("array").tolist() == [0, 1, 2]
        assert caught.value.data == ({"until": 5} if how == "mood" else None)
        assert await desk.echo("still here") == "still here"


@bounded
async def test_arguments_are_checked_at_the_server() -> None:
    async with talking(Desk()) as desk:
        for call, words in (
            (functools.partial(desk.echo, 5), "Expected `str`, got `int`"),
            (functools.partial(desk.doubles, [1.0]), "Expected `numpy.ndarray`, got `list`"),
            (functools.partial(desk.doubles, np.arange(3)), "Expected array of `float64`, got `int64`"),
            (functools.partial(desk.change, Item("a", np.arange(3))), "weights"),
            (functools.partial(desk.change, {"name": "a"}), "missing required field `weights`"),
        ):
            with pytest.raises(rpc.RemoteError, match=words) as caught:
                await call()
            assert caught.value.type == "BadArgumentsError"
        with pytest.raises(TypeError, match="missing a required argument: 'text'"):
            await desk.echo(txt="local")  # type: ignore[call-arg]
        assert await desk.echo("still here") == "still here"


@named("Desk")
class LaterDesk:
    async def added(self) -> None: ...

    async def _private(self) -> None: ...

    async def echo(self, text: str, *, language: str = "") -> int: ...  # type: ignore[empty-body]


@bounded
async def test_a_service_of_another_version_gives_clear_errors() -> None:
    mine, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rpc.serve, theirs, Desk())
        async with rpc.connect(mine, LaterDesk) as desk:
            with pytest.raises(rpc.RemoteError, match="Desk has no method 'added'") as caught:
                await desk.added()
            assert caught.value.type == "UnknownMethodError"
            with pytest.raises(rpc.RemoteError, match="unknown field `language`") as caught:
                await desk.echo("hallo", language="de")
            assert caught.value.type == "BadArgumentsError"
            with pytest.raises(rpc.BadResultError, match="Expected `int`, got `str`"):
                await desk.echo("hallo")
            assert not hasattr(desk, "_private")


@pytest.mark.parametrize("method", ["_private", "not_async", "__init__", "expect", "", "echo\0", "x" * 1000])
@bounded
async def test_only_public_async_methods_can_be_called(method: str) -> None:
    answers = await hostile_client(hello(), frame(["call", 1, method, {}]), frame(["call", 2, "echo", {"text": "x"}]))
    assert [answer[:3] for answer in answers[1:]] == [["failure", 1, "UnknownMethodError"], ["result", 2, "x"]]


# -- limits ---------------------------------------------------------------------------------------------------------


@bounded
async def test_what_the_other_side_does_not_accept_is_not_sent() -> None:
    small = rpc.Limits(header_bytes=20_000, array_bytes=1000, arrays=2)
    async with talking(Desk(), server=small) as desk:
        for call, words in (
            (functools.partial(desk.echo, "x" * 20_000), "the peer accepts 20000"),
            (functools.partial(desk.doubles, np.zeros(126)), "the peer accepts 1000"),
            (functools.partial(desk.mirror, [np.zeros(63), np.zeros(63)]), "the peer accepts 1000"),
            (functools.partial(desk.mirror, [np.zeros(1)] * 3), "the peer accepts 2"),
        ):
            with pytest.raises(rpc.TooLargeError, match=words):
                await call()
        assert (await desk.doubles(np.zeros(125))).shape == (125,)
        assert (await desk.zeros(2000)).shape == (2000,)
    async with talking(Desk(), client=small) as desk:
        with pytest.raises(rpc.RemoteError, match="the peer accepts 1000") as caught:
            await desk.zeros(1001)
        assert caught.value.type == "TooLargeError"
        assert (await desk.zeros(1000)).shape == (1000,)


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ([["<f8", [2**40], 2**43]], "a shape larger"),
        ([["<f8", [2**63, 0], 0]], "a shape larger"),
        ([["<f8", [2**64 - 1] * 32, 8]], "a shape larger"),
        ([["<f8", [126], 1008]], "a shape larger"),
        ([["<f8", [100], 800], ["<f8", [100], 800]], "arrays larger"),
        ([["<f8", [2], 8]], "disagree"),
        ([["<f8", [], 0]], "disagree"),
        ([["|O", [1], 8]], "dtype"),
        ([["O", [1], 8]], "dtype"),
        ([["<f8,O", [1], 16]], "dtype"),
        ([["<V8", [1], 8]], "dtype"),
        ([["x" * 5000, [1], 8]], "dtype"),
        ([["<f8", [1] * 33, 8]], "none"),
        ([["<f8", [-1], 8]], "none"),
        ([["<f8", [1.0], 8]], "none"),
        ([["<f8", [1], -8]], "none"),
        ([["<f8", 1, 8]], "none"),
        ([["|u1", [1], 1]] * 3, "3 arrays"),
    ],
)
@bounded
async def test_an_absurd_array_is_refused_before_memory_is_taken_for_it(
    heads: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = frame(["call", 1, "mirror", {"value": msgspec.msgpack.Ext(1, bytes(4))}, heads])
    monkeypatch.setattr(np, "empty", lambda *_: pytest.fail("allocated"))
    with pytest.raises(rpc.ProtocolError, match=words):
        await hostile_client(hello(), call, limits=rpc.Limits(array_bytes=1000, arrays=2))


@pytest.mark.parametrize("length", [1_000_001, 2**31, 2**32 - 1])
@bounded
async def test_a_message_longer_than_the_limit_is_refused_at_its_length(length: int) -> None:
    with pytest.raises(rpc.ProtocolError, match=f"{length} bytes"):
        await hostile_client(hello(), struct.pack("<I", length), limits=rpc.Limits(header_bytes=1_000_000))


@bounded
async def test_a_client_that_exceeds_its_calls_is_refused() -> None:
    served = Desk()
    served.expect("a", "b", "c")
    calls = (frame(["call", number, "hold", {"name": name}]) for number, name in enumerate("abc"))
    with pytest.raises(rpc.ProtocolError, match="more than 2 calls in flight"):
        await hostile_client(hello(), *calls, desk=served, limits=rpc.Limits(calls=2))
    assert served.running == 0


@bounded
async def test_a_client_that_does_not_read_answers_cannot_make_the_server_keep_them() -> None:
    mine, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:

        async def flood() -> None:
            await mine.send_all(hello())
            await mine.receive_some()
            with contextlib.suppress(trio.BrokenResourceError):
                for number in range(1000):
                    await mine.send_all(frame(["call", number, "echo", {"text": "x"}]))
                    await trio.testing.wait_all_tasks_blocked()

        nursery.start_soon(flood)
        with pytest.raises(rpc.ProtocolError, match="more than 5 calls in flight"):
            await rpc.serve(theirs, Desk(), rpc.Limits(calls=5))


@bounded
async def test_a_number_in_use_is_refused() -> None:
    served = Desk()
    served.expect("a", "b")
    with pytest.raises(rpc.ProtocolError, match="number 1 for two calls"):
        await hostile_client(hello(), *(frame(["call", 1, "hold", {"name": name}]) for name in "ab"), desk=served)


# -- cancellation ---------------------------------------------------------------------------------------------------


@bounded
async def test_cancelling_a_call_cancels_its_handler_and_no_other() -> None:
    served = Desk()
    served.expect("a", "b")
    async with talking(served) as desk, trio.open_nursery() as others:
        others.start_soon(desk.hold, "b")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(desk.hold, "a")
            await served.started["a"].wait()
            nursery.cancel_scope.cancel()
        await served.ended["a"].wait()
        assert served.cancelled == ["a"]
        await served.started["b"].wait()
        served.gates["b"].set()
    assert served.cancelled == ["a"]


@bounded
async def test_a_handler_that_goes_on_after_its_cancellation_keeps_its_place_until_it_ends() -> None:
    served = Desk()
    served.expect("a")
    async with talking(served, server=rpc.Limits(calls=1)) as desk:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(desk.hold, "a", shielded=True))
            await served.started["a"].wait()
            nursery.cancel_scope.cancel()
        answers = []

        async def echo() -> None:
            answers.append(await desk.echo("next"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            await trio.testing.wait_all_tasks_blocked()
            assert answers == []
            served.gates["a"].set()
        assert answers == ["next"]


@bounded
async def test_a_call_cancelled_before_it_is_sent_is_never_made() -> None:
    mine, theirs = trio.testing.memory_stream_pair()
    served, watched = Desk(), Watched(mine)
    async with talking(served, streams=(watched, theirs), server=rpc.Limits(calls=2)) as desk:
        for _ in range(3):
            with trio.CancelScope() as scope:
                scope.cancel()
                await desk.hold("never expected")
            assert scope.cancelled_caught
        watched.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(desk.echo, "under way")
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                async with trio.open_nursery() as cancelled:
                    cancelled.start_soon(desk.hold, "never expected")
                    await trio.testing.wait_all_tasks_blocked()
                    cancelled.cancel_scope.cancel()
            watched.gate.set()
        assert await desk.echo("x") == "x"
    assert served.most == 0


@bounded
async def test_a_call_can_be_cancelled_while_the_peer_does_not_read() -> None:
    mine, theirs = trio.testing.memory_stream_pair()
    watched = Watched(mine)
    async with talking(Desk(), streams=(watched, theirs)) as desk:
        async with trio.open_nursery() as nursery:
            watched.gate = trio.Event()
            nursery.start_soon(desk.doubles, np.zeros(1000))
            nursery.start_soon(desk.doubles, np.zeros(1000))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        watched.gate.set()
        assert await desk.echo("in step") == "in step"


# -- the end of the connection --------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [True, False])
@bounded
async def test_when_the_server_is_gone_every_call_fails_at_once(clean: bool) -> None:
    served, names = Desk(), [str(number) for number in range(6)]
    served.expect(*names)
    mine, theirs = trio.testing.memory_stream_pair()
    failed, server = [], trio.CancelScope()

    async def serve() -> None:
        with server, contextlib.suppress(rpc.RpcError):
            await rpc.serve(theirs, served, rpc.Limits(calls=3))

    async def call(name: str) -> None:
        with pytest.raises(rpc.ConnectionLostError, match="hold: "):
            await desk.hold(name)
        failed.append(name)

    async with trio.open_nursery() as outer:
        outer.start_soon(serve)
        async with rpc.connect(mine, Desk) as desk:
            async with trio.open_nursery() as nursery:
                for name in names:
                    nursery.start_soon(call, name)
                await trio.testing.wait_all_tasks_blocked()
                if clean:
                    server.cancel()
                else:
                    await theirs.send_all(b"\x05\x00")
                    await theirs.aclose()
            assert sorted(failed) == names
            with pytest.raises(rpc.ConnectionLostError, match="echo: "):
                await desk.echo("later")
    assert served.running == 0


@bounded
async def test_when_the_client_is_gone_its_handlers_are_cancelled() -> None:
    served = Desk()
    served.expect("a")
    async with trio.open_nursery() as nursery:
        mine, theirs = trio.testing.memory_stream_pair()
        nursery.start_soon(rpc.serve, theirs, served)
        async with rpc.connect(mine, Desk) as desk:
            nursery.start_soon(expect_loss, desk.hold, "a")
            await served.started["a"].wait()
        await served.ended["a"].wait()
        with pytest.raises(rpc.ConnectionLostError, match="closed here"):
            await desk.echo("x")
    assert served.cancelled == ["a"]


async def expect_loss(call: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
    with pytest.raises(rpc.ConnectionLostError, match="closed here"):
        await call(*arguments)


@bounded
async def test_a_handler_that_fails_while_its_connection_ends_does_not_hurt_the_server() -> None:
    mine, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rpc.serve, theirs, Sulking())
        async with rpc.connect(mine, Sulking) as sulking:
            with trio.move_on_after(0):
                await sulking.wait()
            nursery.start_soon(expect_loss, sulking.wait)
            await trio.testing.wait_all_tasks_blocked()


class Sulking:
    async def wait(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while it ends")


CALL = ["call", 1, "doubles", {"array": msgspec.msgpack.Ext(1, bytes(4))}, [["<f8", [4], 32]]]


@pytest.mark.parametrize("cut", range(len(msgspec.msgpack.encode(CALL)) + 4 + 32))
@bounded
async def test_a_stream_that_ends_within_a_call_is_a_lost_connection(cut: int) -> None:
    data = frame(CALL, bytes(32))[:cut]
    if cut:
        with pytest.raises(rpc.ConnectionLostError, match="in the middle of"):
            await hostile_client(hello() + data)
    else:
        assert len(await hostile_client(hello() + data)) == 1


# -- hello ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("greeting", "error", "words"),
    [
        ({"version": 2}, rpc.ProtocolError, "the peer speaks version 2, this side 1"),
        ({"service": "Other"}, rpc.ProtocolError, "of service 'Other', this side of 'Desk'"),
        ({"limits": {"header_bytes": 10}}, rpc.ProtocolError, "Expected `int` >= 16384"),
        ({"limits": {"calls": 0}}, rpc.ProtocolError, "Expected `int` >= 1"),
        ({"type": "ftp"}, rpc.ProtocolError, "Invalid value 'ftp'"),
        (b"GET / HTTP/1.1\r\n\r\n", rpc.ProtocolError, "a message of 542393671 bytes"),
        (b"", rpc.ConnectionLostError, "before it said hello"),
        (b"\x10\x00", rpc.ConnectionLostError, "in the middle of a message"),
    ],
)
@bounded
async def test_both_sides_refuse_a_strange_hello(greeting: Any, error: type[Exception], words: str) -> None:
    data = greeting if isinstance(greeting, bytes) else hello(**greeting)
    with pytest.raises(error, match=words):
        await hostile_client(data)
    with pytest.raises(error, match=words):
        await hostile_server(data)


@bounded
async def test_a_later_version_may_say_more_in_its_hello() -> None:
    assert len(await hostile_client(hello(compression="zstd"))) == 1


async def test_a_peer_that_says_nothing_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    mine, theirs = trio.testing.memory_stream_pair()
    with pytest.raises(rpc.ProtocolError, match="no hello within 5 s"):
        await rpc.serve(theirs, Desk(), hello_s=5)
    mine, theirs = trio.testing.memory_stream_pair()
    with pytest.raises(rpc.ProtocolError, match=r"no hello within 60.0 s"):
        async with rpc.connect(mine, Desk):
            pass


# -- hostile peers --------------------------------------------------------------------------------------------------


def frame(message: object, payload: bytes = b"") -> bytes:
    header = msgspec.msgpack.encode(message)
    return struct.pack("<I", len(header)) + header + payload


def hello(**changes: Any) -> bytes:
    return frame({"type": "ism-rpc", "version": 1, "service": "Desk", "limits": {}} | changes)


class Peer(trio.abc.Stream):
    """A peer that says one piece after the other, each when all is quiet, and then its end; keeps what it hears."""

    def __init__(self, *says: bytes) -> None:
        self.says, self.heard = [*says, b""], bytearray()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self.says[0] and len(self.says) > 1:
            await trio.testing.wait_all_tasks_blocked()
            del self.says[0]
        part, self.says[0] = self.says[0][:max_bytes], self.says[0][max_bytes:]
        return part

    async def send_all(self, data: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.heard += data

    async def wait_send_all_might_not_block(self) -> None: ...

    async def aclose(self) -> None: ...


async def hostile_client(*says: bytes, desk: Desk | None = None, limits: rpc.Limits | None = None) -> list[Any]:
    """Let a client say these pieces to a server; return the server's messages. Arrays are not expected in them."""
    peer = Peer(*says)
    await rpc.serve(peer, desk or Desk(), limits)
    messages = []
    while peer.heard:
        (length,) = struct.unpack_from("<I", peer.heard)
        messages.append(msgspec.msgpack.decode(peer.heard[4 : 4 + length]))
        del peer.heard[: 4 + length]
    return messages


async def hostile_server(*says: bytes, limits: rpc.Limits | None = None) -> dict[str, Any]:
    """Let a server say these pieces to a client, which makes three calls after the first; return how each ended."""
    ends: dict[str, Any] = {}

    async def call(name: str, argument: Any) -> None:
        try:
            ends[name] = await getattr(desk, name)(argument)
        except rpc.RpcError as exc:
            ends[name] = exc

    async with rpc.connect(Peer(*says), Desk, limits) as desk, trio.open_nursery() as nursery:
        nursery.start_soon(call, "echo", "x")
        nursery.start_soon(call, "doubles", np.zeros(2))
        nursery.start_soon(call, "mirror", 1)
    return ends


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.builds(msgspec.msgpack.Ext, st.integers(0, 127), st.binary(max_size=8))
)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)
NUMBERS, HEADS_OF = st.integers(0, 3), {"<f8": 8, "|u1": 1, ">i2": 2}
REFERENCES = st.integers(0, 2).map(lambda number: msgspec.msgpack.Ext(1, struct.pack("<I", number)))
VALUES = REFERENCES | ANYTHING
SOUND_HEADS = st.lists(
    st.builds(
        lambda dtype, shape: (dtype, shape, HEADS_OF[dtype] * math.prod(shape)),
        st.sampled_from(sorted(HEADS_OF)),
        st.lists(st.integers(0, 4), max_size=2),
    ),
    max_size=2,
)
STRANGE_HEADS = st.lists(
    st.tuples(
        st.sampled_from(["<f8", "|u1", "O", "<M8[s]"]) | ANYTHING,
        st.lists(st.integers(0, 5) | st.sampled_from([2**31, 2**62, 2**64 - 1]), max_size=4) | ANYTHING,
        st.sampled_from([0, 8, 2**63]) | ANYTHING,
    )
    | ANYTHING,
    max_size=3,
)
NAMES = st.sampled_from(["text", "array", "value", "how", "count"])
ARGUMENTS = st.dictionaries(NAMES, VALUES, max_size=2)
SOUND_CLIENT = (
    st.tuples(st.just("call"), NUMBERS, st.just("echo"), st.fixed_dictionaries({"text": st.text()}))
    | st.tuples(st.just("call"), NUMBERS, st.just("mirror"), st.fixed_dictionaries({"value": VALUES}), SOUND_HEADS)
    | st.tuples(st.just("call"), NUMBERS, st.just("doubles"), st.fixed_dictionaries({"array": VALUES}), SOUND_HEADS)
    | st.tuples(st.just("cancel"), NUMBERS)
)
STRANGE_CLIENT = (
    st.tuples(st.just("call"), NUMBERS | ANYTHING, st.sampled_from(["fail", "hold"]) | ANYTHING, ARGUMENTS, SOUND_HEADS)
    | st.tuples(st.just("call"), NUMBERS, st.just("mirror"), ARGUMENTS | ANYTHING, STRANGE_HEADS)
    | st.tuples(st.just("cancel"), ANYTHING)
    | ANYTHING
)
SOUND_SERVER = st.tuples(st.just("result"), NUMBERS, st.text() | VALUES, SOUND_HEADS) | st.tuples(
    st.just("failure"), NUMBERS, st.text(), st.text(), VALUES, SOUND_HEADS
)
STRANGE_SERVER = (
    st.tuples(st.just("result"), NUMBERS | ANYTHING, VALUES, STRANGE_HEADS)
    | st.tuples(st.just("failure"), NUMBERS, st.text() | ANYTHING, st.text(), VALUES, STRANGE_HEADS)
    | ANYTHING
)


def whole(message: Any, others: bytes) -> bytes:
    """A frame, with the bytes of the arrays that the message lists, or others when it lists none that make sense."""
    try:
        size = sum(head[2] for head in message[-1])
        return frame(message, bytes(size) if 0 < size < 1000 else others * (size != 0))
    except (LookupError, TypeError, OverflowError):
        return frame(message)


def damaged(data: bytes, at: int, byte: int, cut: int) -> bytes:
    changed = bytearray(data + b"\0")
    changed[at % len(changed)] = byte
    return bytes(changed[: len(changed) - cut % len(changed)])


def one_of(*choices: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Each with the same weight, however many choices it has itself."""
    return st.sampled_from(choices).flatmap(lambda choice: choice)


def conversations(
    sound: st.SearchStrategy[Any], strange: st.SearchStrategy[Any]
) -> st.SearchStrategy[tuple[bytes, ...]]:
    """Hello, then pieces of frames of such messages; perhaps damaged, perhaps something else."""
    messages = one_of(sound, sound, sound, strange)
    frames = st.lists(st.builds(whole, messages, st.binary(max_size=60)), max_size=5)
    offsets = st.integers(0, 1000)
    hurt = st.builds(damaged, frames.map(b"".join), offsets, st.integers(0, 255), offsets)
    start = st.builds(damaged, st.just(hello()), offsets, st.integers(0, 255), offsets)
    return one_of(
        frames.map(lambda pieces: (hello(), *pieces)),
        frames.map(lambda pieces: (hello(), b"".join(pieces))),
        hurt.map(lambda piece: (hello(), piece)),
        st.tuples(start, hurt),
        st.tuples(st.binary(max_size=200)),
    )


HOSTILE = settings(max_examples=300, deadline=None)


@HOSTILE
@given(conversations(SOUND_CLIENT, STRANGE_CLIENT))
def test_whatever_a_client_sends_the_server_ends_cleanly(says: tuple[bytes, ...]) -> None:
    async def run() -> None:
        with trio.fail_after(LIMIT_S), contextlib.suppress(rpc.RpcError):
            await rpc.serve(Peer(*says), Desk(), rpc.Limits(array_bytes=1000, calls=3))

    trio.run(run)


ANSWERS_THEN_GARBAGE = (hello(), b"".join(frame(["result", number, "", []]) for number in range(3)) + frame(None))


@HOSTILE
@example(ANSWERS_THEN_GARBAGE)  # the block ends and the connection breaks at the same moment
@given(conversations(SOUND_SERVER, STRANGE_SERVER))
def test_whatever_a_server_sends_each_call_ends_with_a_value_of_its_type_or_an_error(says: tuple[bytes, ...]) -> None:
    async def run() -> None:
        with trio.fail_after(LIMIT_S), contextlib.suppress(rpc.RpcError):
            ends = await hostile_server(*says, limits=rpc.Limits(array_bytes=1000))
            assert sorted(ends) == ["doubles", "echo", "mirror"]
            assert isinstance(ends["echo"], str | rpc.RpcError)
            assert isinstance(ends["doubles"], rpc.RpcError) or ends["doubles"].dtype == np.float64

    trio.run(run)


def call_with(value: bytes) -> bytes:
    """A call whose argument is these bytes."""
    header = b"\x94" + msgspec.msgpack.encode(["call", 1, "mirror"])[1:] + b"\x81\xa5value" + value
    return struct.pack("<I", len(header)) + header


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\0",
        hello(),
        frame(["result", 1, "x"]),
        frame(["call", -1, "mirror", {}]),
        frame(["call", 1, "mirror"]),
        frame(["call", 1, b"mirror", {}]),
        struct.pack("<I", 60_000) + b"\x91" * 60_000,
        struct.pack("<I", 5) + b"\xdd\xff\xff\xff\xff",
        call_with(b"\x91" * 60_000),
        call_with(b"\xdd\xff\xff\xff\xff"),
        call_with(b"\xc1"),
        call_with(b"x more"),
    ],
    ids=range(12),
)
@bounded
async def test_a_message_that_is_none_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(rpc.ProtocolError):
        await hostile_client(hello() + data)


@pytest.mark.parametrize(
    "value",
    [b"\xa1\xff", b"\xd7\xff" + b"\xff" * 8, b"\xd4\x02\0", b"\xd4\x01\0", b"\xd6\x01\0\0\0\0"],
    ids=["bad UTF-8", "bad timestamp", "strange extension", "short extension", "array that is none"],
)
@bounded
async def test_an_argument_that_is_none_ends_only_its_call(value: bytes) -> None:
    _, answer = await hostile_client(hello() + call_with(value))
    assert answer[:3] == ["failure", 1, "BadArgumentsError"]


# -- the example as processes ---------------------------------------------------------------------------------------


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISM_SMC", "require")  # over TCP, a killed peer may look like one that has closed


@contextlib.contextmanager
def server(run_dir: Path) -> Any:  # noqa: F811
    with running(str(RPC / "server.py"), "0", run_dir=run_dir) as process:
        words = process.stdout.readline().split()
        assert words[:-1] == ["listening", "on", "port"], process.stderr.read()
        yield process, words[-1]


CLIENT = f"""
import os, sys
sys.path.insert(0, {str(RPC)!r})
import rpc, trio, ism.smc
from service import Compute

async def main():
    stream = await ism.smc.open_tcp_stream("127.0.0.1", int(sys.argv[1]))
    async with rpc.connect(stream, Compute) as compute, trio.open_nursery() as nursery:
        nursery.start_soon(wait, compute)
        await trio.testing.wait_all_tasks_blocked()
        await compute.echo("the wait was sent before this")
        print("waiting", flush=True)

async def wait(compute):
    try:
        await compute.wait(3600)
    except rpc.ConnectionLostError as exc:
        print("lost:", exc, flush=True)

import trio.testing
trio.run(main)
"""


@pytest.mark.processes
@pytest.mark.usefixtures("shared_memory")
def test_the_example_runs_as_its_first_lines_say(run_dir: Path) -> None:  # noqa: F811
    with server(run_dir) as (process, port):
        for number in (1, 2):
            with running(str(RPC / "client.py"), port, "--quick", run_dir=run_dir) as client:
                output, errors = client.communicate(timeout=LIMIT_S)
                assert (errors, client.returncode) == ("", 0)
            said = [line.partition(":")[0] for line in output.splitlines()]
            assert [each for each in said if each != "connection"] == (
                ["summary", "product", "error", "error", "at once", "cancelled", "round trip", "throughput"]
            )
            assert "200 calls answered" in output
            assert "the server saw 1" in output
            assert process.stdout.readline() == f"client {number}: done\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=LIMIT_S)
        assert (output, errors, process.returncode) == ("", "", 0)


@pytest.mark.processes
@pytest.mark.usefixtures("shared_memory")
def test_the_server_survives_a_client_that_is_killed_within_a_call(run_dir: Path) -> None:  # noqa: F811
    with server(run_dir) as (process, port):
        with running("-c", CLIENT, port, run_dir=run_dir) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "waiting\n"
            client.kill()
        assert process.stdout.readline().startswith("client 1: the connection is lost: ")
        with running(str(RPC / "client.py"), port, "--quick", run_dir=run_dir) as client:
            _, errors = client.communicate(timeout=LIMIT_S)
            assert (errors, client.returncode) == ("", 0)
        assert process.stdout.readline() == "client 2: done\n"


@pytest.mark.processes
@pytest.mark.usefixtures("shared_memory")
def test_a_client_whose_server_is_killed_is_told(run_dir: Path) -> None:  # noqa: F811
    with server(run_dir) as (process, port), running("-c", CLIENT, port, run_dir=run_dir) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "waiting\n"
        process.kill()
        output, errors = client.communicate(timeout=LIMIT_S)
        assert output.startswith("lost: wait: the connection is lost: ")
        assert (errors, client.returncode) == ("", 0)


@pytest.mark.processes
def test_a_client_without_a_server_says_so_in_one_line(run_dir: Path) -> None:  # noqa: F811
    with running(str(RPC / "client.py"), "1", run_dir=run_dir) as client:
        output, errors = client.communicate(timeout=LIMIT_S)
        assert (output, client.returncode) == ("", 1)
        assert errors.startswith("client: ")
        assert errors.count("\n") == 1


def test_the_services_of_the_example_are_typed() -> None:
    from interface import methods

    assert sorted(methods(Compute)) == ["cancelled_waits", "echo", "mirror", "multiply", "summarize", "wait"]


def test_a_file_of_the_example_is_at_most_300_lines() -> None:
    for path in RPC.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path.name
