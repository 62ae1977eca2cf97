"""The real scheduler over the CPU executor, with memory for one model and a little more: promises
1 (checksums are on), 2 (its plan log replays bitwise) and 3 (every stream equals its plain run)."""

from pathlib import Path
from random import Random
from typing import Any

import pytest

from support.engine_kit import Engine, TinyModel, plain_run, tiny_models, unit_for
from support.replay_kit import LogitsLog, drive_replay, first_difference
from support.unit_kit import UnitRun
from weft.core.actions import CopyKv, Load, UnitAction
from weft.core.events import Cancel
from weft.core.ids import ModelName, RequestId
from weft.core.request import FinishReason, Request, Sampling
from weft.core.unit import UnitSpec
from weft.sim.replayer import PlanReplayer

MODELS: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {"family": "qwen2", "heads": 6, "kv_heads": 1, "head_dim": 24, "hidden": 48},
    "c": {"tied": True, "layers": 3, "rope": "llama3"},
}

WINDOWED: dict[str, dict[str, Any]] = {
    "a": {"family": "gemma3", "tied": True},
    "b": {"family": "mistral", "rope": "dynamic", "config_extra": {"sliding_window": 12}},
    "c": {"family": "phi3", "rope": "longrope", "config_extra": {"partial_rotary_factor": 0.5}},
}
"""Windows shorter than most requests, soft-caps, norms in other places, partial rotary."""


def tight(models: dict[str, TinyModel], **fields: int) -> UnitSpec:
    """Room for the largest model and 24 granules of KV."""
    granule_bytes = unit_for(models).granule_bytes
    largest = max(-(-m.spec.weight_bytes // granule_bytes) for m in models.values())
    return unit_for(models, num_granules=largest + 24, **{"max_repeat": 4, **fields})


def random_request(number: int, models: dict[str, TinyModel], rng: Random) -> Request:
    name = rng.choice(list(models))
    vocab = models[name].arch.vocab_size
    return Request(
        id=RequestId(number),
        model=ModelName(name),
        prompt=tuple(rng.randrange(vocab) for _ in range(rng.randint(1, 40))),
        max_tokens=rng.randint(1, 24),
        min_tokens=rng.choice([0, 0, 3]),
        sampling=Sampling(temperature=rng.choice([0.0, 0.9]), top_p=0.95, seed=number),
        stop_ids=tuple(rng.sample(range(vocab), rng.choice([0, 4]))),
        ignore_eos=rng.random() < 0.5,
        priority=rng.choice([0, 0, 1]),
    )


def plain_stream(
    engine: Engine, request: Request, eos_ids: tuple[int, ...]
) -> tuple[list[int], FinishReason]:
    """What the client should get: up to the first stop id that counts, which is not part of it."""
    stops = {*request.stop_ids, *(() if request.ignore_eos else eos_ids)}
    tokens = plain_run(
        engine,
        request.model,
        request.prompt,
        request.max_tokens,
        sampling=request.sampling,
        stop_ids=tuple(stops),
        min_tokens=request.min_tokens,
    )
    if tokens[-1] in stops and len(tokens) > request.min_tokens:
        return list(tokens[:-1]), "stop"
    return list(tokens), "length"


def run_all(
    engine: Engine, requests: list[Request], rng: Random, cancelled: set[RequestId]
) -> UnitRun:
    """Submit the requests a few at a time between decisions, cancel some on the way."""
    unit = UnitRun(engine)
    left = list(requests)
    while left or not unit.idle:
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            if left:
                unit.request(left.pop(0))
        if rng.random() < 0.05 and unit.tokens:
            victim = rng.choice(list(unit.tokens))
            if victim not in unit.finish:
                cancelled.add(victim)
                unit.tell(Cancel(request=victim))
        if not unit.idle:
            unit.step()
    unit.drain()
    return unit


def check_streams(unit: UnitRun, models: dict[str, TinyModel], requests: list[Request]) -> None:
    """Against runs of each request alone, on a unit where everything has room."""
    with Engine(models, unit_for(models)) as engine:
        for request in requests:
            want, finish = plain_stream(engine, request, models[request.model].spec.eos_ids)
            got = unit.tokens[request.id]
            if unit.finish[request.id] == "cancelled":
                assert got == want[: len(got)]
            else:
                assert got == want, f"request {request.id} on {request.model}"
                assert unit.finish[request.id] == finish


@pytest.mark.parametrize(("depth", "shapes"), [(1, MODELS), (2, MODELS), (2, WINDOWED)])
def test_every_stream_equals_its_plain_run(
    tmp_path: Path, depth: int, shapes: dict[str, dict[str, Any]]
) -> None:
    models = tiny_models(tmp_path, shapes, dtype="float64", page_tokens=8)
    rng = Random(depth)
    requests = [random_request(i, models, rng) for i in range(30)]
    cancelled: set[RequestId] = set()
    with Engine(models, tight(models, depth=depth), threads=1) as engine:
        unit = run_all(engine, requests, rng, cancelled)
    check_streams(unit, models, requests)
    assert not unit.errors
    assert sum(isinstance(a, Load) for a in unit.actions) >= 6, "models were switched"
    assert sum(isinstance(a, CopyKv) and a.to == "device" for a in unit.actions) >= 3
    assert set(unit.finish) == {r.id for r in requests}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_schedulers_plan_log_replays_bitwise(tmp_path: Path, dtype: str) -> None:
    models = tiny_models(tmp_path, MODELS, dtype=dtype, page_tokens=8)
    rng = Random(5)
    requests = [random_request(i, models, rng) for i in range(16)]
    wanted, log = LogitsLog(), LogitsLog()
    with Engine(models, tight(models), logits_tap=wanted, threads=1) as engine:
        steps = run_all(engine, requests, rng, set()).recorder.record()
    unit = unit_for(models, num_slots=12, parked_bytes=16 << 20)
    with Engine(models, unit, logits_tap=log) as engine:
        replayer = PlanReplayer(unit, [m.spec for m in models.values()], steps, seed=1)
        drive_replay(engine, replayer)
    assert replayer.mismatches() == []
    assert first_difference(wanted.kept, log.kept) is None


@pytest.mark.slow
@pytest.mark.parametrize("fault_rate", [0.0, 0.02])
def test_many_units_with_failing_actions(tmp_path: Path, fault_rate: float) -> None:
    """Little or no host space, few slots, small steps, and actions that fail now and then: a
    request may fail in the end, every other stream is its plain run."""
    models = tiny_models(tmp_path, MODELS, dtype="float64", page_tokens=8)
    loads = 0
    for seed in range(40):
        rng, fault_rng = Random(seed), Random(seed + 1000)
        requests = [random_request(i, models, rng) for i in range(80)]
        spec = tight(
            models,
            depth=rng.choice([1, 2]),
            num_slots=rng.choice([4, 8]),
            max_rows=4,
            max_step_tokens=rng.choice([16, 64]),
            max_repeat=rng.choice([1, 4, 16]),
            parked_bytes=rng.choice([0, 1 << 15, 1 << 17, 1 << 22]),
        )

        def fault(action: UnitAction, fault_rng: Random = fault_rng) -> None:
            if fault_rng.random() < fault_rate:
                raise fault_rng.choice([OSError("injected"), MemoryError("injected")])

        with Engine(models, spec, threads=1, fault=fault) as engine:
            unit = run_all(engine, requests, rng, set())
        check_streams(unit, models, [r for r in requests if r.id not in unit.errors])
        assert fault_rate or not unit.errors
        assert len(unit.errors) < 8
        loads += sum(isinstance(a, Load) for a in unit.actions)
    assert loads > 1000
