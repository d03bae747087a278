# SPDX-License-Identifier: Apache-2.0
"""Which device `open_device` takes: by name, by environment, by what is bound to vfio-pci, by the user's manager."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_sysfs import OURS, FakeSysfs

from ism.driver import Transport, open_device, select
from ism.errors import TransportError
from ism.testing import Fabric

SECOND = "0000:02:00.0"


class Vfio:
    """In place of `VfioTransport`. Attributes: `refused` (errno by address), `asked` (what was opened, and how)."""

    def __init__(self) -> None:
        self.refused: dict[str, int] = {}
        self.asked: list[tuple[str, bool]] = []
        self._fabric = Fabric()

    def open(self, bdf: str, *, allow_no_iommu: bool) -> Transport:
        self.asked.append((bdf, allow_no_iommu))
        if bdf in self.refused:
            raise TransportError(f"vfio:{bdf} is refused", self.refused[bdf])
        return self._fabric.plug()


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ISM_DEVICE", "ISM_ALLOW_NO_IOMMU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ISM_RUN_DIR", str(tmp_path / "run"))


@pytest.fixture
def vfio(monkeypatch: pytest.MonkeyPatch) -> Vfio:
    made = Vfio()
    monkeypatch.setitem(sys.modules, "ism.driver.vfio", SimpleNamespace(VfioTransport=made))
    return made


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSysfs]:
    made = FakeSysfs(tmp_path)
    monkeypatch.setattr(select, "Sysfs", lambda: made)
    return made


def test_with_nothing_named_and_nothing_bound_it_is_the_users_manager(sysfs: FakeSysfs, tmp_path: Path) -> None:
    sysfs.plug(group=1)
    with pytest.raises(TransportError, match=f"no device manager listens on {tmp_path}/run/device.sock"):
        open_device()


def test_with_nothing_named_the_first_function_of_vfio_is_taken(sysfs: FakeSysfs, vfio: Vfio) -> None:
    sysfs.plug(SECOND, group=2, driver="vfio-pci")
    sysfs.plug(OURS, group=1, driver="vfio-pci")
    open_device().close()
    assert vfio.asked == [(OURS, False)]


def test_a_function_that_another_process_uses_is_passed_over(sysfs: FakeSysfs, vfio: Vfio) -> None:
    sysfs.plug(OURS, group=1, driver="vfio-pci")
    sysfs.plug(SECOND, group=2, driver="vfio-pci")
    vfio.refused[OURS] = errno.EBUSY
    open_device().close()
    assert [bdf for bdf, _ in vfio.asked] == [OURS, SECOND]
    vfio.refused[SECOND] = errno.EBUSY
    with pytest.raises(TransportError, match=f"vfio:{SECOND} is refused"):
        open_device()


def test_a_function_that_cannot_be_opened_is_an_error_and_not_passed_over(sysfs: FakeSysfs, vfio: Vfio) -> None:
    sysfs.plug(OURS, group=1, driver="vfio-pci")
    sysfs.plug(SECOND, group=2, driver="vfio-pci")
    vfio.refused[OURS] = errno.EACCES
    with pytest.raises(TransportError, match=f"vfio:{OURS} is refused"):
        open_device()
    assert len(vfio.asked) == 1


def test_what_the_environment_names_comes_before_what_is_bound(
    sysfs: FakeSysfs, vfio: Vfio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sysfs.plug(OURS, group=1, driver="vfio-pci")
    monkeypatch.setenv("ISM_DEVICE", f"vfio-user:{tmp_path}/other.sock")
    with pytest.raises(TransportError, match=r"no device manager listens on .*other\.sock"):
        open_device()
    monkeypatch.setenv("ISM_DEVICE", f"vfio:{SECOND}")
    open_device().close()
    open_device("vfio:01:00.0").close()
    assert [bdf for bdf, _ in vfio.asked] == [SECOND, OURS]


@pytest.mark.parametrize(("said", "allowed"), [("1", True), ("0", False), ("", False)])
def test_the_environment_says_whether_an_iommu_is_needed(
    sysfs: FakeSysfs, vfio: Vfio, monkeypatch: pytest.MonkeyPatch, said: str, allowed: bool
) -> None:
    monkeypatch.setenv("ISM_ALLOW_NO_IOMMU", said)
    open_device(f"vfio:{OURS}").close()
    open_device(f"vfio:{OURS}", allow_no_iommu=True).close()
    assert vfio.asked == [(OURS, allowed), (OURS, True)]


@pytest.mark.parametrize("kind", ["vfio", "uio"])
def test_a_function_that_is_something_else_is_said_to_be_that(sysfs: FakeSysfs, vfio: Vfio, kind: str) -> None:
    sysfs.plug(bdf=SECOND, group=1)
    (sysfs.root / f"bus/pci/devices/{SECOND}/device").write_text("0x1041\n")
    with pytest.raises(TransportError, match="is 1af4:1041, not a virtio-ism function"):
        open_device(f"{kind}:{SECOND}", allow_no_iommu=True)
    assert vfio.asked == []
