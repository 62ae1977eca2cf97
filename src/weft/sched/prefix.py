"""The prefix cache: whole pages of known tokens are found instead of computed.

Digests are chained page by page from a root that names the tenant, the model and the adapter, each
with its generation: a model or adapter that was unassigned and comes back begins anew. Only whole
pages of positions that are known to be computed enter the index; nobody writes to those any more,
so requests share them by holding them. At least one token of a request is always computed.

Where models share the device, what nobody uses is copied to the host store while the link has
nothing better to do: whatever leaves the device later leaves it at once, and is found there.
"""

from dataclasses import dataclass, field
from itertools import islice

from weft.core.actions import CopyKv
from weft.core.ids import ModelName, RequestId
from weft.ledger.prefix import Block, Digest, PrefixIndex, next_digest, root_digest
from weft.sched.book import Book, ModelEntry, RequestState

NO_REQUEST = RequestId(-1)
"""Copies of the prefix cache are nobody's."""
MAX_CAUGHT_UP = 256
"""Pages of one request that enter the index at the end of one step besides those that the step
filled: more are there only when parked KV has come back, and then the next steps bring the rest."""
MAX_SAVE_BYTES = 32 << 20
"""Of one copy to the host store. There is one at a time, so a switch hardly waits for it."""
MAX_FETCH_FAILS = 2
"""After this many failed copies from the host store a request computes what is not on the
device."""


@dataclass
class Found:
    """What a request may begin with."""

    blocks: list[Block] = field(default_factory=list)
    here: int = 0
    """Of them on the device."""
    cached: int = 0
    """Of these held by nobody."""


