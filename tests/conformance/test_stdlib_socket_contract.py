# SPDX-License-Identifier: Apache-2.0
"""The standard library's own tests for sockets and for what is built on them, with the sockets of `ism.smc.blocking`.

A process of its own has `socket.socket` and the functions around it replaced, a manager running, and runs one class of
`test.test_socket` and others at a time. What is left out, and why, is said in the table. To see that it is not this
file that breaks them, `ISM_TEST_PLAIN_SOCKETS=1` runs all of them, none left out, on the standard library's sockets.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
import unittest
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLASS_S = 60
"""The worker gives up, with the traceback of every thread, when one class takes longer."""
FUNCTIONS = ("socket", "create_connection", "create_server", "fromfd", "socketpair", "has_dualstack_ipv6")
UNDER_TEST = "ism.smc.blocking"


@dataclass(frozen=True)
class Suite:
    """A test class of the standard library.

    Attributes: `name` (module below the package `test`, and class); `shared` (whether connections of it are to use
    shared memory, else they only have to work); `without` (tests left out, each with the reason).
    """

    name: str
    shared: bool = True
    without: dict[str, str] = field(default_factory=dict)

    @property
    def module(self) -> str:
        return "test." + self.name.rpartition(".")[0]


FIRST_SEND = "a send to a peer that has closed fails at once, not at the second attempt"
HANDSHAKE_SHOWS = "a moment of the handshake shows as readable, and a non-blocking receive then gives BlockingIOError"

SUITES = [
    Suite("test_asyncore.TestAPI_UseIPv4Select", shared=False),
    Suite("test_asyncore.TestAPI_UseIPv4Poll", shared=False),
    Suite("test_asyncore.TestAPI_UseIPv6Poll", shared=False),
    Suite("test_ftplib.TestFTPClass"),
    Suite("test_ftplib.TestTLS_FTPClass", shared=False),
    Suite("test_ssl.ThreadedTests", shared=False),
    Suite("test_asyncio.test_sendfile.EPollEventLoopTests"),
    Suite("test_socket.BasicTCPTest"),
    Suite("test_socket.BasicTCPTest2"),
    Suite("test_socket.BufferIOTest", without={"testRecvFromIntoSmallBuffer": FIRST_SEND}),
    Suite("test_socket.ContextManagersTest"),
    Suite("test_socket.CreateServerTest", shared=False),
    Suite("test_socket.CreateServerFunctionalTest"),
    Suite("test_socket.FileObjectClassTestCase"),
    Suite("test_socket.UnbufferedFileObjectClassTestCase"),
    Suite("test_socket.LineBufferedFileObjectClassTestCase"),
    Suite("test_socket.SmallBufferedFileObjectClassTestCase"),
    Suite("test_socket.UnicodeReadFileObjectClassTestCase"),
    Suite("test_socket.UnicodeWriteFileObjectClassTestCase"),
    Suite("test_socket.UnicodeReadWriteFileObjectClassTestCase"),
    Suite("test_socket.GeneralModuleTests", shared=False),
    Suite("test_socket.InheritanceTest", shared=False),
    Suite("test_socket.InterruptedSendTimeoutTest", shared=False),
    Suite("test_socket.NetworkConnectionAttributesTest", shared=False),
    Suite("test_socket.NetworkConnectionBehaviourTest", without={"testOutsideTimeout": FIRST_SEND}),
    Suite(
        "test_socket.NetworkConnectionNoServer",
        shared=False,
        without={"test_create_connection_timeout": "it replaces the class that `create_connection` of this test uses"},
    ),
    Suite("test_socket.NonBlockingTCPTests", without={"testRecv": HANDSHAKE_SHOWS}),
    Suite("test_socket.NonblockConstantTest", shared=False),
    Suite("test_socket.SendmsgTCPTest"),
    Suite("test_socket.RecvmsgTCPTest"),
    Suite("test_socket.RecvmsgIntoTCPTest"),
    Suite("test_socket.SendfileUsingSendTest"),
    Suite("test_socket.SendfileUsingSendfileTest"),
    Suite("test_socket.TCPCloserTest"),
    Suite("test_socket.TCPTimeoutTest", shared=False),
    Suite("test_socket.TestExceptions", shared=False),
    Suite("test_socket.BasicSocketPairTest", shared=False),
    Suite("test_socket.BasicUDPTest", shared=False),
    Suite("test_socket.RecvmsgSCMRightsStreamTest", shared=False),
    Suite("test_socket.SendRecvFdsTests", shared=False),
    Suite("test_socket.TestUnixDomain", shared=False),
    Suite("test_socketserver.SocketServerTest"),
    Suite("test_socketserver.ErrorHandlerTest", shared=False),
    Suite("test_socketserver.SocketWriterTest"),
    Suite("test_socketserver.MiscTestCase", shared=False),
    Suite("test_epoll.TestEPoll"),
    Suite("test_selectors.EpollSelectorTestCase", without={"test_above_fd_setsize": "thousands of connections"}),
    Suite("test_asyncore.DispatcherWithSendTests"),
    Suite("test_telnetlib.GeneralTests", shared=False),
    Suite("test_httplib.BasicTest", shared=False),
    Suite("test_httplib.SourceAddressTest", shared=False),
    Suite("test_httplib.TimeoutTest", shared=False),
    Suite("test_httplib.HTTPSTest", shared=False),
    Suite("test_httpservers.BaseHTTPServerTestCase"),
    Suite("test_httpservers.SimpleHTTPServerTestCase"),
    Suite("test_urllib2_localnet.ProxyAuthTests"),
    Suite("test_urllib2_localnet.TestUrlopen"),
    Suite("test_xmlrpc.SimpleServerTestCase"),
    Suite("test_xmlrpc.KeepaliveServerTestCase2"),
    Suite("test_smtplib.DebuggingServerTests"),
    Suite("test_smtplib.SMTPSimTests"),
    Suite("test_poplib.TestPOP3Class"),
    Suite("test_imaplib.ThreadedNetworkedTests"),
    Suite("test_logging.SocketHandlerTest"),
    Suite("test_asyncio.test_sock_lowlevel.EPollEventLoopTests"),
    Suite("test_asyncio.test_server.SelectorStartServerTests"),
    Suite("test_asyncio.test_streams.StreamTests", shared=False),
]

# The worker: this file as a program ----------------------------------------------------------------------------


def run_class(suite: Suite) -> dict[str, Any]:
    """Run a class. Returns how many tests ran, which were skipped, and which failed, with their tracebacks."""
    module = importlib.import_module(suite.module)
    if suite.module == "test.test_selectors":
        module.socketpair = tcp_pair  # type: ignore[attr-defined] # its own is of Unix sockets
    kind = getattr(module, suite.name.rpartition(".")[2], None)
    if kind is None:
        return {"missing": True}
    tests = unittest.TestSuite(
        test for test in unittest.defaultTestLoader.loadTestsFromTestCase(kind) if name_of(test) not in suite.without
    )
    result = unittest.TestResult()
    tests.run(result)
    failed: dict[str, str] = {}
    for test, text in [*result.errors, *result.failures]:
        failed[name_of(test)] = failed.get(name_of(test), "") + text
    return {"ran": result.testsRun, "skipped": len(result.skipped), "failed": failed}


def name_of(test: Any) -> str:
    return str(getattr(test, "_testMethodName", test))


def tcp_pair() -> tuple[Any, Any]:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    talk = threading.Thread(target=lambda: other.sendall(other.recv(1)))
    talk.start()
    client.sendall(b"x")
    client.recv(1)
    talk.join()
    return client, other


class Replaced:
    """The standard library's `socket` with the sockets under test in it. Attributes: `modes` (how each was used)."""

    def __init__(self, name: str) -> None:
        import socket

        self.modes: dict[str, int] = {}
        module = importlib.import_module(name)
        for function in FUNCTIONS:
            setattr(socket, function, getattr(module, function))
        importlib.import_module("ism.smc.run").replace_sendfile()
        end = module.socket._real_close

        def counted_end(sock: Any, *arguments: Any) -> None:
            mode = str(sock.smc_info().mode)
            self.modes[mode] = self.modes.get(mode, 0) + 1
            end(sock, *arguments)

        module.socket._real_close = counted_end


