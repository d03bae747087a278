# SPDX-License-Identifier: Apache-2.0
"""Run a CLC handshake over a TCP socket and set up the two regions of the connection (trio).

`handshake_machine` decides, this module reads, writes and talks to the device. One region per direction: each side
allocates the one it receives in, grants it to the other's device alone, and attaches the other's.

    client                                                server
    PROPOSAL (gid, devid) ------------------------------>  alloc rx, grant it to devid
    attach it, alloc rx, grant <------- ACCEPT (token, size)
    CONFIRM (token, size) ------------------------------>  attach it

Who may lie: the peer, in every field; the device manager is trusted. A token is attached only when this device does
not hold it already (a peer that named another connection's region would write into that connection), and when the
region is as large as announced. Whatever fails, everything allocated is released.

A handshake that is cancelled goes on where it was when `run` is called again: every byte read is in the machine, every
region in the object, and what is written is written whole.
"""

from __future__ import annotations

import _thread
import functools
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from ism.driver import Device, Region
from ism.errors import DeviceError, IsmError, RemoteProtocolError, TransportError
from ism.ids import DevId
from ism.smc.connection import Connection, Nowhere
from ism.smc.diagnosis import Diagnosis, HandshakeError
from ism.smc.handshake_machine import (
    ClientHandshake,
    ClosedBeforeStart,
    Confirmed,
    MustDecline,
    PeerAccepted,
    PeerAnswer,
    PeerDeclined,
    Proposed,
    ServerHandshake,
    State,
)
from ism.smc.identity import Identity
from ism.virtio.ism_spec import Ack, Permission

MESSAGE_TIMEOUT_S = 6.0
"""How long the rest of a message, and the CONFIRM after an ACCEPT, may take (Linux: CLC wait time)."""

DEFAULT_BUFFER = 1024 * 1024
"""Bytes of the region each side receives in."""

SMALLEST_BUFFER = 16 * 1024
"""Less cannot be announced (CLC size code 0)."""

_THREADS = 32
"""Handshakes that ask the device at once; a device that does not answer keeps only these threads, not the program's."""
_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("ism.smc handshake threads")

_PEER_RIGHTS = Permission.READ | Permission.WRITE | Permission.ATTACH
_READ_WRITE = Permission.READ | Permission.WRITE
_T = TypeVar("_T")
_M = TypeVar("_M", ClientHandshake, ServerHandshake)


class DeclinedError(IsmError):
    """One side declined shared memory. Attributes: `code` (CLC diagnosis), `words`, `by_peer`."""

    def __init__(self, code: int, words: str, *, by_peer: bool, cause: Exception | None = None) -> None:
        self.code, self.words, self.by_peer = code, words, by_peer
        who = "the peer" if by_peer else "this side"
        why = f": {cause}" if cause is not None else ""
        super().__init__(f"{who} declined shared memory: {words} (0x{code:08x}){why}")


class ClosedByPeerError(IsmError):
    """The peer closed the TCP connection before the first byte of the handshake: an ordinary end of file."""


def identity_of(device: Device) -> Identity:
    """What this process says of itself, through the given device."""
    return Identity(gid=device.gid, devid=device.devid, host=socket.gethostname(), link_id=os.getpid() & 0xFFFFFFFF)


def allocate(device: Device, size: int, peer: DevId) -> Region:
    """Make the region this side receives in: bound to an interrupt, granted to the peer's device only."""
    grants = [] if peer == device.devid else [(_PEER_RIGHTS, peer)]  # the owner needs no grant
    return device.alloc(max(size, SMALLEST_BUFFER), interrupt=True, grants=grants)


def attach(device: Device, answer: PeerAnswer) -> Region:
    """Attach the peer's region.

    Raises: RemoteProtocolError when the token is not the peer's to give or the region is smaller than announced;
    DeviceError when the device refuses.
    """
    region = device.attach(answer.token, _READ_WRITE, offered_by=answer.devid)
    if region.length < answer.size:
        region.close()
        raise RemoteProtocolError(
            f"the peer announced {answer.size} bytes, its region has {region.length}", event="buffer size"
        )
    return region


async def _in_thread(function: Callable[..., _T], *args: object) -> _T:
    """Ask the device in a thread. Not to be abandoned: what it gains must not be lost; so cancellation waits for it."""
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_THREADS)
        _limiter.set(limiter)
    return await trio.to_thread.run_sync(functools.partial(function, *args), limiter=limiter)


