# SPDX-License-Identifier: Apache-2.0
"""The blocking surface: `socket`, a subclass of the standard library's, and everything else of its `socket` module.

    from ism.smc import blocking as socket        # and nothing else changes

A TCP socket moves its bytes through shared memory when both ends use it and a device manager brings them together;
every other socket, and every TCP connection that cannot, is what it always was. `smc_info()` tells which, and why.

States of a socket: *plain* (nothing of this module is in the way), *undecided* (connected, and a `Link` decides: it
begins with the first send or receive), *SMC* (a `Channel` carries the bytes). TCP stays open under SMC: names, options
and polling use it. What differs from TCP is listed in docs/sockets.md.

The file is long because the class has every method of the standard library's that moves bytes; what waits, decides and
carries is elsewhere (`link`, `channel`, `relay`).
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import operator
import os
import select
import socket as _std
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from ism.driver import Device
from ism.errors import ConfigError, IsmError
from ism.shm.endpoint import QUICK, Endpoint
from ism.shm.state import GATED, SHORT, SPIN
from ism.smc import info as _info
from ism.smc import monitor
from ism.smc.channel import Channel, deadline_of, left_ms, would_block
from ism.smc.diagnosis import Diagnosis
from ism.smc.info import Info
from ism.smc.lending import ReceiveLoan, SendLoan, room_size, view_size
from ism.smc.lending_tcp import TcpLoans
from ism.smc.link import Link, Stage
from ism.smc.policy import Mode, Policy, buffer_for_option, from_environment
from ism.smc.relay import Relay, relay_of
from ism.smc.rendezvous import COMMAND_WAIT_S, IN_LINE, OFF, Fallback, Publication, connect_steps, no_device

for _name in dir(_std):
    if not _name.startswith("__"):
        globals()[_name] = getattr(_std, _name)

_Plain = _std.SocketType
"""The interpreter's own class, whose methods are TCP's; the program's `socket.socket` may be the class below."""
_Base = _std.socket
_TCP_PROTOCOLS = (0, _std.IPPROTO_TCP)
_FAMILIES = (_std.AF_INET, _std.AF_INET6)
_SEND_FLAGS = _std.MSG_DONTWAIT | _std.MSG_NOSIGNAL | _std.MSG_MORE | _std.MSG_OOB
_RECV_FLAGS = (
    _std.MSG_ERRQUEUE | _std.MSG_DONTWAIT | _std.MSG_PEEK | _std.MSG_WAITALL | _std.MSG_NOSIGNAL | _std.MSG_OOB
)
_GIVE_AWAY_S = 2.0
_CLAIM_PATIENCE_S = 0.005
_NONBLOCKING_PATIENCE_S = 0.25
_SYN_SENT = 2
"""tcpi_state (linux/tcp.h)."""
_FILE_BLOCK = 1 << 18
_SERVE_S = 30.0
_LOOK_S = 1.0
_sendfile = os.sendfile
"""The system's: `ism run` puts one in its place that comes back here."""
_local = threading.local()


def _waker() -> int:
    """Return this thread's eventfd for being told of a link's change."""
    held: _Waker | None = getattr(_local, "waker", None)
    if held is None or held.pid != os.getpid():
        held = _local.waker = _Waker()
    return held.fd


class _Waker:
    def __init__(self) -> None:
        self.fd, self.pid = -1, os.getpid()  # also where no descriptor is left: `__del__` looks
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.fd >= 0:
            close(self.fd)


_QUICKLY = GATED | SHORT
_QUICKLY_SPIN = SPIN | SHORT
_QUICK_BUFFERS = (bytearray, memoryview)
_NOTHING_OWED = memoryview(bytes(8)).cast("q")


