# SPDX-License-Identifier: Apache-2.0
"""Framing: messages from pieces, descriptors to messages, limits."""

from __future__ import annotations

import errno
import struct

import pytest

from ism.vfio_user import wire
from ism.vfio_user.errors import MalformedMessageError
from ism.vfio_user.wire import Command, MessageReader


def reader(max_message: int = 4096, max_fds: int = 4) -> MessageReader[str]:
    return MessageReader(max_message=max_message, max_fds=max_fds)


def drain(source: MessageReader[str]) -> list[tuple[int, bytes, list[str]]]:
    taken = []
    while (message := source.next_message()) is not None:
        taken.append((message.id, bytes(message.payload), message.fds))
    return taken


def test_the_header_has_the_layout_of_the_specification() -> None:
    message = wire.encode(0x1234, Command.REGION_READ, b"abcd", no_reply=True)
    assert message == struct.pack("<HHIII", 0x1234, 9, 20, 0x10, 0) + b"abcd"
    assert wire.encode_error(5, Command.DMA_MAP, errno.EEXIST) == struct.pack("<HHIII", 5, 2, 16, 0x21, 17)


def test_command_numbers_are_those_of_the_specification() -> None:
    assert [command.value for command in Command] == list(range(1, 16))
    assert (Command.DEVICE_SET_IRQS, Command.DMA_READ, Command.REGION_WRITE_MULTI) == (8, 11, 15)


def test_a_message_in_single_bytes_comes_out_whole() -> None:
    source = reader()
    for octet in wire.encode(1, 9, b"payload"):
        assert drain(source) == []
        source.feed(bytes([octet]))
    assert drain(source) == [(1, b"payload", [])]


def test_several_messages_in_one_piece_come_out_in_order() -> None:
    source = reader()
    source.feed(wire.encode(1, 9, b"a") + wire.encode(2, 9) + wire.encode(3, 9, b"ccc")[:-1])
    assert drain(source) == [(1, b"a", []), (2, b"", [])]
    source.feed(b"c")
    assert drain(source) == [(3, b"ccc", [])]


def test_descriptors_belong_to_the_message_with_the_last_byte_they_came_with() -> None:
    source = reader()
    source.feed(wire.encode(1, 9) + wire.encode(2, 2, b"x" * 8)[:20], ["fd"])
    assert drain(source) == [(1, b"", [])]
    source.feed(wire.encode(2, 2, b"x" * 8)[20:] + wire.encode(3, 9))
    assert drain(source) == [(2, b"x" * 8, ["fd"]), (3, b"", [])]


def test_a_size_less_than_the_header_ends_the_stream() -> None:
    source = reader()
    source.feed(struct.pack("<HHIII", 1, 9, 15, 0, 0))
    for _ in range(2):
        with pytest.raises(MalformedMessageError) as caught:
            source.next_message()
        assert caught.value.fatal
        assert caught.value.header == (1, 9)


def test_a_size_above_the_limit_is_refused_before_anything_is_kept() -> None:
    source = reader(max_message=100)
    source.feed(struct.pack("<HHIII", 1, 9, 101, 0, 0))
    with pytest.raises(MalformedMessageError) as caught:
        source.next_message()
    assert caught.value.errno == errno.EMSGSIZE


def test_descriptors_dribbled_into_one_message_are_bounded_and_given_back() -> None:
    source = reader(max_fds=2)
    data = wire.encode(1, 9, b"x" * 50)
    for octet in data[:5]:
        source.feed(bytes([octet]), ["fd"])
    with pytest.raises(MalformedMessageError):
        source.next_message()
    assert source.abandon() == ["fd"] * 5


def test_lost_descriptors_are_reported_with_their_message() -> None:
    source = reader()
    problem = OSError("lost")
    source.feed(wire.encode(1, 2), [], problem)
    message = source.next_message()
    assert message is not None
    assert message.problem is problem


def test_a_command_with_reply_or_unknown_flags_is_refused() -> None:
    for flags in (0x20, 0x40, 0x2, 0x8000_0000):
        message = wire.Message[str](1, 9, flags, 0, bytearray(), [], None)
        with pytest.raises(MalformedMessageError):
            wire.check_command(message)
