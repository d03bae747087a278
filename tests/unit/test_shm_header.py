# SPDX-License-Identifier: Apache-2.0
"""The header page: one word per line, SMC-D's values, and a document that shows the same table."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ism.shm.header import HEADER_BYTES, HELLO, LINE_BYTES, Flags, Header

DOCUMENT = Path(__file__).parents[2] / "docs" / "memory-order.md"


def make(**values: int) -> Header:
    return Header(**{row.name: values.get(row.name, 0) for row in Header.FIELDS if row.name in values})


def test_words_that_change_apart_lie_on_lines_apart() -> None:
    rows = [row for row in Header.FIELDS if row.offset >= LINE_BYTES]
    changing = [row for row in rows if not row.name.startswith(("next_", "offer_"))]
    lines = [row.offset // LINE_BYTES for row in changing]
    assert len(set(lines)) == len(lines)
    for together in ("next_", "offer_"):
        shared = {row.offset // LINE_BYTES for row in rows if row.name.startswith(together)}
        assert len(shared) == 1
        assert shared.isdisjoint(lines)
    assert all(row.offset % row.size == 0 for row in Header.FIELDS if row.size <= 8 and row.name != "magic")


def test_the_hello_word_is_the_first_eight_bytes_of_a_packed_header() -> None:
    assert Header.unpack(bytes(HEADER_BYTES)).cdc_type == 0
    assert make().pack()[:8] == HELLO.to_bytes(8, "little")
    assert HELLO < 2**63, "kernels compare it as a signed word"


def test_flags_have_the_values_of_smc_d() -> None:
    assert (Flags.DONE_WRITING, Flags.CLOSED, Flags.ABNORMAL_CLOSE) == (0x80, 0x40, 0x20)


def test_the_document_shows_the_table_of_the_code() -> None:
    text = DOCUMENT.read_text()
    assert "\n".join(Header.markdown()) in text


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_a_header_survives_packing(producer: int, token: int, flags: int) -> None:
    header = make(producer=producer, next_token=token, flags=flags)
    assert Header.unpack(header.pack()) == header
