# SPDX-License-Identifier: Apache-2.0
"""The control socket's protocol and its client: one line of JSON each way. Plain sockets, no event loop.

A request is an object with "op"; the reply is an object with "ok", and "error" (text) when that is false. Either is at
most so many bytes. Who can open the socket, which is in the manager's run directory, may ask. Source: project rule.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from typing import Any

from ism.errors import RemoteProtocolError, TransportError

MAX_REQUEST_BYTES = 4096
MAX_REPLY_BYTES = 64 << 20


def encode_line(message: dict[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode_request(line: bytes) -> dict[str, Any]:
    """One request line, without its newline. Raises RemoteProtocolError, saying what is wrong, and nothing else."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise RemoteProtocolError(f"the request is not JSON: {exc}") from None
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise RemoteProtocolError('the request is not an object with a string "op"')
    return message


def request(path: str | os.PathLike[str], op: str, *, timeout_s: float = 5.0, **arguments: Any) -> dict[str, Any]:
    """Ask the manager behind a control socket.

    Args:
        path: `ism.paths.control_socket(run_dir)`.
        op: "status"; `arguments` are added to the request (`tokens=True` asks for whole tokens).
        timeout_s: for all of it, each step, seconds.
    Returns: the reply, a copy.
    Raises: TransportError when no manager answers there; RemoteProtocolError for an answer that is none, or an error.
    """
    where = os.fspath(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(where)
            sock.sendall(encode_line({"op": op, **arguments}))
            data = bytearray()
            while not data.endswith(b"\n"):
                more = sock.recv(1 << 16)
                if not more or len(data) > MAX_REPLY_BYTES:
                    raise RemoteProtocolError(f"the manager at {where} gave no whole answer ({len(data)} bytes)")
                data += more
        except OSError as exc:
            problem = exc.strerror or str(exc)
            advice = "a manager answers its own user and root" if exc.errno == errno.EACCES else "run `ism manager`"
            raise TransportError(f"no manager answers at {where}: {problem}; {advice}", exc.errno or 0) from exc
    try:
        reply = json.loads(data)
    except ValueError as exc:
        raise RemoteProtocolError(f"the manager at {where} answered what is not JSON: {exc}") from exc
    if not isinstance(reply, dict) or reply.get("ok") is not True:
        raise RemoteProtocolError(f"the manager at {where} refused {op!r}: {reply!r:.300}")
    return reply
