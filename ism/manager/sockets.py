# SPDX-License-Identifier: Apache-2.0
"""The manager's place in the file system: its run directory, its lock, its listening sockets and their owners.

It follows the rule that who can reach a socket can have a device: nothing is made in a directory that somebody else
could change, and a socket gets its owner before it gets its permissions. Source: unix(7), flock(2), project rule.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
import resource
import socket
import stat
from pathlib import Path

from ism.errors import ConfigError, TransportError
from ism.manager.config import SocketConfig
from ism.vfio_user.listener import UnixListener

BACKLOG = 128


class RunDirectory:
    """The manager's run directory, held by one manager at a time. Close it to let it go.

    Args: `path`: made with mode 0700 if it is missing.
    Raises: TransportError: EBUSY when another manager runs there; EPERM when it is not this user's, or others may
        write to it; ENOTDIR; or the kernel's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(f"no run directory at {path}: {error.strerror}", error.errno or 0) from error
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        status = os.fstat(self._fd)
        if status.st_uid != os.geteuid():
            raise TransportError(
                f"the run directory {self.path} belongs to uid {status.st_uid}, not to this user ({os.geteuid()}): "
                "whoever owns it could take the manager's place; choose another (ISM_RUN_DIR)",
                errno.EPERM,
            )
        if stat.S_IMODE(status.st_mode) & 0o022:
            raise TransportError(
                f"others may write to the run directory {self.path} (mode {stat.S_IMODE(status.st_mode):o}); "
                "name one that is yours alone (--run-dir; it is made with mode 0700)",
                errno.EPERM,
            )
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TransportError(
                f"a manager is already running in {self.path}: stop it, or choose another directory (ISM_RUN_DIR)",
                errno.EBUSY,
            ) from error

    def close(self) -> None:
        """Let another manager have it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def listen(config: SocketConfig, file: str, *, kind: int = socket.SOCK_STREAM) -> UnixListener:
    """Listen on a socket, with its owner and permissions. Args: `file`: of the configuration, for errors.

    Raises: ConfigError for a user or group that does not exist; TransportError as `UnixListener`.
    """
    uid, gid = -1, -1
    try:
        if config.user:
            uid = int(config.user) if config.user.isdecimal() else pwd.getpwnam(config.user).pw_uid
        if config.group:
            gid = int(config.group) if config.group.isdecimal() else grp.getgrnam(config.group).gr_gid
    except (KeyError, ValueError) as error:
        raise ConfigError(
            file, f"{config.key}.socket_owner", f"no such user or group: {config.user}:{config.group}"
        ) from error
    listener = UnixListener(config.path, mode=0o600, backlog=BACKLOG, kind=kind)
    try:
        if uid != -1 or gid != -1:
            os.chown(config.path, uid, gid)
        os.chmod(config.path, config.mode)
    except OSError as error:
        listener.close()
        raise TransportError(f"cannot give {config.path} its owner and mode: {error}", error.errno or 0) from error
    except BaseException:
        listener.close()
        raise
    return listener


def raise_descriptor_limit() -> int:
    """Raise this process's descriptor limit as far as it may; return what it is then, 0 for none at all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            pass  # what there is must do
    return 0 if soft == resource.RLIM_INFINITY else soft
