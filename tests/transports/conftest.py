# SPDX-License-Identifier: Apache-2.0
"""Every test of this folder runs once per transport, with vectors and with INTx alone.

None leaves a descriptor or a thread behind.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transport_rig import InMemoryRig, ManagerProcess, Rig, Shape, VfioUserRig, open_descriptors

from ism.eventfd import raise_eventfd


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    warm = os.eventfd(0)
    raise_eventfd(warm)  # takes the one descriptor that a process keeps for it
    os.close(warm)
    gc.collect()
    before, threads = open_descriptors(), set(threading.enumerate())
    yield
    gc.collect()
    after = open_descriptors()
    leaked = {fd: what for fd, what in after.items() if fd not in before}
    assert not leaked, f"descriptors were left open: {leaked}"
    left = [thread.name for thread in set(threading.enumerate()) - threads if not thread.name.startswith("Trio")]
    assert not left, f"threads were left: {left}"


KINDS = ("in-memory", "vfio-user")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make_rig" in metafunc.fixturenames:
        lines = () if metafunc.definition.get_closest_marker("vectors") else tuple(f"{kind}, INTx" for kind in KINDS)
        metafunc.parametrize("make_rig", KINDS + lines, indirect=True)


@pytest.fixture
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []
    kind, _, line = request.param.partition(", ")

    def make(**fields: object) -> Rig:
        shape = Shape(**fields)  # type: ignore[arg-type]
        rig: Rig = InMemoryRig(shape) if kind == "in-memory" else VfioUserRig(tmp_path / f"run{len(made)}", shape)
        rig.line_only = bool(line)
        made.append(rig)
        return rig

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


@pytest.fixture
def manager_process(tmp_path: Path) -> Iterator[ManagerProcess]:
    process = ManagerProcess(tmp_path / "run")
    yield process
    process.end()
