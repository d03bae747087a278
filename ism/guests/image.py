# SPDX-License-Identifier: Apache-2.0
"""What a guest boots from: the tools on the host's side, the kernel, the first ramdisk, and the root file system.

It owns the recipe: which packages, which Python packages at which versions, what is thrown away, how the guest starts.
Everything is unpacked beside the host's own system and run from there by its own loader, so a Debian 12 host runs a
Debian 13 QEMU without installing it. The kernel is the distribution's, unmodified. Nothing in the image is of this
project's source, which changes often: that is `payload`.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ism.guests import inside
from ism.guests.packages import BACKPORTS, SUITE, Apt, Deb, unreachable
from ism.guests.store import Progress, SetupError, Store, key_of

_QEMU: Final = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
TOOLS: Final = (*(f"{name}/{BACKPORTS}" for name in _QEMU), "erofs-utils", "zstd", "linux-libc-dev")
GUEST: Final = (
    "python3.13-minimal", "libpython3.13-stdlib", "libstdc++6", "busybox-static", "kmod", "pciutils",
)  # fmt: skip
KERNEL: Final = f"linux-image-cloud-amd64/{SUITE}"
PYTHON: Final = "3.13"
WHEELS: Final = Path(__file__).with_name("wheels.txt")
"""The guest's Python packages, with their hashes."""
_PLATFORMS: Final = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

NUMBA: Final = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": "/var/cache/numba"}
"""Makes compiled code the same on every processor, so that what is compiled outside is used inside."""

_FIRST_MODULES: Final = (
    "kernel/drivers/block/virtio_blk.ko",
    "kernel/lib/libcrc32c.ko",
    "kernel/fs/erofs/erofs.ko",
    "kernel/fs/overlayfs/overlay.ko",
)
_MODULE_FOLDERS: Final = (
    "kernel/drivers/block/virtio_blk.ko.xz", "kernel/drivers/net/virtio_net.ko.xz",
    "kernel/drivers/net/net_failover.ko.xz", "kernel/net/core", "kernel/drivers/vfio", "kernel/drivers/uio",
    "kernel/virt", "kernel/lib", "kernel/fs/erofs", "kernel/fs/overlayfs",
)  # fmt: skip
_UNWANTED: Final = (
    "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "usr/share/zoneinfo",
    "usr/share/bash-completion", "usr/lib/python3/dist-packages/bin", "boot",
)  # fmt: skip

