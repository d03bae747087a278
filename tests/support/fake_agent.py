# SPDX-License-Identifier: Apache-2.0
"""A virtual machine as the manager sees it: a map agent, and a driver behind QEMU's vfio-user client.

`FakeAgent` is the agent's side of the channel, written by hand from the packet's table and not with this project's
`MapChannelClient`, so that it can also lie. `Vm` is the driver that runs in the guest: it reaches registers by message,
and regions where the agent has put them.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ism.driver.device import Device
from ism.driver.vfio_user import VfioUserTransport
from ism.driver.window import ChunkWindow
from ism.manager.config import AGENT_SUFFIX
from ism.vfio_user.client import Client
from ism.vfio_user.fds import Fd, close_all
from ism.vfio_user.map_channel_wire import PACKET_SIZE, REPLY, Packet, PacketType

LIMIT_S = 30.0
"""For everything that waits: never reached unless something is broken."""

INTRODUCTION = Packet(type=PacketType.INTRODUCE).pack()


@dataclass(frozen=True)
class Told:
    """One request as it came; of its descriptor: inode number and access mode (O_RDONLY, ...), None without one."""

    packet: Packet
    inode: int | None = None
    mode: int | None = None

    @property
    def type(self) -> int:
        return self.packet.type

    def answer(self, status: int = 0) -> bytes:
        return Packet(type=self.packet.type | REPLY, sequence=self.packet.sequence, status=status).pack()


Answer = Callable[[Told], int | bytes | None]
"""Returns a status, or the bytes to send in place of an answer, or None for silence. Called in the agent's thread."""


class FakeAgent:
    """One map agent, in a thread of its own, that does as it is told unless `answer` says otherwise.

    Attributes: `told` (every request so far), `window` (what is mapped), `answer`, `ended` (the manager hung up).
    """

    def __init__(
        self,
        path: Path,
        *,
        introduction: bytes = INTRODUCTION,
        fds: Sequence[Fd] = (),
        channel: socket.socket | None = None,
    ) -> None:
        """Connect beside the device socket `path` and introduce itself, by whatever bytes and descriptors.

        Args: `channel`: answer on this one, that of a process, instead.
        """
        self.told: list[Told] = []
        self.window = ChunkWindow()
        self.answer: Answer = lambda told: 0
        self.ended = threading.Event()
        self._held: threading.Event | None = None
        self._asked = threading.Event()
        self._sock = channel or socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if channel is None:
            self._sock.connect(f"{path}{AGENT_SUFFIX}")
            if introduction:
                self.send(introduction, fds)
        self._thread = threading.Thread(target=self._run, name="map agent", daemon=True)
        self._thread.start()

    def send(self, data: bytes, fds: Sequence[Fd] = ()) -> None:
        socket.send_fds(self._sock, [data], [fd.fileno() for fd in fds])

    def of_type(self, *types: PacketType) -> list[Told]:
        return [told for told in self.told if told.type in types]

    def hold(self, type: PacketType) -> None:
        """Keep the next request of this type, and all behind it, unanswered until `let_go`."""
        held = self._held = threading.Event()
        self._asked.clear()

        def answer(told: Told) -> int:
            if told.type == type:
                self._asked.set()
                assert held.wait(LIMIT_S)
            return 0

        self.answer = answer

    def wait_asked(self) -> None:
        """Wait until a request is held."""
        assert self._asked.wait(LIMIT_S)

    def let_go(self) -> None:
        """Answer what is held, and everything after it."""
        held, self._held = self._held, None
        if held is not None:
            self.answer = lambda told: 0
            held.set()

    def close(self) -> None:
        """Hang up, as when QEMU is killed."""
        self.let_go()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the manager was faster
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        self._sock.close()
        self.window.clear()

    def _run(self) -> None:
        while True:
            try:
                data, numbers, _, _ = socket.recv_fds(self._sock, PACKET_SIZE + 1, 2)
            except OSError:
                data, numbers = b"", []
            fds = [Fd(number) for number in numbers]
            if not data:
                self.ended.set()
                return
            try:
                told = self._take(Packet.unpack(data), fds)
                status = self.answer(told)
                if status == 0:
                    self._do(told.packet, fds)
            finally:
                close_all(fds)
            try:
                if isinstance(status, int):
                    self.send(told.answer(status))
                elif status is not None:
                    self.send(status)
            except OSError:
                pass  # the manager has hung up, which the next receive tells

    def _take(self, packet: Packet, fds: list[Fd]) -> Told:
        told = Told(packet)
        if fds:
            number = fds[0].fileno()
            told = Told(packet, os.fstat(number).st_ino, fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE)
        self.told.append(told)
        return told

    def _do(self, packet: Packet, fds: list[Fd]) -> None:
        if packet.type == PacketType.MAP:
            rights = packet.rights
            self.window.map(
                packet.offset,
                packet.length,
                fds[0].fileno(),
                packet.file_offset,
                read=bool(rights & 1),
                write=bool(rights & 2),
            )
        elif packet.type == PacketType.UNMAP:
            self.window.unmap(packet.offset, packet.length)


class GuestTransport(VfioUserTransport):
    """Registers through a vfio-user client that asks for no map channel, as QEMU's; regions from its map agent."""

    def __init__(self, client: Client, name: str, window: ChunkWindow) -> None:
        super().__init__(client, name)
        self._window = window


class Vm(Device):
    """The driver in a guest whose QEMU has a map agent. Attributes: `agent`, `client`."""

    def __init__(self, path: Path) -> None:
        self.agent = FakeAgent(path)
        try:
            self.client = Client.connect(path)
            super().__init__(GuestTransport(self.client, f"guest:{path}", self.agent.window))
        except BaseException:
            self.agent.close()
            raise

    def close(self) -> None:
        super().close()
        self.agent.close()
