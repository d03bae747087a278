# SPDX-License-Identifier: Apache-2.0
"""The talk between `ism perf`'s two ends: what is said comes out as it went in, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ism.errors import LocalProtocolError, RemoteProtocolError
from ism.perf import parameters as limits
from ism.perf import protocol
from ism.perf.parameters import APIS, TRANSPORTS, Parameters, parse_size
from ism.perf.protocol import (
    CLIENT,
    SERVER,
    Ask,
    Busy,
    Conversation,
    Count,
    Failed,
    Go,
    Listen,
    Ready,
    Result,
    Stop,
    Way,
    decode,
    encode,
)

COOKIE = "0123456789abcdef" * 2
TEXT = st.text(st.characters(categories=("L", "N", "P")), max_size=40)
WAYS = st.builds(
    Way, TEXT, TEXT, st.integers(0, 2**32 - 1), st.integers(0, 1 << 40), st.integers(0, 1 << 40)
)  # fmt: skip
SECONDS = st.floats(0, 1e9)
MESSAGES = st.one_of(
    st.builds(
        lambda api, streams, length: Ask(Parameters(api=api, streams=streams, length=length), program="x"),
        st.sampled_from(APIS), st.integers(1, 64), st.integers(1, 1 << 20),
    ),
    st.builds(Listen, st.integers(0, 65535), st.just(COOKIE), TEXT, TEXT),
    st.just(Busy()),
    st.builds(Failed, TEXT),
    st.builds(lambda ways: Ready(tuple(ways)), st.lists(WAYS, max_size=5)),
    st.just(Go()),
    st.just(Stop()),
    st.builds(
        lambda flows, user_s, system_s: Result(tuple(flows), user_s, system_s),
        st.lists(st.builds(Count, st.integers(0, 1 << 61), SECONDS), max_size=5), SECONDS, SECONDS,
    ),
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(MESSAGES)
def test_every_message_survives_the_way(message: protocol.Message) -> None:
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line[:-1]) == message


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_refused(line: bytes) -> None:
    try:
        decode(line)
    except RemoteProtocolError as exc:
        refusal = str(exc)
    else:
        refusal = ""
    assert refusal == "" or refusal.isprintable()


@given(MESSAGES, st.data())
def test_a_message_with_one_value_exchanged_is_valid_or_refused(message: protocol.Message, data: Any) -> None:
    values = json.loads(encode(message))
    target = values
    while True:
        key = data.draw(st.sampled_from(sorted(target)))
        inner = target[key]
        if isinstance(inner, list) and inner:
            inner = inner[0]
        if isinstance(inner, dict) and data.draw(st.booleans()):
            target = inner
            continue
        break
    target[key] = data.draw(JSON)
    try:
        found = decode(json.dumps(values).encode())
    except RemoteProtocolError:
        return
    if isinstance(found, Ask):
        assert found.parameters.length * len(found.parameters.flows()) <= limits.MAX_MEMORY
    assert decode(encode(found)[:-1]) == found


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"{}",
        b'{"say": "nothing"}',
        b'{"say": "go"',
        b"[" * 100_000,
        b'{"say": "result", "flows": [], "user_s": NaN, "system_s": 0}',
        b'{"say": "result", "flows": [], "user_s": 1e999, "system_s": 0}',
        b'{"say": "result", "flows": [], "user_s": true, "system_s": 0}',
        b'{"say": "result", "flows": [{"bytes": -1, "seconds": 0}], "user_s": 0, "system_s": 0}',
        b'{"say": "listen", "port": 70000, "cookie": "' + COOKIE.encode() + b'", "program": "", "host": ""}',
        b'{"say": "listen", "port": 1, "cookie": "../../etc", "program": "", "host": ""}',
        b'{"say": "ready", "ways": {"0": {}}}',
        b'{"say": "ask", "version": 99, "program": "", "parameters": {}}',
        b"9" * 10_000,
        b" " * (protocol.MAX_LINE + 1),
    ],
)
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(line)


def test_text_of_the_other_end_cannot_move_the_cursor_of_a_terminal() -> None:
    found = decode(encode(Failed("\x1b[2Jbad\r\nnews" + "x" * 1000))[:-1])
    assert isinstance(found, Failed)
    assert found.reason.isprintable()
    assert len(found.reason) <= 300
    assert "bad" in found.reason


def test_a_conversation_goes_from_beginning_to_end() -> None:
    client, server = Conversation(client=True), Conversation(client=False)
    ask, listen = Ask(Parameters()), Listen(1, COOKIE)
    result = Result((Count(1, 1.0),), 0.0, 0.0)
    for message in (ask, listen, Ready((Way("TCP"),)), Go(), Stop(), result):
        speaker, hearer = (client, server) if isinstance(message, Ask | Go | Stop) else (server, client)
        hearer.feed(speaker.send(message))
        assert hearer.next() == message
        assert hearer.next() is None
    assert client.state == server.state == "over"


def test_a_stop_may_cross_the_result() -> None:
    server = Conversation(client=False)
    server.state = "running"
    server.send(Result((), 0.0, 0.0))
    server.feed(encode(Stop()))
    assert server.next() == Stop()


KINDS = {
    Ask: Ask(Parameters()), Listen: Listen(1, COOKIE), Busy: Busy(), Failed: Failed(""), Ready: Ready(()), Go: Go(),
    Stop: Stop(), Result: Result((), 0.0, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("client", [True, False])
@pytest.mark.parametrize("state", CLIENT)
@pytest.mark.parametrize("kind", KINDS)
def test_every_message_is_taken_in_the_states_of_the_table_and_in_no_other(
    client: bool, state: str, kind: type
) -> None:
    table, theirs = (CLIENT if client else SERVER), (Listen, Busy, Ready, Result) if client else (Ask, Go, Stop)
    end = Conversation(client=client)
    end.state = state
    end.feed(encode(KINDS[kind]))
    if kind is Failed or (kind in theirs and kind in table[state]):
        assert end.next() == KINDS[kind]
        assert end.state == table[state].get(kind, "over")
        return
    with pytest.raises(RemoteProtocolError):
        end.next()
    end.state = state
    if kind not in table[state]:
        with pytest.raises(LocalProtocolError):
            end.send(KINDS[kind])


def test_a_line_without_an_end_is_not_collected_for_ever() -> None:
    end = Conversation(client=False)
    for _ in range(protocol.MAX_LINE // 65536):
        end.feed(b"x" * 65536)
    with pytest.raises(RemoteProtocolError):
        end.feed(b"x")


# -- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("1000", 1000), ("64K", 65536), ("1.5M", 3 << 19), ("2g", 2 << 30), ("3KiB", 3072)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1X", "1e3", "0x10", "1.M", "9" * 30, "٣"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        print(parse_size(text))


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": None},
        {"bytes": 1},
        {"seconds": float("nan")},
        {"seconds": 0},
        {"seconds": 1e9},
        {"seconds": None, "bytes": 0},
        {"seconds": None, "bytes": 1.0},
        {"length": 0},
        {"length": limits.MAX_LENGTH + 1},
        {"length": limits.MAX_LENGTH, "streams": 9},
        {"streams": 0},
        {"streams": 65},
        {"streams": True},
        {"reverse": True, "both": True},
        {"latency": True, "reverse": True},
        {"latency": 1},
        {"rate": 10},
        {"latency": True, "rate": -1},
        {"api": "curio"},
        {"api": ["trio"]},
        {"transport": "udp"},
        {"api": "view", "transport": "tcp"},
    ],
)
def test_parameters_beyond_their_limits_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        replace(Parameters(), **change)
    with pytest.raises((ValueError, TypeError)):
        Parameters.from_json(asdict(Parameters()) | change)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_parameters_go_through_json(api: Any, transport: Any) -> None:
    if api == "view":
        transport = "smc"
    parameters = Parameters(api=api, transport=transport, latency=True, rate=7)
    assert Parameters.from_json(json.loads(json.dumps(parameters.to_json()))) == parameters


@given(st.integers(1, 1 << 40), st.integers(1, 16), st.booleans(), st.integers(1, 4096))
def test_the_streams_of_a_direction_carry_all_bytes_together(size: int, streams: int, both: bool, length: int) -> None:
    flows = Parameters(seconds=None, bytes=size, streams=streams, both=both, length=length).flows()
    assert [flow.id for flow in flows] == list(range(1, len(flows) + 1))
    for direction in {flow.direction for flow in flows}:
        assert sum(flow.quota or 0 for flow in flows if flow.direction == direction) == size
    trips = Parameters(seconds=None, bytes=size, streams=streams, length=length, latency=True).flows()
    assert sum(flow.quota or 0 for flow in trips) == -(-size // length) * length
