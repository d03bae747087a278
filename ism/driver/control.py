# SPDX-License-Identifier: Apache-2.0
"""The control queue: commands to the device, several in flight (virtio-ism proposal, control messages).

States of a command: in line (no chain is free; DETACH only, which never waits) -> submitted -> done (the device
answered) or failed (the device is gone). A command is completed by whichever thread reaps the queue first; the thread
that waits for it sleeps on the command alone. The ack byte is preset to 0xFF, so a device that writes nothing is never
mistaken for one that agreed.

A caller that stops waiting (no answer in time, Ctrl-C) leaves the command under way. What it would have gained is
given back when the answer comes after all, and a reply buffer of its own is kept until the queue is closed: memory
that the device may still write to is never freed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ism.driver.transport import DmaBuffer, Span, Transport
from ism.driver.virtqueue import VirtQueue, usable_entries
from ism.errors import (
    DeviceError,
    DeviceGoneError,
    IsmError,
    LocalProtocolError,
    PermissionDeniedError,
    QuotaError,
    RemoteProtocolError,
    TransportError,
)
from ism.ids import DevId, Token
from ism.layout import Struct
from ism.virtio.ism_spec import (
    CONTROL_QUEUE_SIZE,
    Ack,
    AllocReply,
    AllocRequest,
    Area,
    AttachReply,
    AttachRequest,
    CommandClass,
    CommandHeader,
    DetachRequest,
    EventVectorRequest,
    GrantCommand,
    GrantDefaultRequest,
    GrantDeviceRequest,
    IntendRequest,
    Permission,
)
from ism.virtio.pci import NO_VECTOR

log = logging.getLogger("ism.driver")

COMMAND_TIMEOUT_S = 30.0
Serve = Callable[[Callable[[], bool], float], None]
_POLL_S = 0.0002
_OUT_SIZE = CommandHeader.SIZE + IntendRequest.SIZE
_SLOT_AREAS = 30
_IN_SIZE = 1 + AllocReply.SIZE + _SLOT_AREAS * Area.SIZE
_ACK_UNSET = 0xFF
_MAX_AREAS = 1 << 20
_E2BIG_TRIES = 8

_ADVICE = {
    Ack.OK: "the device agreed",
    Ack.ENOENT: "the token is unknown to the device manager: its owner let the region go",
    Ack.E2BIG: "the region has more areas than the reply has room for: detach regions, or try again",
    Ack.ENOMEM: "the device's quota, the host's memory or this process's descriptors (ulimit -n) are exhausted: "
    "detach regions, or raise the limit",
    Ack.ENOSPC: "the device's window has no free chunks: detach regions, or give the device a larger window",
    Ack.PERM_EATTACH: "the region's owner has not granted ATTACH to this device",
    Ack.PERM_EREAD: "the region's owner has not granted READ to this device",
    Ack.PERM_EWRITE: "the region's owner has not granted WRITE to this device, or writers are sealed off",
    Ack.ERR: "the device refused the command as invalid, or does not know it",
}


def ack_error(command: str, ack: int, token: int = 0, advice: Mapping[Ack, str] = _ADVICE) -> DeviceError:
    """Return the error for an ack other than OK, whatever its value. Args: `advice`: what to do, by ack."""
    try:
        known: Ack | None = Ack(ack)
    except ValueError:
        known = None
    name = known.name if known is not None else f"ack {ack}"
    kind = DeviceError
    if known in (Ack.ENOMEM, Ack.ENOSPC):
        kind = QuotaError
    elif known in (Ack.PERM_EATTACH, Ack.PERM_EREAD, Ack.PERM_EWRITE):
        kind = PermissionDeniedError
    say = (
        "an ack this driver does not know: is the manager newer?"
        if known is None
        else advice.get(known, _ADVICE[known])
    )
    subject = f" of region {token:#018x}" if token else ""
    return kind(f"{command}{subject}: {name}: {say}", ack=ack, ack_name=name, command=command, token=token)


@dataclass(slots=True)
class Placement:
    """Where a region appeared: its `token` and its areas in linear order."""

    token: Token
    areas: Sequence[Span]

    @property
    def size(self) -> int:
        """Bytes of the region."""
        return sum(area.length for area in self.areas)


class Command:
    """One command under way. `wait()` returns the reply, or raises."""

    __slots__ = ("_done", "_error", "_lock", "_poll", "_reply", "_serve", "_then", "_timeout_s", "name", "token")

    def __init__(
        self,
        name: str,
        token: int,
        poll: Callable[[], None] | None = None,
        timeout_s: float = COMMAND_TIMEOUT_S,
        serve: Serve | None = None,
    ) -> None:
        self.name, self.token = name, token
        self._poll, self._timeout_s, self._serve = poll, timeout_s, serve
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._reply = b""
        self._error: Exception | None = None
        self._then: list[Callable[[], None]] = []

    def finish(self, reply: bytes, error: Exception | None = None) -> None:
        """Complete the command (the queue's side); only the first time counts."""
        with self._lock:
            if self._done.is_set():
                return
            self._reply, self._error = reply, error
            self._done.set()
            then, self._then = self._then, []
        for callback in then:
            callback()

    def then(self, callback: Callable[[], None]) -> None:
        """Call `callback` exactly once when the command is done, at once or from the thread that completes it."""
        with self._lock:
            if not self._done.is_set():
                self._then.append(callback)
                return
        callback()

    @property
    def done(self) -> bool:
        """Whether the device has answered, or is gone."""
        return self._done.is_set()

    @property
    def reply(self) -> bytes:
        """What the device has written, ack first; empty when it has not answered."""
        return self._reply

    def wait_done(self, timeout_s: float) -> bool:
        """Wait until the command is done, or the time is up; tell which. Raises nothing."""
        deadline = time.monotonic() + timeout_s
        if self._serve is not None and not self._done.is_set():
            self._serve(self._done.is_set, timeout_s)
        while self._poll is not None and not self._done.is_set() and time.monotonic() < deadline:
            self._poll()
            self._done.wait(_POLL_S)
        return self._done.is_set() or self._done.wait(max(0.0, deadline - time.monotonic()))

    def wait(self) -> bytes:
        """Return ack byte and reply data, at least one byte.

        Raises: TransportError (no answer in time), DeviceGoneError, RemoteProtocolError (answered without an ack).
        """
        if not self.wait_done(self._timeout_s):
            raise TransportError(
                f"{self.name}: the device did not answer within {self._timeout_s:g} s; is its manager stopped or "
                "overloaded?",
                errno.ETIMEDOUT,
            )
        if self._error is not None:
            raise self._error
        return self._reply

    def expect_ok(self) -> bytes:
        """Return the reply data behind an OK ack. Raises DeviceError by ack, else as `wait`."""
        reply = self.wait()
        if reply[0] != Ack.OK:
            raise ack_error(self.name, reply[0], self.token)
        return reply[1:]


class ControlQueue:
    """Commands over queue 0. Thread-safe.

    Attributes: `queue`.
    """

    def __init__(
        self,
        transport: Transport,
        size: int,
        notify: Callable[[], None],
        *,
        poll: Callable[[], None] | None = None,
        serve: Serve | None = None,
        done_elsewhere: Callable[[], None] = lambda: None,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        """Allocate the queue.

        Args:
            size: entries that the device offers.
            notify: writes the queue's notify register. When it raises, it has seen to it that `fail` is called, after
                a last `reap`: the device may have found the command without being told.
            poll: without interrupts: looks for answers (`reap`), called by whoever waits.
            serve: with interrupts: takes answers in the thread that waits, until what it is given says so or seconds
                are over; may return early.
            done_elsewhere: called after commands were completed, for a thread inside `serve`.
            timeout_s: how long a command may take, and how long one waits for a free chain, seconds.
        Raises: TransportError (no DMA memory).
        """
        self._transport, self._notify = transport, notify
        self._poll, self._serve, self._done_elsewhere, self._timeout_s = poll, serve, done_elsewhere, timeout_s
        entries = usable_entries(size, CONTROL_QUEUE_SIZE)
        self.queue = VirtQueue(transport, entries, slots=entries // 2, out_size=_OUT_SIZE, in_size=_IN_SIZE)
        self._lock = threading.Lock()
        self._slot_free = threading.Condition(self._lock)
        self._pending: dict[int, tuple[Command, DmaBuffer | None]] = {}
        self._line: deque[tuple[Command, bytes]] = deque()
        self._kept: list[DmaBuffer] = []
        self._batch = threading.local()
        self._refusing: str | None = None
        self._dead = False
        self._closed = False

    def submit(
        self,
        cls: CommandClass,
        command: int,
        data: Struct,
        name: str,
        *,
        token: int = 0,
        reply: DmaBuffer | None = None,
        in_line: bool = False,
    ) -> Command:
        """Send a command; it is under way when this returns.

        Args:
            reply: a buffer of the caller's for a reply longer than a slot, kept until the command is done.
            in_line: when no chain is free, return at once; the command is sent when there is one.
        Raises: DeviceGoneError; TransportError when all chains stay busy; LocalProtocolError for values that do not
            fit their fields.
        """
        try:
            readable = CommandHeader(cls=cls, command=command).pack() + data.pack()
        except struct.error as exc:
            raise LocalProtocolError(f"{name}: {data} cannot be encoded: {exc}") from exc
        made = Command(name, token, self._poll, self._timeout_s, self._serve)
        if not self.queue.free and getattr(self._batch, "owed", False):
            self._batch.owed = False
            self._kick()  # a chain gets free only if the device knows of those before
        with self._lock:
            if not in_line and not self._slot_free.wait_for(lambda: self.queue.free or self._refusing, self._timeout_s):
                raise TransportError(
                    f"{name}: {self.queue.slots} commands are under way, none was answered for {self._timeout_s:g} s",
                    errno.ETIMEDOUT,
                )
            if self._refusing:
                raise DeviceGoneError(self._refusing)
            if not self.queue.free:
                self._line.append((made, readable))
                return made
            must_notify = self._start(made, readable, reply)
        if must_notify and getattr(self._batch, "open", False):
            self._batch.owed = True
        elif must_notify:
            self._kick()
        return made

    def _kick(self) -> None:
        with contextlib.suppress(IsmError):  # the commands are under way all the same, until `fail`
            self._notify()

    @contextlib.contextmanager
    def one_kick(self) -> Iterator[None]:
        """Notify the device once, at the end, of all commands that this thread submits inside.

        Nothing may be waited for inside.
        """
        batch = self._batch
        batch.open, batch.owed = True, False
        try:
            yield
        finally:
            owed, batch.open, batch.owed = batch.owed, False, False
            if owed:
                self._kick()

    def _start(self, command: Command, readable: bytes, reply: DmaBuffer | None) -> bool:
        slot = self.queue.free.pop()
        self._pending[slot] = (command, reply)
        if reply is None:
            self.queue.preset(slot, _ACK_UNSET)
            return self.queue.submit(slot, readable, _IN_SIZE)
        reply.mapping.view[0] = _ACK_UNSET
        return self.queue.submit(slot, readable, reply.mapping.length, indirect_in=reply)

    def reap(self) -> None:
        """Complete what the device has answered.

        Raises: RemoteProtocolError when the used ring makes no sense: `fail` is due; TransportError when commands that
            stood in line cannot be notified.
        """
        finished: list[tuple[Command, bytes]] = []
        must_notify = False
        with self._lock:
            if self._dead:
                return
            for used in self.queue.reap():
                command, buffer = self._pending.pop(used.slot)
                if buffer is None:
                    reply = self.queue.written(used.slot, used.written)
                else:
                    reply = bytes(buffer.mapping.view[: min(used.written, buffer.mapping.length)])
                self.queue.release(used.slot)
                finished.append((command, reply))
            while self._line and self.queue.free and not self._refusing:
                must_notify |= self._start(*self._line.popleft(), None)
            self._slot_free.notify_all()
        for command, reply in finished:
            if reply:
                command.finish(reply)
            else:
                command.finish(b"", RemoteProtocolError(f"{command.name}: the device wrote no ack", event="used"))
        if finished:
            self._done_elsewhere()
        if must_notify:
            self._notify()

    def refuse(self, reason: str) -> None:
        """Raise DeviceGoneError for new commands; those under way may still be answered, until `fail`."""
        with self._lock:
            self._refusing = self._refusing or reason
            self._slot_free.notify_all()

    def fail(self, reason: str, *, certain: bool = True) -> None:
        """Complete every command with DeviceGoneError and refuse new ones.

        Args: `certain`: whether the device answers none of them any more; otherwise those under way get a
            TransportError: nobody can say what becomes of them.
        """
        with self._lock:
            self._dead, self._refusing = True, self._refusing or reason
            under_way = [command for command, _ in self._pending.values()]
            unsent = [command for command, _ in self._line]
            self._pending.clear()
            self._line.clear()
            self._slot_free.notify_all()
        kind = DeviceGoneError if certain else TransportError
        for command in under_way:
            command.finish(b"", kind(f"{command.name}: {reason}"))
        for command in unsent:
            command.finish(b"", DeviceGoneError(f"{command.name}: {reason}"))
        self._done_elsewhere()

    def close(self) -> None:
        """Free the queue's memory; the device must have been reset. Raises TransportError."""
        self.fail("the device is closed")
        with self._lock:
            if self._closed:
                return
            self._closed = True
            kept, self._kept = self._kept, []
        for buffer in kept:
            self._transport.dma_free(buffer)
        self.queue.close()

    # -- the commands of the proposal ---------------------------------------------------------------------------

    def alloc(self, size: int) -> Placement:
        """ALLOC_REGION: make a region of `size` bytes, rounded up to chunks. Raises DeviceError by ack."""

        def send(buffer: DmaBuffer | None) -> Command:
            return self.submit(CommandClass.ALLOC, 0, AllocRequest(size=size), "ALLOC_REGION", reply=buffer)

        body = self._with_areas(send, AllocReply, None)
        head = AllocReply.unpack(body)
        return self._placed("ALLOC_REGION", Token(head.token), body, AllocReply.SIZE, head.num)

    def attach(self, token: Token, rights: Permission) -> Placement:
        """ATTACH_REGION with the given rights (0 = all that is granted). Raises DeviceError by ack."""

        def send(buffer: DmaBuffer | None) -> Command:
            request = AttachRequest(token=token, rw_perm=rights)
            return self.submit(CommandClass.ATTACH, 0, request, "ATTACH_REGION", token=token, reply=buffer)

        body = self._with_areas(send, AttachReply, token)
        return self._placed("ATTACH_REGION", token, body, AttachReply.SIZE, AttachReply.unpack(body).num)

    def detach(self, token: Token) -> Command:
        """DETACH_REGION; never waits, not even for a free chain."""
        request = DetachRequest(token=token)
        return self.submit(CommandClass.DETACH, 0, request, "DETACH_REGION", token=token, in_line=True)

    def grant(self, token: Token, permissions: Permission, peer: DevId | None) -> Command:
        """GRANT SET_FOR_DEVICE, or SET_DEFAULT when `peer` is None."""
        data: Struct
        if peer is None:
            command, name = GrantCommand.SET_DEFAULT, "GRANT SET_DEFAULT"
            data = GrantDefaultRequest(token=token, permissions=permissions)
        else:
            command, name = GrantCommand.SET_FOR_DEVICE, "GRANT SET_FOR_DEVICE"
            data = GrantDeviceRequest(token=token, permissions=permissions, peer_devid=peer)
        return self.submit(CommandClass.GRANT, command, data, name, token=token)

    def event_vector(self, token: Token, vector: int | None) -> Command:
        """EVENT_VECTOR SET; None unsets."""
        data = EventVectorRequest(token=token, vector=NO_VECTOR if vector is None else vector)
        return self.submit(CommandClass.EVENT_VECTOR, 0, data, "EVENT_VECTOR", token=token)

    def _with_areas(
        self, send: Callable[[DmaBuffer | None], Command], head: type[Struct], token: Token | None
    ) -> bytes:
        """Send a command whose reply lists areas; on E2BIG again, with a buffer of the size the device named.

        The window may change between two tries, so several are made. `token`: None when the reply names it.
        """
        room, needed = _SLOT_AREAS, 0
        for _ in range(_E2BIG_TRIES):
            buffer = None
            if needed:
                buffer = self._transport.dma_alloc(1 + head.SIZE + needed * Area.SIZE)
                room = (buffer.mapping.length - 1 - head.SIZE) // Area.SIZE
            name, reply = self._exchange(send, buffer, token)
            if reply[0] != Ack.E2BIG or len(reply) < 1 + head.SIZE:
                break
            (needed,) = struct.unpack_from("<Q", reply, 1 + head.offset_of("num"))
            if not room < needed <= _MAX_AREAS:
                raise RemoteProtocolError(f"{name}: E2BIG, but {needed} areas are said to be enough", event="E2BIG")
        if reply[0] != Ack.OK:
            raise ack_error(name, reply[0], token or 0)
        if len(reply) < 1 + head.SIZE:
            raise RemoteProtocolError(f"{name}: the reply ends after {len(reply)} bytes", event="reply")
        return reply[1:]

    def _exchange(
        self, send: Callable[[DmaBuffer | None], Command], buffer: DmaBuffer | None, token: Token | None
    ) -> tuple[str, bytes]:
        command = None
        try:
            command = send(buffer)
            return command.name, command.wait()
        except BaseException:
            if command is not None:
                under_way = command
                command.then(lambda: self._give_back(under_way.reply, token))
            raise
        finally:
            if buffer is not None:
                self._let_go(buffer, answered=command is not None and bool(command.reply))

    def _let_go(self, buffer: DmaBuffer, *, answered: bool) -> None:
        if answered:
            try:
                self._transport.dma_free(buffer)
                return
            except TransportError as exc:
                log.debug("a reply buffer is kept until the device is closed: %s", exc)
        with self._lock:
            if not self._closed:
                self._kept.append(buffer)

    def _placed(self, name: str, token: Token, body: bytes, at: int, num: int) -> Placement:
        try:
            return Placement(token, _areas(name, body, at, num))
        except RemoteProtocolError:
            self._detach_quietly(token)
            raise

    def _give_back(self, reply: bytes, token: Token | None) -> None:
        """Detach a region that was given to somebody who no longer waits for it."""
        if not reply or reply[0] != Ack.OK:
            return
        if token is None:
            if len(reply) < 1 + AllocReply.SIZE:
                return
            token = Token(AllocReply.unpack(reply, 1).token)
        self._detach_quietly(token)

    def _detach_quietly(self, token: Token) -> None:
        try:
            self.detach(token)
        except TransportError:
            pass  # the device is gone, and the region with it


def _areas(command: str, body: bytes, at: int, num: int) -> list[Span]:
    if num < 1 or at + num * Area.SIZE > len(body):
        raise RemoteProtocolError(f"{command}: the reply announces {num} areas in {len(body)} bytes", event="areas")
    found = []
    for index in range(num):
        area = Area.unpack(body, at + index * Area.SIZE)
        found.append(Span(area.offset, area.size))
    return found
