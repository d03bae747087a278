# SPDX-License-Identifier: Apache-2.0
"""docs/handshake.md shows what the code does: its tables and diagrams are generated from the code's tables.

Run this file as a program to write the generated parts anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ism.smc import clc, handshake_machine, states
from ism.smc.diagnosis import Diagnosis

PAGE = Path(__file__).parents[2] / "docs" / "handshake.md"
PART = re.compile(r"(<!-- generated: (\S+) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)


def fenced(diagram: str) -> str:
    return f"```mermaid\n{diagram}```\n"


def fields(*structs: type) -> str:
    blocks = (f"`{struct.__name__}`, {struct.SIZE} bytes\n\n" + "\n".join(struct.markdown()) for struct in structs)
    return "\n\n".join(blocks) + "\n"


def codes() -> str:
    rows = [f"| `{int(code):08x}` | {code.name} | {code.words} |" for code in Diagnosis]
    return "\n".join(["| code | name | meaning |", "|---|---|---|", *rows]) + "\n"


def outcomes() -> str:
    rows = [
        f"| {state.name} | {int(state)} | {send.value} | {receive.value} |"
        for state, (send, receive) in states.OUTCOMES.items()
    ]
    return "\n".join(["| state | number | send | receive, once drained |", "|---|---|---|---|", *rows]) + "\n"


GENERATED = {
    "client": lambda: fenced(states.mermaid(handshake_machine.CLIENT, handshake_machine.State.START)),
    "server": lambda: fenced(states.mermaid(handshake_machine.SERVER, handshake_machine.State.START)),
    "connection": lambda: fenced(states.mermaid(states.TRANSITIONS, states.State.INIT)),
    "outcomes": outcomes,
    "header": lambda: fields(clc.Header),
    "proposal": lambda: fields(clc.ProposalHead, clc.V2Extension, clc.SmcdV2Extension, clc.GidEntry),
    "answer": lambda: fields(clc.AnswerHead, clc.FirstContactV21),
    "decline": lambda: fields(clc.DeclineV2),
    "codes": codes,
}


def generated_page(text: str) -> str:
    return PART.sub(lambda part: part[1] + "\n" + GENERATED[part[2]]() + "\n" + part[4], text)


@pytest.mark.parametrize("name", GENERATED)
def test_the_page_shows_every_generated_part_as_the_code_has_it(name):
    found = {part[2]: part[3] for part in PART.finditer(PAGE.read_text())}
    assert found[name] == "\n" + GENERATED[name]() + "\n", f"run: python {Path(__file__).name}"


def test_the_page_has_no_part_that_nothing_generates():
    assert {part[2] for part in PART.finditer(PAGE.read_text())} == set(GENERATED)


def test_a_diagram_has_every_state_and_every_move():
    diagram = states.mermaid(states.TRANSITIONS, states.State.INIT)
    for state, row in states.TRANSITIONS.items():
        for event, target in row.items():
            if target is not state:
                (line,) = re.findall(rf"^ +{state.name} --> {target.name}: (.*)$", diagram, re.MULTILINE)
                assert event.value in line.split(", ")
    assert "[*] --> INIT" in diagram
    assert "CLOSED --> [*]" in diagram


if __name__ == "__main__":
    PAGE.write_text(generated_page(PAGE.read_text()))
