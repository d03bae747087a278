# SPDX-License-Identifier: Apache-2.0
"""The states of an established connection, from handshake to close, without input or output.

Owns the one table of what follows what, the flags each step publishes and what send and receive give afterwards.
Never touches rings, regions or TCP. States carry the names and numbers of Linux (net/smc), so that tools show the
same words. The peer's flags are hostile: they are judged here, unknown bits are ignored, and a known bit that
disappears is `RemoteProtocolError`.

States. INIT: handshake not finished. ACTIVE: both directions open. PEERCLOSEWAIT1: this side finished writing.
APPCLOSEWAIT1: the peer finished writing. PEERCLOSEWAIT2 and APPCLOSEWAIT2: both did, this side or the peer first.
APPFINCLOSEWAIT: the peer is done with the connection, only the application's close is missing. PEERFINCLOSEWAIT: the
application closed, only the peer's close is missing. PROCESSABORT: the peer aborted or is gone; PEERABORTWAIT: this
side failed; both until the application has been told or has closed. CLOSED: nothing left.

Difference from Linux. There a sender copies to a buffer of its own first, so close lingers until it is moved, and a
socket stays in PEERCLOSEWAIT1 with its ring registered until the peer closes too. Here `send` writes straight into a
region that the *receiver* owns and the device manager keeps alive for it, so there is nothing to linger for: a
closing side publishes its flag, may let go of everything at once, and the peer still drains what it got. Local close
therefore leads to PEERFINCLOSEWAIT from every state in which the peer is still open, an abort leads to CLOSED, and
whoever has let go need not report further events. Likewise the peer's close leads to APPFINCLOSEWAIT directly.

As in TCP (tried on Linux): bytes received before an end are delivered before it; the end is EOF if the peer finished
writing, even if it aborts or disappears later; else ECONNRESET, once, and then EOF. A send after the peer's close gives
EPIPE, after its abort ECONNRESET once and then EPIPE. "Once" is the caller's: `error_reported` says it has happened.

Ordering: publish flags with release after the producer cursor; read the peer's with acquire before its cursor. The
peer closes TCP after publishing, so on EOF or reset of TCP read its flags once more before `peer_gone`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, TypeVar

from ism.errors import LocalProtocolError, RemoteProtocolError
from ism.shm.header import STATE_FLAGS, Flags


class State(IntEnum):
    """Connection states with Linux's numbers (net/smc enum smc_state)."""

    ACTIVE = 1
    INIT = 2
    CLOSED = 7
    PEERCLOSEWAIT1 = 20
    PEERCLOSEWAIT2 = 21
    APPCLOSEWAIT1 = 22
    APPCLOSEWAIT2 = 23
    APPFINCLOSEWAIT = 24
    PEERFINCLOSEWAIT = 25
    PEERABORTWAIT = 26
    PROCESSABORT = 27


class Event(Enum):
    """What happens to a connection."""

    ESTABLISHED = "established"
    SHUTDOWN_WR = "shutdown write"
    CLOSE = "close"
    ABORT = "abort"
    PEER_DONE = "peer done writing"
    PEER_ABNORMAL = "peer abnormal close"
    PEER_CLOSED = "peer closed"
    PEER_GONE = "peer gone"
    FAIL = "local failure"
    ERROR_REPORTED = "error reported"


class Outcome(Enum):
    """What a call gives: send at once, receive when its ring is drained. Names are errno's, save GOES and EOF."""

    GOES = "goes"
    EOF = "EOF"
    EPIPE = "EPIPE"
    ECONNRESET = "ECONNRESET"
    ECONNABORTED = "ECONNABORTED"
    ENOTCONN = "ENOTCONN"
    EBADF = "EBADF"


