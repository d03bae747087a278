# SPDX-License-Identifier: Apache-2.0
"""Both sides of the map agent: a process that does what QEMU does, with the agent in it, and the manager's sockets.

`FakeQemu` is this file run as a program: it maps its BAR as QEMU's vfio-user client does and lets tests look at its
memory and descriptors, one JSON packet per order. For a run of the same tests under other conditions:
ISM_AGENT_SANITIZE=1 builds the agent with the address and undefined behaviour sanitizers; ISM_AGENT_WRAPPER="valgrind
-q --error-exitcode=99" runs the process under another program.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import resource
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ism.vfio_user.fds import Fd, send_message
from ism.vfio_user.map_channel_wire import REPLY, Packet, PacketType

PAGE = mmap.PAGESIZE
WINDOW = 64 * PAGE
LIMIT_S = 60.0
"""For everything that waits: never reached unless something is broken."""

SANITIZE = bool(os.environ.get("ISM_AGENT_SANITIZE"))
WRAPPER = shlex.split(os.environ.get("ISM_AGENT_WRAPPER", ""))


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def sealed(size: int, content: bytes = b"", *, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) -> Fd:
    """A memory file that begins with `content`, as the manager makes its regions."""
    fd = Fd(os.memfd_create("region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), size)
    os.pwrite(fd.fileno(), content, 0)
    if seals:
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
    return fd


def inode(fd: Fd) -> int:
    """What HELLO carries."""
    return os.fstat(fd.fileno()).st_ino


class Channel:
    """The manager's end of a map channel."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sequence = 0
        sock.settimeout(LIMIT_S)

    def send(self, data: bytes, fds: Sequence[Fd] = ()) -> None:
        send_message(self.sock, data, fds, timeout_s=LIMIT_S)

    def packet(self, type: int, **fields: int) -> Packet:
        self.sequence += 1
        return Packet(type=type, sequence=self.sequence, **fields)

    def ask(self, type: int, fds: Sequence[Fd] = (), /, **fields: int) -> int:
        """One request; the status of its answer."""
        packet = self.packet(type, **fields)
        self.send(packet.pack(), fds)
        answer = Packet.unpack(self.sock.recv(100))
        assert answer == Packet(type=type | REPLY, sequence=packet.sequence, status=answer.status)
        return answer.status

    def hello(self, placeholder: Fd, length: int = WINDOW) -> int:
        return self.ask(PacketType.HELLO, offset=PAGE, length=length, file_offset=inode(placeholder))

    def map(self, offset: int, region: Fd, *, length: int = PAGE, file_offset: int = 0, rights: int = 3) -> int:
        fields = {"offset": offset, "length": length, "file_offset": file_offset, "rights": rights}
        return self.ask(PacketType.MAP, [region], **fields)

    def unmap(self, offset: int, length: int = PAGE) -> int:
        return self.ask(PacketType.UNMAP, offset=offset, length=length)

    def ended(self) -> bool:
        """Wait for the agent to have closed its end; answers under way are passed over."""
        try:
            while self.sock.recv(100):
                pass
        except ConnectionResetError:
            pass
        return True

    def end(self) -> None:
        """Leave, as a manager that dies, and wait for the agent to notice."""
        self.sock.shutdown(socket.SHUT_WR)
        assert self.ended()
        self.sock.close()


