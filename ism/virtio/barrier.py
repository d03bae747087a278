# SPDX-License-Identifier: Apache-2.0
"""A full memory barrier in plain Python, for the control and event queues of both sides (virtio 1.3 section 2.7).

Split queues need order between stores, between loads and, where one side decides whether the other must be told,
between a store and a later load. The first two come for free on x86-64 only, the third nowhere. The rings of the data
path have fences in compiled code; the queues carry a few commands a second and must work without Numba, so `full()`
takes its order from a lock that is held and that nobody else uses: release it, then acquire it again.

Why that is a full barrier, given that both operations end in an atomic read-modify-write of the lock's word whether or
not anybody waits (CPython up to 3.13: `sem_post` and `sem_wait`, from 3.14 on `PyMutex`):

- x86-64: an atomic read-modify-write is a locked instruction, and no load or store passes a locked instruction in
  either direction (Intel SDM volume 3, memory ordering: locked instructions have a total order).
- arm64: everything before a store-release is observed before it, everything after a load-acquire is observed after it,
  and a load-acquire never passes an earlier store-release: both are RCsc (Arm ARM, "barrier-ordered-before"). Release
  first, acquire second, therefore orders all that comes before against all that follows, stores against loads too.
  The opposite sequence, acquire and then release, would let both sides leak into the middle.
- The compiler: loads and stores of shared memory and the lock are C calls made by the interpreter, none of which it
  can see through.

The locks are kept in a pool: each caller, in any thread or signal handler, works on one that it alone has.
"""

from __future__ import annotations

import threading

_held: list[threading.Lock] = []


def full() -> None:
    """Order every load and store before the call against every load and store after it."""
    try:
        lock = _held.pop()
    except IndexError:
        lock = threading.Lock()
        lock.acquire()
    lock.release()
    lock.acquire()
    _held.append(lock)
