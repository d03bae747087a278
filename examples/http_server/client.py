# SPDX-License-Identifier: Apache-2.0
"""Fetch pages with the standard library, and say how the bytes travelled.

usage: client.py HOST PORT PATH...
"""

import hashlib
import http.client
import sys
import urllib.request


def how(sock) -> str:
    """Say how the bytes of a connection travelled: only its socket knows."""
    if not hasattr(sock, "smc_info"):
        return "TCP (this end knows of nothing else)"
    info = sock.smc_info()
    return f"SMC, {info.sent} bytes sent, {info.received} received" if info.mode == "SMC" else str(info)


def main(host: str, port: str, *paths: str) -> None:
    """Fetch each path twice: by `urllib`, and over a connection in the hand, whose socket can be asked."""
    for path in paths:
        with urllib.request.urlopen(f"http://{host}:{port}/{path}") as page:
            once = page.read()
        connection = http.client.HTTPConnection(host, int(port))
        connection.request("GET", f"/{path}")
        sock = connection.sock
        again = connection.getresponse().read()
        assert once == again
        print(path, len(again), hashlib.sha256(again).hexdigest())
        print(how(sock))
        connection.close()


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
