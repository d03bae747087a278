# SPDX-License-Identifier: Apache-2.0
"""The service of this example: what `server.py` runs and `client.py` calls. Nothing in it knows of connections."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
import trio
from msgspec import Meta
from numpy.typing import NDArray
from rpc import ServiceError

Numbers = NDArray[np.float64]
Seconds = Annotated[float, Meta(ge=0, le=3600)]


class Summary(msgspec.Struct):
    """Statistics of an array."""

    count: int
    mean: float
    deviation: float
    smallest: float
    largest: float


class EmptyArrayError(ServiceError):
    """An array without elements has no statistics."""


class ShapeError(ServiceError):
    """Two matrices do not fit. Its data are their shapes."""


class Compute:
    """Arithmetic for others. One object serves one client."""

    def __init__(self) -> None:
        self._cancelled = 0
        self._news = trio.Event()

    async def echo(self, text: str) -> str:
        """Return the text: what a call costs when nothing is done."""
        return text

    async def mirror(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array, of whatever dtype: what an array costs when nothing is done."""
        return array

    async def summarize(self, values: NDArray[np.integer | np.floating]) -> Summary:
        """Return statistics of all elements. Raises EmptyArrayError."""
        if values.size == 0:
            raise EmptyArrayError(f"no elements in shape {values.shape}")
        return Summary(values.size, values.mean(), values.std(), values.min(), values.max())

    async def multiply(self, left: Numbers, right: Numbers, *, scale: float = 1.0) -> Numbers:
        """Return the product of two matrices; in a thread, so that other calls are answered meanwhile."""
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            shapes = {"left": left.shape, "right": right.shape}
            raise ShapeError(f"cannot multiply shapes {left.shape} and {right.shape}", shapes)
        return await trio.to_thread.run_sync(lambda: scale * (left @ right))

    async def wait(self, duration: Seconds) -> float:
        """Do nothing for so long: something to cancel. Returns the seconds that passed."""
        begin = trio.current_time()
        try:
            await trio.sleep(duration)
        except trio.Cancelled:
            self._cancelled += 1
            self._news.set()
            self._news = trio.Event()
            raise
        return trio.current_time() - begin

    async def cancelled_waits(self, at_least: int = 0) -> int:
        """Return how many waits of this client were cancelled, once it is that many."""
        while self._cancelled < at_least:
            await self._news.wait()
        return self._cancelled
