# SPDX-License-Identifier: Apache-2.0
"""The one tree of errors this package raises outside its socket surfaces.

Every message is one line: what failed, on what, what was observed and expected, and what to do next. Causes are
chained with `raise ... from`. Sockets (`ism.smc.socket`) raise `OSError` only, streams trio's errors only.
"""

from __future__ import annotations

from collections.abc import Iterable


class IsmError(Exception):
    """Base of every error of this package."""


class ConfigError(IsmError):
    """A configuration file holds something unusable.

    Attributes: `file` (path), `key` (dotted path of the key, "" for the file as a whole).
    """

    def __init__(self, file: str, key: str, problem: str) -> None:
        self.file, self.key, self.problem = file, key, problem
        where = f"{file}: {key}" if key else file
        super().__init__(f"{where}: {problem}")


class TransportError(IsmError):
    """The way to the device failed: no such socket, connection lost, mapping refused.

    Attributes: `errno` (0 when no system call failed).
    """

    def __init__(self, message: str, errno: int = 0) -> None:
        self.errno = errno
        super().__init__(message)


class DeviceGoneError(TransportError):
    """The device, or the manager that serves it, is gone. Regions already mapped stay readable."""


class FeatureMismatchError(IsmError):
    """The device does not offer what the driver needs, or refuses what it accepted.

    Attributes: `missing` (names of the feature bits or capabilities).
    """

    def __init__(self, message: str, missing: Iterable[str]) -> None:
        self.missing = tuple(missing)
        super().__init__(message)


class DeviceError(IsmError):
    """The device answered a control command with an ack other than OK.

    Attributes: `ack` (value on the wire, virtio-ism ack table), `ack_name`, `command`, `token` (0 when none).
    """

    def __init__(self, message: str, *, ack: int, ack_name: str, command: str, token: int = 0) -> None:
        self.ack, self.ack_name, self.command, self.token = ack, ack_name, command, token
        super().__init__(message)


class QuotaError(DeviceError):
    """Ack ENOMEM or ENOSPC: the device's quota or its window is exhausted. Detach regions, or raise the quota."""


class PermissionDeniedError(DeviceError):
    """Ack PERM_*: the grants of the region do not allow what was asked."""


class StaleRegionError(IsmError):
    """The region was detached, or its device was reset or closed."""


class ProtocolError(IsmError):
    """Somebody broke a protocol. Attributes: `state`, `event` (names, may be "")."""

    def __init__(self, message: str, *, state: str = "", event: str = "") -> None:
        self.state, self.event = state, event
        super().__init__(message)


class LocalProtocolError(ProtocolError):
    """This side was about to break the protocol: a bug in the caller."""


class RemoteProtocolError(ProtocolError):
    """The other side broke the protocol: it is buggy or hostile. Nothing it sent was used."""
