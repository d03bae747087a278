# SPDX-License-Identifier: Apache-2.0
"""Commands against a scripted device: every ack, late, missing, lying and reordered replies, the end."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

import pytest

from ism.driver.control import Command, ControlQueue, Placement, ack_error
from ism.driver.transport import Span
from ism.errors import (
    DeviceError,
    DeviceGoneError,
    LocalProtocolError,
    PermissionDeniedError,
    QuotaError,
    RemoteProtocolError,
    TransportError,
)
from ism.ids import DevId, Token
from ism.testing.scripted import QueueMemory, ScriptedDevice, TakenChain
from ism.virtio.ism_spec import Ack, AllocReply, Area, AttachReply, Permission

PATIENCE_S = 30.0
TOKEN = Token(0x1122334455667788)


def alloc_reply(*areas: tuple[int, int], num: int | None = None, token: int = TOKEN) -> bytes:
    head = AllocReply(token=token, num=len(areas) if num is None else num).pack()
    return bytes([Ack.OK]) + head + b"".join(Area(offset=at, size=size).pack() for at, size in areas)


def attach_reply(*areas: tuple[int, int], num: int | None = None) -> bytes:
    head = AttachReply(num=len(areas) if num is None else num).pack()
    return bytes([Ack.OK]) + head + b"".join(Area(offset=at, size=size).pack() for at, size in areas)


class Rig:
    """A control queue whose device answers, at each notify, by calling `behave` with every chain."""

    def __init__(
        self,
        behave: Callable[[TakenChain], bytes | None] = lambda chain: None,
        *,
        size: int = 64,
        timeout_s: float = 30,
    ) -> None:
        self.behave = behave
        self.memory = QueueMemory()
        self.seen: list[TakenChain] = []
        self.queue = ControlQueue(self.memory, size, self.run, poll=self._poll, timeout_s=timeout_s)
        self.device = ScriptedDevice(self.memory, self.queue.queue)

    def run(self) -> None:
        for chain in self.device.take():
            self.seen.append(chain)
            answer = self.behave(chain)
            if answer is not None:
                self.device.answer(chain, answer)

    def _poll(self) -> None:
        self.queue.reap()


def always(data: bytes) -> Callable[[TakenChain], bytes | None]:
    return lambda chain: data


def test_each_command_has_its_bytes_on_the_wire() -> None:
    rig = Rig(always(bytes([Ack.OK])))
    rig.queue.detach(TOKEN)
    rig.queue.grant(TOKEN, Permission.READ, None)
    rig.queue.grant(TOKEN, Permission.READ | Permission.ATTACH, DevId(7))
    rig.queue.event_vector(TOKEN, 5)
    rig.queue.event_vector(TOKEN, None)
    token = struct.pack("<Q", TOKEN)
    assert [chain.readable for chain in rig.seen] == [
        b"\x02\x00" + token,
        b"\x03\x00" + token + struct.pack("<Q", 1),
        b"\x03\x01" + token + struct.pack("<QQ", 5, 7),
        b"\x04\x00" + token + struct.pack("<Q", 5),
        b"\x04\x00" + token + struct.pack("<Q", 0xFFFF),
    ]


def test_alloc_and_attach_return_the_areas_in_their_order() -> None:
    rig = Rig(always(alloc_reply((65536, 4096), (0, 8192))))
    assert rig.queue.alloc(10000) == Placement(TOKEN, [Span(65536, 4096), Span(0, 8192)])
    rig.behave = always(attach_reply((4096, 4096)))
    placement = rig.queue.attach(TOKEN, Permission.READ)
    assert placement == Placement(TOKEN, [Span(4096, 4096)])
    assert placement.size == 4096
    assert rig.seen[0].readable == b"\x00\x00" + struct.pack("<Q", 10000)
    assert rig.seen[1].readable == b"\x01\x00" + struct.pack("<QI", TOKEN, 1)


@pytest.mark.parametrize(
    ("ack", "kind", "advice"),
    [
        (Ack.ENOENT, DeviceError, "its owner let the region go"),
        (Ack.E2BIG, DeviceError, "more areas than the reply has room for"),
        (Ack.ENOMEM, QuotaError, "detach regions, or raise the limit"),
        (Ack.ENOSPC, QuotaError, "detach regions, or give the device a larger window"),
        (Ack.PERM_EATTACH, PermissionDeniedError, "has not granted ATTACH"),
        (Ack.PERM_EREAD, PermissionDeniedError, "has not granted READ"),
        (Ack.PERM_EWRITE, PermissionDeniedError, "has not granted WRITE"),
        (Ack.ERR, DeviceError, "refused the command"),
    ],
)
def test_every_ack_is_an_error_of_its_own_that_says_what_to_do(ack: Ack, kind: type[DeviceError], advice: str) -> None:
    rig = Rig(always(bytes([ack])))
    for call in (
        lambda: rig.queue.alloc(1),
        lambda: rig.queue.attach(TOKEN, Permission(0)),
        lambda: rig.queue.detach(TOKEN).expect_ok(),
    ):
        with pytest.raises(DeviceError, match=advice) as caught:
            call()
        assert type(caught.value) is kind
        assert (caught.value.ack, caught.value.ack_name) == (ack, ack.name)
    assert caught.value.token == TOKEN
    assert "DETACH_REGION of region 0x1122334455667788" in str(caught.value)


def test_all_256_acks_make_an_error() -> None:
    for ack in range(256):
        error = ack_error("COMMAND", ack)
        assert error.ack == ack
        assert error.ack_name in str(error)


def test_the_negative_codes_of_early_devices_are_told_as_unknown_acks() -> None:
    with pytest.raises(DeviceError, match="ack 249: an ack this driver does not know"):
        Rig(always(bytes([249]))).queue.alloc(1)


def test_a_device_that_writes_no_ack_is_not_taken_for_one_that_agreed() -> None:
    rig = Rig()
    rig.behave = lambda chain: rig.device.give_back(chain.head, 0)
    with pytest.raises(RemoteProtocolError, match="DETACH_REGION: the device wrote no ack"):
        rig.queue.detach(TOKEN).expect_ok()
    rig.behave = lambda chain: rig.device.give_back(chain.head, 1)  # says that it wrote, and did not
    with pytest.raises(DeviceError) as caught:
        rig.queue.detach(TOKEN).expect_ok()
    assert caught.value.ack == 0xFF


@pytest.mark.parametrize(
    "reply",
    [
        bytes([Ack.OK]),
        alloc_reply()[:-1],
        alloc_reply(num=0),
        alloc_reply(num=1),
        alloc_reply((0, 4096), num=2),
        alloc_reply((0, 4096), num=1 << 63),
        alloc_reply((0, 4096))[:-1],
    ],
)
def test_a_reply_that_does_not_hold_what_it_announces_is_a_protocol_error(reply: bytes) -> None:
    rig = Rig(always(reply))
    with pytest.raises(RemoteProtocolError, match="ALLOC_REGION"):
        rig.queue.alloc(4096)


def test_a_region_whose_areas_make_no_sense_is_detached_again() -> None:
    rig = Rig(always(alloc_reply(num=7)))
    with pytest.raises(RemoteProtocolError, match="announces 7 areas"):
        rig.queue.alloc(4096)
    assert rig.seen[-1].readable == b"\x02\x00" + struct.pack("<Q", TOKEN)


def too_big(needed: int) -> bytes:
    return bytes([Ack.E2BIG]) + AllocReply(token=0, num=needed).pack()


def test_too_many_areas_for_a_slot_are_asked_for_again_with_room_for_them() -> None:
    areas = [(2 * 4096 * number, 4096) for number in range(600)]
    rig = Rig(lambda chain: alloc_reply(*areas) if chain.capacity >= 1 + 16 + 16 * 600 else too_big(600))
    assert len(rig.queue.alloc(600 * 4096).areas) == 600
    assert [chain.capacity for chain in rig.seen] == [497, 12288]
    assert len(rig.memory.freed) == 1
    rig.queue.close()
    assert rig.memory.buffers == {}


def test_a_window_that_changes_between_the_tries_is_tried_again_and_not_for_ever() -> None:
    needed = [31]

    def behave(chain: TakenChain) -> bytes:
        needed[0] = (chain.capacity - 17) // 16 + 1
        return too_big(needed[0])

    rig = Rig(behave)
    with pytest.raises(DeviceError, match="E2BIG"):
        rig.queue.alloc(4096)
    assert len(rig.seen) == 8
    assert len(rig.memory.freed) == 7


@pytest.mark.parametrize("needed", [0, 1, 30, (1 << 20) + 1, (1 << 64) - 1])
def test_an_area_count_that_cannot_be_is_a_protocol_error(needed: int) -> None:
    rig = Rig(always(too_big(needed)))
    with pytest.raises(RemoteProtocolError, match="said to be enough"):
        rig.queue.alloc(4096)


def test_e2big_without_a_count_is_the_ack_it_is() -> None:
    with pytest.raises(DeviceError, match="E2BIG"):
        Rig(always(bytes([Ack.E2BIG]))).queue.alloc(4096)


def test_an_answer_that_does_not_come_is_an_error_that_says_how_long() -> None:
    rig = Rig(timeout_s=0.01)
    with pytest.raises(TransportError, match=r"ALLOC_REGION: the device did not answer within 0.01 s"):
        rig.queue.alloc(4096)


def test_a_region_that_comes_when_nobody_waits_any_more_is_given_back() -> None:
    rig = Rig(timeout_s=0.01)
    with pytest.raises(TransportError):
        rig.queue.alloc(4096)
    with pytest.raises(TransportError):
        rig.queue.attach(Token(5), Permission(0))
    alloc, attach = rig.seen
    rig.device.answer(attach, attach_reply((0, 4096)))
    rig.device.answer(alloc, alloc_reply((4096, 4096)))
    rig.queue.reap()
    assert [chain.readable for chain in rig.seen[2:]] == [
        b"\x02\x00" + struct.pack("<Q", 5),
        b"\x02\x00" + struct.pack("<Q", TOKEN),
    ]


def test_a_refusal_that_comes_late_gives_nothing_back() -> None:
    rig = Rig(timeout_s=0.01)
    with pytest.raises(TransportError):
        rig.queue.alloc(4096)
    rig.device.answer(rig.seen[0], bytes([Ack.ENOMEM]))
    rig.queue.reap()
    assert len(rig.seen) == 1


def test_a_reply_buffer_that_the_device_may_still_write_to_is_kept_until_the_end() -> None:
    rig = Rig(lambda chain: too_big(100) if chain.capacity < 1000 else None, timeout_s=0.05)
    with pytest.raises(TransportError):
        rig.queue.alloc(4096)
    assert rig.memory.freed == []
    rig.device.answer(rig.seen[1], alloc_reply(*[(8192 * number, 4096) for number in range(100)]))
    rig.queue.reap()
    assert rig.seen[2].readable[0] == 2
    rig.queue.close()
    rig.queue.close()
    assert len(rig.memory.freed) == 2
    assert rig.memory.buffers == {}


def test_replies_find_their_commands_in_whatever_order_they_come() -> None:
    rig = Rig()
    commands = [rig.queue.detach(Token(number)) for number in range(32)]
    for number, chain in enumerate(reversed(rig.seen)):
        rig.device.answer(chain, bytes([Ack.OK if number % 2 else Ack.ENOENT]))
    rig.queue.reap()
    for number, command in enumerate(reversed(commands)):
        assert command.done
        assert command.wait() == bytes([Ack.OK if number % 2 else Ack.ENOENT])


def test_a_detach_waits_in_line_and_not_in_the_caller_when_all_chains_are_busy() -> None:
    rig = Rig(size=4, timeout_s=0.01)
    commands = [rig.queue.detach(Token(number)) for number in range(5)]
    assert len(rig.seen) == 2
    with pytest.raises(TransportError, match="2 commands are under way"):
        rig.queue.alloc(1)
    while len(rig.seen) < 5:
        answered = len(rig.seen)
        for chain in rig.seen[-2:]:
            if chain not in rig.seen[:-2]:
                rig.device.answer(chain, bytes([Ack.OK]))
        rig.queue.reap()
        assert len(rig.seen) > answered
    assert [struct.unpack_from("<Q", chain.readable, 2)[0] for chain in rig.seen] == [0, 1, 2, 3, 4]
    rig.device.answer(rig.seen[-1], bytes([Ack.OK]))
    rig.queue.reap()
    assert all(command.done for command in commands)


def test_a_lost_device_ends_commands_under_way_and_in_line_and_refuses_new_ones() -> None:
    rig = Rig(size=2)
    commands = [rig.queue.detach(Token(number)) for number in range(3)]
    told: list[str] = []
    for command in commands:
        command.then(lambda: told.append("once"))
    rig.queue.fail("the cable is cut")
    rig.queue.fail("again")
    for command in commands:
        with pytest.raises(DeviceGoneError, match="DETACH_REGION: the cable is cut"):
            command.wait()
    assert told == ["once"] * 3
    with pytest.raises(DeviceGoneError, match="the cable is cut"):
        rig.queue.alloc(1)
    rig.device.answer(rig.seen[0], b"\0")
    rig.queue.reap()  # what a device says after its end is not looked at


def test_a_thread_that_waits_for_a_free_chain_is_woken_by_the_end() -> None:
    rig = Rig(size=2)
    rig.queue.detach(TOKEN)
    caught: list[Exception] = []

    def work() -> None:
        try:
            rig.queue.alloc(1)
        except Exception as exc:
            caught.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    rig.queue.fail("the end")
    thread.join(PATIENCE_S)
    assert [type(exc) for exc in caught] == [DeviceGoneError]


def test_values_that_do_not_fit_their_fields_are_the_callers_error_and_send_nothing() -> None:
    rig = Rig()
    for call in (
        lambda: rig.queue.alloc(-1),
        lambda: rig.queue.attach(Token(1 << 64), Permission(0)),
        lambda: rig.queue.detach(Token(-1)),
        lambda: rig.queue.event_vector(TOKEN, 1 << 64),
    ):
        with pytest.raises(LocalProtocolError, match="cannot be encoded"):
            call()
    assert rig.seen == []


def test_a_callback_runs_exactly_once_whichever_thread_is_first() -> None:
    for _ in range(300):
        command, calls = Command("X", 0), []
        threads = [
            threading.Thread(target=command.finish, args=(b"\0",)),
            threading.Thread(target=command.then, args=(lambda calls=calls: calls.append(1),)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert calls == [1]


def test_only_the_first_completion_counts() -> None:
    command = Command("X", 0)
    command.finish(b"\0ok")
    command.finish(b"", DeviceGoneError("late"))
    assert command.wait() == command.reply == b"\0ok"


def test_a_command_whose_notify_fails_ends_as_the_device_does() -> None:
    memory = QueueMemory()

    def notify() -> None:
        queue.fail("nobody listens")
        raise DeviceGoneError("the socket is closed")

    queue = ControlQueue(memory, 64, notify)
    with pytest.raises(DeviceGoneError, match="nobody listens"):
        queue.alloc(1)


def test_a_queue_that_refuses_still_takes_the_answers_of_what_is_under_way() -> None:
    rig = Rig()
    answered, lost = rig.queue.detach(TOKEN), rig.queue.detach(TOKEN)
    rig.queue.refuse("the device is lost")
    with pytest.raises(DeviceGoneError, match="the device is lost"):
        rig.queue.detach(TOKEN)
    assert not answered.done
    rig.device.answer(rig.seen[0], bytes([Ack.OK]))
    rig.queue.reap()
    assert answered.expect_ok() == b""
    rig.queue.fail("the device is lost")
    with pytest.raises(DeviceGoneError, match="the device is lost"):
        lost.wait()
    assert len(rig.seen) == 2


def test_commands_of_one_kick_are_found_by_one_notify() -> None:
    rig = Rig(always(bytes([Ack.OK])))
    kicks: list[int] = []
    rig.queue._notify = lambda: (kicks.append(len(rig.seen)), rig.run())[1]  # type: ignore[method-assign]
    with rig.queue.one_kick():
        commands = [rig.queue.grant(TOKEN, Permission.READ, DevId(n)) for n in (1, 2, 3)]
        assert not kicks
    assert kicks == [0]
    for command in commands:
        command.expect_ok()
    rig.queue.detach(TOKEN).expect_ok()
    assert len(kicks) == 2
    with rig.queue.one_kick():
        pass
    assert len(kicks) == 2


def test_more_commands_than_there_are_chains_in_one_kick_go_out_in_several() -> None:
    rig = Rig(always(bytes([Ack.OK])), size=8)
    rig.queue._notify = lambda: (rig.run(), rig.queue.reap())[1]  # type: ignore[method-assign]
    with rig.queue.one_kick():
        commands = [rig.queue.grant(TOKEN, Permission.READ, DevId(n)) for n in range(1, 20)]
    for command in commands:
        command.expect_ok()
    assert len(rig.seen) == 19


def test_another_thread_s_commands_are_not_held_back_by_one_kick() -> None:
    rig = Rig(always(bytes([Ack.OK])))
    with rig.queue.one_kick():
        held = rig.queue.detach(TOKEN)
        other = threading.Thread(target=lambda: rig.queue.detach(Token(5)).wait())
        other.start()
        other.join(PATIENCE_S)
        assert not other.is_alive()
    held.expect_ok()
