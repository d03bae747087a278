# SPDX-License-Identifier: Apache-2.0
"""What client and server of `ism perf` say to each other: JSON lines on one TCP connection. Sans-io.

    client                      server
    Ask(parameters)       ->
                          <-    Listen(where, cookie)     or Busy, or Failed(reason); then it is over
    ... opens the streams, each with the cookie and its number; both find out how the bytes travel ...
                          <-    Ready(ways)
    Go                    ->    both begin
    Stop                  ->    when the client's time is up, or its user is tired of it
                          <-    Result(flows, CPU), once every stream has ended

Either may say Failed(reason) at any time, and closes. The other end is not trusted: a line has a limit, so has every
number, and text is made harmless for a terminal. What breaks the rules is RemoteProtocolError.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from ism.errors import LocalProtocolError, RemoteProtocolError
from ism.perf.parameters import MAX_BYTES, MAX_STREAMS, Parameters

VERSION: Final = 1
MAX_LINE: Final = 1 << 18
COOKIE_BYTES: Final = 16
HELLO_BYTES: Final = COOKIE_BYTES + 1
"""What the client sends first on each stream: the cookie, and the number of the stream."""
WELCOME: Final = b"\x06"
"""What the server answers."""
_MAX_FLOWS: Final = 2 * MAX_STREAMS
_MAX_TEXT: Final = 300
_MAX_SECONDS: Final = 1e9
_HEX: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Ask:
    """The client wants this measured. Attributes: `version` (of the protocol), `program` (its name and version)."""

    parameters: Parameters
    version: int = VERSION
    program: str = ""


@dataclass(frozen=True, slots=True)
class Listen:
    """The server listens for streams. Attributes: `port` (0 for UNIX sockets), `cookie` (hex); `program`, `host`."""

    port: int
    cookie: str
    program: str = ""
    host: str = ""


@dataclass(frozen=True, slots=True)
class Busy:
    """The server has another test."""


@dataclass(frozen=True, slots=True)
class Failed:
    """This end gives up."""

    reason: str


@dataclass(frozen=True, slots=True)
class Way:
    """How the bytes of a stream travel, as one end sees it; see `ism.smc.info`. Sizes in bytes."""

    mode: str
    reason: str = ""
    code: int = 0
    receive_buffer: int = 0
    send_buffer: int = 0

    def __str__(self) -> str:
        why = f" ({self.reason}{f', 0x{self.code:08x}' if self.code else ''})" if self.reason else ""
        return f"{self.mode}{why}"


@dataclass(frozen=True, slots=True)
class Ready:
    """All streams are open. Attributes: `ways` (in the order of the streams' numbers)."""

    ways: tuple[Way, ...]


@dataclass(frozen=True, slots=True)
class Go:
    """Begin."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Send no more."""


@dataclass(frozen=True, slots=True)
class Count:
    """What one end has counted in a stream: `bytes`, `seconds` (from the beginning to the last byte)."""

    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """The server's part of the result. Attributes: `user_s`, `system_s` (its CPU, from beginning to end)."""

    flows: tuple[Count, ...]
    user_s: float
    system_s: float


Message = Ask | Listen | Busy | Failed | Ready | Go | Stop | Result
_NAMES: Final[dict[str, type[Message]]] = {
    kind.__name__.lower(): kind for kind in (Ask, Listen, Busy, Failed, Ready, Go, Stop, Result)
}

CLIENT: Final[dict[str, dict[type[Message], str]]] = {
    "new": {Ask: "asked"},
    "asked": {Listen: "opening", Busy: "over", Failed: "over"},
    "opening": {Ready: "ready", Failed: "over"},
    "ready": {Go: "running", Failed: "over"},
    "running": {Stop: "stopping", Result: "over", Failed: "over"},
    "stopping": {Result: "over", Failed: "over"},
    "over": {},
}
"""What may be said next, by either end, as the client sees it. A Stop may cross the Result: see SERVER."""

SERVER: Final[dict[str, dict[type[Message], str]]] = {**CLIENT, "over": {Stop: "over"}}


class Conversation:
    """One end of the talk: bytes in, messages out, and the other way, each checked against the table.

    Attributes: `state`.
    """

    def __init__(self, *, client: bool) -> None:
        self.state = "new"
        self._table = CLIENT if client else SERVER
        self._mine: tuple[type[Message], ...] = (Ask, Go, Stop) if client else (Listen, Busy, Ready, Result)
        self._buffer = bytearray()

    def send(self, message: Message) -> bytes:
        """Return the line to send. Raises LocalProtocolError when it is not to be said now."""
        kind = type(message)
        if kind is not Failed and (kind not in self._mine or kind not in self._table[self.state]):
            raise LocalProtocolError(f"cannot say {kind.__name__} now", state=self.state, event=kind.__name__)
        self.state = self._table[self.state].get(kind, "over")
        return encode(message)

    def feed(self, data: bytes) -> None:
        """Take in what was received. Raises RemoteProtocolError when a line has no end."""
        self._buffer += data
        if b"\n" not in self._buffer and len(self._buffer) > MAX_LINE:
            raise RemoteProtocolError(f"a line of more than {MAX_LINE} bytes", state=self.state)

    def next(self) -> Message | None:
        """Return the next message that is complete; None: more bytes are needed. Raises RemoteProtocolError."""
        end = self._buffer.find(b"\n")
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message = decode(line)
        kind = type(message)
        if kind is not Failed and (kind in self._mine or kind not in self._table[self.state]):
            raise RemoteProtocolError(f"{kind.__name__} makes no sense now", state=self.state, event=kind.__name__)
        self.state = self._table[self.state].get(kind, "over")
        return message


def encode(message: Message) -> bytes:
    """Return the line of a message."""
    values = asdict(message)
    if isinstance(message, Ask):
        values["parameters"] = message.parameters.to_json()
    return json.dumps({"say": type(message).__name__.lower(), **values}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Return the message of a line. Raises RemoteProtocolError."""
    if len(line) > MAX_LINE:
        raise RemoteProtocolError(f"a line of {len(line)} bytes, at most {MAX_LINE} are allowed")
    try:
        values = json.loads(line, parse_constant=_no_constant)
        kind = _NAMES[values.pop("say")]
        return _READERS[kind](values)
    except RemoteProtocolError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise RemoteProtocolError(f"no message of this protocol: {printable(line[:60])} ({exc})") from exc


def printable(value: object) -> str:
    """Return text of the other end as it may be shown: one line, of bounded length, without control characters."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return "".join(char if char.isprintable() else "?" for char in text[:_MAX_TEXT])


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is no text")
    return printable(value)


def _integer(values: Mapping[str, Any], name: str, high: int) -> int:
    value = values[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
        raise ValueError(f"{name} is not between 0 and {high}")
    return value


def _seconds(values: Mapping[str, Any], name: str) -> float:
    value = values[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MAX_SECONDS:
        raise ValueError(f"{name} is not between 0 and {_MAX_SECONDS:g}")
    return float(value) if math.isfinite(value) else 0.0


def _items(values: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    items = values[name]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items) or len(items) > _MAX_FLOWS:
        raise ValueError(f"{name} is no list of at most {_MAX_FLOWS} objects")
    return items


def _ask(values: Mapping[str, Any]) -> Ask:
    version = _integer(values, "version", 1 << 31)
    if version != VERSION:
        raise RemoteProtocolError(f"protocol version {version}, this end has {VERSION}")
    return Ask(Parameters.from_json(values["parameters"]), version, _text(values, "program"))


def _listen(values: Mapping[str, Any]) -> Listen:
    cookie = values["cookie"]
    if not isinstance(cookie, str) or not _HEX.fullmatch(cookie):
        raise ValueError("cookie is not 32 hexadecimal digits")
    return Listen(_integer(values, "port", 65535), cookie, _text(values, "program"), _text(values, "host"))


def _way(values: Mapping[str, Any]) -> Way:
    return Way(
        _text(values, "mode"),
        _text(values, "reason"),
        _integer(values, "code", (1 << 32) - 1),
        _integer(values, "receive_buffer", 1 << 40),
        _integer(values, "send_buffer", 1 << 40),
    )


def _result(values: Mapping[str, Any]) -> Result:
    flows = tuple(
        Count(_integer(one, "bytes", 4 * MAX_BYTES), _seconds(one, "seconds")) for one in _items(values, "flows")
    )
    return Result(flows, _seconds(values, "user_s"), _seconds(values, "system_s"))


_READERS: Final[dict[type[Message], Callable[[Mapping[str, Any]], Message]]] = {
    Ask: _ask,
    Listen: _listen,
    Busy: lambda _: Busy(),
    Failed: lambda values: Failed(_text(values, "reason")),
    Ready: lambda values: Ready(tuple(_way(one) for one in _items(values, "ways"))),
    Go: lambda _: Go(),
    Stop: lambda _: Stop(),
    Result: _result,
}
