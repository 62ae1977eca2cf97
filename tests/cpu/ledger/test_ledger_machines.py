"""Property tests of the ledger's parts: extents, KV space, hazards."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from weft.core.ids import ActionId, GranuleId, PageId
from weft.core.request import Extent
from weft.ledger.extents import ALIGN_BYTES, ExtentAllocator, merge
from weft.ledger.hazards import Hazards
from weft.ledger.kv_space import KvSpace
from weft.ledger.prefix import (
    DIGEST_BYTES,
    Block,
    HostShelf,
    PrefixIndex,
    next_digest,
    root_digest,
)

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
        self.holders: dict[int, int] = {}
        self.content: dict[int, int] = {}
        """What the index knows, page by page."""

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
        before = set(self.space.cached)
        self.space.break_map(at)
        for page in before - self.space.cached.keys():
            del self.content[page]
        lost = [p for p in self.space.live if set(at).intersection(self.space.span(p))]
        for page in lost:
            while page in self.space.live:
                self.space.give([page])
            self.holders[page] = 0
            self.content.pop(page, None)
        assert len(self.space.end_broken(at)) == len(at)

    @precondition(lambda self: self.space.num_takeable)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        free, cached = self.space.num_free, list(self.space.cached)
        count = data.draw(st.integers(1, self.space.num_takeable))
        pages = self.space.take(count)
        assert len(set(pages)) == count
        for page in pages:
            assert all(v in self.space.granules for v in self.space.span(page))
            assert self.holders.get(page, 0) == 0, "a page in use was taken"
            self.holders[page] = 1
            self.content.pop(page, None)
        assert set(pages[free:]) == set(cached[: max(count - free, 0)]), "not the oldest"

    @precondition(lambda self: self.space.live)
    @rule(data=st.data(), digest=st.integers(0, 9))
    def enter(self, data: st.DataObject, digest: int) -> None:
        page = data.draw(st.sampled_from(sorted(self.space.live)))
        if self.space.index.enter(bytes([digest]), page) is not None:
            assert page not in self.content and digest not in self.content.values()
            self.content[page] = digest

    @precondition(lambda self: self.space.index.by_page)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.space.index.blocks)))
        (block,) = self.space.index.find(iter([digest]))
        assert block.page is not None and self.content[block.page] == digest[0]
        self.space.share(block.page)
        self.holders[block.page] = self.holders.get(block.page, 0) + 1

    @precondition(lambda self: self.space.live)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        live = sorted(self.space.live)
        pages = data.draw(st.lists(st.sampled_from(live), unique=True, min_size=1))
        self.space.give(pages)
        for page in pages:
            self.holders[page] -= 1
        newly = [p for p in self.space.cached if p in pages]
        assert newly == [p for p in reversed(pages) if p in newly], "not the last tokens first"

    @rule(cached=st.booleans(), most=st.integers(1, 4))
    def unmap_empty(self, cached: bool, most: int) -> None:
        at = self.space.empty_granules(cached=cached)[:most]
        if not at:
            return
        before = set(self.space.cached)
        self.space.begin_unmap(at)
        self.unmaps.append(tuple(at))
        gone = before - self.space.cached.keys()
        assert cached or not gone, "cached pages were given up for nothing"
        assert all(set(at).intersection(self.space.span(page)) for page in gone)
        for page in gone:
            del self.content[page]

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
        if not hasattr(self, "space"):
            return
        self.space.check_integrity()
        assert self.space.live == {page: n for page, n in self.holders.items() if n}
        known = {page: block.digest[0] for page, block in self.space.index.by_page.items()}
        assert known == self.content


def whole(extents: tuple[Extent, ...]) -> int:
    """Bytes of the region that these take."""
    return -(-sum(e.num_bytes for e in extents) // PAGE) * PAGE


class ShelfMachine(RuleBasedStateMachine):
    """Blocks of two models and parked requests share a region; requests always win."""

    @initialize(pages=st.integers(1, 12))
    def begin(self, pages: int) -> None:
        self.extents = ExtentAllocator(0, pages * PAGE, 5 * PAGE)
        self.shelf = HostShelf(self.extents, max_share=0.5)
        self.indices = [PrefixIndex(), PrefixIndex()]
        self.pages = itertools.count(0)
        self.requests: list[tuple[Extent, ...]] = []
        self.pinned: list[Block] = []
        self.coming: list[tuple[Block, tuple[Extent, ...]]] = []

    @rule(index=st.integers(0, 1), digest=st.integers(0, 6), size=st.integers(1, 2))
    def begin_block(self, index: int, digest: int, size: int) -> None:
        """A block is computed on the device and its way to the host begins."""
        page = PageId(next(self.pages))
        block = self.indices[index].enter(bytes([digest]), page)
        room = self.shelf.take_for_block(size * PAGE - digest)
        if block is not None and room is not None:
            self.coming.append((block, room))
        elif room is not None:
            self.shelf.give_untaken(room)

    @precondition(lambda self: self.coming)
    @rule(ok=st.booleans(), device=st.booleans())
    def end_block(self, ok: bool, device: bool) -> None:
        block, room = self.coming.pop()
        if not device and block.page is not None:
            block.index.drop_page(block.page)
        if ok:
            self.shelf.put(block, room)
        else:
            self.shelf.give_untaken(room)

    @rule(num_bytes=st.integers(1, 6 * PAGE))
    def park(self, num_bytes: int) -> None:
        stuck = [room for _, room in self.coming] + [b.extents for b in set(self.pinned)]
        room = self.extents.num_bytes - sum(map(whole, stuck)) - sum(map(whole, self.requests))
        got = self.shelf.take(num_bytes)
        assert (got is not None) == (-(-num_bytes // PAGE) * PAGE <= room)
        if got is not None:
            self.requests.append(got)

    @precondition(lambda self: self.requests)
    @rule()
    def resume(self) -> None:
        self.extents.give(self.requests.pop())

    @rule(index=st.integers(0, 1), data=st.data())
    def read(self, index: int, data: st.DataObject) -> None:
        there = [b for b in self.indices[index].blocks.values() if b.extents]
        if there:
            block = data.draw(st.sampled_from(there))
            block.pins += 1
            self.shelf.touch(block)
            self.pinned.append(block)

    @precondition(lambda self: self.pinned)
    @rule()
    def end_read(self) -> None:
        self.pinned.pop().pins -= 1

    @rule(index=st.integers(0, 1))
    def forget(self, index: int) -> None:
        if not any(b.index is self.indices[index] for b in self.pinned):
            self.shelf.drop_all(self.indices[index])

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "shelf"):
            return
        self.extents.check_integrity()
        self.shelf.check_integrity()
        for index in self.indices:
            index.check_integrity()
        assert all(block.extents for block in self.pinned), "given up under a reader"
        blocks = [b for index in self.indices for b in index.blocks.values() if b.extents]
        assert len(blocks) == self.shelf.num_blocks
        assert self.shelf.held_bytes <= self.shelf.max_bytes
        used = [b.extents for b in blocks] + [room for _, room in self.coming]
        assert self.shelf.held_bytes == sum(map(whole, used))


TestExtents = ExtentMachine.TestCase
TestExtents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestKvSpace = KvSpaceMachine.TestCase
TestKvSpace.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestShelf = ShelfMachine.TestCase
TestShelf.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


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


def test_a_chain_names_tenant_model_adapter_tokens_and_their_places() -> None:
    roots = [
        root_digest(*names)
        for names in [("a", "m", ""), ("b", "m", ""), ("a", "m", "x"), ("am", "", ""), ("a", "m")]
    ]
    assert len(set(roots)) == len(roots)
    one = next_digest(roots[0], (1, 2))
    others = [
        next_digest(roots[1], (1, 2)),
        next_digest(roots[0], (2, 1)),
        next_digest(one, (1, 2)),
        next_digest(roots[0], (1, 2, 0)),
        next_digest(roots[0], (258,)),
    ]
    assert one not in others and len(set(others)) == len(others)
    assert one == next_digest(root_digest("a", "m", ""), [1, 2]) and len(one) == DIGEST_BYTES


def test_a_chain_is_found_up_to_its_first_gap() -> None:
    index = PrefixIndex()
    chain = [bytes([i]) for i in range(4)]
    for page, digest in enumerate(chain):
        index.enter(digest, PageId(page))
    assert [b.page for b in index.find(iter(chain))] == [0, 1, 2, 3]
    index.drop_page(PageId(2))
    assert [b.page for b in index.find(iter(chain))] == [0, 1]