class socket(_Base):
    """A socket as the standard library's, whose TCP connections use shared memory where both ends do.

    Args: as `socket.socket`; `smc`: "auto", "require" or "off" (default: the environment's ISM_SMC).
    """

    __slots__ = (
        "__dict__",
        "_carried",
        "_channel",
        "_fallback",
        "_linger_reset",
        "_link",
        "_mirrored",
        "_policy",
        "_publication",
        "_quick_end",
        "_quick_recv",
        "_quick_recv_into",
        "_quick_send",
        "_relay",
        "_rx_owed",
        "_tcp_loans",
    )

    def __init__(
        self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None, *, smc: Mode | None = None
    ) -> None:
        self._link: Link | None = None
        self._channel: Channel | None = None
        self._fallback: Fallback | None = None
        self._publication: Publication | None = None
        self._relay: Relay | None = None
        self._tcp_loans: TcpLoans | None = None
        self._quick_end: Endpoint | None = None
        self._quick_send: Callable[[bytes, int], int] | None = None
        self._quick_recv: Callable[[int, int], bytes | None] | None = None
        self._quick_recv_into: Callable[[Any, int], int] | None = None
        self._rx_owed = _NOTHING_OWED
        self._linger_reset = self._mirrored = self._carried = False
        if fileno is not None and (original := socket_of(fileno)) is not None:
            original._give_away()
        super().__init__(family, type, proto, fileno)
        self._policy = _policy(self, smc)
        if self._policy.mode == "off" and self._policy is not _NONE:
            self._fallback = OFF

    # -- what it is -------------------------------------------------------------------------------------------------

    def smc_info(self) -> Info:
        """Tell how the bytes of this socket travel, and why."""
        if self._publication is not None:
            return _info.listening(self._fallback, _name_of(_Plain.getsockname, self))
        if self._relay is not None and _Plain.fileno(self) >= 0:
            return self._relay.smc_info()
        return _info.describe(self._link, self._fallback, _name_of(_Plain.getsockname, self), self._peer())

    def _peer(self) -> Any:
        channel = self._channel
        return _name_of(_Plain.getpeername, self) if channel is None else channel.peername

    # -- connecting -------------------------------------------------------------------------------------------------

    def connect(self, address: Any, /) -> None:
        """As `socket.connect`; whether shared memory is used is decided later and never waited for."""
        self._check_not_connected(address)
        link = self._prepare(address)
        if link is None:
            _Plain.connect(self, address)
            return
        try:
            _Plain.connect(self, address)
        except BlockingIOError:
            link.connected()
            raise
        except BaseException:
            self._drop_link()
            raise
        link.connected()

    def connect_ex(self, address: Any, /) -> int:
        """As `socket.connect_ex`."""
        try:
            self._check_not_connected(address)
        except OSError as exc:
            return exc.errno or errno.EISCONN
        link = self._prepare(address)
        result = _Plain.connect_ex(self, address)
        if link is not None:
            if result in (0, errno.EINPROGRESS, errno.EAGAIN):
                link.connected()
            else:
                self._drop_link()
        return result

    def _check_not_connected(self, address: Any) -> None:
        """Refuse what cannot be connected a second time; TCP underneath may have ended, and would be."""
        if self._channel is None or _Plain.fileno(self) < 0 or not isinstance(address, tuple) or len(address) < 2:
            return
        if not isinstance(address[1], int):
            raise TypeError(f"'{type(address[1]).__name__}' object cannot be interpreted as an integer")
        if not 0 <= address[1] <= 65535:
            raise OverflowError("connect(): port must be 0-65535.")
        raise OSError(errno.EISCONN, os.strerror(errno.EISCONN))

    def _prepare(self, address: Any) -> Link | None:
        """Make the link of a connection about to be made; None when there is to be none, or is one already."""
        if self._policy.mode == "off" or self._link is not None or self._publication is not None:
            return None
        numeric = _numeric(self, address)
        if numeric is None or _name_of(_Plain.getpeername, self) is not None:
            return None
        device = self._open_device()
        if device is None:
            return None
        make = self._new_link(server_side=False)
        outcome = _run_steps(connect_steps(device, _Raw(self), numeric, self._policy, make))
        if isinstance(outcome, Fallback):
            self._fall_back(outcome)
            return None
        link: Link = outcome
        self._link = link
        _by_descriptor[_Plain.fileno(self)] = self
        monitor.track(self)
        if self._mirrored:
            link.notice()
        return link

    def _new_link(self, *, server_side: bool) -> Callable[[Device], Link]:
        policy = self._policy

        def make(device: Device) -> Link:
            return Link(
                _Plain.fileno(self),
                _Base.family.fget(self),  # type: ignore[attr-defined]
                server_side=server_side,
                device=device,
                buffer_size=policy.buffer_size,
                buffer_limit=policy.buffer_limit,
                required=policy.mode == "require",
                settled=_Settled(self),
            )

        return make

    def _open_device(self) -> Device | None:
        from ism.smc.default import open_default

        try:
            return open_default()
        except (IsmError, OSError) as exc:
            self._fall_back(no_device(exc))
            return None

    def _fall_back(self, fallback: Fallback) -> None:
        self._fallback = fallback
        monitor.track(self)
        if self._policy.mode == "require":
            raise OSError(errno.ECONNABORTED, f"shared memory is required, but {fallback.why}")
        _info.count_fallback(fallback.code, fallback.why, None)

    def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    # -- listening --------------------------------------------------------------------------------------------------

    def listen(self, backlog: int = -1, /) -> None:
        """As `socket.listen`; the address is published in the device manager's directory."""
        if backlog == -1:
            _Plain.listen(self)
        else:
            _Plain.listen(self, backlog)
        if self._policy.mode != "off" and self._publication is None:
            self._publish()

    def _publish(self) -> Publication | None:
        self._publication = None
        device = self._open_device()
        if device is None:
            return None
        publication = Publication(device, _Raw(self), self._policy)
        try:
            _run_steps(publication.publish_steps())
        except IsmError as exc:
            self._fall_back(Fallback(Diagnosis.CNFERR, f"the address could not be published: {exc}"))
        self._publication = publication
        monitor.track(self)
        return publication

    def _renewed(self, publication: Publication) -> Publication:
        """Publish again with the manager that took the place of one that is gone; without one it stays as it is."""
        from ism.smc.default import open_default

        try:
            renewed = Publication(open_default(), _Raw(self), self._policy)
            _run_steps(renewed.publish_steps())
        except (IsmError, OSError):
            return publication
        return renewed

    def accept(self) -> tuple[socket, Any]:
        """As `socket.accept`; never waits for shared memory."""
        if self._channel is not None and not self._channel.ended and self._channel.connection.readable():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd, address = self._accept()  # type: ignore[attr-defined]
        made = socket(_family(self), _kind(self), _proto(self), fileno=fd)
        if _std.getdefaulttimeout() is None and self.gettimeout():
            made.setblocking(True)
        publication = self._publication
        if publication is not None and publication.pid != os.getpid():
            publication = self._publish()  # this is a child that has inherited the socket
        elif publication is not None and publication.device.gone is not None:
            publication = self._publication = self._renewed(publication)
        elif publication is None and self._fallback is None and self._policy.mode != "off":
            publication = self._publish()  # somebody else has called `listen`: a parent process, a service manager
        if publication is None:
            made._fallback = self._fallback
            return made, address
        monitor.track(made)
        made._policy, made._linger_reset = self._policy, self._linger_reset
        try:
            outcome = publication.accepted(_Raw(made), address, made._new_link(server_side=True))
            if isinstance(outcome, Fallback):
                made._fallback = outcome
                _info.count_fallback(outcome.code, outcome.why, address)
            else:
                made._link = outcome
                _by_descriptor[fd] = made
        except OSError:
            pass  # the client has gone already: what follows shows it
        return made, address

    # -- between connected and decided ------------------------------------------------------------------------------

    def _decided(self, sending: bool, timeout_s: float | None) -> Channel | None:
        """Wait until it is known how bytes travel. Returns the channel, or None for TCP. Raises OSError."""
        link = self._link
        if link is None or self._channel is not None:
            return self._channel
        link.start(sending=sending)
        if not (link.settled if sending else link.may_receive):
            self._wait_decided(link, sending, timeout_s)
        if link.stage is Stage.SMC:
            return self._channel or self._made_channel(link)
        if link.stage is Stage.CLOSED:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # or a child's, whose parent has the connection
        if link.stage is Stage.BROKEN:
            raise OSError(errno.ECONNRESET, f"{os.strerror(errno.ECONNRESET)} ({link.error})") from link.error
        return None

    def _made_channel(self, link: Link) -> Channel:
        with link.lock:
            if self._channel is None:
                assert link.connection is not None
                self._channel = Channel(
                    link.connection, link.raw, max_spin_ns=self._policy.spin_us * 1000, mirrored=self._mirrored
                )
                endpoint = link.connection.endpoint
                self._rx_owed, self._quick_end = endpoint.owed, endpoint
                self._quick_send, self._quick_recv = endpoint.quick_send, endpoint.quick_recv
                self._quick_recv_into = endpoint.quick_recv_into
            return self._channel

    def _wait_decided(self, link: Link, sending: bool, timeout_s: float | None) -> None:
        def done() -> bool:
            return link.settled if sending else link.may_receive

        if timeout_s == 0.0:
            if _connecting(self):
                raise would_block()
            link.pump()
            if done():
                return
            if not sending or not _briefly(link, done):
                raise would_block()
            return
        _wait_for_link(link, done, deadline_of(timeout_s))

    # -- sending ----------------------------------------------------------------------------------------------------

    def send(self, data: Any, flags: int = 0, /) -> int:
        """As `socket.send`."""
        # what is short and has room is left to the kernel: it looks at what else could matter (`ism.shm.ring.send`)
        quick = self._quick_send
        if quick is not None and type(data) is bytes and not flags:
            sent = quick(data, _QUICKLY)
            if sent >= 0:
                return sent if sent < QUICK else self._finish(sent)
        channel = self._channel
        if channel is None:
            if self._tcp_loans is not None:
                self._tcp_loans.await_send(self._timeout(flags))
            if self._link is None:
                return _Plain.send(self, data, flags)
            _check_buffer(data)
            channel = self._decided(True, self._timeout(flags))
            if channel is None:
                return _Plain.send(self, data, flags)
        try:
            if flags:
                return self._send_flags(channel, data, flags)
            return channel.send(data, self.gettimeout())
        except (OSError, TypeError):
            _check_buffer(data)  # what is no buffer is told first
            raise

    def _finish(self, result: int) -> int:
        """Do what a kernel has left to be done: wake the peer, see to the buffers. Returns the count in its result."""
        assert self._quick_end is not None  # not taken away with the channel: what was done is to be ended
        return self._quick_end.finish(result)

    def _send_flags(self, channel: Channel, data: Any, flags: int) -> int:
        _supported(flags, _SEND_FLAGS)
        timeout_s = self._timeout(flags)
        if not flags & _std.MSG_OOB:
            return channel.send(data, timeout_s)
        view = memoryview(data).cast("B")
        if not view:
            return 0
        channel.send_all(view[:-1], timeout_s)
        _Plain.send(self, view[-1:], _std.MSG_OOB)
        return len(view)

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """As `socket.sendall`."""
        quick = self._quick_send
        if quick is not None and type(data) is bytes and not flags:
            sent = quick(data, _QUICKLY)
            if sent >= 0:
                if sent >= QUICK:
                    self._finish(sent)
                return None
        channel = self._channel
        if channel is None:
            if self._tcp_loans is not None:
                self._tcp_loans.await_send(self._timeout(flags))
            if self._link is None:
                return _Plain.sendall(self, data, flags)
            _check_buffer(data)
            timeout_s = self._timeout(flags)
            deadline = deadline_of(timeout_s)
            channel = self._decided(True, timeout_s)
            if channel is None:
                return _Plain.sendall(self, data, flags)
            if timeout_s:
                channel.send_all(data, (left_ms(deadline) or 0) / 1000)
                return None
        try:
            if not flags:
                channel.send_all(data, self.gettimeout())
                return None
            view = memoryview(data).cast("B")
            while view:
                view = view[self._send_flags(channel, view, flags) :]
        except (OSError, TypeError):
            _check_buffer(data)
            raise
        return None

    def sendto(self, *arguments: Any) -> int:
        """As `socket.sendto`; on a connected TCP socket the address is ignored, as TCP does."""
        if self._link is None or not 2 <= len(arguments) <= 3:
            return _Plain.sendto(self, *arguments)
        if not isinstance(arguments[-1], tuple):
            raise TypeError(f"sendto(): address must be tuple, not {type(arguments[-1]).__name__}")
        return self.send(arguments[0], arguments[1] if len(arguments) == 3 else 0)

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None, /) -> int:
        """As `socket.sendmsg`; ancillary data has no meaning for TCP."""
        if self._link is None or self._decided(True, self._timeout(flags)) is None:
            return _Plain.sendmsg(self, buffers, ancdata, flags, address)
        if address is not None and not isinstance(address, tuple):
            raise TypeError(f"sendmsg(): address must be tuple, not {type(address).__name__}")
        for item in ancdata:  # TCP ignores it too, but not what cannot be any
            if not isinstance(item, tuple) or len(item) != 3:
                raise TypeError("[sendmsg() ancillary data items]() argument must be a sequence of 3 items")
            operator.index(item[0])
            operator.index(item[1])
            _check_buffer(item[2])
        return self.send(b"".join(memoryview(buffer).cast("B") for buffer in buffers), flags)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """As `socket.sendfile`."""
        if self._link is None or _Plain.fileno(self) < 0:
            return super().sendfile(file, offset, count)
        self._check_sendfile_params(file, offset, count)  # type: ignore[attr-defined]
        if self.gettimeout() == 0:
            raise ValueError("non-blocking sockets are not supported")
        if self._decided(True, self.gettimeout()) is None:
            return super().sendfile(file, offset, count)
        try:
            fd, size = file.fileno(), os.fstat(file.fileno()).st_size
        except (AttributeError, OSError):  # no file of the system's: read it
            return self._sendfile_use_send(file, offset, count)  # type: ignore[attr-defined, no-any-return]
        return self._send_file(file, fd, offset, size if count is None else count)

    def _send_file(self, file: Any, fd: int, offset: int, left: int) -> int:
        total = 0
        try:
            while left > 0 and (data := os.pread(fd, min(left, _FILE_BLOCK), offset + total)):
                self.sendall(data)
                total += len(data)
                left -= len(data)
        finally:
            if total and hasattr(file, "seek"):
                file.seek(offset + total)
        return total

    def send_from(self, fd: int, offset: int | None, count: int) -> int:
        """As `os.sendfile` to this socket's descriptor: send from a file, from its own position if `offset` is None."""
        if self._link is None or self._decided(True, self.gettimeout()) is None:
            return _sendfile(_Plain.fileno(self), fd, offset, count)
        start = os.lseek(fd, 0, os.SEEK_CUR) if offset is None else offset
        data = os.pread(fd, min(count, _FILE_BLOCK), start)
        sent = self.send(data) if data else 0
        if offset is None:
            os.lseek(fd, start + sent, os.SEEK_SET)
        return sent

    # -- receiving --------------------------------------------------------------------------------------------------

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """As `socket.recv`."""
        quick = self._quick_recv
        if quick is not None and type(bufsize) is int and 0 < bufsize <= sys.maxsize and not flags:
            data = quick(bufsize, _QUICKLY_SPIN if self.gettimeout() != 0.0 else _QUICKLY)
            if data is not None:
                if self._rx_owed[0]:
                    assert self._quick_end is not None
                    self._quick_end.take_owed()
                return data
        channel = self._channel
        if channel is None:
            if self._tcp_loans is not None:
                self._tcp_loans.await_receive(self._timeout(flags))
            if self._link is None:
                return _Plain.recv(self, bufsize, flags)
            _check_size(bufsize)
            channel = self._decided(False, self._timeout(flags))
            if channel is None:
                return _Plain.recv(self, bufsize, flags)
        if flags or type(bufsize) is not int or not 0 < bufsize <= sys.maxsize:
            return self._recv_flags(channel, bufsize, flags)
        return channel.recv(bufsize, self.gettimeout())

    def _recv_flags(self, channel: Channel, bufsize: int, flags: int) -> bytes:
        _check_size(bufsize)
        _supported(flags, _RECV_FLAGS)
        if flags & _std.MSG_OOB and channel.connection.readable():
            return channel.raw.recv(bufsize, flags | _std.MSG_DONTWAIT)  # there is some, or EINVAL
        if flags & (_std.MSG_OOB | _std.MSG_ERRQUEUE):
            return _Plain.recv(self, bufsize, flags)
        if bufsize == 0:
            return b""
        timeout_s = self._timeout(flags)
        if timeout_s is not None:
            flags &= ~_std.MSG_WAITALL  # as in the standard library: it means something without a timeout alone
        if flags & _std.MSG_PEEK:
            return channel.peek(bufsize, timeout_s, all_of_it=bool(flags & _std.MSG_WAITALL))
        if not flags & _std.MSG_WAITALL:
            return channel.recv(bufsize, timeout_s)
        whole = bytearray(bufsize)
        return bytes(whole[: self._recv_all(channel, memoryview(whole), timeout_s)])

    @staticmethod
    def _recv_all(channel: Channel, view: memoryview, timeout_s: float | None) -> int:
        """Fill the view, or as much of it as comes before the end, an error or the time."""
        got = 0
        while got < len(view):
            try:
                count = channel.recv_into(view[got:], timeout_s)
            except OSError:
                if got:
                    break
                raise
            if not count:
                break
            got += count
        return got

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As `socket.recv_into`."""
        quick = self._quick_recv_into
        if quick is not None and not nbytes and not flags and type(buffer) in _QUICK_BUFFERS:
            try:
                count = quick(buffer, _QUICKLY_SPIN if self.gettimeout() != 0.0 else _QUICKLY)
                if count > 0:
                    return count if count < QUICK else self._finish(count)
            except (TypeError, BufferError):
                pass  # not to be written in place: told below, in the standard library's words
        channel = self._channel
        if channel is None:
            if self._tcp_loans is not None:
                self._tcp_loans.await_receive(self._timeout(flags))
            if self._link is None or self._decided(False, self._timeout(flags)) is None:
                return _Plain.recv_into(self, buffer, nbytes, flags)
            channel = self._channel
            assert channel is not None
        view = _writable(buffer, nbytes)
        if not len(view):
            return 0
        if flags:
            if flags & _std.MSG_WAITALL and not flags & (_std.MSG_PEEK | _std.MSG_OOB) and self._timeout(flags) is None:
                _supported(flags, _RECV_FLAGS)
                return self._recv_all(channel, view, None)
            data = self._recv_flags(channel, len(view), flags)
            view[: len(data)] = data
            return len(data)
        return channel.recv_into(view, self.gettimeout())

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        """As `socket.recvfrom`: TCP gives no address."""
        if self._link is None or self._decided(False, self._timeout(flags)) is None:
            return _Plain.recvfrom(self, bufsize, flags)
        self._wait_if_none(bufsize, flags)
        return self.recv(bufsize, flags), None

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        """As `socket.recvfrom_into`: TCP gives no address."""
        if self._link is None or self._decided(False, self._timeout(flags)) is None:
            return _Plain.recvfrom_into(self, buffer, nbytes, flags)
        self._wait_if_none(len(_writable(buffer, nbytes)), flags)
        return self.recv_into(buffer, nbytes, flags), None

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> tuple[bytes, list[Any], int, Any]:
        """As `socket.recvmsg`: TCP gives no ancillary data."""
        if self._link is None or self._decided(False, self._timeout(flags)) is None:
            return _Plain.recvmsg(self, bufsize, ancbufsize, flags)
        if ancbufsize < 0:
            raise ValueError("invalid ancillary data buffer length")
        self._wait_if_none(bufsize, flags)
        return self.recv(bufsize, flags), [], 0, None

    def _wait_if_none(self, bufsize: int, flags: int) -> None:
        """A message of no bytes waits as one of some does."""
        if bufsize == 0:
            self.recv(1, flags | _std.MSG_PEEK)

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0, /) -> tuple[int, list[Any], int, Any]:
        """As `socket.recvmsg_into`."""
        if self._link is None or self._decided(False, self._timeout(flags)) is None:
            return _Plain.recvmsg_into(self, buffers, ancbufsize, flags)
        if ancbufsize < 0:
            raise ValueError("invalid ancillary data buffer length")
        views = [_writable(buffer, 0) for buffer in buffers]
        self._wait_if_none(sum(map(len, views)), flags)
        data = self.recv(sum(map(len, views)), flags)
        rest = memoryview(data)
        for view in views:
            part = rest[: len(view)]
            view[: len(part)] = part
            rest = rest[len(part) :]
        return len(data), [], 0, None

    # -- without a copy ---------------------------------------------------------------------------------------------

    def recv_view(self, max_bytes: int | None = None) -> ReceiveLoan:
        """Receive without a copy: `with sock.recv_view() as lent:`, then look at `lent.view`, bytes of the ring itself.

        Args: `max_bytes`: 1 or more; None: all that is contiguous (over TCP 64 KiB).
        Returns: a loan of one byte or more, or of none at the end of the stream. The end of the block consumes all, or
            as its `consume` says; an exception that leaves the block: nothing. See docs/sockets.md.
        Raises: as `recv`; ValueError, TypeError; OSError (EDEADLK: this thread has bytes lent already); BufferError.
        """
        limit = view_size(max_bytes)
        channel = self._channel or self._decided(False, self.gettimeout())
        if channel is not None:
            return channel.lend_unread(limit, self.gettimeout())
        return self._loans_of_tcp().receive(self, _Plain, limit)

    def send_buffer(self, size: int) -> SendLoan:
        """Send without a copy: `with sock.send_buffer(size) as lent:`, then write into `lent.view`, the peer's ring.

        Args: `size`: bytes wanted, 1 or more.
        Returns: a loan of 1 to `size` contiguous bytes. The end of the block sends all, or as its `commit` says; an
            exception that leaves the block: nothing. See docs/sockets.md.
        Raises: as `send`, also at the end of the block; otherwise as `recv_view`.
        """
        size = room_size(size)
        channel = self._channel or self._decided(True, self.gettimeout())
        if channel is not None:
            return channel.lend_room(size, self.gettimeout())
        return self._loans_of_tcp().send(self, _Plain, size)

    def _loans_of_tcp(self) -> TcpLoans:
        if self._tcp_loans is None:
            self._tcp_loans = self.__dict__.setdefault("loans_of_tcp", TcpLoans())  # of two threads' the first
        return self._tcp_loans

    # -- the end ----------------------------------------------------------------------------------------------------

    def shutdown(self, how: int, /) -> None:
        """As `socket.shutdown`. A connection that is not decided yet is decided first, within the socket's timeout."""
        link = self._link
        if link is None or how not in (_std.SHUT_RD, _std.SHUT_WR, _std.SHUT_RDWR):
            _Plain.shutdown(self, how)
            return
        if _name_of(_Plain.getpeername, self) is None and self._channel is None:
            _Plain.shutdown(self, how)  # not connected: raises
            return
        channel = self._channel or self._decided(True, self._patience())
        if channel is None:
            _Plain.shutdown(self, how)
            return
        if _Plain.fileno(self) < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if channel.connection.disconnected:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        channel.shutdown(how)

    def _patience(self) -> float | None:
        """How long `shutdown`, which cannot say that it would block, waits."""
        timeout_s = self.gettimeout()
        return _NONBLOCKING_PATIENCE_S if timeout_s == 0 else timeout_s

    def _real_close(self, _ss: Any = _Plain) -> None:
        self._let_go()
        _ss.close(self)

    def _let_go(self) -> None:
        """End what is above TCP: the peer is told before TCP ends."""
        publication, self._publication = self._publication, None
        if publication is not None:
            publication.withdraw()
        channel, link = self._channel, self._link
        if channel is not None:
            channel.stop()
        if link is not None:
            if self._linger_reset and link.connection is not None:
                link.connection.close(abort=True)
            link.close()

    def detach(self) -> int:
        """As `socket.detach`. Of a connection over shared memory the descriptor is that of a relay (`ism.smc.relay`).

        Raises: OSError (EAGAIN: it cannot be told yet how the bytes travel; or why there is no relay).
        """
        self._give_away()
        publication, self._publication = self._publication, None
        if publication is not None:
            publication.withdraw()
        return super().detach()

    def dup(self) -> socket:
        """As `socket.dup`; both are plain sockets from then on. Raises as `detach`."""
        self._give_away()
        return super().dup()

    def _give_away(self, end_s: float | None = None) -> None:
        """Make this the plain socket that its descriptor is: TCP if that is still possible, else a relay's.

        Args: `end_s`: how long to wait for the decision, on the clock of `time.monotonic`.
        Raises: OSError (EAGAIN).
        """
        link = self._link
        if link is None or link.stage is Stage.CLOSED:
            return
        if self._channel is not None and self._channel.lent:
            raise OSError(errno.EBUSY, "memory of this connection is lent: end that block first")
        if link.required:
            link.start(sending=True)
        elif not link.settled:
            link.give_away()
        with contextlib.suppress(TimeoutError):
            _wait_for_link(link, lambda: link.may_receive, end_s or time.monotonic() + _GIVE_AWAY_S)
        if not link.may_receive:
            raise OSError(errno.EAGAIN, "it cannot be told yet whether this connection uses shared memory")
        if link.stage is Stage.SMC:
            channel = self._channel or self._made_channel(link)
            self._relay = Relay(_Plain.fileno(self), link, channel)
            self._link = None
            self._take_channel()
            monitor.forget(self)  # the relay is shown in its place
            return
        if link.stage is Stage.TCP:
            self._fallback = Fallback(link.code, link.why)
        self._drop_link()

    def _take_channel(self) -> Channel | None:
        """Let somebody else move the bytes from now on. Returns the channel."""
        channel, self._channel = self._channel, None
        self._quick_send = self._quick_recv = self._quick_recv_into = None
        return channel

    def __del__(self) -> None:
        link: Link | None = getattr(self, "_link", None)
        publication: Publication | None = getattr(self, "_publication", None)
        if sys.is_finalizing() or _Plain.fileno(self) < 0:
            return
        if (link is None or link.stage is Stage.CLOSED) and publication is None:
            getattr(_Plain, "__del__")(self)  # noqa: B009 (warns, and closes)
            return
        warnings.warn(f"unclosed {object.__repr__(self)}", ResourceWarning, source=self, stacklevel=2)
        # not here: a destructor may run inside the driver's locks. TCP must end after what is above it.
        channel, fd = self._channel, _Plain.detach(self)
        _thread.start_new_thread(_bury, (channel, link, publication, fd))

    # -- names, options, polling ------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """As `socket.fileno`. From now on the descriptor is readable exactly when a receive would not wait.

        For writing it is always ready; see docs/sockets.md.
        """
        if not self._mirrored:
            self._mirrored = True
            channel = self._channel
            if channel is not None:
                channel.start_mirror()
            elif (link := self._link) is not None:
                link.notice()
                if link.stage is Stage.SMC:
                    self._made_channel(link)
        return _Plain.fileno(self)

    def getpeername(self) -> Any:
        """As `socket.getpeername`."""
        channel = self._channel
        if channel is None or channel.peername is None:
            name = _Plain.getpeername(self)
            relay = self._relay or relay_of(_Plain.fileno(self))
            return name if relay is None else relay.remote
        if channel.ended:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if channel.connection.disconnected:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return channel.peername

    def getsockname(self) -> Any:
        """As `socket.getsockname`."""
        name = _Plain.getsockname(self)
        relay = None if self._link is not None else self._relay or relay_of(_Plain.fileno(self))
        return name if relay is None else relay.local

    def getsockopt(self, level: int, option: int, buflen: int = 0, /) -> Any:
        """As `socket.getsockopt`. An error that a call has raised is not reported again by SO_ERROR."""
        value = _Plain.getsockopt(self, level, option, buflen) if buflen else _Plain.getsockopt(self, level, option)
        if option == _std.SO_ERROR and level == _std.SOL_SOCKET and value == errno.ECONNRESET:
            channel = self._channel
            if channel is not None and channel.connection.reset_seen:
                return 0
            if channel is not None and channel.connection.peer_finished:
                return errno.EPIPE  # TCP's word for a reset after the end
        return value

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        """As `socket.setsockopt`: options are TCP's; SO_RCVBUF before connecting also sizes the shared buffer."""
        if level == _std.SOL_SOCKET and option == _std.SO_OOBINLINE and value and value[0]:
            self._put_in_line()
        if level == _std.SOL_SOCKET and option == _std.SO_RCVLOWAT and self._channel is not None:
            return
        _Plain.setsockopt(self, level, option, *value)
        if level != _std.SOL_SOCKET or self._policy.mode == "off":
            return
        if option == _std.SO_RCVBUF and isinstance(value[0], int) and self._link is None and value[0] > 0:
            self._policy = self._policy.with_buffer(buffer_for_option(value[0]))
        elif option == _std.SO_LINGER:
            linger = _Plain.getsockopt(self, level, option, 8)
            self._linger_reset = linger[:4] != bytes(4) and linger[4:] == bytes(4)

    def _put_in_line(self) -> None:
        """Urgent data is to be put in line: that is TCP's, or a relay's."""
        self._give_away()
        if self._policy.mode == "auto" and self._link is None and self._relay is None:
            publication, self._publication = self._publication, None
            if publication is not None:
                publication.withdraw()
            self._policy = self._policy.with_mode("off")
            self._fallback = self._fallback or IN_LINE

    def _timeout(self, flags: int) -> float | None:
        """The time a call has: as in the standard library, MSG_DONTWAIT means nothing where there is a timeout."""
        timeout_s = self.gettimeout()
        return 0.0 if timeout_s is None and flags & _std.MSG_DONTWAIT else timeout_s


