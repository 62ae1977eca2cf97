"""Promise 2 on the CPU: the same step plans give the same bits under heavy disturbances."""

from pathlib import Path

import pytest

from support.engine_kit import Engine, TinyModel, tiny_models, unit_for
from support.replay_kit import LogitsLog, drive_replay, first_difference, scripted_record
from weft.core.unit import UnitSpec
from weft.sim.plan_record import RecordedStep
from weft.sim.replayer import PlanReplayer

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("tight", [False, True])
def test_disturbances_change_no_bit(tmp_path: Path, dtype: str, tight: bool) -> None:
    models = make(tmp_path, dtype)
    steps, wanted = record(models, seed=1)
    unit = tight_unit(models) if tight else unit_for(models, **ROOMY)
    specs = [model.spec for model in models.values()]
    for seed in range(2):
        log = LogitsLog()
        with Engine(models, unit, logits_tap=log) as engine:
            replayer = PlanReplayer(unit, specs, steps, seed=seed)
            drive_replay(engine, replayer)
            assert engine.executor.checksums.compared > 0
        assert replayer.mismatches() == []
        assert first_difference(wanted.kept, log.kept) is None
        assert min(replayer.counts.get(k, 0) for k in ("park", "resume", "drop", "noise")) >= 3
        assert replayer.counts["unmap"] and replayer.counts["reslot"]
