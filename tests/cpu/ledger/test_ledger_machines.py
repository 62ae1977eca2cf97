"""Property tests of the ledger's parts: extents, KV space, hazards."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from weft.core.ids import ActionId, GranuleId
from weft.core.request import Extent
from weft.ledger.extents import ALIGN_BYTES, ExtentAllocator, merge
from weft.ledger.hazards import Hazards
from weft.ledger.kv_space import KvSpace

PAGE = ALIGN_BYTES


class ExtentMachine(RuleBasedStateMachine):
    """take / give / reserve against a byte map."""

    @initialize(chunk=st.sampled_from([3 * PAGE, 8 * PAGE, 64 * PAGE]), offset=st.integers(0, 3))
    def begin(self, chunk: int, offset: int) -> None:
        self.chunk = chunk
        self.base = offset * PAGE
        self.size = 32 * PAGE
        self.extents = ExtentAllocator(self.base, self.size, chunk)
        self.held: list[tuple[Extent, ...]] = []

    @rule(num_bytes=st.integers(1, 12 * PAGE))
    def take(self, num_bytes: int) -> None:
        free = self.extents.free_bytes
        got = self.extents.take(num_bytes)
        if got is None:
            assert -(-num_bytes // PAGE) * PAGE > free
            return
        assert sum(e.num_bytes for e in got) == num_bytes
        for extent in got:
            assert extent.offset // self.chunk == (extent.offset + extent.num_bytes - 1) // (
                self.chunk
            ), "an extent crosses a chunk border"
        self.held.append(got)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.extents.give(self.held.pop(index))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def crash_and_reserve(self, data: st.DataObject) -> None:
        """A new incarnation reserves a part of what was held; the rest is free again."""
        keep = [kv for kv in self.held if data.draw(st.booleans())]
        self.extents = ExtentAllocator(self.base, self.size, self.chunk)
        for kv in keep:
            assert self.extents.reserve(kv)
            assert not self.extents.reserve(kv), "the same extents were reserved twice"
        self.held = keep

    @rule(begin=st.integers(0, 40 * PAGE), length=st.integers(1, 4 * PAGE))
    def reserve_nonsense(self, begin: int, length: int) -> None:
        taken = merge(tuple(e for kv in self.held for e in kv))
        aligned_end = -(-(begin + length) // PAGE) * PAGE
        legal = (
            begin % PAGE == 0
            and begin >= self.base
            and begin + length <= self.base + self.size
            and not any(b < aligned_end and begin < -(-e // PAGE) * PAGE for b, e in taken)
        )
        extent = (Extent(begin, length),)
        assert self.extents.reserve(extent) == legal
        if legal:
            self.extents.give(extent)

    @invariant()
    def disjoint(self) -> None:
        if not hasattr(self, "extents"):
            return
        self.extents.check_integrity()
        ranges = sorted((e.offset, e.offset + e.num_bytes) for kv in self.held for e in kv)
        for (_, end), (begin, _) in itertools.pairwise(ranges):
            assert end <= begin, "two holders share bytes"

    def teardown(self) -> None:
        if hasattr(self, "extents"):
            for kv in self.held:
                self.extents.give(kv)
            assert self.extents.free_bytes == self.size


class KvSpaceMachine(RuleBasedStateMachine):
    """map / take / give / unmap / failures, pages smaller, equal and larger than granules."""

    @initialize(page=st.sampled_from([1, 2, 3, 5, 8, 13]), count=st.integers(1, 12))
    def begin(self, page: int, count: int) -> None:
        self.space = KvSpace(page_bytes=page * 100, granule_bytes=500, num_granules=count)
        self.ids = itertools.count(1)
        self.granules = itertools.count(0)
        self.maps: list[tuple[int, ...]] = []
        self.unmaps: list[tuple[int, ...]] = []
        self.broken: list[tuple[int, ...]] = []

    @rule(pages=st.integers(1, 6))
    def map_more(self, pages: int) -> None:
        before = self.space.num_free
        at = self.space.choose_virtual(pages)
        if not at:
            return
        ids = [GranuleId(next(self.granules)) for _ in at]
        self.space.begin_map(at, ids, ActionId(next(self.ids)))
        assert self.space.num_free >= before + pages
        self.maps.append(tuple(at))

    @precondition(lambda self: self.maps)
    @rule(ok=st.booleans())
    def map_ends(self, ok: bool) -> None:
        at = self.maps.pop()
        if ok:
            self.space.end_map(at)
            return
        self.space.break_map(at)
        lost = [p for p in self.space.live if set(at).intersection(self.space.span(p))]
        self.space.give(lost)
        assert len(self.space.end_broken(at)) == len(at)

    @precondition(lambda self: self.space.num_free)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, self.space.num_free))
        pages = self.space.take(count)
        assert len(set(pages)) == count
        for page in pages:
            assert all(v in self.space.granules for v in self.space.span(page))

    @precondition(lambda self: self.space.live)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        live = sorted(self.space.live)
        self.space.give(data.draw(st.lists(st.sampled_from(live), unique=True, min_size=1)))

    @rule()
    def unmap_empty(self) -> None:
        at = self.space.empty_granules()
        if at:
            self.space.begin_unmap(at)
            self.unmaps.append(tuple(at))

    @precondition(lambda self: self.unmaps)
    @rule(ok=st.booleans())
    def unmap_ends(self, ok: bool) -> None:
        at = self.unmaps.pop()
        if ok:
            assert len(self.space.end_unmap(at)) == len(at)
        else:
            self.space.fail_unmap(at)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "space"):
            self.space.check_integrity()


TestExtents = ExtentMachine.TestCase
TestExtents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestKvSpace = KvSpaceMachine.TestCase
TestKvSpace.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 4)), st.sets(st.integers(0, 4)), st.booleans()),
        max_size=25,
    )
)
def test_conflicting_actions_are_ordered(script: list[tuple[set[int], set[int], bool]]) -> None:
    """Any two actions in flight that conflict over a resource are ordered by the closure of
    `after`, and actions that share nothing are not."""
    hazards = Hazards()
    flight: dict[ActionId, tuple[set[int], set[int]]] = {}
    before: dict[ActionId, set[ActionId]] = {}
    for i, (reads, writes, end_one) in enumerate(script):
        action = ActionId(i)
        after = hazards.plan(action, reads=sorted(reads), writes=sorted(writes))
        assert set(after) <= flight.keys()
        before[action] = set(after).union(*(before[a] for a in after))
        for other, (their_reads, their_writes) in flight.items():
            clash = writes & (their_reads | their_writes) or reads & their_writes
            if clash:
                assert other in before[action], f"{action} must follow {other}"
            elif other in after:
                pytest.fail(f"{action} follows {other} for nothing")
        flight[action] = (reads, writes)
        hazards.check_integrity()
        if end_one:
            # Actions end in an order that respects `after`: the oldest can always end.
            oldest = min(flight)
            hazards.done(oldest)
            del flight[oldest]
            for followers in before.values():
                followers.discard(oldest)
    for action in sorted(flight):
        hazards.done(action)
    assert hazards.in_flight == 0
    assert not any(hazards.busy(key) for key in range(5))


def test_a_run_that_follows_a_load_is_not_ordered_behind_it() -> None:
    hazards = Hazards()
    load = ActionId(1)
    assert hazards.plan(load, writes=[("w", "m")]) == ()
    assert hazards.plan(ActionId(2), reads=[("w", "m")], except_for=load) == ()
    assert hazards.plan(ActionId(3), reads=[("w", "m")]) == (load,)
    assert hazards.plan(ActionId(4), writes=[("w", "m")]) == (load, ActionId(2), ActionId(3))


def test_an_action_is_planned_once() -> None:
    hazards = Hazards()
    hazards.plan(ActionId(1), writes=["x"])
    with pytest.raises(ValueError, match="already in flight"):
        hazards.plan(ActionId(1))
