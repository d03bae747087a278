# SPDX-License-Identifier: Apache-2.0
"""What machine this is, which versions of everything, and which two CPUs the ends are put on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from ism import __version__
from ism.errors import ConfigError
from ism.perf.versus.catalog import Entry

_DISTRIBUTIONS: Final = {"zmq": "pyzmq"}
_OURS: Final = ("numba", "numpy", "trio", "matplotlib")
_CPUS: Final = Path("/sys/devices/system/cpu")


def facts() -> dict[str, Any]:
    """Return what is known of the machine and of the programs."""
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "cpus_allowed": sorted(os.sched_getaffinity(0)),
        "hypervisor": "hypervisor" in _cpuinfo("flags").split(),
        "kernel": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "ism": __version__,
        **{name: version for name in _OURS if (version := _version_of(name))},
    }


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{re.escape(key)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def peers(entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """Return each peer's label, whether it is here, its version, and how to install it when it is not."""
    found = {}
    for entry in entries:
        present = entry.present()
        version = _version_of(_DISTRIBUTIONS.get(entry.needs, entry.needs)) if entry.needs else ""
        if entry.program and present:
            said = subprocess.run([entry.program, "--version"], capture_output=True, text=True, check=False).stdout
            version = next(iter(re.findall(r"\d+(?:\.\d+)+", said)), "")
        found[entry.name] = {
            "label": entry.label, "family": entry.family, "present": present, "version": version,
            "install": "" if present else entry.install,
        }  # fmt: skip
    return found


def two_cpus(wanted: str | None) -> tuple[int, int]:
    """Return the CPUs of near and far end: those that are `wanted` ("A,B"), else two cores near each other.

    With a single CPU both ends share it. Raises ConfigError.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if wanted is not None:
        if not re.fullmatch(r"\d+,\d+", wanted) or not {int(cpu) for cpu in wanted.split(",")} <= set(allowed):
            raise ConfigError("command line", "--cpus", f"is {wanted!r}, must be two of {allowed}, as 0,1")
        near, far = wanted.split(",")
        return int(near), int(far)
    first = allowed[0]
    others = [cpu for cpu in allowed[1:] if cpu not in _sharing(first, "topology/thread_siblings_list")]
    close = [cpu for cpu in others if cpu in _sharing(first, "cache/index3/shared_cpu_list")]
    return first, (close or others or allowed[1:] or allowed)[0]


def _sharing(cpu: int, what: str) -> set[int]:
    """Return the CPUs that share something with this one, as the kernel lists them; none when it does not say."""
    try:
        text = (_CPUS / f"cpu{cpu}" / what).read_text().strip()
    except OSError:
        return set()
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
