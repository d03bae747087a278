# SPDX-License-Identifier: Apache-2.0
"""The errors of vfio-user, added to the package's one tree.

`VfioUserError` travels: raised by a device handler it becomes an error reply, and the error reply becomes the same
error in the client. The others stay on the side that noticed. Follows the vfio-user specification, "Header".
"""

from __future__ import annotations

import errno as errno_names

from ism.errors import RemoteProtocolError, TransportError


def errno_text(number: int) -> str:
    """Name of an errno (EINVAL), "errno N" for a number without one."""
    return errno_names.errorcode.get(number, f"errno {number}")


class VfioUserError(TransportError):
    """A command was refused with an errno: by the peer (client), or to be refused (raised in a handler).

    Attributes: `errno` (positive, 1..4095), `text` (what was refused and why), `command` (name, "" when unknown).
    """

    def __init__(self, errno: int, text: str = "", *, command: str = "") -> None:
        self.text, self.command = text, command
        named = ": ".join(part for part in (command, text) if part)
        super().__init__(f"{named} ({errno_text(errno)})" if named else errno_text(errno), errno)


class VfioUserTimeoutError(TransportError):
    """The peer did not answer, or did not read, within the time given. The connection may still be usable."""

    def __init__(self, message: str) -> None:
        super().__init__(message, errno_names.ETIMEDOUT)


class DescriptorLimitError(TransportError):
    """Descriptors were lost on the way: more came than were allowed, or this process may open no more.

    The kernel reports both the same way (MSG_CTRUNC). Nothing of that message's descriptors is left open.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(
            f"descriptors were lost in a message: either the peer sent more than the {limit} allowed in one message, "
            "or this process is at its own limit; raise RLIMIT_NOFILE (ulimit -n)",
            errno_names.EMFILE,
        )


class ClientGoneError(TransportError):
    """The vfio-user client of this connection is gone, or was dropped: no DMA can be made any more."""


class MapChannelClosedError(TransportError):
    """The map channel is closed: by its owner, by the peer's death, by garbage from the peer, or after a timeout."""


class MalformedMessageError(RemoteProtocolError):
    """A message cannot be used as it stands.

    Attributes: `errno` (what an error reply says), `header` (id and command when they could be read, else None),
    `fatal` (the position of the next message is lost: the connection cannot go on).
    """

    def __init__(
        self,
        message: str,
        *,
        errno: int = errno_names.EINVAL,
        header: tuple[int, int] | None = None,
        fatal: bool = False,
    ) -> None:
        self.errno, self.header, self.fatal = errno, header, fatal
        super().__init__(message)