_FIRST_INIT: Final = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in /modules/*.ko; do /bin/busybox insmod $module; done
/bin/busybox mount -t proc proc /proc
if /bin/busybox grep -q ism.off /proc/cmdline; then
  echo "ism: off"
  /bin/busybox poweroff -f
fi
while [ ! -b /dev/vda ]; do /bin/busybox usleep 10000; done
/bin/busybox mount -t erofs -o ro /dev/vda /image
/bin/busybox mount -t tmpfs -o size=90% tmpfs /changes
/bin/busybox mkdir /changes/upper /changes/work
/bin/busybox mount -t overlay -o lowerdir=/image,upperdir=/changes/upper,workdir=/changes/work root /root
/bin/busybox mount --move /dev /root/dev
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /sbin/init
"""

_INIT: Final = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm /run /tmp
mount -t devpts pts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
hostname guest
ip link set lo up
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 PYTHONPATH=/opt/ism PYTHONDONTWRITEBYTECODE=1 {numba}
grep -q ism.bare /proc/cmdline || for module in virtio_net vfio_iommu_type1 vfio-pci uio_pci_generic; do
  modprobe $module
done
python3 /usr/lib/ism/inside.py
poweroff -f
"""

_COMMAND: Final = """#!/usr/bin/python3
import sys
from ism.cli import main
sys.exit(main())
"""

_SMALL_COMMANDS: Final = (
    "sh", "mount", "umount", "mkdir", "ip", "hostname", "grep", "poweroff", "cat", "ls", "date", "sleep", "ping", "cp",
    "dmesg", "sha256sum", "reboot", "uname", "id", "kill", "ps", "env", "rm", "chmod", "chown", "ln", "echo", "test",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Root:
    """Unpacked packages whose programs run on this host by their own loader."""

    folder: Path

    def command(self, program: str, *arguments: str | Path, name: str = "") -> list[str]:
        """Return the argv that runs `program` (path in the root), as `name` if given."""
        loader = self.folder / "usr/lib64/ld-linux-x86-64.so.2"
        libraries = self.folder / "usr/lib/x86_64-linux-gnu"
        renamed = ["--argv0", name] if name else []
        return [
            str(loader), "--library-path", str(libraries), *renamed, str(self.folder / program), *map(str, arguments),
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Image:
    """Everything a machine boots from.

    Attributes: `tools` (QEMU), `root` (the guest's files, unpacked), `disk` (the same as an erofs image), `kernel`
    (uncompressed, starts by PVH), `ramdisk`, `key` (changes when any of it does), `versions` (of QEMU and the kernel).
    """

    tools: Root
    root: Path
    disk: Path
    kernel: Path
    ramdisk: Path
    key: str
    versions: dict[str, str]


def prepare(store: Store, progress: Progress, *, refresh: bool = False) -> Image:
    """Fetch and build what is not in the cache.

    Args: `refresh`: ask the archive for newer packages, even when everything is there.
    Raises: SetupError.
    """
    plan = _plan(store, progress, refresh=refresh)
    recipe = key_of(
        TOOLS, GUEST, KERNEL, WHEELS.read_text(), _FIRST_INIT, _INIT, _COMMAND, _SMALL_COMMANDS, NUMBA, _source()
    )
    tools_key = key_of(TOOLS, plan["tools"])
    key = key_of(recipe, plan)
    builder = _Builder(store, progress, plan)
    tools = Root(store.entry(f"tools-{tools_key}", builder.tools))
    builder.tool_root = tools
    kernel = store.entry(f"kernel-{key_of(plan['kernel'], _FIRST_INIT)}", builder.kernel)
    builder.kernel_root = kernel
    root = store.entry(f"root-{key}", builder.guest)
    builder.guest_root = root
    return Image(
        tools=tools,
        root=root,
        disk=store.entry(f"disk-{key}.erofs", builder.disk),
        kernel=kernel / "vmlinux",
        ramdisk=store.entry(f"ramdisk-{key}.cpio", builder.ramdisk),
        key=key,
        versions={
            "qemu": next(deb.version for deb in map(Deb, plan["tools"]) if deb.package == "qemu-system-x86"),
            "kernel": Deb(plan["kernel"][0]).version,
        },
    )


def _source() -> str:
    return Path(inside.__file__).read_text()


def _plan(store: Store, progress: Progress, *, refresh: bool) -> dict[str, Any]:
    """Say which package files everything is made of: from the cache, or as the archive has it today."""
    file = store.path(f"plan-{key_of(TOOLS, GUEST, KERNEL)}.json")
    if file.exists() and not refresh:
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    apt = Apt(store, progress)
    apt.update()
    plan = {
        "tools": [deb.file for deb in apt.resolve(TOOLS)],
        "guest": [deb.file for deb in apt.resolve(GUEST)],
        "kernel": [],
    }
    progress("QEMU, kernel and guest packages")
    apt.fetch(TOOLS)
    apt.fetch(GUEST)
    plan["kernel"] = [apt.fetch_alone(apt.depends(KERNEL)).file]
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(plan))
    scratch.rename(file)
    return plan


class _Builder:
    """Builds the parts, one method each."""

    tool_root: Root
    kernel_root: Path
    guest_root: Path

    def __init__(self, store: Store, progress: Progress, plan: dict[str, Any]) -> None:
        self._store, self._progress, self._plan = store, progress, plan

    def _unpack(self, part: str, place: Path) -> None:
        debs = [Deb(name) for name in self._plan[part]]
        apt = Apt(self._store, self._progress)
        if not all((self._store.path("apt") / "cache/archives" / deb.file).exists() for deb in debs):
            self._progress(f"{part}: package files are gone, fetching them again")
            apt.update()
            if part == "kernel":
                apt.fetch_alone(debs[0].package, debs[0].version)
            else:
                apt.fetch(TOOLS if part == "tools" else GUEST)
        place.mkdir(exist_ok=True)
        apt.unpack(debs, place)

    def tools(self, place: Path) -> None:
        """Unpack QEMU and what the image is built with."""
        self._progress("unpacking QEMU")
        self._unpack("tools", place)
        shutil.rmtree(place / "usr/share/doc", ignore_errors=True)

    def kernel(self, place: Path) -> None:
        """Take the kernel out of its compressed wrapping, for a faster start; keep the modules a guest may load."""
        self._progress("kernel")
        with _Scratch(place) as whole:
            self._unpack("kernel", whole)
            packed = next((whole / "boot").glob("vmlinuz-*"))
            modules = next((whole / "usr/lib/modules").iterdir())
            place.mkdir()
            (place / "vmlinux").write_bytes(self._unwrap(packed.read_bytes()))
            kept = place / "modules" / modules.name
            for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
                kept.mkdir(parents=True, exist_ok=True)
                shutil.copy(modules / name, kept / name)
            for name in _MODULE_FOLDERS:
                source, target = modules / name, kept / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target, dirs_exist_ok=True)
                elif source.exists():
                    shutil.copy(source, target)

    def _unwrap(self, packed: bytes) -> bytes:
        at = packed.find(b"\x28\xb5\x2f\xfd")
        while at >= 0:
            done = subprocess.run(
                self.tool_root.command("usr/bin/zstd", "-dcq"), input=packed[at:], capture_output=True, check=False
            )
            if done.stdout.startswith(b"\x7fELF"):
                return done.stdout
            at = packed.find(b"\x28\xb5\x2f\xfd", at + 1)
        raise SetupError("kernel", "no zstd-compressed ELF image in the kernel package's vmlinuz")

    def guest(self, place: Path) -> None:
        """Unpack the guest's packages, add Python packages and the way it starts, and throw away what is not needed."""
        self._progress("guest root")
        self._unpack("guest", place)
        site = place / "usr/lib/python3/dist-packages"
        self._pip(site)
        for name in _UNWANTED:
            shutil.rmtree(place / name, ignore_errors=True)
        for pattern in ("**/tests", "**/__pycache__", "**/f2py"):
            for folder in list(site.glob(pattern)):
                shutil.rmtree(folder, ignore_errors=True)
        version = next((self.kernel_root / "modules").iterdir()).name
        shutil.copytree(self.kernel_root / "modules", place / "usr/lib/modules")
        _run(Root(place).command("usr/bin/kmod", "-b", place, version, name="depmod"), "depmod")
        for name in ("proc", "sys", "dev", "run", "tmp", "root", "opt/ism", "var/cache/numba", "mnt"):
            (place / name).mkdir(parents=True, exist_ok=True)
        for name in _SMALL_COMMANDS:
            command = place / "usr/bin" / name
            if not command.exists():
                command.symlink_to("busybox")
        (place / "usr/bin/python3").unlink(missing_ok=True)
        (place / "usr/bin/python3").symlink_to(f"python{PYTHON}")
        lines = " ".join(f"{name}={value!r}" for name, value in NUMBA.items())
        _write(place / "usr/sbin/init", _INIT.replace("{numba}", lines), 0o755)
        _write(place / "usr/bin/ism", _COMMAND, 0o755)
        _write(place / "usr/lib/ism/inside.py", _source(), 0o644)
        _write(place / "etc/passwd", "root:x:0:0:root:/root:/bin/sh\n", 0o644)
        _write(place / "etc/group", "root:x:0:\n", 0o644)
        _write(place / "etc/hosts", "127.0.0.1 localhost\n::1 localhost\n", 0o644)
        self._progress("compiling the guest's Python files")
        for library in (f"usr/lib/python{PYTHON}", "usr/lib/python3/dist-packages"):
            compile_python(place, place / library, f"/{library}")

    def _pip(self, site: Path) -> None:
        self._progress("numba, numpy and trio for the guest")
        tags = [text for platform in _PLATFORMS for text in ("--platform", platform)]
        argv = [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
            "--retries", "5", "--timeout", "60", "--only-binary=:all:", "--python-version", PYTHON, *tags,
            "--require-hashes", "--no-deps", "--target", str(site), "--requirement", str(WHEELS),
        ]  # fmt: skip
        for attempt in range(3):
            try:
                _run(argv, "Python packages")
                return
            except SetupError:
                if attempt == 2:
                    raise
                self._progress("Python packages: trying again")

    def disk(self, place: Path) -> None:
        """Make the root file system's image."""
        self._progress("disk image")
        make_erofs(self.tool_root, self.guest_root, place)

    def ramdisk(self, place: Path) -> None:
        """Make the first ramdisk: it mounts the image, with changes in memory on top, and goes on there."""
        with _Scratch(place) as top:
            for name in ("bin", "modules", "dev", "proc", "image", "changes", "root"):
                (top / name).mkdir(parents=True)
            shutil.copy(self.guest_root / "usr/bin/busybox", top / "bin/busybox")
            modules = next((self.kernel_root / "modules").iterdir())
            for number, name in enumerate(_FIRST_MODULES):
                packed = modules / f"{name}.xz"
                if packed.exists():
                    (top / "modules" / f"{number}-{Path(name).name}").write_bytes(lzma.decompress(packed.read_bytes()))
            _write(top / "init", _FIRST_INIT, 0o755)
            names = "\n".join(str(path.relative_to(top)) for path in sorted(top.rglob("*"))) + "\n"
            packed_files = subprocess.run(
                [top / "bin/busybox", "cpio", "-o", "-H", "newc"],
                input=names.encode(), cwd=top, capture_output=True, check=False,
            )  # fmt: skip
            if packed_files.returncode:
                raise SetupError("ramdisk", packed_files.stderr.decode(errors="replace").strip())
            place.write_bytes(packed_files.stdout)


