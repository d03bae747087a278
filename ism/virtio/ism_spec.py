# SPDX-License-Identifier: Apache-2.0
"""The pinned revision of the virtio-ism proposal: identities, configuration, commands, acks, events.

The draft chapter was never merged into the virtio specification and several revisions differ on the wire, so this
module says which one this project speaks: the last posted one (chunks, area lists, positive ack codes, ack first),
with the event queue at index 1. `docs/device.md` lists the decisions where the proposal is silent.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from ism.layout import Struct, field

VIRTIO_ID_ISM = 44
PCI_DEVICE_ID = 0x1040 + VIRTIO_ID_ISM
PCI_CLASS = 0x058000
"""Memory controller, other."""
PCI_REVISION = 1

SHMID_REGIONS = 1
SHMID_NOTIFY = 2

QUEUE_CONTROL = 0
QUEUE_EVENTS = 1
CONTROL_QUEUE_SIZE = 64
EVENT_QUEUE_SIZE = 64

NOTIFY_SIZE = 4
DEFAULT_CHUNK_SIZE = 64 * 1024
MIN_CHUNK_SIZE = 4096


class IsmFeature(IntEnum):
    """Device feature bit numbers. Only EVENT_IRQ is the proposal's, the others are this project's."""

    EVENT_IRQ = 0
    """A region can be bound to an MSI-X vector (EVENT_VECTOR)."""
    EVENT_VQ = 1
    """Queue 1 carries events."""
    DIRECTORY = 16
    """The device knows who listens where: class DIRECTORY, events CLAIMED and START."""
    RECLAIM = 17
    TRAPPED = 18
    """Accesses to regions are messages: whole loads and stores, but no atomic read-modify-write."""


class Config(Struct, size=32):
    """Device configuration, read-only for the driver."""

    gid: int = field("Q", 0, "domain; devices with one gid can share; never 0")
    devid: int = field("Q", 8, "this device inside the domain; never 0")
    chunk_size: int = field("Q", 16, "unit of allocation, bytes, a power of two, at least a page")
    notify_size: int = field("Q", 24, "stride of the notify slots, bytes")


class CommandClass(IntEnum):
    """First byte of the readable part."""

    ALLOC = 0
    ATTACH = 1
    DETACH = 2
    GRANT = 3
    EVENT_VECTOR = 4
    DIRECTORY = 0x80
    """This project's: with feature DIRECTORY only."""


class GrantCommand(IntEnum):
    """Second byte, class GRANT. Classes other than this and DIRECTORY have command 0 only."""

    SET_DEFAULT = 0
    SET_FOR_DEVICE = 1


class DirectoryCommand(IntEnum):
    """Second byte, class DIRECTORY."""

    PUBLISH = 0
    WITHDRAW = 1
    LOOKUP = 2
    INTEND = 3
    CLAIM = 4
    RETRACT = 5
    START = 6


class Ack(IntEnum):
    """First byte of the writable part."""

    OK = 0
    ENOENT = 2
    E2BIG = 7
    ENOMEM = 12
    ENOSPC = 28
    PERM_EATTACH = 100
    PERM_EREAD = 101
    PERM_EWRITE = 102
    ERR = 255


class Permission(IntFlag):
    """Grant bits, le64 on the wire."""

    READ = 1
    WRITE = 2
    ATTACH = 4
    MANAGE = 8
    CLEAN_DEFAULT = 16


class CommandHeader(Struct, size=2):
    """Start of the readable part of every control chain."""

    cls: int = field("B", 0, "CommandClass")
    command: int = field("B", 1, "command inside the class")


class AllocRequest(Struct, size=8):
    """ALLOC: make a region."""

    size: int = field("Q", 0, "bytes wanted, rounded up to chunk_size")


class AllocReply(Struct, size=16):
    """Reply of ALLOC, behind the ack byte, followed by `num` areas."""

    token: int = field("Q", 0, "name of the region")
    num: int = field("Q", 8, "number of areas (on E2BIG: how many slots are needed)")


class AttachRequest(Struct, size=12):
    """ATTACH: map a region of a peer; more bytes may follow and are ignored."""

    token: int = field("Q", 0, "name of the region")
    rw_perm: int = field("I", 8, "1 read, 2 write, 0 = all that is granted")


class AttachReply(Struct, size=8):
    """Reply of ATTACH, behind the ack byte, followed by `num` areas."""

    num: int = field("Q", 0, "number of areas (on E2BIG: how many slots are needed)")