# An event that is not listed cannot happen in that state; reporting it is a bug of the caller.
TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.INIT: {
        Event.ESTABLISHED: State.ACTIVE,
        Event.CLOSE: State.CLOSED,
        Event.ABORT: State.CLOSED,
        Event.PEER_GONE: State.PROCESSABORT,
        Event.FAIL: State.PEERABORTWAIT,
    },
    State.ACTIVE: {
        Event.SHUTDOWN_WR: State.PEERCLOSEWAIT1,
        Event.CLOSE: State.PEERFINCLOSEWAIT,
        Event.ABORT: State.CLOSED,
        Event.PEER_DONE: State.APPCLOSEWAIT1,
        Event.PEER_ABNORMAL: State.PROCESSABORT,
        Event.PEER_CLOSED: State.APPFINCLOSEWAIT,
        Event.PEER_GONE: State.PROCESSABORT,
        Event.FAIL: State.PEERABORTWAIT,
    },
    State.PEERCLOSEWAIT1: {
        Event.SHUTDOWN_WR: State.PEERCLOSEWAIT1,
        Event.CLOSE: State.PEERFINCLOSEWAIT,
        Event.ABORT: State.CLOSED,
        Event.PEER_DONE: State.PEERCLOSEWAIT2,
        Event.PEER_ABNORMAL: State.PROCESSABORT,
        Event.PEER_CLOSED: State.APPFINCLOSEWAIT,
        Event.PEER_GONE: State.PROCESSABORT,
        Event.FAIL: State.PEERABORTWAIT,
    },
    State.PEERCLOSEWAIT2: {
        Event.SHUTDOWN_WR: State.PEERCLOSEWAIT2,
        Event.CLOSE: State.PEERFINCLOSEWAIT,
        Event.ABORT: State.CLOSED,
        Event.PEER_ABNORMAL: State.APPFINCLOSEWAIT,
        Event.PEER_CLOSED: State.APPFINCLOSEWAIT,
        Event.PEER_GONE: State.APPFINCLOSEWAIT,
        Event.FAIL: State.PEERABORTWAIT,
    },
    State.APPCLOSEWAIT1: {
        Event.SHUTDOWN_WR: State.APPCLOSEWAIT2,
        Event.CLOSE: State.PEERFINCLOSEWAIT,
        Event.ABORT: State.CLOSED,
        Event.PEER_ABNORMAL: State.APPFINCLOSEWAIT,
        Event.PEER_CLOSED: State.APPFINCLOSEWAIT,
        Event.PEER_GONE: State.APPFINCLOSEWAIT,
        Event.FAIL: State.PEERABORTWAIT,
    },
    State.APPCLOSEWAIT2: {
        Event.SHUTDOWN_WR: State.APPCLOSEWAIT2,
        Event.CLOSE: State.PEERFINCLOSEWAIT,
        Event.ABORT: State.CLOSED,
        Event.PEER_ABNORMAL: State.APPFINCLOSEWAIT,
        Event.PEER_CLOSED: State.APPFINCLOSEWAIT,
        Event.PEER_GONE: State.APPFINCLOSEWAIT,
        Event.FAIL: State.PEERABORTWAIT,
    },
    State.APPFINCLOSEWAIT: {
        Event.SHUTDOWN_WR: State.APPFINCLOSEWAIT,
        Event.CLOSE: State.CLOSED,
        Event.ABORT: State.CLOSED,
        Event.PEER_DONE: State.APPFINCLOSEWAIT,
        Event.PEER_ABNORMAL: State.APPFINCLOSEWAIT,
        Event.PEER_CLOSED: State.APPFINCLOSEWAIT,
        Event.PEER_GONE: State.APPFINCLOSEWAIT,
        Event.FAIL: State.PEERABORTWAIT,
    },
    State.PEERFINCLOSEWAIT: {
        Event.CLOSE: State.PEERFINCLOSEWAIT,
        Event.ABORT: State.PEERFINCLOSEWAIT,
        Event.PEER_DONE: State.PEERFINCLOSEWAIT,
        Event.PEER_ABNORMAL: State.CLOSED,
        Event.PEER_CLOSED: State.CLOSED,
        Event.PEER_GONE: State.CLOSED,
        Event.FAIL: State.CLOSED,
    },
    State.PEERABORTWAIT: {
        Event.SHUTDOWN_WR: State.PEERABORTWAIT,
        Event.CLOSE: State.CLOSED,
        Event.ABORT: State.CLOSED,
        Event.PEER_DONE: State.PEERABORTWAIT,
        Event.PEER_ABNORMAL: State.PEERABORTWAIT,
        Event.PEER_CLOSED: State.PEERABORTWAIT,
        Event.PEER_GONE: State.PEERABORTWAIT,
        Event.FAIL: State.PEERABORTWAIT,
        Event.ERROR_REPORTED: State.APPFINCLOSEWAIT,
    },
    State.PROCESSABORT: {
        Event.SHUTDOWN_WR: State.PROCESSABORT,
        Event.CLOSE: State.CLOSED,
        Event.ABORT: State.CLOSED,
        Event.PEER_DONE: State.PROCESSABORT,
        Event.PEER_ABNORMAL: State.PROCESSABORT,
        Event.PEER_CLOSED: State.PROCESSABORT,
        Event.PEER_GONE: State.PROCESSABORT,
        Event.FAIL: State.PROCESSABORT,
        Event.ERROR_REPORTED: State.APPFINCLOSEWAIT,
    },
    State.CLOSED: {
        Event.CLOSE: State.CLOSED,
        Event.ABORT: State.CLOSED,
        Event.PEER_DONE: State.CLOSED,
        Event.PEER_ABNORMAL: State.CLOSED,
        Event.PEER_CLOSED: State.CLOSED,
        Event.PEER_GONE: State.CLOSED,
        Event.FAIL: State.CLOSED,
    },
}

