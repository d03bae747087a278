# SPDX-License-Identifier: Apache-2.0
"""Opening a device that cannot be opened: each error says what is missing and what to do, and nothing is left open."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transport_rig import CHUNK, PATIENCE_S, Rig, Shape, VfioUserRig

from ism.driver import Device, capabilities, open_device
from ism.driver.vfio_user import VfioUserTransport
from ism.errors import FeatureMismatchError, IsmError, RemoteProtocolError, TransportError
from ism.testing import Fabric, InMemoryTransport
from ism.virtio.pci import CommonCfg, Status


@contextmanager
def listener(path: Path, serve: Callable[[socket.socket], None]) -> Iterator[Path]:
    """Somebody else than a manager listens on `path`; `serve` gets the one connection."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen(1)

    def run() -> None:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            serve(connection)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield path
    finally:
        thread.join(PATIENCE_S)
        server.close()


def until_closed(connection: socket.socket) -> None:
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass


def test_a_path_where_nothing_is_names_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"no device manager listens on .*: run `ism manager`"):
        VfioUserTransport.connect(tmp_path / "missing.sock")


def test_a_path_that_is_no_socket_or_that_nobody_serves_names_the_command_to_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "left.sock"))
    left.close()
    for name in ("file", "left.sock"):
        with pytest.raises(TransportError, match="run `ism manager`"):
            VfioUserTransport.connect(tmp_path / name)


def test_a_path_that_is_too_long_is_an_error_about_the_path(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="too long"):
        VfioUserTransport.connect(tmp_path / ("x" * 200))


def test_a_directory_without_permission_is_an_error_about_permission(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"Not a directory|Permission denied"):
        VfioUserTransport.connect(Path("/dev/null/device.sock"))


@pytest.mark.parametrize(
    "name", ["vfio:0:4.0", "uio:0000:00:04.0,fast", "vfio:", "tcp:localhost", "/run/ism/device.sock", "vfio-user:"]
)
def test_a_device_name_of_an_unknown_kind_is_refused_with_the_form_that_is_known(name: str) -> None:
    with pytest.raises(TransportError, match=r"unknown device name .* expected vfio-user:PATH"):
        open_device(name)


def test_the_environment_is_named_when_the_name_came_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISM_DEVICE", "nonsense")
    with pytest.raises(TransportError, match="from ISM_DEVICE"):
        open_device()


