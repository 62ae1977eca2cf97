"""Promise 2 on the CPU: the same step plans give the same bits under heavy disturbances."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from support.engine_kit import Engine, TinyModel, plain_run, row, tiny_models, unit_for
from support.replay_kit import LogitsLog, drive_replay, first_difference, scripted_record
from weft.core.actions import Drop, Run, StepPlan
from weft.core.events import Done, Failed, StepDone
from weft.core.ids import ActionId, ModelName
from weft.core.unit import UnitSpec
from weft.engine.cpu_executor import CpuExecutor
from weft.sim.plan_record import PlanRecorder, RecordedStep
from weft.sim.replay_mover import ReplayError
from weft.sim.replayer import CALM, Disturbances, PlanReplayer

ROOMY = {"num_slots": 16, "max_rows": 8, "max_step_tokens": 128, "depth": 2}


def make(folder: Path, dtype: str) -> dict[str, TinyModel]:
    return tiny_models(
        folder,
        {
            "a": {},
            "b": {"family": "qwen2", "heads": 6, "kv_heads": 1, "head_dim": 24, "hidden": 48},
            "c": {"tied": True, "layers": 3, "rope": "llama3", "kv_heads": 4},
        },
        dtype=dtype,
        page_tokens=8,
    )


def record(models: dict[str, TinyModel], seed: int) -> tuple[tuple[RecordedStep, ...], LogitsLog]:
    log = LogitsLog()
    with Engine(models, unit_for(models, **ROOMY), logits_tap=log) as engine:
        return scripted_record(engine, seed=seed), log


def tight_unit(models: dict[str, TinyModel]) -> UnitSpec:
    """Holds the largest model and a little KV: every change of model is a switch."""
    base = unit_for(models)
    largest = max(-(-m.spec.weight_bytes // base.granule_bytes) for m in models.values())
    return unit_for(models, num_granules=largest + 24, **{**ROOMY, "num_slots": 5, "max_rows": 8})


def replay(
    models: dict[str, TinyModel],
    unit: UnitSpec,
    steps: Sequence[RecordedStep],
    seed: int,
    disturbances: Disturbances | None = None,
) -> tuple[PlanReplayer, LogitsLog]:
    log = LogitsLog()
    specs = [model.spec for model in models.values()]
    with Engine(models, unit, logits_tap=log) as engine:
        replayer = PlanReplayer(unit, specs, steps, seed=seed, disturbances=disturbances)
        drive_replay(engine, replayer)
        executor = engine.executor
        assert isinstance(executor, CpuExecutor) and executor.checksums is not None
        assert executor.checksums.compared > 0
    return replayer, log


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("tight", [False, True])
def test_disturbances_change_no_bit(tmp_path: Path, dtype: str, tight: bool) -> None:
    models = make(tmp_path, dtype)
    steps, wanted = record(models, seed=1)
    unit = tight_unit(models) if tight else unit_for(models, **ROOMY)
    made: Counter[str] = Counter()
    for seed in range(2):
        replayer, log = replay(models, unit, steps, seed)
        assert replayer.mismatches() == []
        assert first_difference(wanted.kept, log.kept) is None
        made.update(replayer.counts)
    # Which are made depends on when actions end, so one replay may lack one of them.
    assert min(made[k] for k in ("park", "resume", "drop", "noise", "unmap", "reslot")) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_disturbances_change_no_bit(tmp_path: Path, dtype: str) -> None:
    models = make(tmp_path, dtype)
    for seed in range(20):
        steps, wanted = record(models, seed=seed)
        for unit in (tight_unit(models), unit_for(models, **ROOMY)):
            replayer, log = replay(models, unit, steps, seed)
            assert replayer.mismatches() == []
            assert first_difference(wanted.kept, log.kept) is None


def test_a_calm_replay_is_the_record_itself(tmp_path: Path) -> None:
    models = make(tmp_path, "float32")
    steps, wanted = record(models, seed=2)
    replayer, log = replay(models, unit_for(models, **ROOMY), steps, 0, CALM)
    assert replayer.mismatches() == [] and first_difference(wanted.kept, log.kept) is None
    assert replayer.counts.keys() <= {"unmap", "drop"}, "only the cleaning up"


def test_a_changed_record_is_noticed(tmp_path: Path) -> None:
    """The replay computes its tokens: a record that lies does not match."""
    models = make(tmp_path, "float32")
    steps, _ = record(models, seed=2)
    at = next(i for i, s in enumerate(steps) if s.tokens[0][0] >= 0)
    lie = tuple((t[0] ^ 1, *t[1:]) for t in steps[at].tokens)
    wrong = [*steps[:at], msgspec.structs.replace(steps[at], tokens=lie), *steps[at + 1 :]]
    replayer, _ = replay(models, unit_for(models, **ROOMY), wrong, 0, CALM)
    assert replayer.mismatches()


def test_iterations_launched_ahead_of_a_stop_are_replayed(tmp_path: Path) -> None:
    """A device may draw beyond a stop id before it knows; the replay splits such a repeat."""
    models = tiny_models(tmp_path, {"a": {}}, page_tokens=8)
    with Engine(models, unit_for(models, **ROOMY)) as engine:
        drawn = plain_run(engine, "a", [5, 6, 7], 6)
    prefill = StepPlan(model=models["a"].spec.name, rows=(row(0, [5, 6, 7]),))
    decode = row(3, None, output_index=1, stop_ids=(drawn[2],))
    ahead = StepPlan(model=prefill.model, rows=(decode,), repeat=9)
    steps = [
        RecordedStep(plan=prefill, tokens=((drawn[0],),)),
        RecordedStep(plan=ahead, tokens=tuple((t,) for t in drawn[1:])),
    ]
    replayer, _ = replay(models, unit_for(models, **ROOMY), steps, 0, CALM)
    assert replayer.mismatches() == []


def test_a_recorder_keeps_finished_steps_only() -> None:
    plan = StepPlan(model=ModelName("a"), rows=(row(0, [1]),), repeat=3)
    recorder = PlanRecorder()
    for i in (1, 2, 3):
        recorder.submitted(Run(id=ActionId(i), plan=plan))
    recorder.submitted(Drop(id=ActionId(4), model=ModelName("a"), granules=()))
    done = StepDone(action=ActionId(3), iterations=1, last=False, tokens=((7,),))
    recorder.ended([done, Failed(action=ActionId(2), cause="x"), Done(action=ActionId(4))])
    recorder.ended([msgspec.structs.replace(done, last=True, tokens=((8,),))])
    assert recorder.record() == (RecordedStep(plan=plan, tokens=((7,), (8,))),)


def test_a_unit_that_is_too_small_is_said_so(tmp_path: Path) -> None:
    models = tiny_models(tmp_path, {"a": {}}, page_tokens=8)
    specs = [models["a"].spec]
    plan = StepPlan(model=specs[0].name, rows=(row(0, [1, 2, 3]),))
    steps = [RecordedStep(plan=plan, tokens=((1,),))]
    with pytest.raises(ReplayError, match="more than the unit has"):
        PlanReplayer(unit_for(models, num_granules=3), specs, steps).handle(())
    failing = PlanReplayer(unit_for(models), specs, steps)
    first = failing.handle(())[0]
    with pytest.raises(ReplayError, match="no memory"):
        failing.handle([Failed(action=first.id, cause="no memory")])
