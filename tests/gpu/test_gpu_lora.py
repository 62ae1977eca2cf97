"""The LoRA kernels on the device against their torch twin, at sizes of real models."""

from functools import partial
from pathlib import Path

import pytest
import torch

from support.engine_kit import Engine, plain_run, tiny_adapters, tiny_models, unit_for
from support.gpu import needs_gpu
from support.kernel_cases import relative_error
from support.lora_cases import mixed_step, random_lora, small_architecture
from support.replay_kit import LogitsLog, drive_replay, first_difference
from support.unit_kit import UnitRun
from weft.core.ids import ModelName, RequestId
from weft.core.request import Request
from weft.engine.base import Executor
from weft.models.adapter import part_sizes
from weft.models.lora import LoraOps, TorchLora, batch_of, plan_lora
from weft.sim.replayer import PlanReplayer

pytestmark = needs_gpu


PARTS = ("qkv", "o", "gate_up", "down")
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def make(*args: object, **options: object) -> Executor:
    from weft.engine.cuda_executor import CudaExecutor

    return CudaExecutor(*args, **options)  # type: ignore[arg-type]


def triton_lora() -> LoraOps:
    from weft.kernels.lora import TritonLora

    return TritonLora()


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_small_odd_sizes(dtype: torch.dtype, part: str) -> None:
    counts, owners = (3, 1, 17, 33, 2), (None, 0, 1, 2, 0)
    step = mixed_step(dtype, part, counts=counts, owners=owners, device="cuda")
    ours, twin = step.y.clone(), step.y.clone()
    TorchLora().add(twin, step.x, step.batch, 1, part)
    triton_lora().add(ours, step.x, step.batch, 1, part)
    assert relative_error(ours, twin) < LIMITS[dtype]


@pytest.mark.parametrize("part", PARTS)
def test_many_adapters_decode_and_a_token_does_not_feel_the_others(part: str) -> None:
    """64 decode rows of 16 adapters on a model of 4096 x 11008, then each row alone: bit by bit."""
    arch = small_architecture(torch.bfloat16, hidden=4096, inner=11008)
    ranks = ((48, 16, 32, 16), (96, 32, 64, 32))
    adapters = [random_lora(arch, ranks, i, "cuda") for i in range(16)]
    outputs, inputs = part_sizes(arch, part)
    x = torch.randn(64, inputs, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(64, outputs, device="cuda", dtype=torch.bfloat16)
    owners = [adapters[i % 16] for i in range(64)]
    ours, twin = y.clone(), y.clone()
    batch = batch_of(plan_lora([(owner, 1) for owner in owners]), TorchLora(), "cuda")
    triton_lora().add(ours, x, batch, 1, part)
    TorchLora().add(twin, x, batch, 1, part)
    assert relative_error(ours, twin) < LIMITS[torch.bfloat16]
    for i in (0, 17, 63):
        alone = batch_of(plan_lora([(owners[i], 1)]), TorchLora(), "cuda")
        row = y[i : i + 1].clone()
        triton_lora().add(row, x[i : i + 1], alone, 1, part)
        assert torch.equal(row[0], ours[i])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_graphs_with_adapters_are_the_same_bits_as_launches(
    tmp_path: Path, dtype: str
) -> None:
    """The plan log of several requests on one base, with three adapters and without, replayed under
    disturbances by graphs and launch by launch."""
    shapes = {"a": {"layers": 2, "hidden": 256, "heads": 8, "kv_heads": 2, "head_dim": 64}}
    models = tiny_models(tmp_path, shapes, dtype=dtype, page_tokens=16)
    wanted = {f"x{i}": {"base": "a", "rank": 4 + 13 * i} for i in range(3)}
    models |= tiny_adapters(tmp_path, models, wanted)
    names = [None, *map(ModelName, wanted), ModelName("x1"), None]
    requests = [
        Request(
            id=RequestId(i),
            model=ModelName("a"),
            adapter=name,
            prompt=tuple(range(3, 20 + i)),
            max_tokens=40,
            ignore_eos=True,
        )
        for i, name in enumerate(names)
    ]
    unit = unit_for(
        models,
        granule_bytes=2 << 20,
        host_chunk_bytes=1 << 20,
        kv_tokens=8192,
        num_slots=12,
        parked_bytes=64 << 20,
    )
    taken = LogitsLog()
    with Engine(models, unit, make=partial(make, graphs=True), logits_tap=taken) as engine:
        run = UnitRun(engine)
        for request in requests:
            run.request(request)
        run.drain()
        assert engine.executor.graph_kinds() > 0  # type: ignore[attr-defined]
    steps = run.recorder.record()
    assert any(len({row.adapter for row in step.plan.rows}) == 4 for step in steps)
    for graphs in (True, False):
        log = LogitsLog()
        options = {"make": partial(make, graphs=graphs), "logits_tap": log, "verify": True}
        with Engine(models, unit, **options) as engine:
            replayer = PlanReplayer(unit, [m.spec for m in models.values()], steps, seed=1)
            drive_replay(engine, replayer)
        assert replayer.mismatches() == []
        assert first_difference(taken.kept, log.kept) is None


@pytest.mark.parametrize("graphs", [False, True])
def test_an_adapter_on_the_device_is_the_one_on_the_cpu(tmp_path: Path, graphs: bool) -> None:
    """In float32, token by token."""
    models = tiny_models(tmp_path, {"a": {}}, page_tokens=16)
    models |= tiny_adapters(tmp_path, models, {"x": {"base": "a", "rank": 20}})
    prompt = [17, 80, 33, 5, 99, 64, 21, 40, 71]
    with Engine(models, unit_for(models)) as engine:
        wanted = [plain_run(engine, "a", prompt, 16, adapter=name) for name in (None, "x")]
    unit = unit_for(models, granule_bytes=2 << 20, host_chunk_bytes=1 << 20)
    with Engine(models, unit, make=partial(make, graphs=graphs), verify=True) as engine:
        drawn = [plain_run(engine, "a", prompt, 16, adapter=name) for name in (None, "x")]
    assert drawn == wanted and wanted[0] != wanted[1]
