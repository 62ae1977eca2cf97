"""Run by test_kernels_interpreter.py in a process of its own with TRITON_INTERPRET=1."""

import os
from pathlib import Path

import torch

from support.engine_kit import Engine, plain_run, tiny_adapters, tiny_models, unit_for
from support.fake_device import FakeDevice
from support.unit_kit import UnitRun

assert os.environ.get("TRITON_INTERPRET") == "1"

from weft.attention.triton import TritonAttention  # noqa: E402
from weft.core.actions import Run  # noqa: E402
from weft.core.ids import ModelName, RequestId  # noqa: E402
from weft.core.request import Request  # noqa: E402
from weft.core.unit import UnitSpec  # noqa: E402
from weft.engine.cuda_executor import CudaExecutor  # noqa: E402
from weft.engine.graphs import DecodeGraphs  # noqa: E402
from weft.kernels.lora import TritonLora  # noqa: E402
from weft.models.lora import LoraOps  # noqa: E402


class InterpretedDevice(FakeDevice):
    """Steps of decode rows are filled up as for graphs, launch by launch."""

    def lora(self) -> LoraOps:
        return TritonLora()

    def graphs(self, unit: UnitSpec, *, enabled: bool) -> DecodeGraphs:  # type: ignore[override]
        attention = TritonAttention(num_sms=4)
        cpu = torch.device("cpu")
        return DecodeGraphs(unit, cpu, attention, self.lora(), enabled=False)


def test_filled_up_decode_steps_with_adapters_draw_what_each_row_alone_draws(
    tmp_path: Path,
) -> None:
    models = tiny_models(tmp_path, {"a": {"layers": 1}}, page_tokens=16)
    wanted = {
        "x": {"base": "a", "rank": 20},
        "y": {"base": "a", "rank": 3, "targets": ("q_proj", "down_proj")},
    }
    models |= tiny_adapters(tmp_path, models, wanted)
    names = [None, ModelName("x"), ModelName("y"), ModelName("x"), None]
    requests = [
        Request(
            id=RequestId(i),
            model=ModelName("a"),
            adapter=name,
            prompt=tuple(range(3, 8 + i)),
            max_tokens=5,
            ignore_eos=True,
        )
        for i, name in enumerate(names)
    ]
    unit = unit_for(models)
    with Engine(models, unit, make=CudaExecutor, device=InterpretedDevice(1)) as engine:
        run = UnitRun(engine)
        for request in requests:
            run.request(request)
        run.drain()
    steps = [a for a in run.actions if isinstance(a, Run)]
    filled = [s for s in steps if all(r.num_tokens == 1 for r in s.plan.rows)]
    assert any(len({r.adapter for r in s.plan.rows}) == 3 for s in filled)
    with Engine(models, unit) as engine:
        for request in requests:
            want = plain_run(engine, "a", request.prompt, 5, adapter=request.adapter)
            assert run.tokens[request.id] == list(want), request.adapter


def test_steps_of_fewer_tokens_than_rows_are_filled_up_within_their_buffers(
    tmp_path: Path,
) -> None:
    """engine.max_rows may be more than engine.max_step_tokens."""
    models = tiny_models(tmp_path, {"a": {"layers": 1}}, page_tokens=16)
    requests = [
        Request(
            id=RequestId(i), model=ModelName("a"), prompt=(3 + i,), max_tokens=5, ignore_eos=True
        )
        for i in range(5)
    ]
    unit = unit_for(models, max_rows=8, max_step_tokens=6)
    with Engine(models, unit, make=CudaExecutor, device=InterpretedDevice(1)) as engine:
        run = UnitRun(engine)
        for request in requests:
            run.request(request)
        run.drain()
    with Engine(models, unit) as engine:
        for request in requests:
            want = plain_run(engine, "a", request.prompt, 5)
            assert run.tokens[request.id] == list(want)
