"""Random scenarios: the scheduler against the modelled executor, with everything going wrong.

A scenario is a function of its seed. It ends when every admitted request has ended; then all
memory must be back. `run_scenario` raises AssertionError on the first thing that is not right.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from weft.core.actions import (
    Emit,
    KvGone,
    KvParked,
    Status,
    UnitAction,
    UnitNotice,
    WakeAt,
    WeightsMoved,
)
from weft.core.events import (
    Assign,
    BindFailed,
    Cancel,
    Pin,
    ReportStatus,
    Submit,
    Unassign,
    UnitEvent,
    Unload,
    Warm,
    Woke,
)
from weft.core.ids import ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import Grammar, ParkedKv, Request, Sampling, TokenLogprobs
from weft.core.unit import UnitSpec
from weft.cost.model import CostModel
from weft.policy.presets import preset
from weft.sched.scheduler import UnitScheduler
from weft.sim.executor import ModelledExecutor
from weft.sim.modelled import BAD_GRAMMAR, contexts_of, embedding_of, expected_stream, score

MAX_DECISIONS = 200_000
KIB = 1024


@dataclass(kw_only=True)
class Scenario:
    """What happens to one unit, in virtual time."""

    unit: UnitSpec
    models: list[ModelSpec]
    arrivals: list[tuple[int, UnitEvent]]
    policy: str = "weft"
    turn_s: float = 0.1
    fail: float = 0.0
    cost: CostModel = field(default_factory=CostModel)
    seed: int = 0


@dataclass(kw_only=True)
class Outcome:
    """What came of it."""

    streams: dict[RequestId, list[int]] = field(default_factory=dict)
    finish: dict[RequestId, str] = field(default_factory=dict)
    errors: dict[RequestId, str] = field(default_factory=dict)
    logprobs: dict[RequestId, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    embeddings: dict[RequestId, bytes] = field(default_factory=dict)
    cached_tokens: dict[RequestId, int] = field(default_factory=dict)
    """As said with the first Emit."""
    first_token_ns: dict[RequestId, int] = field(default_factory=dict)
    switches: int = 0
    decisions: int = 0
    ended_ns: int = 0
    trace: list[tuple[int, UnitAction]] = field(default_factory=list)
    moved: list[WeightsMoved] = field(default_factory=list)


class Body:
    """Scheduler and modelled executor joined by a virtual clock: what the worker loop is in the
    server. Kill it and start another one from `outcome` and `parked` to model a crash."""

    def __init__(self, scenario: Scenario, *, check: bool = True, outcome: Outcome | None = None):
        self.scenario = scenario
        self.check = check
        self.outcome = outcome or Outcome()
        self.parked: dict[RequestId, ParkedKv] = {}
        self.scheduler = UnitScheduler(
            scenario.unit, preset(scenario.policy, turn_s=scenario.turn_s)
        )
        self.executor = ModelledExecutor(
            scenario.unit, scenario.cost, seed=scenario.seed, fail=scenario.fail
        )
        for spec in scenario.models:
            self.executor.bind_spec(spec)
        self.now_ns = 0
        self._wake_ns: int | None = None

    def run(
        self, arrivals: Sequence[tuple[int, UnitEvent]], *, until_ns: int | None = None
    ) -> None:
        """Feed arrivals (ascending times) and run until nothing is left to happen."""
        waiting = list(arrivals)
        index = 0
        while True:
            times = [t for t in (self.executor.next_ns, self._wake_ns) if t is not None]
            if index < len(waiting):
                times.append(waiting[index][0])
            if not times:
                return
            now = max(min(times), self.now_ns)
            if until_ns is not None and now > until_ns:
                return
            self.now_ns = now
            self.executor.advance_to(now)
            events: list[UnitEvent] = list(self.executor.poll())
            while index < len(waiting) and waiting[index][0] <= now:
                events.append(waiting[index][1])
                index += 1
            if self._wake_ns is not None and self._wake_ns <= now:
                self._wake_ns = None
                events.append(Woke())
            if events:
                self._handle(events)

    def _handle(self, events: list[UnitEvent]) -> None:
        for event in events:
            if isinstance(event, Submit):
                request = event.request
                namespace = (request.tenant, request.adapter)
                contexts = contexts_of(request.prompt, adapter=request.adapter)
                self.executor.expect(request.id, namespace, contexts)
        self.outcome.decisions += 1
        assert self.outcome.decisions < MAX_DECISIONS, "the scenario does not end"
        for out in self.scheduler.handle(events, self.now_ns):
            if isinstance(out, UnitNotice):
                self._notice(out)
            else:
                self.outcome.trace.append((self.now_ns, out))
                self.executor.submit(out)
        if self.check:
            self.scheduler.check_integrity()
            if self.executor.idle:
                self.executor.check_integrity(mapped=self.scheduler.mapped())

    def _notice(self, notice: UnitNotice) -> None:
        out = self.outcome
        match notice:
            case Emit(request=request, tokens=tokens, finish=finish, error=error):
                assert request not in out.finish, f"request {request} spoke after its end"
                if notice.cached_tokens is not None:
                    assert not out.streams.get(request), "the prompt was spoken of too late"
                    out.cached_tokens[request] = notice.cached_tokens
                if tokens:
                    out.first_token_ns.setdefault(request, self.now_ns)
                out.streams.setdefault(request, []).extend(tokens)
                out.logprobs.setdefault(request, []).extend(notice.logprobs)
                if notice.prompt_logprobs:
                    assert request not in out.prompt_logprobs, "prompt scores came twice"
                    assert len(out.streams[request]) == len(tokens), "prompt scores came late"
                    out.prompt_logprobs[request] = notice.prompt_logprobs
                if notice.embedding:
                    out.embeddings[request] = b"".join(notice.embedding)
                if finish is not None:
                    out.finish[request] = finish
                    out.ended_ns = self.now_ns
                if error is not None:
                    out.errors[request] = error
            case KvParked(request=request, kv=kv):
                self.parked[request] = kv
            case KvGone(request=request):
                self.parked.pop(request, None)
            case WakeAt(at_ns=at_ns):
                self._wake_ns = at_ns
            case WeightsMoved():
                out.moved.append(notice)
            case Status():
                pass


def check_outcome(scenario: Scenario, outcome: Outcome) -> None:
    """Every admitted request ended once, with a prefix of its plain run (the whole of it unless
    it was cancelled or failed)."""
    specs = {spec.name: spec for spec in scenario.models}
    for _, event in scenario.arrivals:
        if not isinstance(event, Submit):
            continue
        request = event.request
        assert request.id in outcome.finish, f"request {request.id} never ended"
        spec = specs[request.model]
        eos = () if request.ignore_eos else spec.eos_ids
        want = expected_stream(
            request.prompt,
            request.sampling,
            adapter=request.adapter,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            stop_ids=frozenset((*eos, *request.stop_ids)),
            vocab_size=spec.vocab_size,
        )
        got = outcome.streams.get(request.id, [])
        assert got == want[: len(got)], f"request {request.id}: {got} is not in {want}"
        _check_scores(request, outcome)
        finish = outcome.finish[request.id]
        if finish in ("stop", "length"):
            assert got == want, f"request {request.id} ended early"
            over = len(got) == request.max_tokens and request.embed is None
            assert (finish == "length") == over
        elif finish == "error":
            assert request.id in outcome.errors


def _check_scores(request: Request, outcome: Outcome) -> None:
    """Log probabilities and embeddings: what was asked for came, whole, and for its positions."""
    ids = (*request.prompt, *outcome.streams.get(request.id, []))
    contexts = contexts_of(ids, adapter=request.adapter)
    prompt, answered = len(request.prompt), outcome.finish[request.id] in ("stop", "length")
    sampling = request.sampling
    logprobs = outcome.logprobs.get(request.id, [])
    if sampling.grammar == BAD_GRAMMAR and not request.prefill_only:
        assert not answered and not logprobs, "a grammar that cannot be used drew tokens"
    if sampling.logprobs is None:
        assert logprobs == []
    else:
        pairs = zip(outcome.streams.get(request.id, []), contexts[prompt - 1 :], strict=False)
        assert logprobs == [score(c, token, sampling.logprobs) for token, c in pairs]
    scores = outcome.prompt_logprobs.get(request.id)
    if request.prompt_logprobs is None or not (answered or outcome.streams.get(request.id)):
        assert scores is None
    elif prompt > 1:
        pairs = zip(request.prompt[1:], contexts, strict=False)
        assert scores == tuple(score(c, token, request.prompt_logprobs) for token, c in pairs)
    if request.embed is not None and answered:
        assert outcome.embeddings[request.id] == embedding_of(contexts, request.embed)
    else:
        assert request.id not in outcome.embeddings


def run_scenario(scenario: Scenario, *, check: bool = True) -> Outcome:
    """Run to the end, check streams, then unassign all models and see all memory come back."""
    body = Body(scenario, check=check)
    body.run(scenario.arrivals)
    check_outcome(scenario, body.outcome)
    end: list[UnitEvent] = [Unassign(model=spec.name) for spec in scenario.models]
    body.run([(body.now_ns, event) for event in [*end, ReportStatus()]])
    status = body.scheduler.status()
    body.outcome.switches = sum(
        1 for _, action in body.outcome.trace if type(action).__name__ == "Load"
    )
    assert body.scheduler.idle and not status.models, f"not idle: {status}"
    assert status.free_granules == scenario.unit.num_granules, "granules leaked"
    assert status.host_used_bytes == 0, "extents leaked"
    assert not body.parked, "the hub still believes in parked KV"
    return body.outcome


def random_scenario(
    seed: int, *, fail: float | None = None, requests: int | None = None
) -> Scenario:
    """A small unit in trouble: few granules, odd page sizes, little host memory, bursts."""
    rng = random.Random(seed)
    granule = 64 * KIB
    num_models = rng.randint(1, 5)
    models = []
    for i in range(num_models):
        page_tokens = rng.choice([2, 4, 8])
        models.append(
            ModelSpec(
                name=ModelName(f"m{i}"),
                weight_bytes=rng.randint(1, 6 * granule),
                num_layers=2,
                page_tokens=page_tokens,
                page_bytes=page_tokens * rng.choice([KIB, 3 * KIB, 8 * KIB, 20 * KIB]),
                max_context_tokens=rng.choice([32, 64]),
                eos_ids=(0,) if rng.random() < 0.5 else (),
                vocab_size=rng.choice([7, 50]),
                pinned=rng.random() < 0.1,
                weight=rng.choice([0.5, 1.0, 3.0]),
            )
        )
    models += _random_adapters(rng, models, granule)
    biggest = max(
        -(-m.weight_bytes // granule) + -(-20 * m.page_bytes // m.page_tokens // granule)
        for m in models
        if m.base is None
    )
    if len(models) > num_models:
        biggest += rng.choice([0, 1, 2])
    unit = UnitSpec(
        granule_bytes=granule,
        num_granules=rng.randint(biggest, biggest * 2 + 6),
        host_offset=rng.choice([0, 4096 * 3]),
        host_bytes=rng.choice([0, 256 * KIB, 1024 * KIB, 16 << 20]),
        host_chunk_bytes=rng.choice([128 * KIB, 1 << 30]),
        num_slots=rng.choice([2, 4, 32]),
        depth=rng.choice([1, 2]),
        max_rows=rng.choice([2, 4, 16]),
        max_step_tokens=rng.choice([4, 16, 64]),
        max_repeat=rng.choice([1, 4, 16]),
    )
    wishes = random.Random(f"wishes {seed}")  # of its own: what a seed meant before stays
    models = [with_wishes(wishes, spec) for spec in models]
    arrivals = _random_arrivals(rng, models, requests or rng.randint(1, 24))
    arrivals = with_operators(wishes, models, arrivals)
    return Scenario(
        unit=unit,
        models=models,
        arrivals=arrivals,
        policy=rng.choice(["weft", "weft", "weft", "dedicated"]),
        turn_s=rng.choice([0.001, 0.03, 0.2]),
        fail=rng.choice([0.0, 0.0, 0.03, 0.15]) if fail is None else fail,
        cost=CostModel(link_bytes_per_s=rng.choice([1e7, 1e9])),
        seed=seed,
    )


def _random_adapters(rng: random.Random, bases: list[ModelSpec], granule: int) -> list[ModelSpec]:
    """For every other scenario: up to four adapters, of any of the models."""
    count = rng.choice([0, 0, 1, 4])
    specs = []
    for i in range(count):
        base = rng.choice(bases)
        specs.append(
            msgspec.structs.replace(
                base,
                name=ModelName(f"{base.name}+{i}"),
                base=base.name,
                weight_bytes=rng.randint(1, 2 * granule),
                pinned=rng.random() < 0.1,
            )
        )
    return specs


def small_scenario(seed: int) -> Scenario:
    """The same unit in trouble with one to three short requests: some twenty decisions, so that
    a core runs about a thousand of them a second."""
    rng = random.Random(seed)
    scenario = random_scenario(seed, requests=rng.randint(1, 3))
    arrivals: list[tuple[int, UnitEvent]] = []
    for at, event in scenario.arrivals:
        if isinstance(event, Submit):
            request = msgspec.structs.replace(
                event.request,
                prompt=event.request.prompt[:6],
                max_tokens=min(event.request.max_tokens, 4),
            )
            event = Submit(request=request)
        arrivals.append((at, event))
    scenario.arrivals = arrivals
    return scenario


def _random_grammar(rng: random.Random) -> Grammar | None:
    if rng.random() > 0.15:
        return None
    return rng.choice([Grammar(kind="json_object"), Grammar(kind="json_object"), BAD_GRAMMAR])


def with_wishes(rng: random.Random, spec: ModelSpec) -> ModelSpec:
    """To be preloaded or not, with some time to live."""
    return msgspec.structs.replace(
        spec,
        preload=rng.random() < 0.2,
        keep_alive_s=rng.choice([-1, -1, -1, 0, 0.001, 0.05]),
    )


def with_operators(
    rng: random.Random, models: list[ModelSpec], arrivals: list[tuple[int, UnitEvent]]
) -> list[tuple[int, UnitEvent]]:
    """Somebody loads, unloads and changes models while requests run."""
    span_ns = max(at for at, _ in arrivals) + 100_000_000
    events: list[tuple[int, UnitEvent]] = []
    for _ in range(rng.choice([0, 0, 1, 4])):
        spec = rng.choice(models)
        choices: list[UnitEvent] = [
            Warm(model=spec.name),
            Unload(model=spec.name),
            Assign(model=with_wishes(rng, spec)),
        ]
        events.append((rng.randrange(span_ns), rng.choice(choices)))
    if rng.random() < 0.1:
        failed = BindFailed(model=rng.choice(models).name, reason="no room for its tables")
        events.append((0, failed))
    # After the assignments of its instant, as a worker has it.
    return sorted([*arrivals, *events], key=lambda item: item[0])


def _random_arrivals(
    rng: random.Random, models: list[ModelSpec], count: int
) -> list[tuple[int, UnitEvent]]:
    events: list[tuple[int, UnitEvent]] = [(0, Assign(model=spec)) for spec in models]
    span_ns = rng.choice([1, 200_000_000, 2_000_000_000])
    beginnings = [[rng.randrange(7) for _ in range(rng.randint(2, 16))] for _ in range(3)]
    shared = rng.choice([0.0, 0.5, 1.0])
    tenants = rng.choice([[""], ["", "a", "b"]])
    for i in range(count):
        spec = rng.choice([model for model in models if model.base is None])
        on_it = [model.name for model in models if model.base == spec.name]
        at = rng.randrange(span_ns)
        prompt = tuple(rng.randrange(spec.vocab_size) for _ in range(rng.randint(1, 20)))
        if rng.random() < shared:
            begin = rng.choice(beginnings)
            prompt = (*begin[: rng.randint(1, len(begin))], *prompt)[:20]
        sampled = rng.random() < 0.3
        kind = rng.random()
        request = Request(
            id=RequestId(i),
            model=spec.name,
            adapter=rng.choice([None, *on_it]),
            prompt=prompt,
            max_tokens=0 if kind < 0.08 else rng.randint(1, 16),
            min_tokens=rng.choice([0, 0, 3]),
            sampling=Sampling(
                temperature=1.0 if sampled else 0.0,
                seed=rng.randrange(1 << 32),
                logprobs=rng.choice([0, 2]) if rng.random() < 0.2 else None,
                repetition_penalty=1.3 if rng.random() < 0.1 else 1.0,
                frequency_penalty=0.5 if rng.random() < 0.1 else 0.0,
                grammar=_random_grammar(rng),
            ),
            prompt_logprobs=rng.choice([0, 2]) if 0.04 <= kind < 0.15 else None,
            embed=rng.choice(["last", "mean"]) if kind < 0.04 else None,
            stop_ids=(3,) if rng.random() < 0.2 else (),
            ignore_eos=rng.random() < 0.3,
            priority=rng.choice([0, 0, 0, 1]),
            tenant=rng.choice(tenants),
            arrival_ns=at,
            hold_deadline_ns=at + rng.choice([1, 50_000_000]) if rng.random() < 0.1 else None,
        )
        events.append((at, Submit(request=request)))
        if rng.random() < 0.15:
            events.append((at + rng.randrange(100_000_000), Cancel(request=request.id)))
    for _ in range(rng.choice([0, 0, 2])):
        pin = Pin(model=rng.choice(models).name, pinned=rng.random() < 0.5)
        events.append((rng.randrange(span_ns), pin))
    if rng.random() < 0.1:
        gone = Unassign(model=rng.choice(models).name)
        events.append((rng.randrange(span_ns), gone))
    events.sort(key=lambda item: item[0])
    return events
