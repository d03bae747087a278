# SPDX-License-Identifier: Apache-2.0
"""A peer of iceoryx2: one publish-subscribe service each way, polled, with a copy in and a copy out.

Nothing is dropped: a publisher whose subscriber is full tries again until there is room.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any, Final

from ism.perf.versus.figures import Figures, Script
from ism.perf.versus.peers_sockets import Peer, Say
from ism.perf.versus.talk import REQUEST, Line, answer, ask

_HELD_BYTES: Final = 1 << 22
_HELD_MESSAGES: Final = (4, 256)
_MEET_S: Final = 10.0


class Services:
    """Two services, named after the process that listens."""

    def __init__(self) -> None:
        self._served = 0

    def serve(self, directory: Path, size: int, say: Say) -> None:
        self._served += 1
        name = f"ism-perf/{os.getpid()}/{self._served}"
        ends = _Ends(str(directory), name, size, near=False)
        say([str(directory), name, size])
        ends.meet()
        answer(ends.line())

    def run(self, address: Any, script: Script) -> Figures:
        ends = _Ends(*address, near=True)
        ends.meet()
        figures = ask(ends.line(), script)
        ends.wait_for_goodbye()
        return figures


class _Ends:
    """The publisher and the subscriber of one process."""

    def __init__(self, directory: str, name: str, size: int, *, near: bool) -> None:
        import iceoryx2

        iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
        self._size = max(size, REQUEST.size)
        config = iceoryx2.config.default()
        config.global_cfg.root_path = iceoryx2.Path.new(directory)
        self._node = iceoryx2.NodeBuilder.new().config(config).create(iceoryx2.ServiceType.Ipc)
        out, back = (f"{name}/{way}" for way in (("there", "back") if near else ("back", "there")))
        self._services = [self._service(iceoryx2, which, size) for which in (out, back)]
        self._publisher = (
            self._services[0].publisher_builder().initial_max_slice_len(self._size)
            .backpressure_strategy(iceoryx2.BackpressureStrategy.RetryUntilDelivered).create()
        )  # fmt: skip
        self._subscriber = self._services[1].subscriber_builder().create()

    def _service(self, iceoryx2: Any, name: str, size: int) -> Any:
        held = max(_HELD_MESSAGES[0], min(_HELD_MESSAGES[1], _HELD_BYTES // size))
        return (
            self._node.service_builder(iceoryx2.ServiceName.new(name))
            .publish_subscribe(iceoryx2.Slice[ctypes.c_uint8])
            .max_publishers(1).max_subscribers(1).subscriber_max_buffer_size(held).history_size(0)
            .enable_safe_overflow(False).open_or_create()
        )  # fmt: skip

    def meet(self) -> None:
        """Wait until each end has a publisher and a subscriber. Raises TimeoutError."""
        deadline_s = time.monotonic() + _MEET_S
        while any(
            service.dynamic_config.number_of_publishers + service.dynamic_config.number_of_subscribers < 2
            for service in self._services
        ):
            if time.monotonic() > deadline_s:
                raise TimeoutError("the other end's iceoryx2 ports have not come")
            time.sleep(0.001)
        self._publisher.update_connections()

    def wait_for_goodbye(self) -> None:
        """Keep what is sent alive until the other end has read it and gone. Raises TimeoutError."""
        deadline_s = time.monotonic() + _MEET_S
        while self._services[0].dynamic_config.number_of_subscribers:
            if time.monotonic() > deadline_s:
                raise TimeoutError("the other end's iceoryx2 ports do not go")
            time.sleep(0.001)

    def line(self) -> Line:
        """Return what the workloads use."""
        loan, receive, move = self._publisher.loan_slice_uninit, self._subscriber.receive, ctypes.memmove
        kept: dict[int, Any] = {}

        def send(data: bytes) -> None:
            sample = loan(len(data))
            move(sample.payload_ptr, data, len(data))
            sample.assume_init().send()

        def some(view: memoryview) -> int:
            place = kept.get(len(view))
            if place is None:
                place = kept[len(view)] = (ctypes.c_char * len(view)).from_buffer(view)
            while (sample := receive()) is None:
                pass
            move(place, sample.payload_ptr, len(view))
            return len(view)

        def take(count: int) -> bytes:
            while (sample := receive()) is None:
                pass
            return ctypes.string_at(sample.payload_ptr, count)

        return Line(send, some, take)


PEERS: Final[dict[str, Peer]] = {"iceoryx2": Services()}
