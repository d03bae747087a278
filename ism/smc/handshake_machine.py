# SPDX-License-Identifier: Apache-2.0
"""The two ends of a CLC handshake as state machines without input or output (RFC 7609 section 3, SMC version 2).

Owns the order of messages and every check that needs both ends' values; `clc` owns their bytes, the caller owns the
TCP connection, regions and clocks. Bytes of the peer go in by `receive`, never more than `bytes_wanted`; events come
out; bytes for the peer are returned by the call that makes them and must be written at once and whole.

Grammar. On a connection that both ends know to be one of ours, the streams begin with

    client: DECLINE  |  PROPOSAL (CONFIRM | DECLINE)
    server: ACCEPT  |  DECLINE

and nothing else, whoever declines and when. So each end knows from what it has read alone how many CLC messages
precede the application's bytes, even when a DECLINE crosses another message: an end never guesses. That asks for one
thing Linux does not do: an end that is declined before its own grammar is complete answers with a DECLINE of its
own (`PeerDeclined.reply`). The client may decline until it has sent CONFIRM, the server until it has sent ACCEPT: a
server that has accepted waits, since the client may be using shared memory by then.

States. START: nothing sent. PROPOSED: the client waits for the answer; the server has an offer to decide about.
UNUSABLE: the peer's message is correct but cannot be used, and the caller has to decline. ACCEPTED: the client has an
answer to decide about; the server waits for CONFIRM. DRAINING: declined here before the peer's first message came;
that message is read and dropped. DRAINING_LAST: likewise the client's second message, which is a DECLINE. CONFIRMED:
shared memory. FALLBACK: TCP, and the next byte in is the application's. CLOSED: the peer closed TCP before its first
byte. BROKEN: the peer broke the protocol.

Link groups are named by (peer gid, peer devid). Every connection is treated as the first of its group, by both ends,
so that they always agree; an answer without the first contact part is declined with SYNCERR.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, TypeVar

from ism.errors import LocalProtocolError, RemoteProtocolError
from ism.ids import DevId, Gid, Token
from ism.smc.clc import (
    FEATURE_EMULATED_ISM,
    RELEASE,
    VERSION,
    Accept,
    Answer,
    Confirm,
    Decline,
    FirstContact,
    ForeignAnswer,
    Message,
    MessageReader,
    Offer,
    Proposal,
)
from ism.smc.diagnosis import Diagnosis, HandshakeError, words
from ism.smc.identity import Identity


class State(Enum):
    """States of either end; see the module's text."""

    __hash__ = object.__hash__  # members are single, and the tables are asked several times a message

    START = "start"
    PROPOSED = "proposed"
    UNUSABLE = "unusable"
    ACCEPTED = "accepted"
    DRAINING = "draining"
    DRAINING_LAST = "draining last"
    CONFIRMED = "confirmed"
    FALLBACK = "fallback"
    CLOSED = "closed"
    BROKEN = "broken"


class Event(Enum):
    """What moves a handshake. `RECEIVE_UNUSABLE` replaces the message's own event when it does not suit."""

    __hash__ = object.__hash__

    SEND_PROPOSAL = "send PROPOSAL"
    SEND_ACCEPT = "send ACCEPT"
    SEND_CONFIRM = "send CONFIRM"
    SEND_DECLINE = "send DECLINE"
    RECEIVE_PROPOSAL = "receive PROPOSAL"
    RECEIVE_ACCEPT = "receive ACCEPT"
    RECEIVE_CONFIRM = "receive CONFIRM"
    RECEIVE_DECLINE = "receive DECLINE"
    RECEIVE_UNUSABLE = "receive unusable"
    EOF = "EOF before a byte"
    BREAK = "violation"


