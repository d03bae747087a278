# SPDX-License-Identifier: Apache-2.0
"""VFIO's and iommufd's numbers against the kernel headers, as a C compiler reads them.

The headers are those that came with what guests are made from, if there are such, which are newer; else this machine's.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from enum import IntEnum
from pathlib import Path

import pytest

from ism.driver import vfio_uapi as uapi
from ism.errors import TransportError
from ism.guests.store import Store
from ism.layout import Struct

IOMMUFD = "HAVE_IOMMUFD"
CDEV = "VFIO_DEVICE_BIND_IOMMUFD"
ENUMS: list[type[IntEnum]] = [
    uapi.Request,
    uapi.IommuType,
    uapi.GroupFlag,
    uapi.DeviceFlag,
    uapi.RegionFlag,
    uapi.IrqFlag,
    uapi.IrqSet,
    uapi.DmaFlag,
    uapi.IommuInfoFlag,
    uapi.IoasMapFlag,
    uapi.Region,
    uapi.Irq,
    uapi.Capability,
]
# structure: its name in C, what its headers must define, whether later kernels have appended to it
STRUCTURES: dict[type[Struct], tuple[str, str, bool]] = {
    uapi.GroupStatus: ("struct vfio_group_status", "", False),
    uapi.DeviceInfo: ("struct vfio_device_info", "", True),
    uapi.RegionInfo: ("struct vfio_region_info", "", False),
    uapi.CapabilityHeader: ("struct vfio_info_cap_header", "", False),
    uapi.SparseMmap: ("struct vfio_region_info_cap_sparse_mmap", "", False),
    uapi.SparseArea: ("struct vfio_region_sparse_mmap_area", "", False),
    uapi.IrqInfo: ("struct vfio_irq_info", "", False),
    uapi.IrqSetHeader: ("struct vfio_irq_set", "", False),
    uapi.Type1Info: ("struct vfio_iommu_type1_info", "", False),
    uapi.IovaRangeCapability: ("struct vfio_iommu_type1_info_cap_iova_range", "", False),
    uapi.IovaRange: ("struct vfio_iova_range", "", False),
    uapi.DmaMap: ("struct vfio_iommu_type1_dma_map", "", False),
    uapi.DmaUnmap: ("struct vfio_iommu_type1_dma_unmap", "", False),
    uapi.BindIommufd: ("struct vfio_device_bind_iommufd", CDEV, True),
    uapi.AttachIommufd: ("struct vfio_device_attach_iommufd_pt", CDEV, True),
    uapi.IoasAlloc: ("struct iommu_ioas_alloc", IOMMUFD, False),
    uapi.IoasIovaRanges: ("struct iommu_ioas_iova_ranges", IOMMUFD, False),
    uapi.IoasMap: ("struct iommu_ioas_map", IOMMUFD, False),
    uapi.IoasUnmap: ("struct iommu_ioas_unmap", IOMMUFD, False),
}
CONSTANTS = [member for enum in ENUMS for member in enum]


def needs(name: str) -> str:
    """The macro without which the headers do not know a constant."""
    if name.startswith("IOMMU_"):
        return IOMMUFD
    return name if "IOMMUFD" in name else ""


def guarded(macro: str, line: str) -> str:
    return f"#ifdef {macro}\n{line}\n#endif" if macro else line


def printed(label: str, expression: str) -> str:
    return f'printf("{label} %llu\\n", (unsigned long long)({expression}));'


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the headers say, by name; what they do not know is absent."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    newer = list(Store.default().folder.glob("tools-*/usr/include/linux/iommufd.h"))
    include = newer[0].parents[1] if newer else Path("/usr/include")
    if not (include / "linux/vfio.h").exists():
        pytest.skip("no kernel headers: apt-get install linux-libc-dev")
    lines = [guarded(needs(member.name), printed(member.name, member.name)) for member in CONSTANTS]
    for made, (name, macro, _) in STRUCTURES.items():
        lines.append(guarded(macro, printed(made.__name__, f"sizeof({name})")))
        for row in made.FIELDS:
            at = printed(f"{made.__name__}.{row.name}", f"offsetof({name}, {row.name})")
            size = printed(f"{made.__name__}.{row.name}:size", f"sizeof((({name} *)0)->{row.name})")
            lines += [guarded(macro, at), guarded(macro, size)]
    program = "\n".join(
        [
            "#include <stddef.h>",
            "#include <stdio.h>",
            "#include <linux/vfio.h>",
            "#if __has_include(<linux/iommufd.h>)",
            "#include <linux/iommufd.h>",
            f"#define {IOMMUFD} 1",
            "#endif",
            "int main(void) {",
            *lines,
            "return 0; }",
        ]
    )
    folder = tmp_path_factory.mktemp("uapi")
    (folder / "uapi.c").write_text(program)
    subprocess.run([compiler, "-isystem", include, "-o", folder / "uapi", folder / "uapi.c"], check=True)
    output = subprocess.run([folder / "uapi"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in map(str.split, output.splitlines())}


def known(headers: dict[str, int], name: str) -> int:
    if name not in headers:
        pytest.skip(f"{name} is newer than this machine's kernel headers")
    return headers[name]


@pytest.mark.parametrize("member", CONSTANTS, ids=lambda member: member.name)
def test_a_constant_is_the_kernels(headers: dict[str, int], member: IntEnum) -> None:
    assert member == known(headers, member.name)


@pytest.mark.parametrize("made", STRUCTURES, ids=lambda made: made.__name__)
def test_a_structure_is_laid_out_as_the_kernels(headers: dict[str, int], made: type[Struct]) -> None:
    size = known(headers, made.__name__)
    appended = STRUCTURES[made][2]
    assert size >= made.SIZE if appended else size == made.SIZE
    for row in made.FIELDS:
        name = f"{made.__name__}.{row.name}"
        assert (row.offset, row.size) == (headers[name], headers[f"{name}:size"]), name


@pytest.mark.parametrize("made", [made for made in STRUCTURES if {"argsz", "size"} & {row.name for row in made.FIELDS}])
def test_a_structure_that_begins_with_its_size_says_it_by_default(made: type[Struct]) -> None:
    if made.FIELDS[0].name in ("argsz", "size"):
        fields = {row.name: 0 for row in made.FIELDS[1:]}
        (first,) = struct.unpack_from("<I", made(**fields).pack())
        assert first == made.SIZE


def test_what_sets_interrupts_carries_its_descriptors_behind_it() -> None:
    raw = uapi.irq_set(uapi.IrqSet.VFIO_IRQ_SET_DATA_EVENTFD, uapi.Irq.VFIO_PCI_MSIX_IRQ_INDEX, 3, 2, [7, -1])
    head = uapi.IrqSetHeader.unpack(raw)
    assert (head.argsz, head.index, head.start, head.count) == (len(raw), 2, 3, 2)
    assert struct.unpack_from("<2i", raw, uapi.IrqSetHeader.SIZE) == (7, -1)


def test_the_capabilities_of_an_answer_are_walked_in_their_order() -> None:
    answer = bytearray(64)
    uapi.CapabilityHeader(id=3, version=1, next=48).pack_into(answer, 32)
    uapi.CapabilityHeader(id=1, version=1, next=0).pack_into(answer, 48)
    assert list(uapi.capability_chain(answer, 32)) == [(3, 32), (1, 48)]
    assert list(uapi.capability_chain(answer, 0)) == []


@pytest.mark.parametrize(("following", "first"), [(32, 32), (60, 32), (0, 60)])
def test_capabilities_that_go_in_circles_or_out_of_the_answer_are_refused(following: int, first: int) -> None:
    answer = bytearray(64)
    uapi.CapabilityHeader(id=3, version=1, next=following).pack_into(answer, 32)
    with pytest.raises(TransportError, match="leave its answer"):
        list(uapi.capability_chain(answer, first))


def test_an_array_that_goes_beyond_the_answer_is_refused() -> None:
    assert uapi.table(uapi.SparseArea, bytes(32), 16, 1) == [uapi.SparseArea(offset=0, size=0)]
    with pytest.raises(TransportError, match="names 2 entries"):
        uapi.table(uapi.SparseArea, bytes(32), 16, 2)
