# SPDX-License-Identifier: Apache-2.0
"""Control commands: from the readable bytes of a chain to the bytes of its reply (virtio-ism proposal).

The readable part is class, command, data; the writable part is the ack, then the reply's data. Parsing and replying
happen here, deciding happens in the registry. Nothing is kept between commands, guest memory is not touched.

Where the proposal is silent: unknown classes and commands, data that is too short and a writable part without room for
the reply's fixed fields get ERR. Room for fewer areas than needed gets E2BIG with `num` set, and nothing changes. Data
that is longer than the command's is accepted, the rest ignored: drivers send padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ism.device.contract import Effect, Outcome, Registry
from ism.ids import DevId, Token
from ism.layout import Struct
from ism.virtio.ism_spec import (
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
)
from ism.virtio.pci import NO_VECTOR

ACK_SIZE = 1


@dataclass(frozen=True, slots=True)
class Reply:
    """What a command came to.

    `data` starts with the ack. `effects` are to be carried out before the command is completed. `gained` is the token
    of the region that the command attached, 0 for none: whoever cannot carry out the effects detaches it again.
    """

    data: bytes
    effects: tuple[Effect, ...] = ()
    gained: int = 0
    known: bool = True

    @property
    def ack(self) -> Ack:
        """The ack, first byte of the reply."""
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

    def execute(self, readable: bytes, capacity: int) -> Reply:
        """Carry out one command.

        Args:
            readable: at least 2 bytes; of a longer readable part, `MAX_READABLE` bytes are enough.
            capacity: bytes of the writable part, at least 1.
        Returns: a reply of at most `capacity` bytes.
        """
        header = CommandHeader.unpack(readable)
        entry = _TABLE.get((header.cls, header.command))
        if entry is None:
            return refusal(Ack.ERR, known=False)
        if len(readable) < CommandHeader.SIZE + entry.request.SIZE or capacity < ACK_SIZE + entry.reply_size:
            return refusal(Ack.ERR)
        request = entry.request.unpack(readable, CommandHeader.SIZE)
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


def _ack_only(outcome: Outcome) -> Reply:
    return Reply(bytes([outcome.ack]), tuple(outcome.effects))


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


_TABLE: Mapping[tuple[int, int], _Entry] = {
    (CommandClass.ALLOC, 0): _Entry(AllocRequest, AllocReply.SIZE, Commands._alloc),
    (CommandClass.ATTACH, 0): _Entry(AttachRequest, AttachReply.SIZE, Commands._attach),
    (CommandClass.DETACH, 0): _Entry(DetachRequest, 0, Commands._detach),
    (CommandClass.GRANT, GrantCommand.SET_DEFAULT): _Entry(GrantDefaultRequest, 0, Commands._grant_default),
    (CommandClass.GRANT, GrantCommand.SET_FOR_DEVICE): _Entry(GrantDeviceRequest, 0, Commands._grant_device),
    (CommandClass.EVENT_VECTOR, 0): _Entry(EventVectorRequest, 0, Commands._event_vector),
}

MAX_READABLE = CommandHeader.SIZE + max(entry.request.SIZE for entry in _TABLE.values())
"""Bytes of a readable part that any command looks at."""
