# SPDX-License-Identifier: Apache-2.0
"""The map agent, preloaded into a process that does what QEMU does, and its builder."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_rig import PAGE, WINDOW, Channel, Device, Qemu, Sockets, built_agent, compiler, inode, peer_pid, sealed
from fallback_rig import until

from ism.memory import F_SEAL_FUTURE_WRITE
from ism.vfio_user import map_channel_wire
from ism.vfio_user.errors import MalformedMessageError
from ism.vfio_user.fds import Fd, close_all
from ism.vfio_user.map_channel_wire import Packet, PacketType
from ism.vmm import agent
from ism.vmm.agent import agent_library
from ism.vmm.errors import AgentBuildError

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler: apt-get install gcc libc6-dev")
pytestmark = [needs_compiler]

INTRODUCTION = Packet(type=PacketType.INTRODUCE).pack()
ZEROS = bytes(4)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with built_agent(tmp_path_factory.mktemp("agent")) as path:
        yield path


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory with a short name: a socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def qemu(library: Path) -> Iterator[Qemu]:
    it = Qemu(library)
    yield it
    it.close()


@pytest.fixture
def sockets(folder: Path) -> Iterator[Sockets]:
    it = Sockets(folder / "s")
    yield it
    it.close()


@pytest.fixture
def placeholder() -> Iterator[Fd]:
    with sealed(WINDOW, b"\xaa" * WINDOW) as fd:
        yield fd


@pytest.fixture
def region() -> Iterator[Fd]:
    with sealed(4 * PAGE, b"".join(letter * PAGE for letter in (b"A", b"B", b"C", b"D"))) as fd:
        yield fd


@pytest.fixture
def device(sockets: Sockets, qemu: Qemu) -> Device:
    return Device(sockets, qemu)


@pytest.fixture
def placed(device: Device, placeholder: Fd) -> Device:
    device.place(placeholder)
    return device


# connect()


def test_the_introduction_is_there_before_the_connection(qemu: Qemu, sockets: Sockets) -> None:
    assert qemu.call("connect", str(sockets.path)) == 0
    connection = sockets.accept()
    channel = sockets.introduced()
    assert channel is not None
    assert channel.sock.recv(100, socket.MSG_DONTWAIT) == INTRODUCTION
    map_channel_wire.parse_introduction(INTRODUCTION)
    assert peer_pid(channel.sock) == peer_pid(connection)
    assert sockets.introduced() is None
    assert qemu.errors() == ""


def test_without_a_map_socket_nothing_happens(qemu: Qemu, folder: Path) -> None:
    path = folder / "s"
    before = qemu.call("fds")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert qemu.call("connect", str(path)) == 0
    assert len(qemu.call("fds")) == len(before) + 1
    assert "ism-agent" not in qemu.call("threads")
    assert qemu.errors() == ""


@pytest.mark.parametrize("what", ["stale", "stream", "file"])
def test_something_else_in_the_place_of_the_map_socket_is_left_alone(qemu: Qemu, folder: Path, what: str) -> None:
    path = folder / "s"
    beside = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if what == "stream" else socket.SOCK_SEQPACKET)
    with socket.socket(socket.AF_UNIX) as listener, beside:
        listener.bind(str(path))
        listener.listen()
        if what == "file":
            Path(f"{path}.map").write_bytes(b"")
        else:
            beside.bind(f"{path}.map")
        if what == "stream":
            beside.listen()
        before = qemu.call("fds")
        assert qemu.call("connect_raw", str(path), 110) == [0, 77]
        assert len(qemu.call("fds")) == len(before) + 1
        assert qemu.errors() == ""


def test_a_connection_that_fails_takes_its_introduction_back_and_keeps_its_errno(qemu: Qemu, sockets: Sockets) -> None:
    sockets.device.close()
    before = qemu.call("fds")
    assert qemu.call("connect_raw", str(sockets.path), 110) == [-1, errno.ECONNREFUSED]
    sockets.path.unlink()
    assert qemu.call("connect_raw", str(sockets.path), 110) == [-1, errno.ENOENT]
    for _ in range(2):
        channel = sockets.introduced()
        assert channel is not None
        assert channel.sock.recv(100) == INTRODUCTION
        assert channel.ended()
    assert len(qemu.call("fds")) == len(before) + 2


def test_a_connection_that_succeeds_leaves_errno_alone(qemu: Qemu, sockets: Sockets) -> None:
    assert qemu.call("connect_raw", str(sockets.path), 110) == [0, 77]
    assert sockets.introduced() is not None


def test_an_address_may_end_without_a_zero_byte(qemu: Qemu, sockets: Sockets) -> None:
    assert qemu.call("connect_raw", str(sockets.path), 2 + len(str(sockets.path))) == [0, 77]
    assert sockets.introduced() is not None


@pytest.mark.parametrize(("length", "introduces"), [(103, True), (104, False), (107, False)])
def test_a_path_too_long_for_a_map_socket_is_connected_to_all_the_same(
    qemu: Qemu, folder: Path, length: int, introduces: bool
) -> None:
    path = str(folder) + "/" + "x" * (length - len(str(folder)) - 1)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as beside:
        listener.bind(path)
        listener.listen()
        beside.bind(str(folder / "short"))
        beside.listen()
        (folder / "short").rename(f"{path}.map")
        beside.setblocking(False)
        assert qemu.call("connect", path) == 0
        if introduces:
            sock, _ = beside.accept()
            sock.close()
        else:
            with pytest.raises(BlockingIOError):
                beside.accept()


def test_other_kinds_of_connections_are_none_of_its_business(qemu: Qemu, sockets: Sockets, folder: Path) -> None:
    sockets.map.close()
    # a path that ends in .map; an abstract name; datagrams
    for name, kind in ((f"{folder}/x.map", 1), (f"@{folder}/y", 1), (f"{folder}/z", 2)):
        bound = name.replace("@", "\0", 1)
        with (
            socket.socket(socket.AF_UNIX, kind) as there,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as beside,
        ):
            there.bind(bound)
            beside.bind(f"{bound}.map")
            beside.listen()
            beside.setblocking(False)
            if kind == 1:
                there.listen()
            assert qemu.call("connect", name, kind) == 0
            with pytest.raises(BlockingIOError):
                beside.accept()


def test_an_address_the_kernel_refuses_is_not_looked_at(qemu: Qemu, sockets: Sockets) -> None:
    for path, size in (("", 2), (str(sockets.path), 200)):
        assert qemu.call("connect_raw", path, size) == [-1, errno.EINVAL]
    assert sockets.introduced() is None


def test_a_manager_that_does_not_accept_delays_a_connection_and_does_not_stop_it(qemu: Qemu, sockets: Sockets) -> None:
    waiting = []
    with pytest.raises(BlockingIOError):  # noqa: PT012 - at some point the backlog is full
        while True:
            waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            waiting[-1].setblocking(False)
            waiting[-1].connect(f"{sockets.path}.map")
    assert qemu.call("connect_raw", str(sockets.path), 110) == [0, 77]
    assert qemu.errors() == f"ism-agent: no map channel at {sockets.path}.map: errno {errno.EAGAIN}\n"
    for sock in waiting:
        sock.close()


def test_there_are_sixteen_channels_and_those_that_end_make_room(qemu: Qemu, sockets: Sockets) -> None:
    devices = [Device(sockets, qemu) for _ in range(16)]
    assert qemu.call("threads").count("ism-agent") <= 16
    assert qemu.call("connect", str(sockets.path)) == 0
    sockets.accept()
    assert sockets.introduced() is None
    assert re.fullmatch(r"ism-agent: no map channel at .*/s.map: errno \d+\n", qemu.errors())
    devices[3].channel.end()
    Device(sockets, qemu)


# HELLO


def test_the_agent_has_a_thread_of_its_own(placed: Device) -> None:
    assert placed.qemu.call("threads").count("ism-agent") == 1


def test_hello_is_checked(device: Device, placeholder: Fd) -> None:
    good = {"offset": PAGE, "length": WINDOW, "file_offset": inode(placeholder)}
    ask = device.channel.ask
    for wrong in (
        {"file_offset": 0},
        {"offset": 0},
        {"offset": PAGE // 2},
        {"offset": 3 * PAGE},
        {"offset": 1 << 41, "length": 1 << 41},
        {"length": 0},
        {"length": WINDOW + 1},
        {"length": (1 << 63) + PAGE},
        {"rights": 1},
        {"status": 1},
    ):
        assert ask(PacketType.HELLO, **{**good, **wrong}) == errno.EINVAL, wrong
    assert ask(PacketType.HELLO, [placeholder], **good) == errno.EINVAL
    assert device.channel.map(0, placeholder) == errno.EINVAL  # before HELLO
    assert device.channel.unmap(0) == errno.EINVAL
    assert ask(PacketType.HELLO, **good) == 0
    assert ask(PacketType.HELLO, **good) == errno.EINVAL


def test_two_windows_cannot_wait_for_one_placeholder(device: Device, sockets: Sockets, placeholder: Fd) -> None:
    other = Device(sockets, device.qemu)
    assert device.channel.hello(placeholder) == 0
    assert other.channel.hello(placeholder) == errno.EEXIST
    device.channel.end()
    assert other.channel.hello(placeholder) == 0


def test_what_it_does_not_know_is_answered_so(placed: Device, region: Fd) -> None:
    for type in (0, PacketType.INTRODUCE, 7, 0x7FFF):
        assert placed.channel.ask(type) == errno.ENOSYS
    before = placed.qemu.call("fds")
    assert placed.channel.ask(PacketType.DOORBELL, [region], offset=1) == errno.ENOSYS
    assert placed.channel.ask(PacketType.UNDOORBELL, offset=1) == errno.ENOSYS
    assert placed.qemu.call("fds") == before


# The window


@pytest.mark.parametrize("function", ["mmap", "mmap64"])
@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, 3])  # MAP_SHARED_VALIDATE
def test_the_mapping_of_the_placeholder_becomes_a_window_of_zero_pages(
    device: Device, placeholder: Fd, function: str, flags: int
) -> None:
    device.announce(placeholder)
    assert device.qemu.call("map_bar", WINDOW, 0, flags, function) == 0
    for offset in range(0, WINDOW, PAGE):
        assert device.qemu.read(offset) == ZEROS
    device.qemu.write(PAGE, b"mine")
    assert device.qemu.read(PAGE) == b"mine"
    assert os.pread(placeholder.fileno(), 4, PAGE) == b"\xaa" * 4
    assert device.qemu.errors() == ""


def test_other_mappings_are_left_alone(device: Device, placeholder: Fd, region: Fd) -> None:
    qemu = device.qemu
    device.announce(placeholder)
    assert qemu.call("map_bar", WINDOW, 0, mmap.MAP_PRIVATE) == 0
    assert qemu.read(0) == b"\xaa" * 4
    device.give_bar(region)
    assert qemu.call("map_bar", 4 * PAGE) == 0
    assert qemu.read(0) == b"AAAA"
    assert qemu.errors() == ""
    assert device.channel.map(0, region) == errno.ENODEV
    device.give_bar(placeholder)
    assert qemu.call("map_bar", WINDOW) == 0
    assert qemu.read(0) == ZEROS


def test_a_file_elsewhere_with_the_same_inode_number_is_left_alone(device: Device, folder: Path) -> None:
    # the device is compared too: a file that was unlinked looks like a memory file otherwise
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\xbb" * WINDOW)
        file.flush()
        with Fd(os.dup(file.fileno())) as fd:
            if os.fstat(fd.fileno()).st_nlink:
                pytest.skip("this file system counts links of unlinked files")
            device.announce(fd)
            assert device.qemu.call("map_bar", WINDOW) == 0
            assert device.qemu.read(0) == b"\xbb" * 4


def test_a_placeholder_mapped_otherwise_than_announced_is_left_alone_and_told(
    device: Device, placeholder: Fd, region: Fd
) -> None:
    device.announce(placeholder)
    for length, offset in ((WINDOW // 2, 0), (WINDOW // 2, WINDOW // 2), (WINDOW, PAGE)):
        assert device.qemu.call("map_bar", length, offset) == 0
        assert device.qemu.read(0) == b"\xaa" * 4
    assert len(re.findall("ism-agent: the placeholder is mapped at .* not as announced", device.qemu.errors())) == 3
    assert device.channel.map(0, region) == errno.ENODEV
    assert device.channel.unmap(0) == errno.ENODEV
    assert device.qemu.call("map_bar", WINDOW) == 0
    assert device.channel.map(0, region) == 0


def test_a_mapping_that_fails_stays_a_failure(device: Device, placeholder: Fd) -> None:
    device.announce(placeholder)
    assert device.qemu.call("map_bar", WINDOW, 1) == errno.EINVAL
    assert device.channel.unmap(0) == errno.ENODEV


def test_windows_are_told_apart_by_their_placeholders(sockets: Sockets, qemu: Qemu, region: Fd) -> None:
    one, two = Device(sockets, qemu), Device(sockets, qemu)
    with sealed(WINDOW) as first, sealed(WINDOW) as second:
        assert one.channel.hello(second) == 0
        assert two.channel.hello(first) == 0
        two.give_bar(first)
        assert qemu.call("map_bar", WINDOW) == 0
        assert one.channel.map(0, region) == errno.ENODEV
        assert two.channel.map(0, region) == 0
        assert qemu.read(0) == b"AAAA"


# MAP and UNMAP


def test_a_region_mapped_for_writing_is_shared(placed: Device, region: Fd) -> None:
    assert placed.channel.map(2 * PAGE, region, length=2 * PAGE, file_offset=PAGE) == 0
    assert placed.qemu.read(2 * PAGE) == b"BBBB"
    assert placed.qemu.read(3 * PAGE) == b"CCCC"
    assert placed.qemu.read(PAGE) == placed.qemu.read(4 * PAGE) == ZEROS
    placed.qemu.write(2 * PAGE, b"wxyz")
    assert os.pread(region.fileno(), 4, PAGE) == b"wxyz"
    os.pwrite(region.fileno(), b"live", PAGE)
    assert placed.qemu.read(2 * PAGE) == b"live"


@pytest.mark.parametrize("how", ["same", "read-only", "sealed"])
def test_a_region_mapped_for_reading_is_live_and_writes_to_it_reach_nobody(
    placed: Device, region: Fd, how: str
) -> None:
    given = region.dup()
    if how == "read-only":
        given.close()
        given = Fd(os.open(f"/proc/self/fd/{region.fileno()}", os.O_RDONLY | os.O_CLOEXEC))
    view = mmap.mmap(region.fileno(), 0)
    if how == "sealed":
        fcntl.fcntl(region.fileno(), fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    with given:
        assert placed.channel.map(0, given, length=2 * PAGE, rights=1) == 0
    view[:4] = b"live"
    assert placed.qemu.read(0) == b"live"
    placed.qemu.write(0, b"mine")
    assert placed.qemu.read(0) == b"mine"
    assert view[:4] == b"live"
    view[PAGE : PAGE + 4] = b"more"
    assert placed.qemu.read(PAGE) == b"more"
    view.close()


def test_unmapping_gives_zero_pages_and_touches_no_others(placed: Device, region: Fd) -> None:
    assert placed.channel.map(0, region, length=4 * PAGE) == 0
    placed.qemu.write(4 * PAGE, b"mine")
    assert placed.channel.unmap(PAGE, 2 * PAGE) == 0
    assert [placed.qemu.read(at * PAGE) for at in range(5)] == [b"AAAA", ZEROS, ZEROS, b"DDDD", b"mine"]
    placed.qemu.write(PAGE, b"lost")
    assert os.pread(region.fileno(), 4, PAGE) == b"BBBB"
    assert placed.channel.unmap(0, WINDOW) == 0
    assert all(placed.qemu.read(at) == ZEROS for at in range(0, WINDOW, PAGE))
    assert placed.channel.map(WINDOW - PAGE, region) == 0  # the last page
    assert placed.qemu.read(WINDOW - 4) == b"AAAA"


def test_a_region_can_be_mapped_over_another(placed: Device, region: Fd) -> None:
    assert placed.channel.map(0, region, length=2 * PAGE) == 0
    assert placed.channel.map(PAGE, region, length=2 * PAGE, file_offset=2 * PAGE) == 0
    assert [placed.qemu.read(at * PAGE) for at in range(3)] == [b"AAAA", b"CCCC", b"DDDD"]


def test_a_reader_sees_what_was_or_what_is_and_never_faults(placed: Device, region: Fd) -> None:
    placed.qemu.call("start_reading", 0)
    for _ in range(300):
        assert placed.channel.map(0, region) == 0
        assert placed.channel.unmap(0) == 0
    assert placed.channel.map(0, region) == 0
    assert set(bytes.fromhex(placed.qemu.call("stop_reading"))) <= set(b"\0A")
    assert placed.qemu.read(0) == b"AAAA"


def test_requests_that_do_not_fit_are_refused_and_change_nothing(placed: Device, region: Fd) -> None:
    channel, qemu = placed.channel, placed.qemu
    assert channel.map(0, region) == 0
    before = qemu.call("fds")
    good = {"offset": 0, "length": PAGE, "file_offset": PAGE, "rights": 3}
    for wrong in (
        {"offset": 1},
        {"offset": WINDOW},
        {"offset": (1 << 64) - PAGE},
        {"offset": PAGE, "length": (1 << 64) - PAGE},
        {"length": 0},
        {"length": PAGE + 1},
        {"length": WINDOW + PAGE},
        {"file_offset": 1},
        {"file_offset": 4 * PAGE},
        {"file_offset": 3 * PAGE, "length": 2 * PAGE},
        {"file_offset": 1 << 63},
        {"file_offset": (1 << 63) - PAGE},
        {"file_offset": (1 << 64) - PAGE},
        {"rights": 0},
        {"rights": 4},
        {"rights": 7},
        {"status": 1},
    ):
        assert channel.ask(PacketType.MAP, [region], **{**good, **wrong}) == errno.EINVAL, wrong
    for wrong in (
        {"offset": 1},
        {"length": 0},
        {"length": WINDOW + PAGE},
        {"offset": WINDOW},
        {"file_offset": PAGE},
        {"rights": 1},
        {"status": 1},
    ):
        assert channel.ask(PacketType.UNMAP, **{"offset": 0, "length": PAGE, **wrong}) == errno.EINVAL, wrong
    assert channel.ask(PacketType.UNMAP, [region], offset=0, length=PAGE) == errno.EINVAL
    for count in (0, 2, 3, 250):
        assert channel.ask(PacketType.MAP, [region] * count, **good) == errno.EINVAL, count
    assert qemu.read(0) == b"AAAA"
    assert qemu.call("fds") == before


def test_what_could_shrink_is_no_region(placed: Device, region: Fd, folder: Path) -> None:
    channel = placed.channel
    assert channel.map(0, region) == 0
    read, write = (Fd(number) for number in os.pipe())
    file = Fd(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC))
    os.ftruncate(file.fileno(), WINDOW)
    unsealed, other_seal = sealed(WINDOW, seals=0), sealed(WINDOW, seals=fcntl.F_SEAL_GROW)
    fds = [read, write, file, unsealed, other_seal]
    for fd in fds:
        assert channel.map(0, fd) == errno.EPERM
    close_all(fds)
    assert placed.qemu.read(0) == b"AAAA"


def test_what_the_kernel_does_not_allow_is_refused_with_its_errno(placed: Device, region: Fd) -> None:
    assert placed.channel.map(0, region) == 0
    with Fd(os.open(f"/proc/self/fd/{region.fileno()}", os.O_RDONLY | os.O_CLOEXEC)) as readable:
        assert placed.channel.map(0, readable) == errno.EACCES
    fcntl.fcntl(region.fileno(), fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    assert placed.channel.map(0, region) == errno.EPERM
    assert placed.qemu.read(0) == b"AAAA"
    assert placed.channel.map(0, region, rights=1) == 0


def test_no_descriptor_stays_behind(placed: Device, region: Fd) -> None:
    before = placed.qemu.call("fds")
    for _ in range(50):
        assert placed.channel.map(0, region) == 0
        assert placed.channel.map(0, region, rights=1) == 0
        assert placed.channel.map(0, region, rights=0) == errno.EINVAL
        assert placed.channel.unmap(0) == 0
    assert placed.qemu.call("fds") == before


def test_descriptors_that_get_lost_are_told(placed: Device, region: Fd) -> None:
    before = placed.qemu.call("fds")
    placed.qemu.call("allow_files", False)
    assert placed.channel.map(0, region) == errno.EMFILE
    placed.qemu.call("allow_files", True)
    assert placed.channel.map(0, region) == 0
    assert placed.qemu.call("fds") == before


def test_hello_that_finds_no_descriptor_free_can_be_said_again(device: Device, placeholder: Fd) -> None:
    device.qemu.call("allow_files", False)
    assert device.channel.hello(placeholder) == errno.EMFILE
    device.qemu.call("allow_files", True)
    assert device.channel.hello(placeholder) == 0


# The end of a channel


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        bytes(39),
        bytes(40),
        Packet(type=PacketType.UNMAP, length=PAGE).pack() + b"x",
        bytes(4000),
        Packet(type=PacketType.UNMAP, version=2, length=PAGE).pack(),
        Packet(type=0x8003).pack(),
        Packet(type=0xFFFF).pack(),
    ],
)
def test_a_packet_that_is_no_request_ends_the_channel_and_nothing_else(
    placed: Device, sockets: Sockets, region: Fd, data: bytes
) -> None:
    qemu = placed.qemu
    assert placed.channel.map(0, region) == 0
    before = qemu.call("fds")
    placed.channel.send(data, [region])
    assert placed.channel.ended()
    assert len(qemu.call("fds")) == len(before) - 1  # the channel's socket
    assert qemu.read(0) == b"AAAA"
    qemu.write(PAGE, b"mine")
    assert re.fullmatch(r"ism-agent: .* no request \(\d+ bytes\); the map channel ends\n", qemu.errors())
    with sealed(WINDOW) as another:
        Device(sockets, qemu).place(another)


def test_an_empty_packet_is_the_end_and_its_descriptors_are_closed(placed: Device, region: Fd) -> None:
    before = placed.qemu.call("fds")
    socket.send_fds(placed.channel.sock, [b""], [region.fileno()])
    assert placed.channel.ended()
    assert len(placed.qemu.call("fds")) == len(before) - 1


@pytest.mark.parametrize("when", ["before HELLO", "before the mapping", "after"])
def test_the_end_of_the_manager_leaves_what_is_mapped(device: Device, placeholder: Fd, region: Fd, when: str) -> None:
    if when == "before HELLO":
        device.channel.end()
        device.give_bar(placeholder)
        assert device.qemu.call("map_bar", WINDOW) == 0
        assert device.qemu.read(0) == b"\xaa" * 4
    elif when == "before the mapping":
        device.announce(placeholder)
        device.channel.end()
        assert device.qemu.call("map_bar", WINDOW) == 0
        assert device.qemu.read(0) == b"\xaa" * 4
    else:
        device.place(placeholder)
        assert device.channel.map(0, region) == 0
        device.channel.end()
        device.qemu.write(0, b"wxyz")
        assert os.pread(region.fileno(), 4, 0) == b"wxyz"
        assert device.qemu.read(PAGE) == ZEROS
        assert device.qemu.call("unmap", 0, WINDOW) == 0
    assert device.qemu.errors() == ""


def asking_ends(channel: Channel, region: Fd) -> bool:
    """Whether a channel that its window left is over for the manager."""
    assert channel.ended()
    with pytest.raises(Exception, match="closed the connection"):
        channel.map(0, region)
    return True


@pytest.mark.parametrize(("offset", "length"), [(0, WINDOW), (0, PAGE), (WINDOW - PAGE, PAGE), (3 * PAGE, 1)])
def test_unmapping_the_window_ends_its_channel(placed: Device, region: Fd, offset: int, length: int) -> None:
    assert placed.channel.map(0, region, length=4 * PAGE) == 0
    before = placed.qemu.call("fds")
    assert placed.qemu.call("unmap", offset, length) == 0
    assert asking_ends(placed.channel, region)
    until(lambda: len(placed.qemu.call("fds")) == len(before) - 1)  # its thread closes it a moment after the end
    assert placed.qemu.errors() == ""


def test_unmapping_around_the_window_is_noticed_too(placed: Device, region: Fd) -> None:
    assert placed.qemu.call("unmap", -PAGE, 2 * PAGE) == 0
    assert asking_ends(placed.channel, region)


def test_mapping_something_over_the_window_ends_its_channel_and_stays(placed: Device, region: Fd) -> None:
    placed.qemu.call("map_over", PAGE, PAGE)
    placed.qemu.write(PAGE, b"mine")
    assert asking_ends(placed.channel, region)
    assert placed.qemu.read(PAGE) == b"mine"


def test_what_happens_beside_the_window_does_not_matter(placed: Device, region: Fd) -> None:
    placed.qemu.call("unmap", WINDOW, PAGE)
    placed.qemu.call("unmap", -PAGE, PAGE)
    placed.qemu.call("unmap", 0, 0)
    placed.qemu.call("map_elsewhere")
    assert placed.channel.map(0, region) == 0


def test_only_the_window_that_is_unmapped_is_dropped(sockets: Sockets, qemu: Qemu, region: Fd) -> None:
    one, two = Device(sockets, qemu), Device(sockets, qemu)
    with sealed(WINDOW) as first, sealed(WINDOW) as second:
        assert one.channel.hello(first) == 0
        two.place(second)
        two.give_bar(first)
        assert qemu.call("map_bar", WINDOW, 0, mmap.MAP_SHARED, "mmap64", False) == 0
        assert qemu.call("unmap", 0, WINDOW) == 0
        assert asking_ends(two.channel, region)
        assert one.channel.map(0, region) == 0


def test_a_device_that_is_unplugged_while_the_manager_does_not_read_ends_its_channel(placed: Device) -> None:
    placed.channel.sock.settimeout(0)
    with pytest.raises(BlockingIOError):  # noqa: PT012 - at some point both directions are full
        while True:
            placed.channel.sock.send(Packet(type=PacketType.UNMAP, length=PAGE).pack())
    assert placed.qemu.call("unmap", 0, WINDOW) == 0
    placed.channel.sock.settimeout(60)
    assert placed.channel.ended()


def test_a_forked_child_does_not_hold_the_channel(placed: Device, region: Fd) -> None:
    ours = [link for link in placed.qemu.call("fds") if link.startswith("socket:")]
    inherited = [link for link in placed.qemu.call("fork") if link.startswith("socket:")]
    assert len(inherited) == len(ours) - 1
    assert placed.channel.map(0, region) == 0
    assert placed.qemu.read(0) == b"AAAA"
    placed.qemu.process.kill()
    assert placed.channel.ended()
    with pytest.raises(BlockingIOError):
        placed.connection.recv(1, socket.MSG_DONTWAIT)  # the child lives


# The introduction, for the manager


@pytest.mark.parametrize(
    "data",
    [
        b"",
        INTRODUCTION[:-1],
        INTRODUCTION + b"\0",
        bytes(40),
        Packet(type=PacketType.HELLO).pack(),
        Packet(type=PacketType.INTRODUCE, version=2).pack(),
        Packet(type=PacketType.INTRODUCE, sequence=1).pack(),
        Packet(type=PacketType.INTRODUCE, offset=1).pack(),
        Packet(type=PacketType.INTRODUCE, status=1).pack(),
        Packet(type=PacketType.INTRODUCE | 0x8000).pack(),
    ],
)
def test_anything_else_is_no_introduction(data: bytes) -> None:
    with pytest.raises(MalformedMessageError) as caught:
        map_channel_wire.parse_introduction(data)
    assert caught.value.fatal


def test_an_introduction_is_no_request() -> None:
    with pytest.raises(MalformedMessageError) as caught:
        map_channel_wire.check_request(Packet(type=PacketType.INTRODUCE), 0, None)
    assert caught.value.errno == errno.ENOSYS


# The builder


def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = agent_library()
    assert made.parent == tmp_path / "ism"
    assert re.fullmatch(r"agent-[0-9a-f]{16}\.so", made.name)
    assert made.stat().st_mode & 0o7777 == 0o644
    assert os.listdir(made.parent) == [made.name]
    monkeypatch.setenv("PATH", "")
    assert agent_library() == made
    assert agent_library(made.parent) == made


def test_a_library_that_is_missing_or_that_others_can_write_to_is_built_again(tmp_path: Path) -> None:
    made = agent_library(tmp_path)
    content = made.read_bytes()
    made.write_bytes(b"")
    made.chmod(0o666)
    assert agent_library(tmp_path).read_bytes()[:4] == content[:4] == b"\x7fELF"
    assert made.stat().st_mode & 0o7777 == 0o644
    made.unlink()
    assert agent_library(tmp_path).exists()
    made.rename(tmp_path / "elsewhere")
    made.symlink_to(tmp_path / "elsewhere")
    assert not agent_library(tmp_path).is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_library_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    made = agent_library(tmp_path)
    os.chown(made, 1, 1)
    assert agent_library(tmp_path).stat().st_uid == 0
    os.chown(tmp_path, 1, 1)
    with pytest.raises(AgentBuildError, match="belongs to somebody else"):
        agent_library(tmp_path)


def test_a_cache_others_can_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(AgentBuildError, match="XDG_CACHE_HOME"):
        agent_library(tmp_path)


@pytest.mark.parametrize("name", ["a b", "a:b"])
def test_a_cache_that_ld_preload_cannot_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AgentBuildError, match="LD_PRELOAD"):
        agent_library(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AgentBuildError, match=r"file/below.*Not a directory"):
        agent_library(tmp_path / "file" / "below")


def test_the_cache_is_in_the_home_directory_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert agent_library().parent == tmp_path / ".cache" / "ism"


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AgentBuildError, match="apt-get install gcc libc6-dev"):
        agent_library(tmp_path / "cache")
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(AgentBuildError, match=r"'no-such-compiler'.*apt-get install gcc libc6-dev"):
        agent_library(tmp_path / "cache")


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "agent.c"
    broken.write_text("int answer(void) { return forty_two; }\n")
    monkeypatch.setattr(agent, "SOURCE", broken)
    with pytest.raises(AgentBuildError, match="forty_two") as caught:
        agent_library(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "cache") == []


def test_cc_may_have_arguments_and_each_source_has_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compiler()
    assert found is not None
    monkeypatch.setenv("CC", f"{shutil.which('env')} {found}")
    one = agent_library(tmp_path)
    changed = tmp_path / "agent.c"
    changed.write_bytes(agent.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(agent, "SOURCE", changed)
    assert agent_library(tmp_path) != one


def test_a_compiler_that_cannot_be_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "cc"
    program.write_bytes(b"no program")
    program.chmod(0o755)
    monkeypatch.setenv("CC", str(program))
    with pytest.raises(AgentBuildError, match="cannot be run"):
        agent_library(tmp_path / "cache")


def test_the_builder_loads_neither_trio_nor_numba() -> None:
    code = "import sys, ism.vmm.agent; sys.exit(bool({'trio', 'numba'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
