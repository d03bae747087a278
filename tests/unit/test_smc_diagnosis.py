# SPDX-License-Identifier: Apache-2.0
"""Diagnosis codes and identities: values that are fixed, words that exist, limits that hold."""

from __future__ import annotations

import pytest

from ism.errors import RemoteProtocolError
from ism.smc.diagnosis import Diagnosis, HandshakeError, words
from ism.smc.identity import Identity, valid_eid


def test_codes_have_the_numbers_of_the_specification():
    assert {code.name: int(code) for code in Diagnosis} == {
        "MEM": 0x01010000,
        "TIMEOUT_CL": 0x02010000,
        "TIMEOUT_AL": 0x02020000,
        "CNFERR": 0x03000000,
        "PEERNOSMC": 0x03010000,
        "IPSEC": 0x03020000,
        "NOSMCDEV": 0x03030000,
        "NOSMCDDEV": 0x03030001,
        "NOSMCRDEV": 0x03030002,
        "NOISM2SUPP": 0x03030003,
        "NOV2EXT": 0x03030004,
        "NOV2DEXT": 0x03030005,
        "NOSEID": 0x03030006,
        "NOSMCD2DEV": 0x03030007,
        "NOUEID": 0x03030008,
        "RELEASEERR": 0x03030009,
        "MAXCONNERR": 0x0303000A,
        "MAXLINKERR": 0x0303000B,
        "MODEUNSUPP": 0x03040000,
        "RMBE_EC": 0x03050000,
        "OPTUNSUPP": 0x03060000,
        "DIFFPREFIX": 0x03070000,
        "GETVLANERR": 0x03080000,
        "ISMVLANERR": 0x03090000,
        "NOACTLINK": 0x030A0000,
        "NOSRVLINK": 0x030B0000,
        "VERSMISMAT": 0x030C0000,
        "MAX_DMB": 0x030D0000,
        "NOROUTE": 0x030E0000,
        "NOINDIRECT": 0x030F0000,
        "SYNCERR": 0x04000000,
        "PEERDECL": 0x05000000,
        "INTERR": 0x09990000,
        "ERR_RTOK": 0x09990001,
        "ERR_RDYLNK": 0x09990002,
        "ERR_REGBUF": 0x09990003,
    }


def test_every_code_has_its_own_words():
    assert all(code.words and words(code) == code.words for code in Diagnosis)
    assert len({code.words for code in Diagnosis}) == len(Diagnosis)


def test_an_unknown_code_is_described_with_its_number():
    assert words(0xDEADBEEF) == "unknown reason (diagnosis 0xdeadbeef)"


def test_a_handshake_error_is_a_remote_protocol_error_with_a_code():
    error = HandshakeError("no", Diagnosis.SYNCERR, state="start", event="EOF")
    assert isinstance(error, RemoteProtocolError)
    assert (error.code, error.state, error.event, str(error)) == (Diagnosis.SYNCERR, "start", "EOF", "no")


@pytest.mark.parametrize("eid", ["A", "0", "VIRTIO-ISM", "A.B-C", "X" * 32])
def test_good_eids(eid):
    assert valid_eid(eid)
    assert Identity(1, 1, eids=(eid,)).eids == (eid,)


@pytest.mark.parametrize("eid", ["", "a", "-A", ".A", "A B", "A ", "Ä", "X" * 33, "A?", "A\n", "A_B"])
def test_bad_eids_are_refused(eid):
    assert not valid_eid(eid)
    with pytest.raises(ValueError, match="EID"):
        Identity(1, 1, eids=(eid,))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"gid": 0}, "gid"),
        ({"gid": 1 << 64}, "gid"),
        ({"devid": 0}, "devid"),
        ({"devid": -1}, "devid"),
        ({"chid": 0xFEFF}, "CHID"),
        ({"chid": 0xFFFF}, "CHID"),
        ({"eids": ()}, "EIDs"),
        ({"eids": ("A", "A")}, "EIDs"),
        ({"eids": tuple("ABCDEFGHI")}, "EIDs"),
        ({"link_id": 1 << 32}, "link id"),
        ({"link_id": -1}, "link id"),
    ],
)
def test_identities_out_of_range_are_refused(values, name):
    with pytest.raises(ValueError, match=name):
        Identity(**({"gid": 1, "devid": 1} | values))


def test_the_widest_identity_is_taken():
    Identity((1 << 64) - 1, (1 << 64) - 1, 0xFFFE, tuple("ABCDEFGH"), "h" * 100, 0xFFFFFFFF)