class _End(ABC, Generic[_M]):
    """What both ends share: the socket, the machine, and the regions held so far."""

    _rx: Region | None = None
    _tx: Region | None = None
    _connection: Connection | None = None

    def __init__(self, sock: trio.socket.SocketType, device: Device, buffer_size: int, machine: _M) -> None:
        self._sock, self._device, self._buffer_size = sock, device, buffer_size
        self._machine: _M = machine
        self._patient = True

    async def run(self) -> Connection:
        """Run the handshake and return the connection, which is the caller's from then on.

        Raises: DeclinedError, ClosedByPeerError, RemoteProtocolError (HandshakeError), DeviceError, TransportError,
            OSError of the socket, ClosedResourceError. Everything is released then.
        Cancellation: nothing is lost; call it again, or `close`.
        """
        try:
            return await self._run()
        except trio.Cancelled:
            raise
        except BaseException:
            self.close()
            raise

    @abstractmethod
    async def _run(self) -> Connection: ...

    def close(self) -> None:
        """Release what a handshake that was given up holds, also a connection that it made. Idempotent."""
        if self._connection is not None:
            self._connection.close(abort=True)
        else:
            for region in (self._tx, self._rx):
                if region is not None:
                    region.close()
        self._tx = self._rx = None

    def __del__(self) -> None:
        if self._connection is None and (self._rx is not None or self._tx is not None):
            _thread.start_new_thread(self.close, ())  # not here: a destructor may run inside the driver's locks

    async def _read(self) -> Proposed | PeerAnswer:
        """Read one message that goes on. While `_patient` its first byte may take for ever, as on any idle connection.

        Raises: HandshakeError, ClosedByPeerError, DeclinedError, OSError.
        """
        machine = self._machine
        with trio.CancelScope() as limit:
            while True:
                if not self._patient:
                    limit.deadline = min(limit.deadline, trio.current_time() + MESSAGE_TIMEOUT_S)
                data = await self._sock.recv(machine.bytes_wanted)
                self._patient = False
                if not data:
                    if isinstance(machine.receive_eof(), ClosedBeforeStart):
                        raise ClosedByPeerError("the peer closed the connection before the handshake")
                elif (event := machine.receive(data)) is not None:
                    break
        if limit.cancelled_caught:
            raise HandshakeError(
                f"the peer's handshake message did not come whole within {MESSAGE_TIMEOUT_S:g} s",
                state=machine.state.value,
                event="timeout",
            )
        if isinstance(event, PeerDeclined):
            await self._write(event.reply)
            raise DeclinedError(event.code, event.words, by_peer=True)
        if isinstance(event, MustDecline):
            raise await self._declined(event.code, None)
        assert isinstance(event, Proposed | PeerAnswer)  # Drained comes only after a DECLINE of this side
        return event

    async def _write(self, data: bytes) -> None:
        """Write a message whole, also when cancelled: so little always fits into a socket that is otherwise idle."""
        view = memoryview(data)
        with trio.CancelScope(deadline=trio.current_time() + MESSAGE_TIMEOUT_S, shield=True):
            while view:
                view = view[await self._sock.send(view) :]
        if view:
            raise HandshakeError(
                f"the peer's TCP took no handshake message within {MESSAGE_TIMEOUT_S:g} s", event="timeout"
            )

    async def _declined(self, code: Diagnosis, cause: Exception | None) -> DeclinedError:
        await self._write(self._machine.decline(code))
        return DeclinedError(code, code.words, by_peer=False, cause=cause)

    async def _or_decline(self, step: Awaitable[_T]) -> _T:
        """Await a step with the device; when it fails, DECLINE with the code that says why."""
        try:
            return await step
        except (DeviceError, OSError) as exc:
            raise await self._declined(Diagnosis.MEM, exc) from exc
        except (RemoteProtocolError, TransportError) as exc:
            raise await self._declined(Diagnosis.INTERR, exc) from exc


class Client(_End[ClientHandshake]):
    """Offers shared memory on a connected TCP socket."""

    def __init__(self, sock: trio.socket.SocketType, device: Device, buffer_size: int) -> None:
        super().__init__(sock, device, buffer_size, ClientHandshake(identity_of(device)))
        self._answer: PeerAccepted | None = None

    async def _run(self) -> Connection:
        machine, device = self._machine, self._device
        if machine.state is State.START:
            await self._write(machine.start())
        if self._answer is None:
            answer = await self._read()
            assert isinstance(answer, PeerAccepted)
            self._answer = answer
        answer = self._answer
        if self._tx is None:
            self._tx = await self._or_decline(_in_thread(attach, device, answer))
        if self._rx is None:
            self._rx = await self._or_decline(_in_thread(allocate, device, self._buffer_size, answer.devid))
        self._connection = Connection(self._sock, self._rx, self._tx, answer)
        await self._write(machine.confirm(self._rx.token, _announced(self._rx)))
        self._connection.start()
        return self._connection


class Server(_End[ServerHandshake]):
    """Answers a client's offer on an accepted TCP socket."""

    def __init__(self, sock: trio.socket.SocketType, device: Device, buffer_size: int) -> None:
        super().__init__(sock, device, buffer_size, ServerHandshake(identity_of(device)))
        self._proposed: Proposed | None = None
        self._answer: Confirmed | None = None

    async def _run(self) -> Connection:
        machine, device = self._machine, self._device
        if self._proposed is None:
            event = await self._read()
            assert isinstance(event, Proposed)
            self._proposed = event
        if self._rx is None:
            peer = self._proposed.candidates[0].devid
            self._rx = await self._or_decline(_in_thread(allocate, device, self._buffer_size, peer))
        if machine.state is State.PROPOSED:
            await self._write(machine.accept(self._rx.token, _announced(self._rx)))
        if self._answer is None:
            event = await self._read()
            assert isinstance(event, Confirmed)
            self._answer = event
        # from here on the client may use shared memory: a failure can only break the connection
        try:
            self._tx = await _in_thread(attach, device, self._answer)
        except DeviceError as exc:
            if exc.ack != Ack.ENOENT:
                raise
            # the client has closed, or died, since (or it lies, and gets an end): what it sent is here all the same
            self._connection = Connection(self._sock, self._rx, Nowhere(), self._answer)
        else:
            self._connection = Connection(self._sock, self._rx, self._tx, self._answer)
        self._connection.start()
        return self._connection


def _announced(region: Region) -> int:
    """Largest size code (16 KiB << n, n up to 6) that fits the region: CLC can say no more."""
    size = SMALLEST_BUFFER
    while size * 2 <= min(region.length, 1024 * 1024):
        size *= 2
    return size
