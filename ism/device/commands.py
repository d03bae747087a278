# SPDX-License-Identifier: Apache-2.0
"""Control commands: from the readable bytes of a chain to the bytes of its reply (virtio-ism proposal).

The readable part is class, command, data; the writable part is the ack, then the reply's data. Parsing and replying
happen here, deciding happens in the registry. Nothing is kept between commands, guest memory is not touched.

Where the proposal is silent: unknown classes and commands, data that is too short and a writable part without room for
the reply's fixed fields get ERR. Room for fewer areas than needed gets E2BIG with `num` set, and nothing changes. Data
that is longer than the command's is accepted, the rest ignored: drivers send padding.

Class DIRECTORY exists only when its feature is negotiated. Its CLAIM is parsed here and decided late, when the reply is
about to be written (`Reply.late`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ism.device.contract import Decision, Effect, Outcome, Registry
from ism.ids import DevId, Token
from ism.layout import Struct
from ism.virtio.ism_spec import (
    Ack,
    AllocReply,
    AllocRequest,
    Area,
    AttachReply,
    AttachRequest,
    ClaimReply,
    ClaimRequest,
    CommandClass,
    CommandHeader,
    DetachRequest,
    DirectoryCommand,
    EventVectorRequest,
    GrantCommand,
    GrantDefaultRequest,
    GrantDeviceRequest,
    IntendRequest,
    ListenerRequest,
    LookupReply,
    RetractRequest,
    StartRequest,
)
from ism.virtio.pci import NO_VECTOR

ACK_SIZE = 1


@dataclass(frozen=True, slots=True)
class Reply:
    """What a command came to.

    `data` starts with the ack. `effects` are to be carried out before the command is completed. `gained` is the token
    of the region that the command attached, 0 for none: whoever cannot carry out the effects detaches it again.

    `commit` is called once the reply is where the driver sees it, and returns further effects. With `late` the command
    is not decided yet: calling it, when the reply is about to be written, gives the reply.
    """

    data: bytes
    effects: tuple[Effect, ...] = ()
    gained: int = 0
    known: bool = True
    commit: Callable[[], Sequence[Effect]] | None = None
    late: Callable[[], Reply] | None = None

    @property
    def ack(self) -> Ack:
        """The ack, first byte of the reply; there is none yet with `late`."""
        return Ack(self.data[0])


def refusal(ack: Ack, *, known: bool = True) -> Reply:
    """Make the reply that is an ack only."""
    return Reply(bytes([ack]), known=known)


class Commands:
    """The command handlers of one device."""

    def __init__(self, registry: Registry, devid: DevId, vectors: int, *, event_irq: bool) -> None:
        """Serve `devid`; `vectors` is the size of its MSI-X table, `event_irq` whether regions can have vectors."""
        self._registry = registry
        self._devid = devid
        self._vectors = vectors
        self._event_irq = event_irq

    def execute(self, readable: bytes, capacity: int, *, directory: bool = False) -> Reply:
        """Carry out one command.

        Args:
            readable: at least 2 bytes; of a longer readable part, `MAX_READABLE` bytes are enough.
            capacity: bytes of the writable part, at least 1.
            directory: whether the class DIRECTORY exists.
        Returns: a reply of at most `capacity` bytes.
        """
        header = CommandHeader.unpack(readable)
        entry = _TABLE.get((header.cls, header.command))
        if entry is None or (header.cls == CommandClass.DIRECTORY and not directory):
            return refusal(Ack.ERR, known=False)
        if len(readable) < CommandHeader.SIZE + entry.request.SIZE or capacity < ACK_SIZE + entry.reply_size:
            return refusal(Ack.ERR)
        request = entry.request.unpack(readable, CommandHeader.SIZE)
        if entry.late:
            return Reply(b"", late=lambda: entry.handler(self, request, capacity - ACK_SIZE - entry.reply_size))
        reply = entry.handler(self, request, capacity - ACK_SIZE - entry.reply_size)
        assert len(reply.data) <= capacity
        return reply

    def _alloc(self, request: Struct, room: int) -> Reply:
        assert isinstance(request, AllocRequest)
        outcome = self._registry.alloc(self._devid, request.size, room // Area.SIZE)
        num = outcome.slots_needed if outcome.ack is Ack.E2BIG else len(outcome.areas)
        return _with_areas(outcome, AllocReply(token=outcome.token, num=num), Token(outcome.token))

    def _attach(self, request: Struct, room: int) -> Reply:
        assert isinstance(request, AttachRequest)
        token = Token(request.token)
        outcome = self._registry.attach(self._devid, token, request.rw_perm, room // Area.SIZE)
        num = outcome.slots_needed if outcome.ack is Ack.E2BIG else len(outcome.areas)
        return _with_areas(outcome, AttachReply(num=num), token)

    def _detach(self, request: Struct, _room: int) -> Reply:
        assert isinstance(request, DetachRequest)
        return _ack_only(self._registry.detach(self._devid, Token(request.token)))

    def _grant_default(self, request: Struct, _room: int) -> Reply:
        assert isinstance(request, GrantDefaultRequest)
        return _ack_only(self._registry.grant_default(self._devid, Token(request.token), request.permissions))

    def _grant_device(self, request: Struct, _room: int) -> Reply:
        assert isinstance(request, GrantDeviceRequest)
        peer = DevId(request.peer_devid)
        return _ack_only(self._registry.grant_device(self._devid, Token(request.token), request.permissions, peer))

    def _event_vector(self, request: Struct, _room: int) -> Reply:
        assert isinstance(request, EventVectorRequest)
        if not self._event_irq or (request.vector >= self._vectors and request.vector != NO_VECTOR):
            return refusal(Ack.ERR)
        vector = None if request.vector == NO_VECTOR else request.vector
        return _ack_only(self._registry.event_vector(self._devid, Token(request.token), vector))

    def _publish(self, request: Struct, _room: int) -> Reply:
        assert isinstance(request, ListenerRequest)
        return _decided(self._registry.directory.publish(self._devid, request))

    def _withdraw(self, request: Struct, _room: int) -> Reply:
        assert isinstance(request, ListenerRequest)
        return _decided(self._registry.directory.withdraw(self._devid, request))

    def _lookup(self, request: Struct, _room: int) -> Reply:
        assert isinstance(request, ListenerRequest)
        return _decided(self._registry.directory.lookup(self._devid, request))

    def _intend(self, request: Struct, _room: int) -> Reply:
        assert isinstance(request, IntendRequest)
        return _decided(self._registry.directory.intend(self._devid, request))

    def _claim(self, request: Struct, _room: int) -> Reply:
        assert isinstance(request, ClaimRequest)
        return _decided(self._registry.directory.claim(self._devid, request))

    def _retract(self, request: Struct, _room: int) -> Reply:
        assert isinstance(request, RetractRequest)
        return _decided(self._registry.directory.retract(self._devid, request))

    def _start(self, request: Struct, _room: int) -> Reply:
        assert isinstance(request, StartRequest)
        return _decided(self._registry.directory.start(self._devid, request))


def _ack_only(outcome: Outcome) -> Reply:
    return Reply(bytes([outcome.ack]), tuple(outcome.effects))


def _decided(decision: Decision) -> Reply:
    return Reply(bytes([decision.ack]) + decision.reply, tuple(decision.effects), commit=decision.commit)


def _with_areas(outcome: Outcome, fixed: Struct, token: Token) -> Reply:
    if outcome.ack is Ack.OK:
        areas = b"".join(Area(offset=area.offset, size=area.size).pack() for area in outcome.areas)
        return Reply(bytes([Ack.OK]) + fixed.pack() + areas, tuple(outcome.effects), gained=token)
    if outcome.ack is Ack.E2BIG:
        return Reply(bytes([Ack.E2BIG]) + fixed.pack(), tuple(outcome.effects))
    return _ack_only(outcome)


@dataclass(frozen=True, slots=True)
class _Entry:
    request: type[Struct]
    reply_size: int
    handler: Callable[[Commands, Struct, int], Reply]
    late: bool = False


_TABLE: Mapping[tuple[int, int], _Entry] = {
    (CommandClass.ALLOC, 0): _Entry(AllocRequest, AllocReply.SIZE, Commands._alloc),
    (CommandClass.ATTACH, 0): _Entry(AttachRequest, AttachReply.SIZE, Commands._attach),
    (CommandClass.DETACH, 0): _Entry(DetachRequest, 0, Commands._detach),
    (CommandClass.GRANT, GrantCommand.SET_DEFAULT): _Entry(GrantDefaultRequest, 0, Commands._grant_default),
    (CommandClass.GRANT, GrantCommand.SET_FOR_DEVICE): _Entry(GrantDeviceRequest, 0, Commands._grant_device),
    (CommandClass.EVENT_VECTOR, 0): _Entry(EventVectorRequest, 0, Commands._event_vector),
    (CommandClass.DIRECTORY, DirectoryCommand.PUBLISH): _Entry(ListenerRequest, 0, Commands._publish),
    (CommandClass.DIRECTORY, DirectoryCommand.WITHDRAW): _Entry(ListenerRequest, 0, Commands._withdraw),
    (CommandClass.DIRECTORY, DirectoryCommand.LOOKUP): _Entry(ListenerRequest, LookupReply.SIZE, Commands._lookup),
    (CommandClass.DIRECTORY, DirectoryCommand.INTEND): _Entry(IntendRequest, 0, Commands._intend),
    (CommandClass.DIRECTORY, DirectoryCommand.CLAIM): _Entry(ClaimRequest, ClaimReply.SIZE, Commands._claim, late=True),
    (CommandClass.DIRECTORY, DirectoryCommand.RETRACT): _Entry(RetractRequest, 0, Commands._retract),
    (CommandClass.DIRECTORY, DirectoryCommand.START): _Entry(StartRequest, 0, Commands._start),
}

MAX_READABLE = CommandHeader.SIZE + max(entry.request.SIZE for entry in _TABLE.values())
"""Bytes of a readable part that any command looks at."""
