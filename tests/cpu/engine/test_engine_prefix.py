"""The prefix cache over the CPU executor: promise 3 (in float64 a stream that begins with found KV
is its plain run) and promise 1 (checksums of pages that lay in the host store)."""

from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from support.engine_kit import Engine, TinyModel, plain_run, tiny_models, unit_for
from support.fake_device import FakeDevice
from support.unit_kit import UnitRun
from weft.core.actions import CopyKv, Run
from weft.core.ids import ModelName, RequestId
from weft.core.request import Request, Sampling
from weft.core.unit import UnitSpec
from weft.engine.cpu_executor import CpuExecutor
from weft.engine.cuda_executor import CudaExecutor
from weft.sched.prefix import NO_REQUEST

MODELS = {
    "a": {},
    "b": {"family": "qwen2", "heads": 6, "kv_heads": 1, "head_dim": 24, "hidden": 48},
}


def tight(models: dict[str, TinyModel], granules: int = 24) -> UnitSpec:
    """Room for one of the models and so many granules of KV."""
    granule_bytes = unit_for(models).granule_bytes
    largest = max(-(-m.spec.weight_bytes // granule_bytes) for m in models.values())
    return unit_for(models, num_granules=largest + granules, max_repeat=4)


def shared_requests(models: dict[str, TinyModel], rng: Random, count: int) -> list[Request]:
    """Each begins as some others of its model do, tenants apart; half are seeded."""
    vocab = min(m.arch.vocab_size for m in models.values())
    beginnings = [[rng.randrange(vocab) for _ in range(rng.randint(16, 50))] for _ in range(3)]
    requests = []
    for i in range(count):
        begin = rng.choice(beginnings)
        tail = [rng.randrange(vocab) for _ in range(rng.randint(0, 9))]
        requests.append(
            Request(
                id=RequestId(i),
                model=ModelName(rng.choice(list(models))),
                prompt=(*begin[: rng.randint(8, len(begin))], *tail),
                max_tokens=rng.randint(1, 20),
                sampling=Sampling(temperature=rng.choice([0.0, 0.9]), top_p=0.95, seed=i),
                ignore_eos=True,
                tenant=rng.choice(["", "", "x"]),
            )
        )
    return requests


def run_some(engine: Engine, requests: list[Request], rng: Random) -> UnitRun:
    unit = UnitRun(engine)
    left = list(requests)
    while left or not unit.idle:
        for _ in range(rng.choice([0, 0, 0, 0, 1, 2])):
            if left:
                unit.request(left.pop(0))
        if not unit.idle:
            unit.step()
    unit.drain()
    return unit


def run_again(unit: UnitRun, requests: list[Request]) -> list[RequestId]:
    """Each alone on the unit, then all of them once more in the same order: so that these find
    what the first left, whatever the speed of the machine. Returns the ids of the second time."""
    ids = [RequestId(1000 + i) for i in range(2 * len(requests))]
    for request, again in zip(requests * 2, ids, strict=True):
        unit.request(msgspec.structs.replace(request, id=again))
        unit.drain()
    return ids[len(requests) :]


def first_starts(unit: UnitRun) -> dict[int, int]:
    """Where the first row of every request begins."""
    starts: dict[int, int] = {}
    for action in unit.actions:
        if isinstance(action, Run):
            for row in action.plan.rows:
                starts.setdefault(row.request, row.start)
    return starts


@pytest.mark.parametrize(("seed", "device"), [(0, "cpu"), (1, "cpu"), (2, "cuda")])
def test_streams_with_found_kv_are_their_plain_runs(tmp_path: Path, seed: int, device: str) -> None:
    """On the CPU, and by the CUDA executor on a stand-in device."""
    models = tiny_models(tmp_path, MODELS, dtype="float64", page_tokens=8)
    rng = Random(seed)
    requests = shared_requests(models, rng, 40)
    options: dict[str, Any] = {}
    if device == "cuda":
        options = {"make": CudaExecutor, "device": FakeDevice(seed), "verify": True}
    with Engine(models, tight(models), threads=1, **options) as engine:
        unit = run_some(engine, requests, rng)
        # One of each model in turn: only one has room on the device.
        long = [r for r in requests if len(r.prompt) > 16]
        some = [next(r for r in long if r.model == name) for name in models]
        found = run_again(unit, some)
        assert isinstance(engine.executor, CpuExecutor | CudaExecutor)
        assert engine.executor.checksums is not None
        assert engine.executor.checksums.compared > 0
    with Engine(models, unit_for(models)) as engine:
        for request in requests:
            want = plain_run(
                engine,
                request.model,
                request.prompt,
                request.max_tokens,
                sampling=request.sampling,
            )
            assert unit.tokens[request.id] == list(want), f"request {request.id}"
    assert not unit.errors
    for request, again in zip(some, found, strict=True):
        assert unit.tokens[again] == unit.tokens[request.id]
    starts = first_starts(unit)
    assert all(starts[again] > 0 for again in found)
    assert any(starts[request.id] > 0 for request in requests), "none of many at once found any"
    moved = [a for a in unit.actions if isinstance(a, CopyKv) and a.request == NO_REQUEST]
    assert {a.to for a in moved} == {"host", "device"}


@pytest.mark.parametrize("where", ["device", "host"])
def test_the_canary_a_corrupted_cached_page_is_noticed(tmp_path: Path, where: str) -> None:
    """On the device it changes what is drawn; in the host store the checksum does not hold."""
    models = tiny_models(tmp_path, MODELS, dtype="float64", page_tokens=8)
    prompt = tuple(range(5, 45))
    request = Request(
        id=RequestId(0), model=ModelName("a"), prompt=prompt, max_tokens=12, ignore_eos=True
    )
    with Engine(models, tight(models, granules=12), threads=1) as engine:
        unit = UnitRun(engine)
        unit.request(request)
        unit.drain()
        pages = next(a for a in unit.actions if isinstance(a, Run)).plan.rows[0].append_pages
        assert isinstance(engine.executor, CpuExecutor)
        model = engine.executor._models[ModelName("a")]
        size = model.spec.page_bytes
        if where == "device":
            model.kv_bytes[pages[1] * size : pages[2] * size] = 1
        else:
            (save,) = [a for a in unit.actions if isinstance(a, CopyKv)]
            for extent in save.extents:
                engine.host.buffer[extent.offset : extent.offset + 64] = bytes(64)
            other = msgspec.structs.replace(request, id=RequestId(1), model=ModelName("b"))
            unit.request(other)
            unit.drain()
        again = msgspec.structs.replace(request, id=RequestId(2))
        unit.request(again)
        if where == "device":
            unit.drain()
            assert unit.tokens[again.id] != unit.tokens[request.id]
        else:
            with pytest.raises(AssertionError, match="ChecksumError"):
                unit.drain()
