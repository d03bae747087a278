# SPDX-License-Identifier: Apache-2.0
"""Connection states under random life: two ends that read each other's flags late, and hostile flag words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ism.errors import RemoteProtocolError
from ism.shm.header import STATE_FLAGS
from ism.smc.states import OUTCOMES, ConnectionStates, Outcome, State

LOCAL = st.sampled_from(["shutdown", "close", "abort", "fail", "look", "look", "look"])
ABORTED = (State.PROCESSABORT, State.PEERABORTWAIT)


class End:
    """One side with the flags word its peer reads; it reads the peer's only when it looks."""

    def __init__(self):
        self.machine, self.word, self.closed, self.finished = ConnectionStates(), 0, False, False
        self.machine.established()

    def apply(self, step):
        if step.publish:
            assert int(step.publish) & self.word == self.word  # all of it, and no bit is ever taken back
            self.word = int(step.publish)
        assert (step.send, step.receive) == OUTCOMES[step.state]

    def act(self, what, peer):
        if what == "look":
            self.apply(self.machine.receive_flags(peer.word))
        elif what == "fail":
            self.apply(self.machine.fail())
        elif self.closed:
            return
        elif what == "shutdown":
            self.finished |= self.machine.state not in ABORTED
            self.apply(self.machine.shutdown_wr())
        else:
            self.closed = True
            self.finished |= what == "close" and self.machine.state not in ABORTED
            self.apply(self.machine.close(abort=what == "abort"))


@given(st.lists(st.tuples(st.booleans(), LOCAL), max_size=20))
def test_two_ends_come_to_rest_whatever_they_do(life):
    one, two = End(), End()
    for first, what in life:
        end, peer = (one, two) if first else (two, one)
        end.act(what, peer)
        # EOF is a promise that the peer said everything it wanted to say.
        assert OUTCOMES[end.machine.state][1] is not Outcome.EOF or peer.finished
    for end, peer in ((one, two), (two, one), (one, two)):
        end.act("look", peer)
    for end, peer in ((one, two), (two, one)):
        if not end.closed and peer.closed:
            # An end whose peer has closed waits for nothing: it neither sends nor blocks in receive.
            assert Outcome.GOES not in OUTCOMES[end.machine.state]
    for end, peer in ((one, two), (two, one), (one, two), (two, one)):
        end.act("close", peer)
        end.act("look", peer)
    assert one.machine.state is State.CLOSED
    assert two.machine.state is State.CLOSED


@given(st.lists(st.integers(0, 2**32 - 1), max_size=12))
def test_hostile_flag_words_are_taken_or_refused(words):
    machine, seen = ConnectionStates(), 0
    machine.established()
    for word in words:
        try:
            machine.receive_flags(word)
            assert word & seen == seen
            seen |= word & STATE_FLAGS
        except RemoteProtocolError:
            assert word & seen != seen
            machine.fail()
