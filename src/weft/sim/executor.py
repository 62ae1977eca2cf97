"""The modelled executor: the engine's contract on a virtual clock, with memory it can check.

Instead of tensors, every position of a KV page holds (request, position, hash of all ids up to
here); a "model" draws tokens from that hash. So a wrong page, a stale slot, a page reused too
early or a lost copy changes tokens or trips an assertion, exactly where the real engine would
silently compute nonsense. Failures are injected at any action and leave debris behind, as the law
allows: a step that failed may have written its positions, a copy may be half done.
"""

import heapq
import random
from collections import deque
from dataclasses import dataclass, field

from weft.core.actions import (
    CopyKv,
    Drop,
    Interrupt,
    Load,
    MapKv,
    Row,
    Run,
    UnitAction,
    UnmapKv,
)
from weft.core.events import CopyDone, Done, Failed, StepDone, UnitEvent
from weft.core.ids import ActionId, ModelName
from weft.core.model import ModelSpec
from weft.core.request import TokenLogprobs
from weft.core.unit import UnitSpec
from weft.cost.model import CostModel
from weft.sim.modelled import contexts_of, draw, embedding_of, row_errors, score

Place = tuple[tuple[int, int], ...]
"""Where a page lies in the host store: (offset, bytes), in order."""
Cell = tuple[int, int, int]
"""(request, position, hash of the ids at positions 0..position)."""


@dataclass(eq=False, slots=True)
class _Active:
    """An action under way: what it holds, so that conflicts are seen."""

    action: UnitAction
    reads: set[object] = field(default_factory=set)
    writes: set[object] = field(default_factory=set)
    iterations: int = 0
    interrupted: bool = False
    fail_at: int = -1