_by_descriptor: weakref.WeakValueDictionary[int, socket] = weakref.WeakValueDictionary()
"""Sockets that have, or had, a link."""


def socket_of(fd: int) -> socket | None:
    """Return the object of a descriptor whose bytes travel, or may yet, through shared memory."""
    found = _by_descriptor.get(fd)
    return found if found is not None and found._link is not None and _Plain.fileno(found) == fd else None


def _before_fork() -> None:
    """Give away what was accepted and is not used yet: it may be the child that serves it."""
    fresh = [sock for sock in list(_by_descriptor.values()) if not sock._carried and _is_fresh(sock._link)]
    for sock in fresh:
        if sock._link is not None:
            sock._link.give_away()
    end_s = time.monotonic() + _GIVE_AWAY_S
    for sock in fresh:
        with contextlib.suppress(OSError):  # then it stays the parent's
            sock._give_away(end_s)


def _is_fresh(link: Link | None) -> bool:
    return link is not None and link.server_side and link.unused


os.register_at_fork(before=_before_fork)


def fromfd(fd: int, family: int, type: int, proto: int = 0) -> socket:
    """As `socket.fromfd`: from then on, as after `dup`, both are plain sockets."""
    original = socket_of(fd)
    if original is not None:
        original._give_away()
    return socket(family, type, proto, fileno=_std.dup(fd))


