"""The ledger: the state of every block of a pull, across all its sessions. No I/O.

A block is pending, in flight (given to one session), received, or verified. Striping over several sources, failover and
resuming are the same operation: blocks move between pending and in flight. The ledger is pinned to one root. A source
with another root holds other weights, and is refused, even if its tensors have equal names and shapes.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Hashable, Iterable, Iterator
from collections.abc import Set as AbstractSet

from netloader.core.manifest import DIGEST_BYTES
from netloader.core.plan import Plan, Ranges, expand, to_ranges
from netloader.errors import DigestMismatch, LocalProtocolError, RootMismatch, shown

__all__ = ["BlockState", "Ledger"]

SessionId = Hashable


class BlockState(enum.IntEnum):
    """The state of a block."""

    PENDING = 0
    IN_FLIGHT = 1
    RECEIVED = 2
    VERIFIED = 3


# Plain integers, because looking up an enum member is several times slower, and each block needs a dozen look-ups.
_PENDING, _IN_FLIGHT, _RECEIVED, _VERIFIED = map(int, BlockState)


class _Queue:
    """Block numbers, lowest first, each at most once.

    It may hold blocks that are no longer pending. They are dropped when they reach the front, so that a block need not
    be searched for in every queue.
    """

    def __init__(self, size: int, numbers: Iterable[int]) -> None:
        self._heap = list(numbers)
        self._listed = bytearray(size)
        for number in self._heap:
            self._listed[number] = 1
        heapq.heapify(self._heap)

    def __contains__(self, number: int) -> bool:
        return bool(self._listed[number])

    def push(self, number: int) -> None:
        if not self._listed[number]:
            self._listed[number] = 1
            heapq.heappush(self._heap, number)

    def first(self, states: bytearray, denied: AbstractSet[int]) -> int | None:
        """The lowest block that is pending and not in `denied`; None when there is none."""
        heap = self._heap
        while heap and (states[heap[0]] != _PENDING or heap[0] in denied):
            self.pop()
        return heap[0] if heap else None

    def pop(self) -> None:
        self._listed[heapq.heappop(self._heap)] = 0


def _mask(numbers: Iterable[int]) -> int:
    return sum(1 << number for number in numbers)


class Ledger:
    """Which session fetches which block, and what has been verified.

    Args:
        root: Root that is required from the start (EXPECT_ROOT), in hex; empty to take the root of the first source.
        pinned_by: Where `root` comes from, for messages.
    """

    def __init__(self, root: str = "", pinned_by: str = "") -> None:
        self._root = root
        self._pinned_by = pinned_by
        self._required = (root, pinned_by)
        self._plan: Plan | None = None
        self._digests = b""
        self._states = bytearray()
        self._queue = _Queue(0, ())  # all blocks in state PENDING, and maybe others
        self._in_flight: dict[SessionId, set[int]] = {}  # blocks in state IN_FLIGHT or RECEIVED
        self._in_flight_bytes: dict[SessionId, int] = {}  # bytes of those blocks
        self._denied: dict[SessionId, set[int]] = {}
        # A session that was denied blocks gets a queue of its own, without them.
        # In the common queue it would have to skip the denied blocks at each look-up.
        self._own_queues: dict[SessionId, _Queue] = {}
        self._verified_blocks = 0
        self._verified_bytes = 0
        self._pending_mask = 0
        self._verified_mask = 0

    @property
    def root(self) -> str:
        """The pinned root in hex; empty before a source was accepted."""
        return self._root

    @property
    def pinned_by(self) -> str:
        """Where the pinned root comes from."""
        return self._pinned_by

    @property
    def root_required(self) -> bool:
        """Whether the root was required from the start."""
        return bool(self._required[0])

    @property
    def plan(self) -> Plan | None:
        """The plan; None before the first source was accepted."""
        return self._plan

    @property
    def complete(self) -> bool:
        """Whether every block is verified."""
        return self._plan is not None and self._verified_blocks == len(self._states)

    @property
    def verified_blocks(self) -> int:
        """Number of verified blocks."""
        return self._verified_blocks

    @property
    def verified_bytes(self) -> int:
        """Bytes of the verified blocks."""
        return self._verified_bytes

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all blocks; None before a plan is known."""
        return None if self._plan is None else self._plan.nbytes

    @property
    def idle(self) -> bool:
        """Whether any block is pending."""
        return self._pending_mask != 0

    @property
    def pending_mask(self) -> int:
        """The blocks that are pending: bit n stands for block n."""
        return self._pending_mask

    @property
    def verified_mask(self) -> int:
        """The blocks that are verified: bit n stands for block n."""
        return self._verified_mask

    @property
    def sharers(self) -> int:
        """Number of sessions that have blocks in flight."""
        return sum(1 for numbers in self._in_flight.values() if numbers)

    @property
    def pending_bytes(self) -> int:
        """Bytes of all pending blocks."""
        plan = self._known_plan()
        return plan.nbytes - self._verified_bytes - sum(self._in_flight_bytes.values())

    def state(self, number: int) -> BlockState:
        """The state of block `number`."""
        return BlockState(self._states[number])

    def expected_digest(self, number: int) -> bytes:
        """The digest announced for block `number`."""
        return self._digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]

    def pin(self, root: str, plan: Plan, digests: bytes, by: str) -> None:
        """Accept what a source announced. The first announcement pins the root; later ones have to have the same root.

        Args:
            root: The root announced, already checked against manifest and digests.
            plan: The plan derived from the announcement.
            digests: All block digests, joined.
            by: The source.

        Raises:
            RootMismatch: The ledger is pinned to another root.
            LocalProtocolError: The same root came with another plan: the caller did not check the announcement.
        """
        if not root:
            raise LocalProtocolError(f"{by} announced no root")
        if self._root and root != self._root:
            raise RootMismatch(self._root, root, self._pinned_by)
        if self._plan is not None:
            if plan.digest != self._plan.digest or digests != self._digests:
                raise LocalProtocolError(f"root {root} came with another plan or other digests")
            return
        if len(digests) != DIGEST_BYTES * len(plan.blocks):
            raise LocalProtocolError(f"{len(digests)} bytes of digests for {len(plan.blocks)} blocks")
        if not self._root:
            self._root, self._pinned_by = root, by
        self._plan, self._digests = plan, digests
        self._states = bytearray(len(plan.blocks))
        self._queue = _Queue(len(plan.blocks), range(len(plan.blocks)))
        self._pending_mask = (1 << len(plan.blocks)) - 1

    def unpin(self) -> None:
        """Forget what was pinned: no block of it was verified, and no session fetches one. Does nothing if unpinned.

        Raises:
            LocalProtocolError: Blocks were verified, or are in flight.
        """
        if self._verified_blocks or any(self._in_flight.values()):
            raise LocalProtocolError("a pin was to be taken back after blocks of it were verified or requested")
        self._root, self._pinned_by = self._required
        self._plan, self._digests = None, b""
        self._states, self._queue = bytearray(), _Queue(0, ())
        self._pending_mask = 0

    def assign(self, session: SessionId, max_bytes: int, order: Iterable[int] | None = None) -> Ranges:
        """Assign pending blocks that its server did not deny to a session.

        Args:
            session: The session.
            max_bytes: Most bytes to assign; the first block is assigned even if it is larger.
            order: The blocks that may be assigned, in this order; None for all blocks, the lowest first.

        Returns:
            The blocks, now in flight; empty when there is none for this session.
        """
        plan = self._known_plan()
        taken: list[int] = []
        nbytes = 0
        for number in self._lowest(session) if order is None else self._allowed(session, order):
            nbytes += plan.blocks[number].nbytes
            if taken and nbytes > max_bytes:
                break
            taken.append(number)
            self._states[number] = _IN_FLIGHT
            self._pending_mask ^= 1 << number
        if taken:
            self._in_flight.setdefault(session, set()).update(taken)
            self._count(session, taken, 1)
        return to_ranges(taken)

    def in_flight(self, session: SessionId) -> frozenset[int]:
        """Blocks that `session` has in flight."""
        return frozenset(self._in_flight.get(session, ()))

    def in_flight_bytes(self, session: SessionId) -> int:
        """Bytes of the blocks that `session` has in flight; 0 only when it has none."""
        return self._in_flight_bytes.get(session, 0)

    def has_work_for(self, session: SessionId) -> bool:
        """Whether :meth:`assign` would assign a block to `session` now."""
        queue, denied = self._queue_of(session)
        return queue.first(self._states, denied) is not None

    def received(self, session: SessionId, number: int) -> None:
        """Mark a block as received: all its bytes have arrived, and are not yet verified.

        Raises:
            LocalProtocolError: The block is not in flight with this session.
        """
        if number not in self._in_flight.get(session, ()) or self._states[number] != _IN_FLIGHT:
            raise LocalProtocolError(f"block {number} arrived, but is not in flight with session {session!r}")
        self._states[number] = _RECEIVED

    def verify(self, session: SessionId, number: int, digest: bytes) -> None:
        """Compare the digest of a received block with the announced one, and mark the block as verified.

        Args:
            session: The session that received the block.
            number: The block.
            digest: Digest of the bytes in memory.

        Raises:
            DigestMismatch: The digests differ; the block is pending again.
            LocalProtocolError: The block was not received by this session.
        """
        if number not in self._in_flight.get(session, ()) or self._states[number] != _RECEIVED:
            raise LocalProtocolError(f"block {number} is to be verified, but session {session!r} did not receive it")
        plan = self._known_plan()
        expected = self.expected_digest(number)
        nbytes = plan.blocks[number].nbytes
        self._in_flight[session].discard(number)
        self._in_flight_bytes[session] -= nbytes
        if digest != expected:
            self._make_pending(number)
            raise DigestMismatch(number, plan.tensors_of(number), expected.hex(), digest.hex())
        self._states[number] = _VERIFIED
        self._verified_mask |= 1 << number
        self._verified_blocks += 1
        self._verified_bytes += nbytes

    def give_back(self, session: SessionId, ranges: Ranges) -> None:
        """Make blocks that a session's server can't send pending again, for other sessions only.

        Raises:
            LocalProtocolError: A block is not in flight with this session, or was received already.
        """
        numbers = set(expand(ranges))
        mine = self._in_flight.get(session, set())
        if not mine.issuperset(numbers) or any(self._states[n] != _IN_FLIGHT for n in numbers):
            raise LocalProtocolError(
                f"session {session!r} gives back blocks that it does not wait for: {shown(ranges)}"
            )
        if not numbers:
            return
        denied = self._denied.setdefault(session, set())
        denied.update(numbers)
        if session not in self._own_queues:
            allowed = (n for n, s in enumerate(self._states) if s == _PENDING and n not in denied)
            self._own_queues[session] = _Queue(len(self._states), allowed)
        mine.difference_update(numbers)
        self._count(session, numbers, -1)
        for number in numbers:
            self._make_pending(number)

    def lose(self, session: SessionId) -> Ranges:
        """A session ended: the blocks that it had in flight become pending.

        Returns:
            Those blocks.
        """
        numbers = self._in_flight.pop(session, set())
        self._in_flight_bytes.pop(session, None)
        self._denied.pop(session, None)
        self._own_queues.pop(session, None)
        for number in numbers:
            self._make_pending(number)
        return to_ranges(numbers)

    def check_invariants(self) -> None:
        """Check the invariants that hold between any two calls.

        Raises:
            LocalProtocolError: An invariant is violated: a bug in this module.
        """
        in_flight = [n for numbers in self._in_flight.values() for n in numbers]
        by_state: dict[BlockState, set[int]] = {state: set() for state in BlockState}
        for number, value in enumerate(self._states):
            by_state[BlockState(value)].add(number)
        pending, verified = by_state[BlockState.PENDING], by_state[BlockState.VERIFIED]
        nbytes = 0 if self._plan is None else sum(self._plan.blocks[n].nbytes for n in verified)
        broken = [
            len(in_flight) != len(set(in_flight)) and "a block is in flight with two sessions",
            set(in_flight) != by_state[BlockState.IN_FLIGHT] | by_state[BlockState.RECEIVED]
            and "in flight and received blocks belong to exactly one session",
            any(n not in self._queue for n in pending) and "each pending block is in the common queue",
            any(n not in q for s, q in self._own_queues.items() for n in pending - self._denied[s])
            and "each pending block is in the queue of each session that was not denied it",
            self._own_queues.keys() != self._denied.keys() and "each session that was denied blocks has a queue",
            (_mask(pending), _mask(verified)) != (self._pending_mask, self._verified_mask)
            and "the masks are those of the states",
            len(verified) != self._verified_blocks and "each verified block counts once",
            nbytes != self._verified_bytes and "each verified byte counts once",
            any(self._bytes_of(n) != self.in_flight_bytes(s) for s, n in self._in_flight.items())
            and "bytes in flight are those of the blocks in flight",
            self._plan is not None and not self._root and "a plan comes with a root",
        ]
        for text in broken:
            if text:
                raise LocalProtocolError(f"ledger: {text}")

    def _lowest(self, session: SessionId) -> Iterator[int]:
        queue, denied = self._queue_of(session)
        while (number := queue.first(self._states, denied)) is not None:
            yield number  # the caller takes it, or stops: a block that was taken is dropped at the next look

    def _allowed(self, session: SessionId, order: Iterable[int]) -> Iterator[int]:
        denied: AbstractSet[int] = self._denied.get(session, frozenset())
        return (number for number in order if self._states[number] == _PENDING and number not in denied)

    def _make_pending(self, number: int) -> None:
        self._states[number] = _PENDING
        self._pending_mask |= 1 << number
        self._queue.push(number)
        for session, queue in self._own_queues.items():
            if number not in self._denied[session]:
                queue.push(number)

    def _count(self, session: SessionId, numbers: Iterable[int], sign: int) -> None:
        """Add (`sign` 1) or subtract (-1) the bytes of blocks to or from those that a session has in flight."""
        self._in_flight_bytes[session] = self._in_flight_bytes.get(session, 0) + sign * self._bytes_of(numbers)

    def _bytes_of(self, numbers: Iterable[int]) -> int:
        plan = self._known_plan()
        return sum(plan.blocks[number].nbytes for number in numbers)

    def _queue_of(self, session: SessionId) -> tuple[_Queue, AbstractSet[int]]:
        """The queue of `session`, and the blocks in it that its server denied."""
        return self._own_queues.get(session, self._queue), self._denied.get(session, frozenset())

    def _known_plan(self) -> Plan:
        if self._plan is None:
            raise LocalProtocolError("the ledger has no plan yet")
        return self._plan
