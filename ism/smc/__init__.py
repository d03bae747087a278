# SPDX-License-Identifier: Apache-2.0
"""Sockets over shared memory: TCP connections whose bytes travel through regions of a virtio-ism device.

Everything that `trio.socket` has, under the same name and with the same meaning, where TCP sockets are concerned over
shared memory; and trio's stream helpers likewise. `ism.smc.blocking` is the same for the standard library's sockets,
`ism.smc.asyncio` for its event loop.

Nothing is imported before a name of it is used, so that the blocking surface does not load trio.

The sans-io half, bottom up: `clc` (handshake messages), `diagnosis`, `identity`, `handshake_machine`, `states`. Without
an event loop: `connection` (rings and state), `group`, `handshake`, `link` (one connection until it is decided),
`rendezvous` (the manager's directory), `policy`, `info`, `lending` (memory lent to the program). For trio: `trio_wait`,
`trio_channel`, `trio_listening`, `trio_socket`, `trio_factory`, `trio_lending`, `stream`.
"""

import typing as _typing
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec

if _typing.TYPE_CHECKING:
    from trio.socket import *  # noqa: F403

    from ism.smc.info import Info as Info
    from ism.smc.info import counters as counters
    from ism.smc.stream import SmcListener as SmcListener
    from ism.smc.stream import SmcStream as SmcStream
    from ism.smc.stream import open_tcp_listeners as open_tcp_listeners
    from ism.smc.stream import open_tcp_stream as open_tcp_stream
    from ism.smc.stream import serve_tcp as serve_tcp
    from ism.smc.trio_factory import SocketFactory as SocketFactory
    from ism.smc.trio_factory import from_stdlib_socket as from_stdlib_socket
    from ism.smc.trio_factory import fromfd as fromfd
    from ism.smc.trio_factory import socket as socket
    from ism.smc.trio_socket import SmcSocket as SmcSocket

    SocketStream = SmcStream
    SocketListener = SmcListener

_OWN = {
    "Info": ("info", "Info"),
    "counters": ("info", "counters"),
    "SmcListener": ("stream", "SmcListener"),
    "SmcStream": ("stream", "SmcStream"),
    "SocketListener": ("stream", "SmcListener"),
    "SocketStream": ("stream", "SmcStream"),
    "open_tcp_listeners": ("stream", "open_tcp_listeners"),
    "open_tcp_stream": ("stream", "open_tcp_stream"),
    "serve_tcp": ("stream", "serve_tcp"),
    "SmcSocket": ("trio_socket", "SmcSocket"),
    "SocketFactory": ("trio_factory", "SocketFactory"),
    "from_stdlib_socket": ("trio_factory", "from_stdlib_socket"),
    "fromfd": ("trio_factory", "fromfd"),
    "socket": ("trio_factory", "socket"),
}


def __getattr__(name: str) -> object:
    value: object
    if name in _OWN:
        module, attribute = _OWN[name]
        value = getattr(_import_module(f"ism.smc.{module}"), attribute)
    elif name == "__all__":
        value = [public for public in __dir__() if not public.startswith("_")]
    elif name.startswith("_") or _find_spec(f"{__name__}.{name}") is not None:
        raise _missing(name)  # nothing, or a module here that is not imported yet: trio is not needed to say so
    else:
        try:
            value = getattr(_import_module("trio.socket"), name)
        except AttributeError:
            raise _missing(name) from None
    globals()[name] = value
    return value


def _missing(name: str) -> AttributeError:
    return AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_OWN, *(name for name in dir(_import_module("trio.socket")) if name[0] != "_")})