class Sockets:
    """Where a manager listens: `path` for vfio-user, and beside it the map socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.device = socket.socket(socket.AF_UNIX)
        self.device.bind(str(path))
        self.device.listen()
        self.map = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.map.bind(f"{path}.map")
        self.map.listen()
        self.accepted: list[socket.socket] = []
        for sock in (self.device, self.map):
            sock.settimeout(LIMIT_S)

    def accept(self) -> socket.socket:
        """The next vfio-user connection."""
        sock, _ = self.device.accept()
        self.accepted.append(sock)
        return sock

    def introduced(self) -> Channel | None:
        """The next channel that is there now, its introduction not read; None when there is none."""
        self.map.settimeout(0)
        try:
            sock, _ = self.map.accept()
        except BlockingIOError:
            return None
        finally:
            self.map.settimeout(LIMIT_S)
        self.accepted.append(sock)
        return Channel(sock)

    def close(self) -> None:
        for sock in (self.device, self.map, *self.accepted):
            sock.close()


def peer_pid(sock: socket.socket) -> int:
    """The process that connected."""
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


class Device:
    """One vfio-user connection of a fake QEMU with its channel and, when placed, its window."""

    def __init__(self, sockets: Sockets, qemu: Qemu) -> None:
        self.qemu = qemu
        assert qemu.call("connect", str(sockets.path)) == 0
        self.connection = sockets.accept()
        channel = sockets.introduced()
        assert channel is not None
        assert channel.sock.recv(100) == Packet(type=PacketType.INTRODUCE).pack()
        self.channel = channel

    def announce(self, placeholder: Fd, length: int = WINDOW) -> None:
        """HELLO, and the BAR's descriptor, as with the answer to GET_REGION_INFO."""
        assert self.channel.hello(placeholder, length) == 0
        self.give_bar(placeholder)

    def give_bar(self, placeholder: Fd) -> None:
        socket.send_fds(self.connection, [b"x"], [placeholder.fileno()])
        self.qemu.call("take_bar")

    def place(self, placeholder: Fd, length: int = WINDOW) -> None:
        """All of it, up to a window of zero pages."""
        self.announce(placeholder, length)
        assert self.qemu.call("map_bar", length) == 0