CLIENT: Mapping[State, Mapping[Event, State]] = {
    State.START: {
        Event.SEND_PROPOSAL: State.PROPOSED,
        Event.SEND_DECLINE: State.DRAINING,
        Event.RECEIVE_DECLINE: State.FALLBACK,
        Event.EOF: State.CLOSED,
        Event.BREAK: State.BROKEN,
    },
    State.PROPOSED: {
        Event.SEND_DECLINE: State.DRAINING,
        Event.RECEIVE_ACCEPT: State.ACCEPTED,
        Event.RECEIVE_UNUSABLE: State.UNUSABLE,
        Event.RECEIVE_DECLINE: State.FALLBACK,
        Event.EOF: State.CLOSED,
        Event.BREAK: State.BROKEN,
    },
    State.ACCEPTED: {
        Event.SEND_CONFIRM: State.CONFIRMED,
        Event.SEND_DECLINE: State.FALLBACK,
        Event.BREAK: State.BROKEN,
    },
    State.UNUSABLE: {Event.SEND_DECLINE: State.FALLBACK, Event.BREAK: State.BROKEN},
    State.DRAINING: {
        Event.RECEIVE_ACCEPT: State.FALLBACK,
        Event.RECEIVE_DECLINE: State.FALLBACK,
        Event.EOF: State.CLOSED,
        Event.BREAK: State.BROKEN,
    },
    State.CONFIRMED: {},
    State.FALLBACK: {},
    State.CLOSED: {},
    State.BROKEN: {},
}

SERVER: Mapping[State, Mapping[Event, State]] = {
    State.START: {
        Event.SEND_DECLINE: State.DRAINING,
        Event.RECEIVE_PROPOSAL: State.PROPOSED,
        Event.RECEIVE_UNUSABLE: State.UNUSABLE,
        Event.RECEIVE_DECLINE: State.FALLBACK,
        Event.EOF: State.CLOSED,
        Event.BREAK: State.BROKEN,
    },
    State.PROPOSED: {
        Event.SEND_ACCEPT: State.ACCEPTED,
        Event.SEND_DECLINE: State.DRAINING_LAST,
        Event.BREAK: State.BROKEN,
    },
    State.UNUSABLE: {Event.SEND_DECLINE: State.DRAINING_LAST, Event.BREAK: State.BROKEN},
    State.ACCEPTED: {
        Event.RECEIVE_CONFIRM: State.CONFIRMED,
        Event.RECEIVE_DECLINE: State.FALLBACK,
        Event.BREAK: State.BROKEN,
    },
    State.DRAINING: {
        Event.RECEIVE_PROPOSAL: State.DRAINING_LAST,
        Event.RECEIVE_DECLINE: State.FALLBACK,
        Event.EOF: State.CLOSED,
        Event.BREAK: State.BROKEN,
    },
    State.DRAINING_LAST: {Event.RECEIVE_DECLINE: State.FALLBACK, Event.BREAK: State.BROKEN},
    State.CONFIRMED: {},
    State.FALLBACK: {},
    State.CLOSED: {},
    State.BROKEN: {},
}

_RECEIVE = {
    Proposal.kind: Event.RECEIVE_PROPOSAL,
    Accept.kind: Event.RECEIVE_ACCEPT,
    Confirm.kind: Event.RECEIVE_CONFIRM,
    Decline.kind: Event.RECEIVE_DECLINE,
}


@dataclass(frozen=True)
class Proposed:
    """Server: an offer that suits. Call `accept` or `decline`.

    Attributes: `candidates` (devices of the client in this domain and fabric, in its order, never empty), `eid`
    (the one to be used), `eids` (all the client named that this side has too).
    """

    candidates: tuple[Offer, ...]
    eid: str
    eids: tuple[str, ...]


@dataclass(frozen=True)
class PeerAnswer:
    """What the peer tells of itself: attach `token`, check that the region is as large as `size` says, bytes."""

    gid: Gid
    devid: DevId
    token: Token
    size: int
    eid: str
    link_id: int
    first_contact: bool
    host: str


@dataclass(frozen=True)
class PeerAccepted(PeerAnswer):
    """Client: the server accepted. Attach its region and call `confirm`, or `decline`."""


@dataclass(frozen=True)
class Confirmed(PeerAnswer):
    """Server: the client confirmed. Attach its region; if that fails only breaking the connection is left."""


@dataclass(frozen=True)
class MustDecline:
    """The peer's message is correct but this side cannot use it: call `decline(code)`, then use TCP."""

    code: Diagnosis
    words: str


@dataclass(frozen=True)
class PeerDeclined:
    """The peer wants TCP. Write `reply` (may be empty) first; then the stream is the application's.

    Attributes: `code` (any 32-bit number), `words`, `out_of_sync` (the peer dropped its link group), `reply`.
    """

    code: int
    words: str
    out_of_sync: bool
    reply: bytes


