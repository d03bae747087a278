# SPDX-License-Identifier: Apache-2.0
"""One end of a duplex connection over two regions: the Python face of the compiled ring kernels.

An `Endpoint` sends into the peer's region and receives from its own, without waiting longer than a bounded spin; what
to do between two calls (sleep on a descriptor, run other tasks) is the caller's choice. It owns its private cursors
and keeps both mappings alive; it never unmaps, never reads or closes a descriptor, and never writes its own region,
which may be mapped read-only. The peer owns every byte of this side's region and may lie in all of them: a lie is
`RemoteProtocolError`, now and on every later call. Flags and cursors mean what they mean in RFC 7609.

Sending and receiving are independent and may be done by two threads. Two threads in the same direction are a bug of the
caller, refused where they meet inside a kernel. After a fork only one of the two processes may use an endpoint.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

from ism.errors import LocalProtocolError, RemoteProtocolError
from ism.shm import header
from ism.shm import state as words
from ism.shm.header import HEADER_BYTES, LINE_BYTES, Flags
from ism.shm.kernels import load_kernels
from ism.shm.observe import WINDOW_BYTES

QUICK = words.ATTENTION
"""Results of the bare kernels below this, and not negative, ask for nothing."""

MAX_SPIN_NS = 50_000
"""No call spins longer, for a peer behind the same kernel: Ctrl-C and cancellation wait for it."""

_NO_RING = memoryview(b"")
"""What is left when another thread closes in the middle of a call."""
_DOORBELL = words.DOORBELL
_ATTENTION = words.ATTENTION
_FIELD_NAMES = {
    0: "hello",
    header.RING_BYTES: "ring_bytes",
    header.PRODUCER: "producer cursor",
    header.CONSUMER: "consumer cursor",
    header.FLAGS: "flags",
    header.NEXT_MOVES: "number of moves",
    header.NEXT_RING: "ring it moved to",
    header.NEXT_CURSOR: "cursor at which it moved",
}


class Mapped(Protocol):
    """A region mapped into this process. It must stay mapped for as long as the object, or a view made of it, lives."""

    @property
    def address(self) -> int: ...
    @property
    def length(self) -> int: ...


class RxState(enum.IntEnum):
    """What the receiving direction can still deliver; see `Endpoint.rx_state`."""

    EMPTY = 0
    """Nothing to read now; more may come."""
    DATA = 1
    """Bytes are there."""
    EOF = 2
    """Everything was read and the peer will send no more."""
    ABORTED = 3
    """Everything was read and the peer closed abnormally."""


_RX_STATES = tuple(RxState)


@functools.cache
def kernel_id() -> int:
    """Return a number for the running kernel, equal in all containers of one machine, other in each virtual machine.

    Returns: 64 bits, signed; 0 when the kernel does not say, which compares equal to nothing.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return 0
    return int.from_bytes(hashlib.sha256(b"ism.shm kernel id " + boot).digest()[:8], "little", signed=True)


