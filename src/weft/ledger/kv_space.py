"""The virtual KV range of one model: which granules lie under it, which pages are free.

Pages may straddle granules; a granule can go when no live page overlaps it. Lowest indices are
used first, so that the top empties and can be given back.

A page is live while somebody holds it; several may hold one that nobody writes any more. One that
nobody holds is cached, if the index knows what it holds, else free. Cached pages are nobody's
property: whoever takes pages or unmaps granules may have them, least recently used first.
"""

import heapq
from collections.abc import Iterable

from weft.core.ids import ActionId, GranuleId, PageId
from weft.ledger.prefix import PrefixIndex


class KvSpace:
    """Pages of `page_bytes` over virtual granules of `granule_bytes`."""

    def __init__(
        self,
        page_bytes: int,
        granule_bytes: int,
        num_granules: int,
        index: PrefixIndex | None = None,
    ) -> None:
        self.page_bytes = page_bytes
        self.granule_bytes = granule_bytes
        self.num_virtual = num_granules
        self.num_pages = num_granules * granule_bytes // page_bytes
        self.granules: dict[int, GranuleId] = {}
        """Virtual granule -> physical, for those mapped or being mapped or unmapped."""
        self.mapping: dict[int, ActionId] = {}
        self.unmapping: set[int] = set()
        self.broken: set[int] = set()
        """Their map failed; live pages over them are still to be given back."""
        self.index = index or PrefixIndex()
        self.live: dict[PageId, int] = {}
        """Pages in use, and by how many."""
        self.cached: dict[PageId, None] = {}
        """Pages nobody holds whose content the index knows, least recently used first."""
        self._free: list[int] = []
        self._free_set: set[int] = set()
        self._live_in: dict[int, int] = {}
        self._cached_in: dict[int, int] = {}

    def span(self, page: int) -> range:
        """The virtual granules a page overlaps."""
        first = page * self.page_bytes // self.granule_bytes
        last = ((page + 1) * self.page_bytes - 1) // self.granule_bytes
        return range(first, last + 1)

    def _usable(self, page: int) -> bool:
        return all(
            v in self.granules and v not in self.unmapping and v not in self.broken
            for v in self.span(page)
        )

    def _pages_over(self, at: int) -> range:
        first = at * self.granule_bytes // self.page_bytes
        last = ((at + 1) * self.granule_bytes - 1) // self.page_bytes
        return range(first, min(last + 1, self.num_pages))

    @property
    def num_free(self) -> int:
        """Pages that can be taken now without mapping more or giving up cached ones."""
        return len(self._free_set)

    @property
    def num_takeable(self) -> int:
        """Pages that can be taken now without mapping more."""
        return len(self._free_set) + len(self.cached)

    def choose_virtual(self, pages_wanted: int) -> list[int]:
        """Virtual granules to map so that at least `pages_wanted` more pages become usable."""
        chosen: list[int] = []
        have = set(self.granules) - self.unmapping - self.broken
        gained = 0
        at = 0
        while gained < pages_wanted and at < self.num_virtual:
            if at not in self.granules:
                have.add(at)
                chosen.append(at)
                gained += sum(
                    1 for p in self._pages_over(at) if all(v in have for v in self.span(p))
                )
            at += 1
        return chosen if gained >= pages_wanted else []

    def begin_map(self, at: list[int], granules: list[GranuleId], action: ActionId) -> None:
        """The pages above become takeable at once; their users must follow `action`."""
        for virtual, granule in zip(at, granules, strict=True):
            assert virtual not in self.granules
            self.granules[virtual] = granule
            self.mapping[virtual] = action
        self._offer(at)

    def _offer(self, at: list[int]) -> None:
        for virtual in at:
            for page in self._pages_over(virtual):
                if page in self._free_set or page in self.live or page in self.cached:
                    continue
                if self._usable(page):
                    self._free_set.add(page)
                    heapq.heappush(self._free, page)

    def end_map(self, at: tuple[int, ...]) -> None:
        for virtual in at:
            del self.mapping[virtual]

    def break_map(self, at: tuple[int, ...]) -> None:
        """The map did not happen. Free pages over it vanish, live ones must be given back."""
        for virtual in at:
            del self.mapping[virtual]
        self.broken.update(at)
        self._withdraw(at)

    def end_broken(self, at: tuple[int, ...]) -> list[GranuleId]:
        """No live page is left over a broken map: the physical granules come back."""
        assert not any(virtual in self._live_in for virtual in at), "live pages over a broken map"
        self.broken.difference_update(at)
        return [self.granules.pop(virtual) for virtual in at]

    def _withdraw(self, at: tuple[int, ...] | list[int]) -> None:
        for virtual in at:
            for page in self._pages_over(virtual):
                self._free_set.discard(page)
                if virtual in self._cached_in and page in self.cached:
                    self._give_up(PageId(page))

    def take(self, count: int) -> list[PageId]:
        """`count` pages: free ones, lowest first, then cached ones, which are given up. The caller
        checked num_takeable."""
        taken: list[PageId] = []
        while self._free_set and len(taken) < count:
            page = heapq.heappop(self._free)
            if page in self._free_set:
                self._free_set.remove(page)
                taken.append(PageId(page))
        while len(taken) < count:
            cached = next(iter(self.cached))
            self._give_up(cached)
            taken.append(cached)
        for taken_page in taken:
            self.live[taken_page] = 1
            self._count(self._live_in, taken_page, 1)
        return taken

    def share(self, page: PageId) -> None:
        """One more holder of a live or cached page; nobody writes to it from now on."""
        if page in self.live:
            self.live[page] += 1
            return
        del self.cached[page]
        self._count(self._cached_in, page, -1)
        self.live[page] = 1
        self._count(self._live_in, page, 1)

    def give(self, pages: list[PageId]) -> None:
        """One holder less, of pages in the order of their tokens. Raises KeyError if one is not
        live. Of those that become cached, the last tokens are given up first."""
        for page in reversed(pages):
            holders = self.live[page] - 1
            if holders:
                self.live[page] = holders
                continue
            del self.live[page]
            self._count(self._live_in, page, -1)
            if not self._usable(page):
                self.index.drop_page(page)
            elif page in self.index.by_page:
                self.cached[page] = None
                self._count(self._cached_in, page, 1)
                self.index.want_saved(page)
            else:
                self._free_set.add(page)
                heapq.heappush(self._free, page)

    def _count(self, counts: dict[int, int], page: PageId, change: int) -> None:
        for virtual in self.span(page):
            count = counts.get(virtual, 0) + change
            if count:
                counts[virtual] = count
            else:
                del counts[virtual]

    def _give_up(self, page: PageId) -> None:
        del self.cached[page]
        self._count(self._cached_in, page, -1)
        self.index.drop_page(page)

    def maps_over(self, pages: list[PageId]) -> set[int]:
        """Virtual granules under these pages whose map is still in flight."""
        if not self.mapping:
            return set()
        return {v for page in pages for v in self.span(page) if v in self.mapping}

    def empty_granules(self, *, cached: bool = True) -> list[int]:
        """Mapped virtual granules that no live page overlaps, highest first; first those that no
        cached page overlaps either, and without `cached` those alone."""
        return sorted(
            (
                v
                for v in self.granules
                if v not in self.mapping
                and v not in self.unmapping
                and v not in self.broken
                and v not in self._live_in
                and (cached or v not in self._cached_in)
            ),
            key=lambda v: (v in self._cached_in, -v),
        )

    def begin_unmap(self, at: list[int]) -> list[GranuleId]:
        self._withdraw(at)
        self.unmapping.update(at)
        return [self.granules[v] for v in at]

    def end_unmap(self, at: tuple[int, ...]) -> list[GranuleId]:
        self.unmapping.difference_update(at)
        return [self.granules.pop(v) for v in at]

    def fail_unmap(self, at: tuple[int, ...]) -> None:
        """Still mapped: the pages come back."""
        self.unmapping.difference_update(at)
        self._offer(list(at))

    def check_integrity(self) -> None:
        assert self.mapping.keys() <= self.granules.keys()
        assert self.unmapping <= self.granules.keys()
        assert not self.unmapping & self.mapping.keys()
        assert not self.broken & (self.mapping.keys() | self.unmapping)
        assert self._counts(self.live) == self._live_in
        assert self._counts(self.cached) == self._cached_in
        for page in self.live:
            assert page not in self._free_set, f"page {page} is live and free"
            assert page not in self.cached, f"page {page} is live and cached"
            assert self.live[page] > 0
        assert not self._free_set & self.cached.keys(), "a page is free and cached"
        usable = {
            page
            for virtual in self.granules
            for page in self._pages_over(virtual)
            if self._usable(page)
        }
        sound = {int(p) for p in self.live if self._usable(p)}
        assert sound | self._free_set | self.cached.keys() == usable, "pages lost or invented"
        assert self._free_set <= set(self._free)
        assert self.cached.keys() <= self.index.by_page.keys(), "cached, but as what?"
        assert self.index.by_page.keys() <= self.cached.keys() | self.live.keys()
        self.index.check_integrity()

    def _counts(self, pages: Iterable[PageId]) -> dict[int, int]:
        counts: dict[int, int] = {}
        for page in pages:
            for virtual in self.span(page):
                assert virtual in self.granules, f"page {page} over unmapped {virtual}"
                assert virtual not in self.unmapping, f"page {page} over unmapping {virtual}"
                counts[virtual] = counts.get(virtual, 0) + 1
        return counts
