# SPDX-License-Identifier: Apache-2.0
"""Why a connection runs over TCP instead of shared memory: the CLC diagnosis codes, in numbers and in words.

Owns the 32-bit codes a DECLINE carries and the sentence shown for each, and the error that carries one. Never decides
anything. The numbers are those of SMC (RFC 7609 appendix A, extended by SMC version 2), spelled as Linux spells them,
so that they can be searched; a code that comes from a peer may be any 32-bit number and is described, not trusted.
"""

from __future__ import annotations

from enum import IntEnum

from ism.errors import RemoteProtocolError


class Diagnosis(IntEnum):
    """A diagnosis code with a sentence in `words`. Source: RFC 7609 appendix A; SMC version 2."""

    words: str

    def __new__(cls, code: int, words: str = "") -> Diagnosis:
        member = int.__new__(cls, code)
        member._value_ = code
        member.words = words
        return member

    MEM = 0x01010000, "out of memory, or a region could not be allocated or attached"
    TIMEOUT_CL = 0x02010000, "the other side's next handshake message did not come in time"
    TIMEOUT_AL = 0x02020000, "adding an SMC-R link took too long"
    CNFERR = 0x03000000, "shared memory is switched off or wrongly configured for this connection"
    PEERNOSMC = 0x03010000, "the other side did not offer shared memory"
    IPSEC = 0x03020000, "the connection is protected by IPsec"
    NOSMCDEV = 0x03030000, "there is no SMC device of any kind"
    NOSMCDDEV = 0x03030001, "there is no SMC-D device"
    NOSMCRDEV = 0x03030002, "there is no SMC-R device"
    NOISM2SUPP = 0x03030003, "the ISM device does not support SMC-D version 2"
    NOV2EXT = 0x03030004, "the proposal has no SMC version 2 part"
    NOV2DEXT = 0x03030005, "the proposal has no SMC-D version 2 part"
    NOSEID = 0x03030006, "there is no system EID"
    NOSMCD2DEV = 0x03030007, "the two sides have no ISM device in the same domain (gid and CHID) in common"
    NOUEID = 0x03030008, "the two sides have no EID in common; configure the same one on both"
    RELEASEERR = 0x03030009, "the two sides could not agree on a release of SMC version 2"
    MAXCONNERR = 0x0303000A, "the numbers of connections per link group do not agree (SMC-R)"
    MAXLINKERR = 0x0303000B, "the numbers of links per link group do not agree (SMC-R)"
    MODEUNSUPP = 0x03040000, "the answer is for another kind of SMC than was proposed"
    RMBE_EC = 0x03050000, "the other side marks its buffers with eyecatchers"
    OPTUNSUPP = 0x03060000, "a socket option in use does not work over shared memory"
    DIFFPREFIX = 0x03070000, "the two sides are in different IP subnets (SMC version 1)"
    GETVLANERR = 0x03080000, "the VLAN of the connection could not be found out"
    ISMVLANERR = 0x03090000, "the VLAN could not be registered with the ISM device"
    NOACTLINK = 0x030A0000, "the link group has no active link (SMC-R)"
    NOSRVLINK = 0x030B0000, "the server's link is not known (SMC-R)"
    VERSMISMAT = 0x030C0000, "the two sides speak different versions of SMC"
    MAX_DMB = 0x030D0000, "the limit of shared buffers is reached"
    NOROUTE = 0x030E0000, "there is no route to the other side's RoCE device (SMC-R version 2)"
    NOINDIRECT = 0x030F0000, "one side is reachable directly and the other through a gateway (SMC-R version 2)"
    SYNCERR = 0x04000000, "the two sides disagree about their link group (first contact or not)"
    PEERDECL = 0x05000000, "the other side declined"
    INTERR = 0x09990000, "internal error"
    ERR_RTOK = 0x09990001, "remote memory keys could not be stored (SMC-R)"
    ERR_RDYLNK = 0x09990002, "the link could not be made ready (SMC-R)"
    ERR_REGBUF = 0x09990003, "a buffer could not be registered (SMC-R)"


def words(code: int) -> str:
    """Say in one sentence what a diagnosis code means.

    Args:
        code: 32-bit number, from this side or from a peer; unknown ones are allowed.
    Returns: text without the number for a known code, text with the number for an unknown one.
    """
    try:
        return Diagnosis(code).words
    except ValueError:
        return f"unknown reason (diagnosis 0x{code:08x})"


class HandshakeError(RemoteProtocolError):
    """The other side broke the CLC protocol; the TCP stream cannot be trusted any more and must be closed.

    Attributes: `code` (the diagnosis that describes it best, None where SMC has none), `state`, `event`.
    """

    def __init__(self, message: str, code: Diagnosis | None = None, *, state: str = "", event: str = "") -> None:
        self.code = code
        super().__init__(message, state=state, event=event)