class ModelledExecutor:
    """Executes actions in virtual time. The caller owns the clock: `advance_to` the next event."""

    QUEUES = ("lane", "copy_in", "copy_out", "memory")

    def __init__(
        self,
        unit: UnitSpec,
        cost: CostModel | None = None,
        *,
        seed: int = 0,
        fail: float = 0.0,
        check_conflicts: bool = True,
    ) -> None:
        self.unit = unit
        self.cost = cost or CostModel()
        self.now_ns = 0
        self.plan_log: list[Run] = []
        self._check_conflicts = check_conflicts
        self._rng = random.Random(seed)
        self._fail = fail
        self._models: dict[ModelName, ModelSpec] = {}
        self._queues: dict[str, deque[UnitAction]] = {name: deque() for name in self.QUEUES}
        self._busy: dict[str, _Active | None] = dict.fromkeys(self.QUEUES)
        self._pending: set[ActionId] = set()
        self._failed: set[ActionId] = set()
        self._started_loads: dict[ActionId, int] = {}
        self._heap: list[tuple[int, int, str]] = []
        self._sequence = 0
        self._out: list[UnitEvent] = []
        self._granules: dict[int, tuple[ModelName, str, int]] = {}
        self._mapped_kv: dict[ModelName, set[int]] = {}
        self._weights: dict[ModelName, bool] = {}
        self._kv: dict[tuple[ModelName, int], list[Cell | None]] = {}
        self._tables: dict[int, list[int]] = {}
        self._last: dict[int, int] = {}
        self._host: dict[Place, tuple[ModelName, list[Cell | None]]] = {}
        self._expected: dict[int, tuple[object, list[int]]] = {}

    # -- the executor's contract ----------------------------------------------------------------

    def bind_spec(self, spec: ModelSpec) -> None:
        self._models[spec.name] = spec

    def expect(self, request: int, namespace: object, contexts: list[int]) -> None:
        """This request may read KV that requests of the same namespace wrote, where it is the KV
        of its own tokens (`contexts_of` its prompt). Of a request that is not announced every
        position must be its own."""
        self._expected[request] = (namespace, contexts)

    def submit(self, action: UnitAction) -> None:
        """Queue it. Ids ascend, and `after` names earlier ones only."""
        assert all(a < action.id for a in action.after), "an action follows a later one"
        self._pending.add(action.id)
        if isinstance(action, Interrupt):
            lane = self._busy["lane"]
            if lane is not None and lane.action.id == action.target:
                lane.interrupted = True
            self._pending.discard(action.id)
            self._out.append(Done(action=action.id))
            return
        self._queues[self._queue_of(action)].append(action)
        self._start_ready()

    def poll(self) -> list[UnitEvent]:
        out, self._out = self._out, []
        return out

    @property
    def next_ns(self) -> int | None:
        """When something ends next; the present if something already has."""
        if self._out:
            return self.now_ns
        return self._heap[0][0] if self._heap else None

    @property
    def idle(self) -> bool:
        return not self._pending and not self._out

    def advance_to(self, now_ns: int) -> None:
        """Move the clock; ends up to then are collected for `poll`."""
        assert now_ns >= self.now_ns
        while self._heap and self._heap[0][0] <= now_ns:
            self.now_ns, _, queue = heapq.heappop(self._heap)
            self._end(queue)
            self._start_ready()
        self.now_ns = now_ns

    def check_integrity(self, *, mapped: dict[str, tuple[int, ...]]) -> None:
        """Compare the arena's side with the ledger's."""
        wanted = {
            granule: (*key.rsplit("/", 1), at)
            for key, granules in mapped.items()
            for at, granule in enumerate(granules)
            if granule >= 0
        }
        have = {g: (str(m), kind, at) for g, (m, kind, at) in self._granules.items()}
        assert wanted == have, f"ledger {wanted} != arena {have}"

    # -- starting -------------------------------------------------------------------------------

    @staticmethod
    def _queue_of(action: UnitAction) -> str:
        match action:
            case Run():
                return "lane"
            case Load():
                return "copy_in"
            case CopyKv(to=to):
                return "copy_in" if to == "device" else "copy_out"
            case _:
                return "memory"

    def _start_ready(self) -> None:
        """Start the first action of every free queue whose dependencies have ended."""
        progress = True
        while progress:
            progress = False
            for name in self.QUEUES:
                queue = self._queues[name]
                if self._busy[name] is None and queue and self._may_start(queue[0]):
                    self._start(name, queue.popleft())
                    progress = True

    def _may_start(self, action: UnitAction) -> bool:
        if any(a in self._pending for a in action.after):
            return False
        follow = action.follow if isinstance(action, Run) else None
        started = follow in self._started_loads or follow not in self._pending
        return follow is None or started

    def _start(self, queue: str, action: UnitAction) -> None:
        follow = action.follow if isinstance(action, Run) else None
        if any(a in self._failed for a in (*action.after, *([follow] if follow else []))):
            self._finish(action, Failed(action=action.id, cause="dependency"))
            return
        active = _Active(action)
        if self._fail and self._rng.random() < self._fail:
            repeat = action.plan.repeat if isinstance(action, Run) else 1
            active.fail_at = self._rng.randrange(repeat)
        self._begin(active)
        if self._check_conflicts:
            self._assert_no_conflict(active)
        self._busy[queue] = active
        self._push(queue, self._duration(action))

    def _push(self, queue: str, duration_ns: int) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (self.now_ns + duration_ns, self._sequence, queue))

    def _duration(self, action: UnitAction) -> int:
        if isinstance(action, Run):
            self.plan_log.append(action)
            return self._iteration_ns(action)
        assert not isinstance(action, Interrupt)
        duration = self.cost.move_ns(action, self._models[action.model])
        if isinstance(action, Load):
            self._started_loads[action.id] = self.now_ns + duration
        return duration

    def _iteration_ns(self, run: Run) -> int:
        duration = self.cost.iteration_ns(run.plan)
        if run.follow is not None and run.follow in self._started_loads:
            duration = max(duration, self._started_loads[run.follow] - self.now_ns + 1)
        return duration

    def _begin(self, active: _Active) -> None:
        """What the action will touch; mapping takes effect at its start, as in the engine."""
        match active.action:
            case Run(plan=plan):
                active.reads.add(("w", plan.model))
                for row in plan.rows:
                    if row.adapter is not None:
                        active.reads.add(("w", row.adapter))
                    self._write_table(row.slot, row.first_page, list(row.append_pages))
                    last = row.start + row.num_tokens + plan.repeat - 2
                    page_tokens = self._models[plan.model].page_tokens
                    table = self._tables[row.slot]
                    first = row.start // page_tokens
                    for index in range(last // page_tokens + 1):
                        key = (plan.model, table[index])
                        (active.writes if index >= first else active.reads).add(key)
            case Load(model=model) | Drop(model=model):
                active.writes.add(("w", model))
            case CopyKv(model=model, pages=pages, extents=extents, to=to):
                spec = self._models[model]
                total = sum(extent.num_bytes for extent in extents)
                assert total == len(pages) * spec.page_bytes, "extents do not fit the pages"
                held = active.reads if to == "host" else active.writes
                held.update((model, page) for page in pages)
                host = active.writes if to == "host" else active.reads
                host.update(
                    ("x", piece) for place in self._places(active.action) for piece in place
                )
            case _:
                pass

    def _write_table(self, slot: int, first: int, pages: list[int]) -> None:
        table = self._tables.setdefault(slot, [])
        if pages:
            assert first <= len(table), "a hole in the page table"
            self._tables[slot] = table[:first] + pages + table[first + len(pages) :]

    def _assert_no_conflict(self, new: _Active) -> None:
        follow = new.action.follow if isinstance(new.action, Run) else None
        for other in self._busy.values():
            if other is None or (follow is not None and other.action.id == follow):
                continue
            clash = (new.writes & (other.reads | other.writes)) | (new.reads & other.writes)
            assert not clash, f"{new.action} and {other.action} clash over {clash}"

    # -- ending ---------------------------------------------------------------------------------

    def _end(self, queue: str) -> None:
        active = self._busy[queue]
        assert active is not None
        if isinstance(active.action, Run):
            if self._end_iteration(active):
                self._busy[queue] = None
            else:
                self._push(queue, self._iteration_ns(active.action))
            return
        self._busy[queue] = None
        action = active.action
        if active.fail_at >= 0:
            self._debris(action)
            self._finish(action, Failed(action=action.id, cause="injected"))
            return
        self._finish(action, self._take_effect(action))

    def _finish(self, action: UnitAction, event: UnitEvent) -> None:
        self._pending.discard(action.id)
        if isinstance(event, Failed):
            self._failed.add(action.id)
        self._started_loads.pop(action.id, None)
        self._out.append(event)

    def _end_iteration(self, active: _Active) -> bool:
        """One iteration of a run. True if the run is over."""
        run = active.action
        assert isinstance(run, Run)
        index = active.iterations
        if active.fail_at == index or (run.follow is not None and run.follow in self._failed):
            self._scribble(run, index)
            cause = "injected" if active.fail_at == index else "dependency"
            self._finish(run, Failed(action=run.id, cause=cause))
            return True
        assert self._weights.get(run.plan.model), f"{run.plan.model} is not on the device"
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        scores: list[tuple[TokenLogprobs, ...]] = []
        embeddings: list[bytes | None] = []
        stopped = False
        for row in run.plan.rows:
            ids = row.input if index == 0 else None
            inputs = list(ids) if ids is not None else [self._last[row.slot]]
            assert len(inputs) == row.num_tokens, "a row's input has another length"
            contexts = self._write_kv(run, row, row.start + index, inputs)
            targets = zip(row.targets, contexts, strict=False)
            scores.append(tuple(score(c, t, row.target_logprobs) for t, c in targets))
            embeddings.append(None if row.embed is None else embedding_of(contexts, row.embed))
            if row.sample is None:
                tokens.append(-1)
                logprobs.append(None)
                continue
            token = self._draw(run, row, contexts[-1], index)
            self._last[row.slot] = token
            tokens.append(token)
            top = row.sample.logprobs
            logprobs.append(None if top is None else score(contexts[-1], token, top))
            stopped |= token in row.stop_ids and index >= row.min_remaining
        active.iterations += 1
        last = active.iterations == run.plan.repeat or active.interrupted or stopped
        event = StepDone(
            action=run.id,
            iterations=1,
            last=last,
            tokens=(tuple(tokens),),
            logprobs=(tuple(logprobs),) if any(logprobs) else (),
            prompt_logprobs=tuple(scores) if any(scores) else (),
            embeddings=tuple(embeddings) if any(embeddings) else (),
            errors=row_errors(run.plan),
        )
        if last:
            self._finish(run, event)
        else:
            self._out.append(event)
        return last

    def _draw(self, run: Run, row: Row, context: int, index: int) -> int:
        assert row.sample is not None
        if row.sample.stepwise:
            assert run.plan.repeat == 1, "a stepwise row is repeated"
            assert len(row.outputs) == row.output_index, "a stepwise row lacks outputs"
        vocab = self._models[run.plan.model].vocab_size
        at = row.output_index + index
        return draw(context, row.sample, vocab, row.outputs, row.prompt_ids, at)

    def _cells(self, model: ModelName, page: int) -> list[Cell | None]:
        spec = self._models[model]
        first = page * spec.page_bytes // self.unit.granule_bytes
        last = ((page + 1) * spec.page_bytes - 1) // self.unit.granule_bytes
        mapped = self._mapped_kv.get(model, set())
        assert mapped.issuperset(range(first, last + 1)), f"{model}: page {page} is not mapped"
        return self._kv.setdefault((model, page), [None] * spec.page_tokens)

    def _write_kv(self, run: Run, row: Row, start: int, ids: list[int]) -> list[int]:
        """Returns the hash at each of the positions."""
        model, request = run.plan.model, row.request
        if row.adapter is not None:
            assert self._models[row.adapter].base == model, f"{row.adapter} is not for {model}"
            assert self._weights.get(row.adapter), f"{row.adapter} is not on the device"
        size = self._models[model].page_tokens
        table = self._tables[row.slot]
        context = 0
        if start:
            context = self._read_cell(model, table, request, start - 1)[2]
            self._read_cell(model, table, request, self._rng.randrange(start))
        contexts = contexts_of(ids, context, row.adapter)
        for position, context in enumerate(contexts, start):
            cells = self._cells(model, table[position // size])
            cells[position % size] = (request, position, context)
        return contexts

    def _read_cell(self, model: ModelName, table: list[int], request: int, position: int) -> Cell:
        size = self._models[model].page_tokens
        cell = self._cells(model, table[position // size])[position % size]
        assert cell is not None, f"request {request} reads unwritten KV at {position}"
        writer, written_at, context = cell
        assert written_at == position, f"request {request} at {position} reads {cell}"
        namespace, contexts = self._expected.get(request, (None, []))
        if position < len(contexts):
            assert context == contexts[position], f"request {request} at {position} reads {cell}"
        if writer != request:
            theirs, _ = self._expected.get(writer, (None, []))
            assert namespace is not None and namespace == theirs, f"{request} reads {writer}'s KV"
        return cell

    # -- effects --------------------------------------------------------------------------------

    def _take_effect(self, action: UnitAction) -> UnitEvent:
        match action:
            case Load(model=model, granules=granules):
                self._map(model, "weights", tuple(range(len(granules))), granules)
                self._weights[model] = True
                return CopyDone(action=action.id, num_bytes=self._models[model].weight_bytes)
            case Drop(model=model, granules=granules):
                self._unmap(model, "weights", tuple(range(len(granules))), granules)
                self._weights[model] = False
            case MapKv(model=model, at=at, granules=granules):
                self._map(model, "kv", at, granules)
            case UnmapKv(model=model, at=at, granules=granules):
                self._unmap(model, "kv", at, granules)
            case CopyKv(model=model, pages=pages):
                self._copy(action)
                size = self._models[model].page_bytes
                return CopyDone(action=action.id, num_bytes=len(pages) * size)
            case _:
                raise AssertionError(f"not a move: {action}")
        return Done(action=action.id)

    def _map(
        self, model: ModelName, kind: str, at: tuple[int, ...], granules: tuple[int, ...]
    ) -> None:
        for virtual, granule in zip(at, granules, strict=True):
            assert granule not in self._granules, f"granule {granule} is mapped twice"
            assert (model, kind, virtual) not in self._granules.values()
            self._granules[granule] = (model, kind, virtual)
        if kind == "kv":
            self._mapped_kv.setdefault(model, set()).update(at)

    def _unmap(
        self, model: ModelName, kind: str, at: tuple[int, ...], granules: tuple[int, ...]
    ) -> None:
        for virtual, granule in zip(at, granules, strict=True):
            assert self._granules.pop(granule, None) == (model, kind, virtual)
        if kind == "kv":
            size, gone = self._models[model].page_bytes, set(at)
            self._mapped_kv[model] -= gone
            for key in [k for k in self._kv if k[0] == model]:
                first = key[1] * size // self.unit.granule_bytes
                last = ((key[1] + 1) * size - 1) // self.unit.granule_bytes
                if gone.intersection(range(first, last + 1)):
                    del self._kv[key]

    def _copy(self, action: CopyKv) -> None:
        for place, page in zip(self._places(action), action.pages, strict=True):
            cells = self._cells(action.model, page)
            if action.to == "host":
                self._overwrite(place)
                self._host[place] = (action.model, list(cells))
            else:
                assert place in self._host, "the host store holds something else there"
                model, saved = self._host[place]
                assert model == action.model, "KV of another model was resumed"
                cells[:] = saved

    def _places(self, action: CopyKv) -> list[Place]:
        """Where in the host store each of the pages lies."""
        size = self._models[action.model].page_bytes
        places: list[Place] = []
        pieces: list[tuple[int, int]] = []
        missing = size
        for extent in action.extents:
            offset, left = extent.offset, extent.num_bytes
            while left:
                length = min(left, missing)
                pieces.append((offset, length))
                offset, left, missing = offset + length, left - length, missing - length
                if not missing:
                    places.append(tuple(pieces))
                    pieces, missing = [], size
        return places

    def _overwrite(self, place: Place) -> None:
        """What lay anywhere in these bytes is gone."""
        for other in list(self._host):
            if any(a < b + m and b < a + n for a, n in place for b, m in other):
                del self._host[other]

    def _debris(self, action: UnitAction) -> None:
        """What a failed copy may leave behind."""
        if isinstance(action, CopyKv) and self._rng.random() < 0.5:
            if action.to == "device":
                for page in action.pages:
                    self._kv.pop((action.model, page), None)
            else:
                for place in self._places(action):
                    self._overwrite(place)

    def _scribble(self, run: Run, iteration: int) -> None:
        """What a failed step may leave behind: nonsense at the positions it was to write."""
        if self._rng.random() < 0.5:
            return
        size = self._models[run.plan.model].page_tokens
        for row in run.plan.rows:
            for position in range(row.start + iteration, row.start + iteration + row.num_tokens):
                page = self._tables[row.slot][position // size]
                if (run.plan.model, page) in self._kv:
                    self._kv[(run.plan.model, page)][position % size] = (-1, position, 0)
            self._last[row.slot] = -1
