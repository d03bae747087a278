# SPDX-License-Identifier: Apache-2.0
"""Where the manager of a user lives: its run directory and the two sockets in it."""

from __future__ import annotations

import os
from pathlib import Path


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
