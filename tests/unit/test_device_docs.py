# SPDX-License-Identifier: Apache-2.0
"""`docs/device.md` and `docs/directory.md` say what the code does, where it can be compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ism.device.bars import IMPLEMENTED
from ism.device.function import COUNTERS
from ism.layout import Struct
from ism.manager import directory
from ism.virtio import ism_spec
from ism.virtio.ism_spec import Ack, DirectoryCommand, IsmFeature, Permission
from ism.virtio.pci import CommonCfg

DOCS = Path(__file__).parents[2] / "docs"
TEXT, DIRECTORY = (DOCS / "device.md").read_text(), (DOCS / "directory.md").read_text()
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
DIRECTORY_STRUCTS = [
    ism_spec.ListenerRequest,
    ism_spec.LookupReply,
    ism_spec.IntendRequest,
    ism_spec.ClaimRequest,
    ism_spec.ClaimReply,
    ism_spec.RetractRequest,
    ism_spec.StartRequest,
    ism_spec.DirectoryEvent,
]
PAGES = [(TEXT, STRUCTS), (DIRECTORY, DIRECTORY_STRUCTS)]


@pytest.mark.parametrize(
    ("text", "struct"),
    [(text, struct) for text, structs in PAGES for struct in structs],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_field_table_is_the_declaration_s(text: str, struct: type[Struct]) -> None:
    found = re.search(rf"<!-- table {struct.__name__} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert found, f"no table of {struct.__name__}"
    assert found[1].splitlines() == list(struct.markdown())


def test_no_table_is_of_an_unknown_structure() -> None:
    for text, structs in PAGES:
        assert set(re.findall(r"<!-- table (\w+) -->", text)) == {s.__name__ for s in structs}


def test_every_command_of_the_directory_is_listed() -> None:
    part = DIRECTORY.split("| command | name |")[1].split("\n\n")[0]
    listed = re.findall(r"^\| (\d+) \| ([A-Z]+) \|", part, re.MULTILINE)
    assert [(int(number), name) for number, name in listed] == [(int(c), c.name) for c in DirectoryCommand]


def test_every_feature_that_exists_is_listed() -> None:
    part = TEXT.split("| bit | name |")[1].split("\n\n")[0]
    listed = {(int(bit), name) for bit, name in re.findall(r"^\| (\d+) \| ([A-Z_0-9]+) \|", part, re.MULTILINE)}
    assert {(int(IsmFeature(bit)), IsmFeature(bit).name) for bit in IMPLEMENTED} <= listed


def test_the_quotas_of_the_directory_are_the_code_s() -> None:
    for limit in (directory.MAX_LISTENERS, directory.MAX_INTENTS):
        assert str(limit) in DIRECTORY
        assert str(limit) in (DOCS / "manager.md").read_text()
    assert f"{directory.MAX_CLAIMS} latest claims" in DIRECTORY


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
