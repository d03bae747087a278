# SPDX-License-Identifier: Apache-2.0
"""Call `service.py` in another virtual machine: `python client.py [HOST [PORT]]`. Ends with 1 if an answer is wrong."""

import sys
import time

import numpy as np
import trio
from service import LIMITS, Sums, rpc

import ism.smc

ELEMENTS = 1_000_000
CALLS = 64


async def main(host: str, port: int) -> None:
    """One large array each way, then many calls at once."""
    values = np.random.default_rng(1).integers(-1000, 1000, ELEMENTS).astype(np.float64)  # sums are exact
    stream = await ism.smc.open_tcp_stream(host, port)
    async with rpc.connect(stream, Sums, LIMITS) as sums:
        begin = time.perf_counter()
        total = await sums.total(values)
        took = time.perf_counter() - begin
        check(total == values.sum(), "sum")
        print(f"sum of {ELEMENTS:,} numbers: {total:,.0f}, as here ({took * 1e3:.0f} ms, {values.nbytes:,} bytes)")
        check(np.array_equal(await sums.running(values), np.cumsum(values)), "running sums")
        print(f"running sums: {ELEMENTS:,} numbers back, as here")

        async def call(number: int) -> None:
            answers[number] = await sums.total(values[:number])

        answers: dict[int, float] = {}
        begin = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number in range(CALLS):
                nursery.start_soon(call, number)
        took = time.perf_counter() - begin
        check(answers == {number: values[:number].sum() for number in range(CALLS)}, "calls at once")
        print(f"at once: {CALLS} calls, each with the answer that is its own ({took * 1e3:.0f} ms)")
        print(f"connection: {stream.smc_info()}")


def check(right: bool, what: str) -> None:
    """Raise ValueError when an answer is wrong."""
    if not right:
        raise ValueError(f"{what}: the answer is wrong")


if __name__ == "__main__":
    try:
        trio.run(
            main, sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 9200
        )
    except* (OSError, ValueError, rpc.RpcError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sys.exit(f"client: {error}")
    except* KeyboardInterrupt:
        sys.exit(130)
