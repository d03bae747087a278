# SPDX-License-Identifier: Apache-2.0
"""The small parts of the host side, each on real descriptors: vectors, DMA maps, seals, run directory."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from ism.device.contract import READ_WRITE, GuestMemoryError, Memory
from ism.errors import ConfigError, RemoteProtocolError, TransportError
from ism.ids import DevId, Gid, Token
from ism.manager import dma
from ism.manager.config import SocketConfig
from ism.manager.control import MAX_REQUEST_BYTES, decode_request, encode_line, request
from ism.manager.dma import GuestRam
from ism.manager.doorbells import FanOut, Wish, wish
from ism.manager.memories import Memories, TrappedWindow
from ism.manager.metered import MeteredRegistry
from ism.manager.quota import Quota, TokenBucket
from ism.manager.registry import DomainRegistry
from ism.manager.sockets import RunDirectory, listen
from ism.manager.vectors import Intx, Vectors, check_eventfds, is_eventfd
from ism.memory import create_memfd, memfd_seals
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd
from ism.virtio.ism_spec import Ack, Permission

PAGE = 4096
A, B, C = DevId(1), DevId(2), DevId(3)
PLENTY = Quota(bytes=1 << 30, regions=100, attachments=100)
FULL = (1 << 64) - 2


def eventfd() -> Fd:
    return Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


# -- interrupts


def test_a_full_eventfd_whose_owner_made_it_blocking_does_not_stop_the_manager() -> None:
    vectors = Vectors(1)
    with eventfd() as fd:
        vectors.set(0, [fd.dup()])
        os.eventfd_write(fd.fileno(), FULL)
        os.set_blocking(fd.fileno(), True)
        thread = threading.Thread(target=vectors.signal, args=(0,), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        assert os.eventfd_read(fd.fileno()) >= FULL
        vectors.clear()


def test_only_eventfds_are_taken_for_interrupts(tmp_path: Path) -> None:
    with eventfd() as good, Fd(os.open(tmp_path, os.O_RDONLY)) as bad:
        check_eventfds([good])
        assert is_eventfd(good.fileno())
        with pytest.raises(VfioUserError) as caught:
            check_eventfds([good, bad])
        assert caught.value.errno == errno.EINVAL
    assert not is_eventfd(-1)


def test_an_interrupt_before_its_eventfd_is_raised_when_that_comes() -> None:
    vectors = Vectors(4)
    assert not vectors
    vectors.signal(2)
    vectors.signal(99)
    with eventfd() as copy:
        vectors.set(1, [eventfd(), copy.dup(), eventfd()])
        assert os.eventfd_read(copy.fileno()) == 1
        vectors.signal(2)
        assert os.eventfd_read(copy.fileno()) == 1
        assert vectors.get(2) is vectors.get(2)
        vectors.unset(2, 1)
        assert vectors.get(2) is None
        vectors.signal(2)
        vectors.clear()
        vectors.set(2, [copy.dup()])
        with pytest.raises(BlockingIOError):
            os.eventfd_read(copy.fileno())
        vectors.clear()


def test_inta_is_masked_by_each_interrupt_until_it_is_unmasked() -> None:
    intx = Intx()
    intx.signal()
    with eventfd() as copy:
        intx.set(copy.dup())
        intx.signal()
        intx.signal()
        assert os.eventfd_read(copy.fileno()) == 1
        intx.unmask(asserted=False)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(copy.fileno())
        intx.mask()
        intx.signal()
        intx.unmask(asserted=True)
        assert os.eventfd_read(copy.fileno()) == 1
        intx.set(None)


# -- DMA


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    made = GuestRam()
    yield made
    made.clear()


def memfd(pages: int = 4, *, flags: int = os.MFD_ALLOW_SEALING) -> Fd:
    fd = Fd(os.memfd_create("guest", os.MFD_CLOEXEC | flags))
    os.ftruncate(fd.fileno(), pages * PAGE)
    return fd


def test_guest_memory_is_read_and_written_in_place(ram: GuestRam) -> None:
    with memfd() as fd:
        ram.add(0x10000, 2 * PAGE, fd.dup(), PAGE, readable=True, writable=True)
        os.pwrite(fd.fileno(), b"abcdef", PAGE)
        assert ram.read(0x10000, 6) == b"abcdef"
        assert ram.read(0x10000, 0) == b""
        ram.write(0x10002, b"XY")
        assert os.pread(fd.fileno(), 6, PAGE) == b"abXYef"
        ram.write_u16(0x10100, 0x1234)
        assert ram.read_u16(0x10100) == 0x1234
        assert os.pread(fd.fileno(), 2, PAGE + 0x100) == b"\x34\x12"
        assert memfd_seals(fd.fileno()) & fcntl.F_SEAL_SHRINK


def test_an_access_may_span_adjacent_maps_of_different_files_and_parts(
    ram: GuestRam, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dma, "PART_BYTES", PAGE)
    monkeypatch.setattr(dma, "MAX_PARTS", 2)
    with memfd() as one, memfd() as two:
        ram.add(0, 3 * PAGE, one.dup(), 0, readable=True, writable=True)
        ram.add(3 * PAGE, PAGE, two.dup(), 2 * PAGE, readable=True, writable=True)
        data = bytes(range(256)) * 64
        ram.write(0, data)
        assert ram.read(0, 4 * PAGE) == data
        assert os.pread(two.fileno(), PAGE, 2 * PAGE) == data[3 * PAGE :]
        assert ram.read(PAGE - 3, PAGE + 6) == data[PAGE - 3 : 2 * PAGE + 3]


@pytest.mark.parametrize("address", [0xFFFF, 0x12000, 0, (1 << 64) - 1])
def test_an_address_outside_the_maps_is_an_error_and_not_a_fault(ram: GuestRam, address: int) -> None:
    with memfd() as fd:
        ram.add(0x10000, 2 * PAGE, fd.dup(), 0, readable=True, writable=True)
    for access in (lambda: ram.read(address, 2), lambda: ram.write(address, b"xy"), lambda: ram.read_u16(address)):
        with pytest.raises(GuestMemoryError):
            access()
    with pytest.raises(GuestMemoryError):
        ram.read(0x11FFF, 2)
    with pytest.raises(GuestMemoryError):
        ram.read_u16(0x10001)


def test_the_rights_of_a_map_hold_and_so_does_their_absence_after_a_first_hit(ram: GuestRam) -> None:
    with memfd() as fd:
        ram.add(0, PAGE, fd.dup(), 0, readable=True, writable=True)
        ram.add(PAGE, PAGE, fd.dup(), PAGE, readable=True, writable=False)
        ram.add(2 * PAGE, PAGE, fd.dup(), 2 * PAGE, readable=False, writable=True)
    ram.add(3 * PAGE, PAGE, None, 0, readable=True, writable=True)
    ram.write(0, b"x")
    ram.read(PAGE, 1)
    for access in (
        lambda: ram.write(PAGE, b"x"),
        lambda: ram.write(PAGE - 1, b"xx"),
        lambda: ram.read(2 * PAGE, 1),
        lambda: ram.read(3 * PAGE, 1),
        lambda: ram.write(3 * PAGE, b"x"),
    ):
        with pytest.raises(GuestMemoryError):
            access()
    ram.remove(0, PAGE)
    with pytest.raises(GuestMemoryError):
        ram.write(0, b"x")


def test_what_is_no_safe_memory_file_is_refused_and_stays_the_callers(ram: GuestRam) -> None:
    pipe = os.pipe()
    fixed = memfd(flags=0)
    sealed = memfd()
    fcntl.fcntl(sealed.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    readonly = Fd(os.open(f"/proc/self/fd/{fixed.fileno()}", os.O_RDONLY))
    cases = [
        (Fd(pipe[0]), errno.EINVAL),
        (Fd(pipe[1]), errno.EINVAL),
        (Fd(os.open("/dev/zero", os.O_RDWR)), errno.EINVAL),
        (eventfd(), errno.EINVAL),
        (fixed, errno.EPERM),
        (sealed, errno.EACCES),
        (readonly, errno.EACCES),
        (memfd(pages=1), errno.EINVAL),
    ]
    for fd, number in cases:
        with fd, pytest.raises(VfioUserError) as caught:
            ram.add(0, 4 * PAGE, fd, 0, readable=True, writable=True)
        assert caught.value.errno == number
    assert not list(ram._maps)
    assert not ram._files


def test_many_maps_of_one_file_keep_one_descriptor(ram: GuestRam) -> None:
    with memfd(pages=256) as fd:
        before = len(os.listdir("/proc/self/fd"))
        for page in range(256):
            ram.add(page * 2 * PAGE, PAGE, fd.dup(), page * PAGE, readable=True, writable=True)
        assert len(os.listdir("/proc/self/fd")) == before + 1
        with pytest.raises(VfioUserError):
            ram.add(0, PAGE, None, 0, readable=True, writable=True)
        for page in range(256):
            ram.remove(page * 2 * PAGE, PAGE)
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_has_grown_can_be_mapped_further(ram: GuestRam) -> None:
    with memfd(pages=1) as fd:
        ram.add(0, PAGE, fd.dup(), 0, readable=True, writable=True)
        ram.write(0, b"old")
        os.ftruncate(fd.fileno(), 2 * PAGE)
        ram.add(PAGE, PAGE, fd.dup(), PAGE, readable=True, writable=True)
        ram.write(PAGE, b"new")
        assert ram.read(0, 3) == b"old"
        assert os.pread(fd.fileno(), 3, PAGE) == b"new"


# -- memory of regions


def test_a_seal_waits_for_writers_under_way_and_keeps_the_managers_own_mapping() -> None:
    memories = Memories()
    memory = Memory(create_memfd("region", PAGE), PAGE)
    assert memories.may_share_readonly(memory)
    memories.writer_begins(memory)
    memories.writer_begins(memory)
    memories.require_seal(memory)
    assert not memories.may_share_readonly(memory)
    memories.writer_ends(memory)
    assert not memories.may_share_readonly(memory)
    memories.writer_ends(memory)
    assert memories.may_share_readonly(memory)
    assert memfd_seals(memory.fd) & 0x10
    memories.view(memory)[:3] = b"abc"
    assert os.pread(memory.fd, 3, 0) == b"abc"
    with pytest.raises(PermissionError):
        mmap.mmap(memory.fd, PAGE)


async def test_waiting_for_writers_ends_with_the_last_one() -> None:
    memories = Memories()
    memory = Memory(create_memfd("region", PAGE), PAGE)
    memories.writer_begins(memory)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(memories.wait_writers_gone, memory)
            await trio.testing.wait_all_tasks_blocked()
            memories.writer_ends(memory)


def domain(*devids: DevId) -> DomainRegistry:
    registry = DomainRegistry(Gid(1), PAGE)
    for devid in devids:
        registry.add_device(devid, 16 * PAGE, PLENTY)
    return registry


def shared_region(registry: DomainRegistry, *peers: DevId, rights: int = 3) -> Token:
    token = Token(registry.alloc(A, 2 * PAGE, 1).token)
    registry.grant_default(A, token, int(READ_WRITE | Permission.ATTACH))
    for peer in peers:
        assert registry.attach(peer, token, rights, 1).ack == Ack.OK
    return token


def test_trapped_accesses_see_the_region_its_rights_and_zeros_elsewhere() -> None:
    registry, memories = domain(A, B), Memories()
    token = shared_region(registry)
    registry.alloc(B, PAGE, 1)
    assert registry.attach(B, token, 1, 1).ack == Ack.OK
    owner, reader = TrappedWindow(registry, A, memories), TrappedWindow(registry, B, memories)
    owner.write(PAGE - 4, b"12345678")
    assert reader.read(2 * PAGE - 4, 8) == b"12345678"
    reader.write(2 * PAGE - 4, b"hostile!")
    assert owner.read(PAGE - 4, 8) == b"12345678"
    owner.write(8, (0x1122334455667788).to_bytes(8, "little"))
    for size in (1, 2, 4, 8, 3):
        assert reader.read(PAGE + 8, size) == (0x1122334455667788).to_bytes(8, "little")[:size]
    owner.write(2 * PAGE - 2, b"abcd")
    assert owner.read(2 * PAGE - 2, 4) == b"ab\0\0"
    assert owner.read(10 * PAGE, 3) == bytes(3)
    registry.grant_default(A, token, 0)
    assert reader.read(PAGE + 8, 8) == bytes(8)


# -- doorbells


class Peer:
    """A connected device with an eventfd for some vectors."""

    def __init__(self, fds: dict[int, Fd]) -> None:
        self.fds = fds

    def exclusive_eventfd(self, vector: int) -> Fd | None:
        return self.fds.get(vector)

    def rewire(self, token: Token) -> None:
        raise AssertionError


def test_who_rings_whom_by_which_eventfd() -> None:
    registry = domain(A, B, C)
    token = shared_region(registry)
    with eventfd() as fd:
        devices = {A: Peer({}), B: Peer({5: fd}), C: Peer({})}
        assert wish(registry, devices, A, token) is None
        registry.alloc(B, PAGE, 1)
        registry.attach(B, token, 3, 1)
        assert wish(registry, devices, A, token) is None
        registry.event_vector(B, token, 5)
        registry.event_vector(A, token, 6)
        assert wish(registry, devices, A, token) == Wish(0, fd)
        assert wish(registry, devices, B, token) == Wish(1, None)
        registry.attach(C, token, 3, 1)
        assert wish(registry, devices, A, token) == Wish(0, None)
        registry.detach(C, token)
        assert wish(registry, devices, A, token) == Wish(0, fd)
        assert wish(registry, devices, C, token) is None
        assert wish(registry, {}, A, token) == Wish(0, None)
        assert wish(registry, devices, A, Token(token ^ 1)) is None


async def test_each_write_to_a_fan_out_eventfd_rings_though_nobody_reads_it() -> None:
    fan_out = FanOut()
    rung: list[str] = []
    one, two = fan_out.open(lambda: rung.append("one")), fan_out.open(lambda: rung.append("two"))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fan_out.run)
            for expected in (["one"], ["one", "one"], ["one", "one", "two"]):
                os.eventfd_write((one if expected[-1] == "one" else two).fileno(), 1)
                await trio.testing.wait_all_tasks_blocked()
                assert rung == expected
            with one.dup() as client:
                fan_out.forget(one)
                os.eventfd_write(client.fileno(), 1)
                await trio.testing.wait_all_tasks_blocked()
            assert len(rung) == 3
            assert len(fan_out) == 1
            nursery.cancel_scope.cancel()
    fan_out.forget(two)
    fan_out.close()


# -- commands a second


def test_over_the_rate_commands_are_refused_but_what_gives_back_is_not() -> None:
    now = [0.0]
    registry = domain(A, B)
    metered = MeteredRegistry(registry, TokenBucket(4), lambda: now[0])
    tokens = [Token(metered.alloc(A, PAGE, 1).token) for _ in range(4)]
    assert metered.alloc(A, PAGE, 1).ack == Ack.ENOMEM
    assert metered.attach(A, tokens[0], 0, 1).ack == Ack.ENOMEM
    assert metered.grant_default(A, tokens[0], 0).ack == Ack.ENOMEM
    assert metered.grant_device(A, tokens[0], 0, B).ack == Ack.ENOMEM
    assert metered.event_vector(A, tokens[0], 1).ack == Ack.ENOMEM
    assert metered.over_rate == 5
    assert metered.detach(A, tokens[0]).ack == Ack.OK
    now[0] = 0.3
    assert metered.alloc(A, PAGE, 1).ack == Ack.OK
    assert metered.reset(A)


# -- control protocol


def test_a_control_request_survives_the_round_trip() -> None:
    assert decode_request(encode_line({"op": "status", "tokens": True})) == {"op": "status", "tokens": True}


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]", b"1", b'{"op": 1}', b'{"x": "status"}', b"\xff", b"[" * 4000, b"NaN"]
)
def test_a_bad_control_request_is_named_bad(line: bytes) -> None:
    assert len(line) <= MAX_REQUEST_BYTES
    with pytest.raises(RemoteProtocolError, match="request is not"):
        decode_request(line)


def test_asking_where_no_manager_is_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="run `ism manager`"):
        request(tmp_path / "control.sock", "status")


# -- run directory and sockets


def test_a_run_directory_is_made_private_and_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a" / "ism"
    first = RunDirectory(path)
    assert path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(TransportError, match="already running"):
        RunDirectory(path)
    first.close()
    first.close()
    RunDirectory(path).close()


def test_a_run_directory_that_others_could_change_is_refused(tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    with pytest.raises(TransportError, match="made with mode 0700"):
        RunDirectory(loose)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TransportError):
        RunDirectory(link)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(TransportError):
        RunDirectory(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a directory of somebody else")
def test_a_run_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o700)
    os.chown(foreign, 12345, 12345)
    with pytest.raises(TransportError, match="belongs to uid 12345"):
        RunDirectory(foreign)


def test_a_socket_gets_its_mode_and_an_unknown_owner_is_a_configuration_error(tmp_path: Path) -> None:
    listener = listen(SocketConfig(tmp_path / "s.sock", mode=0o660, group=str(os.getegid())), "f")
    assert (tmp_path / "s.sock").stat().st_mode & 0o777 == 0o660
    listener.close()
    with pytest.raises(ConfigError, match=r"device\[0\]\.socket_owner: no such user"):
        listen(SocketConfig(tmp_path / "t.sock", user="nobody-has-this-name", key="device[0]"), "f")
    assert not (tmp_path / "t.sock").exists()