SocketType = _std.SocketType
_NONE = Policy(mode="off")

# -- helpers ---------------------------------------------------------------------------------------------------------


class _Raw:
    """What `rendezvous` asks of a socket, by the interpreter's own methods."""

    __slots__ = ("_sock", "family")

    def __init__(self, sock: socket) -> None:
        self._sock, self.family = sock, _family(sock)

    def fileno(self) -> int:
        return _Plain.fileno(self._sock)

    def getsockname(self) -> Any:
        return _Plain.getsockname(self._sock)

    def getsockopt(self, level: int, option: int, buflen: int, /) -> Any:
        return _Plain.getsockopt(self._sock, level, option, buflen)

    def bind(self, address: Any, /) -> object:
        _Plain.bind(self._sock, address)
        return None


class _Settled:
    """What a link calls when it is settled. It holds the socket weakly."""

    __slots__ = ("_socket",)

    def __init__(self, sock: socket) -> None:
        self._socket = weakref.ref(sock)

    def __call__(self, link: Link) -> None:
        sock = self._socket()
        if sock is None:
            return
        if link.stage is Stage.SMC:
            if sock._mirrored:
                sock._made_channel(link)
        elif link.stage is Stage.TCP:
            _info.count_fallback(link.code, link.why, _name_of(_Plain.getpeername, sock))


