# SPDX-License-Identifier: Apache-2.0
"""The two processes of `ism demo`: one sends a file through `ism.smc`, one receives it; JSON lines on stdout.

    receive                  prints {"port": N}, then {"bytes": N} as it goes, then {"sha256": ..., "seconds": ...}
    send PORT FILE           prints {"sha256": ...}

On the stream: 8 bytes length (little-endian), the bytes, the end of the stream.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import trio

from ism.perf.workloads import receive_exactly
from ism.smc import SmcStream, open_tcp_listeners, open_tcp_stream
from ism.smc.trio_wait import default_device

_CHUNK = 1 << 18
_REPORT_S = 0.05


def _say(**values: object) -> None:
    print(json.dumps(values), flush=True)


async def receive() -> None:
    """Receive one file and report its hash."""
    await default_device()
    (listener,) = await open_tcp_listeners(0, host="127.0.0.1", smc="require")
    async with listener:
        _say(port=listener.socket.getsockname()[1])
        stream = await listener.accept()
    async with stream:
        await _receive_file(stream)


async def _receive_file(stream: SmcStream) -> None:
    expected = int.from_bytes(await receive_exactly(stream, 8), "little")
    digest, received = hashlib.sha256(), 0
    start = reported = time.perf_counter()
    while data := await stream.receive_some(_CHUNK):
        digest.update(data)
        received += len(data)
        if (now := time.perf_counter()) - reported > _REPORT_S:
            reported = now
            _say(bytes=received)
    if received != expected:
        raise EOFError(f"the stream ended after {received} of {expected} bytes")
    _say(bytes=received)
    _say(sha256=digest.hexdigest(), seconds=time.perf_counter() - start)


async def send(port: int, path: Path) -> None:
    """Send one file and report its hash."""
    digest = hashlib.sha256()
    async with await open_tcp_stream("127.0.0.1", port, smc="require") as stream:
        with path.open("rb") as file:
            await stream.send_all(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
            while data := file.read(_CHUNK):
                digest.update(data)
                await stream.send_all(data)
        await stream.send_eof()
        await stream.receive_some(1)  # the receiver closes when it has everything
    _say(sha256=digest.hexdigest())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["receive"]:
            trio.run(receive)
        case ["send", port_text, file_text]:
            trio.run(send, int(port_text), Path(file_text))
        case _:
            sys.exit(f"usage: {sys.argv[0]} receive | send PORT FILE")
