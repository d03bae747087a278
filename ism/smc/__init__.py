# SPDX-License-Identifier: Apache-2.0
"""Sockets over shared memory: TCP connections whose bytes travel through regions of a virtio-ism device.

The sans-io half, bottom up: `clc` (handshake messages), `diagnosis`, `identity`, `handshake_machine`, `states`. The
other half: `connection` (rings and state, no event loop), `handshake` (over a TCP socket), `stream` (trio).
"""

from ism.smc.stream import SmcListener, SmcStream, open_tcp_listeners, open_tcp_stream, serve_tcp

__all__ = ["SmcListener", "SmcStream", "open_tcp_listeners", "open_tcp_stream", "serve_tcp"]