def _policy(sock: socket, smc: Mode | None) -> Policy:
    """Return what is wanted of a new socket; nothing, when it is not for TCP, or TLS uses its descriptor."""
    if type(sock).__module__ == "ssl":  # made from this class, by a program that replaced it before importing `ssl`
        return _NONE
    if _family(sock) not in _FAMILIES or _kind(sock) != _std.SOCK_STREAM or _proto(sock) not in _TCP_PROTOCOLS:
        return _NONE
    try:
        return from_environment().with_mode(smc)
    except ConfigError as exc:
        raise OSError(errno.EINVAL, str(exc)) from exc


def _family(sock: Any) -> int:
    return int(_Plain.family.__get__(sock))


def _kind(sock: Any) -> int:
    return int(_Plain.type.__get__(sock))


def _proto(sock: Any) -> int:
    return int(_Plain.proto.__get__(sock))


def _name_of(get: Callable[[Any], Any], sock: Any) -> Any:
    try:
        return get(sock)
    except OSError:
        return None


def _connecting(sock: socket) -> bool:
    """Whether a non-blocking connect is under way."""
    return _Plain.getsockopt(sock, _std.IPPROTO_TCP, _std.TCP_INFO, 1)[0] == _SYN_SENT


def _numeric(sock: socket, address: Any) -> Any:
    """Return the address with a numeric host, as connecting to it would resolve it; None when it is none for TCP."""
    if not isinstance(address, tuple) or len(address) < 2 or not isinstance(address[1], int):
        return None
    host, family = address[0], _family(sock)
    try:
        if isinstance(host, str):
            _std.inet_pton(family, host.partition("%")[0])
            return address
    except (OSError, ValueError):
        pass
    try:
        return _std.getaddrinfo(host or None, address[1], family, _std.SOCK_STREAM)[0][4]
    except (OSError, UnicodeError, TypeError, IndexError):
        return None