@dataclass(frozen=True)
class Drained:
    """A message that crossed this side's DECLINE was read and dropped. Go on while `bytes_wanted` is not 0."""


@dataclass(frozen=True)
class ClosedBeforeStart:
    """The peer closed TCP before the first byte of its handshake: the application sees an ordinary EOF."""


AnswerT = TypeVar("AnswerT", PeerAccepted, Confirmed)
HandshakeEvent = Proposed | PeerAccepted | Confirmed | MustDecline | PeerDeclined | Drained


class _Handshake(ABC):
    """What both ends share: reading, moving through the table, declining."""

    TABLE: ClassVar[Mapping[State, Mapping[Event, State]]]

    def __init__(self, identity: Identity, nonce: int = 0) -> None:
        """Args: `nonce`: of the intent by which the directory brought the two ends together; 0 without one."""
        self._identity, self._nonce = identity, nonce
        self._state = State.START
        self._reader = MessageReader()
        self._heard = False
        self._peer_version = VERSION

    @property
    def state(self) -> State:
        """Where the handshake stands."""
        return self._state

    @property
    def finished(self) -> bool:
        """True when nothing more can happen: CONFIRMED, FALLBACK, CLOSED or BROKEN."""
        return not self.TABLE[self._state]

    @property
    def fell_back(self) -> bool:
        """True when application bytes may be sent over TCP; they may be read when `bytes_wanted` is 0 too."""
        return self._state in (State.DRAINING, State.DRAINING_LAST, State.FALLBACK)

    @property
    def bytes_wanted(self) -> int:
        """How many bytes to read from TCP next, at most; 0 when none of what follows is the handshake's (yet)."""
        waits = any(event in self.TABLE[self._state] for event in _RECEIVE.values())
        return self._reader.bytes_wanted if waits else 0

    @property
    def in_message(self) -> bool:
        """Whether a message of the peer has begun to come, and its rest has not."""
        return self._reader.in_message

    def receive(self, data: bytes | bytearray | memoryview) -> HandshakeEvent | None:
        """Take bytes from the peer.

        Args:
            data: 1..`bytes_wanted` bytes, copied.
        Returns: the event of the message they complete, None when more are needed.
        Raises:
            HandshakeError: the peer broke the protocol; the handshake is BROKEN and TCP must be closed.
            LocalProtocolError: nothing is to be read now, no bytes, or more than wanted; nothing has changed.
        """
        if not self.bytes_wanted:
            raise LocalProtocolError(f"no handshake byte can come while {self._state.value}")
        try:
            message = self._reader.feed(data)
            self._heard = True
            return None if message is None else self._received(message)
        except RemoteProtocolError as exc:
            exc.state = exc.state or self._state.value
            self._move(Event.BREAK)
            raise

    def receive_eof(self) -> ClosedBeforeStart:
        """Note that the peer closed its half of TCP in the middle of the handshake.

        Returns: `ClosedBeforeStart` when it had not sent one byte.
        Raises:
            HandshakeError: it had; the handshake is BROKEN.
            LocalProtocolError: the handshake is finished, EOF is the application's.
        """
        if not self._heard:
            self._move(Event.EOF)
            return ClosedBeforeStart()
        state = self._state.value
        self._move(Event.BREAK)
        raise HandshakeError("the peer closed TCP in the middle of the handshake", state=state, event="EOF")

    def decline(self, code: Diagnosis) -> bytes:
        """Give up shared memory on this connection and return the DECLINE to write at once.

        Args:
            code: why; `SYNCERR` sets the out-of-sync flag as well.
        Raises:
            LocalProtocolError: too late (CONFIRM or ACCEPT is out), or declined already.
        """
        self._move(Event.SEND_DECLINE)
        return self._decline_message(code)

    def _received(self, message: Message) -> HandshakeEvent:
        event = _RECEIVE[message.kind]
        if event not in self.TABLE[self._state]:
            raise HandshakeError(f"{message.kind.name} in the wrong place", state=self._state.value, event=event.value)
        if isinstance(message, Decline):
            # An end that has already sent its last message of the grammar has nothing to answer.
            complete = self.fell_back or self._state is State.ACCEPTED
            self._move(event)
            return PeerDeclined(
                code=message.diagnosis,
                words=words(message.diagnosis),
                out_of_sync=message.out_of_sync,
                reply=b"" if complete else self._decline_message(Diagnosis.PEERDECL),
            )
        if self.fell_back:
            self._move(event)
            return Drained()
        return self._judge(message)

    @abstractmethod
    def _judge(self, message: Message) -> HandshakeEvent:
        """Handle a message the table allows and that is no DECLINE. Raises HandshakeError."""

    def _decline_message(self, code: Diagnosis) -> bytes:
        sync = code is Diagnosis.SYNCERR
        return Decline(diagnosis=code, out_of_sync=sync, version=self._peer_version, nonce=self._nonce).encode()

    def _must_decline(self, code: Diagnosis) -> MustDecline:
        self._move(Event.RECEIVE_UNUSABLE)
        return MustDecline(code=code, words=code.words)

    def _move(self, event: Event) -> None:
        try:
            self._state = self.TABLE[self._state][event]
        except KeyError:
            raise LocalProtocolError(
                f"cannot {event.value} while {self._state.value}", state=self._state.value, event=event.value
            ) from None

    def _first_contact(self, release: int, features: int) -> FirstContact:
        return FirstContact(release=release, features=features, host=self._identity.host)


