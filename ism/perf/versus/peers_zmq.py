# SPDX-License-Identifier: Apache-2.0
"""Peers of ZeroMQ: a pair of sockets, over ipc and over TCP. Large messages are sent from where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ism.perf.versus.figures import Figures, Script
from ism.perf.versus.peers_sockets import HOST, Peer, Say
from ism.perf.versus.talk import Line, answer, ask

_HELD_BYTES: Final = 1 << 26
_HELD_MESSAGES: Final = (16, 1000)
_IN_PLACE: Final = 1 << 16


class Pair:
    """One pair. Attributes: `ipc`."""

    def __init__(self, *, ipc: bool) -> None:
        self.ipc = ipc

    def serve(self, directory: Path, size: int, say: Say) -> None:
        with _context() as context, self._socket(context, size) as sock:
            sock.bind(f"ipc://{directory / 'zmq'}" if self.ipc else f"tcp://{HOST}:*")
            say(sock.LAST_ENDPOINT.decode())
            answer(_line(sock, size))

    def run(self, address: Any, script: Script) -> Figures:
        with _context() as context, self._socket(context, script.size) as sock:
            sock.connect(address)
            return ask(_line(sock, script.size), script)

    @staticmethod
    def _socket(context: Any, size: int) -> Any:
        import zmq

        sock = context.socket(zmq.PAIR)
        sock.set_hwm(max(_HELD_MESSAGES[0], min(_HELD_MESSAGES[1], _HELD_BYTES // size)))
        sock.linger = 1000
        return sock


def _context() -> Any:
    import zmq

    return zmq.Context()


def _line(sock: Any, size: int) -> Line:
    send, receive = sock.send, sock.recv
    if size >= _IN_PLACE:
        return Line(lambda data: send(data, copy=False), lambda _: len(receive(copy=False)), lambda _: receive())
    return Line(send, lambda _: len(receive()), lambda _: receive())


PEERS: Final[dict[str, Peer]] = {"zmq-ipc": Pair(ipc=True), "zmq-tcp": Pair(ipc=False)}
