"""What the scheduler knows: requests, models, actions in flight, and the ledger.

The parts of the scheduler (steps, moves, turns) share one Book and change nothing else.
"""

from dataclasses import dataclass, field
from typing import Literal

from weft.core.actions import (
    CopyKv,
    Drop,
    Emit,
    KvGone,
    Load,
    MapKv,
    Run,
    UnitAction,
    UnitNotice,
    UnmapKv,
)
from weft.core.ids import ActionId, ModelName, PageId, RequestId, SlotId
from weft.core.model import ModelSpec
from weft.core.request import Extent, FinishReason, ParkedKv, Request, TokenLogprobs
from weft.core.unit import UnitSpec
from weft.ledger.hazards import Resource
from weft.ledger.ledger import Ledger, ModelMemory
from weft.ledger.prefix import Block
from weft.policy.prefill.base import Waiting

Phase = Literal["queued", "running", "parking", "parked", "resuming", "finished"]
Leaving = Literal["kv", "all"]
Wish = Literal["preload", "asked"]


@dataclass(eq=False, slots=True)
class RequestState:
    """A request in this unit.

    `computed` <= `planned` <= `length`: positions whose KV is known to be there, positions named
    in steps planned so far, and tokens known or being drawn. Positions advance when planned, text
    when done.
    """

    request: Request
    emitted: list[int]
    stop_ids: tuple[int, ...]
    phase: Phase = "queued"
    slot: SlotId | None = None
    pages: list[PageId] = field(default_factory=list)
    pages_sent: int = 0
    """Entries of the slot's page table that the executor has been given."""
    planned: int = 0
    computed: int = 0
    draws_in_flight: int = 0
    runs_in_flight: int = 0
    copying: bool = False
    last_on_device: bool = False
    """The slot holds the token drawn last, so a decode row needs no input."""
    dirty: bool = False
    """A run failed: go back to `computed` once nothing is in flight."""
    parked: ParkedKv | None = None
    began: bool = False
    fails: int = 0
    park_fails: int = 0
    resume_fails: int = 0
    digests: list[bytes] = field(default_factory=list)
    """Of the prefix cache: its root, then one for every whole page of tokens so far asked for."""
    entered: int = 0
    """Pages from the first on that the prefix cache has been told of."""
    reuse: bool = True
    """It may begin behind pages found in the prefix cache."""
    cached_tokens: int = 0
    """Prompt tokens found there when it last began."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of positions 1 .. of the prompt as far as they are computed; empty once they were sent."""
    embedding: list[bytes] = field(default_factory=list)
    """Parts of it, in order; their sum counts."""
    _prompt_ids: tuple[int, ...] | None = None
    spoke: bool = False
    """It had its first Emit, here or in an earlier incarnation."""

    # Facts of the request, worked out once: every step asks for them.
    id: RequestId = field(init=False)
    num_prompt: int = field(init=False)
    stepwise: bool = field(init=False)
    prefill_only: bool = field(init=False)
    plain: bool = field(init=False)
    """Its decode rows say where and how to draw, and nothing else."""

    def __post_init__(self) -> None:
        request = self.request
        self.id, self.num_prompt = request.id, len(request.prompt)
        self.stepwise, self.prefill_only = request.sampling.stepwise, request.prefill_only
        scores = request.prompt_logprobs is not None
        self.plain = not (self.stepwise or self.prefill_only or scores or request.embed)

    @property
    def known(self) -> int:
        """Tokens whose ids are known here."""
        return self.num_prompt + len(self.emitted)

    @property
    def length(self) -> int:
        return self.num_prompt + len(self.emitted) + self.draws_in_flight

    @property
    def draws_left(self) -> int:
        """Tokens that may still be planned."""
        return self.request.max_tokens - len(self.emitted) - self.draws_in_flight

    @property
    def wants_steps(self) -> bool:
        """There is something to plan: a token to draw, or a prompt of which nothing is drawn."""
        if self.prefill_only:
            return self.planned < self.length
        return self.draws_left > 0

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """For a repetition penalty: what the prompt has, once each."""
        if self._prompt_ids is None:
            wanted = self.request.sampling.repetition_penalty != 1.0
            self._prompt_ids = tuple(sorted({*self.request.prompt})) if wanted else ()
        return self._prompt_ids

    @property
    def scores_prompt(self) -> bool:
        """Log probabilities of the prompt are still due."""
        return self.request.prompt_logprobs is not None and not self.spoke

    @property
    def idle(self) -> bool:
        return not self.runs_in_flight and not self.copying

    def ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Known token ids at positions start..stop-1."""
        prompt = self.request.prompt
        if stop <= len(prompt):
            return prompt[start:stop]
        head = prompt[start:] if start < len(prompt) else ()
        offset = len(prompt)
        return head + tuple(self.emitted[max(start - offset, 0) : stop - offset])


@dataclass(slots=True)
class Answer:
    """What a report of a step brought for one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class ModelEntry:
    """A model assigned to this unit."""

    spec: ModelSpec
    members: dict[RequestId, RequestState] = field(default_factory=dict)
    """Unfinished requests, in order of submission. An adapter has none: its are its base's."""
    riders: dict[RequestId, RequestState] = field(default_factory=dict)
    """An adapter's: those members of its base that name it, in the same order."""
    leaving: Leaving | None = None
    """Being moved out: KV parked ("kv"), or weights dropped as well ("all")."""
    last_turn_end_ns: int = -1
    last_used_ns: int = -1
    load_fails: int = 0
    map_fails: int = 0
    failed: str | None = None
    retry_ns: int | None = None
    """When a failed model may be tried again."""
    unfit: bool = False
    """`failed` because of the models that stay beside it: undone when they go."""
    unassigned: bool = False
    wish: Wish | None = None
    """Bring it in without a request: at its turn behind everybody with work."""
    unload: bool = False
    """Take it off the device when it has no work."""
    idle_since_ns: int | None = None
    """When its last request ended; None while it has work or if it had none since it came."""
    load_cause: str = ""
    leave_cause: str = ""
    ordered_ns: int = 0
    """When the load or drop in flight was ordered."""
    starving: bool = False
    """A row of the last step planned found no room to grow: nobody else is brought in before."""
    blocked: bool = False
    """It has the turn and runs nothing, for want of room: nobody else is brought in before."""
    generation: int = 0
    """Of all models assigned to this unit so far, the how manieth it is."""
    prefix_hit_tokens: int = 0
    """Positions whose KV was found in the prefix cache."""
    switches_in: int = 0
    switches_out: int = 0
    loads_by: dict[str, int] = field(default_factory=dict)
    drops_by: dict[str, int] = field(default_factory=dict)
    load_ns: int = 0
    load_bytes: int = 0
    begun: int = 0
    queue_wait_ns: int = 0
    preemptions: int = 0
    parks: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    draws: int = 0
    """Tokens drawn for requests that were alive, stop tokens included: what a turn is for."""


