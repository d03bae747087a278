# SPDX-License-Identifier: Apache-2.0
"""The device is lost, the manager is stopped or killed, the process forks: nobody hangs, memory stays readable."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from transport_rig import (
    CHUNK,
    PATIENCE_S,
    SHARED,
    ManagerProcess,
    Rig,
    Shape,
    VfioUserRig,
    readable,
    together,
)

from ism.driver import Device, open_device
from ism.driver.events import Event
from ism.driver.service import Service
from ism.driver.vfio_user import VfioUserTransport
from ism.errors import DeviceGoneError, TransportError
from ism.eventfd import drain
from ism.ids import Token
from ism.virtio.ism_spec import EventType


@pytest.mark.parametrize("interrupts", [True, False])
def test_a_lost_device_wakes_everybody_and_leaves_the_memory(rig: Rig, interrupts: bool) -> None:
    owner, peer = rig.device(interrupts=interrupts), rig.device(interrupts=interrupts)
    own = owner.alloc(CHUNK, grants=[(SHARED, None)])
    far = peer.attach(own.token, interrupt=True)
    own.view[:5] = b"bytes"
    drain(own.fileno())
    rig.lose()
    assert readable(own.fileno())
    assert readable(far.fileno())
    for device in (owner, peer):
        assert device.gone is not None
        assert "manager" in device.gone
        for call in (
            lambda device=device: device.alloc(CHUNK),
            lambda device=device: device.attach(Token(1)),
            lambda device=device: device.grant(own.token, SHARED),
            lambda device=device: device.ring_slot(0),
        ):
            with pytest.raises(DeviceGoneError, match="manager"):
                call()
    assert far.view[:5] == b"bytes"
    far.view[0] = 1
    assert own.view[0] == 1
    far.close()
    own.close()
    assert not any(own.view)
    owner.close()


def test_on_gone_is_called_once(rig: Rig) -> None:
    transport = rig.transport()
    service = Service("test")
    reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
    transport.start(service, reasons.put)
    rig.lose()
    assert "manager" in reasons.get(timeout=PATIENCE_S)
    with pytest.raises(TransportError):
        transport.config_read(0, 4)
    service.close()
    transport.close()
    assert reasons.empty()


def test_direct_doorbells_go_on_without_the_manager(manager_process: ManagerProcess) -> None:
    owner, peer = (Device(VfioUserTransport.connect(manager_process.path)) for _ in range(2))
    own = owner.alloc(CHUNK, grants=[(SHARED, None)])
    far = peer.attach(own.token, interrupt=True)
    deadline = time.monotonic() + PATIENCE_S
    for region in (own, far):
        while region.device.transport.doorbell_fd(region._held.slot) is None:
            assert time.monotonic() < deadline, "no doorbell is wired"
            region.device.alloc(CHUNK).close()  # the manager does in order what it was asked before
    manager_process.end(signal.SIGKILL)
    for region in (own, far):
        assert readable(region.fileno())  # nobody rang: it is the loss that was noticed
    for here, there in ((own, far), (far, own)):
        drain(there.fileno())
        here.ring()
        assert readable(there.fileno())
    owner.close()
    peer.close()


def test_a_manager_that_is_killed_ends_every_command_under_way(manager_process: ManagerProcess) -> None:
    device = Device(VfioUserTransport.connect(manager_process.path))
    region = device.alloc(CHUNK)
    region.view[0] = 6
    manager_process.send(signal.SIGSTOP)
    started = threading.Barrier(5)

    def command() -> None:
        started.wait(PATIENCE_S)
        with pytest.raises(DeviceGoneError):
            device.alloc(CHUNK)

    def kill() -> None:
        started.wait(PATIENCE_S)
        manager_process.end(signal.SIGKILL)

    together([command, command, command, command, kill])
    assert readable(region.fileno())
    assert region.view[0] == 6
    with pytest.raises(DeviceGoneError, match="new ones need a manager"):
        device.alloc(CHUNK)
    region.close()
    device.close()


def test_where_no_manager_is_left_the_error_says_what_to_do(manager_process: ManagerProcess) -> None:
    name = f"vfio-user:{manager_process.path}"
    open_device(name).close()
    manager_process.end(signal.SIGKILL)
    with pytest.raises(TransportError, match=r"no device manager listens on .*: run `ism manager`"):
        open_device(name)


FORK = """
    import os, signal, sys, warnings
    from ism.driver import Device
    from ism.driver.vfio_user import VfioUserTransport
    from ism.errors import DeviceGoneError
    from ism.testing import Fabric

    signal.alarm(60)
    transport = Fabric().plug() if len(sys.argv) == 1 else VfioUserTransport.connect(sys.argv[1])
    device = Device(transport)
    own = device.alloc(65536)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            calls = (
                lambda: device.alloc(1),
                lambda: device.attach(own.token),
                lambda: own.grant(0),
                lambda: device.ring_slot(0),
                lambda: device.directory.retract_nowait(1),
                lambda: device.directory.withdraw(bytes(16), 1, 0),
            )
            for call in calls:
                try:
                    call()
                except DeviceGoneError as exc:
                    assert "before a fork" in str(exc), exc
                else:
                    raise AssertionError("no error")
            own.close()
            device.close()
            os._exit(0)
        except BaseException as exc:
            print(repr(exc), file=sys.stderr)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    again = device.alloc(65536)
    again.view[0] = 1
    own.close()
    again.close()
    device.close()
"""


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_forked_child_gets_clear_errors_and_its_parent_goes_on(rig: Rig) -> None:
    arguments = [rig.manager.path] if isinstance(rig, VfioUserRig) else []
    done = run_script(FORK, *arguments)
    assert (done.returncode, done.stderr) == (0, "")


ORPHAN = """
    import os, signal, sys, warnings
    from ism.driver import Device
    from ism.driver.vfio_user import VfioUserTransport
    from ism.ids import Token
    signal.alarm(60)
    device = Device(VfioUserTransport.connect(sys.argv[1]))
    far = device.attach(Token(int(sys.argv[2])))
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        os.close(1)
        os.close(2)
        os.read(0, 1)  # lives until the test says so
        os._exit(0)
    os._exit(0)  # without a word to the manager
"""


def test_a_forked_child_does_not_keep_its_dead_parents_device_alive(tmp_path: Path) -> None:
    rig = VfioUserRig(tmp_path, Shape())
    own = rig.device().alloc(CHUNK, grants=[(SHARED, None)])
    came = threading.Event()

    def callback(event: Event) -> None:
        if event.kind == EventType.DETACH:
            came.set()

    own.on_event(callback)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ORPHAN), str(rig.manager.path), str(own.token)], stdin=subprocess.PIPE
    ) as process:
        assert came.wait(PATIENCE_S), "the manager still takes the parent for alive"
        process.communicate(b"x", PATIENCE_S)
    rig.close()