class PrefixCache:
    """Finds, enters, saves and fetches blocks for the requests of one unit."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._on = book.unit.prefix_cache

    # -- finding --------------------------------------------------------------------------------

    def find(self, state: RequestState) -> Found:
        """What the beginning of this request's known tokens lies in. It is nobody's until `begin`:
        in the same decision nothing may be taken in between."""
        found = Found()
        if not self._on or not state.reuse or state.request.whole_prompt:
            return found
        memory = self._book.memory(state.request.model)
        if not memory.kv.index.blocks:
            return found
        size = memory.spec.page_tokens
        most = (state.known - 1) // size
        for block in memory.kv.index.find(self._digest(state, size, i) for i in range(most)):
            if block.page is None and state.resume_fails >= MAX_FETCH_FAILS:
                break
            found.blocks.append(block)
            found.here += block.page is not None
            found.cached += block.page in memory.kv.cached
        return found

    def begin(self, state: RequestState, found: Found, fresh: int) -> None:
        """The request takes so many further pages, for which the caller made room. It runs behind
        what was found, or waits for the copy of what is not on the device."""
        name = state.request.model
        missing = self._hold(name, found)
        taken = iter(self._book.memory(name).kv.take(fresh))
        begin = [next(taken) if block.page is None else block.page for block in found.blocks]
        state.pages = [*begin, *taken]
        if not missing:
            self._start(state, len(found.blocks))
            return
        book = self._book
        pages = [state.pages[i] for i in missing]
        action = book.new_id()
        reads = book.pending_maps(name, pages)
        after = book.after(action, reads=reads, writes=[("kv", state.id)])
        state.phase, state.copying = "resuming", True
        book.fetches[action] = state, found.blocks
        copy = CopyKv(
            id=action,
            after=after,
            model=name,
            request=NO_REQUEST,
            pages=tuple(pages),
            extents=tuple(e for i in missing for e in found.blocks[i].extents),
            tokens=len(missing) * book.memory(name).spec.page_tokens,
            to="device",
        )
        book.moves[action] = copy
        book.actions.append(copy)

    def _hold(self, name: ModelName, found: Found) -> list[int]:
        """Neither pages nor extents go any more. Returns which blocks are not on the device."""
        kv, missing = self._book.memory(name).kv, []
        for place, block in enumerate(found.blocks):
            if block.page is None:
                block.pins += 1
                missing.append(place)
            else:
                kv.share(block.page)
        # Those nearer the beginning are newer: they go last.
        for block in reversed(found.blocks):
            self._book.ledger.shelf.touch(block)
            if block.page is not None:
                kv.index.want_saved(block.page)
        return missing

    def _start(self, state: RequestState, pages: int) -> None:
        """It runs, behind so many pages that were found."""
        state.phase, state.entered = "running", pages
        state.computed = state.planned = (
            pages * self._book.memory(state.request.model).spec.page_tokens
        )
        state.cached_tokens = min(state.computed, len(state.request.prompt))
        self._book.models[state.request.model].prefix_hit_tokens += state.computed

    def _fetched(self, copy: CopyKv, ok: bool) -> None:
        state, blocks = self._book.fetches.pop(copy.id)
        kv = self._book.memory(copy.model).kv
        fetched = set(copy.pages)
        for block, page in zip(blocks, state.pages, strict=False):
            if page in fetched:
                block.pins -= 1
                if ok:
                    kv.index.enter(block.digest, page)
        state.copying = False
        if state.phase == "finished":
            return
        if ok:
            self._start(state, len(blocks))
            return
        self._book.release_device(state)
        state.phase = "queued"
        state.resume_fails += 1

    # -- entering -------------------------------------------------------------------------------

    def enter(self, state: RequestState) -> None:
        """A step of this request ended: let others find what it has computed."""
        size = self._book.memory(state.request.model).spec.page_tokens
        most = self._book.unit.max_step_tokens // size + MAX_CAUGHT_UP
        full = min(state.computed // size, state.entered + most)
        if full <= state.entered or not self._on:
            return
        index = self._book.memory(state.request.model).kv.index
        for place in range(state.entered, full):
            index.enter(self._digest(state, size, place), state.pages[place])
        state.entered = full

    def _digest(self, state: RequestState, size: int, place: int) -> Digest:
        """Of page `place` and all before it. Each is worked out once, when it is asked for."""
        if not state.digests:
            state.digests.append(self._root(state))
        while len(state.digests) <= place + 1:
            at = (len(state.digests) - 1) * size
            state.digests.append(next_digest(state.digests[-1], state.ids(at, at + size)))
        return state.digests[place + 1]

    def _root(self, state: RequestState) -> Digest:
        request = state.request
        names = (request.model, request.adapter or ModelName(""))
        generations = (str(self._generation(name)) for name in names)
        return root_digest(request.tenant, *names, *generations)

    def _generation(self, name: ModelName) -> int:
        entry = self._book.models.get(name)
        return 0 if entry is None else entry.generation

    # -- the host store -------------------------------------------------------------------------

    def save(self) -> None:
        """Copy some of what is worth it to the host store, if models share the device, no such
        copy is under way and there is room to spare."""
        book, shelf = self._book, self._book.ledger.shelf
        if not shelf.unsaved or book.saves or not shelf.max_bytes:
            return
        if sum(entry.spec.base is None for entry in book.models.values()) < 2:
            return
        while shelf.unsaved:
            entry = next(e for e in book.models.values() if self._index(e) is self._oldest().index)
            if not entry.leaving and not entry.unassigned:
                self._save(entry)
                return
            del shelf.unsaved[self._oldest()]

    def _oldest(self) -> Block:
        return next(iter(self._book.ledger.shelf.unsaved))

    def _index(self, entry: ModelEntry) -> PrefixIndex:
        return self._book.memory(entry.spec.name).kv.index

    def _save(self, entry: ModelEntry) -> None:
        """The last pages of a chain first, as they are given up first."""
        book, kv = self._book, self._book.memory(entry.spec.name).kv
        size, unsaved = entry.spec.page_bytes, book.ledger.shelf.unsaved
        parts = []
        for block in list(islice(unsaved, max(MAX_SAVE_BYTES // size, 1))):
            if block.index is not kv.index:
                break
            assert block.page is not None
            extents = book.ledger.shelf.take_for_block(size)
            if extents is None:
                break
            kv.share(block.page)
            del unsaved[block]
            parts.append((block, block.page, extents))
        if not parts:
            return
        action = book.new_id()
        copy = CopyKv(
            id=action,
            after=book.after(action),
            model=entry.spec.name,
            request=NO_REQUEST,
            pages=tuple(page for _, page, _ in parts),
            extents=tuple(e for _, _, extents in parts for e in extents),
            tokens=len(parts) * entry.spec.page_tokens,
            to="host",
        )
        book.saves[action] = parts
        book.moves[action] = copy
        book.actions.append(copy)

    def _saved(self, copy: CopyKv, ok: bool) -> None:
        shelf, parts = self._book.ledger.shelf, self._book.saves.pop(copy.id)
        for block, _, extents in parts:
            if ok:
                shelf.put(block, extents)
            else:
                shelf.give_untaken(extents)
        # In the order of `_save` they become cached again: the last of a chain first.
        self._book.memory(copy.model).kv.give([page for _, page, _ in reversed(parts)])
        for block, _, _ in parts:
            shelf.unsaved.pop(block, None)  # one that failed is not tried again at once
        self._book.changes += 1

    def ended(self, copy: CopyKv, *, ok: bool) -> bool:
        """Apply the end of a copy; False if it is none of the cache's."""
        if copy.id in self._book.saves:
            self._saved(copy, ok)
        elif copy.id in self._book.fetches:
            self._fetched(copy, ok)
        else:
            return False
        return True