@dataclass(eq=False, slots=True)
class StepInFlight:
    """A Run and whom it serves, row by row."""

    run: Run
    states: list[RequestState]
    seen: int = 0
    """Iterations reported so far."""
    interrupted: bool = False


def waiting_view(state: RequestState) -> Waiting:
    """A request as prefill policies see it."""
    return Waiting(
        request=state.id,
        arrival_ns=state.request.arrival_ns,
        priority=state.request.priority,
        parked=state.phase == "parked",
        tokens=state.length - state.planned,
    )


class Book:
    """Shared state and the primitive changes that keep it consistent."""

    def __init__(self, unit: UnitSpec) -> None:
        self.unit = unit
        self.ledger = Ledger(unit)
        self.models: dict[ModelName, ModelEntry] = {}
        self.requests: dict[RequestId, RequestState] = {}
        """Everything that holds anything: unfinished requests and finished ones not yet idle."""
        self.over: set[RequestId] = set()
        """Of these the finished ones."""
        self.steps: dict[ActionId, StepInFlight] = {}
        self.moves: dict[ActionId, Load | Drop | MapKv | UnmapKv | CopyKv] = {}
        self.interrupts: set[ActionId] = set()
        self.actions: list[UnitAction] = []
        self.notices: list[UnitNotice] = []
        self.now_ns = 0
        self.draining = False
        self.actions_done = 0
        self.bytes_copied = 0
        self.changes = 0
        """Memory given back or models gone within this decision: others may now be able to go on,
        so the decision looks again."""
        self.generations = 0
        self.saves: dict[ActionId, list[tuple[Block, PageId, tuple[Extent, ...]]]] = {}
        """Of the prefix cache: what is being copied to the host store, page by page."""
        self.fetches: dict[ActionId, tuple[RequestState, list[Block]]] = {}
        """And from there: for whom, and the blocks his pages begin with."""
        self._next_id = 1

    def new_id(self) -> ActionId:
        self._next_id += 1
        return ActionId(self._next_id - 1)

    def memory(self, name: ModelName) -> ModelMemory:
        return self.ledger.models[name]

    def after(
        self,
        action: ActionId,
        *,
        reads: list[Resource] | None = None,
        writes: list[Resource] | None = None,
        except_for: ActionId | None = None,
    ) -> tuple[ActionId, ...]:
        return self.ledger.hazards.plan(
            action, reads=reads or (), writes=writes or (), except_for=except_for
        )

    def pending_maps(self, name: ModelName, pages: list[PageId]) -> list[Resource]:
        """Reads that make an action follow the maps under `pages` still in flight."""
        return [("kg", name, v) for v in self.memory(name).kv.maps_over(pages)]

    # -- ends of requests -----------------------------------------------------------------------

    def finish(
        self,
        state: RequestState,
        reason: FinishReason,
        *,
        answer: Answer | None = None,
        error: str | None = None,
    ) -> None:
        """Tell the client now; memory follows when the request is idle (`reap`)."""
        assert state.phase != "finished"
        state.phase = "finished"
        self.over.add(state.id)
        entry = self.models[state.request.model]
        del entry.members[state.id]
        if not entry.members:
            entry.idle_since_ns = self.now_ns
        adapter = self.models.get(state.request.adapter) if state.request.adapter else None
        if adapter is not None:
            del adapter.riders[state.id]
            if not adapter.riders:
                adapter.idle_since_ns = self.now_ns
        self.emit(state, answer or Answer(), finish=reason, error=error)

    def emit(
        self,
        state: RequestState,
        answer: Answer,
        *,
        finish: FinishReason | None = None,
        error: str | None = None,
    ) -> None:
        """Tokens for the client; the first time, with what was computed of the prompt."""
        if state.spoke and finish is None:
            self.notices.append(
                Emit(request=state.id, tokens=tuple(answer.tokens), logprobs=tuple(answer.logprobs))
            )
            return
        whole = finish in (None, "stop", "length")
        self.notices.append(
            Emit(
                request=state.id,
                tokens=tuple(answer.tokens),
                finish=finish,
                error=error,
                logprobs=tuple(answer.logprobs),
                prompt_logprobs=tuple(state.prompt_logprobs) if whole else (),
                embedding=tuple(state.embedding) if whole else (),
                cached_tokens=None if state.spoke else state.cached_tokens,
            )
        )
        state.spoke = True
        state.prompt_logprobs = []

    def forget_parked(self, state: RequestState) -> None:
        """The host copy is no longer wanted and nothing uses it."""
        if state.parked is not None:
            self.ledger.extents.give(state.parked.extents)
            state.parked = None
            self.notices.append(KvGone(request=state.id))

    def release_device(self, state: RequestState) -> None:
        """Pages and slot go back; legal when no action names them."""
        assert state.idle, "pages are in use"
        self.changes += 1
        if state.pages:
            self.memory(state.request.model).kv.give(state.pages)
            state.pages = []
        if state.slot is not None:
            self.ledger.give_slot(state.slot)
            state.slot = None
        state.pages_sent = state.entered = 0
        state.last_on_device = False
        state.dirty = False

    def requeue(self, state: RequestState) -> None:
        """Forget all KV: it will be computed again from the known tokens."""
        self.release_device(state)
        self.forget_parked(state)
        state.planned = state.computed = 0
        state.prompt_logprobs, state.embedding = [], []
        state.cached_tokens = 0
        state.phase = "queued"

    def reap(self) -> None:
        """Release finished requests that became idle; rewind failed ones."""
        if not self.over:
            return
        for state in [s for s in self.requests.values() if s.phase == "finished" and s.idle]:
            self.release_device(state)
            self.forget_parked(state)
            del self.requests[state.id]
            self.over.remove(state.id)

    def rewind(self, state: RequestState) -> None:
        """After a failed run, once idle: continue from what is known to be computed."""
        if state.dirty and state.runs_in_flight == 0:
            assert state.draws_in_flight == 0
            state.planned = state.computed
            state.last_on_device = False
            state.pages_sent = 0
            state.dirty = False

    def busy_models(self) -> list[ModelEntry]:
        return [entry for entry in self.models.values() if entry.members]
