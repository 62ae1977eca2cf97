"""The virtual KV range of one model: which granules lie under it, which pages are free.

Pages may straddle granules; a granule can go when no live page overlaps it. Lowest indices are
used first, so that the top empties and can be given back.
"""

import heapq

from weft.core.ids import ActionId, GranuleId, PageId


class KvSpace:
    """Pages of `page_bytes` over virtual granules of `granule_bytes`."""

    def __init__(self, page_bytes: int, granule_bytes: int, num_granules: int) -> None:
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
        self.live: set[PageId] = set()
        self._free: list[int] = []
        self._free_set: set[int] = set()
        self._live_in: dict[int, int] = {}

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
        """Pages that can be taken now without mapping more."""
        return len(self._free_set)

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
                if page in self._free_set or PageId(page) in self.live:
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

    def take(self, count: int) -> list[PageId]:
        """`count` free pages, lowest first. The caller checked num_free."""
        taken: list[PageId] = []
        while len(taken) < count:
            page = heapq.heappop(self._free)
            if page in self._free_set:
                self._free_set.remove(page)
                taken.append(PageId(page))
        for taken_page in taken:
            self.live.add(taken_page)
            for virtual in self.span(taken_page):
                self._live_in[virtual] = self._live_in.get(virtual, 0) + 1
        return taken

    def give(self, pages: list[PageId]) -> None:
        """Pages nobody uses any more. Raises KeyError if one is not live."""
        for page in pages:
            self.live.remove(page)
            for virtual in self.span(page):
                self._live_in[virtual] -= 1
                if not self._live_in[virtual]:
                    del self._live_in[virtual]
            if self._usable(page):
                self._free_set.add(page)
                heapq.heappush(self._free, page)

    def maps_over(self, pages: list[PageId]) -> set[int]:
        """Virtual granules under these pages whose map is still in flight."""
        if not self.mapping:
            return set()
        return {v for page in pages for v in self.span(page) if v in self.mapping}

    def empty_granules(self) -> list[int]:
        """Mapped virtual granules that no live page overlaps, highest first."""
        return sorted(
            (
                v
                for v in self.granules
                if v not in self.mapping
                and v not in self.unmapping
                and v not in self.broken
                and v not in self._live_in
            ),
            reverse=True,
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
        count: dict[int, int] = {}
        for page in self.live:
            assert page not in self._free_set, f"page {page} is live and free"
            for virtual in self.span(page):
                assert virtual in self.granules, f"live page {page} over unmapped {virtual}"
                assert virtual not in self.unmapping, f"live page {page} over unmapping {virtual}"
                count[virtual] = count.get(virtual, 0) + 1
        assert count == self._live_in
        usable = {
            page
            for virtual in self.granules
            for page in self._pages_over(virtual)
            if self._usable(page)
        }
        sound = {int(p) for p in self.live if self._usable(p)}
        assert sound | self._free_set == usable, "pages lost or invented"
        assert self._free_set <= set(self._free)
