# SPDX-License-Identifier: Apache-2.0
"""The directory of the device manager, as a driver uses it: who listens where, and who means to connect to whom.

It owns the commands of class DIRECTORY and hands its events to whoever listens for a nonce; what they decide for a TCP
connection is in `docs/directory.md`. Addresses are 16 bytes in network order, IPv4 as v4-mapped IPv6. Usable from any
thread. Commands whose names end in `_nowait`, and `withdraw`, never wait, not even for a free chain, and may be used
in callbacks of the driver; the others may not.

Whether a connection uses SMC hangs on what became of a command, so: a command that raises DeviceGoneError was not
answered and never will be; one that is not done, for however long, may still be answered; of one that raises another
TransportError nobody can say (the device was given up while its manager did not answer).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ism.driver.control import Command, ControlQueue, ack_error
from ism.driver.events import IntentEvent
from ism.errors import LocalProtocolError, RemoteProtocolError
from ism.ids import DevId
from ism.layout import Struct
from ism.virtio.ism_spec import (
    Ack,
    ClaimReply,
    ClaimRequest,
    CommandClass,
    DirectoryCommand,
    EventType,
    IntendRequest,
    ListenerRequest,
    LookupReply,
    RetractRequest,
    StartRequest,
)

log = logging.getLogger("ism.driver")

OnIntent = Callable[[EventType, DevId], None]

_ADVICE = {
    Ack.ENOENT: "the directory knows of nothing like it",
    Ack.ENOMEM: "the device has too many listeners or intents, or sends too many commands: raise its quota",
    Ack.ERR: "the address is a wildcard or belongs to another device (`addresses` in the manager's configuration), a "
    "port or nonce is 0, or the nonce or the four-tuple is in use",
}


@dataclass(frozen=True, slots=True)
class FourTuple:
    """A TCP connection as one of its ends sees it: addresses of 16 bytes, ports, that end's network namespace."""

    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    scope: int


@dataclass(frozen=True, slots=True)
class Claim:
    """An intent that this device has claimed: the client's `nonce` and device."""

    nonce: int
    devid: DevId