class Endpoint:
    """One end of a duplex connection: sends into `tx`, receives from `rx`.

    Attributes: `lent` (whether a view of a ring was ever given away, which may outlive the endpoint); `attend` (called
    when rings want looking after, see `ism.shm.move`, from within the call that noticed: it must be short and raise
    nothing).

    For callers to whom a microsecond matters, `quick_send(data, wait)`, `quick_recv(max_bytes, wait)` and
    `quick_recv_into(buffer, wait)` are the bare kernels; `wait` is of SPIN, GATED and SHORT. A result of 0 to `QUICK`
    - 1 is all there is to it; any other is for `finish`, which returns the count, or raises. After `quick_recv` an
    `owed[0]` other than 0 is for `take_owed`; why it returned None, `recv` says. FAILED_LOOK is the caller's: see
    `change_gates` and `ism.shm.ring`.
    """

    __slots__ = (
        "_address",
        "_block",
        "_doorbell",
        "_kernels",
        "_recv",
        "_rings",
        "_send",
        "_words",
        "attend",
        "lent",
        "owed",
        "quick_recv",
        "quick_recv_into",
        "quick_send",
    )

    def __init__(
        self,
        rx: Mapped,
        tx: Mapped,
        *,
        doorbell: Callable[[], object],
        max_spin_ns: int = MAX_SPIN_NS,
        kernel: int | None = None,
    ) -> None:
        """Start on two fresh (zero-filled) regions; writes the hello word into `tx`.

        Args:
            rx: this side's own region, which the peer writes; read-only is enough.
            tx: the peer's region, writable here.
            doorbell: wakes the peer. Called at most once per sleep of either side of the peer, never while both are
                awake, always after the data or flags it is about are visible. What it raises passes through the call
                that rang, whose effect has taken place.
            max_spin_ns: longest spin of a call that finds nothing to do, 0..50000.
            kernel: number of the running kernel for comparing CPU numbers; `kernel_id()` by default.

        Raises:
            ValueError: a region is no larger than its header or not aligned to 128 bytes; `max_spin_ns` out of range.
            FeatureMismatchError: Numba is switched off.
        """
        for name, region in (("rx", rx), ("tx", tx)):
            if region.length <= HEADER_BYTES or region.address <= 0 or region.address % LINE_BYTES:
                raise ValueError(
                    f"{name} region of {region.length} bytes at {region.address:#x} cannot hold a ring: it needs "
                    f"more than {HEADER_BYTES} bytes and an address that is a multiple of {LINE_BYTES}"
                )
        self._kernels = load_kernels()
        self._send, self._recv = self._kernels.send, self._kernels.recv
        self._doorbell = doorbell
        self.attend: Callable[[], None] | None = None
        self.lent = False
        self._rings = {region.address + HEADER_BYTES: _ring_view(region, HEADER_BYTES) for region in (rx, tx)}
        self._block = words.new_block()
        self._address = int(self._block.ctypes.data)
        self._words = memoryview(cast("Any", self._block))
        self.owed = self._words[words.RX_OWED : words.RX_OWED + 1]
        self.quick_send = functools.partial(self._kernels.send, self._address)
        self.quick_recv = functools.partial(self._kernels.recv, self._address)
        self.quick_recv_into = functools.partial(self._kernels.recv_into, self._address)
        mine = self._words
        mine[words.RX_HEADER], mine[words.TX_HEADER] = rx.address, tx.address
        for ring, home in ((words.RX_RING, words.RX_HOME_RING), (words.TX_RING, words.TX_HOME_RING)):
            mine[ring] = mine[home] = (rx if ring == words.RX_RING else tx).address + HEADER_BYTES
        for size, home in ((words.RX_BYTES, words.RX_HOME_BYTES), (words.TX_BYTES, words.TX_HOME_BYTES)):
            mine[size] = mine[home] = (rx if size == words.RX_BYTES else tx).length - HEADER_BYTES
        mine[words.WINDOW] = max(1, min(mine[words.RX_BYTES] // 4, WINDOW_BYTES))
        mine[words.KERNEL] = kernel_id() if kernel is None else kernel
        self.max_spin_ns = max_spin_ns
        self._kernels.start(self._address, 0)

    # Sending

    def send(self, data: Any, wait: bool = True) -> int:
        """Copy as much of `data` into the peer's ring as fits, and wake the peer's reader if it sleeps.

        Args:
            data: bytes, bytearray, memoryview or array: any contiguous buffer.
            wait: spin within the adaptive budget when the ring is full.

        Returns:
            Bytes copied, possibly fewer than fit; 0 only when the ring stayed full (or `data` is empty).

        Raises:
            TypeError, BufferError, ValueError: `data` is not a contiguous buffer.
            RemoteProtocolError: the peer's header lies, now or earlier.
            LocalProtocolError: closed, or another thread is sending.

        Ordering: the bytes are written, then the producer cursor is stored with release, then a full fence, then the
        peer's sleep number is read.
        """
        sent = self._send(self._address, data, wait)
        if 0 <= sent < _ATTENTION:
            return sent
        return self.finish(sent)

    def reserve(self, wanted: int) -> memoryview:
        """Lend free space of the peer's ring for writing in place; `commit` publishes it.

        Args: `wanted`: bytes, 0 or more.
        Returns: a writable view of 0 to `wanted` contiguous bytes, shorter at the ring's end. Its memory stays mapped
            while the view lives, but belongs to the stream once committed. `send` and a new `reserve` withdraw it.
        Raises: RemoteProtocolError, LocalProtocolError (as `send`; also a negative `wanted`).
        """
        self.lent = True
        return self.lend_room(wanted)

    def lend_room(self, wanted: int) -> memoryview:
        """As `reserve`, for a caller that keeps account of the view in place of `lent`.

        What is made of the view shares one reference to the object behind it (`view.obj`), and with no other view.
        """
        granted = self._command(self._kernels.reserve, wanted)
        mine = self._words
        at = (mine[words.PRODUCER] - mine[words.TX_BASE]) % mine[words.TX_BYTES]
        return memoryview(self._rings.get(mine[words.TX_RING], _NO_RING).obj).cast("B")[at : at + granted]

    def commit(self, count: int) -> None:
        """Publish the first `count` bytes of the last reservation; the rest of it is withdrawn.

        Raises: LocalProtocolError (more than was reserved, closed), RemoteProtocolError.
        Ordering: as `send`.
        """
        self._command(self._kernels.commit, count)

    def writable_bytes(self, wait: bool = False) -> int:
        """Count the free bytes of the peer's ring. Raises: RemoteProtocolError, LocalProtocolError."""
        return self._command(self._kernels.writable_bytes, wait)

    # Receiving

    def recv(self, max_bytes: int, wait: bool = True) -> bytes | None:
        """Copy out up to `max_bytes`, and wake the peer's writer if it sleeps and room enough was made.

        Args:
            max_bytes: upper limit, 1 or more; 0 delivers None.
            wait: spin within the adaptive budget when the ring is empty.

        Returns:
            A copy, never empty; None when nothing came, and then `rx_state` tells why.

        Raises:
            ValueError: `max_bytes` is negative.
            RemoteProtocolError: the peer's header lies, now or earlier.
            LocalProtocolError: closed, or another thread is receiving.
            MemoryError: no memory for the copy; nothing is consumed.

        Ordering: the producer cursor is loaded with acquire, the bytes are read, the consumer cursor is stored with
        release.
        """
        data = self._recv(self._address, max_bytes, wait)
        if self.owed[0]:
            self.take_owed()
        if data is None:
            self._command(self._kernels.receive_error)
            if max_bytes < 0:
                raise ValueError(f"max_bytes is {max_bytes}, must not be negative")
        return data

    def take_owed(self) -> None:
        """Do what receives have left to be done: wake the peer, look after rings."""
        self._command(self._kernels.take_owed)

    def recv_into(self, buffer: Any, wait: bool = True) -> int:
        """Copy what is there into `buffer`, as `recv` does.

        Args: `buffer`: a writable contiguous buffer. `wait`: as for `recv`.
        Returns: bytes copied; 0 when nothing came (or `buffer` is empty).
        Raises: as `recv`; TypeError, BufferError, ValueError when `buffer` cannot be written in place.
        """
        received = self._kernels.recv_into(self._address, buffer, wait)
        if 0 <= received < _ATTENTION:
            return received
        return self.finish(received)

    def peek(self) -> tuple[memoryview, ...]:
        """Lend what can be read of the ring in use, without a copy.

        Returns: none, one or two read-only views, in stream order (two where the ring wraps). The memory stays mapped
            while a view lives; the contents are stable only until `consume` or a receive gives the bytes back, and a
            hostile peer can change them at any time: copy before checking what you then use.
        Raises: RemoteProtocolError, LocalProtocolError.
        """
        self.lent = True
        return self._views(self._command(self._kernels.readable_bytes))

    def peek_copy(self, max_bytes: int) -> bytes:
        """Copy up to `max_bytes` of all that can be read, without consuming it. Raises as `peek`."""
        here = self._views(min(max_bytes, self._command(self._kernels.readable_bytes)))
        missing = max_bytes - sum(map(len, here))
        beyond = min(missing, self._command(self._kernels.readable_beyond)) if missing and here else 0
        if beyond:
            here = (*here, self._rings.get(self._words[words.RX_MOVE_RING], _NO_RING)[:beyond])
        return b"".join(here)

    def _views(self, unread: int) -> tuple[memoryview, ...]:
        if unread == 0:
            return ()
        mine = self._words
        at = (mine[words.CONSUMER] - mine[words.RX_BASE]) % mine[words.RX_BYTES]
        ring = self._rings.get(mine[words.RX_RING], _NO_RING).toreadonly()
        first = ring[at : at + unread]
        if len(first) == unread:
            return (first,)
        return first, ring[: unread - len(first)]

    def lend_unread(self, max_bytes: int, wait: bool = True) -> memoryview:
        """As `peek`: the first view, of up to `max_bytes`, for a caller that keeps account of it. See `lend_room`.

        Args: `wait`: as for `recv`.
        """
        unread = self._kernels.readable_bytes(self._address, wait)
        if not 0 < unread < _ATTENTION and (unread := self.finish(unread)) == 0:
            return memoryview(b"")
        mine = self._words
        at = (mine[words.CONSUMER] - mine[words.RX_BASE]) % mine[words.RX_BYTES]
        end = at + (unread if unread < max_bytes else max_bytes)
        return memoryview(self._rings.get(mine[words.RX_RING], _NO_RING).obj).cast("B")[at:end].toreadonly()

    def consume(self, count: int) -> None:
        """Give back the first `count` of the bytes that `peek` or `readable_bytes` showed.

        Raises: LocalProtocolError (more than was shown, closed), RemoteProtocolError.
        Ordering: the consumer cursor is stored with release.
        """
        self._command(self._kernels.consume, count)

    def readable_bytes(self) -> int:
        """Count the bytes to read in the ring in use; 0 only if there are none at all. Raises as `peek`."""
        return self._command(self._kernels.readable_bytes)

    def all_readable_bytes(self) -> int:
        """Count the bytes to read in both rings, where the peer has moved on. Raises as `peek`."""
        return self._command(self._kernels.readable_bytes) + self._command(self._kernels.readable_beyond)

    def rx_state(self) -> RxState:
        """Tell data, end of stream, abort and mere emptiness apart, in one step.

        Returns: DATA whenever there are unread bytes, so that EOF and ABORTED are never reported before all data.
        Raises: RemoteProtocolError, LocalProtocolError.
        Ordering: the peer's flags are loaded with acquire before its producer cursor.
        """
        return _RX_STATES[self._command(self._kernels.rx_state)]

    # Flags

    def peer_flags(self) -> Flags:
        """Read the peer's flags. Bytes it sent before setting them may still be unread.

        Raises: RemoteProtocolError (also when a flag was taken back), LocalProtocolError (closed).
        Ordering: loaded with acquire.
        """
        return Flags(self._command(self._kernels.flags_of_peer) & header.STATE_FLAGS)

    def tell_flags(self, flags: int) -> None:
        """Say as of which of the peer's flags a gated send need not fail with FAILED_LOOK."""
        self._words[words.FLAGS_TOLD] = flags

    def change_gates(self, *, tx_shut: int = 0, tx_open: int = 0, rx_shut: int = 0, rx_open: int = 0) -> None:
        """Say for which reasons, bits of 1 to 128, gated sends and short receives must fail, and for which no longer.

        NOT_SENDING and PEER_GONE shut the gate to every gated send, other bits to short ones.
        """
        self._kernels.change_gates(self._address, tx_shut | tx_open << 8 | rx_shut << 16 | rx_open << 24)

    def set_flags(self, bits: int) -> None:
        """Add flags for the peer to see, and wake whichever of its sides sleeps. Flags are never taken back.

        Works after the peer lied too: that is how a connection is aborted.

        Raises: ValueError (reserved bits), LocalProtocolError (closed).
        Ordering: stored with release, after everything published; then a full fence, then the sleep numbers are read.
        """
        if bits & ~header.KNOWN_FLAGS:
            raise ValueError(f"flags {bits:#x} hold reserved bits, known are {header.KNOWN_FLAGS:#x}")
        self._command(self._kernels.set_flags, int(bits))

    # Sleeping and waking

    def park_reader(self, beyond: int = 0) -> bool:
        """Announce that the reader is about to sleep. The caller drains its eventfd before, never after, this call.

        Args: `beyond`: sleep although up to this many bytes are there (a reader that needs more than it peeked at).
        Returns: True: sleep until the doorbell, then call `unpark_reader`. False: bytes or a flag arrived, and the
            announcement was taken back.
        Raises: RemoteProtocolError, LocalProtocolError (also `beyond` not below the ring size).
        Ordering: the sleep number is stored with release, then a full fence, then flags and producer cursor are loaded.
        """
        return bool(self._command(self._kernels.park_reader, beyond))

    def park_writer(self, beyond: int = 0) -> bool:
        """Announce that the writer is about to sleep for want of room, as `park_reader` does for want of bytes.

        Args: `beyond`: sleep although up to this many bytes are free.
        Returns: True: sleep until the doorbell, then call `unpark_writer`. False: there is room, or the peer closed.
        Raises: RemoteProtocolError, LocalProtocolError (also `beyond` not below the ring size).
        """
        return bool(self._command(self._kernels.park_writer, beyond))

    def unpark_reader(self) -> None:
        """Announce that the reader is awake, after a doorbell, a timeout or a cancellation. Never fails."""
        self._command(self._kernels.unpark, 0)

    def unpark_writer(self) -> None:
        """Announce that the writer is awake. Never fails."""
        self._command(self._kernels.unpark, 1)

    def ring_doorbell_if_parked(self) -> bool:
        """Ring if a side of the peer sleeps and was not rung for that sleep; returns whether it was rung.

        For a reader that neither parks nor takes all there is, such as one that polls `peek`: freed space too small
        for a wake-up of its own is announced by this call.

        Raises: LocalProtocolError (closed).
        """
        result = self._kernels.ring_if_parked(self._address, 0)
        self.finish(result)
        return result == _DOORBELL

    # Rings

    @property
    def rx_ring_bytes(self) -> int:
        """Capacity of the ring that is read, bytes."""
        return self._words[words.RX_BYTES]

    @property
    def tx_ring_bytes(self) -> int:
        """Capacity of the ring that is written, bytes."""
        return self._words[words.TX_BYTES]

    @property
    def may_grow(self) -> bool:
        """Whether `attend` is called, once, when a larger ring to receive in would help; then it is False again."""
        return self._words[words.RX_MAY_GROW] != 0

    @may_grow.setter
    def may_grow(self, wanted: bool) -> None:
        self._words[words.RX_MAY_GROW] = wanted

    @property
    def offer_pending(self) -> bool:
        """Whether the peer has not moved to the ring that it was last offered."""
        return self._words[words.RX_NEXT_BYTES] != 0

    def offer_ring(self, region: Mapped, token: int) -> None:
        """Offer the peer a region of this side's, all of which is ring, for what it sends from some byte on.

        It stays in use until `uses` says otherwise. Not before the peer has moved to the one offered last.
        Raises: LocalProtocolError (closed), RemoteProtocolError.
        """
        mine = self._words
        assert not mine[words.RX_NEXT_BYTES]
        self._rings[region.address] = _ring_view(region, 0)
        mine[words.RX_OFFERS] += 1
        mine[words.RX_NEXT_OFFER], mine[words.RX_NEXT_RING] = mine[words.RX_OFFERS], region.address
        mine[words.RX_NEXT_TOKEN] = token - (token >> 63 << 64)
        self._command(self._kernels.offer_ring, region.length)

    def read_offer(self) -> tuple[int, int, int] | None:
        """Return number, token and length of the ring that the peer offers, once; None: nothing new.

        Raises: LocalProtocolError (closed, or a thread is sending), RemoteProtocolError.
        """
        if not self._command(self._kernels.read_offer):
            return None
        offered = (words.TX_OFFER_SEEN, words.TX_OFFERED_TOKEN, words.TX_OFFERED_BYTES)
        number, token, length = (self._words[word] % 2**64 for word in offered)
        return number, token, length

    @property
    def ring_pending(self) -> bool:
        """Whether the ring that `use_ring` was last given is not in use yet."""
        return self._words[words.TX_NEXT_BYTES] != 0

    def use_ring(self, region: Mapped, number: int) -> None:
        """Go on sending in a region that the peer has offered, from the next send on that may.

        Not while `ring_pending`: a send in another thread must not see half of each. The length is set last.
        """
        mine, length = self._words, region.length
        assert not mine[words.TX_NEXT_BYTES]
        self._rings[region.address] = _ring_view(region, 0)
        mine[words.TX_NEXT_OFFER] = number - (number >> 63 << 64)
        mine[words.TX_NEXT_RING] = region.address
        mine[words.TX_NEXT_BYTES] = length

    def go_home(self) -> bool:
        """Go back to the home ring for sending, if everything sent is consumed; tell whether.

        Raises: LocalProtocolError (closed, or a thread is sending), RemoteProtocolError.
        """
        return self._command(self._kernels.go_home) != 0

    def follow(self) -> None:
        """See whether the peer has moved, though it has sent nothing since. Raises as `recv`."""
        self._command(self._kernels.follow)

    def uses(self, region: Mapped) -> bool | None:
        """Whether a region of rings is in use, or may be; then never again. None: cannot be said in mid-call."""
        found = self._kernels.uses(self._address, region.address)  # in one step: rings change with the GIL held
        if found == 0:
            self._rings.pop(region.address, None)
        return None if found == 2 else found == 1

    # Settings and end

    @property
    def max_spin_ns(self) -> int:
        """Longest spin of one call in ns, 0..50000. Setting it resets the adaptive budget."""
        return self._words[words.MAX_SPIN_NS]

    @max_spin_ns.setter
    def max_spin_ns(self, value: int) -> None:
        if not 0 <= value <= MAX_SPIN_NS:
            raise ValueError(f"max_spin_ns is {value}, must be 0..{MAX_SPIN_NS}")
        self._words[words.MAX_SPIN_NS] = value
        for base in (words.TX_SPIN, words.RX_SPIN):
            self._words[base + words.SPIN_BUDGET_NS] = value
            self._words[base + words.SPIN_BACKOFF] = 0

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._words[words.FATE] == words.SHUT

    def close(self) -> bool:
        """End all use of the regions by this endpoint; later calls raise LocalProtocolError. Tells the peer nothing.

        The mappings are let go at once unless another thread is inside a call; lent views keep them mapped.

        Returns: whether no thread is inside a call, so that this endpoint writes and reads nothing any more.
        """
        self._words[words.FATE] = words.SHUT
        if self._words[words.TX_BUSY] or self._words[words.RX_BUSY]:
            return False
        self._rings.clear()
        return True

    @property
    def sent_bytes(self) -> int:
        """Bytes ever sent, also after `close`."""
        return self._words[words.PRODUCER]

    @property
    def received_bytes(self) -> int:
        """Bytes ever consumed, also after `close`."""
        return self._words[words.CONSUMER]

    # Inside

    def _command(self, kernel: Callable[[int, int], int], argument: int = 0) -> int:
        result = kernel(self._address, argument)
        if 0 <= result < _ATTENTION:
            return result
        return self.finish(result)

    def finish(self, result: int) -> int:
        """Do what a kernel's result asks for: ring the doorbell, look after rings, raise; returns the count in it."""
        if result < 0:
            self._fail(result)
        if result & _DOORBELL:
            self._doorbell()
        if result & _ATTENTION and self.attend is not None:
            self.attend()
        return result & (_ATTENTION - 1)

    def _fail(self, code: int) -> NoReturn:
        mine = self._words
        if code == words.FAILED_LIE:
            name = _FIELD_NAMES[mine[words.LIE_FIELD]]
            seen, low, high = (mine[word] % 2**64 for word in (words.LIE_OBSERVED, words.LIE_LOWEST, words.LIE_HIGHEST))
            raise RemoteProtocolError(
                f"the peer wrote {name} {seen:#x}, expected {low:#x} to {high:#x}: abort the connection",
                state="poisoned",
                event=name,
            )
        if code == words.FAILED_SHUT:
            raise LocalProtocolError("the endpoint is closed", state="closed")
        if code == words.FAILED_BUSY:
            raise LocalProtocolError(
                "another thread is in a call of the same direction: one sender and one receiver at a time",
                state="busy",
            )
        raise LocalProtocolError(
            "the count is negative or exceeds what was lent: reserve before commit, peek before consume, and wait "
            "for less than the ring can hold",
            state="open",
        )


def _ring_view(region: Mapped, begin: int) -> memoryview:
    """View of the ring in a region; the exporter refers to the region, so every slice keeps it mapped."""
    exporter = (ctypes.c_char * (region.length - begin)).from_address(region.address + begin)
    exporter.region = region  # type: ignore[attr-defined]
    return memoryview(exporter).cast("B")
