"""The runner by itself: staging that grows, buffers in use, seeds of any size, page tables."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from support.engine_kit import row, tiny_models, unit_for
from support.plain import PlainModel, packed_weights
from weft.attention.reference import ReferenceAttention
from weft.core.actions import Row, StepPlan
from weft.core.request import Sampling
from weft.core.unit import UnitSpec
from weft.engine.base import ImageRef
from weft.engine.model import BoundModel, bind_model, kv_range_bytes
from weft.engine.plan_check import check_plan
from weft.engine.runner import Runner
from weft.memory.arena_cpu import CpuArena

Make = Callable[..., tuple[Runner, BoundModel]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def make(folder: Path) -> Make:
    """A runner and its model "a", weights and all granules for KV mapped."""

    def build(**fields: int) -> tuple[Runner, BoundModel]:
        models = tiny_models(folder, {"a": {}}, dtype="float64")
        model = models["a"]
        unit: UnitSpec = unit_for(models, kv_tokens=8 * 512, **fields)
        arena = CpuArena(unit.granule_bytes, unit.num_granules, poison=True)
        size = model.spec.weight_bytes
        image = ImageRef(key="a", offset=0, num_bytes=size)
        bound = bind_model(arena, unit, model.spec, model.arch, image)
        weights = range(-(-size // unit.granule_bytes))
        arena.map("a", "weights", weights, weights)
        bound.weights_bytes[:size] = packed_weights(model.path, model.arch)
        rest = range(unit.num_granules - len(weights))
        arena.map("a", "kv", rest, [len(weights) + i for i in rest])
        last_token = torch.zeros(unit.num_slots, dtype=torch.int64)
        runner = Runner(unit, torch.device("cpu"), ReferenceAttention(), last_token)
        return runner, bound

    return build


def run(runner: Runner, model: BoundModel, rows: list[Row], repeat: int = 1) -> list[list[int]]:
    step = runner.prepare(model, StepPlan(model=model.spec.name, rows=tuple(rows), repeat=repeat))
    for _ in range(repeat):
        runner.iterate(step)
    drawn = [list(step.tokens(i)) for i in range(repeat)]
    step.release()
    return drawn


def test_page_tables_of_the_longest_context_for_every_row(make: Make, folder: Path) -> None:
    """More entries than the staging begins with; every slot keeps its own."""
    runner, model = make(max_rows=8, num_slots=8)
    prompts = [[i + 1, 40, 30 + i, 9] for i in range(8)]
    pages = [list(range(i * 128, (i + 1) * 128))[::-1] for i in range(8)]
    rows = [row(0, p, request=i, slot=7 - i, pages=pages[i]) for i, p in enumerate(prompts)]
    drawn = run(runner, model, rows)
    drawn += run(runner, model, [row(4, None, request=i, slot=7 - i) for i in range(8)], repeat=6)
    assert model.page_table[7 - 3].tolist() == pages[3]
    plain = PlainModel(folder / "a", "float64")
    for i, prompt in enumerate(prompts):
        assert [tokens[i] for tokens in drawn] == plain.generate(prompt, 7)[0]


def test_tables_are_no_longer_than_the_arena_can_hold(make: Make, folder: Path) -> None:
    """A context of a million tokens in config.json costs what this device can make of it."""
    runner, model = make()
    boast = 1 << 20
    arch = msgspec.structs.replace(model.arch, max_position=boast)
    spec = msgspec.structs.replace(model.spec, max_context_tokens=boast)
    arena = CpuArena(runner._unit.granule_bytes, runner._unit.num_granules)
    bound = bind_model(arena, runner._unit, spec, arch, model.image)
    pages = bound.kv.pages.shape[0]
    assert bound.page_table.shape[1] == pages
    assert bound.decoder._ropes[0][0].shape[0] == pages * spec.page_tokens
    last = pages * spec.page_tokens
    check_plan(StepPlan(model=spec.name, rows=(row(last - 1, [1]),)), bound, runner._unit)
    with pytest.raises(ValueError, match=f"position {last + 1} is beyond {last}"):
        check_plan(StepPlan(model=spec.name, rows=(row(last, [1]),)), bound, runner._unit)


@pytest.mark.parametrize("seed", [0, -1, (1 << 63) + 5, (1 << 64) - 1, -(1 << 63), 1 << 70])
def test_seeds_of_any_size(make: Make, folder: Path, seed: int) -> None:
    runner, model = make()
    sampling = Sampling(temperature=1.0, seed=seed)
    drawn = run(runner, model, [row(0, [3, 4, 5], sample=sampling, pages=[6, 3, 1])])
    decode = row(3, None, sample=sampling, output_index=1)
    drawn += run(runner, model, [decode], repeat=5)
    want, _ = PlainModel(folder / "a", "float64").generate([3, 4, 5], 6, sampling=sampling)
    assert [tokens[0] for tokens in drawn] == want


def test_stop_ids_of_many_lengths_are_masked_each_for_its_row(make: Make) -> None:
    runner, model = make(max_rows=8)
    free = run(runner, model, [row(0, [9, 8, 7], pages=[0])])[0][0]
    rows = [
        row(0, [9, 8, 7], request=0, slot=0, pages=[0], stop_ids=(free,), min_remaining=1),
        row(0, [9, 8, 7], request=1, slot=1, pages=[1]),
        row(
            0,
            [9, 8, 7],
            request=2,
            slot=2,
            pages=[2],
            stop_ids=tuple(t for t in range(128) if t != 77),
            min_remaining=1,
        ),
        row(0, [9, 8, 7], request=3, slot=3, pages=[3], stop_ids=(free,)),
        row(0, [9, 8], request=4, slot=4, pages=[4], sample=None),
    ]
    first, second, third, fourth, fifth = run(runner, model, rows)[0]
    assert first != free and second == fourth == free and third == 77 and fifth == -1


def test_buffers_in_use_are_never_written(make: Make) -> None:
    runner, model = make(depth=1)
    plan = StepPlan(model=model.spec.name, rows=(row(0, [3, 4, 5], pages=[0]),))
    steps = [runner.prepare(model, plan), runner.prepare(model, plan)]
    with pytest.raises(RuntimeError, match="in flight"):
        runner.prepare(model, plan)
    for step in steps:
        runner.iterate(step)
    assert steps[0].tokens(0) == steps[1].tokens(0)
    steps[1].release()
    again = runner.prepare(model, plan)
    runner.iterate(again)
    assert again.tokens(0) == steps[0].tokens(0)


def test_a_plan_that_is_refused_holds_no_buffer(make: Make) -> None:
    runner, model = make(depth=1, max_repeat=4)
    wrong = StepPlan(model=model.spec.name, rows=(row(0, [3]),), repeat=5)
    for _ in range(4):
        with pytest.raises(ValueError, match="max_repeat"):
            runner.prepare(model, wrong)
    assert run(runner, model, [row(0, [3, 4, 5], pages=[0])])


def test_every_model_may_have_the_whole_arena() -> None:
    unit = UnitSpec(granule_bytes=4096, num_granules=7, host_bytes=0)
    assert kv_range_bytes(unit) == 7 * 4096
