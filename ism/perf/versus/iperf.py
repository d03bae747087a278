# SPDX-License-Identifier: Apache-2.0
"""iperf3, the program: throughput of TCP in C, with the CPU that both of its ends report."""

from __future__ import annotations

import json
import socket
import subprocess
from typing import Any, Final

from ism.perf.versus.pair import PairError
from ism.perf.versus.peers_sockets import HOST

_LEAST_BYTES: Final = 1 << 28
_GUESS_BYTES_PER_S: Final = 4e9
_LIMIT_S: Final = 60


def sample(size: int, seconds: float, cpus: tuple[int, int] | None) -> dict[str, Any]:
    """Send about so long, in writes of `size`. Returns figures as a sample's. Raises PairError."""
    with socket.create_server((HOST, 0)) as reserved:
        port = str(reserved.getsockname()[1])
    server = subprocess.Popen(
        ["iperf3", "-s", "-1", "-B", HOST, "-p", port, "--forceflush"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if "listening" in line:
                break
        count = max(1, int(max(_LEAST_BYTES, seconds * _GUESS_BYTES_PER_S)) // size)
        command = ["iperf3", "-c", HOST, "-p", port, "-J", "-l", str(size), "-n", str(count * size)]
        if cpus is not None:
            command += ["-A", f"{cpus[0]},{cpus[1]}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        return _figures(json.loads(done.stdout), size)
    except (subprocess.TimeoutExpired, ValueError, KeyError) as exc:
        raise PairError(f"iperf3: {type(exc).__name__}: {exc}") from exc
    finally:
        server.kill()
        server.communicate()


def _figures(document: dict[str, Any], size: int) -> dict[str, Any]:
    if "error" in document:
        raise PairError(f"iperf3: {document['error']}")
    received, used = document["end"]["sum_received"], document["end"]["cpu_utilization_percent"]
    seconds, moved = float(received["seconds"]), float(received["bytes"])
    cpu_s = (used["host_total"] + used["remote_total"]) / 100 * seconds
    return {
        "count": int(moved // size), "seconds": seconds, "messages_per_s": moved / size / seconds,
        "bytes_per_s": moved / seconds, "cpu_s_per_gb": cpu_s / (moved / 1e9), "p50_s": None, "p99_s": None,
    }  # fmt: skip