def unused_port(ports: Iterator[int]) -> int:
    """Find a port as the library's helper does, but none that the kernel gives to others before it is used."""
    import socket

    while True:
        port = next(ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


class Telling(queue.Queue):  # type: ignore[type-arg]
    """A queue that shows which exception passes through it.

    A test's thread hands its own to the test by a queue, and the test may be waiting for that thread's connection.
    """

    def put(self, item: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(item, BaseException):
            traceback.print_exception(item)
        super().put(item, *arguments, **options)


def work(name: str) -> None:
    """Read names of classes, a line each; write what became of them."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import socket  # noqa: F401 (before anything is replaced)

    from test.support import socket_helper, threading_helper

    ports = itertools.count(20_000 + os.getpid() % 10_000)
    socket_helper.find_unused_port = lambda *_, **__: unused_port(ports)
    queue.Queue = Telling
    # the library's own threads come and go when they like: no test waits until there are as few as before it
    threading_helper.wait_threads_exit = lambda *_, **__: contextlib.nullcontext()
    threading_helper.threading_cleanup = lambda *_: None

    replaced = None if name == "socket" else Replaced(name)
    for end in tcp_pair():  # threads that a first connection starts must be there before a test counts threads
        end.close()
    for line in sys.stdin:
        suite = next(suite for suite in SUITES if suite.name == line.strip())
        if replaced is None:
            suite.without.clear()
        else:
            replaced.modes.clear()
        faulthandler.dump_traceback_later(CLASS_S, exit=True)
        found = run_class(suite)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({**found, "modes": replaced and replaced.modes}), file=answers, flush=True)


if __name__ == "__main__":
    work(sys.argv[1])
    sys.exit()


# The tests ------------------------------------------------------------------------------------------------------

import pytest  # noqa: E402 (the worker does without)

PLAIN = bool(os.environ.get("ISM_TEST_PLAIN_SOCKETS"))


def there_is(module: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec(module) is not None
    return False


class Worker:
    """The process that runs the classes; a new one after it has died."""

    def __init__(self, environment: dict[str, str], errors: Path) -> None:
        self._environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._errors = errors
        self._process: subprocess.Popen[str] | None = None

    def run(self, suite: Suite) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        self._errors.write_bytes(b"")
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(suite.name + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            self.close()
            pytest.fail(f"the worker ended in {suite.name}:\n{self._errors.read_text()[-6000:]}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def _start(self) -> subprocess.Popen[str]:
        with open(self._errors, "a") as errors:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "socket" if PLAIN else UNDER_TEST],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self._environment,
                cwd=self._errors.parent,  # the tests make files in the current directory
            )

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    from socket_pairs import manager_process, skip_unless_written

    if not there_is("test.test_socket"):
        pytest.skip("this Python comes without the standard library's tests (package test)")
    directory = tmp_path_factory.mktemp("stdlib")
    with contextlib.ExitStack() as stack:
        environment = {}
        if not PLAIN:
            skip_unless_written()
            environment = stack.enter_context(manager_process(directory / "run"))
        worker = Worker(environment, directory / "errors")
        stack.callback(worker.close)
        yield worker


@pytest.mark.processes
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_the_standard_librarys_tests_pass(worker: Worker, suite: Suite) -> None:
    if not there_is(suite.module):
        pytest.skip(f"this Python has no {suite.module}")
    found = worker.run(suite)
    if "missing" in found:
        pytest.skip(f"this Python's {suite.module} has no such class")
    texts = [f"{name}:\n{text}" for name, text in found["failed"].items()]
    assert not texts, f"{len(texts)} of {found['ran']} failed: {', '.join(found['failed'])}\n\n" + "\n".join(texts)
    assert PLAIN or not suite.shared or found["modes"].get("SMC"), f"no connection used shared memory: {found['modes']}"
