# SPDX-License-Identifier: Apache-2.0
"""What one thread copies, from one buffer of a message's size to another, again and again: everybody's limit."""

from __future__ import annotations

import time
from typing import Final

from ism.perf.versus.figures import Figures, Outcome, Step, figures_of

_LOOK_EVERY: Final = 32


def copy(size: int, seconds: float) -> Figures:
    """Copy for about so long."""
    source, target = memoryview(bytearray(size)), memoryview(bytearray(size))
    target[:] = source
    count, clock = 0, time.perf_counter
    began_s, cpu_s = clock(), time.process_time()
    ends_s = began_s + seconds
    while clock() < ends_s:
        for _ in range(_LOOK_EVERY):
            target[:] = source
        count += _LOOK_EVERY
    took = Outcome(clock() - began_s, time.process_time() - cpu_s, 0.0, [])
    return figures_of(Step("stream", size, count), took)
