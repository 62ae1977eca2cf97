"""The CUDA executor on tiny models: against the CPU, through park, drop, load and resume, and a
plan log replayed bit for bit."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch

from support.engine_kit import Engine, TinyModel, plain_run, row, tiny_models, unit_for
from support.gpu import needs_gpu
from support.plain import PlainModel
from support.replay_kit import LogitsLog, drive_replay, first_difference, scripted_record
from support.unit_kit import UnitRun
from weft.core.actions import CopyKv, Load
from weft.core.events import CopyDone, StepDone
from weft.core.ids import ModelName, RequestId
from weft.core.request import Extent, Request, Sampling
from weft.core.unit import UnitSpec
from weft.engine.base import Executor
from weft.sim.replayer import PlanReplayer

pytestmark = needs_gpu

PROMPT = [17, 80, 33, 5, 99, 64, 21, 40, 71, 12, 90, 3, 77, 41, 8, 55, 120]
PAGES = [9, 2, 7, 4, 11, 0, 5]
GRANULE = 2 << 20
SHAPES = {
    "a": {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 2, "head_dim": 64},
    "b": {"family": "qwen2", "layers": 3, "heads": 6, "kv_heads": 1, "head_dim": 24, "hidden": 288},
}


def make(*args: object, **options: object) -> Executor:
    from weft.engine.cuda_executor import CudaExecutor

    return CudaExecutor(*args, **options)  # type: ignore[arg-type]


def unit_of(models: dict[str, TinyModel], **fields: int) -> UnitSpec:
    wanted = {"granule_bytes": GRANULE, "host_chunk_bytes": 1 << 20, "kv_tokens": 2048, **fields}
    return unit_for(models, **wanted)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TinyModel]:
    folder = tmp_path_factory.mktemp("models")
    return tiny_models(folder, SHAPES, dtype=request.param, page_tokens=16)


@pytest.fixture
def engine(models: dict[str, TinyModel]) -> Iterator[Engine]:
    with Engine(models, unit_of(models), make=make, verify=True) as made:
        yield made


def test_streams_equal_the_cpu(engine: Engine) -> None:
    """float32: tokens. bfloat16: the first token (later ones may part at a near tie)."""
    for name, model in engine.models.items():
        alone, _ = PlainModel(model.path, model.arch.dtype, page_tokens=16).generate(PROMPT, 12)
        drawn = list(plain_run(engine, name, PROMPT, 12))
        same = 12 if model.arch.dtype == "float32" else 1
        assert drawn[:same] == alone[:same], name
        sampling = Sampling(temperature=0.8, top_p=0.9, seed=5)
        assert plain_run(engine, name, PROMPT, 8, sampling=sampling) == plain_run(
            engine, name, PROMPT, 8, sampling=sampling
        )
    engine.executor.check_integrity(mapped={})


def test_park_drop_load_and_resume_elsewhere(engine: Engine) -> None:
    spec = engine.models["a"].spec
    base = engine.weight_granules("a")
    plain = list(plain_run(engine, "a", PROMPT, 12))
    granules = -(-16 * spec.page_bytes // GRANULE)
    kv = {i: base + i for i in range(granules)}
    engine.do(engine.load("a", range(base)))
    engine.do(engine.map_kv("a", kv))
    first = engine.run("a", [row(0, PROMPT, pages=PAGES)])
    engine.do(first)
    second = engine.run("a", [row(len(PROMPT), None, output_index=1)], repeat=4)
    engine.do(second)
    drawn = [engine.drawn[first.id][0][0], *(t[0] for t in engine.drawn[second.id])]
    used = -(-(len(PROMPT) + 4) // spec.page_tokens)
    size = used * spec.page_bytes
    at = engine.unit.host_offset + 4096
    extents = [Extent(at + size, 8192), Extent(at, size - 8192)]
    park = engine.copy_kv("a", "host", PAGES[:used], extents)
    unmap = engine.unmap_kv("a", kv, after=(park.id,))
    drop = engine.drop("a", range(base))
    free = list(range(engine.unit.num_granules - 1, -1, -1))
    load = engine.load("a", free[:base], after=(drop.id, unmap.id))
    places = dict(zip(reversed(range(granules)), free[base:], strict=False))
    remap = engine.map_kv("a", places, after=(drop.id, unmap.id))
    moved = [1, 8, 3, 6, 10, 2, 12]
    resume = engine.copy_kv("a", "device", moved[:used], extents, after=(remap.id, park.id))
    rows = [row(len(PROMPT) + 4, [drawn[4]], slot=3, pages=moved, output_index=5)]
    step = engine.run("a", rows, after=(resume.id,), follow=load.id)
    late = engine.run(
        "a",
        [row(len(PROMPT) + 5, None, slot=3, output_index=6)],
        repeat=6,
        after=(step.id,),
    )
    actions = [park, unmap, drop, load, remap, resume, step, late]
    for action in actions:
        engine.submit(action)
    ends = engine.wait(*(a.id for a in actions))
    assert [type(e) for e in ends[3:]] == [CopyDone, type(ends[4]), CopyDone, StepDone, StepDone]
    drawn += [t[0] for run in (step, late) for t in engine.drawn[run.id]]
    assert drawn == plain
    assert engine.executor.checksums.compared >= used + 2


@pytest.mark.parametrize("depth", [1, 2])
def test_a_plan_log_replays_bitwise(models: dict[str, TinyModel], depth: int) -> None:
    wanted, log = LogitsLog(), LogitsLog()
    unit = unit_of(models, num_slots=12, parked_bytes=64 << 20, kv_tokens=8192, depth=depth)
    with Engine(models, unit, make=make, logits_tap=wanted) as engine:
        steps = scripted_record(engine, seed=depth)
    with Engine(models, unit, make=make, logits_tap=log, verify=True) as engine:
        replayer = PlanReplayer(unit, [m.spec for m in models.values()], steps, seed=1)
        drive_replay(engine, replayer)
    assert replayer.mismatches() == []
    assert first_difference(wanted.kept, log.kept) is None
    assert sum(replayer.counts.values()) > 5, "it was disturbed"


def test_graphs_are_the_same_bits_as_launches(models: dict[str, TinyModel]) -> None:
    """And several kinds of steps were captured, and replayed more than once."""
    logs = []
    unit = unit_of(models, num_slots=12, parked_bytes=64 << 20, kv_tokens=8192, depth=2)
    for graphs in (True, False):
        log = LogitsLog()
        with Engine(models, unit, make=partial(make, graphs=graphs), logits_tap=log) as engine:
            steps = scripted_record(engine, seed=3, requests=5, max_output=24)
            kinds = engine.executor.graph_kinds()
        assert (kinds > 2) == graphs
        logs.append((steps, log.kept))
    assert [s.plan for s in logs[0][0]] == [s.plan for s in logs[1][0]]
    assert first_difference(logs[0][1], logs[1][1]) is None


def test_the_scheduler_switches_models(models: dict[str, TinyModel]) -> None:
    rng = Random(1)
    weights = max(-(-m.spec.weight_bytes // GRANULE) for m in models.values())
    unit_spec = unit_of(models, num_granules=weights + 1, max_repeat=4, depth=2)
    requests = [
        Request(
            id=RequestId(i),
            model=ModelName(rng.choice(list(models))),
            prompt=tuple(rng.randrange(120) for _ in range(rng.randint(1, 40))),
            max_tokens=rng.randint(4, 40),
            sampling=Sampling(temperature=rng.choice([0.0, 0.9]), seed=i),
            ignore_eos=True,
        )
        for i in range(24)
    ]
    with Engine(models, unit_spec, make=make, verify=True) as engine:
        unit = UnitRun(engine, turn_s=0.004)
        for request in requests:
            unit.request(request)
        unit.drain()
        free_before = torch.cuda.mem_get_info()[0]
        for request in requests:
            again = RequestId(request.id + 100)
            unit.request(Request(**{**_fields(request), "id": again}))
        unit.drain()
        assert abs(torch.cuda.mem_get_info()[0] - free_before) < 64 << 20
    assert not unit.errors
    assert all(len(unit.tokens[r.id]) == r.max_tokens for r in requests)
    assert sum(isinstance(a, Load) for a in unit.actions) >= 2
    assert sum(isinstance(a, CopyKv) for a in unit.actions) >= 2


def _fields(request: Request) -> dict[str, object]:
    return {name: getattr(request, name) for name in request.__struct_fields__}


def _let_go() -> None:
    """What torch keeps for later: cuBLAS workspaces, 32 MiB for each stream it ever saw, and its
    cache. A process has one executor, so only tests see them pile up."""
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def test_everything_goes_back(models: dict[str, TinyModel], tmp_path: Path) -> None:
    del tmp_path
    torch.cuda.synchronize()
    unit = unit_of(models)
    with Engine(models, unit, make=make) as engine:
        plain_run(engine, "a", PROMPT, 2)
    _let_go()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        with Engine(models, unit, make=make) as engine:
            plain_run(engine, "a", PROMPT, 2)
    _let_go()
    assert abs(torch.cuda.mem_get_info()[0] - before) < 16 << 20
