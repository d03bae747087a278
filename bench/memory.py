# SPDX-License-Identifier: Apache-2.0
"""What does a region of 1 MiB that two processes share cost in memory?

The region is written from end to end by its owner and read by the peer. Counted are the shared pages of the host
(Shmem of /proc/meminfo) before and after, and the private memory of the three processes (owner, peer, manager).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import manager, run, table

from ism.driver import open_device
from ism.virtio.ism_spec import Permission

REGION = 1 << 20
_PEER = """
import sys
from ism.driver import open_device
device = open_device()
print(device.devid, flush=True)
region = device.attach(int(sys.stdin.readline()))
assert sum(region.view[::4096]) > 0
print("attached", flush=True)
sys.stdin.readline()
"""


def shmem() -> int:
    """Bytes of shared memory pages on this host."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/meminfo has no Shmem line")


def private(pid: int) -> int:
    """Bytes of private memory of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def body(quick: bool) -> dict[str, Any]:
    """Share one region and count."""
    settle_s = 0.05 if quick else 0.5
    with (
        manager(),
        open_device() as device,
        subprocess.Popen(
            [sys.executable, "-c", _PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as peer,
    ):
        assert peer.stdin is not None
        assert peer.stdout is not None
        peer_devid = int(peer.stdout.readline())
        time.sleep(settle_s)
        before, mine = shmem(), private(os.getpid())
        region = device.alloc(REGION)
        region.grant(Permission.READ | Permission.WRITE | Permission.ATTACH, peer_devid)
        region.view[:] = bytes([1]) * REGION
        print(region.token, file=peer.stdin, flush=True)
        assert peer.stdout.readline()
        time.sleep(settle_s)
        shared, own = shmem() - before, private(os.getpid()) - mine
        peer.stdin.close()
        region.close()
    rows = [["shared pages", f"{shared / 1024:.0f}"], ["private memory of the owner, growth", f"{own / 1024:.0f}"]]
    table("a region of 1 MiB in two processes, KiB", ("", "KiB"), rows)
    return {"shared_bytes": shared, "owner_private_bytes": own, "region_bytes": REGION}


if __name__ == "__main__":
    run(__doc__ or "", body)
