# SPDX-License-Identifier: Apache-2.0
"""Compiling the kernels: told once, cached, shared by processes that start together, and possible without a cache.

Each test runs fresh interpreters with a cache folder of its own, so every one of them compiles for real.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ism

pytestmark = pytest.mark.processes

LIMIT_S = 120
PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="LOG %(name)s %(levelname)s %(message)s", stream=sys.stdout)
import ism.shm
ism.shm.compile_kernels(lambda text: print("TOLD", text))
from ism.memory import Mapping
a, b = Mapping(8192), Mapping(8192)
one = ism.shm.Endpoint(a, b, doorbell=lambda: None)
two = ism.shm.Endpoint(b, a, doorbell=lambda: None)
one.send(b"works")
print("GOT", two.recv(100))
"""


def start(program: str = PROGRAM, **environment: str) -> subprocess.Popen[str]:
    root = environment.pop("root", str(Path(ism.__file__).parents[1]))
    env = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**env, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> list[str]:
    text, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, text
    return text.splitlines()


def test_compiling_is_told_once_and_a_cache_hit_is_silent(tmp_path: Path) -> None:
    first = output(start(NUMBA_CACHE_DIR=str(tmp_path)))
    assert len(first) == 3
    assert first[0].startswith("LOG ism.shm WARNING compiling the ring kernels")
    assert first[1].startswith("TOLD compiling the ring kernels")
    assert first[2] == "GOT b'works'"
    assert output(start(NUMBA_CACHE_DIR=str(tmp_path))) == ["GOT b'works'"]


def test_two_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    together = [start(NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    results = [output(process) for process in together]
    assert sorted(len(lines) for lines in results) == [1, 3]
    assert all(lines[-1] == "GOT b'works'" for lines in results)


def copy_package(folder: Path) -> Path:
    """The package alone, in a folder where nothing can be created: a file stands where the cache would be."""
    target = folder / "ism"
    source = Path(ism.__file__).parent
    for part in ("", "shm"):
        (target / part).mkdir(parents=True)
        for file in (source / part).glob("*.py"):
            shutil.copy(file, target / part)
        (target / part / "__pycache__").write_text("not a folder")
    return folder


def test_a_package_that_cannot_be_written_uses_the_users_cache(tmp_path: Path) -> None:
    root = str(copy_package(tmp_path / "site"))
    cache = tmp_path / "cache"
    environment = {"root": root, "XDG_CACHE_HOME": str(cache), "HOME": str(tmp_path)}
    assert len(output(start(**environment))) == 3
    assert list(cache.rglob("*.nbc"))
    assert output(start(**environment)) == ["GOT b'works'"]


def test_without_any_cache_folder_it_works_and_says_so(tmp_path: Path) -> None:
    root = str(copy_package(tmp_path / "site"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    lines = output(start(root=root, XDG_CACHE_HOME=str(blocked), HOME=str(blocked)))
    assert sum("cannot be cached" in line for line in lines) == 1
    assert lines[-1] == "GOT b'works'"


def test_a_changed_source_of_the_kernels_is_never_served_from_the_old_cache(tmp_path: Path) -> None:
    root = copy_package(tmp_path / "site")
    environment = {"root": str(root), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert len(output(start(**environment))) == 3
    header = root / "ism" / "shm" / "header.py"
    header.write_text(header.read_text() + "\n# changed\n")
    assert len(output(start(**environment))) == 3


def test_numba_switched_off_is_a_clear_error() -> None:
    program = """
import ism.errors, ism.shm
try:
    ism.shm.compile_kernels()
except ism.errors.FeatureMismatchError as exc:
    print(exc)
"""
    (line,) = output(start(program, NUMBA_DISABLE_JIT="1"))
    assert "NUMBA_DISABLE_JIT" in line


def test_nothing_outside_this_package_loads_numba() -> None:
    program = """
import sys
import ism, ism.errors, ism.layout, ism.ids, ism.memory
print("numba" in sys.modules)
"""
    assert output(start(program)) == ["False"]


def test_a_change_in_any_module_compiled_into_the_kernels_makes_the_cache_stale(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(Path(ism.__file__).parent, root / "ism", ignore=shutil.ignore_patterns("__pycache__"))
    cache = str(tmp_path / "cache")
    assert "compiling" in output(start(root=str(root), NUMBA_CACHE_DIR=cache))[0]
    assert len(output(start(root=str(root), NUMBA_CACHE_DIR=cache))) == 1
    helper = root / "ism" / "shm" / "observe.py"
    os.utime(helper, ns=(0, helper.stat().st_mtime_ns + 1_000_000_000))
    assert "compiling" in output(start(root=str(root), NUMBA_CACHE_DIR=cache))[0]
