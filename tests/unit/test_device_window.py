# SPDX-License-Identifier: Apache-2.0
"""The chunk allocator of one device's regions window."""

from __future__ import annotations

import pytest

from ism.device.contract import AreaOf
from ism.device.window import Window
from ism.ids import WindowOffset


def area(start: int, length: int) -> AreaOf:
    return AreaOf(WindowOffset(start * 4096), length * 4096)


def window(chunks: int = 16) -> Window:
    return Window(4096, chunks * 4096)


def test_a_plan_is_rounded_up_to_chunks_and_takes_nothing() -> None:
    w = window()
    assert w.plan(4097, 1) == [area(0, 2)]
    assert w.free_bytes == w.window_size
    assert w.plan(1, 1) == [area(0, 1)]


def test_the_shortest_run_that_is_long_enough_is_chosen() -> None:
    w = window()
    w.take([area(4, 1), area(7, 1)])  # free runs of 4, 2 and 8 chunks
    assert w.plan(2 * 4096, 1) == [area(5, 2)]
    assert w.plan(3 * 4096, 1) == [area(0, 3)]
    assert w.plan(8 * 4096, 1) == [area(8, 8)]


def test_without_a_long_enough_run_the_fewest_areas_are_planned_by_ascending_offset() -> None:
    w = window()
    w.take([area(4, 1), area(7, 1)])
    assert w.plan(11 * 4096, 8) == [area(0, 3), area(8, 8)]
    assert w.plan(14 * 4096, 8) == [area(0, 4), area(5, 2), area(8, 8)]


def test_a_plan_with_more_areas_than_the_caller_takes_is_returned_whole() -> None:
    w = window()
    w.take([area(4, 1), area(7, 1)])
    plan = w.plan(14 * 4096, 1)
    assert plan is not None
    assert len(plan) == 3


def test_no_plan_when_less_is_free_than_asked_for() -> None:
    w = window()
    w.take([area(0, 1)])
    assert w.plan(16 * 4096, 99) is None
    assert w.plan(15 * 4096, 99) == [area(1, 15)]
    assert w.plan(1 << 64, 99) is None


@pytest.mark.parametrize(("size", "areas"), [(0, 1), (-1, 1), (1, -1)])
def test_a_senseless_plan_is_refused(size: int, areas: int) -> None:
    with pytest.raises(ValueError):
        window().plan(size, areas)


def test_neighbours_given_back_become_one_run_again() -> None:
    w = window(4)
    parts = [area(i, 1) for i in range(4)]
    w.take(parts)
    assert (w.free_bytes, w.largest_run) == (0, 0)
    for i in (0, 2, 1, 3):
        w.give_back([parts[i]])
    assert (w.free_bytes, w.largest_run) == (4 * 4096, 4 * 4096)
    assert w.plan(4 * 4096, 1) == [area(0, 4)]


@pytest.mark.parametrize(
    "bad",
    [
        [area(2, 3)],  # overlaps what is taken
        [area(0, 1), area(0, 1)],
        [area(15, 2)],
        [AreaOf(WindowOffset(1), 4096)],
        [AreaOf(WindowOffset(0), 4095)],
        [AreaOf(WindowOffset(0), 0)],
        [AreaOf(WindowOffset(-4096), 4096)],
        [area(0, 1), area(4, 1)],
    ],
)
def test_taking_what_is_not_free_takes_nothing(bad: list[AreaOf]) -> None:
    w = window()
    w.take([area(4, 4)])
    with pytest.raises(ValueError):
        w.take(bad)
    assert w.free_bytes == 12 * 4096
    assert w.plan(4 * 4096, 1) == [area(0, 4)]


@pytest.mark.parametrize("bad", [[area(4, 3)], [area(5, 3)], [area(4, 4), area(4, 4)], [area(4, 4), area(0, 1)]])
def test_giving_back_what_was_not_taken_gives_nothing_back(bad: list[AreaOf]) -> None:
    w = window()
    w.take([area(4, 4)])
    with pytest.raises(ValueError):
        w.give_back(bad)
    assert w.free_bytes == 12 * 4096
    assert w.area_at(7) == area(4, 4)


def test_a_slot_leads_to_the_area_that_has_it() -> None:
    w = window()
    w.take([area(4, 4), area(8, 1)])
    assert [w.area_at(slot) for slot in (3, 4, 7, 8, 9, 16, 1 << 40, -1)] == [
        None,
        area(4, 4),
        area(4, 4),
        area(8, 1),
        None,
        None,
        None,
        None,
    ]


@pytest.mark.parametrize(("chunk", "size"), [(0, 4096), (4096, 0), (4096, 6000)])
def test_a_window_is_a_multiple_of_the_chunk(chunk: int, size: int) -> None:
    with pytest.raises(ValueError):
        Window(chunk, size)


def test_a_window_of_65536_chunks_full_of_single_ones_still_plans() -> None:
    w = Window(4096, 65536 * 4096)
    w.take([area(i, 1) for i in range(0, 65536, 2)])
    plan = w.plan(20000 * 4096, 10)
    assert plan is not None
    assert len(plan) == 20000
    w.take(plan)
    w.give_back(plan)
    assert w.largest_run == 4096
