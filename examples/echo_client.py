# SPDX-License-Identifier: Apache-2.0
"""Talk to `echo_server.py` over shared memory: `python echo_client.py [PORT [TEXT ...]]`."""

import sys

import trio

import ism.smc


async def main(port: int, messages: list[str]) -> None:
    """Send each message and print what comes back."""
    async with await ism.smc.open_tcp_stream("127.0.0.1", port) as stream:
        for message in messages:
            data = message.encode()
            await stream.send_all(data)
            answer = b""
            while len(answer) < len(data):
                part = await stream.receive_some()
                if not part:
                    sys.exit("the server closed the connection")
                answer += part
            print(answer.decode())


if __name__ == "__main__":
    try:
        trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 9000, sys.argv[2:] or ["hello", "shared", "memory"])
    except (OSError, ValueError, trio.BrokenResourceError) as exc:
        sys.exit(f"echo_client: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)
