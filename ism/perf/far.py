# SPDX-License-Identifier: Apache-2.0
"""`python -m ism.perf.far`: serve the measuring workloads over SMC and over plain TCP until standard input ends.

Prints one JSON line, {"smc": port, "tcp": port}. Every further line on standard input is answered by one with the CPU
seconds that this process has used: {"cpu_s": ...}.
"""

from __future__ import annotations

import json
import sys
import time

import trio

from ism.perf import workloads
from ism.smc import open_tcp_listeners
from ism.smc.trio_wait import default_device


async def _serve(stream: trio.abc.Stream) -> None:
    try:
        await workloads.serve(stream)
    except (trio.BrokenResourceError, EOFError):
        pass  # the measuring side is gone: its errors are its own to report


async def main() -> None:
    """Serve both kinds of listeners."""
    await default_device()
    async with trio.open_nursery() as nursery:
        smc = await open_tcp_listeners(0, host="127.0.0.1", smc="require")
        tcp = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, _serve, smc)
        nursery.start_soon(trio.serve_listeners, _serve, tcp)
        ports = {"smc": smc[0].socket.getsockname()[1], "tcp": tcp[0].socket.getsockname()[1]}
        print(json.dumps(ports), flush=True)
        while await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            print(json.dumps({"cpu_s": time.process_time()}), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
