# SPDX-License-Identifier: Apache-2.0
"""A hostile driver: random register accesses, random rings, random commands.

Whatever it does, calls return the documented kinds of values, work is bounded, and a neighbour is not affected except
through what the two share.
"""

from __future__ import annotations

import struct

from device_rig import BOTH, CHUNK, RAM_BASE, RAM_SIZE, Driver, Host, Ring
from hypothesis import given, settings
from hypothesis import strategies as st

from ism.device.contract import Interrupt, MapChunks, PostEvent, SealWrites, UnmapChunks, WiringChanged
from ism.device.function import COUNTERS, Request, Work
from ism.virtio.ism_spec import Ack, IsmFeature
from ism.virtio.pci import Status

EFFECTS = (MapChunks, UnmapChunks, SealWrites, Interrupt, PostEvent, WiringChanged)
EXAMPLES = settings(max_examples=150, deadline=None)

offsets = st.one_of(
    st.integers(0, 64),
    st.integers(0x0FF8, 0x1008),
    st.integers(0x1FF8, 0x2028),
    st.integers(0x2FF8, 0x3010),
    st.integers(0, 0x4010),
    st.integers(0, 1 << 64),
)
access = st.tuples(
    st.sampled_from(["bar_read", "bar_write", "config_read", "config_write"]),
    st.integers(0, 6),
    st.one_of(offsets, st.integers(0, 260)),
    st.one_of(st.sampled_from([1, 2, 4, 8]), st.integers(0, 70)),
    st.binary(min_size=70, max_size=70),
)
register_values = st.sampled_from([0, 1, 2, 4, 8, 0x0B, 0x0F, 0x40, 0x80, 0xFF, 0x3000, 0xFFFF])


def check(work: Work) -> None:
    assert isinstance(work, Work)
    assert all(isinstance(effect, EFFECTS) for effect in work.effects)
    assert all(isinstance(request, Request) for request in work.requests)
    assert len(work.requests) <= 64


def neighbour(host: Host) -> tuple[Driver, int]:
    """A device that holds a region of its own; returns it and the region's token."""
    driver = host.add(8).start()
    token, _ = driver.alloc(CHUNK)
    host.take_raised()
    return driver, token


def unaffected(host: Host, driver: Driver, token: int) -> None:
    assert not driver.status & Status.NEEDS_RESET
    assert [m.memory.size for m in host.windows[8].values()] == [CHUNK]
    assert not any(devid == 8 for devid, _ in host.raised)
    assert driver.bind(token, 1) == Ack.OK
    assert driver.function.stats["malformed_queues"] == 0


@EXAMPLES
@given(st.booleans(), st.lists(access, max_size=40))
def test_random_register_accesses_have_documented_results(started: bool, accesses: list[tuple]) -> None:
    host = Host()
    peer, token = neighbour(host)
    driver = host.add(7)
    if started:
        driver.start()
        driver.alloc(CHUNK)
    function = driver.function
    for verb, bar, offset, n, data in accesses:
        driver.ram.accesses = 0
        if verb == "bar_read":
            assert len(function.bar_read(bar, offset, n)) == n
        elif verb == "config_read":
            assert len(function.config_read(offset, n)) == n
        else:
            if verb == "bar_write":
                work = function.bar_write(bar, offset, data[:n])
            else:
                work = function.config_write(offset, data[:n])
            check(work)
            host.do(function, work)
        assert driver.ram.accesses < 70 * 64
    assert function.config_read(0, 4) == b"\xf4\x1a\x6c\x10"
    assert function.bar_read(0, 0x2000, 8) == (0x51).to_bytes(8, "little")
    assert len(function.bar_read(0, 0, 64)) == 64
    assert set(function.stats) == set(COUNTERS)
    unaffected(host, peer, token)
    host.carry_out(function.reset())
    driver.start()
    assert driver.alloc(CHUNK)


@EXAMPLES
@given(st.lists(st.tuples(st.integers(0, 63), register_values), max_size=30))
def test_random_walks_over_common_configuration_keep_the_status_machine(writes: list[tuple[int, int]]) -> None:
    driver = Host().add(7)
    for offset, value in writes:
        before = driver.status
        check(driver.function.bar_write(0, offset, value.to_bytes(2, "little")))
        after = driver.status
        assert after & Status.FEATURES_OK or not after & Status.DRIVER_OK
        if after:
            assert before & after == before or offset in (19, 20)
        if after & Status.FEATURES_OK and not before & Status.FEATURES_OK:
            driver.put("driver_feature_select", 1)
            assert driver.get("driver_feature") & 1


