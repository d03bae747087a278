# SPDX-License-Identifier: Apache-2.0
"""What a handshake asks of the device: the region this side receives in, and the peer's (no event loop).

One region per direction: each side allocates the one it receives in, grants it to the other's device alone, and
attaches the other's. `link` says when; these calls block until the device has answered.

    client                                                server
    PROPOSAL (gid, devid) ------------------------------>  own region, granted to devid
    own region, granted, meanwhile
    attach the server's <-------------- ACCEPT (token, size)
    CONFIRM (token, size) ------------------------------>  attach it

A client that does not know the server's device before ACCEPT (the manager has not named it) makes its region then.

Who may lie: the peer, in every field; the device manager is trusted. A token is attached only when this device does
not hold it already (a peer that named another connection's region would write into that connection), and when the
region is as large as announced.
"""

from __future__ import annotations

import os
import socket

from ism.driver import Device, Region
from ism.driver.control import ack_error
from ism.errors import IsmError, QuotaError, RemoteProtocolError
from ism.ids import DevId
from ism.smc.group import link_groups
from ism.smc.handshake_machine import PeerAnswer
from ism.smc.identity import Identity
from ism.virtio.ism_spec import Ack, Permission

MESSAGE_TIMEOUT_S = 6.0
"""How long the rest of a message, and the CONFIRM after an ACCEPT, may take (Linux: CLC wait time)."""

DEFAULT_BUFFER = 64 * 1024
"""Bytes of the region each side receives in, at first."""

DEFAULT_LIMIT = 16 * 1024 * 1024
"""Bytes up to which its ring may grow."""

SMALLEST_BUFFER = 16 * 1024
"""Less cannot be announced (CLC size code 0)."""

_LARGEST_ANNOUNCED = 1024 * 1024
_SMALLER = 4
"""When there is no room for a region, one of this part of its size is tried."""

_PEER_RIGHTS = Permission.READ | Permission.WRITE | Permission.ATTACH
_READ_WRITE = Permission.READ | Permission.WRITE


class DeclinedError(IsmError):
    """One side declined shared memory. Attributes: `code` (CLC diagnosis), `words`, `by_peer`."""

    def __init__(self, code: int, words: str, *, by_peer: bool, cause: Exception | None = None) -> None:
        self.code, self.words, self.by_peer = code, words, by_peer
        who = "the peer" if by_peer else "this side"
        why = f": {cause}" if cause is not None else ""
        super().__init__(f"{who} declined shared memory: {words} (0x{code:08x}){why}")
        self.__cause__ = cause


def identity_of(device: Device) -> Identity:
    """What this process says of itself, through the given device."""
    return Identity(gid=device.gid, devid=device.devid, host=_host_name(), link_id=os.getpid() & 0xFFFFFFFF)


_host: list[str] = []


def _host_name() -> str:
    if not _host:
        _host.append(socket.gethostname())
    return _host[0]


def kept_own(device: Device, size: int, peer: DevId) -> Region | None:
    """Return a region for receiving that an earlier connection with the same peer has left, without waiting."""
    return link_groups(device).take_own(peer, region_size(device, size))


def region_size(device: Device, size: int) -> int:
    """Return how large a region the device makes for a buffer of `size` bytes."""
    return -(-max(size, SMALLEST_BUFFER) // device.chunk_size) * device.chunk_size


def allocate(device: Device, size: int, peer: DevId, *, leave_room: bool = False) -> Region:
    """Make the region this side receives in: bound to an interrupt, granted to the peer's device only.

    When there is no room, what is kept for later connections is let go; then a smaller one is tried, as Linux does.

    Args: `leave_room`: the window must have room for one more of `size`. A server attaches to the client's when it is
        too late to decline.
    Raises: as `Device.alloc`.
    """
    size = max(size, SMALLEST_BUFFER)
    left_over = region_size(device, size) if leave_room and peer != device.devid else 0
    while True:
        try:
            if device.free_window < region_size(device, size) + left_over:
                raise ack_error("ALLOC_REGION", Ack.ENOSPC)
            return device.alloc(size, interrupt=True, grants=_grants(device, peer))
        except QuotaError:
            if link_groups(device).clear():
                continue
            if size // _SMALLER < max(SMALLEST_BUFFER, device.chunk_size):
                raise
            size //= _SMALLER


def must_allocate(device: Device, size: int, peer: DevId) -> bool:
    """Whether a region for receiving from the peer has to be made, and there is room: for the peer's region too."""
    length = region_size(device, size)
    return device.free_window >= 2 * length and not link_groups(device).has_own(peer, length)


def allocate_once(device: Device, size: int, peer: DevId) -> Region:
    """Make that region, or raise as `Device.alloc`."""
    region = device.alloc(max(size, SMALLEST_BUFFER), interrupt=True, grants=_grants(device, peer))
    link_groups(device).made_own()
    return region


def _grants(device: Device, peer: DevId) -> list[tuple[Permission, DevId | None]]:
    return [] if peer == device.devid else [(_PEER_RIGHTS, peer)]  # the owner needs no grant


def kept_attached(device: Device, answer: PeerAnswer) -> Region | None:
    """Return the peer's region when it is attached since an earlier connection, without waiting. Raises as `attach`."""
    region = link_groups(device).take_attached(answer.devid, answer.token)
    return None if region is None else _checked(region, answer)


def attach(device: Device, answer: PeerAnswer) -> Region:
    """Attach the peer's region.

    Raises: RemoteProtocolError when the token is not the peer's to give or the region is smaller than announced;
    DeviceError when the device refuses.
    """
    try:
        region = device.attach(answer.token, _READ_WRITE, offered_by=answer.devid)
    except QuotaError:
        if not link_groups(device).clear():  # what is kept for later connections
            raise
        region = device.attach(answer.token, _READ_WRITE, offered_by=answer.devid)
    return _checked(region, answer)


def _checked(region: Region, answer: PeerAnswer) -> Region:
    if region.length < answer.size:
        region.close()
        raise RemoteProtocolError(
            f"the peer announced {answer.size} bytes, its region has {region.length}", event="buffer size"
        )
    return region


def announced(region: Region) -> int:
    """Largest size code (16 KiB << n, n up to 6) that fits the region: CLC can say no more."""
    size = SMALLEST_BUFFER
    while size * 2 <= min(region.length, _LARGEST_ANNOUNCED):
        size *= 2
    return size
