# SPDX-License-Identifier: Apache-2.0
"""The header page at the start of every region that carries a ring: one field table, offsets and flag values.

A region holds one direction. Its owner receives; the remote peer sends and is the only one that ever writes the
header page and the ring behind it. So from the owner's side every byte here is hostile: it is read once, validated
and the local copy used (`ism.shm.ring`, `ism.shm.park`). The words follow the CDC block of SMC-D (RFC 7609 section
4.2): type byte 0xFE, the same flag values, but 64-bit counters that never wrap and one word per 128 bytes, because
x86-64 prefetches lines in pairs and some arm64 cores have 128-byte lines. This module needs neither Numba nor numpy.
"""

from __future__ import annotations

import enum
import struct

from ism.layout import Struct, field

HEADER_BYTES = 4096
"""Bytes before the ring: one page, so that the ring begins on a page of its own."""

LINE_BYTES = 128
WORDS_BYTES = 9 * LINE_BYTES
"""Distance between two words that different events change."""

CDC_TYPE = 0xFE
VERSION = 1
MAGIC = b"ISMR"


class Header(Struct, size=HEADER_BYTES):
    """What the sender tells the receiver. Counters start at 0 and never wrap."""

    cdc_type: int = field("B", 0, "0xFE once the writer has started, 0 before", default=CDC_TYPE)
    version: int = field("B", 1, "layout version, 1", default=VERSION)
    line_bytes: int = field("H", 2, "stride of the words below, 128", default=LINE_BYTES)
    magic: bytes = field("4s", 4, "`ISMR`", default=MAGIC)
    kernel_id: int = field("Q", 8, "names the writer's running kernel; CPU numbers compare only if equal; 0 unknown")
    ring_bytes: int = field("Q", 16, "ring size the writer uses; the region's length minus 4096")
    producer: int = field("Q", LINE_BYTES, "bytes ever written into this ring")
    consumer: int = field("Q", 2 * LINE_BYTES, "bytes the writer ever consumed from its own incoming ring")
    reader_parked: int = field("Q", 3 * LINE_BYTES, "sleep number of the writer's reader; odd: asleep")
    writer_parked: int = field("Q", 4 * LINE_BYTES, "sleep number of the writer's writer; odd: asleep")
    flags: int = field("I", 5 * LINE_BYTES, "bits 0-7 connection state, 8-15 producer flags; never cleared")
    cpu: int = field("I", 6 * LINE_BYTES, "CPU number the writer last waited on, plus 1; 0 unknown")
    next_offer: int = field("Q", 7 * LINE_BYTES, "number of rings the writer has offered to be sent into; written last")
    next_token: int = field("Q", 7 * LINE_BYTES + 8, "token of the last such region, which is all ring")
    next_bytes: int = field("Q", 7 * LINE_BYTES + 16, "its length")
    next_moves: int = field("Q", 7 * LINE_BYTES + 24, "number of moves of the writer's own stream; written last")
    next_ring: int = field("Q", 7 * LINE_BYTES + 32, "offer of the owner's it moved to; 0: the ring behind this header")
    next_cursor: int = field("Q", 7 * LINE_BYTES + 40, "producer cursor from which on bytes are there")
    offer_state: int = field("Q", 8 * LINE_BYTES, "0 none, 1 offered, 2 taken, 3 withdrawn: see `ism.shm.offer`")
    offer_waits: int = field("Q", 8 * LINE_BYTES + 8, "1: the writer sleeps until the offer is taken")
    offer_scope: int = field("Q", 8 * LINE_BYTES + 16, "network namespace of the offered TCP connection")
    offer_local: bytes = field("16s", 8 * LINE_BYTES + 24, "writer's address of that connection")
    offer_remote: bytes = field("16s", 8 * LINE_BYTES + 40, "owner's address")
    offer_ports: int = field("I", 8 * LINE_BYTES + 56, "writer's port, and the owner's in the upper half")


class Flags(enum.IntFlag):
    """Values of `Header.flags`: the SMC-D connection-state flags in bits 0-7."""

    DONE_WRITING = 0x80
    """The writer sends no more bytes; everything sent so far can still be read."""
    CLOSED = 0x40
    """The writer closed its end: it neither sends nor reads."""
    ABNORMAL_CLOSE = 0x20
    """The writer closed with bytes unread, or died on purpose: the equivalent of a TCP reset."""


STATE_FLAGS = int(Flags.DONE_WRITING | Flags.CLOSED | Flags.ABNORMAL_CLOSE)
PRODUCER_FLAGS_SHIFT = 8
"""The producer flags of SMC-D (urgent data, write blocked) have bits 8-15 of `Header.flags`."""
RELEASED = 0x01 << PRODUCER_FLAGS_SHIFT
"""The writer's last store: it never writes this region again, which its owner may use anew. Not SMC-D's."""
KNOWN_FLAGS = STATE_FLAGS | 0xFF << PRODUCER_FLAGS_SHIFT
"""Other bits are reserved: written as zero, ignored on reading."""

HELLO: int = int.from_bytes(struct.pack("<BBH4s", CDC_TYPE, VERSION, LINE_BYTES, MAGIC), "little")
"""The first four fields of a started header, as the one word they are written and checked as."""

KERNEL_ID = Header.offset_of("kernel_id")
RING_BYTES = Header.offset_of("ring_bytes")
PRODUCER = Header.offset_of("producer")
CONSUMER = Header.offset_of("consumer")
READER_PARKED = Header.offset_of("reader_parked")
WRITER_PARKED = Header.offset_of("writer_parked")
FLAGS = Header.offset_of("flags")
CPU = Header.offset_of("cpu")
NEXT_OFFER = Header.offset_of("next_offer")
NEXT_TOKEN = Header.offset_of("next_token")
NEXT_BYTES = Header.offset_of("next_bytes")
NEXT_MOVES = Header.offset_of("next_moves")
NEXT_RING = Header.offset_of("next_ring")
NEXT_CURSOR = Header.offset_of("next_cursor")
