# SPDX-License-Identifier: Apache-2.0
"""`docs/device.md` says what the code does, where it can be compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ism.device.function import COUNTERS
from ism.layout import Struct
from ism.virtio import ism_spec
from ism.virtio.ism_spec import Ack, Permission
from ism.virtio.pci import CommonCfg

TEXT = (Path(__file__).parents[2] / "docs" / "device.md").read_text()
STRUCTS = [
    CommonCfg,
    ism_spec.Config,
    ism_spec.AllocRequest,
    ism_spec.AllocReply,
    ism_spec.AttachRequest,
    ism_spec.AttachReply,
    ism_spec.Area,
    ism_spec.DetachRequest,
    ism_spec.GrantDefaultRequest,
    ism_spec.GrantDeviceRequest,
    ism_spec.EventVectorRequest,
    ism_spec.UpdateEvent,
    ism_spec.PeerEvent,
]


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda s: s.__name__)
def test_a_field_table_is_the_declaration_s(struct: type[Struct]) -> None:
    found = re.search(rf"<!-- table {struct.__name__} -->\n(.*?)\n<!-- end -->", TEXT, re.DOTALL)
    assert found, f"no table of {struct.__name__}"
    assert found[1].splitlines() == list(struct.markdown())


def test_no_table_is_of_an_unknown_structure() -> None:
    assert set(re.findall(r"<!-- table (\w+) -->", TEXT)) == {s.__name__ for s in STRUCTS}


def test_every_ack_is_listed() -> None:
    listed = re.findall(r"^\| (\d+) \| ([A-Z_0-9]+) \|", TEXT.split("| ack | name |")[1].split("\n\n")[0], re.MULTILINE)
    assert {(int(value), name) for value, name in listed} == {(int(a), a.name) for a in Ack}


def test_every_permission_is_listed() -> None:
    part = TEXT.split("| permission |")[1].split("\n\n")[0]
    listed = re.findall(r"^\| ([A-Z_]+) \| (\d+) \|", part, re.MULTILINE)
    assert {(name, int(value)) for name, value in listed} == {(p.name, int(p)) for p in Permission}


def test_every_counter_is_listed() -> None:
    part = TEXT.split("## Counters")[1].split("##")[0]
    assert tuple(re.findall(r"`([a-z_]+)`", part)) == COUNTERS