class _Scratch:
    """A folder beside a place that is being built, gone afterwards."""

    def __init__(self, place: Path) -> None:
        self._folder = place.with_name(f"{place.name}.scratch")

    def __enter__(self) -> Path:
        self._folder.mkdir()
        return self._folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def make_erofs(tools: Root, folder: Path, place: Path) -> None:
    """Make a file-system image of a folder. Raises SetupError."""
    _run(tools.command("usr/bin/mkfs.erofs", "--quiet", "-zlz4", "--all-root", place, folder), "disk image")


def compile_python(root: Path, folder: Path, guest_folder: str) -> None:
    """Compile Python files by the Python in `root`, for where the guest has them. Raises SetupError."""
    code = (
        "import compileall,py_compile,sys;compileall.compile_dir(sys.argv[1],quiet=2,stripdir=sys.argv[1],"
        "prependdir=sys.argv[2],invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)"
    )
    python = Root(root).command(f"usr/bin/python{PYTHON}", "-B", "-c", code, folder, guest_folder)
    _run(python, "compiling Python files", PYTHONHOME=str(root / "usr"))


def _run(argv: Sequence[str], step: str, **environment: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        last = said.splitlines()[-1] if said else f"{argv[0]} ended with {done.returncode}"
        raise SetupError(step, last, fetching=unreachable(said))


def _write(path: Path, text: str, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    path.write_text(text)
    path.chmod(mode)