class Area(Struct, size=16):
    """One run of chunks; areas are listed in the linear order of the region."""

    offset: int = field("Q", 0, "into shared memory region 1 of this device")
    size: int = field("Q", 8, "bytes, a multiple of chunk_size")


class DetachRequest(Struct, size=8):
    """DETACH: let a region go; by its owner: the token dies."""

    token: int = field("Q", 0, "name of the region")


class GrantDefaultRequest(Struct, size=16):
    """GRANT SET_DEFAULT: what devices without an entry of their own may do."""

    token: int = field("Q", 0, "name of the region")
    permissions: int = field("Q", 8, "Permission bits")


class GrantDeviceRequest(Struct, size=24):
    """GRANT SET_FOR_DEVICE: what one device may do; replaces the default for it."""

    token: int = field("Q", 0, "name of the region")
    permissions: int = field("Q", 8, "Permission bits; CLEAN_DEFAULT also empties the default")
    peer_devid: int = field("Q", 16, "the device")


class EventVectorRequest(Struct, size=16):
    """EVENT_VECTOR: which MSI-X vector tells of doorbells on the region."""

    token: int = field("Q", 0, "name of the region")
    vector: int = field("Q", 8, "MSI-X table index, 0xFFFF = none")


class EventType(IntFlag):
    """ev_type of an event."""

    UPDATE = 1
    ATTACH = 2
    DETACH = 4
    CLAIMED = 1 << 16
    START = 1 << 17


class UpdateEvent(Struct, size=24):
    """A peer rang the doorbell of a region that has no vector."""

    ev_type: int = field("Q", 0, "1", default=EventType.UPDATE)
    offset: int = field("Q", 8, "first area of the region, in this device's window")
    devid: int = field("Q", 16, "who caused it")


class PeerEvent(Struct, size=32):
    """A peer attached to, or detached from, a region this device holds."""

    ev_type: int = field("Q", 0, "2 attach, 4 detach")
    offset: int = field("Q", 8, "first area of the region, in this device's window")
    devid: int = field("Q", 16, "who caused it")
    peers: int = field("Q", 24, "devices that hold the region now")


class ListenerRequest(Struct, size=32):
    """DIRECTORY PUBLISH, WITHDRAW, LOOKUP: an address and port at which somebody listens."""

    address: bytes = field("16s", 0, "network order, IPv4 as v4-mapped IPv6")
    port: int = field("H", 16, "TCP port, not 0")
    scope: int = field("Q", 24, "the caller's network namespace, as the guest names it")


class LookupReply(Struct, size=8):
    """Reply of DIRECTORY LOOKUP, behind the ack byte."""

    listeners: int = field("Q", 0, "devices that publish it, at least 1")


class IntendRequest(Struct, size=56):
    """DIRECTORY INTEND: a connection that the caller is about to make."""

    nonce: int = field("Q", 0, "random, chosen by the caller, not 0")
    scope: int = field("Q", 8, "the caller's network namespace, as the guest names it")
    local_address: bytes = field("16s", 16, "of the caller, as for PUBLISH")
    remote_address: bytes = field("16s", 32, "the destination")
    local_port: int = field("H", 48, "of the caller, not 0")
    remote_port: int = field("H", 50, "of the destination, not 0")


class ClaimRequest(Struct, size=56):
    """DIRECTORY CLAIM: a connection that the caller has accepted, as the caller sees it."""

    scope: int = field("Q", 0, "the caller's network namespace, as the guest names it")
    local_address: bytes = field("16s", 16, "of the caller: the destination of the intent")
    remote_address: bytes = field("16s", 32, "of the client")
    local_port: int = field("H", 48, "of the caller")
    remote_port: int = field("H", 50, "of the client")


class ClaimReply(Struct, size=16):
    """Reply of DIRECTORY CLAIM, behind the ack byte."""

    nonce: int = field("Q", 0, "of the intent")
    devid: int = field("Q", 8, "the client's device")


class RetractRequest(Struct, size=8):
    """DIRECTORY RETRACT: the caller goes on without an answer to its intent."""

    nonce: int = field("Q", 0, "of the caller's intent")


class StartRequest(Struct, size=16):
    """DIRECTORY START: tell the client of a claimed connection to begin."""

    nonce: int = field("Q", 0, "of the intent that the caller has claimed")
    devid: int = field("Q", 8, "the client's device, from ClaimReply")


class DirectoryEvent(Struct, size=32):
    """Something happened to an intent of this device."""

    ev_type: int = field("Q", 0, "1 << 16 claimed, 1 << 17 start")
    nonce: int = field("Q", 8, "of the intent")
    devid: int = field("Q", 16, "the server's device")
