# SPDX-License-Identifier: Apache-2.0
"""The service in one virtual machine: `python service.py [HOST [PORT]]`. Then `client.py` in another one."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import trio
from numpy.typing import NDArray

import ism.smc

sys.path.append(str(Path(__file__).parents[1] / "rpc"))
import rpc

LIMITS = rpc.Limits(array_bytes=64 << 20, calls=16)


class Sums:
    """What the other machine can call. One object serves one client."""

    async def total(self, values: NDArray[np.float64]) -> float:
        """Return the sum of all elements."""
        return float(values.sum())

    async def running(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sums of the first 1, 2, 3 ... elements."""
        return np.cumsum(values)


async def main(host: str, port: int) -> None:
    """Serve for ever. One client's failure is no reason to stop."""

    async def client(stream: ism.smc.SmcStream) -> None:
        try:
            await rpc.serve(stream, Sums(), LIMITS)
            print("a client is done", flush=True)
        except rpc.RpcError as exc:
            print(f"a client: {exc}", flush=True)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(ism.smc.serve_tcp, client, port, host=host))
        print(f"listening on {host} port {listeners[0].socket.getsockname()[1]}", flush=True)


if __name__ == "__main__":
    try:
        trio.run(
            main, sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 9200
        )
    except* KeyboardInterrupt:
        pass
    except* (OSError, ValueError) as group:
        sys.exit(f"service: {group.exceptions[0]}")
