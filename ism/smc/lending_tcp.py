# SPDX-License-Identifier: Apache-2.0
"""Loans over plain TCP: ordinary memory, and the copies that a ring saves. Same rules as `ism.smc.lending` has.

Received bytes are looked at with MSG_PEEK and taken from the kernel when the loan ends, so what is not consumed stays
where every other call finds it, and the descriptor shows it. What is to be sent is sent when the loan ends.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from ism.smc.channel import wait_for_turn, would_block
from ism.smc.connection import os_error
from ism.smc.lending import UNBOUNDED, Loan, ReceiveLoan, SendLoan
from ism.smc.states import Outcome

_VIEW_BYTES = 1 << 16
"""Looked at by default."""
_LARGEST_BYTES = 1 << 20
"""What one loan copies at most."""
_NONBLOCKING_BYTES = 4096
"""TCP has room for so many when it says that it has some: so the end of a loan need not wait."""
PEEK = socket.MSG_PEEK
_DISCARD = socket.MSG_DONTWAIT | socket.MSG_TRUNC


def view_memory(max_bytes: int) -> bytearray:
    """Return memory to look at received bytes in."""
    return bytearray(_VIEW_BYTES if max_bytes == UNBOUNDED else min(max_bytes, _LARGEST_BYTES))


def memory(size: int) -> bytearray:
    """Return memory to write in what is to be sent."""
    return bytearray(min(size, _LARGEST_BYTES))


def discard(receive_into: Callable[..., int], buffer: bytearray, count: int) -> None:
    """Take from TCP `count` bytes that were looked at with MSG_PEEK; the buffer holds them already. Raises OSError."""
    while count and (taken := receive_into(buffer, count, _DISCARD)):
        count -= taken


class TcpLoans:
    """The loans of a plain socket, from any thread: received bytes are copied by MSG_PEEK, and taken at the end.

    Calls that go past the socket's own `recv`, `recv_into`, `send` and `sendall` know nothing of it.
    """

    __slots__ = ("_reading", "_receive_loan", "_send_loan", "_writing")

    def __init__(self) -> None:
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._receive_loan: ReceiveLoan | None = None
        self._send_loan: SendLoan | None = None

    def await_receive(self, timeout_s: float | None) -> None:
        """Wait until no bytes are lent. Raises OSError: as a receive; BufferError."""
        self._begin_receive(timeout_s)
        self._reading.release()

    def await_send(self, timeout_s: float | None) -> None:
        """Wait until no room is lent. Raises OSError: as a send; BufferError."""
        self._begin_send(timeout_s)
        self._writing.release()

    def _begin_receive(self, timeout_s: float | None) -> None:
        if not self._reading.acquire(False):
            wait_for_turn(self._reading, self._receive_loan, timeout_s)
        self._settle(self._reading, self._receive_loan)

    def _begin_send(self, timeout_s: float | None) -> None:
        if not self._writing.acquire(False):
            wait_for_turn(self._writing, self._send_loan, timeout_s)
        self._settle(self._writing, self._send_loan)

    @staticmethod
    def _settle(held: threading.Lock, loan: Loan | None) -> None:
        try:
            if loan is not None:
                loan.settle()
        except BaseException:
            held.release()
            raise

    def receive(self, sock: Any, methods: Any, max_bytes: int) -> ReceiveLoan:
        """Lend bytes of a socket, by the methods of the interpreter's own class. Raises OSError, BufferError."""
        self._begin_receive(sock.gettimeout())
        try:
            receive_into = partial(methods.recv_into, sock)
            buffer = view_memory(max_bytes)
            count = receive_into(buffer, 0, PEEK)

            def finish(taken: int) -> None:
                self._receive_loan = None
                if methods.fileno(sock) >= 0:
                    discard(receive_into, buffer, taken)

            made = self._receive_loan = ReceiveLoan(
                memoryview(buffer)[:count].toreadonly(),
                finish,
                check_open=partial(_check_descriptor, methods, sock),
                lock=self._reading,
            )
        except BaseException:
            self._reading.release()
            raise
        return made

    def send(self, sock: Any, methods: Any, size: int) -> SendLoan:
        """Lend memory whose bytes the end of the loan sends, as `sendall` does. Raises OSError, BufferError."""
        timeout_s = sock.gettimeout()
        self._begin_send(timeout_s)
        try:
            _check_descriptor(methods, sock)
            if timeout_s == 0.0:
                if not _has_room(methods.fileno(sock)):
                    raise would_block()
                size = min(size, _NONBLOCKING_BYTES)
            buffer = memory(size)

            def finish(count: int) -> None:
                self._send_loan = None
                if count:
                    methods.sendall(sock, memoryview(buffer)[:count])

            made = self._send_loan = SendLoan(
                memoryview(buffer), finish, check_open=partial(_check_descriptor, methods, sock), lock=self._writing
            )
        except BaseException:
            self._writing.release()
            raise
        return made


def _check_descriptor(methods: Any, sock: Any) -> None:
    if methods.fileno(sock) < 0:
        raise os_error(Outcome.EBADF)


def _has_room(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))
