# SPDX-License-Identifier: Apache-2.0
"""Our configuration space as `lspci` decodes it: outside truth for identity, BARs and capabilities."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from ism.device.contract import FunctionConfig
from ism.device.function import IsmFunction
from ism.ids import DevId, Gid
from ism.manager.registry import DomainRegistry
from ism.virtio.ism_spec import IsmFeature

lspci = shutil.which("lspci") or shutil.which("lspci", path="/usr/sbin:/sbin")
pytestmark = pytest.mark.skipif(lspci is None, reason="lspci is not installed (Debian package pciutils)")

CHUNK = 64 * 1024
WINDOW = 64 << 20
VECTORS = 600
BARS = {0: 0xFE000000, 1: 0xFE100000, 2: 0xFE200000, 4: 0xC0000000}


class NoMemory:
    """A guest without memory: configuration space needs none."""

    def read(self, iova: int, length: int) -> bytes:
        raise NotImplementedError

    def write(self, iova: int, data: bytes | memoryview) -> None:
        raise NotImplementedError

    def read_u16(self, iova: int) -> int:
        raise NotImplementedError

    def write_u16(self, iova: int, value: int) -> None:
        raise NotImplementedError


def decode(path: Path, features: frozenset[int], bars: Mapping[int, int] = BARS) -> str:
    config = FunctionConfig(
        gid=1, devid=DevId(2), chunk_size=CHUNK, window_size=WINDOW, vectors=VECTORS, features=features
    )
    function = IsmFunction(config, DomainRegistry(Gid(1), CHUNK), NoMemory())
    for index, address in bars.items():
        function.config_write(0x10 + 4 * index, address.to_bytes(8 if index == 4 else 4, "little"))
    function.config_write(4, b"\x06\x00")
    space = function.config_read(0, 256)
    lines = ["00:01.0 device under test"]
    lines += [f"{at:02x}: {space[at : at + 16].hex(' ')}" for at in range(0, 256, 16)]
    dump = path / "config.hex"
    dump.write_text("\n".join(lines) + "\n\n")
    assert lspci
    done = subprocess.run(
        [lspci, "-F", str(dump), "-vv", "-nn"], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.fixture
def shown(tmp_path: Path) -> str:
    return decode(tmp_path, frozenset({IsmFeature.EVENT_IRQ, IsmFeature.EVENT_VQ}))


def test_lspci_shows_the_identity_of_a_modern_virtio_device(shown: str) -> None:
    first = shown.splitlines()[0]
    assert "[0580]" in first
    assert "[1af4:106c]" in first
    assert "(rev 01)" in first
    assert re.search(r"Subsystem: .*\[1af4:006c\]", shown)
    assert "pin A" in shown
    assert re.search(r"Status: Cap\+ .*INTx-", shown)
    assert re.search(r"Control: I/O- Mem\+ BusMaster\+ ", shown)


def test_lspci_shows_four_bars_with_their_kinds(shown: str) -> None:
    regions = re.findall(r"Region (\d): Memory at ([0-9a-f]+) \((.*?)\)", shown)
    assert regions == [
        ("0", "fe000000", "32-bit, non-prefetchable"),
        ("1", "fe100000", "32-bit, non-prefetchable"),
        ("2", "fe200000", "32-bit, non-prefetchable"),
        ("4", "c0000000", "64-bit, prefetchable"),
    ]


def test_lspci_shows_the_regions_window_above_4_gib(tmp_path: Path) -> None:
    shown = decode(tmp_path, frozenset(), {**BARS, 4: 0x38_0000_0000})
    assert "Region 4: Memory at 3800000000 (64-bit, prefetchable)" in shown


def test_lspci_shows_every_virtio_structure_in_its_bar(shown: str) -> None:
    caps = re.findall(
        r"Vendor Specific Information: VirtIO: (\S+)\s+BAR=(\d) offset=([0-9a-f]{8}) size=([0-9a-f]{8})"
        r"(?: multiplier=([0-9a-f]{8}))?",
        shown,
    )
    slots = WINDOW // CHUNK
    numbers = [(int(bar), int(offset, 16), int(size, 16)) for _, bar, offset, size, _ in caps]
    assert numbers == [
        (0, 0x0000, 64),
        (0, 0x3000, 2 * 4),
        (0, 0x1000, 1),
        (0, 0x2000, 32),
        (0, 0, 0),  # PCI configuration access: the driver fills it in
        (4, 0, WINDOW),
        (2, 0, slots * 4),
    ]
    assert [name for name, *_ in caps[:4]] == ["CommonCfg", "Notify", "ISR", "DeviceCfg"]
    assert caps[1][4] == "00000004"


def test_lspci_shows_one_notify_word_less_without_the_event_queue(tmp_path: Path) -> None:
    shown = decode(tmp_path, frozenset())
    assert "BAR=0 offset=00003000 size=00000004 multiplier=00000004" in shown


def test_lspci_shows_msix_in_bar_1(shown: str) -> None:
    assert f"MSI-X: Enable- Count={VECTORS} Masked-" in shown
    assert "Vector table: BAR=1 offset=00000000" in shown
    assert "PBA: BAR=1 offset=00003000" in shown


def test_lspci_finds_no_damage(shown: str) -> None:
    for complaint in ("!!!", "<chain looped>", "<chain broken>", "invalid", "access denied"):
        assert complaint not in shown
