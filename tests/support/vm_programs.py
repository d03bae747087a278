# SPDX-License-Identifier: Apache-2.0
"""Programs that tests run inside guests, and on the host beside them: Python source that finds `argument`.

They are text because they run elsewhere: in a guest's Python, which shares no memory with the tests.
"""

SERVE = """
import hashlib, json, trio, ism.smc

async def serve(stream):
    async with stream:
        digest, count = hashlib.sha256(), 0
        async for part in stream:
            digest.update(part)
            count += len(part)
            if argument.get("echo"):
                await stream.send_all(part)
        info = stream.smc_info()
        if not argument.get("echo"):
            await stream.send_all(digest.digest())
        print("served", json.dumps([count, info.mode, str(info.reason)]), flush=True)

async def main():
    listeners = await ism.smc.open_tcp_listeners(argument["port"], host=argument["host"])
    print("listening", flush=True)
    if argument.get("once", True):
        await serve(await listeners[0].accept())
        await listeners[0].aclose()
    else:
        await trio.serve_listeners(serve, listeners)

trio.run(main)
"""
"""Counts and digests what comes; echoes it with `echo`, else answers the end of it with the SHA-256."""

SEND = """
import hashlib, os, time, trio, ism.smc

async def main():
    stream = await ism.smc.open_tcp_stream(argument["host"], argument["port"])
    async with stream:
        digest, data = hashlib.sha256(), os.urandom(1 << 20)
        began = time.monotonic()
        for _ in range(argument["mib"]):
            await stream.send_all(data)
            digest.update(data)
            if argument.get("progress"):
                print("sent", flush=True)
        await stream.send_eof()
        answer = b""
        async for part in stream:
            answer += part
        info = stream.smc_info()
        return {
            "same": answer == digest.digest(), "mode": info.mode, "reason": str(info.reason),
            "seconds": time.monotonic() - began,
        }

result = trio.run(main)
"""
"""Sends random data and compares the digest that comes back."""

ECHO = """
import time, trio, ism.smc

async def main():
    stream = await ism.smc.open_tcp_stream(argument["host"], argument["port"])
    async with stream:
        for number in range(argument["rounds"]):
            message = number.to_bytes(4, "big") * argument["words"]
            await stream.send_all(message)
            answer = b""
            while len(answer) < len(message):
                part = await stream.receive_some()
                assert part, "the server closed"
                answer += part
            assert answer == message
        return stream.smc_info().mode

result = trio.run(main)
"""
"""Sends messages one at a time and compares the echo of each."""
