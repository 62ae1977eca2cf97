"""Moves: weights in and out, KV mapped, parked and resumed, so that the right models can run.

Memory is asked for in order of urgency (`make_room`): free granules, granules coming back, empty
KV granules, victims of the residency policy, and last the KV of models whose weights stay.
"""

from collections.abc import Collection

from weft.core.actions import CopyKv, Drop, KvParked, Load, MapKv, UnmapKv
from weft.core.errors import MODEL_FAILED, RETRY_AFTER_S
from weft.core.events import Failed
from weft.core.ids import ActionId, ModelName
from weft.core.request import ParkedKv
from weft.policy.presets import Preset
from weft.sched import adapters
from weft.sched.book import Book, Leaving, ModelEntry, RequestState, waiting_view
from weft.sched.prefix import Found, PrefixCache
from weft.sched.residency import Residents

MAX_LOAD_FAILS = 3
MAX_MAP_FAILS = 30
"""In a row; a failed map costs little and the next one may get other granules."""
RETRY_NS = RETRY_AFTER_S[MODEL_FAILED] * 1_000_000_000
"""A model whose loads failed is tried again when a client that was told so comes back."""
MAX_COPY_FAILS = 2
"""After this many failed parks or resumes of a request its KV is computed again instead."""


class UnitBroken(Exception):
    """The device no longer gives memory back: only a new worker can help."""