class ClientHandshake(_Handshake):
    """The connecting end. Source: RFC 7609 section 3.1; SMC version 2.1 Emulated-ISM."""

    TABLE = CLIENT

    def __init__(self, identity: Identity, nonce: int = 0) -> None:
        super().__init__(identity, nonce)
        self._accept: Accept | None = None

    def start(self) -> bytes:
        """Return the PROPOSAL to write at once.

        Raises:
            LocalProtocolError: called twice, or after a DECLINE.
        """
        self._move(Event.SEND_PROPOSAL)
        me = self._identity
        offer = Offer(gid=me.gid, devid=me.devid, chid=me.chid)
        return Proposal(offers=(offer,), eids=me.eids, nonce=self._nonce).encode()

    def confirm(self, token: Token, size: int) -> bytes:
        """Return the CONFIRM to write at once; from then on the connection is shared memory.

        Args:
            token: of this side's own region, which the server may now write to.
            size: what is announced of it, bytes, one of `clc.DMB_SIZES`.
        Raises:
            LocalProtocolError: no ACCEPT to confirm, token 0 or the server's, or no such size; nothing has changed.
        """
        accept = self._accept
        if accept is None or self._state is not State.ACCEPTED:
            raise LocalProtocolError(f"cannot confirm while {self._state.value}", state=self._state.value)
        if token == accept.token:
            raise LocalProtocolError("the client's region cannot be the server's own")
        assert accept.first_contact is not None
        me = self._identity
        features = accept.first_contact.features & FEATURE_EMULATED_ISM
        message = Confirm(
            gid=me.gid,
            devid=me.devid,
            token=token,
            size=size,
            chid=accept.chid,
            eid=accept.eid,
            link_id=me.link_id,
            first_contact=self._first_contact(accept.first_contact.release, features),
        ).encode()
        self._move(Event.SEND_CONFIRM)
        return message

    def _judge(self, message: Message) -> HandshakeEvent:
        if isinstance(message, ForeignAnswer):
            return self._must_decline(message.code)
        assert isinstance(message, Accept)
        code = self._objection(message)
        if code is not None:
            return self._must_decline(code)
        self._accept = message
        self._move(Event.RECEIVE_ACCEPT)
        return _event(PeerAccepted, message)

    def _objection(self, accept: Accept) -> Diagnosis | None:
        first, me = accept.first_contact, self._identity
        if first is None:
            return Diagnosis.SYNCERR
        if first.release > RELEASE:
            return Diagnosis.VERSMISMAT
        if first.release < RELEASE:
            return Diagnosis.RELEASEERR
        emulated = first.features & FEATURE_EMULATED_ISM
        if not emulated or accept.gid != me.gid or accept.devid == 0 or accept.chid != me.chid:
            return Diagnosis.NOSMCD2DEV
        if accept.eid not in me.eids:
            return Diagnosis.NOUEID
        return None


