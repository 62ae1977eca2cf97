"""Adapters through scheduler and executors: streams are what each is alone, whatever is switched,
and a plan log replays bitwise."""

from pathlib import Path
from random import Random

import msgspec
import pytest
import test_engine_unit as on_cpu

from support.engine_kit import (
    GRANULE_BYTES,
    ActionFailed,
    Engine,
    TinyModel,
    plain_run,
    row,
    tiny_adapters,
    tiny_models,
    unit_for,
)
from support.fake_device import FakeDevice
from support.replay_kit import LogitsLog, drive_replay, first_difference
from support.unit_kit import UnitRun
from weft.core.actions import Drop, Load, Run
from weft.core.ids import ModelName, RequestId
from weft.core.request import Request
from weft.core.unit import UnitSpec
from weft.engine.cuda_executor import CudaExecutor
from weft.sim.replayer import PlanReplayer

ADAPTERS = {
    "x": {"base": "a", "rank": 4},
    "y": {"base": "a", "rank": 9, "targets": ("q_proj", "v_proj", "down_proj")},
    "z": {"base": "b", "rank": 17, "targets": ("k_proj", "up_proj", "o_proj")},
}


def make(folder: Path, dtype: str) -> dict[str, TinyModel]:
    bases = {"a": {}, "b": {"family": "qwen2", "heads": 6, "kv_heads": 1, "hidden": 96}}
    models = tiny_models(folder, bases, dtype=dtype, page_tokens=8)
    return {**models, **tiny_adapters(folder, models, ADAPTERS)}


def tight(models: dict[str, TinyModel]) -> UnitSpec:
    """Holds one base with one adapter and some KV: models switch, and adapters on the same base."""
    sizes = {name: -(-m.spec.weight_bytes // GRANULE_BYTES) for name, m in models.items()}
    largest = max(sizes[str(m.spec.base)] + sizes[n] for n, m in models.items() if m.adapter)
    return unit_for(models, num_granules=largest + 24, max_repeat=4)


def draw_requests(models: dict[str, TinyModel], count: int, rng: Random) -> list[Request]:
    bases = {name: model for name, model in models.items() if model.adapter is None}
    out = []
    for i in range(count):
        request = on_cpu.random_request(i, bases, rng)
        own = [name for name, other in ADAPTERS.items() if other["base"] == request.model]
        chosen = rng.choice([None, *map(ModelName, own), *map(ModelName, own)])
        out.append(msgspec.structs.replace(request, adapter=chosen))
    return out


def check_streams(unit: UnitRun, models: dict[str, TinyModel], requests: list[Request]) -> None:
    with Engine(models, unit_for(models)) as engine:
        for request in requests:
            eos = () if request.ignore_eos else models[request.model].spec.eos_ids
            stops = {*request.stop_ids, *eos}
            tokens = plain_run(
                engine,
                request.model,
                request.prompt,
                request.max_tokens,
                sampling=request.sampling,
                stop_ids=tuple(stops),
                min_tokens=request.min_tokens,
                adapter=request.adapter,
            )
            ended = tokens[-1] in stops and len(tokens) > request.min_tokens
            want = list(tokens[:-1] if ended else tokens)
            got = unit.tokens[request.id]
            cut = len(got) if unit.finish[request.id] == "cancelled" else None
            assert got == want[:cut], f"request {request.id}: {request.model} {request.adapter}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_stream_equals_its_plain_run(tmp_path: Path, device: str) -> None:
    models = make(tmp_path, "float64")
    rng = Random(1)
    requests = draw_requests(models, 24, rng)
    options = (
        {"make": CudaExecutor, "device": FakeDevice(1), "verify": True} if device == "cuda" else {}
    )
    with Engine(models, tight(models), threads=1, **options) as engine:
        unit = on_cpu.run_all(engine, requests, rng, set())
    assert not unit.errors
    check_streams(unit, models, requests)
    assert sum(isinstance(a, Load) and a.model in ADAPTERS for a in unit.actions) >= 4
    assert sum(isinstance(a, Drop) and a.model in ADAPTERS for a in unit.actions) >= 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_adapters_and_the_bare_base_decode_in_one_step(tmp_path: Path, device: str) -> None:
    models = make(tmp_path, "float64")
    options = {"make": CudaExecutor, "device": FakeDevice(1)} if device == "cuda" else {}
    names = [None, *map(ModelName, ("x", "y", "x"))]
    requests = [
        Request(
            id=RequestId(i),
            model=ModelName("a"),
            adapter=name,
            prompt=tuple(range(3, 9 + i)),
            max_tokens=30,
            ignore_eos=True,
        )
        for i, name in enumerate(names)
    ]
    with Engine(models, unit_for(models), threads=1, **options) as engine:
        unit = UnitRun(engine)
        for request in requests:
            unit.request(request)
        unit.drain()
    check_streams(unit, models, requests)
    steps = [a for a in unit.actions if isinstance(a, Run)]
    assert any(len({r.adapter for r in s.plan.rows}) == 3 for s in steps)


def test_a_plan_log_with_adapters_replays_bitwise(tmp_path: Path) -> None:
    models = make(tmp_path, "bfloat16")
    rng = Random(5)
    requests = draw_requests(models, 14, rng)
    wanted, log = LogitsLog(), LogitsLog()
    with Engine(models, tight(models), logits_tap=wanted, threads=1) as engine:
        steps = on_cpu.run_all(engine, requests, rng, set()).recorder.record()
    unit = unit_for(models, num_slots=12, parked_bytes=16 << 20)
    with Engine(models, unit, logits_tap=log) as engine:
        replayer = PlanReplayer(unit, [m.spec for m in models.values()], steps, seed=1)
        drive_replay(engine, replayer)
    assert replayer.mismatches() == []
    assert first_difference(wanted.kept, log.kept) is None
    assert any(r.adapter for s in steps for r in s.plan.rows)


def test_an_adapter_of_another_model_or_none_at_all_is_refused(tmp_path: Path) -> None:
    models = make(tmp_path, "float32")
    with Engine(models, unit_for(models)) as engine:
        for adapter in ("z", "nobody"):
            rows = [row(0, [1, 2], adapter=ModelName(adapter))]
            with pytest.raises(ActionFailed, match="has no adapter"):
                engine.do(engine.run("a", rows))


def test_a_step_without_its_adapter_on_the_device_is_noticed(tmp_path: Path) -> None:
    models = make(tmp_path, "float32")
    with Engine(models, unit_for(models)) as engine:
        weights = range(engine.weight_granules("a"))
        engine.do(engine.load("a", weights))
        engine.do(engine.map_kv("a", {0: len(weights)}))
        rows = [row(0, [1, 2], pages=[0], adapter=ModelName("x"))]
        with pytest.raises(ActionFailed, match="without the adapter"):
            engine.do(engine.run("a", rows))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_adapter_is_unbound_when_nothing_names_it(tmp_path: Path, device: str) -> None:
    models = make(tmp_path, "float32")
    options = {"make": CudaExecutor, "device": FakeDevice(1)} if device == "cuda" else {}
    with Engine(models, unit_for(models), **options) as engine:
        name = ModelName("x")
        drawn = plain_run(engine, "a", [3, 4, 5], 4, adapter="x")
        engine.executor.unbind(name)
        with pytest.raises(ActionFailed, match="has no adapter"):
            engine.do(engine.run("a", [row(0, [1, 2], adapter=name)]))
        engine.executor.bind(
            models["x"].spec, models["x"].arch, engine.images["x"], models["x"].adapter
        )
        assert plain_run(engine, "a", [3, 4, 5], 4, adapter="x") == drawn
