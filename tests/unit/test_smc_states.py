# SPDX-License-Identifier: Apache-2.0
"""The connection states: the table walked, the flags published, the outcomes, and lies of the peer."""

from __future__ import annotations

import pytest

from ism.errors import LocalProtocolError, RemoteProtocolError
from ism.shm.header import Flags
from ism.smc.states import OUTCOMES, TRANSITIONS, ConnectionStates, Event, Outcome, State

DONE, CLOSED, ABNORMAL = Flags.DONE_WRITING, Flags.CLOSED, Flags.ABNORMAL_CLOSE

# How to bring a new connection to each state.
ROADS = {
    State.INIT: [],
    State.ACTIVE: [Event.ESTABLISHED],
    State.PEERCLOSEWAIT1: [Event.ESTABLISHED, Event.SHUTDOWN_WR],
    State.PEERCLOSEWAIT2: [Event.ESTABLISHED, Event.SHUTDOWN_WR, Event.PEER_DONE],
    State.APPCLOSEWAIT1: [Event.ESTABLISHED, Event.PEER_DONE],
    State.APPCLOSEWAIT2: [Event.ESTABLISHED, Event.PEER_DONE, Event.SHUTDOWN_WR],
    State.APPFINCLOSEWAIT: [Event.ESTABLISHED, Event.PEER_CLOSED],
    State.PEERFINCLOSEWAIT: [Event.ESTABLISHED, Event.CLOSE],
    State.PEERABORTWAIT: [Event.ESTABLISHED, Event.FAIL],
    State.PROCESSABORT: [Event.ESTABLISHED, Event.PEER_GONE],
    State.CLOSED: [Event.ESTABLISHED, Event.ABORT],
}


class Connection:
    """A machine with the peer's flags word beside it."""

    def __init__(self, state=State.INIT):
        self.machine, self.peer = ConnectionStates(), Flags(0)
        for event in ROADS[state]:
            self.do(event)
        assert self.machine.state is state

    def do(self, event):
        flag = {Event.PEER_DONE: DONE, Event.PEER_CLOSED: CLOSED, Event.PEER_ABNORMAL: ABNORMAL}.get(event)
        if flag is not None:
            self.peer |= flag
            return self.machine.receive_flags(self.peer)
        if event in (Event.CLOSE, Event.ABORT):
            return self.machine.close(abort=event is Event.ABORT)
        return {
            Event.ESTABLISHED: self.machine.established,
            Event.SHUTDOWN_WR: self.machine.shutdown_wr,
            Event.PEER_GONE: self.machine.peer_gone,
            Event.FAIL: self.machine.fail,
            Event.ERROR_REPORTED: self.machine.error_reported,
        }[event]()


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name)
@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_every_state_takes_every_event_as_the_table_says(state, event):
    connection = Connection(state)
    if event in TRANSITIONS[state]:
        step = connection.do(event)
        assert step.state is connection.machine.state is TRANSITIONS[state][event]
        assert (step.send, step.receive) == OUTCOMES[step.state]
    elif event is Event.PEER_DONE and connection.peer & DONE:
        assert connection.do(event).state is state  # a flag that is set already is no event
    else:
        with pytest.raises(LocalProtocolError, match=state.name):
            connection.do(event)
        assert connection.machine.state is state


def test_states_have_the_kernels_numbers():
    assert {state.name: int(state) for state in State} == {
        "ACTIVE": 1,
        "INIT": 2,
        "CLOSED": 7,
        "PEERCLOSEWAIT1": 20,
        "PEERCLOSEWAIT2": 21,
        "APPCLOSEWAIT1": 22,
        "APPCLOSEWAIT2": 23,
        "APPFINCLOSEWAIT": 24,
        "PEERFINCLOSEWAIT": 25,
        "PEERABORTWAIT": 26,
        "PROCESSABORT": 27,
    }


def test_the_tables_are_complete():
    assert set(TRANSITIONS) == set(OUTCOMES) == set(State) == set(ROADS)