def test_a_server_that_speaks_something_else_is_told_from_a_manager(tmp_path: Path) -> None:
    def http(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    with (
        listener(tmp_path / "http.sock", http) as path,
        pytest.raises(RemoteProtocolError, match="not speak vfio-user"),
    ):
        VfioUserTransport.connect(path)


def test_a_server_that_never_answers_is_told_from_a_manager(tmp_path: Path) -> None:
    with (
        listener(tmp_path / "silent.sock", until_closed) as path,
        pytest.raises(TransportError, match="does not answer; is it the socket of an `ism manager`"),
    ):
        VfioUserTransport.connect(path, timeout_s=0.2)


def test_a_server_that_hangs_up_is_told_from_a_manager(tmp_path: Path) -> None:
    with (
        listener(tmp_path / "rude.sock", lambda connection: None) as path,
        pytest.raises(TransportError, match="closed the connection; is it an `ism manager`"),
    ):
        VfioUserTransport.connect(path)


# -- functions that are not what the driver needs


class Bent:
    """An in-memory function some of whose registers read otherwise.

    Attributes: `config` (configuration space as the driver sees it), `registers` (common configuration field -> what
    its value becomes), `written` (fields and values).
    """

    def __init__(self, port: InMemoryTransport) -> None:
        self._port = port
        self._common = capabilities.find(port).common
        self._names = {self._common.offset + row.offset: row.name for row in CommonCfg.FIELDS}
        self.config = bytearray(port.config_read(0, 256))
        self.registers: dict[str, Callable[[int], int]] = {}
        self.written: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._port, name)

    def _field(self, bar: int, offset: int) -> str:
        return self._names.get(offset, "") if bar == self._common.bar else ""

    def config_read(self, offset: int, length: int) -> bytes:
        return bytes(self.config[offset : offset + length])

    def bar_read(self, bar: int, offset: int, length: int) -> bytes:
        raw = self._port.bar_read(bar, offset, length)
        bend = self.registers.get(self._field(bar, offset))
        return raw if bend is None else bend(int.from_bytes(raw, "little")).to_bytes(length, "little")

    def bar_write(self, bar: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        self.written.append((self._field(bar, offset), int.from_bytes(data, "little")))
        self._port.bar_write(bar, offset, data, posted=posted)


@pytest.fixture
def bent() -> Bent:
    return Bent(Fabric(chunk_size=CHUNK).plug())


def opening_fails(bent: Bent, error: type[IsmError], match: str) -> IsmError:
    with pytest.raises(error, match=match) as caught:
        Device(bent)
    with pytest.raises(TransportError):
        bent.dma_alloc(1)  # the transport was closed
    return caught.value


def gave_up(bent: Bent) -> bool:
    return any(name == "device_status" and value & Status.FAILED for name, value in bent.written)


def test_a_device_of_another_vendor_is_named(bent: Bent) -> None:
    bent.config[0:2] = b"\x86\x80"
    error = opening_fails(bent, FeatureMismatchError, "8086:106c, not a virtio-ism device .1af4:106c")
    assert isinstance(error, FeatureMismatchError)
    assert error.missing == ("virtio-ism",)


def test_another_virtio_device_is_named(bent: Bent) -> None:
    bent.config[2:4] = b"\x41\x10"
    opening_fails(bent, FeatureMismatchError, "1af4:1041, not a virtio-ism device")


def test_missing_structures_are_named(bent: Bent) -> None:
    bent.config[0x34] = 0
    error = opening_fails(bent, FeatureMismatchError, "common configuration, queue notify area, ISR status")
    assert isinstance(error, FeatureMismatchError)
    assert error.missing[-1] == "shared memory 2 (notify)"


def test_a_device_without_version_1_is_refused_by_that_name(bent: Bent) -> None:
    bent.registers["device_feature"] = lambda value: 0
    error = opening_fails(bent, FeatureMismatchError, "does not offer VIRTIO_F_VERSION_1")
    assert isinstance(error, FeatureMismatchError)
    assert error.missing == ("VIRTIO_F_VERSION_1",)
    assert gave_up(bent)


def test_a_device_that_refuses_the_feature_set_gets_it_named_back(bent: Bent) -> None:
    bent.registers["device_status"] = lambda value: value & ~Status.FEATURES_OK
    error = opening_fails(bent, FeatureMismatchError, "refuses the feature set .*VIRTIO_ISM_F_EVENT_VQ")
    assert isinstance(error, FeatureMismatchError)
    assert "VIRTIO_F_VERSION_1" in error.missing
    assert gave_up(bent)


def test_a_device_without_queues_is_refused(bent: Bent) -> None:
    bent.registers["num_queues"] = lambda value: 0
    opening_fails(bent, FeatureMismatchError, "has no control queue")
    assert gave_up(bent)


def test_a_device_that_refuses_a_vector_is_an_error_that_names_it(bent: Bent) -> None:
    bent.registers["queue_msix_vector"] = lambda value: 0xFFFF
    opening_fails(bent, TransportError, "cannot give queue 0 the interrupt vector 1")
    assert gave_up(bent)


def test_a_device_that_refuses_the_configuration_vector_is_an_error(bent: Bent) -> None:
    bent.registers["config_msix_vector"] = lambda value: 0xFFFF
    opening_fails(bent, TransportError, "cannot give configuration changes the vector 0")


def test_a_notify_word_outside_its_area_is_an_error(bent: Bent) -> None:
    bent.registers["queue_notify_off"] = lambda value: 0xFFFF
    opening_fails(bent, RemoteProtocolError, "notify word of queue 0 lies outside its area")


def test_a_configuration_that_never_stands_still_is_an_error(bent: Bent) -> None:
    ticks = iter(range(1 << 20))
    bent.registers["config_generation"] = lambda value: next(ticks) & 0xFF
    opening_fails(bent, RemoteProtocolError, "changes faster than it can be read")


def test_a_reset_that_never_ends_is_an_error_and_not_a_hang(bent: Bent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ism.driver.virtio_pci._RESET_TIMEOUT_S", 0.01)
    bent.registers["device_status"] = lambda value: 1
    opening_fails(bent, TransportError, "did not finish its reset .* restart the device manager")


def test_queue_sizes_that_are_no_power_of_two_are_used_in_part(bent: Bent) -> None:
    bent.registers["queue_size"] = lambda value: value - 1
    with Device(bent) as device:
        assert device.control.queue.size == 32
        assert device.alloc(CHUNK)


def test_a_device_that_is_lost_while_it_is_opened_is_an_error(bent: Bent) -> None:
    def lose(value: int) -> int:
        bent.lose("the plug was pulled")
        return value

    bent.registers["num_queues"] = lose
    opening_fails(bent, TransportError, "the plug was pulled")


# -- limits of the process

FEW_DESCRIPTORS = """
    import gc, os, resource, signal, sys
    from ism.driver import open_device
    from ism.eventfd import raise_eventfd
    from ism.errors import IsmError

    signal.alarm(120)
    def open_now():
        return {fd for fd in range(256) if os.path.lexists(f"/proc/self/fd/{fd}")}

    raise_eventfd_warm = os.eventfd(0)
    raise_eventfd(raise_eventfd_warm)
    os.close(raise_eventfd_warm)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()
    before = open_now()
    outcomes = []
    for extra in range(40):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + extra, hard))
        try:
            with open_device(sys.argv[1]) as device:
                device.alloc(4096).close()
        except IsmError as exc:
            assert "ulimit -n" in str(exc), repr(exc)
            outcomes.append(False)
        else:
            outcomes.append(True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        gc.collect()
        left = open_now() - before
        assert not left, (extra, [os.readlink(f"/proc/self/fd/{fd}") for fd in left])
    assert outcomes[0] is False and outcomes[-1] is True, outcomes
    assert outcomes == sorted(outcomes), outcomes
"""


def test_with_too_few_descriptors_the_error_names_the_limit_and_nothing_leaks(tmp_path: Path) -> None:
    rig = VfioUserRig(tmp_path, Shape())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(FEW_DESCRIPTORS), f"vfio-user:{rig.manager.path}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    rig.close()
    assert (done.returncode, done.stderr) == (0, "")


def test_a_device_is_opened_and_closed_many_times_without_a_trace(rig: Rig) -> None:
    for _ in range(10):
        device = Device(rig.transport())
        device.alloc(CHUNK)
        device.close()