class ServerHandshake(_Handshake):
    """The listening end. Source: RFC 7609 section 3.1; SMC version 2.1 Emulated-ISM."""

    TABLE = SERVER

    def __init__(self, identity: Identity, nonce: int = 0) -> None:
        super().__init__(identity, nonce)
        self._proposed: Proposed | None = None
        self._candidate: Offer | None = None
        self._accept: Accept | None = None

    def accept(self, token: Token, size: int, candidate: Offer | None = None) -> bytes:
        """Return the ACCEPT to write at once. Only the client can decline after it.

        Args:
            token: of this side's own region, which the client may now write to.
            size: what is announced of it, bytes, one of `clc.DMB_SIZES`.
            candidate: the client's device to talk to, one of `Proposed.candidates`; default the first.
        Raises:
            LocalProtocolError: no PROPOSAL to accept, token 0, no such size or candidate; nothing has changed.
        """
        proposed = self._proposed
        if proposed is None or self._state is not State.PROPOSED:
            raise LocalProtocolError(f"cannot accept while {self._state.value}", state=self._state.value)
        chosen = proposed.candidates[0] if candidate is None else candidate
        if chosen not in proposed.candidates:
            raise LocalProtocolError(f"the client did not offer {chosen}")
        me = self._identity
        message = Accept(
            gid=me.gid,
            devid=me.devid,
            token=token,
            size=size,
            chid=me.chid,
            eid=proposed.eid,
            link_id=me.link_id,
            first_contact=self._first_contact(RELEASE, FEATURE_EMULATED_ISM),
        )
        data = message.encode()
        self._move(Event.SEND_ACCEPT)
        self._accept, self._candidate = message, chosen
        return data

    def _judge(self, message: Message) -> HandshakeEvent:
        if isinstance(message, Proposal):
            return self._match(message)
        return self._check_confirm(message)

    def _match(self, proposal: Proposal) -> HandshakeEvent:
        self._peer_version = proposal.version
        me = self._identity
        if proposal.absent is not None:
            return self._must_decline(proposal.absent)
        if proposal.release < RELEASE:
            # Release 0 has no GID extension, so it cannot name a device.
            return self._must_decline(Diagnosis.RELEASEERR)
        candidates = tuple(
            offer
            for offer in dict.fromkeys(proposal.offers)
            if offer.gid == me.gid and offer.devid != 0 and offer.chid == me.chid
        )
        if not candidates or not proposal.features & FEATURE_EMULATED_ISM:
            return self._must_decline(Diagnosis.NOSMCD2DEV)
        eids = tuple(eid for eid in dict.fromkeys(proposal.eids) if eid in me.eids)
        if not eids:
            return self._must_decline(Diagnosis.NOUEID)
        self._move(Event.RECEIVE_PROPOSAL)
        self._proposed = Proposed(candidates=candidates, eid=eids[0], eids=eids)
        return self._proposed

    def _check_confirm(self, confirm: Message) -> HandshakeEvent:
        """The client is committed once it has sent CONFIRM, so nothing in it can be declined any more."""
        if isinstance(confirm, ForeignAnswer):
            raise HandshakeError(f"CONFIRM does not answer the ACCEPT: {confirm.code.words}", confirm.code)
        accept, peer = self._accept, self._candidate
        assert isinstance(confirm, Confirm)
        assert accept is not None
        assert peer is not None
        if confirm.first_contact is None:
            raise HandshakeError("CONFIRM without first contact after an ACCEPT with it", Diagnosis.SYNCERR)
        if confirm.first_contact.release != RELEASE:
            raise HandshakeError(
                f"CONFIRM of release {confirm.first_contact.release}, agreed was {RELEASE}",
                Diagnosis.RELEASEERR,
            )
        if (confirm.gid, confirm.devid, confirm.chid) != (peer.gid, peer.devid, peer.chid):
            raise HandshakeError("CONFIRM from another device than was accepted", Diagnosis.NOSMCD2DEV)
        if confirm.eid != accept.eid:
            raise HandshakeError("CONFIRM with another EID than was accepted", Diagnosis.NOUEID)
        if confirm.token == accept.token:
            raise HandshakeError("CONFIRM names this side's own region as the client's")
        self._move(Event.RECEIVE_CONFIRM)
        return _event(Confirmed, confirm)


def _event(kind: type[AnswerT], message: Answer) -> AnswerT:
    first = message.first_contact
    return kind(
        gid=message.gid,
        devid=message.devid,
        token=message.token,
        size=message.size,
        eid=message.eid,
        link_id=message.link_id,
        first_contact=first is not None,
        host="" if first is None else first.host,
    )