# state: (send, receive once drained)
OUTCOMES: Mapping[State, tuple[Outcome, Outcome]] = {
    State.INIT: (Outcome.ENOTCONN, Outcome.ENOTCONN),
    State.ACTIVE: (Outcome.GOES, Outcome.GOES),
    State.PEERCLOSEWAIT1: (Outcome.EPIPE, Outcome.GOES),
    State.PEERCLOSEWAIT2: (Outcome.EPIPE, Outcome.EOF),
    State.APPCLOSEWAIT1: (Outcome.GOES, Outcome.EOF),
    State.APPCLOSEWAIT2: (Outcome.EPIPE, Outcome.EOF),
    State.APPFINCLOSEWAIT: (Outcome.EPIPE, Outcome.EOF),
    State.PEERFINCLOSEWAIT: (Outcome.EBADF, Outcome.EBADF),
    State.PEERABORTWAIT: (Outcome.ECONNABORTED, Outcome.ECONNABORTED),
    State.PROCESSABORT: (Outcome.ECONNRESET, Outcome.ECONNRESET),
    State.CLOSED: (Outcome.EBADF, Outcome.EBADF),
}

AnyState = TypeVar("AnyState", bound=Enum)
_NOTHING = Flags(0)
_ABORTED = (State.PROCESSABORT, State.PEERABORTWAIT)
_FLAG_EVENTS = (
    # An abort says more than a close, whichever was published first; bytes the peer had finished before stay good.
    (Flags.DONE_WRITING, Event.PEER_DONE),
    (Flags.ABNORMAL_CLOSE, Event.PEER_ABNORMAL),
    (Flags.CLOSED, Event.PEER_CLOSED),
)


@dataclass(frozen=True)
class Step:
    """Result of an event.

    Attributes: `state` now; `publish` (all of this side's state flags, to be stored in the peer's region and the
    peer woken; 0 when they have not changed); `send` and `receive` (what such a call gives from now on, `receive`
    after the bytes already there).
    """

    state: State
    publish: Flags
    send: Outcome
    receive: Outcome