@pytest.mark.parametrize(
    ("state", "event", "published"),
    [
        (State.INIT, Event.CLOSE, Flags(0)),
        (State.INIT, Event.FAIL, Flags(0)),
        (State.ACTIVE, Event.SHUTDOWN_WR, DONE),
        (State.ACTIVE, Event.CLOSE, CLOSED),
        (State.ACTIVE, Event.ABORT, ABNORMAL),
        (State.ACTIVE, Event.PEER_DONE, Flags(0)),
        (State.ACTIVE, Event.PEER_CLOSED, Flags(0)),
        (State.ACTIVE, Event.PEER_ABNORMAL, ABNORMAL),
        (State.ACTIVE, Event.PEER_GONE, ABNORMAL),
        (State.ACTIVE, Event.FAIL, ABNORMAL),
        (State.PEERCLOSEWAIT1, Event.SHUTDOWN_WR, Flags(0)),
        (State.PEERCLOSEWAIT1, Event.CLOSE, DONE | CLOSED),
        (State.PEERCLOSEWAIT1, Event.ABORT, DONE | ABNORMAL),
        (State.APPCLOSEWAIT1, Event.SHUTDOWN_WR, DONE),
        (State.APPCLOSEWAIT1, Event.CLOSE, CLOSED),
        (State.APPCLOSEWAIT2, Event.CLOSE, DONE | CLOSED),
        (State.APPCLOSEWAIT2, Event.PEER_GONE, Flags(0)),
        (State.APPFINCLOSEWAIT, Event.CLOSE, CLOSED),
        (State.APPFINCLOSEWAIT, Event.SHUTDOWN_WR, Flags(0)),
        (State.PROCESSABORT, Event.CLOSE, ABNORMAL | CLOSED),
        (State.PROCESSABORT, Event.PEER_CLOSED, Flags(0)),
        (State.PROCESSABORT, Event.ERROR_REPORTED, Flags(0)),
        (State.PEERABORTWAIT, Event.ABORT, Flags(0)),
        (State.PEERFINCLOSEWAIT, Event.PEER_GONE, Flags(0)),
        (State.PEERFINCLOSEWAIT, Event.FAIL, Flags(0)),
        (State.CLOSED, Event.CLOSE, Flags(0)),
    ],
)
def test_steps_publish_all_own_flags_when_they_change_and_nothing_otherwise(state, event, published):
    assert Connection(state).do(event).publish == published


@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_a_side_may_let_go_once_the_application_has_closed(state):
    assert Connection(state).machine.may_let_go is (state in (State.PEERFINCLOSEWAIT, State.CLOSED))


@pytest.mark.parametrize("value", [0, 0x1F, 0x0100, 1 << 31, 0xFFFFFF1F])
def test_bits_that_are_no_state_flags_are_ignored(value):
    connection = Connection(State.ACTIVE)
    step = connection.machine.receive_flags(value)
    assert (step.state, step.publish) == (State.ACTIVE, Flags(0))
    assert connection.machine.receive_flags(0).state is State.ACTIVE


@pytest.mark.parametrize(("first", "then"), [(DONE, 0), (DONE | CLOSED, DONE), (CLOSED, ABNORMAL), (ABNORMAL, 0x1F)])
def test_a_flag_that_disappears_is_a_lie(first, then):
    connection = Connection(State.ACTIVE)
    before = connection.machine.receive_flags(first).state
    with pytest.raises(RemoteProtocolError, match="took back"):
        connection.machine.receive_flags(then)
    assert connection.machine.state is before
    assert connection.machine.receive_flags(first).state is before


def test_an_abort_outweighs_a_close_seen_with_it():
    step = Connection(State.ACTIVE).machine.receive_flags(CLOSED | ABNORMAL)
    assert (step.state, step.receive, step.publish) == (State.PROCESSABORT, Outcome.ECONNRESET, ABNORMAL)


def test_bytes_finished_before_an_abort_end_in_eof():
    step = Connection(State.ACTIVE).machine.receive_flags(DONE | ABNORMAL)
    assert (step.state, step.send, step.receive) == (State.APPFINCLOSEWAIT, Outcome.EPIPE, Outcome.EOF)


def test_a_reset_is_reported_once_and_then_looks_closed_as_in_tcp():
    connection = Connection(State.PROCESSABORT)
    assert connection.machine.peer_gone().receive is Outcome.ECONNRESET
    step = connection.machine.error_reported()
    assert (step.send, step.receive) == (Outcome.EPIPE, Outcome.EOF)
    with pytest.raises(LocalProtocolError):
        connection.machine.error_reported()


def test_a_half_closed_connection_goes_on_in_the_other_direction():
    here, there = Connection(State.ACTIVE).machine, Connection(State.ACTIVE).machine
    step = there.receive_flags(here.shutdown_wr().publish)
    assert (step.send, step.receive) == (Outcome.GOES, Outcome.EOF)
    step = here.receive_flags(there.shutdown_wr().publish)
    assert (step.state, step.send, step.receive) == (State.PEERCLOSEWAIT2, Outcome.EPIPE, Outcome.EOF)


def test_flags_before_the_handshake_are_a_bug_of_the_caller():
    machine = ConnectionStates()
    assert machine.receive_flags(0).state is State.INIT
    with pytest.raises(LocalProtocolError):
        machine.receive_flags(DONE)
    machine.established()
    assert machine.receive_flags(DONE).state is State.APPCLOSEWAIT1