def _run_steps(steps: Any) -> Any:
    """Run the steps of `rendezvous` in this thread."""
    try:
        command = next(steps)
        while True:
            command.wait_done(COMMAND_WAIT_S)
            command = steps.send(None)
    except StopIteration as stop:
        return stop.value


def _wait_for_link(link: Link, done: Callable[[], bool], deadline_s: float) -> None:
    """Wait in this thread until `done()`, seeing to the handshake meanwhile. Raises TimeoutError."""
    waker = _waker()
    changed = False

    def wake() -> None:
        nonlocal changed
        changed = True
        os.eventfd_write(waker, 1)
        link.device.service.nudge()

    def look_again() -> bool:
        return changed or link.offer_taken()

    while not done():
        left_ms(deadline_s)
        if link.deadline_s <= time.monotonic():
            link.expire()
            continue
        changed = False
        link.on_change(wake)
        try:
            if done():
                return
            # in the place of the driver's thread: what this waits for comes without a detour through that one
            left_s = min(deadline_s, link.deadline_s) - time.monotonic()
            link.device.serve_until(look_again, min(left_s, _SERVE_S), link.watched_fds())
            if not changed:
                poller = select.poll()
                poller.register(waker, select.POLLIN)
                poller.poll(left_ms(min(deadline_s, link.deadline_s, time.monotonic() + _LOOK_S)))
        except TimeoutError:
            pass  # of the link or of the caller: seen above
        finally:
            link.forget(wake)
            if changed:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(waker)
        if not changed:
            link.pump()


