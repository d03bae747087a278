# SPDX-License-Identifier: Apache-2.0
"""Field tables: offsets, sizes, byte orders, and what they refuse when they are declared."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from ism.layout import FieldInfo, Struct, field


class Little(Struct, size=12):
    kind: int = field("B", 0, "what it is")
    count: int = field("H", 2, "how many")
    last: int = field("I", 8, "at the end", default=7)


class Big(Struct, size=8, byte_order=">"):
    name: bytes = field("4s", 0, "four bytes")
    value: int = field("I", 4, "big-endian")


def test_values_are_encoded_at_their_offsets_in_their_byte_order() -> None:
    assert Little(kind=1, count=0x0203, last=0x04050607).pack() == bytes.fromhex("01 00 0302 00000000 07060504")
    assert Big(name=b"ism!", value=0x01020304).pack() == b"ism!\x01\x02\x03\x04"


def test_what_was_encoded_is_decoded_and_reserved_bytes_are_ignored() -> None:
    value = Little(kind=9, count=99, last=999)
    assert Little.unpack(value.pack()) == value
    assert Little.unpack(b"\x09\xff\x63\x00\xff\xff\xff\xff\xe7\x03\x00\x00") == value


def test_offsets_into_a_buffer_are_counted_from_its_start() -> None:
    buffer = bytearray(20)
    Little(kind=5).pack_into(buffer, 6)
    assert buffer[6] == 5
    assert Little.unpack(buffer, 6).kind == 5
    assert Little.unpack(memoryview(buffer), 6).last == 7


def test_defaults_fill_what_is_not_given() -> None:
    assert Little() == Little(kind=0, count=0, last=7)
    assert Big().name == bytes(4)


@pytest.mark.parametrize("length", [0, 1, 11])
def test_too_few_bytes_are_an_error(length: int) -> None:
    with pytest.raises(struct.error):
        Little.unpack(bytes(length))


@pytest.mark.parametrize("value", [-1, 256, "1", None])
def test_a_value_that_does_not_fit_its_field_is_an_error(value: object) -> None:
    with pytest.raises(struct.error):
        Little(kind=value).pack()  # type: ignore[arg-type]


def test_structures_are_frozen_and_take_keywords_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Little().kind = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        Little(1)  # type: ignore[call-arg]


def test_the_table_says_where_everything_is() -> None:
    assert (Little.SIZE, Little.ORDER, Big.ORDER) == (12, "<", ">")
    assert Little.offset_of("count") == 2
    assert Little.info("last") == FieldInfo("last", "I", 8, 4, "at the end")
    assert [row.name for row in Little.FIELDS] == ["kind", "count", "last"]
    with pytest.raises(KeyError, match="Little has no field 'nothing'"):
        Little.offset_of("nothing")


def test_the_table_may_be_declared_in_any_order() -> None:
    class Backwards(Struct, size=4):
        second: int = field("H", 2, "behind")
        first: int = field("H", 0, "before")

    assert Backwards(first=1, second=2).pack() == b"\1\0\2\0"


def test_fields_that_overlap_are_refused_at_declaration() -> None:
    with pytest.raises(TypeError, match=r"Overlap\.b at 2 overlaps the field that ends at 4"):

        class Overlap(Struct, size=8):
            a: int = field("I", 0, "four bytes")
            b: int = field("I", 2, "inside the first")


def test_a_size_that_is_too_small_is_refused_at_declaration() -> None:
    with pytest.raises(TypeError, match="Small needs 8 bytes, declared 6"):

        class Small(Struct, size=6):
            a: int = field("Q", 0, "eight bytes")


def test_the_docs_table_lists_every_field() -> None:
    assert list(Little.markdown()) == [
        "| offset | size | field | meaning |",
        "|---|---|---|---|",
        "| 0 | 1 | kind | what it is |",
        "| 2 | 2 | count | how many |",
        "| 8 | 4 | last | at the end |",
    ]
