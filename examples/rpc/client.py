# SPDX-License-Identifier: Apache-2.0
"""Call `server.py` over shared memory and say what came of it: `python client.py [PORT [HOST]] [--quick]`."""

import argparse
import statistics
import sys
import time

import numpy as np
import rpc
import trio
from service import Compute

import ism.smc

BUFFER = 4 << 20
LIMITS = rpc.Limits(array_bytes=256 << 20)


async def typed_calls(compute: Compute) -> None:
    """Arrays and structures there and back, and each kind of error."""
    print("summary:", await compute.summarize(np.arange(10_001)))
    left, right = np.arange(6.0).reshape(2, 3), np.ones((3, 2))
    print("product:", (await compute.multiply(left, right, scale=10)).tolist())
    try:
        await compute.multiply(left, left)
    except rpc.RemoteError as exc:
        print(f"error: {exc.type} with data {exc.data}")
    try:
        await compute.echo(7)  # type: ignore[arg-type]
    except rpc.RemoteError as exc:
        print("error:", exc)


async def many_at_once(compute: Compute, calls: int) -> None:
    """More calls than one connection takes at a time; a slow one does not hold up the others."""
    answered: list[str] = []

    async def echo(text: str) -> None:
        answered.append(await compute.echo(text))

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as slow:
            slow.start_soon(compute.wait, 3600)
            begin = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for number in range(calls):
                    nursery.start_soon(echo, str(number))
            took = time.perf_counter() - begin
            print(f"at once: {len(set(answered))} calls answered, {calls / took:,.0f} a second")
            scope.cancel()
    print(f"cancelled: the server saw {await compute.cancelled_waits(at_least=1)}")


async def round_trip(compute: Compute, rounds: int) -> None:
    """One small call after the other."""
    await compute.echo("warm")
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        await compute.echo("x")
        times.append(time.perf_counter() - begin)
    print(f"round trip: {statistics.median(times) * 1e6:.0f} us median of {rounds} calls")


async def throughput(compute: Compute, mebibytes: int, rounds: int) -> None:
    """A large array to the server and back."""
    array = np.random.default_rng(1).random(mebibytes << 17)
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        back = await compute.mirror(array)
        best = min(best, time.perf_counter() - begin)
        if not np.array_equal(back, array):
            raise SystemExit("client: the array came back different")
    print(f"throughput: {2 * array.nbytes / best / 1e9:.2f} GB/s, {mebibytes} MiB there and back, best of {rounds}")


async def main(port: int, host: str, *, quick: bool) -> None:
    """Connect, and do all of the above."""
    stream = await ism.smc.open_tcp_stream(host, port, buffer_size=BUFFER)
    async with rpc.connect(stream, Compute, LIMITS) as compute:
        if (smc_info := getattr(stream, "smc_info", None)) is not None:
            print("connection:", smc_info())
        await typed_calls(compute)
        await many_at_once(compute, 200 if quick else 5000)
        await round_trip(compute, 200 if quick else 5000)
        await throughput(compute, 4 if quick else 64, 3 if quick else 10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Call the example's server over shared memory.")
    parser.add_argument("port", type=int, nargs="?", default=9100)
    parser.add_argument("host", nargs="?", default="127.0.0.1")
    parser.add_argument("--quick", action="store_true", help="fewer calls and smaller arrays")
    arguments = parser.parse_args()
    try:
        trio.run(lambda: main(arguments.port, arguments.host, quick=arguments.quick))
    except* (OSError, rpc.RpcError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sys.exit(f"client: {error}")
    except* KeyboardInterrupt:
        sys.exit(130)