class Qemu:
    """A `FakeQemu` process."""

    def __init__(self, library: Path) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(LIMIT_S)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        preload = f"{library}"
        if SANITIZE:
            found = subprocess.check_output([compiler() or "cc", "-print-file-name=libasan.so"], text=True).strip()
            preload = f"{os.path.realpath(found)} {library}"
        self.process = subprocess.Popen(
            [*WRAPPER, sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=self._errors,
            env={**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"},
        )
        theirs.close()

    def call(self, order: str, *arguments: Any) -> Any:
        """Have something done there."""
        self._control.send(json.dumps([order, *arguments]).encode())
        answer = self._control.recv(1 << 16)
        assert answer, f"the process ended in {order}: {self.process.wait(LIMIT_S)}\n{self.errors()}"
        return json.loads(answer)

    def read(self, offset: int, size: int = 4) -> bytes:
        """Bytes of the window as the guest sees them."""
        return bytes.fromhex(self.call("read", offset, size))

    def write(self, offset: int, data: bytes) -> None:
        """Write into the window as the guest does."""
        self.call("write", offset, data.hex())

    def errors(self) -> str:
        """What it has written to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode()

    def close(self) -> None:
        """End it; it must have been alive and well."""
        self._control.close()
        try:
            assert self.process.wait(LIMIT_S) in (0, -9), self.errors()
        finally:
            self.process.kill()
            self.process.wait()
            self._errors.close()


class FakeQemu:
    """The program: each method is an order of `Qemu.call`."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        for name in ("mmap", "mmap64"):
            function = getattr(self.libc, name)
            function.restype = ctypes.c_void_p
            function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.libc.connect.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
        self.sockets: list[socket.socket] = []
        self.bar = -1
        self.base = 0
        self.stop = threading.Event()
        self.reader: threading.Thread | None = None
        self.seen: set[bytes] = set()

    def connect(self, path: str, kind: int = socket.SOCK_STREAM) -> int:
        """As any program. Returns: 0 or an errno."""
        sock = socket.socket(socket.AF_UNIX, kind)
        self.sockets.append(sock)
        return sock.connect_ex(path.replace("@", "\0", 1) if path.startswith("@") else path)

    def connect_raw(self, path: str, size: int) -> list[int]:
        """With an address of exactly `size` bytes, errno being 77 before. Returns: the result and errno."""
        sock = socket.socket(socket.AF_UNIX)
        self.sockets.append(sock)
        address = struct.pack("H", socket.AF_UNIX) + path.encode()
        ctypes.set_errno(77)
        result = self.libc.connect(sock.fileno(), address.ljust(size, b"\0"), size)
        return [result, ctypes.get_errno()]

    def take_bar(self) -> None:
        if self.bar >= 0:
            os.close(self.bar)
        _, (self.bar,), _, _ = socket.recv_fds(self.sockets[-1], 1, 1)

    def _map(self, function: str, at: int, length: int, prot: int, flags: int, fd: int, offset: int = 0) -> int:
        result = getattr(self.libc, function)(at or None, length, prot, flags, fd, offset)
        if result == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
        return int(result)

    def map_bar(
        self, length: int, offset: int = 0, flags: int = mmap.MAP_SHARED, function: str = "mmap64", keep: bool = True
    ) -> int:
        """As hw/vfio/region.c: reserve too much, give back what is not aligned, map over the rest."""
        nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = self._map(function, 0, 2 * length, 0, nothing, -1)
        at = -(-start // length) * length
        self.libc.munmap(start, at - start)
        self.libc.munmap(at + length, start + length - at)
        try:
            mapped = self._map(function, at, length, 3, flags | 0x10, self.bar, offset)
        except OSError as error:
            return error.errno or -1
        assert mapped == at
        if keep:
            self.base = at
        return 0

    def read(self, offset: int, size: int) -> str:
        return ctypes.string_at(self.base + offset, size).hex()

    def write(self, offset: int, data: str) -> None:
        ctypes.memmove(self.base + offset, bytes.fromhex(data), len(data) // 2)

    def unmap(self, offset: int, length: int) -> int:
        return int(self.libc.munmap(self.base + offset, length))

    def map_over(self, offset: int, length: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
        self._map("mmap64", self.base + offset, length, 3, flags, -1)

    def map_elsewhere(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        at = self._map("mmap64", 0, PAGE, 3, flags, -1)
        self._map("mmap64", at, PAGE, 3, flags | 0x10, -1)
        self.libc.munmap(at, PAGE)

    def fds(self) -> list[str]:
        """What every open descriptor is."""
        links = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the one of listdir itself
                links.append(os.readlink(f"/proc/self/fd/{name}"))
        return sorted(links)

    def threads(self) -> list[str]:
        return sorted(
            Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")
        )

    def allow_files(self, allowed: bool) -> None:
        """Let this process open descriptors, or none more."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if allowed:
            soft = hard
        else:
            soft = os.dup(0)  # the lowest number that is free
            os.close(soft)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def fork(self) -> list[str]:
        """Fork a child that lives as long as the last connection. Returns: its descriptors."""
        told, tell = os.pipe()
        if os.fork() == 0:
            os.write(tell, json.dumps(self.fds()).encode() + b"\n")
            self.sockets[-1].recv(1)
            os._exit(0)
        os.close(tell)
        with os.fdopen(told, "rb") as pipe:
            return list(json.loads(pipe.readline()))

    def start_reading(self, offset: int) -> None:
        """Read one byte of the window over and over."""

        def run() -> None:
            while not self.stop.is_set():
                self.seen.add(ctypes.string_at(self.base + offset, 1))

        self.reader = threading.Thread(target=run)
        self.reader.start()

    def stop_reading(self) -> str:
        """Returns: all values seen."""
        assert self.reader is not None
        self.stop.set()
        self.reader.join()
        return b"".join(sorted(self.seen)).hex()


@contextlib.contextmanager
def built_agent(directory: Path) -> Iterator[Path]:
    """The library under test."""
    from ism.vmm.agent import FLAGS, LIBRARIES, SOURCE, agent_library

    if not SANITIZE:
        yield agent_library(directory)
        return
    result = directory / "agent.so"
    sanitizers = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = [flag for flag in FLAGS if flag != "-Wl,-z,defs"]
    command = [compiler() or "cc", *flags, *sanitizers, str(SOURCE), "-o", str(result), *LIBRARIES]
    subprocess.run(command, check=True, timeout=LIMIT_S)
    yield result


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    fake = FakeQemu()
    while data := control.recv(1 << 16):
        order, *arguments = json.loads(data)
        control.send(json.dumps(getattr(fake, order)(*arguments)).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
