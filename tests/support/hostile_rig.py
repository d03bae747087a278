# SPDX-License-Identifier: Apache-2.0
"""Attackers of blocking sockets for tests: one end of a TCP connection that speaks raw CLC, and messages to damage."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fallback_rig import LIMIT_S, LOOPBACK, Fabrics, fabrics, until

from ism.driver import Device, Region
from ism.ids import DevId, Gid, Token
from ism.smc import clc, handshake, link
from ism.smc.clc import AnswerHead, Decline, Header, MessageReader, ProposalHead, V2Extension
from ism.smc.diagnosis import Diagnosis
from ism.smc.group import release_idle
from ism.smc.handshake_machine import ClientHandshake, ServerHandshake
from ism.smc.identity import Identity
from ism.virtio.ism_spec import Permission

ALL = Permission.READ | Permission.WRITE | Permission.ATTACH
KIB = 1024
CLOSED = "closed"
TRAILER = -4
POLICIES = ("require", "peers")
"""How a victim comes to expect shared memory: it may not do without, or the peer is configured."""


@contextlib.contextmanager
def victims(patch: pytest.MonkeyPatch) -> Iterator[Fabrics]:
    """Lend two devices with short patience; at the end no region may be left."""
    patch.setattr(handshake, "MESSAGE_TIMEOUT_S", 0.4)
    patch.setattr(link, "CLIENT_PATIENCE_S", 0.4)
    patch.setenv("ISM_SMC_BUFFER", "64K")
    with fabrics() as made:
        yield made
        for sock in made._open:
            sock.close()
        until(lambda: _nothing_is_left(made))


def expect_shared_memory(patch: pytest.MonkeyPatch, policy: str) -> None:
    """Set one of `POLICIES` for all sockets of the test."""
    if policy == "peers":
        patch.setenv("ISM_SMC_PEERS", LOOPBACK)
    else:
        patch.setenv("ISM_SMC", "require")


def _nothing_is_left(rig: Fabrics) -> bool:
    """Let go of what is kept for later connections; tell whether that was all."""
    for device in (rig.client, rig.server):
        assert device is not None
        release_idle(device)
    return not rig.fabric.registry.regions


class Attacker:
    """One end of a TCP connection, a device of the victim's domain, and no manners. Attributes: `victim` (device)."""

    def __init__(self, rig: Fabrics, sock: socket.socket, victim: Device) -> None:
        self.rig, self.sock, self.victim = rig, sock, victim
        self.device = Device(rig.fabric.plug())
        self._reader = MessageReader()
        sock.settimeout(LIMIT_S)

    def identity(self, **changes: Any) -> Identity:
        return Identity(**{"gid": self.device.gid, "devid": self.device.devid, "host": "attacker", **changes})

    def region(self, size: int = 64 * KIB, device: Device | None = None, *, granted: bool = True) -> Region:
        """A region; the victim may attach it if `granted`."""
        return (device or self.device).alloc(size, grants=[(ALL, self.victim.devid)] if granted else [])

    def send(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(data)

    def message(self) -> Any:
        """The victim's next message; None at the end of the connection."""
        while True:
            try:
                data = self.sock.recv(self._reader.bytes_wanted)
            except ConnectionResetError:
                return None
            if not data:
                return None
            found = self._reader.feed(data)
            if found is not None:
                return found

    def accepted(self) -> tuple[ClientHandshake, clc.Accept]:
        """As a client: propose, and read the server's ACCEPT."""
        machine = ClientHandshake(self.identity())
        self.send(machine.start())
        accept = self.message()
        assert isinstance(accept, clc.Accept), accept
        told(machine, accept)
        return machine, accept

    def proposed(self) -> ServerHandshake:
        """As a server: read the client's PROPOSAL."""
        machine = ServerHandshake(self.identity())
        proposal = self.message()
        assert isinstance(proposal, clc.Proposal), proposal
        told(machine, proposal)
        return machine

    def answer(self, role: str, token: int | None = None, size: int = 64 * KIB) -> bytes:
        """What names a region, by default a good one: the CONFIRM of a client, or the ACCEPT of a server."""
        token = self.region().token if token is None else token
        if role == "client":
            return self.accepted()[0].confirm(Token(token), size)
        return self.proposed().accept(Token(token), size)

    def verdict(self) -> str:
        """How it ends for the attacker: the reason in a DECLINE, or `CLOSED`."""
        while True:
            found = self.message()
            if found is None:
                return CLOSED
            if isinstance(found, Decline):
                return Diagnosis(found.diagnosis).name

    def close(self) -> None:
        self.sock.close()
        self.device.close()


def told(machine: ClientHandshake | ServerHandshake, message: Any) -> None:
    """Give a message to a machine, which takes no byte more than it wants."""
    rest = message.encode()
    while rest:
        wanted = machine.bytes_wanted
        machine.receive(rest[:wanted])
        rest = rest[wanted:]


# Messages to damage ---------------------------------------------------------------------------------------------


def poked(message: bytes, at: int, *values: int) -> bytes:
    """Replace bytes."""
    data = bytearray(message)
    end = at + len(values) or None
    data[at:end] = bytes(values)
    return bytes(data)


def number(message: bytes, kind: Any, name: str, value: int, base: int = 0) -> bytes:
    """Replace a field of a message's table by another number."""
    at = base + kind.offset_of(name)
    width = {"eyecatcher": 4, "kind": 1, "flags": 1, "eid_count": 1, "gid_count": 1, "index": 1, "size_code": 1}
    return poked(message, at, *value.to_bytes(width.get(name, 2), "big"))


V2 = ProposalHead.SIZE
NO_MESSAGE: dict[str, Callable[[bytes], bytes]] = {
    "wrong trailer": lambda good: poked(good, TRAILER, 1, 2, 3, 4),
    "wrong eyecatcher": lambda good: number(good, Header, "eyecatcher", 0x01020304),
    "type 0": lambda good: number(good, Header, "kind", 0),
    "type 5": lambda good: number(good, Header, "kind", 5),
    "type 255": lambda good: number(good, Header, "kind", 255),
    "version 0": lambda good: number(good, Header, "flags", 0x06),
    "version 3": lambda good: number(good, Header, "flags", 0x36),
    "length 0": lambda good: number(good, Header, "length", 0),
    "length 8": lambda good: number(good, Header, "length", 8),
    "length 65535": lambda good: number(good, Header, "length", 65535),
    "length one less": lambda good: number(good, Header, "length", len(good) - 1)[:-1],
    "nothing but zeroes": lambda good: bytes(400),
    "garbage": lambda good: random.Random(3).randbytes(5000),
    "another protocol": lambda good: b"GET / HTTP/1.1\r\nHost: example\r\n\r\n",
    "an answer instead": lambda good: clc.Accept(
        gid=Gid(1), devid=DevId(1), token=Token(1), size=16384, chid=0xFF00, eid="X"
    ).encode(),
}
NO_PROPOSAL: dict[str, Callable[[bytes], bytes]] = {
    "version 2 part outside": lambda good: number(good, ProposalHead, "v2_offset", 60000),
    "version 2 part over the head": lambda good: number(good, ProposalHead, "v2_offset", 0),
    "version 2 part at the end": lambda good: number(good, ProposalHead, "v2_offset", len(good) - 52),
    "SMC-D part outside": lambda good: number(good, V2Extension, "smcd_offset", 65535, V2),
    "SMC-D part over another": lambda good: number(good, V2Extension, "smcd_offset", 0, V2),
    "9 EIDs": lambda good: number(good, V2Extension, "eid_count", 9, V2),
    "255 EIDs": lambda good: number(good, V2Extension, "eid_count", 255, V2),
    "9 GIDs": lambda good: number(good, V2Extension, "gid_count", 9, V2),
    "8 GIDs in the room of 2": lambda good: number(good, V2Extension, "gid_count", 8, V2),
    "a hole": lambda good: number(good, Header, "length", len(good) + 9)[:-4] + bytes(9) + good[-4:],
}
NO_ANSWER: dict[str, Callable[[bytes], bytes]] = {
    **{
        f"size code {code}": lambda good, code=code: number(good, AnswerHead, "size_code", code << 4)
        for code in range(7, 16)
    },
    "element 1": lambda good: number(good, AnswerHead, "index", 1),
    "element 255": lambda good: number(good, AnswerHead, "index", 255),
    "token 0": lambda good: poked(good, AnswerHead.offset_of("token"), *bytes(8)),
    "wrong trailer": NO_MESSAGE["wrong trailer"],
    "wrong eyecatcher": NO_MESSAGE["wrong eyecatcher"],
    "version 3": lambda good: number(good, Header, "flags", 0x39),
    "length 65535": NO_MESSAGE["length 65535"],
    "a first contact that is too short": lambda good: number(good, Header, "length", 114)[:110] + good[-4:],
    "garbage": NO_MESSAGE["garbage"],
    "a proposal instead": lambda good: clc.Proposal().encode(),
}


# Regions that are not the attacker's to give ---------------------------------------------------------------------


def unknown_token(attacker: Attacker, role: str) -> bytes:
    return attacker.answer(role, 0xDEAD_BEEF)


def ungranted_region(attacker: Attacker, role: str) -> bytes:
    return attacker.answer(role, attacker.region(granted=False).token)


def third_partys_region(attacker: Attacker, role: str) -> bytes:
    third = Device(attacker.rig.fabric.plug())
    attacker.sock = Closing(attacker.sock, third)  # type: ignore[assignment]
    return attacker.answer(role, attacker.region(device=third, granted=False).token)


def region_of_another_connection(attacker: Attacker, role: str) -> bytes:
    """One that the victim holds for somebody else, to whom it would write what it writes here."""
    rig = attacker.rig
    held = next(region for region in rig.fabric.registry.regions.values() if region.owner != attacker.device.devid)
    return attacker.answer(role, held.token)


def smaller_region(attacker: Attacker, role: str) -> bytes:
    return attacker.answer(role, attacker.region(64 * KIB).token, 1024 * KIB)


class Closing:
    """A socket that closes a device with itself."""

    def __init__(self, sock: socket.socket, device: Device) -> None:
        self._sock, self._device = sock, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def close(self) -> None:
        self._sock.close()
        self._device.close()


FALSE_REGIONS = [unknown_token, ungranted_region, third_partys_region, region_of_another_connection, smaller_region]
