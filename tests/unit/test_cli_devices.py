# SPDX-License-Identifier: Apache-2.0
"""`ism devices`, `ism bind` and `ism unbind` as their user meets them, on a made-up machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fake_sysfs import OURS, FakeSysfs

from ism.cli import cli, main
from ism.driver import pci_sysfs


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSysfs:
    made = FakeSysfs(tmp_path)
    monkeypatch.setattr(pci_sysfs, "Sysfs", lambda: made)
    monkeypatch.delenv("ISM_ALLOW_NO_IOMMU", raising=False)
    return made


def ism(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, catch_exceptions=True)


def test_without_a_function_it_says_so_and_succeeds(sysfs: FakeSysfs) -> None:
    done = ism("devices")
    assert done.exit_code == 0
    assert done.output.startswith("no virtio-ism function (PCI 1af4:106c) in this machine")
    assert json.loads(ism("devices", "--json").output) == []


def test_a_function_that_is_ready_shows_its_name_for_ism_device(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=7, driver="vfio-pci")
    done = ism("devices")
    assert done.exit_code == 0
    heading, row = done.output.splitlines()
    assert heading.split() == ["Function", "Driver", "IOMMU", "Node", "Vectors", "BARs", "ISM_DEVICE"]
    for part in (OURS, "vfio-pci", "group 7", f"{sysfs.dev}/vfio/7", "64", "0: 16 KiB, 4: 64 MiB", f"vfio:{OURS}"):
        assert part in row


def test_what_is_missing_stands_below_the_table_with_the_command_to_run(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=7)
    lines = ism("devices").output.splitlines()
    assert "not yet" in lines[1]
    assert lines[2:] == [f"{OURS}: bound to virtio-pci: run `ism bind {OURS}`"]


def test_json_has_everything(sysfs: FakeSysfs) -> None:
    sysfs.plug()
    (one,) = json.loads(ism("devices", "--json").output)
    assert one["bdf"] == OURS
    assert (one["driver"], one["iommu_group"], one["no_iommu"], one["name"]) == ("virtio-pci", None, True, None)
    assert one["bars"] == {"0": 16384, "4": 1 << 26}
    assert one["vectors"] == 64
    assert one["problems"][0]["problem"] == "bound to virtio-pci"
    assert "ism bind" in one["problems"][0]["do"]


def test_bind_prints_each_step_and_what_is_still_to_do(sysfs: FakeSysfs) -> None:
    sysfs.plug()
    done = ism("bind", OURS, "--driver", "uio_pci_generic")
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        f"driver_override of {OURS} set to uio_pci_generic",
        f"{OURS} unbound from virtio-pci",
        f"{OURS} bound to uio_pci_generic",
        "still to do: nothing checks which memory the device uses: allow it: export ISM_ALLOW_NO_IOMMU=1",
    ]


def test_bind_and_unbind_twice_succeed_and_say_already(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1)
    assert ism("bind", OURS).exit_code == 0
    again = ism("bind", OURS)
    assert (again.exit_code, again.output) == (0, f"{OURS} is bound to vfio-pci already\n")
    assert ism("unbind", OURS).output.splitlines()[-1] == f"{OURS} bound to virtio-pci"
    again = ism("unbind", OURS)
    assert (again.exit_code, again.output) == (0, f"{OURS} is bound to virtio-pci already, as the kernel chose\n")


def test_an_error_is_one_line_and_status_1(
    sysfs: FakeSysfs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sysfs.plug()
    monkeypatch.setattr(sys, "argv", ["ism", "bind", OURS])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"ism: {OURS} has no IOMMU")
    assert said.count("\n") == 1


def test_another_driver_is_an_error_of_usage(sysfs: FakeSysfs) -> None:
    assert ism("bind", OURS, "--driver", "nouveau").exit_code == 2


def test_on_this_machine_it_runs_and_loads_neither_trio_nor_numba() -> None:
    program = (
        "import sys, ism.cli\n"
        "sys.argv = ['ism', 'devices', '--json']\n"
        "try: ism.cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit('numba' in sys.modules or 'trio' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), list)
