"""The real scheduler over the CUDA executor on a stand-in device: every stream equals its plain
run (which is the CPU executor's), and a plan log replays bitwise."""

from pathlib import Path
from random import Random

import pytest
import test_engine_unit as on_cpu

from support.engine_kit import Engine, tiny_models, unit_for
from support.fake_device import FakeDevice
from support.replay_kit import LogitsLog, drive_replay, first_difference
from weft.core.actions import CopyKv, Load
from weft.core.ids import RequestId
from weft.engine.cuda_executor import CudaExecutor
from weft.sim.replayer import PlanReplayer


@pytest.mark.parametrize(("depth", "seed"), [(1, 0), (2, 1), (2, 2)])
def test_every_stream_equals_its_plain_run(tmp_path: Path, depth: int, seed: int) -> None:
    models = tiny_models(tmp_path, on_cpu.MODELS, dtype="float64", page_tokens=8)
    rng = Random(seed)
    requests = [on_cpu.random_request(i, models, rng) for i in range(24)]
    cancelled: set[RequestId] = set()
    device = FakeDevice(seed)
    unit_spec = on_cpu.tight(models, depth=depth)
    with Engine(
        models, unit_spec, make=CudaExecutor, device=device, verify=True, threads=1
    ) as engine:
        unit = on_cpu.run_all(engine, requests, rng, cancelled)
    on_cpu.check_streams(unit, models, requests)
    assert not unit.errors
    assert sum(isinstance(a, Load) for a in unit.actions) >= 5, "models were switched"
    assert sum(isinstance(a, CopyKv) and a.to == "device" for a in unit.actions) >= 2


def test_a_plan_log_replays_bitwise_under_disturbance(tmp_path: Path) -> None:
    models = tiny_models(tmp_path, on_cpu.MODELS, dtype="float32", page_tokens=8)
    rng = Random(5)
    requests = [on_cpu.random_request(i, models, rng) for i in range(12)]
    wanted, log = LogitsLog(), LogitsLog()
    with Engine(models, on_cpu.tight(models), logits_tap=wanted, threads=1) as engine:
        steps = on_cpu.run_all(engine, requests, rng, set()).recorder.record()
    unit = unit_for(models, num_slots=12, parked_bytes=16 << 20)
    options = {"device": FakeDevice(3), "verify": True, "logits_tap": log}
    with Engine(models, unit, make=CudaExecutor, **options) as engine:
        replayer = PlanReplayer(unit, [m.spec for m in models.values()], steps, seed=1)
        drive_replay(engine, replayer)
    assert replayer.mismatches() == []
    assert first_difference(wanted.kept, log.kept) is None
