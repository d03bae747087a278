# SPDX-License-Identifier: Apache-2.0
"""The VERSION message."""

from __future__ import annotations

import json
import struct

import pytest
from vfio_user_rig import QEMU_CAPABILITIES

from ism.vfio_user.capabilities import MAX_VERSION_DATA, Capabilities, encode_version, parse_version
from ism.vfio_user.errors import MalformedMessageError


def version(text: bytes) -> bytes:
    return struct.pack("<HH", 0, 0) + text


def test_qemus_proposal_is_understood() -> None:
    text = json.dumps({"capabilities": QEMU_CAPABILITIES}).encode() + b"\0"
    major, minor, capabilities = parse_version(version(text))
    assert (major, minor) == (0, 0)
    assert (capabilities.max_msg_fds, capabilities.max_data_xfer_size) == (16, 1 << 20)
    assert (capabilities.max_dma_maps, capabilities.pgsizes, capabilities.page_size) == (65535, 4096, 4096)
    assert capabilities.write_multiple
    assert capabilities.raw["migration"] == {"pgsize": 4096, "max_bitmap_size": 268435456}


def test_what_is_not_said_has_the_defaults_of_the_specification() -> None:
    for text in (b"", b"{}\0", b'{"capabilities":{}}\0'):
        capabilities = parse_version(version(text))[2]
        assert capabilities == Capabilities()
        assert (capabilities.max_msg_fds, capabilities.max_data_xfer_size) == (1, 1 << 20)


@pytest.mark.parametrize(
    "text",
    [
        b'{"capabilities":{}}',  # no NUL
        b'{"capabilities":{}}\0\0',
        b'{"capa\0bilities":{}}\0',
        b"\0",
        b"[]\0",
        b"7\0",
        b"\xff\xfe\0",
        b"{\0",
        b'{"capabilities":[]}\0',
        b'{"capabilities":{"max_msg_fds":-1}}\0',
        b'{"capabilities":{"max_msg_fds":true}}\0',
        b'{"capabilities":{"max_msg_fds":1.5}}\0',
        b'{"capabilities":{"max_msg_fds":"16"}}\0',
        b'{"capabilities":{"max_data_xfer_size":0}}\0',
        b'{"capabilities":{"max_dma_maps":null}}\0',
        b'{"capabilities":{"pgsizes":0}}\0',
        b'{"capabilities":{"pgsizes":18446744073709551616}}\0',
        b'{"capabilities":{"write_multiple":1}}\0',
        b'{"capabilities":{"x":NaN}}\0',
        b"[" * 4000 + b"\0",
        b'{"x":"' + b"a" * MAX_VERSION_DATA + b'"}\0',
    ],
)
def test_text_that_is_no_capability_object_is_refused(text: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        parse_version(version(text))


def test_a_payload_too_short_for_a_version_is_refused() -> None:
    with pytest.raises(MalformedMessageError):
        parse_version(b"\0\0\0")


def test_the_text_ends_in_nul_and_comes_back() -> None:
    data = encode_version(0, 0, {"max_msg_fds": 3, "own": {"a": 1}})
    assert data[-1] == 0
    assert parse_version(data)[2].raw == {"max_msg_fds": 3, "own": {"a": 1}}


def test_more_descriptors_than_the_kernel_carries_are_not_believed() -> None:
    assert parse_version(encode_version(0, 0, {"max_msg_fds": 10000}))[2].max_msg_fds == 253