def _briefly(link: Link, done: Callable[[], bool]) -> bool:
    """Wait for a link as long as a non-blocking send may: for a claim a moment, for a handshake under way longer."""
    patience = time.monotonic() + _NONBLOCKING_PATIENCE_S
    if link.stage is Stage.WAITING:
        with contextlib.suppress(TimeoutError):
            _wait_for_link(link, lambda: link.stage is not Stage.WAITING, time.monotonic() + _CLAIM_PATIENCE_S)
        link.hurry()
    try:
        _wait_for_link(link, done, patience)
    except TimeoutError:
        return False
    return True


def _check_buffer(data: Any) -> None:
    with memoryview(data) as view:
        if not view.c_contiguous:
            raise BufferError("memoryview: underlying buffer is not C-contiguous")


def _check_size(bufsize: int) -> None:
    if operator.index(bufsize) > sys.maxsize:
        raise OverflowError("Python int too large to convert to C ssize_t")
    if bufsize < 0:
        raise ValueError("negative buffersize in recv")


def _writable(buffer: Any, nbytes: int) -> memoryview:
    view = memoryview(buffer)
    if view.readonly:
        raise TypeError(f"read-write bytes-like object, not {type(buffer).__name__}")
    view = view.cast("B")
    if nbytes < 0:
        raise ValueError("negative buffersize in recv_into")
    if nbytes > len(view):
        raise ValueError("buffer too small for requested bytes")
    return view[:nbytes] if nbytes else view


def _supported(flags: int, known: int) -> None:
    if flags & ~known:
        raise OSError(errno.EOPNOTSUPP, f"flags {flags & ~known:#x} are not supported over shared memory")


def _bury(channel: Channel | None, link: Link | None, publication: Publication | None, fd: int) -> None:
    try:
        if publication is not None:
            publication.withdraw()
        if channel is not None:
            channel.stop()
        if link is not None:
            link.close()
    finally:
        os.close(fd)


# -- the module's functions, over the class above -------------------------------------------------------------------


def _over_this_class(function: Any) -> Any:
    """Return a function of the standard library's module as if that module's `socket` were the class above."""
    if not isinstance(function, types.FunctionType):
        return function
    made = types.FunctionType(
        function.__code__, _namespace, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__doc__, made.__module__ = function.__doc__, __name__
    return made


_namespace = dict(vars(_std))
for _name in ("create_connection", "create_server", "socketpair", "has_dualstack_ipv6"):
    if hasattr(_std, _name):
        _namespace[_name] = globals()[_name] = _over_this_class(getattr(_std, _name))
_namespace["socket"] = socket
_namespace["fromfd"] = fromfd
"""So that a traceback shows the standard library's lines, which these are."""

__all__ = list(_std.__all__)
