# SPDX-License-Identifier: Apache-2.0
"""This project as a guest sees it: a read-only disk with the source and the kernels that Numba has compiled from it.

It owns the rule by which a guest finds the compiled code: Numba looks for it by the source's path, size and time, the
Python and Numba versions, and the processor it was compiled for. So the source is copied to the path it has in the
guest, with whole seconds for times, and the guest's own Python, run on the host in a root of its own, compiles for a
processor that all are (`image.NUMBA`). Compiling takes seconds here and minutes in an emulated guest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import ism
from ism.guests.guest import Guest
from ism.guests.image import NUMBA, PYTHON, Image, compile_python, make_erofs
from ism.guests.store import Progress, SetupError, Store, key_of
from ism.vmm.qemu import escaped

FOLDER: Final = "/opt/ism"
"""Where the guest mounts it."""
CACHE: Final = "cache"
"""Folder in it whose files belong into NUMBA_CACHE_DIR."""
_NODE: Final = "project0"
_PRELOAD: Final = """
import os, subprocess, time
deadline = time.monotonic() + 30
while not os.path.exists("/dev/vdb") and time.monotonic() < deadline:
    time.sleep(0.01)
subprocess.run(["mount", "-t", "erofs", "-o", "ro", "/dev/vdb", "/opt/ism"], check=True)
subprocess.run(["cp", "-r", "/opt/ism/cache/.", "/var/cache/numba/"], check=True)
import ism.cli, ism.driver.select, ism.smc, ism.smc.blocking, ism.smc.asyncio
from ism.shm import compile_kernels
compile_kernels()
"""
_WHOLE_SECOND: Final = 1_700_000_000
_COMPILE: Final = "from ism.shm import compile_kernels; compile_kernels(); print('compiled')"


def project_folders() -> dict[str, Path]:
    """Name the folders that go into the payload: the package, and the examples where this is a checkout."""
    package = Path(ism.__file__).resolve().parent
    examples = package.parent / "examples"
    return {"ism": package, **({"examples": examples} if examples.is_dir() else {})}


def payload(store: Store, image: Image, progress: Progress, folders: dict[str, Path] | None = None) -> Path:
    """Return the disk image with this project, as its files are now. Raises SetupError."""
    folders = folders or project_folders()
    files = [
        (f"{name}/{file.relative_to(folder)}", file)
        for name, folder in sorted(folders.items())
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    ]
    contents = key_of(image.key, _COMPILE, *(f"{name}:{key_of(file.read_bytes())}" for name, file in files))
    compiled = key_of(image.key, _COMPILE, *(key_of(name, file.read_bytes()) for name, file in files if _shapes(name)))

    def build(place: Path) -> None:
        top = place.with_name("payload")
        try:
            for name, file in files:
                target = top / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
                os.utime(target, (_WHOLE_SECOND, _WHOLE_SECOND))
            cache = store.entry(f"kernels-{compiled}", lambda spot: _compile(image, top, spot, progress))
            shutil.copytree(cache, top / CACHE)
            compile_python(image.root, top, FOLDER)
            make_erofs(image.tools, top, place)
        finally:
            shutil.rmtree(top, ignore_errors=True)

    return store.entry(f"payload-{contents}.erofs", build)


def plug(guest: Guest, disk: Path) -> None:
    """Give a running guest the project's disk: mounted, its kernels in place, its modules loaded in the warm Python.

    Raises: MachineError, QmpError.
    """
    machine = guest.machine
    file = {"driver": "file", "filename": str(disk), "read-only": True}
    machine.qmp.run("blockdev-add", driver="raw", node_name=_NODE, read_only=True, file=file)
    machine.plug("virtio-blk-pci", "project", "disk0", drive=_NODE)
    load(guest)


def load(guest: Guest) -> None:
    """Mount the project's disk in a guest that has it, and load the modules. Raises MachineError."""
    guest.ask("preload", code=_PRELOAD, timeout_s=120.0)


def options(disk: Path) -> list[str]:
    """Return QEMU's options for a machine that has had the disk when its state was saved."""
    return [
        "-blockdev", f"driver=raw,node-name={_NODE},read-only=on,file.driver=file,file.filename={escaped(str(disk))}",
        "-device", f"virtio-blk-pci,id=project,bus=disk0,drive={_NODE}",
    ]  # fmt: skip


def _shapes(name: str) -> bool:
    """Tell whether a file decides what is compiled: the kernels, and what they take constants from."""
    return name.startswith(("ism/shm/", "ism/layout", "ism/memory"))


def _compile(image: Image, source: Path, place: Path, progress: Progress) -> None:
    progress("compiling the kernels for guests")
    place.mkdir()
    root = image.root
    script = (
        'mount --bind "$1" "$2/opt/ism" && mount --bind "$3" "$2/var/cache/numba" && mount -t tmpfs dev "$2/dev" && '
        'for name in null urandom; do : > "$2/dev/$name" && mount --bind "/dev/$name" "$2/dev/$name"; done && '
        'exec chroot "$2" /usr/bin/python3 -B -c "$4"'
    )
    # What runs there was downloaded: it gets no right, no process and no device of the host, root's command or not.
    enter = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--net", "--ipc"]
    argv: Sequence[str | Path] = [*enter, "sh", "-c", script, "sh", source, root, place, _COMPILE]
    environment = {
        "PATH": f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin",
        "PYTHONPATH": FOLDER,
        "LANG": "C.UTF-8",
        **NUMBA,
    }
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    if done.returncode or "compiled" not in done.stdout:
        lines = done.stderr.strip().splitlines()
        raise SetupError("compiling the kernels", f"python{PYTHON} in {root}: {lines[-1] if lines else 'no word'}")
