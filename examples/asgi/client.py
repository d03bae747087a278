# SPDX-License-Identifier: Apache-2.0
"""Talk to the application with httpx, and say how the bytes travelled.

usage: client.py URL [sync | trio | asyncio]
"""

import asyncio
import hashlib
import sys

import httpx
import trio

DATA = bytes(range(256)) * 20_000


def how(response: httpx.Response) -> str:
    """Say how the bytes of a response travelled: only the socket knows."""
    sock = response.extensions["network_stream"].get_extra_info("socket")
    if not hasattr(sock, "smc_info"):
        return "TCP (this end knows of nothing else)"
    info = sock.smc_info()
    return f"SMC, {info.sent} bytes sent, {info.received} received" if info.mode == "SMC" else str(info)


def check(greeting: httpx.Response, digest: httpx.Response, count: httpx.Response) -> None:
    """Print what came back, and see that nothing is missing."""
    print(greeting.text.strip())
    print(digest.text.split()[0], "bytes up,", len(count.content), "bytes down")
    print(how(count))
    assert digest.text.split()[1] == hashlib.sha256(DATA).hexdigest()


def talk(url: str) -> None:
    """Three requests over one connection."""
    with httpx.Client(base_url=url) as client:
        check(client.get("/"), client.post("/digest", content=DATA), client.get(f"/count?{len(DATA)}"))


async def talk_async(url: str) -> None:
    """The same, with an event loop."""
    async with httpx.AsyncClient(base_url=url) as client:
        check(
            await client.get("/"),
            await client.post("/digest", content=DATA),
            await client.get(f"/count?{len(DATA)}"),
        )


if __name__ == "__main__":
    match sys.argv[1:]:
        case [url] | [url, "sync"]:
            talk(url)
        case [url, "trio"]:
            trio.run(talk_async, url)
        case [url, "asyncio"]:
            asyncio.run(talk_async(url))
        case _:
            sys.exit(__doc__)