class ConnectionStates:
    """One connection's state, the flags published by this side and those seen from the peer."""

    def __init__(self) -> None:
        self._state = State.INIT
        self._published = _NOTHING
        self._seen = _NOTHING

    @property
    def state(self) -> State:
        """Where the connection stands."""
        return self._state

    @property
    def may_let_go(self) -> bool:
        """True when this side needs neither region any more and may detach and release at once."""
        return self._state in (State.PEERFINCLOSEWAIT, State.CLOSED)

    def established(self) -> Step:
        """Note the end of the handshake. Raises LocalProtocolError when not in INIT."""
        return self._step(Event.ESTABLISHED)

    def shutdown_wr(self) -> Step:
        """End this side's writing. Raises LocalProtocolError in INIT and after close."""
        return self._step(Event.SHUTDOWN_WR)

    def close(self, *, abort: bool = False) -> Step:
        """Close this side.

        Args:
            abort: bytes are unread in this side's ring, or SO_LINGER is on with time 0.
        """
        return self._step(Event.ABORT if abort else Event.CLOSE)

    def receive_flags(self, value: int) -> Step:
        """Judge the flags word of the peer, read once by the caller.

        Args:
            value: the word as read; bits that are no state flags are ignored.
        Raises:
            RemoteProtocolError: a flag seen before is missing; nothing has changed, call `fail`.
            LocalProtocolError: flags were read before `established`.
        """
        flags = Flags(value & STATE_FLAGS)
        missing = self._seen & ~flags
        if missing:
            raise RemoteProtocolError(
                f"the peer took back state flags 0x{missing:02x}", state=self._state.name, event="flags"
            )
        before = self._published
        for flag, event in _FLAG_EVENTS:
            if flag & flags & ~self._seen:
                self._step(event)
        self._seen = flags
        return self._result(before)

    def peer_gone(self) -> Step:
        """Note that the peer is gone: EOF or reset of TCP, or its device left, and its flags were read again."""
        return self._step(Event.PEER_GONE)

    def fail(self) -> Step:
        """Note that this side cannot go on: its device is gone, or the peer lies."""
        return self._step(Event.FAIL)

    def error_reported(self) -> Step:
        """Note that the application got its ECONNRESET or ECONNABORTED. Raises LocalProtocolError otherwise."""
        return self._step(Event.ERROR_REPORTED)

    def _step(self, event: Event) -> Step:
        before, came_from = self._published, self._state
        try:
            self._state = TRANSITIONS[came_from][event]
        except KeyError:
            raise LocalProtocolError(
                f"{event.value} cannot happen in {came_from.name}", state=came_from.name, event=event.value
            ) from None
        if came_from not in (State.INIT, self._state):
            self._published |= _flag_to_publish(event, self._state)
        return self._result(before)

    def _result(self, before: Flags) -> Step:
        send, receive = OUTCOMES[self._state]
        publish = self._published if self._published != before else _NOTHING
        return Step(state=self._state, publish=publish, send=send, receive=receive)


def _flag_to_publish(event: Event, state: State) -> Flags:
    """What the peer has to learn when `event` led to another `state`."""
    if event is Event.SHUTDOWN_WR:
        return Flags.DONE_WRITING
    if event is Event.CLOSE:
        return Flags.CLOSED
    if event is Event.ABORT or state in _ABORTED:
        return Flags.ABNORMAL_CLOSE
    return _NOTHING


def mermaid(table: Mapping[AnyState, Mapping[Any, AnyState]], start: AnyState) -> str:
    """Draw a transition table as a mermaid state diagram; events that change nothing are left out.

    Args:
        table: `{state: {event: next}}` with enum members, such as `TRANSITIONS`.
        start: the first state.
    Returns: text that ends with a newline.
    """
    lines = ["stateDiagram-v2", f"    [*] --> {start.name}"]
    for state, row in table.items():
        edges: dict[AnyState, list[str]] = {}
        for event, target in row.items():
            if target is not state:
                edges.setdefault(target, []).append(event.value)
        for target, events in edges.items():
            lines.append(f"    {state.name} --> {target.name}: {', '.join(events)}")
        if not edges:
            lines.append(f"    {state.name} --> [*]")
    return "\n".join(lines) + "\n"
