"""The prefix cache on a GPU: found on the device, and in the host store after a switch."""

from pathlib import Path

import msgspec
import pytest

from support.engine_kit import Engine, tiny_models, unit_for
from support.gpu import needs_gpu
from support.unit_kit import UnitRun
from weft.core.actions import CopyKv, Drop, Run
from weft.core.ids import ModelName, RequestId
from weft.core.request import Request
from weft.engine.base import Executor
from weft.sched.prefix import NO_REQUEST

pytestmark = needs_gpu

GRANULE = 2 << 20
SHAPES = {
    "a": {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 2, "head_dim": 64},
    "b": {"family": "qwen2", "layers": 3, "heads": 6, "kv_heads": 1, "head_dim": 24, "hidden": 288},
}


def make(*args: object, **options: object) -> Executor:
    from weft.engine.cuda_executor import CudaExecutor

    return CudaExecutor(*args, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefix_is_found_before_and_after_a_switch(tmp_path: Path, dtype: str) -> None:
    models = tiny_models(tmp_path, SHAPES, dtype=dtype, page_tokens=16)
    largest = max(-(-m.spec.weight_bytes // GRANULE) for m in models.values())
    unit_spec = unit_for(
        models,
        granule_bytes=GRANULE,
        host_chunk_bytes=1 << 20,
        num_granules=largest + 1,
        parked_bytes=64 << 20,
        max_repeat=4,
    )
    first = Request(
        id=RequestId(0),
        model=ModelName("a"),
        prompt=tuple(5 + i % 100 for i in range(45)),
        max_tokens=20,
        ignore_eos=True,
    )
    again = msgspec.structs.replace(first, id=RequestId(1))
    other = msgspec.structs.replace(first, id=RequestId(2), model=ModelName("b"))
    later = msgspec.structs.replace(first, id=RequestId(3))
    with Engine(models, unit_spec, make=make, verify=True) as engine:
        unit = UnitRun(engine, turn_s=0.004)
        for request in (first, again, other, later):
            unit.request(request)
            unit.drain()
        assert engine.executor.checksums.compared > 0  # type: ignore[attr-defined]
    starts: dict[int, int] = {}
    for action in unit.actions:
        for row in action.plan.rows if isinstance(action, Run) else ():
            starts.setdefault(row.request, row.start)
    assert starts == {0: 0, 1: 32, 2: 0, 3: 32}
    assert any(isinstance(a, Drop) and a.model == "a" for a in unit.actions)
    fetches = [a for a in unit.actions if isinstance(a, CopyKv) and a.to == "device"]
    assert [a.request for a in fetches] == [NO_REQUEST]
    if dtype == "float32":
        assert unit.tokens[again.id] == unit.tokens[later.id] == unit.tokens[first.id]
