"""Promise 2: make a plan log by a seeded script, replay it disturbed, compare bits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch

from support.engine_kit import Engine, await_events, row
from weft.core.actions import Row, StepPlan
from weft.core.events import UnitEvent
from weft.core.request import Sampling
from weft.sim.plan_record import PlanRecorder, RecordedStep
from weft.sim.replayer import NOISE_REQUESTS, PlanReplayer

MIN_TOKENS = 2
"""Stop ids of scripted requests are masked for so many tokens."""


@dataclass
class LogitsLog:
    """A `logits_tap` that keeps every iteration's logits, noise left out."""

    _taken: list[tuple[int, int, torch.Tensor]] = field(default_factory=list)
    """First row's request, its position, logits."""

    def __call__(self, plan: StepPlan, iteration: int, logits: torch.Tensor) -> None:
        first = plan.rows[0]
        if first.request < NOISE_REQUESTS:
            self._taken.append((first.request, first.start + iteration, logits.cpu()))

    @property
    def kept(self) -> list[torch.Tensor]:
        """By request and position: a device may run a step of another model between the iterations
        of a repeated one, so the order in time is no property of a plan log."""
        return [logits for *_, logits in sorted(self._taken, key=lambda entry: entry[:2])]


@dataclass
class _Scripted:
    request: int
    prompt: list[int]
    wanted: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    pages: list[int]
    done: int = 0
    """Prompt tokens in the pool."""
    drawn: int = 0


def scripted_record(
    engine: Engine,
    *,
    seed: int = 0,
    requests: int = 3,
    max_prompt: int = 24,
    max_output: int = 16,
) -> tuple[RecordedStep, ...]:
    """Run `requests` requests of every model in random batches (chunks, whole prompts, decode
    rows, repeats, models in turn) and return the plan log. The unit must hold everything."""
    script = _Script(engine, seed, requests, max_prompt, max_output)
    while script.step():
        pass
    return script.recorder.record()


class _Script:
    def __init__(
        self, engine: Engine, seed: int, requests: int, max_prompt: int, max_output: int
    ) -> None:
        self.engine, self.rng, self.recorder = engine, Random(seed), PlanRecorder()
        self.left: dict[str, list[_Scripted]] = {}
        number = at = 0
        for name, model in engine.models.items():
            weights = range(at, at + engine.weight_granules(name))
            at = weights.stop
            engine.do(engine.load(name, weights))
            page = 0
            for _ in range(requests):
                prompt = [
                    self.rng.randrange(model.arch.vocab_size)
                    for _ in range(self.rng.randint(1, max_prompt))
                ]
                wanted = self.rng.randint(1, max_output)
                count = -(-(len(prompt) + wanted) // model.spec.page_tokens)
                sampling = Sampling(
                    temperature=self.rng.choice([0.0, 0.8]),
                    top_p=self.rng.choice([1.0, 0.9]),
                    seed=number,
                )
                pages = list(range(page, page + count))
                page += count
                few = self.rng.sample(range(model.arch.vocab_size), 6)
                stops = tuple(few) if self.rng.random() < 0.5 else ()
                scripted = _Scripted(number, prompt, wanted, sampling, stops, pages)
                self.left.setdefault(name, []).append(scripted)
                number += 1
            granules = -(-page * model.spec.page_bytes // engine.unit.granule_bytes)
            engine.do(engine.map_kv(name, {i: at + i for i in range(granules)}))
            at += granules

    def step(self) -> bool:
        """One step of one model; False when all are finished."""
        names = [name for name, left in self.left.items() if left]
        if not names:
            return False
        name = self.rng.choice(names)
        chosen = self.rng.sample(self.left[name], self.rng.randint(1, len(self.left[name])))
        decoding = [s for s in chosen if s.done == len(s.prompt)]
        if decoding and self.rng.random() < 0.5:
            most = min(min(s.wanted - s.drawn for s in decoding), self.engine.unit.max_repeat)
            repeat, chosen = self.rng.randint(1, most), decoding
        else:
            repeat = 1
        rows = [self._decode(s) if s.done == len(s.prompt) else self._prefill(s) for s in chosen]
        run = self.engine.run(name, rows, repeat=repeat)
        self.recorder.submitted(run)
        self.engine.executor.submit(run)
        events = await_events(
            self.engine.executor,
            lambda seen: any(getattr(e, "last", True) for e in seen),
        )
        self.recorder.ended(events)
        self.engine.collect(events)
        self._count(chosen, self.engine.drawn[run.id])
        self.left[name] = [s for s in self.left[name] if s.drawn < s.wanted]
        return True

    def _count(self, chosen: Sequence[_Scripted], drawn: Sequence[Sequence[int]]) -> None:
        for tokens in drawn:
            for s, token in zip(chosen, tokens, strict=True):
                s.drawn += token >= 0
                if token in s.stop_ids and s.drawn > MIN_TOKENS:
                    s.wanted = s.drawn

    def _decode(self, s: _Scripted) -> Row:
        return self._sampling_row(s, len(s.prompt) + s.drawn - 1, None)

    def _prefill(self, s: _Scripted) -> Row:
        count = self.rng.randint(1, len(s.prompt) - s.done)
        start, s.done = s.done, s.done + count
        ids, pages = s.prompt[start : s.done], () if start else s.pages
        if s.done == len(s.prompt):
            return self._sampling_row(s, start, ids, pages)
        return row(start, ids, request=s.request, slot=s.request, sample=None, pages=pages)

    def _sampling_row(
        self, s: _Scripted, start: int, ids: Sequence[int] | None, pages: Sequence[int] = ()
    ) -> Row:
        return row(
            start,
            ids,
            request=s.request,
            slot=s.request,
            sample=s.sampling,
            output_index=s.drawn,
            stop_ids=s.stop_ids,
            min_remaining=max(0, MIN_TOKENS - s.drawn),
            pages=pages,
        )


def drive_replay(engine: Engine, replayer: PlanReplayer) -> None:
    """Until done; then the arena must hold what the replayer thinks (nothing)."""
    events: Sequence[UnitEvent] = ()
    while True:
        for action in replayer.handle(events):
            engine.executor.submit(action)
        if replayer.done:
            break
        events = await_events(engine.executor, lambda seen: bool(seen))
    engine.executor.check_integrity(mapped=replayer.mapped())


def first_difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> str | None:
    """Where two logs of logits differ in a bit; None if nowhere."""
    if len(one) != len(other):
        return f"{len(one)} iterations became {len(other)}"
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        if a.shape != b.shape or not torch.equal(a, b):
            return f"iteration {i}: {a.shape} {b.shape}, largest {(a - b).abs().max().item()}"
    return None
