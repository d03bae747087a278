# SPDX-License-Identifier: Apache-2.0
"""A listening UNIX socket at a path: made private, never over somebody else's, taken away afterwards.

Owns the path while it is served. Never removes anything but a socket nobody answers on, and at the end only what it
made itself. Source: unix(7).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from types import TracebackType
from typing import Self

from ism.errors import TransportError


class UnixListener:
    """Listen on `path`.

    Args:
        path: a stale socket there (nobody answers) is replaced.
        mode: permission bits of the socket; set before anybody can connect.
        backlog: connections the kernel keeps waiting.
        kind: socket.SOCK_STREAM or socket.SOCK_SEQPACKET.
    Raises: TransportError: EADDRINUSE when a server answers there, EEXIST when it is not a socket, or the kernel's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: int = 0o600,
        backlog: int = 64,
        kind: int = socket.SOCK_STREAM,
    ) -> None:
        self.path = os.fspath(path)
        self.sock = socket.socket(socket.AF_UNIX, kind)
        self._identity: tuple[int, int] | None = None
        try:
            self._remove_stale(kind)
            self.sock.bind(self.path)
            made = os.lstat(self.path)
            self._identity = (made.st_dev, made.st_ino)
            os.chmod(self.path, mode)  # before listen(), so that nobody was let in earlier
            self.sock.listen(backlog)
            self.sock.setblocking(False)
        except OSError as error:
            self.close()
            raise TransportError(
                f"cannot listen on {self.path}: {error.strerror or error}", error.errno or errno.EINVAL
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop listening and remove the path, if it is still this listener's."""
        self.sock.close()
        identity, self._identity = self._identity, None
        if identity is not None:
            try:
                now = os.lstat(self.path)
                if (now.st_dev, now.st_ino) == identity:
                    os.unlink(self.path)
            except FileNotFoundError:
                pass  # somebody cleaned up

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _remove_stale(self, kind: int) -> None:
        try:
            there = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(there.st_mode):
            raise TransportError(
                f"cannot listen on {self.path}: it exists and is not a socket; remove it or choose another path",
                errno.EEXIST,
            )
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.setblocking(False)
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                pass
            except FileNotFoundError:
                return
            except OSError as error:
                # EAGAIN: its backlog is full; EPROTOTYPE: another kind of server; either way somebody is there.
                raise self._in_use() from error
            else:
                raise self._in_use()
        now = os.lstat(self.path)
        if (now.st_dev, now.st_ino) != (there.st_dev, there.st_ino):
            raise self._in_use()
        os.unlink(self.path)

    def _in_use(self) -> TransportError:
        return TransportError(
            f"cannot listen on {self.path}: a server answers there; stop it or choose another path", errno.EADDRINUSE
        )