class Mover:
    """Plans Load, Drop, MapKv, UnmapKv and CopyKv, and applies their ends."""

    def __init__(self, book: Book, preset: Preset, prefixes: PrefixCache) -> None:
        self._book = book
        self._preset = preset
        self._prefixes = prefixes
        self.residents = Residents(book, preset.residency)
        self._short = self._was_short = False
        """Somebody found no room in this round, in the one before."""

    def look_again(self) -> None:
        """A round of moves begins."""
        self._was_short, self._short = self._short, False

    # -- memory ---------------------------------------------------------------------------------

    def coming_granules(self) -> int:
        """Granules that will be free without a further decision."""
        total = 0
        for name, entry in self._book.models.items():
            memory = self._book.memory(name)
            total += len(memory.kv.granules) if entry.leaving else len(memory.kv.unmapping)
            if memory.state == "dropping" or entry.leaving == "all":
                total += len(memory.weights)
        return total

    def make_room(self, name: ModelName, granules: int, keep: Collection[ModelName]) -> bool:
        """True if `granules` are free for model `name` now; else set in motion what makes them
        so, sparing `keep` (whose unused KV granules may still be taken)."""
        ledger = self._book.ledger
        if ledger.free_granules >= granules:
            return True
        self._short = True
        missing = granules - ledger.free_granules - self.coming_granules()
        for cached in (False, True):
            for other, entry in self._book.models.items():
                if missing <= 0:
                    return False
                if not entry.leaving and other != name:
                    empty = self._book.memory(other).kv.empty_granules(cached=cached)[:missing]
                    if empty:
                        self._unmap(other, empty)
                        missing -= len(empty)
        for leaving, victims in (("all", self._victims(keep)), ("kv", self._kv_victims(keep))):
            for victim in victims:
                if missing <= 0:
                    return False
                missing -= self.send_away(victim, "all" if leaving == "all" else "kv", "room")
        return False

    def _victims(self, keep: Collection[ModelName]) -> list[ModelName]:
        if not self._preset.residency.evicts:
            return []
        views = [
            view
            for view in self.residents.views()
            if not self._spared(self._book.models[view.model], keep)
        ]
        return self._preset.residency.victims(views, self._book.now_ns)

    def _spared(self, entry: ModelEntry, keep: Collection[ModelName]) -> bool:
        """Not to be sent away: in `keep`, an adapter that runs on one of these, or leaving."""
        if entry.spec.name in keep or entry.leaving:
            return True
        return entry.spec.base in keep and adapters.in_use(entry)

    def _kv_victims(self, keep: Collection[ModelName]) -> list[ModelName]:
        """Models whose weights stay but whose KV can be parked, least recently used first."""
        entries = [
            entry
            for name, entry in self._book.models.items()
            if name not in keep and not entry.leaving and self._book.memory(name).kv.granules
        ]
        entries.sort(key=lambda e: (bool(e.members), e.last_used_ns, e.spec.name))
        return [entry.spec.name for entry in entries]

    def send_away(self, name: ModelName, leaving: Leaving, cause: str) -> int:
        """Begin to move it out. Returns how many granules that will free."""
        entry, memory = self._book.models[name], self._book.memory(name)
        entry.leaving, entry.leave_cause = leaving, cause
        self._book.changes += 1
        freed = len(memory.kv.granules) - len(memory.kv.unmapping)
        return freed + (len(memory.weights) if leaving == "all" else 0)

    # -- going out ------------------------------------------------------------------------------

    def continue_leaving(self) -> None:
        """For models being moved out: drop weights, park requests, unmap what became empty."""
        for name, entry in self._book.models.items():
            useless = entry.unassigned or entry.failed is not None
            if not useless and not entry.leaving:
                continue
            users = adapters.users(entry)
            if useless and not users and self._book.memory(name).held_granules:
                entry.leaving = "all"
                entry.leave_cause = "removed" if entry.unassigned else "failed"
            if not entry.leaving:
                continue
            memory = self._book.memory(name)
            if entry.leaving == "all" and memory.state == "resident":
                self._drop(name)
            for state in users:
                if state.phase == "running" and state.idle:
                    self.park(self._book.models[state.request.model], state)
            empty = memory.kv.empty_granules()
            if empty:
                self._unmap(name, empty)
            gone = memory.state == "absent" or entry.leaving == "kv"
            if gone and not memory.kv.granules and not self._adapter_runs(entry):
                entry.leaving = None
                self._book.changes += 1

    def _adapter_runs(self, entry: ModelEntry) -> bool:
        """A leaving adapter is gone when its last request is off the device, not before."""
        return entry.spec.base is not None and adapters.in_use(entry)

    def park(self, entry: ModelEntry, state: RequestState) -> None:
        """Copy the KV to the host store; where that cannot be, forget it and compute it again."""
        self._book.rewind(state)
        entry.preemptions += 1
        memory = self._book.memory(entry.spec.name)
        pages = state.pages[: memory.pages_for(state.computed)]
        extents = None
        if pages and state.park_fails < MAX_COPY_FAILS:
            extents = self._book.ledger.shelf.take(len(pages) * entry.spec.page_bytes)
        if extents is None:
            self._book.requeue(state)
            return
        action = self._book.new_id()
        after = self._book.after(action, reads=[("kv", state.id)], writes=[("x", state.id)])
        entry.parks += 1
        state.parked = ParkedKv(extents=extents, tokens=state.computed)
        state.phase, state.copying = "parking", True
        self._submit(
            CopyKv(
                id=action,
                after=after,
                model=entry.spec.name,
                request=state.id,
                pages=tuple(pages),
                extents=extents,
                tokens=state.computed,
                to="host",
            )
        )

    def _drop(self, name: ModelName) -> None:
        action = self._book.new_id()
        after = self._book.after(action, writes=[("w", name)])
        granules = self._book.ledger.begin_drop(name)
        self._book.models[name].ordered_ns = self._book.now_ns
        self._submit(Drop(id=action, after=after, model=name, granules=granules))

    def _unmap(self, name: ModelName, at: list[int]) -> None:
        action = self._book.new_id()
        after = self._book.after(action, writes=[("kg", name, v) for v in at])
        granules = self._book.ledger.begin_unmap(name, at)
        self._submit(
            UnmapKv(id=action, after=after, model=name, at=tuple(at), granules=tuple(granules))
        )

    def _submit(self, action: Load | Drop | MapKv | UnmapKv | CopyKv) -> None:
        self._book.moves[action.id] = action
        self._book.actions.append(action)

    # -- coming in ------------------------------------------------------------------------------

    def bring_in(self, entry: ModelEntry, keep: Collection[ModelName]) -> None:
        """Weights of this model onto the device, room for its first request beside them."""
        memory = self._book.memory(entry.spec.name)
        if not self.loadable(entry):
            return
        needs = {s.id: self._first_need(entry, s) for s in entry.members.values()}
        first = min(needs, key=lambda request: needs[request], default=None)
        room = memory.weight_granules + (needs[first] if first is not None else 0)
        if self.make_room(entry.spec.name, room, keep):
            if first is not None:
                # Before the much larger base, whose load the first step may then follow.
                self._load_adapter(self._book.requests[first])
            self.load(entry, "request")
        elif not self.coming_granules() and memory.kv.granules:
            # Its load failed when its requests had their KV already: that KV must not keep its own
            # weights out.
            self.send_away(entry.spec.name, "kv", "room")

    def _first_need(self, entry: ModelEntry, state: RequestState) -> int:
        """Granules besides the model's weights that let this request begin."""
        memory = self._book.memory(entry.spec.name)
        kv = max(memory.kv_granules_for(state.known + 1) - len(memory.kv.granules), 0)
        return kv + adapters.granules_missing(self._book, state)

    def _load_adapter(self, state: RequestState) -> None:
        """If it is absent; the caller made room."""
        adapter = adapters.adapter_of(self._book, state)
        if adapter is not None and not adapter.leaving and self.loadable(adapter):
            self.load(adapter, "request")

    def _bring_adapter(
        self, entry: ModelEntry, state: RequestState, keep: Collection[ModelName] | None
    ) -> bool:
        """Set in motion what brings the adapter of a waiting request in, and room for the request
        beside it, sending away all but `keep` (None: nobody). False if there is no room yet."""
        memory = self._book.memory(entry.spec.name)
        adapter = adapters.adapter_of(self._book, state)
        assert adapter is not None
        if adapter.leaving or not self.loadable(adapter):
            return True
        pages = self._book.ledger.growth_granules(
            entry.spec.name, memory.pages_for(state.known + 1)
        )
        missing = adapters.granules_missing(self._book, state) + (pages or 0)
        free = self._book.ledger.free_granules >= missing
        if not free and (keep is None or not self.make_room(adapter.spec.name, missing, keep)):
            return False
        self.load(adapter, "request")
        return True

    def loadable(self, entry: ModelEntry) -> bool:
        """Runs that followed a failed load end a little after it. A load behind them would fail as
        their dependent, again and again, until the model is given up: it waits for their ends."""
        name = entry.spec.name
        if self._book.memory(name).state != "absent" or entry.failed is not None:
            return False
        if entry.unassigned and not adapters.used(entry):
            return False
        if entry.leaving and self._adapter_runs(entry):
            return False  # whoever is still on the device with it goes first
        return not self._book.ledger.hazards.busy(("w", name))

    def load(self, entry: ModelEntry, cause: str) -> None:
        name = entry.spec.name
        action = self._book.new_id()
        granules = self._book.ledger.begin_load(name, action)
        assert granules is not None, "the caller made room"
        after = self._book.after(action, writes=[("w", name)])
        entry.leaving = None
        entry.last_used_ns = self._book.now_ns
        self.residents.load_ordered(entry, cause)
        self._submit(Load(id=action, after=after, model=name, granules=granules))

    def admit(
        self,
        entry: ModelEntry,
        *,
        first: Collection[ModelName],
        further: Collection[ModelName] | None,
    ) -> None:
        """Give waiting requests device memory, in the policy's order, until one does not fit.

        Others may be sent away for it: all but `first` while this model runs nothing, all but
        `further` (None: nobody) once it does. A request whose adapter is on its way is passed by.
        """
        entry.blocked = False
        coming: list[RequestState] = []
        running = sum(s.phase in ("running", "resuming") for s in entry.members.values())
        # Without its weights a model gets no KV, or that KV could keep the weights out for ever.
        absent = self._book.memory(entry.spec.name).state == "absent"
        if running >= self._book.unit.max_rows or entry.leaving or absent:
            return
        waiting = [
            waiting_view(s) for s in entry.members.values() if s.phase in ("queued", "parked")
        ]
        if not waiting:
            return
        for request in self._preset.prefill.order(waiting, self._book.now_ns):
            if running >= self._book.unit.max_rows:
                return
            if not self._book.ledger.free_slots:
                if not running:
                    self._free_slots(first)
                return
            state = self._book.requests[request]
            keep = further if running or coming else first
            if keep is not None:
                keep = {*keep, *adapters.names(self._book, [*coming, state])}
            if not adapters.is_there(self._book, state):
                coming.append(state)
                # What comes free is for those who run and cannot grow, not for one more adapter.
                fits = not (running and entry.starving) and self._bring_adapter(entry, state, keep)
            else:
                fits = self._admit_one(entry, state, running, keep)
                running += fits
            if not fits:
                break
        entry.blocked = not running and any(
            s.phase in ("queued", "parked") for s in entry.members.values()
        )

    def _free_slots(self, keep: Collection[ModelName]) -> None:
        """Other models hold all slots: one of them must park what it runs."""
        if any(entry.leaving for entry in self._book.models.values()):
            return
        for name in self._kv_victims(keep):
            if any(s.slot is not None for s in self._book.models[name].members.values()):
                self.send_away(name, "kv", "room")
                return

    def _admit_one(
        self,
        entry: ModelEntry,
        state: RequestState,
        running: int,
        keep: Collection[ModelName] | None,
    ) -> bool:
        name, memory = entry.spec.name, self._book.memory(entry.spec.name)
        pages = memory.pages_for(state.known + 1)
        if state.parked is not None:
            pages = max(pages, memory.pages_for(state.parked.tokens))
        found = self._prefixes.find(state) if state.parked is None else Found()
        missing = pages - found.here
        # Whoever runs must be able to grow by a page, or the newcomer would be parked at once.
        if not self._reserve(entry, missing + running, keep, spare=found.cached):
            if found.blocks and not running and not self.coming_granules():
                # Where they lie they may keep it from ever getting room: without them it does.
                state.reuse = False
                self._book.changes += 1
            elif not running and not self.coming_granules():
                self._begin_anew(entry, missing)
            return False
        state.slot = self._book.ledger.take_slot()
        if state.parked is None:
            self._prefixes.begin(state, found, missing)
            return True
        state.pages = memory.kv.take(missing)
        count = memory.pages_for(state.parked.tokens)
        action = self._book.new_id()
        reads = self._book.pending_maps(name, state.pages)
        reads.append(("x", state.id))
        after = self._book.after(action, reads=reads, writes=[("kv", state.id)])
        state.phase, state.copying = "resuming", True
        self._submit(
            CopyKv(
                id=action,
                after=after,
                model=name,
                request=state.id,
                pages=tuple(state.pages[:count]),
                extents=state.parked.extents,
                tokens=state.parked.tokens,
                to="device",
            )
        )
        return True

    def _begin_anew(self, entry: ModelEntry, pages: int) -> None:
        """So many pages fit into what is free and what this model itself holds, but not around the
        holes in its KV range: nobody else may have anything to give, so it gives back its own."""
        name, kv = entry.spec.name, self._book.memory(entry.spec.name).kv
        empty = kv.empty_granules()
        needed = -(-pages * kv.page_bytes // kv.granule_bytes)
        if not kv.live and empty and needed <= self._book.ledger.free_granules + len(empty):
            self._unmap(name, empty)

    def _reserve(
        self,
        entry: ModelEntry,
        pages: int,
        keep: Collection[ModelName] | None,
        spare: int = 0,
    ) -> bool:
        """Make `pages` pages takeable, and as many cached ones as `spare` says besides, mapping
        granules if need be and sending away all but `keep` for them (None: nobody)."""
        name, ledger = entry.spec.name, self._book.ledger
        # What is free goes first; then what is cached, at once if others wait for granules.
        short = self._short or self._was_short
        at = None if short else ledger.plan_growth(name, pages)
        if at is None:
            at = ledger.plan_growth(name, pages + spare, give_up=True)
        if at is None and keep is not None:
            granules = ledger.growth_granules(name, pages + spare)
            if granules is not None and self.make_room(name, granules, keep):
                at = ledger.plan_growth(name, pages + spare, give_up=True)
        if at is None:
            return False
        if at:
            action = self._book.new_id()
            granules_taken = ledger.begin_map(name, at, action)
            after = self._book.after(action, writes=[("kg", name, v) for v in at])
            self._submit(
                MapKv(
                    id=action, after=after, model=name, at=tuple(at), granules=tuple(granules_taken)
                )
            )
        return True

    # -- growing while decoding -----------------------------------------------------------------

    def room_to_extend(self, entry: ModelEntry, states: list[RequestState], tokens: int) -> bool:
        """Whether all could grow by `tokens` positions from pages that are free already."""
        memory = self._book.memory(entry.spec.name)
        missing = sum(max(memory.pages_for(s.planned + tokens) - len(s.pages), 0) for s in states)
        return missing <= memory.kv.num_takeable

    def extend(
        self,
        entry: ModelEntry,
        state: RequestState,
        positions: int,
        keep: Collection[ModelName] | None,
    ) -> bool:
        """Pages for positions 0..positions-1. If there is no room, what other models can give is
        set in motion, and the row waits."""
        memory = self._book.memory(entry.spec.name)
        missing = memory.pages_for(positions) - len(state.pages)
        if missing <= 0:
            return True
        if self._reserve(entry, missing, keep):
            state.pages += memory.kv.take(missing)
            return True
        return False

    def shed(self, entry: ModelEntry, needy: RequestState, spare: list[RequestState]) -> None:
        """If nothing more can come from other models: park the youngest of this one's requests,
        unless it is in the step being planned (`spare`; then its turn comes next time). A request
        alone that cannot grow is computed anew, in a KV range without holes."""
        holders = [s for s in entry.members.values() if s.pages]
        if self.coming_granules() or any(s.copying for s in holders):
            return
        youngest = max(holders, key=lambda s: (s.request.priority, s.request.arrival_ns, s.id))
        if not youngest.idle or youngest in spare:
            return
        if len(holders) == 1:
            needy.reuse = False
            self._book.requeue(needy)
        else:
            self.park(entry, youngest)

    # -- ends -----------------------------------------------------------------------------------

    def done(self, action_id: ActionId, num_bytes: int) -> None:
        """A move took effect."""
        book = self._book
        action = book.moves.pop(action_id)
        book.bytes_copied += num_bytes
        match action:
            case Load(model=name):
                book.ledger.end_load(name)
                book.models[name].load_fails = 0
                self.residents.came(book.models[name], num_bytes)
            case Drop(model=name):
                book.ledger.end_drop(name)
                self.residents.left(book.models[name])
            case MapKv(model=name, at=at):
                book.ledger.end_map(name, at)
                book.models[name].map_fails = 0
            case UnmapKv(model=name, at=at):
                book.ledger.end_unmap(name, at)
            case CopyKv() if self._prefixes.ended(action, ok=True):
                pass
            case CopyKv(to="host"):
                self._parked(action)
            case CopyKv():
                self._resumed(action)

    def _parked(self, action: CopyKv) -> None:
        state = self._book.requests[action.request]
        state.copying = False
        if state.phase == "finished":
            return
        assert state.parked is not None
        self._book.release_device(state)
        state.phase, state.planned = "parked", state.computed
        state.park_fails = 0
        self._book.notices.append(KvParked(request=state.id, kv=state.parked))

    def _resumed(self, action: CopyKv) -> None:
        state = self._book.requests[action.request]
        state.copying = False
        if state.phase == "finished":
            return
        # At least the last known token is computed again: its row draws the next one.
        state.computed = state.planned = min(action.tokens, state.known - 1)
        state.phase, state.resume_fails = "running", 0
        self._book.forget_parked(state)

    def failed(self, event: Failed) -> None:
        """A move had no effect: the ledger rolls back, and the next decision tries again. Raises
        UnitBroken where trying again is of no use and nobody could go on without it."""
        book = self._book
        action = book.moves.pop(event.action)
        if isinstance(action, Drop | UnmapKv) and not event.retryable:
            raise UnitBroken(f"memory of {action.model} cannot be given back: {event.cause}")
        match action:
            case Load(model=name):
                book.ledger.fail_load(name)
                self._load_failed(book.models[name], event)
            case Drop(model=name):
                book.ledger.fail_drop(name)
            case MapKv(model=name, at=at):
                self._map_failed(book.models[name], at, event)
            case UnmapKv(model=name, at=at):
                book.ledger.fail_unmap(name, at)
            case CopyKv() if self._prefixes.ended(action, ok=False):
                pass
            case CopyKv(to="host"):
                self._park_failed(action)
            case CopyKv():
                self._resume_failed(action)

    def _load_failed(self, entry: ModelEntry, event: Failed) -> None:
        if event.cause == "dependency":
            return
        entry.load_fails += 1
        if entry.load_fails >= MAX_LOAD_FAILS or not event.retryable:
            entry.failed = event.cause
            entry.retry_ns = self._book.now_ns + RETRY_NS if event.retryable else None
            self.fail_model(entry)

    def fail_model(self, entry: ModelEntry) -> None:
        """End all requests that need it. Later ones are refused, for a while if another try may
        do, else until the model is assigned again."""
        self.residents.cannot_come(entry)
        error = f"{MODEL_FAILED}: the model cannot be loaded: {entry.failed}"
        for state in adapters.users(entry):
            self._book.finish(state, "error", error=error)

    def _map_failed(self, entry: ModelEntry, at: tuple[int, ...], event: Failed) -> None:
        """Requests with pages over it lose their KV. Their actions in flight follow the map, so
        they have failed or will; the pages go back when those have ended (see settle_maps)."""
        entry.map_fails += 1
        if entry.map_fails >= MAX_MAP_FAILS:
            entry.failed = f"no memory can be mapped: {event.cause}"
            self.fail_model(entry)
        self._book.ledger.break_map(entry.spec.name, at)

    def settle_maps(self) -> None:
        """Give up pages over failed maps once nobody in flight names them."""
        book = self._book
        for name, memory in book.ledger.models.items():
            if not memory.kv.broken:
                continue
            lost = book.ledger.lost_pages(name)
            for state in list(book.requests.values()):
                if state.request.model != name or not state.idle:
                    continue
                if lost.isdisjoint(state.pages):
                    continue
                if state.phase == "finished":
                    book.release_device(state)
                else:
                    book.requeue(state)
            book.ledger.settle_broken(name)

    def _park_failed(self, action: CopyKv) -> None:
        state = self._book.requests[action.request]
        state.copying = False
        assert state.parked is not None
        self._book.ledger.extents.give(state.parked.extents)
        state.parked = None
        if state.phase != "finished":
            state.phase = "running"
            state.park_fails += 1
            adapter = adapters.adapter_of(self._book, state)
            if adapter and not adapter.leaving and not adapters.is_there(self._book, state):
                # Its adapter left meanwhile: without it nothing may hold device memory.
                self._book.requeue(state)

    def _resume_failed(self, action: CopyKv) -> None:
        state = self._book.requests[action.request]
        state.copying = False
        if state.phase == "finished":
            return
        self._book.release_device(state)
        state.phase = "parked"
        state.resume_fails += 1
        if state.resume_fails >= MAX_COPY_FAILS:
            self._book.requeue(state)
