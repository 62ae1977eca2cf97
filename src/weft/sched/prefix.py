"""The prefix cache: whole pages of known tokens are found instead of computed.

Digests are chained page by page from a root that names the tenant, the model and the adapter, each
with its generation: a model or adapter that was unassigned and comes back begins anew. Only whole
pages of positions that are known to be computed enter the index; nobody writes to those any more,
so requests share them by holding them. At least one token of a request is always computed.
"""

from collections.abc import Iterator

from weft.core.ids import ModelName, PageId
from weft.ledger.prefix import Block, Digest, next_digest, root_digest
from weft.sched.book import Book, RequestState

MAX_ENTERED = 256
"""Pages of one request that enter the index at one step's end: more only come at once when parked
KV has come back, and then the next steps bring the rest."""


class PrefixCache:
    """Finds and enters blocks for the requests of one unit."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._on = book.unit.prefix_cache

    def find(self, state: RequestState) -> list[Block]:
        """Blocks that hold the beginning of this request's known tokens."""
        if not self._on or not state.reuse or state.request.whole_prompt:
            return []
        memory = self._book.memory(state.request.model)
        if not memory.kv.index.blocks:
            return []
        most = (state.known - 1) // memory.spec.page_tokens
        return memory.kv.index.find(self._chain(state, memory.spec.page_tokens, most))

    def hold(self, state: RequestState) -> list[PageId]:
        """The pages of the device among what `find` gives, up to the first that is not there; one
        holder more for each, which the caller gives back if it does not use them."""
        kv = self._book.memory(state.request.model).kv
        pages: list[PageId] = []
        for block in self.find(state):
            if block.page is None:
                break
            kv.share(block.page)
            pages.append(block.page)
        return pages

    def begin(self, state: RequestState, pages: int) -> None:
        """The request starts behind so many pages that were found."""
        memory = self._book.memory(state.request.model)
        state.computed = state.planned = pages * memory.spec.page_tokens
        state.entered = pages
        state.cached_tokens = min(state.computed, len(state.request.prompt))
        self._book.models[state.request.model].prefix_hit_tokens += state.computed

    def enter(self, state: RequestState) -> None:
        """A step of this request ended: let others find what it has computed."""
        size = self._book.memory(state.request.model).spec.page_tokens
        full = min(state.computed // size, state.entered + MAX_ENTERED)
        if full <= state.entered or not self._on:
            return
        index = self._book.memory(state.request.model).kv.index
        for place, digest in enumerate(self._chain(state, size, full)):
            if place >= state.entered:
                index.enter(digest, state.pages[place])
        state.entered = full

    def _chain(self, state: RequestState, size: int, count: int) -> Iterator[Digest]:
        """Digests of the first `count` pages; each is worked out once, when it is asked for."""
        if not state.digests:
            state.digests.append(self._root(state))
        for place in range(count):
            if place + 1 == len(state.digests):
                ids = state.ids(place * size, (place + 1) * size)
                state.digests.append(next_digest(state.digests[-1], ids))
            yield state.digests[place + 1]

    def _root(self, state: RequestState) -> Digest:
        request = state.request
        names = (request.model, request.adapter or ModelName(""))
        generations = (str(self._generation(name)) for name in names)
        return root_digest(request.tenant, *names, *generations)

    def _generation(self, name: ModelName) -> int:
        entry = self._book.models.get(name)
        return 0 if entry is None else entry.generation
