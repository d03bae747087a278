# SPDX-License-Identifier: Apache-2.0
"""Framing of vfio-user: the header, the command numbers, and bytes in, messages out.

Owns the 16-byte header and the rules by which a byte stream with descriptors becomes messages. Never interprets a
payload (`payloads`, `capabilities`) and does no I/O. Follows the vfio-user specification, "Header" and "Commands".
The peer may lie in every field: a size is checked before anything of that size is kept, so a reader never holds more
than one message beyond what it was fed. All data is little-endian: the protocol says "the host's byte order", and the
hosts served here (x86-64, arm64) are little-endian.
"""

from __future__ import annotations

import enum
import errno
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final, Generic, Protocol, TypeVar

from ism.layout import Buffer, Struct, field
from ism.vfio_user.errors import MalformedMessageError


class HasFileno(Protocol):
    """Anything with a descriptor: an `Fd`, a socket, a file."""

    def fileno(self) -> int: ...


FdLike = int | HasFileno
"""A descriptor that is only borrowed: the callee neither keeps nor closes it."""


class Command(enum.IntEnum):
    """Command numbers. DMA_READ and DMA_WRITE go from server to client, all others from client to server."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    DIRTY_PAGES = 14
    REGION_WRITE_MULTI = 15


FLAG_TYPE_MASK: Final = 0xF
FLAG_TYPE_COMMAND: Final = 0x0
FLAG_TYPE_REPLY: Final = 0x1
FLAG_NO_REPLY: Final = 0x10
FLAG_ERROR: Final = 0x20

MAJOR: Final = 0
MINOR: Final = 0
"""Protocol version 0.0, the one stock QEMU speaks."""

DEFAULT_MAX_DATA_XFER_SIZE: Final = 1 << 20
DEFAULT_MAX_MSG_FDS: Final = 1
"""What a peer that does not say is taken to accept."""

SCM_MAX_FD: Final = 253
"""Descriptors the Linux kernel carries in one message."""


class Header(Struct, size=16):
    """Start of every message."""

    id: int = field("H", 0, "chosen by the sender of the command, echoed in its reply")
    command: int = field("H", 2, "command number, echoed in the reply")
    size: int = field("I", 4, "whole message with this header, bytes")
    flags: int = field("I", 8, "bits 0-3 type (0 command, 1 reply), bit 4 no reply wanted, bit 5 error")
    error: int = field("I", 12, "errno in an error reply, else 0")


HEADER_SIZE: Final = Header.SIZE


def codec_of(*tables: type[Struct]) -> struct.Struct:
    """One codec for structures that follow one another, for paths where a value object per message costs too much."""
    layout = "<"
    for table in tables:
        end = 0
        for row in table.FIELDS:
            layout += f"{row.offset - end}x{row.fmt}"
            end = row.offset + row.size
        layout += f"{table.SIZE - end}x"
    codec = struct.Struct(layout)
    assert codec.size == sum(table.SIZE for table in tables)
    return codec


HEADER: Final = codec_of(Header)

D = TypeVar("D")


class Message(Generic[D]):
    """One received message. `fds` belong to whoever took the message; `problem` says that some were lost."""

    __slots__ = ("command", "error", "fds", "flags", "id", "payload", "problem")

    def __init__(
        self, id: int, command: int, flags: int, error: int, payload: bytearray, fds: list[D], problem: Exception | None
    ) -> None:
        self.id, self.command, self.flags, self.error = id, command, flags, error
        self.payload, self.fds, self.problem = payload, fds, problem

    @property
    def is_reply(self) -> bool:
        """Whether it answers a command of ours."""
        return self.flags & FLAG_TYPE_MASK == FLAG_TYPE_REPLY

    @property
    def wants_reply(self) -> bool:
        """Whether its sender waits for an answer."""
        return not self.flags & (FLAG_NO_REPLY | FLAG_TYPE_MASK)


def command_name(number: int) -> str:
    """Spec spelling of a command number, "command N" for an unknown one."""
    try:
        return Command(number).name
    except ValueError:
        return f"command {number}"


def encode(id: int, command: int, payload: Buffer = b"", *, no_reply: bool = False) -> bytes:
    """One command message."""
    flags = FLAG_NO_REPLY if no_reply else FLAG_TYPE_COMMAND
    return HEADER.pack(id, command, HEADER_SIZE + len(payload), flags, 0) + payload


def encode_reply(id: int, command: int, payload: Buffer = b"") -> bytes:
    """One positive reply."""
    return HEADER.pack(id, command, HEADER_SIZE + len(payload), FLAG_TYPE_REPLY, 0) + payload


def encode_error(id: int, command: int, error: int) -> bytes:
    """One error reply: the header alone, as the specification demands."""
    return HEADER.pack(id, command, HEADER_SIZE, FLAG_TYPE_REPLY | FLAG_ERROR, error)


def check_command(message: Message[D]) -> None:
    """Refuse a command whose flags mean nothing. Raises MalformedMessageError (EINVAL)."""
    if message.flags & ~FLAG_NO_REPLY:
        raise MalformedMessageError(
            f"{command_name(message.command)} with flags {message.flags:#x}; a command has only no_reply (0x10)",
            header=(message.id, message.command),
        )


class MessageReader(Generic[D]):
    """Bytes and descriptors in, messages out.

    Feed each receive as it comes, then take messages until there is none. Descriptors belong to the message that
    holds the last byte they came with: the kernel ends a receive at the piece of data that carries descriptors.

    Args:
        max_message: longest message accepted, bytes with header; may be changed between messages.
        max_fds: descriptors allowed in one message.
    """

    def __init__(self, *, max_message: int, max_fds: int) -> None:
        self.max_message, self.max_fds = max_message, max_fds
        self._buffer = bytearray()
        self._fed = self._taken = 0  # stream positions
        self._marks: deque[tuple[int, list[D], Exception | None]] = deque()
        self._failure: MalformedMessageError | None = None

    @property
    def buffered(self) -> int:
        """Bytes held that are not yet a whole message."""
        return len(self._buffer)

    def feed(self, data: Buffer, fds: Sequence[D] = (), problem: Exception | None = None) -> None:
        """Take over what one receive brought; ownership of `fds` passes to the reader.

        Ordering: take all messages before the next feed, else the bound on memory does not hold.
        """
        self._buffer += data
        self._fed += len(data)
        if fds or problem is not None:
            self._marks.append((self._fed, list(fds), problem))
            # The tail of one message and the whole of the next can both hold a full set.
            if sum(len(mark[1]) for mark in self._marks) > 2 * self.max_fds or len(self._marks) > 2 * self.max_fds + 2:
                self._failed(f"more than {self.max_fds} descriptors in one message", errno.EINVAL)

    def next_message(self) -> Message[D] | None:
        """The next whole message, None when more bytes are needed.

        Returns: a message whose payload and descriptors belong to the caller.
        Raises: MalformedMessageError, fatal, when the stream can no longer be followed; and again at every later call.
        """
        if self._failure is not None:
            raise self._failure
        buffer = self._buffer
        held = len(buffer)
        if held < HEADER_SIZE:
            return None
        id, command, size, flags, error = HEADER.unpack_from(buffer)
        if size < HEADER_SIZE:
            raise self._failed(f"message of {size} bytes, less than its header", errno.EINVAL, (id, command))
        if size > self.max_message:
            raise self._failed(
                f"{command_name(command)} of {size} bytes; at most {self.max_message} are accepted",
                errno.EMSGSIZE,
                (id, command),
            )
        if held < size:
            return None
        payload = buffer[HEADER_SIZE:size]
        del buffer[:size]
        self._taken += size
        marks = self._marks
        if not marks or marks[0][0] > self._taken:
            return Message(id, command, flags, error, payload, [], None)
        fds: list[D] = []
        problem: Exception | None = None
        while marks and marks[0][0] <= self._taken:
            _, more, lost = marks.popleft()
            fds += more
            problem = problem or lost
        return Message(id, command, flags, error, payload, fds, problem)

    def abandon(self) -> list[D]:
        """End reading: give back, to be closed, the descriptors of messages that never came whole."""
        fds = [fd for mark in self._marks for fd in mark[1]]
        self._marks.clear()
        self._buffer.clear()
        return fds

    def _failed(self, text: str, number: int, header: tuple[int, int] | None = None) -> MalformedMessageError:
        self._failure = MalformedMessageError(text, errno=number, header=header, fatal=True)
        return self._failure
