# SPDX-License-Identifier: Apache-2.0
"""Where the manager of a user lives: its run directory and the two sockets in it. And whose a folder is."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def untrusted(path: Path) -> Path | None:
    """Find what others could change a folder by: itself, or a folder above it; None when there is no such.

    Each must belong to root or the caller, and may be writable by others only if it is sticky, as /tmp is; the folder
    itself must be the caller's. Symbolic links are followed, and what they lead to is looked at.
    Raises: OSError.
    """
    folder = path.resolve(strict=True)
    for place in (folder, *folder.parents):
        found = place.stat()
        mine = found.st_uid == os.geteuid() or (found.st_uid == 0 and place != folder)
        others_write = found.st_mode & 0o022 and (place == folder or not found.st_mode & stat.S_ISVTX)
        if not mine or others_write:
            return place
    return None


def make_folders(path: Path) -> None:
    """Make a folder and what is missing above it, writable by the caller alone whatever the umask. Raises OSError."""
    for place in (*reversed(path.parents), path):
        try:
            place.mkdir(mode=0o755)
        except FileExistsError:
            continue
        place.chmod(0o755)


def run_dir() -> Path:
    """Directory of the user's manager: ISM_RUN_DIR, XDG_RUNTIME_DIR/ism, /run/ism for root, else /tmp/ism-UID."""
    explicit = os.environ.get("ISM_RUN_DIR")
    if explicit:
        return Path(explicit)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "ism"
    uid = os.getuid()
    return Path("/run/ism") if uid == 0 else Path(f"/tmp/ism-{uid}")


def device_socket(directory: Path) -> Path:
    """Socket on which every connection is a fresh device."""
    return directory / "device.sock"


def control_socket(directory: Path) -> Path:
    """Socket that answers `ism status`."""
    return directory / "control.sock"
