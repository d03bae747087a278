# SPDX-License-Identifier: Apache-2.0
"""Finding, judging and binding PCI functions, against a made-up /sys with a small kernel behind it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_sysfs import OURS, FakeSysfs

from ism.driver import pci_sysfs
from ism.driver.pci_sysfs import UIO_DRIVER, VFIO_DRIVER, Sysfs, bind, bound_to, find, look, problems, unbind
from ism.errors import TransportError

OTHER = "0000:00:1f.2"
ALLOWED = {"ISM_ALLOW_NO_IOMMU": "1"}


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    return FakeSysfs(tmp_path)


def quiet(step: str) -> None:
    pass


def texts(sysfs: FakeSysfs, **environment: str) -> str:
    return "\n".join(f"{one.text}: {one.do}" for one in problems(sysfs, look(sysfs, OURS), environment))


# -- finding


def test_only_virtio_ism_functions_are_found_in_the_order_of_their_addresses(sysfs: FakeSysfs) -> None:
    sysfs.plug("0000:02:00.0", group=2)
    sysfs.plug("0000:01:00.0", group=1)
    sysfs.plug("0000:00:01.0", ids=("0x1af4", "0x1041"))
    sysfs.plug("0000:00:02.0", ids=("0x8086", "0x106c"), driver=None)
    assert [function.bdf for function in find(sysfs)] == ["0000:01:00.0", "0000:02:00.0"]


def test_a_function_is_described_with_driver_group_node_vectors_and_bars(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=7, driver="vfio-pci")
    function = look(sysfs, OURS)
    assert (function.driver, function.group, function.no_iommu) == ("vfio-pci", "7", False)
    assert function.nodes == (sysfs.dev / "vfio/7",)
    assert function.vectors == 64
    assert function.bars == {0: 16384, 4: 1 << 26}
    assert function.name == f"vfio:{OURS}"


def test_what_only_root_may_read_is_unknown_and_no_error(sysfs: FakeSysfs) -> None:
    sysfs.plug()
    config = sysfs.root / "bus/pci/devices" / OURS / "config"
    config.write_bytes(config.read_bytes()[:64])
    assert look(sysfs, OURS).vectors is None


def test_the_character_device_of_newer_kernels_is_a_node_too(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=7, driver="vfio-pci")
    (sysfs.root / "bus/pci/devices" / OURS / "vfio-dev/vfio3").mkdir(parents=True)
    assert look(sysfs, OURS).nodes == (sysfs.dev / "vfio/devices/vfio3", sysfs.dev / "vfio/7")


@pytest.mark.parametrize("bdf", ["", "1:0.0", "../../etc", "0000:01:00.8"])
def test_what_is_no_pci_address_is_refused(sysfs: FakeSysfs, bdf: str) -> None:
    with pytest.raises(TransportError, match="is no PCI address"):
        look(sysfs, bdf)


def test_an_address_as_lspci_prints_it_will_do(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1)
    assert look(sysfs, "01:00.0").bdf == OURS
    bind(sysfs, "01:00.0", say=quiet)
    assert sysfs.driver_of() == "vfio-pci"
    assert unbind(sysfs, "01:00.0", say=quiet)


def test_an_absent_function_is_an_error_that_names_the_list(sysfs: FakeSysfs) -> None:
    with pytest.raises(TransportError, match=r"there is no PCI function 0000:01:00\.0; `ism devices`"):
        look(sysfs, OURS)


def test_functions_of_a_driver_are_ours_only(sysfs: FakeSysfs) -> None:
    sysfs.plug("0000:02:00.0", group=2, driver="vfio-pci")
    sysfs.plug("0000:01:00.0", group=1, driver="vfio-pci")
    sysfs.plug("0000:00:03.0", ids=("0x8086", "0x10d3"), group=3, driver="vfio-pci")
    sysfs.plug("0000:03:00.0", group=4)
    assert list(bound_to(sysfs, VFIO_DRIVER)) == ["0000:01:00.0", "0000:02:00.0"]
    assert list(bound_to(sysfs, "absent")) == []


def test_a_machine_without_pci_has_no_functions(tmp_path: Path) -> None:
    assert find(Sysfs(tmp_path)) == []


# -- what is missing


def test_a_function_of_the_kernels_driver_wants_ism_bind(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1)
    assert texts(sysfs) == f"bound to virtio-pci: run `ism bind {OURS}`"


def test_a_module_that_is_not_loaded_is_named(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path, loaded=())
    sysfs.plug(group=1, driver=None)
    assert "bound to no driver" in texts(sysfs)
    assert "module vfio-pci is not loaded: `ism bind` loads it, as does: modprobe vfio-pci" in texts(sysfs)


def test_without_an_iommu_both_ways_out_are_named(sysfs: FakeSysfs) -> None:
    sysfs.plug()
    said = texts(sysfs)
    assert f"run `ism bind {OURS} --driver uio_pci_generic` and export ISM_ALLOW_NO_IOMMU=1" in said
    assert "intel_iommu=on" in said


def test_a_function_that_is_ready_has_no_problem(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1, driver="vfio-pci")
    assert problems(sysfs, look(sysfs, OURS), {}) == []


def test_one_without_iommu_wants_to_be_allowed(sysfs: FakeSysfs) -> None:
    sysfs.plug(driver="uio_pci_generic")
    assert texts(sysfs) == "nothing checks which memory the device uses: allow it: export ISM_ALLOW_NO_IOMMU=1"
    assert texts(sysfs, **ALLOWED) == ""


def test_vfio_without_iommu_wants_to_be_allowed_too(sysfs: FakeSysfs) -> None:
    sysfs.allow_unsafe_vfio()
    sysfs.plug(driver="vfio-pci")
    function = look(sysfs, OURS)
    assert (function.no_iommu, function.nodes) == (True, (sysfs.dev / "vfio/noiommu-0",))
    assert "ISM_ALLOW_NO_IOMMU=1" in texts(sysfs)
    assert texts(sysfs, **ALLOWED) == ""


def test_uio_wants_root_and_memory_that_stays(sysfs: FakeSysfs) -> None:
    sysfs.plug(driver="uio_pci_generic")
    sysfs.root_user = False
    sysfs.free_huge_pages(0)
    said = texts(sysfs, **ALLOWED)
    assert "physical addresses are told to root only" in said
    assert "echo 16 > /proc/sys/vm/nr_hugepages" in said
    (sysfs.proc / "sys/vm/compact_unevictable_allowed").write_text("0\n")
    assert "nr_hugepages" not in texts(sysfs, **ALLOWED)


def test_a_node_that_may_not_be_opened_wants_a_group(sysfs: FakeSysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    sysfs.plug(group=7, driver="vfio-pci")
    monkeypatch.setattr(pci_sysfs.os, "access", lambda path, mode: False)
    assert f"no right to open {sysfs.dev}/vfio/7: as root: chgrp" in texts(sysfs)


def test_a_node_that_is_not_there_is_named(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=7, driver="vfio-pci")
    (sysfs.dev / "vfio/7").unlink()
    assert f"no {sysfs.dev}/vfio/7: is /dev a devtmpfs" in texts(sysfs)


def test_a_low_memlock_limit_counts_for_all_but_root(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=7, driver="vfio-pci")
    sysfs.limit = 64 << 10
    assert texts(sysfs) == ""
    sysfs.root_user = False
    assert texts(sysfs) == "memlock limit is 64 KiB: raise it: ulimit -l 4096, or LimitMEMLOCK= of the unit"


def test_the_process_that_uses_it_is_named(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=7, driver="vfio-pci")
    sysfs.open_in_process(sysfs.dev / "vfio/7", 4711, "python3")
    assert "in use by pid 4711 (python3)" in texts(sysfs)


def test_other_functions_of_the_group_are_named(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=7, driver="vfio-pci")
    sysfs.plug(OTHER, ids=("0x8086", "0x2922"), group=7, driver="ahci")
    assert f"IOMMU group 7 also has {OTHER}, bound to ahci" in texts(sysfs)


def test_this_process_is_seen_with_what_it_has_open(tmp_path: Path) -> None:
    with (tmp_path / "node").open("w"):
        assert [name for name in Sysfs().users(tmp_path / "node") if name.startswith(f"pid {os.getpid()} (")]
    assert Sysfs().users(tmp_path / "node") == []


# -- binding


def test_bind_does_each_step_and_says_so(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1)
    steps: list[str] = []
    assert bind(sysfs, OURS, say=steps.append)
    assert steps == [
        f"driver_override of {OURS} set to vfio-pci",
        f"{OURS} unbound from virtio-pci",
        f"{OURS} bound to vfio-pci",
    ]
    assert (sysfs.driver_of(), sysfs.override_of()) == ("vfio-pci", "vfio-pci")
    assert problems(sysfs, look(sysfs, OURS), {}) == []


def test_bind_loads_a_module_that_is_not_loaded(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path, loaded=())
    sysfs.plug(group=1)
    steps: list[str] = []
    bind(sysfs, OURS, say=steps.append)
    assert sysfs.loads == ["vfio-pci"]
    assert steps[0] == "module vfio-pci loaded"
    assert sysfs.driver_of() == "vfio-pci"


def test_bind_to_uio_needs_no_iommu(sysfs: FakeSysfs) -> None:
    sysfs.plug()
    bind(sysfs, OURS, UIO_DRIVER, say=quiet)
    assert sysfs.driver_of() == "uio_pci_generic"
    assert look(sysfs, OURS).nodes == (sysfs.dev / "uio0",)


def test_bind_takes_a_function_from_one_of_the_two_drivers_to_the_other(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1)
    for driver in (VFIO_DRIVER, UIO_DRIVER, VFIO_DRIVER):
        assert bind(sysfs, OURS, driver, say=quiet)
        assert sysfs.driver_of() == driver


def test_bind_is_idempotent(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1)
    bind(sysfs, OURS, say=quiet)
    sysfs.writes.clear()
    steps: list[str] = []
    assert not bind(sysfs, OURS, say=steps.append)
    assert steps == [f"{OURS} is bound to vfio-pci already"]
    assert sysfs.writes == []


def test_bind_without_a_former_driver(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1, driver=None)
    bind(sysfs, OURS, say=quiet)
    assert sysfs.driver_of() == "vfio-pci"


def test_another_kind_of_function_is_left_alone_unless_any_is_meant(sysfs: FakeSysfs) -> None:
    sysfs.plug(ids=("0x1af4", "0x1041"), group=1)
    for change in (bind, unbind):
        with pytest.raises(TransportError, match=r"is 1af4:1041, not a virtio-ism function .*--any"):
            change(sysfs, OURS, say=quiet)
    assert sysfs.writes == []
    assert bind(sysfs, OURS, anything=True, say=quiet)


@pytest.mark.parametrize("change", [bind, unbind])
def test_only_root_changes_anything(sysfs: FakeSysfs, change) -> None:
    sysfs.plug(group=1, driver="uio_pci_generic")
    sysfs.root_user = False
    with pytest.raises(TransportError, match="run this as root"):
        change(sysfs, OURS, say=quiet)
    assert sysfs.writes == []


@pytest.mark.parametrize("change", [bind, unbind])
def test_a_function_in_use_is_not_taken_away(sysfs: FakeSysfs, change) -> None:
    sysfs.plug(group=1, driver="uio_pci_generic")
    sysfs.open_in_process(sysfs.dev / "uio0", 12, "ism")
    with pytest.raises(TransportError, match=r"in use by pid 12 \(ism\): end that first"):
        change(sysfs, OURS, say=quiet)
    assert sysfs.writes == []


def test_without_an_iommu_vfio_is_refused_with_the_other_way(sysfs: FakeSysfs) -> None:
    sysfs.plug()
    with pytest.raises(TransportError, match=r"has no IOMMU, .*intel_iommu=on.*--driver uio_pci_generic"):
        bind(sysfs, OURS, say=quiet)
    assert sysfs.driver_of() == "virtio-pci"
    assert sysfs.writes == []


def test_vfios_unsafe_mode_does_without_an_iommu(sysfs: FakeSysfs) -> None:
    sysfs.allow_unsafe_vfio()
    sysfs.plug()
    bind(sysfs, OURS, say=quiet)
    assert sysfs.driver_of() == "vfio-pci"


def test_a_group_with_another_driver_in_it_is_refused_by_name(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=7)
    sysfs.plug(OTHER, ids=("0x8086", "0x2922"), group=7, driver="ahci")
    with pytest.raises(TransportError, match=rf"IOMMU group 7 .* also has {OTHER} \(ahci\)"):
        bind(sysfs, OURS, say=quiet)
    assert sysfs.driver_of() == "virtio-pci"


def test_a_module_that_is_not_there_is_an_error_and_nothing_changes(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path, loaded=())
    sysfs.modules.clear()
    sysfs.plug(group=1)
    with pytest.raises(TransportError, match=r"no PCI driver vfio-pci: modprobe: FATAL: Module vfio-pci not found"):
        bind(sysfs, OURS, say=quiet)
    assert sysfs.writes == []


@pytest.mark.parametrize("step", ["driver_override", "virtio-pci/unbind", "drivers_probe"])
def test_when_a_step_fails_the_former_driver_has_the_function_again(sysfs: FakeSysfs, step: str) -> None:
    sysfs.plug(group=1)
    sysfs.refuse = {step}
    steps: list[str] = []
    with pytest.raises(TransportError, match=f"{step}: writing .*Input/output error"):
        bind(sysfs, OURS, say=steps.append)
    assert (sysfs.driver_of(), sysfs.override_of()) == ("virtio-pci", "(null)")
    if step == "drivers_probe":
        assert steps[-1] == f"{OURS} given back to virtio-pci"


def test_when_the_kernel_silently_does_not_bind_the_former_driver_has_it_again(
    sysfs: FakeSysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sysfs.plug(group=1)
    attach = sysfs._attach
    monkeypatch.setattr(sysfs, "_attach", lambda driver, bdf: driver != "vfio-pci" and attach(driver, bdf))
    with pytest.raises(TransportError, match=r"did not bind .* to vfio-pci, it is bound to none: its log"):
        bind(sysfs, OURS, say=quiet)
    assert (sysfs.driver_of(), sysfs.override_of()) == ("virtio-pci", "(null)")


def test_a_former_override_comes_back_too(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1)
    bind(sysfs, OURS, UIO_DRIVER, say=quiet)
    sysfs.refuse = {"drivers_probe"}
    with pytest.raises(TransportError):
        bind(sysfs, OURS, say=quiet)
    assert (sysfs.driver_of(), sysfs.override_of()) == ("uio_pci_generic", "uio_pci_generic")


def test_an_error_says_when_the_former_driver_could_not_get_it_back(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1)
    sysfs.refuse = {"drivers_probe", "virtio-pci/bind"}
    with pytest.raises(TransportError, match=f"drivers_probe.*; and {OURS} could not be given back to virtio-pci"):
        bind(sysfs, OURS, say=quiet)


def test_unbind_gives_the_function_back_to_the_kernels_choice(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1)
    bind(sysfs, OURS, say=quiet)
    steps: list[str] = []
    assert unbind(sysfs, OURS, say=steps.append)
    assert steps == [
        f"driver_override of {OURS} cleared",
        f"{OURS} unbound from vfio-pci",
        f"{OURS} bound to virtio-pci",
    ]
    assert (sysfs.driver_of(), sysfs.override_of()) == ("virtio-pci", "(null)")


def test_unbind_is_idempotent(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1)
    steps: list[str] = []
    assert not unbind(sysfs, OURS, say=steps.append)
    assert steps == [f"{OURS} is bound to virtio-pci already, as the kernel chose"]
    assert sysfs.writes == []


def test_unbind_takes_back_an_override_that_led_to_nothing(sysfs: FakeSysfs) -> None:
    sysfs.plug(group=1, driver=None)
    sysfs.put(f"bus/pci/devices/{OURS}/driver_override", "pci-stub\n")
    assert unbind(sysfs, OURS, say=quiet)
    assert sysfs.driver_of() == "virtio-pci"


def test_unbind_of_what_no_driver_wants_leaves_it_without(sysfs: FakeSysfs) -> None:
    sysfs.plug(ids=("0x8086", "0x10d3"), group=1, driver="vfio-pci")
    steps: list[str] = []
    unbind(sysfs, OURS, anything=True, say=steps.append)
    assert steps[-1] == f"{OURS} is bound to no driver: the kernel has none for it"


# -- modprobe


def test_modprobe_is_run_and_its_complaint_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "modprobe"
    program.write_text('#!/bin/sh\necho "$1" > "$0.asked"\n[ "$1" = good ] || { echo "no $1" >&2; exit 1; }\n')
    program.chmod(0o755)
    monkeypatch.setattr(pci_sysfs, "_MODPROBE_PLACES", str(tmp_path))
    assert Sysfs().load_module("good") is None
    assert program.with_name("modprobe.asked").read_text() == "good\n"
    assert Sysfs().load_module("bad") == "no bad"
    monkeypatch.setattr(pci_sysfs.shutil, "which", lambda *_, **__: None)
    assert Sysfs().load_module("good") == "there is no modprobe"
