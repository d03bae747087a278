# SPDX-License-Identifier: Apache-2.0
"""Peers with blocking calls: the standard library's sockets, sockets that spin, `multiprocessing`, and ours.

A peer is two functions: `serve` (the far end: listen, say where, answer one connection) and `run` (the near end:
connect there and take one sample).
"""

from __future__ import annotations

import contextlib
import socket as std
from collections.abc import Callable, Iterator
from multiprocessing import connection as mp
from pathlib import Path
from typing import Any, Final, Protocol

from ism.errors import IsmError
from ism.perf.versus.figures import Figures, Script
from ism.perf.versus.talk import Line, answer, ask, exactly

HOST: Final = "127.0.0.1"
Say = Callable[[Any], None]


class Peer(Protocol):
    """One way to move bytes between the two ends."""

    def serve(self, directory: Path, size: int, say: Say) -> None:
        """Listen, `say` the address, accept one connection and answer it until it ends."""

    def run(self, address: Any, script: Script) -> Figures:
        """Connect to what the far end has said, and take one sample."""


class Blocking:
    """Stream sockets of a module that looks like `socket`. Attributes: `unix`, `spins`."""

    def __init__(self, module: Callable[[], Any] = lambda: std, *, unix: bool = False, spins: bool = False) -> None:
        self._module, self.unix, self.spins = module, unix, spins

    def serve(self, directory: Path, size: int, say: Say) -> None:
        with self._listener(directory) as listener:
            say(listener.getsockname())
            sock, _ = listener.accept()
        with sock:
            answer(self._line(sock))

    def run(self, address: Any, script: Script) -> Figures:
        with self._module().socket(std.AF_UNIX if self.unix else std.AF_INET) as sock:
            sock.connect(address if self.unix else tuple(address))
            return ask(self._line(sock), script)

    @contextlib.contextmanager
    def _listener(self, directory: Path) -> Iterator[Any]:
        path = directory / "unix"
        listener = self._module().socket(std.AF_UNIX if self.unix else std.AF_INET)
        with listener:
            listener.bind(str(path) if self.unix else (HOST, 0))
            listener.listen(1)
            try:
                yield listener
            finally:
                path.unlink(missing_ok=True)

    def _line(self, sock: Any) -> Line:
        if not self.unix:
            sock.setsockopt(std.IPPROTO_TCP, std.TCP_NODELAY, 1)
        if self.spins:
            return _spinning(sock)
        return Line(sock.sendall, sock.recv_into, exactly(sock.recv_into))


def _spinning(sock: std.socket) -> Line:
    """Return a line over a socket that never sleeps: its calls come back at once, and are made again."""
    sock.setblocking(False)

    def some(view: memoryview, receive: Callable[[memoryview], int] = sock.recv_into) -> int:
        while True:
            try:
                return receive(view)
            except BlockingIOError:
                pass

    def send(data: Any, push: Callable[[Any], int] = sock.send) -> None:
        left = len(data)
        while left:
            try:
                left -= push(data)
            except BlockingIOError:
                continue
            if left:
                data = memoryview(data)[-left:]

    return Line(send, some, exactly(some))


class Ours(Blocking):
    """`ism.smc.blocking`. A connection that turns out to be TCP is an error."""

    def __init__(self) -> None:
        super().__init__(_smc)

    def _line(self, sock: Any) -> Line:
        line = super()._line(sock)
        looked = False

        def take(count: int) -> bytes:
            nonlocal looked
            data = line.take(count)
            if not looked:
                require_shared_memory(sock.smc_info())
                looked = True
            return data

        return Line(line.send, line.some, take)


class OursInPlace(Ours):
    """The same, with the bytes received where they are: lent, counted, and given back."""

    def _line(self, sock: Any) -> Line:
        lend = sock.recv_view

        def some(view: memoryview) -> int:
            with lend(len(view)) as lent:
                return len(lent)

        return Line(super()._line(sock).send, some, super()._line(sock).take)


def _smc() -> Any:
    from ism.smc import blocking

    return blocking


def require_shared_memory(info: Any) -> None:
    """Raise IsmError unless these bytes travel through shared memory."""
    if info.mode != "SMC":
        raise IsmError(f"this was to be measured over shared memory, but the connection is {info}")


class Pipe:
    """`multiprocessing`'s connections, as `multiprocessing.Pipe` makes them: messages with a length in front."""

    def serve(self, directory: Path, size: int, say: Say) -> None:
        with mp.Listener(str(directory / "pipe"), "AF_UNIX") as listener:
            say(listener.address)
            with listener.accept() as connection:
                answer(self._line(connection))

    def run(self, address: Any, script: Script) -> Figures:
        with mp.Client(address, "AF_UNIX") as connection:
            return ask(self._line(connection), script)

    @staticmethod
    def _line(connection: Any) -> Line:
        return Line(connection.send_bytes, connection.recv_bytes_into, lambda _: bytes(connection.recv_bytes()))


PEERS: Final[dict[str, Peer]] = {
    "tcp-blocking": Blocking(),
    "tcp-spinning": Blocking(spins=True),
    "unix-blocking": Blocking(unix=True),
    "smc-blocking": Ours(),
    "smc-view": OursInPlace(),
    "pipe": Pipe(),
}