class Directory:
    """The directory as one device sees it.

    Attributes: `unknown_events` (events dropped because nobody listens for their nonce; a peer may cause them).
    """

    def __init__(
        self, control: ControlQueue, check_usable: Callable[[], None], check_may_wait: Callable[[], None]
    ) -> None:
        """Args: `check_usable`, `check_may_wait`: raise where no command, or none that waits, may be used."""
        self._control, self._check_usable, self._check_may_wait = control, check_usable, check_may_wait
        self._lock = threading.Lock()
        self._listeners: dict[int, OnIntent] = {}
        self.unknown_events = 0

    # -- listeners --------------------------------------------------------------------------------------------------

    def publish(self, address: bytes, port: int, scope: int) -> None:
        """Say that this device listens at an address and port; counted.

        Args: `address`: a concrete one; 127.0.0.0 (v4-mapped) stands for every address of 127/8.
        Raises: DeviceError (ERR: a wildcard, or another device's address), QuotaError, DeviceGoneError, TransportError,
            LocalProtocolError (from a callback of the driver, or an address that is not 16 bytes).
        """
        self._check_may_wait()
        command = self._listener(DirectoryCommand.PUBLISH, address, port, scope, in_line=False)
        command.wait()
        self.published(command)

    def publish_nowait(self, address: bytes, port: int, scope: int) -> Command:
        """As `publish`, without waiting; `published` reads the answer. Raises DeviceGoneError, LocalProtocolError."""
        return self._listener(DirectoryCommand.PUBLISH, address, port, scope)

    def published(self, command: Command) -> None:
        """Look at a command of `publish_nowait` that is done. Raises as `publish`."""
        _agreed(command)

    def withdraw(self, address: bytes, port: int, scope: int) -> Command:
        """Undo one `publish`; never waits. Raises DeviceGoneError (then nothing is published any more)."""
        return self._listener(DirectoryCommand.WITHDRAW, address, port, scope)

    def lookup(self, address: bytes, port: int, scope: int) -> int:
        """Return how many devices publish a destination, 0 for none. Raises as `publish`."""
        self._check_may_wait()
        command = self._listener(DirectoryCommand.LOOKUP, address, port, scope, in_line=False)
        command.wait()
        return self.looked_up(command)

    def lookup_nowait(self, address: bytes, port: int, scope: int) -> Command:
        """As `lookup`, without waiting; `looked_up` reads the answer. Raises DeviceGoneError, LocalProtocolError."""
        return self._listener(DirectoryCommand.LOOKUP, address, port, scope)

    def looked_up(self, command: Command) -> int:
        """Return what became of a command of `lookup_nowait` that is done. Returns and raises as `lookup`."""
        return LookupReply.unpack(_body(command, LookupReply)).listeners if _there(command) else 0

    # -- the client's side ------------------------------------------------------------------------------------------

    def intend(self, connection: FourTuple, nonce: int) -> bool:
        """Announce a connection before it is made; `listen` for the nonce before.

        Args: `nonce`: 64 random bits, not 0, never used before.
        Returns: False when nobody publishes the destination: then nothing is recorded.
        Raises: DeviceError (ERR), QuotaError: nothing is recorded; DeviceGoneError; TransportError (no answer in time:
            it may be recorded); LocalProtocolError (from a callback of the driver, or values that do not fit).
        """
        self._check_may_wait()
        command = self._intend(connection, nonce, in_line=False)
        command.wait()
        return self.intended(command)

    def intend_nowait(self, connection: FourTuple, nonce: int) -> Command:
        """As `intend`, without waiting; `intended` reads the answer. Raises DeviceGoneError, LocalProtocolError."""
        return self._intend(connection, nonce, in_line=True)

    def intended(self, command: Command) -> bool:
        """Return what became of a command of `intend_nowait` that is done. Returns and raises as `intend`."""
        return _there(command)

    def retract(self, nonce: int) -> bool:
        """Take an intent back.

        Returns: True: nobody has claimed it, nor ever will; False: it is claimed (or was never made).
        Raises: DeviceGoneError, TransportError (no answer in time): nobody can say. LocalProtocolError (from a
            callback of the driver).
        """
        self._check_may_wait()
        command = self._command(DirectoryCommand.RETRACT, RetractRequest(nonce=nonce), in_line=False)
        command.wait()
        return self.retracted(command)

    def retract_nowait(self, nonce: int) -> Command:
        """As `retract`, without waiting; `retracted` reads the answer. Raises DeviceGoneError."""
        return self._command(DirectoryCommand.RETRACT, RetractRequest(nonce=nonce))

    def retracted(self, command: Command) -> bool:
        """Return what became of a command of `retract_nowait` that is done. Returns and raises as `retract`."""
        return _there(command)

    def listen(self, nonce: int, callback: OnIntent) -> None:
        """Have `callback(kind, devid of the server)` called for each event of an intent, CLAIMED or START.

        It is called in the driver's service thread and must not wait for the device. An event may come before the
        answer to `intend` is seen. Events can be lost (when very many are under way): `retract` tells.
        Raises: ValueError when somebody listens for the nonce already.
        """
        with self._lock:
            if nonce in self._listeners:
                raise ValueError(f"somebody listens for nonce {nonce:#x} already")
            self._listeners[nonce] = callback

    def forget(self, nonce: int) -> None:
        """Listen for a nonce no longer; unknown ones are ignored. A callback that runs now may still finish."""
        with self._lock:
            self._listeners.pop(nonce, None)

    # -- the server's side ------------------------------------------------------------------------------------------

    def claim_nowait(self, connection: FourTuple) -> Command:
        """Claim the intent of an accepted connection, as this end sees it; `claimed` reads the answer.

        Raises: DeviceGoneError, LocalProtocolError (values that do not fit): nothing is claimed.
        """
        request = ClaimRequest(
            scope=connection.scope,
            local_address=_address(connection.local),
            remote_address=_address(connection.remote),
            local_port=connection.local_port,
            remote_port=connection.remote_port,
        )
        return self._command(DirectoryCommand.CLAIM, request)

    def claimed(self, command: Command) -> Claim | None:
        """Return what became of a command of `claim_nowait` that is done.

        Returns: the claim; None when there is no such intent.
        Raises: DeviceGoneError, QuotaError (too many commands), DeviceError, RemoteProtocolError: nothing is claimed.
            Another TransportError: nobody can say. LocalProtocolError: the command is not done.
        """
        if not _there(command):
            return None
        reply = ClaimReply.unpack(_body(command, ClaimReply))
        return Claim(reply.nonce, DevId(reply.devid))

    def start_nowait(self, claim: Claim) -> Command:
        """Tell the client of a claimed connection to begin, once; ENOENT when it cannot be told. Never waits."""
        return self._command(DirectoryCommand.START, StartRequest(nonce=claim.nonce, devid=claim.devid))

    # -- inner ------------------------------------------------------------------------------------------------------

    def deliver(self, event: IntentEvent) -> None:
        """Hand an event to whoever listens for it (the device's side)."""
        with self._lock:
            callback = self._listeners.get(event.nonce)
            if callback is None:
                self.unknown_events += 1
                return
        try:
            callback(event.kind, DevId(event.devid))
        except Exception:
            log.exception("a callback of the directory failed")

    def _command(self, command: DirectoryCommand, data: Struct, *, in_line: bool = True) -> Command:
        self._check_usable()
        return self._control.submit(CommandClass.DIRECTORY, command, data, command.name, in_line=in_line)

    def _listener(
        self, command: DirectoryCommand, address: bytes, port: int, scope: int, *, in_line: bool = True
    ) -> Command:
        return self._command(
            command, ListenerRequest(address=_address(address), port=port, scope=scope), in_line=in_line
        )

    def _intend(self, connection: FourTuple, nonce: int, *, in_line: bool) -> Command:
        request = IntendRequest(
            nonce=nonce,
            scope=connection.scope,
            local_address=_address(connection.local),
            remote_address=_address(connection.remote),
            local_port=connection.local_port,
            remote_port=connection.remote_port,
        )
        return self._command(DirectoryCommand.INTEND, request, in_line=in_line)


def _address(address: bytes) -> bytes:
    if len(address) != 16:
        raise LocalProtocolError(f"an address has 16 bytes, IPv4 as v4-mapped IPv6, not {len(address)}")
    return address


def _ack(command: Command) -> int:
    if not command.done:
        raise LocalProtocolError(f"{command.name} is not answered yet")
    return command.wait()[0]


def _agreed(command: Command) -> None:
    """Return after OK; any other answer, or none, raises."""
    ack = _ack(command)
    if ack != Ack.OK:
        raise ack_error(command.name, ack, advice=_ADVICE)


def _there(command: Command) -> bool:
    """Tell OK from ENOENT; any other answer, or none, raises."""
    if _ack(command) == Ack.ENOENT:
        return False
    _agreed(command)
    return True


def _body(command: Command, kind: type[Struct]) -> bytes:
    reply = command.wait()
    if len(reply) < 1 + kind.SIZE:
        raise RemoteProtocolError(f"{command.name}: the reply ends after {len(reply)} bytes", event="reply")
    return reply[1:]
