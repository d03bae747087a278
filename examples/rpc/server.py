# SPDX-License-Identifier: Apache-2.0
"""Serve `Compute` over shared memory: `python server.py [PORT [HOST]]`. Start `ism manager` first, `client.py` then."""

import itertools
import sys
from functools import partial

import rpc
import trio
from service import Compute

import ism.smc

BUFFER = 4 << 20
LIMITS = rpc.Limits(array_bytes=256 << 20, calls=64)


async def main(port: int, host: str) -> None:
    """Serve for ever, and say on which port."""
    numbers = itertools.count(1)

    async def client(stream: ism.smc.SmcStream) -> None:
        """Serve one client with a `Compute` of its own. One client's failure is no reason to stop."""
        number = next(numbers)
        try:
            await rpc.serve(stream, Compute(), LIMITS)
            print(f"client {number}: done", flush=True)
        except rpc.RpcError as exc:
            print(f"client {number}: {exc}", flush=True)

    async with trio.open_nursery() as nursery:
        serve = partial(ism.smc.serve_tcp, client, port, host=host, buffer_size=BUFFER)
        listeners = await nursery.start(serve)
        print(f"listening on port {listeners[0].socket.getsockname()[1]}", flush=True)


if __name__ == "__main__":
    try:
        trio.run(
            main, int(sys.argv[1]) if len(sys.argv) > 1 else 9100, sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1"
        )
    except* KeyboardInterrupt:
        pass
    except* (OSError, ValueError) as group:
        sys.exit(f"server: {group.exceptions[0]}")
