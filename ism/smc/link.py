# SPDX-License-Identifier: Apache-2.0
"""One TCP connection until it is settled whether it uses shared memory: decision, handshake, fallback. No event loop.

States of a link, and who moves it (the rules of the decision are in docs/directory.md, the handshake's in
docs/handshake.md):

    WAITING   the client has intended and is not claimed yet; the server's CLAIM is under way
    AGREED    claimed, or configured on both ends: each side's first message on TCP is a CLC message
    TALKING   this side has sent or received one
    SMC, TCP, BROKEN, CLOSED: settled

Events of the directory, readable TCP, answers of the device and the program's own calls each take the lock, advance as
far as nothing has to be waited for, and tell whoever waits (`on_change`). Commands that wait run in a worker. So a
handshake goes on whether or not the program is inside a call: connect and accept never wait for the other program.
It *begins* with the program's first send or receive at either end (`start`); until then the connection can still be
given away as the TCP connection it is (`give_away`).

Time runs only while somebody waits: `deadline` says how long to wait at most, `expire` what happens then. Whoever may
still decline does and goes on in TCP; a server that has accepted cannot, and breaks.

The file is long because one lock and one set of states stand behind all of it: decision, handshake and fallback each
end in any of the others' states. It wants to be cut along those three all the same.

Who may lie: the peer, in every byte. Before the first byte that is taken for a CLC message a server that claimed looks
whether it carries the claim's nonce: a client that lost the manager speaks TCP, and one cannot carry it by accident.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

from ism.driver import Device, Region
from ism.driver.directory import Claim, Directory
from ism.errors import DeviceError, DeviceGoneError, IsmError, QuotaError, RemoteProtocolError, TransportError
from ism.eventfd import drain
from ism.ids import DevId
from ism.shm import offer
from ism.shm.kernels import load_kernels
from ism.smc import handshake, workers
from ism.smc.clc import NONCE_END, SMCD, SMCR, Offer, carries_nonce
from ism.smc.connection import Connection, Nowhere, hung_up
from ism.smc.diagnosis import Diagnosis, HandshakeError
from ism.smc.group import Address, Pair
from ism.smc.handshake import DeclinedError
from ism.smc.handshake_machine import (
    ClientHandshake,
    Confirmed,
    Drained,
    MustDecline,
    PeerAccepted,
    PeerAnswer,
    PeerDeclined,
    Proposed,
    ServerHandshake,
    State,
)
from ism.virtio.ism_spec import Ack, EventType

if TYPE_CHECKING:
    from ism.driver.control import Command
    from ism.driver.service import Service

CLAIM_WAIT_S = 0.05
"""How long a client waits to be claimed, from the connection on, before its first byte goes over TCP."""
REQUIRED_WAIT_S = 30.0
"""The same for a client that does not go over TCP, but fails."""
RETRACT_WAIT_S = 1.0
"""How long the manager may take to confirm that; then the client speaks TCP without knowing."""
CLIENT_PATIENCE_S = 2.0
"""How long a client waits for ACCEPT."""
SERVER_PATIENCE_S = 0.5
"""How long a server that wants to speak first waits for PROPOSAL."""
CLAIM_ANSWER_S = 30.0
"""How long the manager may take to answer CLAIM; a server cannot decide without it."""

NOT_LISTED = "nobody has published the server's address in the directory"

END_WAIT_S = 0.2
"""How long a client whose server's region is gone waits for the end of TCP that explains it."""

_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""What a command fails with where this process or its host has no more descriptors, or memory, for it."""

BALLAST = b"\0"
"""Each side's only byte on TCP after the handshake. It stays unread: see `readiness`."""


class Stage(Enum):
    """Where a link stands; see the module's text."""

    __hash__ = object.__hash__  # members are single, and whoever waits asks again and again

    WAITING = "waiting"
    AGREED = "agreed"
    TALKING = "talking"
    SMC = "SMC"
    TCP = "TCP"
    BROKEN = "broken"
    CLOSED = "closed"


_SETTLED = frozenset({Stage.SMC, Stage.TCP, Stage.BROKEN, Stage.CLOSED})


class _Raw(socket.SocketType):
    """The TCP socket by its borrowed descriptor, without the timeout of the program's object.

    Attributes: `owner` (kept alive for as long as this is: the object that closes the descriptor when it is dropped).
    """

    owner: object = None

    def __del__(self) -> None:
        self.detach()