addresses = st.one_of(
    st.integers(RAM_BASE, RAM_BASE + RAM_SIZE - 1),
    st.sampled_from([0, RAM_BASE, RAM_BASE + 0x10000, RAM_BASE + RAM_SIZE - 1, (1 << 64) - 1]),
)
descriptors = st.tuples(
    addresses,
    st.one_of(st.integers(0, 64), st.sampled_from([1, 0xFFFFFFFF, 0x10000])),
    st.one_of(st.integers(0, 3), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)),
)
heads = st.lists(st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)), min_size=1, max_size=10)


@EXAMPLES
@given(
    st.integers(0, 1),
    st.lists(descriptors, min_size=8, max_size=8),
    heads,
    st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)),
    st.binary(max_size=64),
)
def test_random_rings_end_in_used_elements_or_needs_reset(
    which: int, table: list[tuple[int, int, int, int]], ring_heads: list[int], idx: int, junk: bytes
) -> None:
    host = Host()
    peer, token = neighbour(host)
    driver = host.add(7)
    driver.control = Ring(driver.ram, RAM_BASE, 8)
    driver.events = Ring(driver.ram, RAM_BASE + 0x2000, 8)
    driver.start()
    ring = (driver.control, driver.events)[which]
    driver.ram.write(RAM_BASE + 0x10000, junk or b"\0")
    for index, (address, length, flags, following) in enumerate(table):
        ring.set_desc(index, address, length, flags, following)
    for at, head in enumerate(ring_heads):
        driver.ram.write_u16(ring.driver + 4 + 2 * (at % 8), head)
    driver.ram.write_u16(ring.driver + 2, idx)
    driver.ram.accesses = 0
    if which:
        for i in range(3):
            host.carry_out(driver.function.post_event(struct.pack("<QQQQ", 4, i, 8, 1)))
    work = driver.notify(which)
    check(work)
    assert driver.ram.accesses < 8 * (8 + 40)
    host.do(driver.function, work)
    if not driver.status & Status.NEEDS_RESET:
        assert idx <= 8
    unaffected(host, peer, token)
    driver.start()
    assert driver.alloc(CHUNK)


headers = st.one_of(
    st.sampled_from([b"\0\0", b"\1\0", b"\2\0", b"\3\0", b"\3\1", b"\4\0"]),
    st.sampled_from([bytes([0x80, number]) for number in range(8)]),
    st.binary(min_size=2, max_size=2),
)
small_words = st.lists(st.sampled_from([0, 1, 2, 1 << 16, 80 << 48]), min_size=7, max_size=7)


@EXAMPLES
@given(
    st.lists(
        st.tuples(
            headers,
            st.one_of(st.none(), st.sampled_from([0, 1])),
            st.one_of(
                st.binary(max_size=64),
                st.builds(lambda *v: struct.pack("<QQ", *v), st.integers(0, 9000), st.integers(0, 31)),
                st.builds(lambda words: struct.pack("<7Q", *words), small_words),
            ),
            st.one_of(st.integers(1, 40), st.just(1024)),
        ),
        max_size=20,
    )
)
def test_random_commands_get_a_documented_ack_and_an_exact_length(
    commands: list[tuple[bytes, int | None, bytes, int]],
) -> None:
    host = Host()
    peer, token = neighbour(host)
    driver = host.add(7, features=BOTH | {IsmFeature.DIRECTORY}).start()
    own, _ = driver.alloc(CHUNK)
    for header, name, data, capacity in commands:
        body = data if name is None else struct.pack("<Q", (own, token)[name]) + data
        length, reply = driver.command(header + body, capacity)
        assert reply[0] in set(Ack)
        assert 1 <= length <= capacity
        assert reply[length:] == b"\xee" * (capacity - length)
        if reply[0] not in (Ack.OK, Ack.E2BIG):
            assert length == 1
    assert not driver.status & Status.NEEDS_RESET
    unaffected(host, peer, token)
    host.carry_out(driver.function.reset())
    directory = host.registry.directory
    assert not directory.members[7].intents
    assert list(directory.listeners()) == []
