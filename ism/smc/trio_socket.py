# SPDX-License-Identifier: Apache-2.0
"""A socket shaped as trio's, whose bytes travel through shared memory where they can: `SmcSocket`.

An `SmcSocket` is a `trio.socket.SocketType` for TCP over IPv4 and IPv6. Connected to a peer that uses shared memory too
it moves its bytes there, else it hands every call to a trio socket of its own; either way calls mean what they mean to
trio, and raise what trio raises: OSError with the true errno, BusyResourceError for a second task that would wait in
the same direction, ClosedResourceError for one that waits while another closes. Each async call is a checkpoint.

Flags are those of a non-blocking socket, which trio's are: MSG_WAITALL and MSG_DONTWAIT change nothing. Urgent data
(MSG_OOB) travels over TCP, which stays open underneath; so does what options and names are about.

Long, because a trio socket has so many methods; what decides and waits is in `trio_channel`.

No module here is called `socket`, because that is the function `ism.smc.socket`, in `trio_factory`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket as _std
from collections.abc import Callable, Iterable, Iterator
from operator import index
from types import TracebackType
from typing import Any, Self, TypeVar

import trio

from ism.driver import Device
from ism.errors import ConfigError
from ism.smc.connection import Connection
from ism.smc.info import Info
from ism.smc.policy import Mode, Policy, buffer_for_option, from_environment
from ism.smc.relay import Relay, relay_of
from ism.smc.rendezvous import IN_LINE, OFF, Fallback
from ism.smc.trio_channel import DUPLICATED, ELSEWHERE, BrokenLinkError, TrioChannel, closed_error
from ism.smc.trio_listening import Listening, all_begun

T = TypeVar("T")
_ExceptionClass = type[BaseException]
_TCP_PROTOCOLS = (0, _std.IPPROTO_TCP)
_FAMILIES = (_std.AF_INET, _std.AF_INET6)
_SEND_FLAGS = _std.MSG_DONTWAIT | _std.MSG_NOSIGNAL | _std.MSG_MORE | _std.MSG_OOB
_RECV_FLAGS = (
    _std.MSG_DONTWAIT | _std.MSG_PEEK | _std.MSG_WAITALL | _std.MSG_NOSIGNAL | _std.MSG_OOB | _std.MSG_CMSG_CLOEXEC
)
_BACKLOG = min(_std.SOMAXCONN, 128)
_LARGEST_PIECE = 1 << 20
"""What one call sends at most: `sendmsg` puts it together, and with a peer that keeps up more would take too long."""


class SmcSocket(trio.socket.SocketType):
    """A TCP socket as trio's, whose bytes travel through shared memory where both ends can.

    Made by the functions of `trio_factory` and by `accept`. Attributes: `channel` (what it stands on).
    """

    def __init__(
        self,
        sock: trio.socket.SocketType,
        *,
        smc: Mode | None = None,
        device: Device | None = None,
        buffer_size: int | None = None,
    ) -> None:
        """Wrap a trio TCP socket, and take it over.

        Args:
            sock: new, listening (then it is published now) or connected (then it stays plain TCP).
            smc: "auto", "require" or "off"; None: what the environment says.
            device: the process's by default.
            buffer_size: bytes of the region this side receives in.
        Raises: TypeError, ValueError; OSError (EINVAL: the environment says nothing sensible).
        """
        super().__init__()
        if isinstance(sock, SmcSocket) or not isinstance(sock, trio.socket.SocketType):
            raise TypeError(f"expected a trio socket, not {type(sock).__name__}")
        if not is_for_smc(sock):
            raise ValueError("expected a TCP socket")
        self._set_up(TrioChannel(sock, policy_for(smc, buffer_size), device))
        if sock.getsockopt(_std.SOL_SOCKET, _std.SO_ACCEPTCONN):
            self._publish()
        elif _is_connected(sock):
            self.channel.not_shared(ELSEWHERE, sock.getpeername())
            self.channel.plain = True

    def _set_up(self, channel: TrioChannel) -> None:
        self.channel = channel
        self._tcp = channel.tcp
        self._listening: Listening | None = None

    @classmethod
    def _over(cls, channel: TrioChannel) -> SmcSocket:
        made = cls.__new__(cls)
        trio.socket.SocketType.__init__(made)
        made._set_up(channel)
        return made

    def smc_info(self) -> Info:
        """Tell how the bytes of this socket travel, and why."""
        return self.channel.smc_info()

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def family(self) -> _std.AddressFamily:
        """Address family."""
        return self._tcp.family

    @property
    def type(self) -> _std.SocketKind:
        """SOCK_STREAM."""
        return self._tcp.type

    @property
    def proto(self) -> int:
        """Protocol number it was made with."""
        return self._tcp.proto

    @property
    def did_shutdown_SHUT_WR(self) -> bool:
        """Whether its sending side was shut down."""
        return self.channel.write_ended or self._tcp.did_shutdown_SHUT_WR

    def __repr__(self) -> str:
        return repr(self._tcp).replace("trio.socket.socket", "ism.smc.socket")

    def fileno(self) -> int:
        """Descriptor of TCP, -1 once closed: for options and names. In shared memory it says nothing of the bytes."""
        return self._tcp.fileno()

    def getsockname(self) -> Any:
        """As `socket.getsockname`."""
        name = self._tcp.getsockname()
        relay = self._relay
        return name if relay is None else relay.local

    @property
    def _relay(self) -> Relay | None:
        if self.channel.link is not None:
            return None
        return self.channel.relay or relay_of(self._tcp.fileno())

    def getpeername(self) -> Any:
        """As `socket.getpeername`."""
        connection = self.channel.connection
        if connection is None or self.channel.closed or self.channel.peername is None:
            name = self._tcp.getpeername()
            relay = self._relay
            return name if relay is None else relay.remote
        if connection.disconnected:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return self.channel.peername  # TCP itself may have been reset by the peer's orderly close

    def getsockopt(self, level: int, optname: int, buflen: int | None = None) -> Any:
        """As `socket.getsockopt`, of TCP."""
        if buflen is not None:
            return self._tcp.getsockopt(level, optname, buflen)
        if level == _std.SOL_SOCKET and optname == _std.SO_ERROR and self.channel.connection is not None:
            return 0
        return self._tcp.getsockopt(level, optname)

    def setsockopt(self, level: int, optname: int, value: Any, optlen: int | None = None) -> None:
        """As `socket.setsockopt`, of TCP. SO_RCVBUF also sizes the shared buffer, when set early enough.

        SO_OOBINLINE makes a connection plain TCP; one over shared memory gets a relay. Raises: OSError; as `dup`.
        """
        in_socket = level == _std.SOL_SOCKET
        if in_socket and optname == _std.SO_OOBINLINE and value:
            self.channel.become_plain(IN_LINE)
        if in_socket and optname == _std.SO_RCVLOWAT and self.channel.link is not None and not self.channel.drained:
            return
        if optlen is None:
            self._tcp.setsockopt(level, optname, value)
        else:
            self._tcp.setsockopt(level, optname, value, optlen)
        if in_socket and optname == _std.SO_LINGER:
            self.channel.set_linger()
        elif in_socket and optname == _std.SO_RCVBUF and isinstance(value, int) and value > 0:
            self.channel.policy = self.channel.policy.with_buffer(buffer_for_option(value))

    def get_inheritable(self) -> bool:
        """As `socket.get_inheritable`."""
        return self._tcp.get_inheritable()

    def set_inheritable(self, inheritable: bool) -> None:
        """As `socket.set_inheritable`."""
        self._tcp.set_inheritable(inheritable)

    # -- listening ----------------------------------------------------------------------------------------------

    async def bind(self, address: Any) -> None:
        """As `socket.bind`."""
        await self._tcp.bind(address)

    def listen(self, backlog: int = _BACKLOG) -> None:
        """As `socket.listen`. The address is published to clients in the background; `accept` sees to the rest."""
        self._tcp.listen(backlog)
        self._publish()

    def _publish(self) -> None:
        channel = self.channel
        if self._listening is None and not channel.plain:
            self._listening = Listening(self._tcp, channel.policy, channel.device)
            self._listening.begin()

    async def published(self) -> Fallback | None:
        """Wait until a listening socket's address is published; returns why it is not, if it is not."""
        if self._listening is None:
            return self.channel.fallback or OFF
        await self._listening.begun()
        return self._listening.failure

    async def accept(self) -> tuple[SmcSocket, Any]:
        """As `socket.accept`; never waits for the client to take part in anything."""
        listening, channel = self._listening, self.channel
        if listening is not None:
            await listening.begun()
        tcp, peer = await self._tcp.accept()
        made = TrioChannel(tcp, channel.policy, channel.device)
        if channel.plain or listening is None:
            made.not_shared(channel.fallback or OFF, peer)
        else:
            listening.accepted(made, peer)
        return self._over(made), peer

    # -- connecting ---------------------------------------------------------------------------------------------

    async def connect(self, address: Any) -> None:
        """As `socket.connect`; it waits for no more than TCP, and a moment for the device manager.

        Raises: OSError; ECONNABORTED when shared memory is required and there is no device.
        """
        channel = self.channel
        if channel.link is not None or self._listening is not None or _is_connected(self._tcp):
            await self._tcp.connect(address)  # raises
            return
        try:
            numeric = await self._numeric(address)
            if numeric is not None:
                if channel.policy.mode != "off":
                    await all_begun()
                await channel.prepare(numeric)
            await self._tcp.connect(address if numeric is None else numeric)
        except trio.Cancelled:
            channel.close()
            raise
        except BaseException:
            channel.drop_link()
            raise
        channel.connected()

    async def _numeric(self, address: Any) -> Any:
        """Resolve an address as connecting to it would; None for one that connecting refuses."""
        if not isinstance(address, tuple) or not 2 <= len(address) <= (2 if self.family == _std.AF_INET else 4):
            return None
        host, port, *rest = address
        if isinstance(port, int) and isinstance(host, str):
            with contextlib.suppress(OSError, ValueError):
                _std.inet_pton(self.family, host.partition("%")[0])
                return address
        flags = 0
        if self.family == _std.AF_INET6 and not self._tcp.getsockopt(_std.IPPROTO_IPV6, _std.IPV6_V6ONLY):
            flags = _std.AI_V4MAPPED
        found = await trio.socket.getaddrinfo(host or None, port, self.family, self.type, self.proto, flags)
        resolved = found[0][4]
        return (*resolved[:2], *rest, *resolved[2 + len(rest) :])

    # -- sending ------------------------------------------------------------------------------------------------

    async def send(self, data: Any, flags: int = 0, /) -> int:
        """As `socket.send`."""
        connection = self.channel.connection
        if connection is None:
            connection = await self._to_send()
            if connection is None:
                return await self._tcp.send(data, flags)
        if flags:
            _check_flags(flags, _SEND_FLAGS)
            if flags & _std.MSG_OOB:
                return await self._send_urgent(connection, data)
        return await self._send(connection, data)

    async def _send(self, connection: Connection, data: Any) -> int:
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            size = len(data) if type(data) is bytes else memoryview(data).nbytes
            if size > _LARGEST_PIECE:
                data = memoryview(data).cast("B")[:_LARGEST_PIECE]
            while True:
                if connection.room_lent:
                    raise trio.BusyResourceError("another task has memory of this connection lent")
                if (sent := connection.send(data)) or not size:
                    break
                await self.channel.wait_writable(connection)
        finally:
            await self.channel.send_turns.over()
        return sent

    async def _send_urgent(self, connection: Connection, data: Any) -> int:
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view) - 1:
            at += await self._send(connection, view[at:-1])
        return at + await self._tcp.send(view[at:], _std.MSG_OOB)

    async def sendto(self, *args: Any) -> int:
        """As `socket.sendto`: TCP ignores the address."""
        connection = await self._to_send()
        if connection is None or not 2 <= len(args) <= 3:
            return await self._tcp.sendto(*args)
        if not isinstance(args[-1], tuple):
            raise ValueError("address should be a (host, port) tuple")
        return await self.send(args[0], args[1] if len(args) == 3 else 0)

    async def sendmsg(
        self, buffers: Iterable[Any], ancdata: Iterable[Any] = (), flags: int = 0, address: Any = None, /
    ) -> int:
        """As `socket.sendmsg`. Raises OSError: EINVAL for ancillary data, which has no meaning here."""
        connection = await self._to_send()
        if connection is None:
            return await self._tcp.sendmsg(buffers, ancdata, flags, address)
        if list(ancdata):
            await trio.lowlevel.checkpoint()
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return await self.send(_joined(buffers), flags)

    async def _to_send(self) -> Connection | None:
        """Wait until it is known how bytes are sent; None for TCP, whose own call is the checkpoint."""
        channel = self.channel
        if channel.is_tcp:
            return None
        if channel.connection is None and channel.undecided:
            await trio.lowlevel.checkpoint_if_cancelled()
            if channel.write_ended:
                await _fail(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))
        return await _as_os_error(channel.to_send) if not channel.closed else None

    # -- receiving ----------------------------------------------------------------------------------------------

    async def recv(self, buflen: int, flags: int = 0, /) -> bytes:
        """As `socket.recv`."""
        connection = self.channel.connection
        if connection is None:
            connection = await self._to_receive()
            if connection is None:
                return b"" if self._deaf else await self._tcp.recv(buflen, flags)
        buflen = index(buflen)
        if buflen < 0:
            raise ValueError("negative buffersize in recv")
        if flags:
            _check_flags(flags, _RECV_FLAGS)
            if flags & _std.MSG_OOB:
                return await self._tcp.recv(buflen, flags)
        if not buflen:
            await trio.lowlevel.checkpoint()
            return b""
        if flags & _std.MSG_PEEK:
            return await self._receive(connection, lambda wait: connection.peek(buflen))
        return await self._receive(connection, lambda wait: connection.recv(buflen, wait))

    async def _receive(self, connection: Connection, attempt: Callable[[bool], T | None]) -> T:
        await self.channel.begin_receiving()
        while True:
            if connection.unread_lent:
                raise trio.BusyResourceError("another task has memory of this connection lent")
            if (result := attempt(self.channel.receive_turns.alone)) is not None:
                return result
            await self.channel.wait_readable(connection)

    async def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As `socket.recv_into`: one copy, from shared memory into the buffer."""
        connection = self.channel.connection
        if connection is None:
            connection = await self._to_receive()
            if connection is None:
                return 0 if self._deaf else await self._tcp.recv_into(buffer, nbytes, flags)
        view = _writable(buffer, nbytes)
        if flags & ~(_std.MSG_DONTWAIT | _std.MSG_WAITALL | _std.MSG_NOSIGNAL):
            data = await self.recv(len(view), flags)
            view[: len(data)] = data
            return len(data)
        if not len(view):
            await trio.lowlevel.checkpoint()
            return 0
        return await self._receive(connection, lambda wait: connection.recv_into(view, wait))

    async def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        """As `socket.recvfrom`: TCP gives no address."""
        if await self._to_receive() is None and not self._deaf:
            return await self._tcp.recvfrom(bufsize, flags)
        if bufsize < 0:
            raise ValueError("negative buffersize in recvfrom")
        return await self.recv(bufsize, flags), None

    async def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        """As `socket.recvfrom_into`: TCP gives no address."""
        if await self._to_receive() is None and not self._deaf:
            return await self._tcp.recvfrom_into(buffer, nbytes, flags)
        return await self.recv_into(buffer, nbytes, flags), None

    async def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> tuple[bytes, list[Any], int, Any]:
        """As `socket.recvmsg`: TCP gives no ancillary data."""
        if await self._to_receive() is None and not self._deaf:
            return await self._tcp.recvmsg(bufsize, ancbufsize, flags)
        if bufsize < 0:
            raise ValueError("negative buffer size in recvmsg()")
        if ancbufsize < 0:
            raise ValueError("invalid ancillary data buffer length")
        data = await self.recv(bufsize, flags)
        return data, [], _told_flags(flags), None

    async def recvmsg_into(
        self, buffers: Iterable[Any], ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[int, list[Any], int, Any]:
        """As `socket.recvmsg_into`."""
        if await self._to_receive() is None and not self._deaf:
            return await self._tcp.recvmsg_into(buffers, ancbufsize, flags)
        if ancbufsize < 0:
            raise ValueError("invalid ancillary data buffer length")
        views = [_writable(buffer, 0) for buffer in buffers]
        data = await self.recv(sum(map(len, views)), flags)
        rest = memoryview(data)
        for view in views:
            part, rest = rest[: len(view)], rest[len(view) :]
            view[: len(part)] = part
        return len(data), [], _told_flags(flags), None

    async def _to_receive(self) -> Connection | None:
        """Wait until it is known how bytes are received; None for TCP, and when nothing is to be received any more."""
        channel = self.channel
        if channel.is_tcp:
            return None
        if channel.connection is None and channel.undecided:
            if channel.read_ended:
                await trio.lowlevel.checkpoint()
                return None
            await trio.lowlevel.checkpoint_if_cancelled()
        return await _as_os_error(channel.to_receive) if not channel.closed else None

    @property
    def _deaf(self) -> bool:
        """Whether receiving was shut down before it was known how bytes travel."""
        return self.channel.read_ended and self.channel.undecided

    # -- readiness ----------------------------------------------------------------------------------------------

    def is_readable(self) -> bool:
        """Whether a receive would not wait."""
        channel = self.channel
        link = channel.link
        if link is not None and not channel.closed:
            if not link.may_receive:
                link.start(sending=False)
                link.pump()
            with contextlib.suppress(BrokenLinkError):
                connection = channel.settled_connection()
                if connection is not None:
                    return connection.readable()
                if not link.may_receive:
                    return False
        poll = select.poll()
        poll.register(self._tcp.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def wait_writable(self) -> None:
        """Wait until a send would not wait."""
        connection = self.channel.connection or await self._to_send()
        if connection is None:
            await self._tcp.wait_writable()
            return
        await trio.lowlevel.checkpoint_if_cancelled()
        with _woken_by_errors():
            while not connection.writable():
                await self.channel.wait_writable(connection)
        await self.channel.send_turns.over()

    # -- the end ------------------------------------------------------------------------------------------------

    def shutdown(self, flag: int) -> None:
        """As `socket.shutdown`. Nothing is waited for: what is not decided yet is shut down when it is."""
        if self.channel.closed or flag not in (_std.SHUT_RD, _std.SHUT_WR, _std.SHUT_RDWR):
            self._tcp.shutdown(flag)  # raises
            return
        try:
            self.channel.shutdown(flag)
        except BrokenLinkError:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN)) from None

    def close(self) -> None:
        """As `socket.close`: the peer reads what was sent, and then the end."""
        self._withdraw()
        self.channel.close()

    def _withdraw(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: _ExceptionClass | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def detach(self) -> int:
        """As `socket.detach`. Of a connection over shared memory the descriptor is that of a relay (`ism.smc.relay`).

        Raises: BusyResourceError; OSError (EAGAIN: it cannot be told yet how the bytes travel).
        """
        if not self.channel.closed:
            if self._listening is None:
                self.channel.become_plain(DUPLICATED)
            self._withdraw()
            return self.channel.detach()
        return self._tcp.detach()

    def dup(self) -> SmcSocket:
        """As `socket.dup`: both are plain from then on, a listening one aside. Raises as `detach`."""
        channel = self.channel
        if not channel.closed and self._listening is None:
            channel.become_plain(DUPLICATED)
        policy = channel.policy.with_mode("off")
        return self._over(TrioChannel(self._tcp.dup(), policy, None, channel.fallback or DUPLICATED))


# -- helpers ---------------------------------------------------------------------------------------------------------


def is_for_smc(sock: trio.socket.SocketType) -> bool:
    """Whether a socket is one for TCP over IPv4 or IPv6."""
    return sock.family in _FAMILIES and sock.type == _std.SOCK_STREAM and sock.proto in _TCP_PROTOCOLS


def policy_for(smc: Mode | None, buffer_size: int | None = None) -> Policy:
    """Return what is wanted, of what the environment leaves open. Raises ValueError; OSError (EINVAL)."""
    try:
        policy = from_environment()
    except ConfigError as exc:
        raise OSError(errno.EINVAL, str(exc)) from exc
    return policy.with_mode(smc).with_buffer(buffer_size)


def _is_connected(sock: trio.socket.SocketType) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


async def _as_os_error(decided: Callable[[], Any]) -> Any:
    try:
        return await decided()
    except BrokenLinkError as exc:
        await trio.lowlevel.checkpoint()
        error = exc.error
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, os.strerror(error.errno)) from error
        raise OSError(errno.ECONNRESET, f"{os.strerror(errno.ECONNRESET)} ({error})") from error


async def _fail(error: OSError) -> None:
    await trio.lowlevel.checkpoint()
    raise error


@contextlib.contextmanager
def _woken_by_errors() -> Iterator[None]:
    """What a send would raise is its to raise: for whoever waits, it would not wait."""
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.EBADF:
            raise closed_error() from None


def _check_flags(flags: int, known: int) -> None:
    if flags & ~known:
        raise OSError(errno.EOPNOTSUPP, f"flags {flags & ~known:#x} are not supported over shared memory")


def _told_flags(flags: int) -> int:
    return flags & _std.MSG_CMSG_CLOEXEC


def _writable(buffer: Any, nbytes: int) -> memoryview:
    view = memoryview(buffer)
    if view.readonly:
        raise TypeError(f"recv_into() argument 1 must be read-write bytes-like object, not {type(buffer).__name__}")
    view = view.cast("B")
    if index(nbytes) < 0:
        raise ValueError("negative buffersize in recv_into")
    if nbytes > len(view):
        raise ValueError("buffer too small for requested bytes")
    return view[:nbytes] if nbytes else view


def _joined(buffers: Iterable[Any]) -> bytes | memoryview:
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    if len(views) == 1:
        return views[0]
    joined = bytearray()
    for view in views:
        joined += view[: _LARGEST_PIECE - len(joined)]
    return bytes(joined)