class Link:
    """Who decides about one TCP connection. Thread-safe; no call waits.

    Attributes: `stage`, `connection` (in SMC), `code` and `why` (of a fallback: CLC diagnosis, words), `error` (in
    BROKEN), `reused` (whether the region it receives in was left by an earlier connection), `device`, `server_side`,
    `lock` (held while anything changes), `raw` (TCP by its borrowed descriptor), `client_address` (server: of the
    client, for `LinkGroups`), `served_by` (client: told which device serves the destination).
    """

    def __init__(
        self,
        fd: int,
        family: int,
        *,
        owner: object = None,
        server_side: bool,
        device: Device,
        buffer_size: int = handshake.DEFAULT_BUFFER,
        buffer_limit: int = 0,
        required: bool = False,
        settled: Callable[[Link], None] | None = None,
    ) -> None:
        """Start for a connected (or, for a client, about to be connected) TCP socket, whose descriptor is borrowed.

        Args:
            buffer_size, buffer_limit: of the region this side receives in, and up to which its ring may grow, bytes.
            owner: kept alive while a connection is established; never an object that refers to this one.
            required: falling back to TCP is an error.
            settled: called once when it is settled, with the lock held; must not wait.
        """
        self.server_side, self.device, self.required = server_side, device, required
        self.stage = Stage.AGREED
        self.connection: Connection | None = None
        self.code: int = 0
        self.why = ""
        self.error: Exception | None = None
        self.by_peer = self.reused = False
        self._settled = settled
        self._buffer_size, self._buffer_limit = buffer_size, buffer_limit
        self.raw = raw_socket(family, fd)
        self.raw.owner = owner
        self._fd = fd
        self.lock = threading.RLock()
        self._waiters: list[Callable[[], None]] = []
        self._machine: ClientHandshake | ServerHandshake | None = None
        self._nonce = 0
        self._directory: Directory | None = None
        self._claim: Claim | None = None
        self._began_s = time.monotonic()
        self._deadline_s = float("inf")
        self._wanted = self._sending = self._start_sent = False
        self._retracting = self._working = self._watched = self._claim_tells = False
        self._driven, self._lowat = 0, 1
        self._first = True
        self._given_away = False
        self._pid = os.getpid()
        self._unconfirmed = False
        self._rx: Region | None = None
        self._tx: Region | None = None
        self._ahead: threading.Event | None = None
        self._peer = DevId(0)
        self._pair: Pair | None = None
        self._noticing = 0
        self._server_devid: DevId | None = None
        self._verdict_s = float("inf")
        self._candidate: Offer | None = None
        self.client_address: Address | None = None
        self.served_by: Callable[[DevId], None] | None = None
        _undecided.add(self)

    # -- how it begins ----------------------------------------------------------------------------------------------

    def intended(self, directory: Directory, nonce: int) -> None:
        """Client: the intent is on its way to the directory."""
        self._directory, self._nonce = directory, nonce
        self.stage = Stage.WAITING

    def intending(self, command: Command, refused: Callable[[], None]) -> None:
        """Client: this command says whether the intent was recorded. `refused`: called when nobody listens there."""
        command.then(lambda: self._on_intend(command, refused))

    def _on_intend(self, command: Command, refused: Callable[[], None]) -> None:
        with self.lock:
            if self.stage is not Stage.WAITING:
                return  # an event has told
            # also while a RETRACT is under way: answers come in order, and ENOENT to that one means "claimed" only
            # if the intent was recorded
            assert self._directory is not None
            try:
                if not self._directory.intended(command):
                    refused()
                    self._not_in_the_directory(NOT_LISTED)
            except TransportError as exc:
                self._speak_tcp_unconfirmed(str(exc))
            except IsmError as exc:
                self._fall_back(Diagnosis.MEM, f"the directory refused: {exc}")
            self._changed()

    def on_directory(self, kind: EventType, devid: DevId) -> None:
        """Client: an event of the directory for this link's nonce (in the driver's service thread)."""
        with self.lock:
            self._server_devid = devid
            if self.stage is Stage.WAITING and kind in (EventType.CLAIMED, EventType.START):
                self._agree()
            if kind == EventType.START and self.stage is Stage.AGREED:
                self._wanted = True
                self._begin()
            self._changed()

    def offered(self, pair: Pair) -> None:
        """Client: a pair of regions is offered to the server for this connection."""
        self._pair = pair
        self.stage = Stage.WAITING

    def taken(self, pair: Pair) -> None:
        """Server: the client has offered this pair for the connection, and it is taken: there is nothing to shake."""
        with self.lock:
            self._pair = pair
            self._use_pair()
            self._changed()

    def notice(self) -> None:
        """Client: have it noticed that the offer is taken, though the program is in no call (it polls, perhaps)."""
        with self.lock:
            if self._pair is not None and self.stage is Stage.WAITING and not self._noticing:
                own, attached = self._pair.regions()
                try:
                    self.device.service.add(own.fileno(), _weak(self._on_bell, self.device.service, own.fileno()))
                except (IsmError, OSError):
                    return  # whoever waits looks
                self._noticing = own.fileno()
                if not offer.wait(attached):
                    self._pump()

    def _on_bell(self) -> None:
        """The server rang for an offer, or somebody who may not have: level-triggered, so it is reset first."""
        with self.lock:
            if self._noticing:
                drain(self._noticing)
        self.pump()

    def offer_taken(self) -> bool:
        """Client: look whether the offer is taken, and use it if so. True when the link is settled."""
        pair = self._pair
        if pair is None or self.stage is not Stage.WAITING:
            return self.settled
        with self.lock:
            self._look_at_offer()
            return self.settled

    def _look_at_offer(self) -> None:
        pair = self._pair
        if pair is not None and self.stage is Stage.WAITING:
            _own, attached = pair.regions()
            if offer.state(attached) == offer.TAKEN:
                self._use_pair()
                self._changed()

    def _use_pair(self) -> None:
        pair, self._pair = self._pair, None
        assert pair is not None
        assert pair.answer is not None
        own, attached = pair.regions()
        self._unwatch()
        self._stop_noticing(own)
        attached.on_event(None)
        own.on_event(None)
        self.reused = True
        try:
            self.connection = connection = self._connection(own, attached, pair.answer)
        except (IsmError, ValueError) as exc:
            own.close()
            attached.close()
            self._break(exc)
            return
        connection.client_address = pair.address
        self._write(BALLAST)
        self._started(connection)

    def _stop_noticing(self, own: Region) -> None:
        if self._noticing:
            self.device.service.remove(self._noticing)
            self._noticing = 0

    def _withdraw_offer(self) -> None:
        """Take the offer back, or use it if it is taken by now."""
        assert self._pair is not None
        own, attached = self._pair.regions()
        if not offer.withdraw(attached, load_kernels().exchange):
            self._use_pair()
            return
        self._pair = None
        self._stop_noticing(own)
        own.close()  # both were made ready for this connection; what the server made of that is not known
        attached.close()
        self._fall_back(Diagnosis.PEERNOSMC, "the server did not take the connection in time")

    def connected(self) -> None:
        """Client: TCP is connected now; from here the time to be claimed runs."""
        self._began_s = time.monotonic()

    def claiming(self, directory: Directory, command: Command) -> None:
        """Server: CLAIM is under way."""
        self._directory = directory
        self.stage = Stage.WAITING
        self._deadline_s = time.monotonic() + CLAIM_ANSWER_S
        command.then(lambda: self._on_claim(command))

    def agreed(self) -> None:
        """Both ends are configured to use shared memory: no directory is asked."""
        with self.lock:
            self._agree()

    def _on_claim(self, command: Command) -> None:
        with self.lock:
            if self.stage is not Stage.WAITING:
                return
            assert self._directory is not None
            try:
                claim = self._directory.claimed(command)
            except TransportError as exc:
                if isinstance(exc, DeviceGoneError):  # not answered, and never will be: nothing is claimed
                    self._fall_back(Diagnosis.INTERR, f"the device manager could not be asked: {exc}")
                else:
                    self._break(exc)
            except IsmError as exc:
                self._fall_back(Diagnosis.MEM, f"the directory refused: {exc}")
            else:
                if claim is None:
                    self._not_in_the_directory(Diagnosis.PEERNOSMC.words)
                else:
                    self._claim, self._nonce = claim, claim.nonce
                    self._agree()
            self._changed()

    def _not_in_the_directory(self, why: str) -> None:
        """The directory knows nothing of the other end: TCP, unless both are told to use shared memory all the same."""
        if self.required:
            self._agree()
        else:
            self._fall_back(Diagnosis.PEERNOSMC, why)

    def _agree(self) -> None:
        self.stage = Stage.AGREED
        self._deadline_s = float("inf")
        try:
            identity = handshake.identity_of(self.device)
        except ValueError as exc:
            self._break(exc)
            return
        kind = ServerHandshake if self.server_side else ClientHandshake
        self._machine = kind(identity, self._nonce)
        if self._given_away:
            self._decline_given_away()
            return
        if self.server_side or self._nonce:
            # a claimed client too, though its program may be in no call: a server that declines waits for its answer
            self._watch()
        if self._wanted:
            self._begin()

    # -- what the program wants -------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether it is known how bytes are sent."""
        return self.stage in _SETTLED

    @property
    def may_receive(self) -> bool:
        """Whether it is known how bytes are received: in TCP, what is left of a handshake was read too."""
        return self.stage in _SETTLED and (self.stage is not Stage.TCP or not self._to_be_drained())

    @property
    def unused(self) -> bool:
        """Whether the program has neither sent nor received: somebody else may, with the descriptor."""
        connection = self.connection
        moved = connection is not None and (connection.endpoint.sent_bytes or connection.endpoint.received_bytes)
        return not self._wanted and not moved and self.stage not in (Stage.CLOSED, Stage.BROKEN)

    def start(self, *, sending: bool) -> None:
        """Begin the handshake: the program wants to send, or to receive."""
        if self.settled:
            return
        with self.lock:
            if self._wanted and (self._sending or not sending):
                self._expire_if_due()
                return
            self._wanted = True
            if sending and not self._sending:
                self._sending = True
                if self.stage is Stage.WAITING and not self.server_side:
                    self._deadline_s = self._began_s + (REQUIRED_WAIT_S if self.required else CLAIM_WAIT_S)
            if self.stage is Stage.AGREED:
                self._begin()
            elif self.stage is Stage.WAITING:
                if not self.server_side:
                    self._look_at_offer()
                    self.notice()
                self._watch()  # bytes from a server that has not claimed are the application's; also `_look_for_tcp`
            self._expire_if_due()
            self._changed()

    def _begin(self) -> None:
        """Send what this side has to send first, if anything."""
        machine = self._machine
        if isinstance(machine, ClientHandshake) and machine.state is State.START:
            self.stage = Stage.TALKING
            self._deadline_s = self._patience(CLIENT_PATIENCE_S)
            self._write(machine.start())
            self._watch()
            self._allocate_ahead()
        elif self.server_side and self._sending and not self._start_sent:
            self._start_sent = True
            self._deadline_s = self._patience(SERVER_PATIENCE_S)
            if self._claim is not None and self._directory is not None:
                with contextlib.suppress(IsmError):
                    self._directory.start_nowait(self._claim)

    def _patience(self, seconds: float) -> float:
        """Until when the peer may let this side wait for its first message; for ever, where TCP is no way out.

        But not where it is only assumed that the peer uses shared memory: it may be a plain one.
        """
        assumed = not self._nonce and (not self.server_side or self._directory is not None)
        if self.required and assumed:
            seconds = handshake.MESSAGE_TIMEOUT_S
        elif self.required:
            seconds = float("inf")
        return time.monotonic() + seconds

    @property
    def deadline_s(self) -> float:
        """Until when, on the clock of `time.monotonic`, somebody who waits waits before he calls `expire`."""
        return self._deadline_s

    def expire(self) -> None:
        """Whoever waits has waited long enough, if the deadline has passed: the next step is taken."""
        with self.lock:
            self._expire_if_due()
            self._changed()

    def hurry(self) -> None:
        """Whoever called cannot wait (a non-blocking send): a client that is not claimed by now goes on in TCP."""
        with self.lock:
            if self.stage is Stage.WAITING and not self.server_side and not self.required:
                self._retract()

    def _expire_if_due(self) -> None:
        if time.monotonic() < self._deadline_s:
            return
        if self.stage is Stage.TCP:
            self._deadline_s = float("inf")
            self._pump()  # what cannot be told by now is data
        if self.stage in _SETTLED:
            return
        if self.stage is Stage.WAITING:
            if self.server_side:
                self._break(TransportError("the device manager did not say whether the client uses shared memory"))
            elif not self._retracting:
                self._retract()
            else:
                self._speak_tcp_unconfirmed("the device manager does not answer")
            return
        machine = self._machine
        assert machine is not None
        if self.server_side and machine.state is State.ACCEPTED:
            self._break(HandshakeError("the client's CONFIRM did not come in time", event="timeout"))
        elif machine.in_message:
            self._break(HandshakeError("the rest of a handshake message did not come in time", event="timeout"))
        elif self._working and self._may_decline():
            self._decline(Diagnosis.INTERR, TransportError("the device manager does not answer"))
        elif self._may_decline():
            self._decline(Diagnosis.TIMEOUT_CL, None)
        else:
            self._deadline_s = float("inf")  # the device is being asked: that has limits of its own

    def give_away(self) -> bool:
        """Settle for TCP now, if that is still possible without the peer's help.

        Returns: False while it cannot be said yet (wait for `on_change`), or when it is SMC or broken.
        """
        with self.lock:
            self._given_away = True
            if self.stage is Stage.WAITING and not self.server_side:
                self._retract()
            elif not self.settled and self._may_decline():
                self._decline_given_away()
            self._changed()
            return self.may_receive and self.stage is Stage.TCP

    def _decline_given_away(self) -> None:
        if self._has_ended():
            self._ended()  # nobody is left to be told, and TCP would answer with a reset
        else:
            self._decline(Diagnosis.OPTUNSUPP, None)

    def _may_decline(self) -> bool:
        """Whether this side may still go back to TCP; what the device is asked then comes to nothing."""
        machine = self._machine
        if machine is None:
            return False
        return machine.state in (State.START, State.PROPOSED) or (
            machine.state is State.ACCEPTED and not self.server_side
        )

    # -- RETRACT ----------------------------------------------------------------------------------------------------

    def _retract(self) -> None:
        if self._pair is not None:
            self._withdraw_offer()
            return
        if self._retracting:
            return
        self._retracting = True
        self._unwatch()
        self._deadline_s = time.monotonic() + RETRACT_WAIT_S
        assert self._directory is not None
        try:
            command = self._directory.retract_nowait(self._nonce)
        except IsmError as exc:
            self._speak_tcp_unconfirmed(str(exc))
            return
        command.then(lambda: self._on_retract(command))

    def _on_retract(self, command: Command) -> None:
        with self.lock:
            if self.stage is not Stage.WAITING:
                return
            assert self._directory is not None
            try:
                free = self._directory.retracted(command)
            except IsmError as exc:
                self._speak_tcp_unconfirmed(str(exc))
            else:
                if free:
                    self._fall_back(Diagnosis.PEERNOSMC, "the server did not claim the connection in time")
                else:
                    self._agree()
                    self._pump()
            self._changed()

    def _speak_tcp_unconfirmed(self, why: str) -> None:
        """The manager cannot say whether the server has claimed: if so, its DECLINE, with the nonce, is dropped."""
        self._unconfirmed = True
        self._fall_back(Diagnosis.INTERR, f"the device manager cannot be asked: {why}")

    # -- reading the handshake --------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Advance with what has come over TCP. Called when it is readable; harmless at any other time."""
        with self.lock:
            self._pump()
            self._changed()

    def _pump(self) -> None:
        try:
            while self._pump_one():
                pass
        except HandshakeError as exc:
            if exc.event == "EOF":
                self._ended()  # of what the application sends, nothing can have been on its way
            else:
                self._break(exc)
        except ConnectionResetError as exc:
            if self.settled:
                self._break(exc)
            else:
                self._ended()  # the peer closed, and left a message of the handshake unread
        except OSError as exc:
            self._break(exc)

    def _pump_one(self) -> bool:
        if self.stage is Stage.TCP:
            return self._drain_one()
        if self.stage is Stage.WAITING:
            self._look_at_offer()
            if self.stage is Stage.WAITING and self.server_side:
                self._look_for_tcp()
            elif self.stage is Stage.WAITING and self._peek(1) is not None:
                self._retract()
            return False
        machine = self._machine
        if self.stage in _SETTLED or machine is None or self._working or not machine.bytes_wanted:
            return False
        if self.server_side and self._first and self._nonce and not self._is_claimed_client():
            return False
        data = self._receive(machine.bytes_wanted)
        if data is None:
            return False
        if not data:
            machine.receive_eof()
            self._ended()
            return False
        event = machine.receive(data)
        if self._first:
            self._first, self.stage = False, Stage.TALKING
            self._deadline_s = min(self._deadline_s, time.monotonic() + handshake.MESSAGE_TIMEOUT_S)
        if event is not None:
            self._on_message(event)
        return True

    def _look_for_tcp(self) -> None:
        """Server that has no answer to its CLAIM yet: bytes that begin no handshake are those of a client in TCP."""
        first = self._peek(len(SMCR))
        if first is None:
            return
        if first and first in (SMCR[: len(first)], SMCD[: len(first)]):
            self._claim_tells = True
            self._unwatch()
        elif not self.required:
            self._fall_back(Diagnosis.PEERNOSMC, Diagnosis.PEERNOSMC.words)

    def _is_claimed_client(self) -> bool:
        """Look at the client's first bytes without taking them: do they show the nonce? If not, it speaks TCP."""
        first = self._peek(NONCE_END)
        if first is None:
            return False
        if not first:
            return True  # the end: the machine knows what it means
        verdict = self._verdict(first)
        if verdict is not False:
            return bool(verdict)
        assert self._machine is not None
        self._write(self._machine.decline(Diagnosis.PEERNOSMC))
        self._machine = None  # nothing of a handshake comes from it
        self._fall_back(Diagnosis.PEERNOSMC, "the client could not reach the device manager")
        return False

    def _verdict(self, first: bytes) -> bool | None:
        """Whether the peer's first bytes show the nonce; None while so few are there that it cannot be told.

        Then the descriptor wakes when there are enough, for as long as a message may take, or until the end.
        """
        verdict = carries_nonce(first, self._nonce)
        if verdict is None:
            now = time.monotonic()
            self._verdict_s = min(self._verdict_s, now + handshake.MESSAGE_TIMEOUT_S)
            if now < self._verdict_s and not hung_up(self._fd):
                self._set_lowat(NONCE_END)
                self._deadline_s = min(self._deadline_s, self._verdict_s)
                return None
            verdict = False
        if self.stage is Stage.TCP:
            self._deadline_s = float("inf")
        self._verdict_s = float("inf")
        self._set_lowat(1)
        return verdict

    def _on_message(self, event: object) -> None:
        match event:
            case Proposed():
                claim = self._claim
                said = [one for one in event.candidates if claim is None or one.devid == claim.devid]
                if not said:
                    self._decline(Diagnosis.NOSMCD2DEV, None)  # it proposes a device that is not its own
                    return
                self._candidate, self._peer = said[0], said[0].devid
                self._deadline_s = self._patience(CLIENT_PATIENCE_S)  # longer than that the client does not wait
                self._rx = handshake.kept_own(self.device, self._buffer_size, self._peer)
                if self._rx is not None:
                    self.reused = True
                    self._accept()
                else:
                    self._work(self._allocate)
            case PeerAccepted():
                self._on_accept(event)
            case Confirmed():
                self._on_confirm(event)
            case PeerDeclined():
                if event.reply:
                    self._write(event.reply)
                self.by_peer = True
                self._fall_back(event.code, event.words)
            case MustDecline():
                self._decline(event.code, None)
            case Drained():
                pass

    def _on_accept(self, answer: PeerAccepted) -> None:
        self._peer = answer.devid
        # whom the manager has named is known, unless the claim was learnt from a RETRACT: then this device is not meant
        named = self._server_devid
        if self._nonce and answer.devid != named and (named is not None or answer.devid == self.device.devid):
            self._decline(Diagnosis.NOSMCD2DEV, None)
            return
        try:
            self._tx = handshake.kept_attached(self.device, answer)
        except RemoteProtocolError as exc:
            self._decline(Diagnosis.INTERR, exc)
            return
        if self._rx is None and self._ahead is None:
            self._rx = handshake.kept_own(self.device, self._buffer_size, answer.devid)
            self.reused = self._rx is not None
        if self._tx is not None and self._rx is not None:
            self._confirm(answer)
        else:
            self._work(lambda: self._attach_and_allocate(answer))

    def _on_confirm(self, answer: Confirmed) -> None:
        # from here on the client may use shared memory: a failure can only break the connection
        tx = handshake.kept_attached(self.device, answer)
        if tx is not None:
            self._establish(tx, answer)
        else:
            self._work(lambda: self._attach(answer))

    # -- with the device, in a worker -------------------------------------------------------------------------------

    def _work(self, job: Callable[[], None]) -> None:
        self._working = True
        self._unwatch()
        self.device.service.make_way()
        try:
            workers.submit(job)
        except RuntimeError as exc:
            self._working = False
            self._device_failed(TransportError(f"no thread can be started: {exc}"))

    def _allocate_ahead(self) -> None:
        """Client whose server's device the manager has named: make the region while the server makes its own.

        Whatever goes wrong is nothing yet: when the server has accepted it is tried again, with all that is tried then.
        """
        peer = self._server_devid
        if self.stage in _SETTLED or peer is None:
            return
        if not handshake.must_allocate(self.device, self._buffer_size, peer):
            return
        self._ahead = done = threading.Event()
        try:
            workers.submit(lambda: self._make_ahead(peer, done))
        except RuntimeError:
            self._ahead = None

    def _make_ahead(self, peer: DevId, done: threading.Event) -> None:
        made: Region | None = None
        try:
            made = handshake.allocate_once(self.device, self._buffer_size, peer)
        except (IsmError, OSError):
            pass  # see above
        finally:
            with self.lock:
                if made is not None and self.stage not in _SETTLED:
                    self._rx, made = made, None
                self._ahead = None
            done.set()
            if made is not None:
                made.close()  # closed, declined or broken meanwhile

    def _wait_ahead(self) -> None:
        ahead = self._ahead
        if ahead is not None:
            ahead.wait()  # it was given to the workers before, so it is under way, and waits for the device alone

    def _let_go_ahead(self) -> bool:
        """Give back what was made ahead: the server's region needs the room. Returns whether there was anything."""
        self._wait_ahead()
        if self._rx is None or self.reused:
            return False
        self._rx.close()
        self._rx = None
        return True

    def _allocate(self) -> None:
        self._finish_work(lambda: self._ask(None), self._accept)

    def _attach_and_allocate(self, answer: PeerAccepted) -> None:
        self._finish_work(lambda: self._ask(answer), lambda: self._confirm(answer))

    def _attach(self, answer: Confirmed) -> None:
        tx: list[Region | Nowhere] = []

        def ask() -> None:
            try:
                tx.append(handshake.attach(self.device, answer))
            except DeviceError as exc:
                if exc.ack != Ack.ENOENT:
                    raise
                # the client has closed, or died, since (or it lies, and gets an end): what it sent is here all the same
                tx.append(Nowhere())

        self._finish_work(ask, lambda: self._establish(tx[0], answer))
        if tx and self.connection is None:
            tx[0].close()  # it was closed, or broken, meanwhile

    def _ask(self, answer: PeerAccepted | None) -> None:
        if answer is not None and self._tx is None:
            try:
                self._tx = handshake.attach(self.device, answer)
            except QuotaError:
                if not self._let_go_ahead():
                    raise
                self._tx = handshake.attach(self.device, answer)  # and a smaller one is made, perhaps
            except DeviceError as exc:
                if exc.ack == Ack.ENOENT:
                    _wait_for_end(self._fd)  # a server that closes lets its region go first
                raise
        self._wait_ahead()
        if self._rx is None:
            self._rx = handshake.allocate(self.device, self._buffer_size, self._peer, leave_room=self.server_side)

    def _finish_work(self, ask: Callable[[], None], then: Callable[[], None]) -> None:
        failure: Exception | None = None
        try:
            ask()
        except (IsmError, OSError) as exc:
            failure = exc
        with self.lock:
            self._working = False
            if self.stage in _SETTLED:
                self._release()  # closed, declined or broken meanwhile
            elif failure is not None:
                self._device_failed(failure)
            else:
                then()
                self._pump()
            self._changed()

    def _device_failed(self, exc: Exception) -> None:
        machine = self._machine
        if machine is None or machine.state in (State.CONFIRMED, State.BROKEN):
            self._break(exc)
        elif not self.server_side and isinstance(exc, DeviceError) and exc.ack == Ack.ENOENT and self._has_ended():
            self._ended()  # the server has closed since
        elif isinstance(exc, QuotaError) and exc.ack == Ack.ENOSPC:
            self._decline(Diagnosis.MAX_DMB, exc)
        elif isinstance(exc, DeviceError | OSError) or (isinstance(exc, TransportError) and exc.errno in _SHORT):
            self._decline(Diagnosis.MEM, exc)
        else:
            self._decline(Diagnosis.INTERR, exc)

    # -- the last messages ------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert isinstance(self._machine, ServerHandshake)
        assert self._rx is not None
        self._write(self._machine.accept(self._rx.token, handshake.announced(self._rx), self._candidate))
        self._deadline_s = time.monotonic() + handshake.MESSAGE_TIMEOUT_S
        self._watch()

    def _confirm(self, answer: PeerAccepted) -> None:
        assert isinstance(self._machine, ClientHandshake)
        rx, tx = self._rx, self._tx
        assert rx is not None
        assert tx is not None
        try:
            connection = self.connection = self._connection(rx, tx, answer)
            self._rx = self._tx = None
            message = self._machine.confirm(rx.token, handshake.announced(rx))
        except (IsmError, ValueError) as exc:
            self._decline(Diagnosis.INTERR, exc)
            return
        self._unwatch()
        self._write(message + BALLAST)
        self._started(connection)

    def _establish(self, tx: Region | Nowhere, answer: Confirmed) -> None:
        rx = self._rx
        assert rx is not None
        self._unwatch()
        try:
            self.connection = connection = self._connection(rx, tx, answer)
        except (IsmError, ValueError) as exc:
            tx.close()
            self._break(exc)
            return
        self._rx = None
        if self._claim is not None:
            connection.client_address = self.client_address
        self._write(BALLAST)
        self._started(connection)

    def _connection(self, rx: Region, tx: Region | Nowhere, peer: PeerAnswer) -> Connection:
        limit = self._buffer_limit
        return Connection(self.raw, rx, tx, peer, client_side=not self.server_side, buffer_limit=limit)

    def _started(self, connection: Connection) -> None:
        if self.stage in _SETTLED:
            return  # the write has found it broken
        try:
            connection.start()
        except (IsmError, OSError) as exc:
            self._break(exc)
            return
        self._settle(Stage.SMC)

    # -- how it ends ------------------------------------------------------------------------------------------------

    def _decline(self, code: Diagnosis, cause: Exception | None) -> None:
        assert self._machine is not None
        self._write(self._machine.decline(code))
        self._fall_back(code, code.words, cause)

    def _fall_back(self, code: int, why: str, cause: Exception | None = None) -> None:
        if self.stage in _SETTLED:
            return
        self.code, self.why = int(code), why if cause is None else f"{why}: {cause}"
        self._release()
        if self.required:
            self._break(DeclinedError(int(code), why, by_peer=self.by_peer, cause=cause))
            return
        self._settle(Stage.TCP)
        if self._to_be_drained():
            self._watch()
        else:
            self._unwatch()

    def _ended(self) -> None:
        """The peer closed before it could send anything: an ordinary end, also where shared memory is required."""
        if self.required:
            with contextlib.suppress(OSError):
                self.raw.shutdown(socket.SHUT_WR)  # so that nothing goes over TCP all the same
            self.required = False
        self._fall_back(Diagnosis.PEERNOSMC, "the peer closed the connection before the handshake")

    def _break(self, error: Exception) -> None:
        if self.stage in (Stage.BROKEN, Stage.CLOSED):
            return
        self.error = error
        self._unwatch()
        self._release()
        self._settle(Stage.BROKEN)
        with contextlib.suppress(OSError):
            self.raw.shutdown(socket.SHUT_RDWR)

    def _settle(self, stage: Stage) -> None:
        self.stage = stage
        self._deadline_s = float("inf")
        if stage is Stage.SMC and self.served_by is not None and self.connection is not None:
            self.served_by(self.connection.peer.devid)
        if self._directory is not None and not self.server_side:
            self._directory.forget(self._nonce)
        settled, self._settled = self._settled, None
        if settled is not None:
            settled(self)

    def _release(self) -> None:
        if not self._working:  # else the worker does it at its end: it may be about to put one there
            for region in (self._tx, self._rx):
                if region is not None:
                    region.close()
            self._tx = self._rx = None
        if self.connection is not None:
            self.connection.close(abort=True)
            self.connection = None

    def move(self, fd: int) -> None:
        """In SMC: know the TCP connection by another descriptor, borrowed, from now on. Raises OSError."""
        with self.lock:
            if self.connection is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            raw = raw_socket(self.raw.family, fd)
            self.connection.move(raw)
            self.raw.detach()
            self.raw, self._fd = raw, fd

    def close(self) -> None:
        """Give the link up; the TCP socket is the caller's to close after it. Idempotent."""
        if self._pid != os.getpid():
            self.stage = Stage.CLOSED  # a copy made by fork: queues and regions are the parent's
            self.raw.detach()
            return
        with self.lock:
            stage, connection = self.stage, self.connection
            if stage is Stage.CLOSED:
                return
            self._unwatch()
            if self._pair is not None:
                self._settled = None
                self._withdraw_offer()
                stage, connection = self.stage, self.connection
            if stage is Stage.WAITING and not self.server_side and self._directory is not None:
                with contextlib.suppress(IsmError):
                    self._directory.retract_nowait(self._nonce)
            if stage not in _SETTLED:
                self._release()
                self._settle(Stage.CLOSED)
                if stage in (Stage.AGREED, Stage.TALKING):
                    # what came is a handshake, not data: the peer gets an end of file, not a reset
                    with contextlib.suppress(OSError):
                        self.raw.recv(4096, socket.MSG_DONTWAIT)
            else:
                if stage is Stage.TCP and self._to_be_drained():
                    self._pump()  # bytes left unread would make the end a reset
                self.stage = Stage.CLOSED
                if connection is not None:
                    connection.close()
                    if connection.closed_first:
                        # so that the peer's TCP sees an end, and not a reset; the peer's own end is one, and then
                        # neither side keeps the port in TIME_WAIT
                        with contextlib.suppress(OSError):
                            self.raw.recv(len(BALLAST), socket.MSG_DONTWAIT)
            self.raw.detach()
            self._changed()

    def __del__(self) -> None:
        if getattr(self, "_rx", None) is not None or getattr(self, "_tx", None) is not None:
            _thread.start_new_thread(self._release, ())  # not here: a destructor may run inside the driver's locks
        pair = getattr(self, "_pair", None)
        if pair is not None and self._pid == os.getpid():
            _thread.start_new_thread(_abandon, (pair,))

    # -- after a fallback -------------------------------------------------------------------------------------------

    def _to_be_drained(self) -> bool:
        return self._unconfirmed or (self._machine is not None and self._machine.bytes_wanted > 0)

    def _drain_one(self) -> bool:
        machine = self._machine
        if self._unconfirmed and machine is None:
            return self._drop_declining()
        if machine is None or not machine.bytes_wanted:
            self._unwatch()
            return False
        if self.server_side and self._first and self._nonce:
            first = self._peek(NONCE_END)
            if not first:
                return self._drained() if first is not None else False
            verdict = self._verdict(first)
            if verdict is None:
                return False
            self._first = False
            if not verdict:
                self._machine = None  # a client that could not reach the manager: it speaks TCP
            return True
        data = self._receive(machine.bytes_wanted)
        if data is None:
            return False
        if not data:
            return self._drained()
        event = machine.receive(data)
        if isinstance(event, PeerDeclined) and event.reply:
            self._write(event.reply)
        return True

    def _drained(self) -> bool:
        """Nothing of a handshake comes any more: the end is the application's to see."""
        self._machine = None
        self._set_lowat(1)
        return True

    def _drop_declining(self) -> bool:
        """Take the server's DECLINE out of the stream if it is there: that is, if the server has claimed."""
        first = self._peek(NONCE_END)
        if first is None:
            return False
        verdict = self._verdict(first) if first else False
        if verdict is None:
            return False
        self._set_lowat(1)
        self._unconfirmed = False
        if verdict:
            self._machine = ClientHandshake(handshake.identity_of(self.device), self._nonce)
            self._machine.decline(Diagnosis.INTERR)  # not sent: the server takes what comes from here for data
        return bool(verdict)

    # -- TCP --------------------------------------------------------------------------------------------------------

    def _receive(self, count: int) -> bytes | None:
        try:
            return self.raw.recv(count, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return None

    def _peek(self, count: int) -> bytes | None:
        try:
            return self.raw.recv(count, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as exc:
            if exc.errno == errno.ENOTCONN and self.stage is Stage.WAITING:
                return None  # connecting still
            raise

    def _has_ended(self) -> bool:
        """Whether the peer has closed or reset TCP, and sent nothing that is unread."""
        try:
            return self._peek(1) == b""
        except OSError:
            return True

    def _set_lowat(self, count: int) -> None:
        if count == self._lowat:
            return
        self._lowat = count
        with contextlib.suppress(OSError):
            self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    def _write(self, data: bytes) -> None:
        """Write a message whole: so little always fits into a socket that is otherwise idle."""
        try:
            sent = self.raw.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as exc:
            self._break(exc)
            return
        if sent != len(data):
            self._break(HandshakeError("the peer's TCP takes no handshake message", event="timeout"))

    def _watch(self) -> None:
        """Have the driver's thread pump when TCP is readable, unless somebody who waits does."""
        if self._watched or self._driven or self.stage is Stage.CLOSED:
            return
        try:
            self.device.service.add(self._fd, _weak(self.pump, self.device.service, self._fd))
        except (DeviceGoneError, TransportError):
            return  # whoever waits pumps
        except OSError:
            return  # not connected any more: whoever looks finds out
        self._watched = True

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self.device.service.remove(self._fd)

    # -- waiting ----------------------------------------------------------------------------------------------------

    def watched_fds(self) -> tuple[int, ...]:
        """The descriptors by which the driver's thread learns of what this link waits for, besides the queues'."""
        return (self._fd, self._noticing) if self._noticing else (self._fd,)

    def on_change(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, from any thread and with the lock held, once: at the next change. It must not wait."""
        with self.lock:
            self._waiters.append(wake)

    def forget(self, wake: Callable[[], None]) -> None:
        """Take back `on_change`; unknown ones are ignored."""
        with self.lock, contextlib.suppress(ValueError):
            self._waiters.remove(wake)

    def _changed(self) -> None:
        waiters, self._waiters = self._waiters, []
        for wake in waiters:
            wake()

    def driving(self, begin: bool) -> None:
        """A thread that waits polls TCP itself, and pumps, from `begin` True to `begin` False."""
        with self.lock:
            self._driven += 1 if begin else -1
            if begin:
                self._unwatch()
            elif not self._driven and self.reads():
                self._watch()

    def reads(self) -> bool:
        """Whether what comes over TCP next is this link's to read (or to look at)."""
        machine = self._machine
        if self.stage is Stage.WAITING:
            return self._wanted and not self._retracting and not self._claim_tells
        if self.stage is Stage.TCP:
            return self._to_be_drained()
        return not self.settled and machine is not None and not self._working and machine.bytes_wanted > 0


def raw_socket(family: int, fd: int) -> _Raw:
    """Make an object for the descriptor that has no timeout, and leaves the descriptor as it is."""
    if socket.getdefaulttimeout() is None:
        return _Raw(family, socket.SOCK_STREAM, 0, fd)
    blocking = os.get_blocking(fd)
    made = _Raw(family, socket.SOCK_STREAM, 0, fd)
    made.settimeout(None)
    os.set_blocking(fd, blocking)
    return made


def _wait_for_end(fd: int) -> None:
    """Wait a moment in this thread for the other side of a TCP connection to end it."""
    poll = select.poll()
    with contextlib.suppress(OSError):
        poll.register(fd, select.POLLRDHUP)
        poll.poll(END_WAIT_S * 1000)


def _abandon(pair: Pair) -> None:
    """Let go of a pair that was offered for a connection which nobody waits for any more."""
    for region in pair.regions():
        region.close()


_undecided: weakref.WeakSet[Link] = weakref.WeakSet()


def _after_fork() -> None:
    """Links are the parent's, decided or not: in the child they are closed, and locks that nobody will release new."""
    for link in list(_undecided):
        link.lock = threading.RLock()
        link.stage = Stage.CLOSED
    _undecided.clear()


os.register_at_fork(after_in_child=_after_fork)


def _weak(method: Callable[[], None], service: Service, fd: int) -> Callable[[], None]:
    """Return a callable that calls the bound method for as long as its object lives, and then ends the watch."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is not None:
            alive()
        else:
            service.remove(fd)  # dropped without `close`, and the descriptor lives on

    return call
