"""Random scenarios with many adapters and little room, half of them with operators: what
`scenario.random_scenario` rarely meets, such as an adapter sent away under a request whose KV is on
its way."""

import random

import msgspec

from weft.core.events import Assign, Cancel, Pin, Submit, UnitEvent
from weft.core.ids import ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import Request
from weft.core.unit import UnitSpec
from weft.cost.model import CostModel
from weft.sim.scenario import KIB, Scenario, with_operators, with_wishes

GRANULE = 64 * KIB
VOCAB = 50
LONGEST_TOKENS = 36
"""A request's prompt and output, and a page."""


def adapter_scenario(seed: int) -> Scenario:
    """One to three bases with up to five adapters, on a unit where hardly one base, one of its
    adapters and one request fit together."""
    rng = random.Random(seed)
    bases = [_base(rng, i) for i in range(rng.randint(1, 3))]
    adapters = [_adapter(rng, rng.choice(bases), i) for i in range(rng.randint(2, 5))]
    unit = UnitSpec(
        granule_bytes=GRANULE,
        num_granules=max(_least(base, adapters) for base in bases) + rng.randint(0, 5),
        host_bytes=rng.choice([256 * KIB, 16 << 20]),
        num_slots=rng.choice([4, 32]),
        depth=rng.choice([1, 2]),
        max_rows=rng.choice([4, 16]),
        max_step_tokens=rng.choice([8, 64]),
        max_repeat=rng.choice([1, 4, 16]),
    )
    models = [*bases, *adapters]
    arrivals = _arrivals(rng, bases, adapters)
    operators = random.Random(f"operators {seed}")  # of its own: what a seed meant before stays
    policy = "weft"
    if operators.random() < 0.5:
        arrivals = _operated(operators, models, arrivals)
        policy = operators.choice(["weft", "weft", "dedicated"])
    return Scenario(
        unit=unit,
        models=models,
        arrivals=arrivals,
        policy=policy,
        turn_s=rng.choice([0.001, 0.03, 0.1]),
        fail=rng.choice([0.0, 0.03, 0.15]),
        cost=CostModel(link_bytes_per_s=rng.choice([1e6, 1e7, 1e9])),
        seed=seed,
    )


def _base(rng: random.Random, number: int) -> ModelSpec:
    return ModelSpec(
        name=ModelName(f"m{number}"),
        weight_bytes=rng.randint(1, 3 * GRANULE),
        num_layers=2,
        page_tokens=4,
        page_bytes=4 * rng.choice([KIB, 8 * KIB, 20 * KIB]),
        max_context_tokens=64,
        vocab_size=VOCAB,
    )


def _adapter(rng: random.Random, base: ModelSpec, number: int) -> ModelSpec:
    """Its name decides whether it goes before its base where both were used last together."""
    return msgspec.structs.replace(
        base,
        name=ModelName(f"{rng.choice('az')}{number}"),
        base=base.name,
        weight_bytes=rng.randint(1, 3 * GRANULE),
    )


def _least(base: ModelSpec, adapters: list[ModelSpec]) -> int:
    """Granules for a base, its largest adapter and the longest request."""
    own = [-(-one.weight_bytes // GRANULE) for one in adapters if one.base == base.name]
    kv_bytes = LONGEST_TOKENS * base.page_bytes // base.page_tokens
    return -(-base.weight_bytes // GRANULE) + -(-kv_bytes // GRANULE) + max(own, default=0)


def _arrivals(
    rng: random.Random, bases: list[ModelSpec], adapters: list[ModelSpec]
) -> list[tuple[int, UnitEvent]]:
    events: list[tuple[int, UnitEvent]] = [(0, Assign(model=m)) for m in (*bases, *adapters)]
    span_ns = rng.choice([1, 200_000_000, 1_000_000_000])
    for i in range(rng.randint(4, 24)):
        base, at_ns = rng.choice(bases), rng.randrange(span_ns)
        own = [one.name for one in adapters if one.base == base.name]
        alike = rng.random() < 0.5
        request = Request(
            id=RequestId(i),
            model=base.name,
            adapter=rng.choice([None, *own, *own]),
            # Half of the prompts begin alike: a prefix cache must not mix adapters up.
            prompt=tuple(i if alike else rng.randrange(VOCAB) for i in range(rng.randint(1, 16))),
            max_tokens=rng.randint(1, 16),
            priority=rng.choice([0, 0, 1]),
            arrival_ns=at_ns,
        )
        events.append((at_ns, Submit(request=request)))
        if rng.random() < 0.15:
            events.append((at_ns + rng.randrange(100_000_000), Cancel(request=request.id)))
    events.sort(key=lambda item: item[0])
    return events


def _operated(
    rng: random.Random, models: list[ModelSpec], arrivals: list[tuple[int, UnitEvent]]
) -> list[tuple[int, UnitEvent]]:
    """With times to live, and somebody who loads, unloads and pins while requests run."""
    wishes = {spec.name: with_wishes(rng, spec) for spec in models}
    events: list[tuple[int, UnitEvent]] = [
        (at, Assign(model=wishes[event.model.name]) if isinstance(event, Assign) else event)
        for at, event in arrivals
    ]
    span_ns = max(at for at, _ in events) + 200_000_000
    for _ in range(rng.choice([0, 2, 5])):
        pin = Pin(model=rng.choice(models).name, pinned=rng.random() < 0.5)
        events.append((rng.randrange(span_ns), pin))
    return with_operators(rng, models, events)
