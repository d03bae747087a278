# SPDX-License-Identifier: Apache-2.0
"""PCI functions as the kernel shows them: which virtio-ism functions there are, what each lacks, and binding them.

`find` and `problems` read only. `bind` and `unbind` do what `driverctl` does, without persistence: driver_override,
unbind, drivers_probe; when a step fails, the former driver gets its function back. Everything goes through a `Sysfs`,
so that tests put a kernel of their own behind it.
Source: Linux Documentation/ABI/testing/sysfs-bus-pci, Documentation/driver-api/vfio.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ism.driver import capabilities
from ism.errors import TransportError
from ism.virtio.ism_spec import PCI_DEVICE_ID
from ism.virtio.pci import VENDOR_ID, MsixCap, PciCap

VFIO_DRIVER = "vfio-pci"
UIO_DRIVER = "uio_pci_generic"
DRIVERS = (VFIO_DRIVER, UIO_DRIVER)
ALLOW_NO_IOMMU = "ISM_ALLOW_NO_IOMMU"

_BDF = re.compile(r"(?:[0-9a-f]{4,}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_DEVICES = "bus/pci/devices"
_PCI_DRIVERS = "bus/pci/drivers"
_NOIOMMU_SWITCH = "module/vfio/parameters/enable_unsafe_noiommu_mode"
_NOIOMMU_GROUP = "vfio-noiommu"
_HARMLESS_IN_GROUP = (VFIO_DRIVER, "pci-stub", "pcieport")
"""Drivers that do no DMA of their own, whose functions may share a group with one of VFIO."""
_IO_SPACE = 0x100
_BARS = 6
_LEAST_MEMLOCK = 4 << 20
_MODPROBE_TIMEOUT_S = 30.0

Say = Callable[[str], None]


_MODPROBE_PLACES = "/usr/sbin:/sbin:/usr/bin:/bin"
"""Not the PATH of whoever calls: it runs as root."""


class Sysfs:
    """The kernel's files. `root`, `dev` and `proc` are where /sys, /dev and /proc are; paths below are relative."""

    def __init__(self, root: Path = Path("/sys"), dev: Path = Path("/dev"), proc: Path = Path("/proc")) -> None:
        self.root, self.dev, self.proc = root, dev, proc

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        return (self.root / path).exists()

    def read(self, path: str) -> str:
        """Return the text of an attribute without the newline. Raises OSError."""
        return (self.root / path).read_text().strip()

    def read_bytes(self, path: str) -> bytes:
        """Return the bytes of an attribute. Raises OSError."""
        return (self.root / path).read_bytes()

    def write(self, path: str, text: str) -> None:
        """Write an attribute, in one call as the kernel wants it. Raises OSError."""
        with (self.root / path).open("wb", buffering=0) as file:
            file.write(text.encode())

    def link(self, path: str) -> str | None:
        """Return the name of what a link points to, None when there is no such link."""
        try:
            return Path(os.readlink(self.root / path)).name
        except OSError:
            return None

    def entries(self, path: str) -> list[str]:
        """Return the names in a folder, sorted; none when it is absent."""
        try:
            return sorted(os.listdir(self.root / path))
        except OSError:
            return []

    def load_module(self, name: str) -> str | None:
        """Run modprobe. Returns: why it did not work, else None."""
        modprobe = shutil.which("modprobe", path=_MODPROBE_PLACES)
        if modprobe is None:
            return "there is no modprobe"
        try:
            done = subprocess.run(
                [modprobe, name], capture_output=True, text=True, check=False, timeout=_MODPROBE_TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            return f"modprobe: {exc}"
        return None if done.returncode == 0 else done.stderr.strip() or f"modprobe ended with {done.returncode}"

    @property
    def is_root(self) -> bool:
        """Whether this process may do what root may."""
        return os.geteuid() == 0

    @property
    def memlock(self) -> int:
        """Bytes that this process may lock; -1 for any number."""
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        return -1 if limit == resource.RLIM_INFINITY else limit

    def users(self, node: Path) -> list[str]:
        """Name the processes that have a device node open, as far as this user may see them."""
        found = []
        for process in self.proc.glob("[0-9]*"):
            try:
                if any(os.readlink(process / "fd" / fd) == str(node) for fd in os.listdir(process / "fd")):
                    found.append(f"pid {process.name} ({(process / 'comm').read_text().strip()})")
            except OSError:
                continue  # gone, or another user's
        return sorted(found)


@dataclass(frozen=True, slots=True)
class PciFunction:
    """One function, as it was when it was looked at.

    Attributes: `bdf`; `vendor`, `device` (numbers); `driver`, `override`, `group` (IOMMU group), None for none;
    `no_iommu` (its group is VFIO's without an IOMMU); `nodes` (what a program opens); `vectors` (of MSI-X, None when
    only root may know); `bars` (number to bytes).
    """

    bdf: str
    vendor: int
    device: int
    driver: str | None
    override: str | None
    group: str | None
    no_iommu: bool
    nodes: tuple[Path, ...]
    vectors: int | None
    bars: dict[int, int]

    @property
    def is_ism(self) -> bool:
        """Whether it is a virtio-ism function."""
        return (self.vendor, self.device) == (VENDOR_ID, PCI_DEVICE_ID)

    @property
    def name(self) -> str | None:
        """What to say in ISM_DEVICE, None while it is bound to a driver that no transport uses."""
        if self.driver == VFIO_DRIVER:
            return f"vfio:{self.bdf}"
        return f"uio:{self.bdf}" if self.driver == UIO_DRIVER else None


@dataclass(frozen=True, slots=True)
class Problem:
    """What keeps a function from being used: `text`, and what to `do` about it."""

    text: str
    do: str


def full_bdf(text: str) -> str | None:
    """Return a PCI address as sysfs spells it, such as 0000:01:00.0; None for what is none.

    As lspci prints it is right too: without the domain, which is 0 then.
    """
    text = text.lower()
    if not _BDF.fullmatch(text):
        return None
    return text if text.count(":") == 2 else f"0000:{text}"


def look(sysfs: Sysfs, bdf: str) -> PciFunction:
    """Describe one function. Raises TransportError (no PCI address, no such function)."""
    address = full_bdf(bdf)
    if address is None:
        raise TransportError(f"{bdf!r} is no PCI address, expected e.g. 0000:01:00.0; `ism devices` lists them")
    at = f"{_DEVICES}/{address}"
    try:
        vendor, device = (int(sysfs.read(f"{at}/{name}"), 16) for name in ("vendor", "device"))
    except (OSError, ValueError) as exc:
        raise TransportError(f"there is no PCI function {address}; `ism devices` lists them", errno.ENODEV) from exc
    group = sysfs.link(f"{at}/iommu_group")
    no_iommu = group is not None and _text(sysfs, f"{at}/iommu_group/name") == _NOIOMMU_GROUP
    override = _text(sysfs, f"{at}/driver_override")
    driver = sysfs.link(f"{at}/driver")
    return PciFunction(
        bdf=address,
        vendor=vendor,
        device=device,
        driver=driver,
        override=None if override in ("", "(null)") else override,
        group=group,
        no_iommu=no_iommu,
        nodes=tuple(_nodes(sysfs, at, driver, group, no_iommu=no_iommu)),
        vectors=_vectors(sysfs, at),
        bars=_bars(sysfs, at),
    )


def find(sysfs: Sysfs) -> list[PciFunction]:
    """Describe every virtio-ism function of this machine, in order of their addresses."""
    found = []
    for bdf in sysfs.entries(_DEVICES):
        if _text(sysfs, f"{_DEVICES}/{bdf}/device") != f"{PCI_DEVICE_ID:#06x}":
            continue  # one read for those that are something else
        try:
            function = look(sysfs, bdf)
        except TransportError:
            continue  # unplugged meanwhile
        if function.is_ism:
            found.append(function)
    return found


def bound_to(sysfs: Sysfs, driver: str) -> Iterator[str]:
    """Yield the addresses of the virtio-ism functions that a driver has, in order."""
    for bdf in sysfs.entries(f"{_PCI_DRIVERS}/{driver}"):
        at = f"{_DEVICES}/{bdf}"
        ids = (_text(sysfs, f"{at}/vendor"), _text(sysfs, f"{at}/device"))
        if full_bdf(bdf) == bdf and ids == (f"{VENDOR_ID:#06x}", f"{PCI_DEVICE_ID:#06x}"):
            yield bdf


def foreign(sysfs: Sysfs, bdf: str) -> str | None:
    """Say what a PCI function is that is there and is no virtio-ism function, as `1af4:1041`; else None."""
    at = f"{_DEVICES}/{bdf}"
    ids = [_text(sysfs, f"{at}/{name}").removeprefix("0x") for name in ("vendor", "device")]
    return ":".join(ids) if all(ids) and ids != [f"{VENDOR_ID:04x}", f"{PCI_DEVICE_ID:04x}"] else None


def _text(sysfs: Sysfs, path: str) -> str:
    try:
        return sysfs.read(path)
    except (OSError, UnicodeDecodeError):
        return ""


def _nodes(sysfs: Sysfs, at: str, driver: str | None, group: str | None, *, no_iommu: bool) -> Iterator[Path]:
    if driver == VFIO_DRIVER:
        yield from (sysfs.dev / "vfio" / "devices" / name for name in sysfs.entries(f"{at}/vfio-dev"))
        if group is not None:
            yield sysfs.dev / "vfio" / (f"noiommu-{group}" if no_iommu else group)
    elif driver == UIO_DRIVER:
        yield from (sysfs.dev / name for name in sysfs.entries(f"{at}/uio") if name.startswith("uio"))


def _vectors(sysfs: Sysfs, at: str) -> int | None:
    try:
        config = sysfs.read_bytes(f"{at}/config")
    except OSError:
        return None
    if len(config) <= 64:
        return None  # the kernel shows the capabilities to root only
    for cap_id, body in capabilities.walk(config):
        if cap_id == PciCap.MSIX and len(body) >= MsixCap.SIZE:
            return (MsixCap.unpack(body).control & 0x7FF) + 1
    return 0


def _bars(sysfs: Sysfs, at: str) -> dict[int, int]:
    bars = {}
    for number, line in enumerate(_text(sysfs, f"{at}/resource").splitlines()[:_BARS]):
        try:
            first, last, flags = (int(word, 16) for word in line.split())
        except ValueError:
            continue
        if last and not flags & _IO_SPACE:
            bars[number] = last - first + 1
    return bars


# -- what is missing ----------------------------------------------------------------------------------------------


def problems(sysfs: Sysfs, function: PciFunction, environment: Mapping[str, str] = os.environ) -> list[Problem]:
    """Say what keeps this process, or a like one, from using the function; nothing when it can be opened."""
    if function.driver not in DRIVERS:
        return _not_bound(sysfs, function)
    found = list(_at_nodes(sysfs, function))
    if function.driver == UIO_DRIVER:
        if not sysfs.is_root:
            found.append(Problem("physical addresses are told to root only", "run the program as root (CAP_SYS_ADMIN)"))
        if not _queue_memory_stays(sysfs):
            found.append(Problem("there is no memory that stays in place", "echo 16 > /proc/sys/vm/nr_hugepages"))
    elif not sysfs.is_root and 0 <= sysfs.memlock < _LEAST_MEMLOCK:
        found.append(
            Problem(
                f"memlock limit is {sysfs.memlock >> 10} KiB",
                f"raise it: ulimit -l {_LEAST_MEMLOCK >> 10}, or LimitMEMLOCK= of the unit",
            )
        )
    if function.driver == UIO_DRIVER or function.no_iommu:
        if environment.get(ALLOW_NO_IOMMU) != "1":
            found.append(Problem("nothing checks which memory the device uses", f"allow it: export {ALLOW_NO_IOMMU}=1"))
    else:
        found += [
            Problem(
                f"IOMMU group {function.group} also has {bdf}, bound to {driver}",
                f"unbind that, or `ism bind {bdf} --any`",
            )
            for bdf, driver in _strangers(sysfs, function)
        ]
    return found


def _not_bound(sysfs: Sysfs, function: PciFunction) -> list[Problem]:
    state = f"bound to {function.driver}" if function.driver else "bound to no driver"
    if function.group is not None or _may_do_without_iommu(sysfs):
        driver, do = VFIO_DRIVER, f"run `ism bind {function.bdf}`"
        found = [Problem(state, do)]
    else:
        driver, do = UIO_DRIVER, f"run `ism bind {function.bdf} --driver {UIO_DRIVER}` and export {ALLOW_NO_IOMMU}=1"
        found = [
            Problem(state, do),
            Problem(
                f"no IOMMU, so no {VFIO_DRIVER}", "that, or boot with intel_iommu=on (or amd_iommu=on) and an IOMMU"
            ),
        ]
    if not sysfs.exists(f"{_PCI_DRIVERS}/{driver}"):
        found.append(Problem(f"module {driver} is not loaded", f"`ism bind` loads it, as does: modprobe {driver}"))
    return found


def _at_nodes(sysfs: Sysfs, function: PciFunction) -> Iterator[Problem]:
    there = [node for node in function.nodes if node.exists()]
    if not there:
        names = " or ".join(map(str, function.nodes)) or "device node"
        yield Problem(f"no {names}", "is /dev a devtmpfs, does udev run? unbind it and bind it again")
    elif not any(os.access(node, os.R_OK | os.W_OK) for node in there):
        node = there[-1]
        yield Problem(f"no right to open {node}", f"as root: chgrp $GROUP {node} && chmod g+rw {node}")
    users = [user for node in there for user in sysfs.users(node)]
    if users:
        yield Problem(f"in use by {', '.join(users)}", "end that program, or use another function")


def _queue_memory_stays(sysfs: Sysfs) -> bool:
    huge = "kernel/mm/hugepages/hugepages-2048kB/free_hugepages"
    if _text(sysfs, huge) not in ("", "0"):
        return True
    try:
        return (sysfs.proc / "sys/vm/compact_unevictable_allowed").read_text().strip() == "0"
    except OSError:
        return True


def _may_do_without_iommu(sysfs: Sysfs) -> bool:
    return _text(sysfs, _NOIOMMU_SWITCH) in ("Y", "1")


def _strangers(sysfs: Sysfs, function: PciFunction) -> Iterator[tuple[str, str]]:
    """Yield the functions of the same IOMMU group, with their drivers, that keep VFIO from using the group."""
    for bdf in sysfs.entries(f"{_DEVICES}/{function.bdf}/iommu_group/devices"):
        driver = sysfs.link(f"{_DEVICES}/{bdf}/driver")
        if bdf != function.bdf and driver is not None and driver not in _HARMLESS_IN_GROUP:
            yield bdf, driver


# -- binding ------------------------------------------------------------------------------------------------------


def bind(sysfs: Sysfs, bdf: str, driver: str = VFIO_DRIVER, *, anything: bool = False, say: Say) -> bool:
    """Bind a function to a driver that hands it to programs, until the next boot or `unbind`.

    Args: `anything`: also a function that is no virtio-ism device; `say`: told of each step that was done.
    Returns: whether anything was changed: False when it was bound to that driver already.
    Raises: TransportError, saying what to do; the former driver has the function again, or the error says that not.
    """
    function = look(sysfs, bdf)
    bdf = function.bdf
    _check_identity(function, anything=anything)
    if function.driver == driver:
        say(f"{bdf} is bound to {driver} already")
        return False
    _check_may_change(sysfs, function)
    if not sysfs.exists(f"{_PCI_DRIVERS}/{driver}"):
        why = sysfs.load_module(driver)
        if why is not None or not sysfs.exists(f"{_PCI_DRIVERS}/{driver}"):
            raise TransportError(
                f"the kernel has no PCI driver {driver}: {why or 'the module is loaded, the driver is not there'}; "
                f"install the package with its module {driver}",
                errno.ENOENT,
            )
        say(f"module {driver} loaded")
    if driver == VFIO_DRIVER:
        _check_group(sysfs, function)
    try:
        _override(sysfs, function, driver, say)
        _detach(sysfs, bdf, function.driver, say)
        _write(sysfs, "bus/pci/drivers_probe", bdf)
        now = sysfs.link(f"{_DEVICES}/{bdf}/driver")
        if now != driver:
            raise TransportError(
                f"the kernel did not bind {bdf} to {driver}, it is bound to {now or 'none'}: its log (dmesg) says why",
                errno.EIO,
            )
    except BaseException as exc:
        problem = _put_back(sysfs, function, say)
        if problem is not None and isinstance(exc, TransportError):
            raise TransportError(f"{exc}; and {problem}", exc.errno) from exc
        raise
    say(f"{bdf} bound to {driver}")
    return True


def unbind(sysfs: Sysfs, bdf: str, *, anything: bool = False, say: Say) -> bool:
    """Give a function back to the driver that the kernel chooses for it.

    Args, returns, raises: as `bind`.
    """
    function = look(sysfs, bdf)
    bdf = function.bdf
    _check_identity(function, anything=anything)
    if function.driver not in DRIVERS and function.override is None:
        state = f"bound to {function.driver}" if function.driver else "bound to no driver"
        say(f"{bdf} is {state} already, as the kernel chose")
        return False
    _check_may_change(sysfs, function)
    try:
        _override(sysfs, function, None, say)
        _detach(sysfs, bdf, function.driver, say)
        _write(sysfs, "bus/pci/drivers_probe", bdf)
    except BaseException as exc:
        problem = _put_back(sysfs, function, say)
        if problem is not None and isinstance(exc, TransportError):
            raise TransportError(f"{exc}; and {problem}", exc.errno) from exc
        raise
    now = sysfs.link(f"{_DEVICES}/{bdf}/driver")
    say(f"{bdf} bound to {now}" if now else f"{bdf} is bound to no driver: the kernel has none for it")
    return True


def _check_identity(function: PciFunction, *, anything: bool) -> None:
    if not function.is_ism and not anything:
        raise TransportError(
            f"{function.bdf} is {function.vendor:04x}:{function.device:04x}, not a virtio-ism function "
            f"({VENDOR_ID:04x}:{PCI_DEVICE_ID:04x}); --any takes its driver away from it all the same",
            errno.EINVAL,
        )


def _check_may_change(sysfs: Sysfs, function: PciFunction) -> None:
    if not sysfs.is_root:
        raise TransportError(f"only root may bind {function.bdf} to another driver: run this as root", errno.EPERM)
    users = [user for node in function.nodes for user in sysfs.users(node)]
    if users:  # the kernel would wait for them
        raise TransportError(f"{function.bdf} is in use by {', '.join(users)}: end that first", errno.EBUSY)


def _check_group(sysfs: Sysfs, function: PciFunction) -> None:
    if function.group is None and not _may_do_without_iommu(sysfs):
        raise TransportError(
            f"{function.bdf} has no IOMMU, without which {VFIO_DRIVER} takes nothing: boot with intel_iommu=on (or "
            f"amd_iommu=on) on a machine that has one, or use --driver {UIO_DRIVER} where the device is trusted",
            errno.ENODEV,
        )
    strangers = ", ".join(f"{bdf} ({driver})" for bdf, driver in _strangers(sysfs, function))
    if strangers:
        raise TransportError(
            f"IOMMU group {function.group} of {function.bdf} also has {strangers}: a group is used as a whole; unbind "
            "those first",
            errno.EBUSY,
        )


def _write(sysfs: Sysfs, path: str, text: str) -> None:
    try:
        sysfs.write(path, text)
    except OSError as exc:
        raise TransportError(f"{sysfs.root / path}: writing {text!r}: {exc.strerror}", exc.errno or 0) from exc


def _override(sysfs: Sysfs, function: PciFunction, driver: str | None, say: Say) -> None:
    if function.override == driver:
        return
    _write(sysfs, f"{_DEVICES}/{function.bdf}/driver_override", f"{driver or ''}\n")
    say(
        f"driver_override of {function.bdf} set to {driver}" if driver else f"driver_override of {function.bdf} cleared"
    )


def _detach(sysfs: Sysfs, bdf: str, driver: str | None, say: Say) -> None:
    if driver is not None:
        _write(sysfs, f"{_PCI_DRIVERS}/{driver}/unbind", bdf)
        say(f"{bdf} unbound from {driver}")


def _put_back(sysfs: Sysfs, former: PciFunction, say: Say) -> str | None:
    """Bring back driver and override as they were. Returns: what is different now, None when nothing is."""
    bdf, now = former.bdf, sysfs.link(f"{_DEVICES}/{former.bdf}/driver")
    try:
        _write(sysfs, f"{_DEVICES}/{bdf}/driver_override", f"{former.override or ''}\n")
        if now != former.driver:
            _detach(sysfs, bdf, now, say)
            if former.driver is not None:
                _write(sysfs, f"{_PCI_DRIVERS}/{former.driver}/bind", bdf)
    except TransportError as exc:
        return f"{bdf} could not be given back to {former.driver or 'no driver'}: {exc}"
    if now != former.driver and former.driver is not None:
        say(f"{bdf} given back to {former.driver}")
    return None
