# SPDX-License-Identifier: Apache-2.0
"""The window allocator against a set of chunks."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ism.device.contract import AreaOf
from ism.device.window import Window

CHUNK = 4096
CHUNKS = 24


class WindowMachine(RuleBasedStateMachine):
    """Plans that are taken and given back; the model is which chunks are free."""

    def __init__(self) -> None:
        super().__init__()
        self.window = Window(CHUNK, CHUNKS * CHUNK)
        self.free = set(range(CHUNKS))
        self.held: list[list[AreaOf]] = []

    def chunks(self, areas: list[AreaOf]) -> list[int]:
        return [c for a in areas for c in range(a.offset // CHUNK, (a.offset + a.size) // CHUNK)]

    def runs(self) -> list[int]:
        lengths = [0]
        for chunk in range(CHUNKS):
            if chunk in self.free:
                lengths[-1] += 1
            else:
                lengths.append(0)
        return sorted((n for n in lengths if n), reverse=True)

    @rule(size=st.integers(1, CHUNK * (CHUNKS + 2)), max_areas=st.integers(0, 4))
    def plan_and_take(self, size: int, max_areas: int) -> None:
        wanted = -(-size // CHUNK)
        plan = self.window.plan(size, max_areas)
        if wanted > len(self.free):
            assert plan is None
            return
        assert plan is not None
        chunks = self.chunks(plan)
        assert len(chunks) == wanted
        assert set(chunks) <= self.free
        assert chunks == sorted(set(chunks))
        fewest, room = 0, 0
        for run in self.runs():
            if room >= wanted:
                break
            fewest, room = fewest + 1, room + run
        assert len(plan) == fewest
        self.window.take(plan)
        self.free -= set(chunks)
        self.held.append(plan)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        areas = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.window.give_back(areas)
        self.free |= set(self.chunks(areas))

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.window.free_bytes == len(self.free) * CHUNK
        assert self.window.largest_run == max(self.runs(), default=0) * CHUNK
        where = {chunk: area for areas in self.held for area in areas for chunk in self.chunks([area])}
        for slot in range(-1, CHUNKS + 1):
            assert self.window.area_at(slot) == where.get(slot)


TestWindow = WindowMachine.TestCase
TestWindow.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
