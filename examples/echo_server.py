# SPDX-License-Identifier: Apache-2.0
"""An echo server over shared memory. Start `ism manager` first, then this, then `echo_client.py`."""

import sys
from functools import partial

import trio

import ism.smc


async def echo(stream: ism.smc.SmcStream) -> None:
    """Send back what comes, until the client is done. One client's failure is no reason to stop."""
    try:
        async with stream:
            async for data in stream:
                await stream.send_all(data)
    except trio.BrokenResourceError as exc:
        print(f"client lost: {exc}", file=sys.stderr)


async def main(port: int) -> None:
    """Serve on 127.0.0.1, and say on which port."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(ism.smc.serve_tcp, echo, port, host="127.0.0.1"))
        print(f"listening on port {listeners[0].socket.getsockname()[1]}", flush=True)


if __name__ == "__main__":
    try:
        trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 9000)
    except* KeyboardInterrupt:
        pass
    except* (OSError, ValueError) as group:
        sys.exit(f"echo_server: {group.exceptions[0]}")
