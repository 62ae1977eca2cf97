"""How many rows a decode step is filled up to. What the filling computes is tested through Triton's
interpreter (tests/cpu/kernels/interpreted_lora_steps.py)."""

from itertools import pairwise

import pytest

from weft.core.actions import Row, StepPlan
from weft.core.ids import ModelName, RequestId, SlotId
from weft.core.request import Sampling
from weft.core.unit import UnitSpec
from weft.engine.graphs import bucket_of, buckets


def decode(rows: int) -> StepPlan:
    return StepPlan(
        model=ModelName("a"),
        rows=tuple(
            Row(
                request=RequestId(i),
                slot=SlotId(i),
                start=3,
                num_tokens=1,
                input=None,
                sample=Sampling(),
            )
            for i in range(rows)
        ),
    )


@pytest.mark.parametrize("most", [1, 2, 3, 8, 64, 200, 256, 257, 1024])
def test_buckets_begin_with_one_and_end_with_the_most(most: int) -> None:
    sizes = buckets(most)
    assert sizes[0] == 1 and sizes[-1] == most and len(sizes) <= 12
    assert list(sizes) == sorted(set(sizes))
    assert all(b <= 2 * a for a, b in pairwise(sizes)), "filled up by half"


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(8, 64), (8, 6), (64, 24), (1024, 16)])
def test_a_step_is_never_filled_up_beyond_its_buffers(max_rows: int, max_tokens: int) -> None:
    unit = UnitSpec(
        granule_bytes=1,
        num_granules=1,
        host_bytes=0,
        num_slots=1024,
        max_rows=max_rows,
        max_step_tokens=max_tokens,
    )
    for rows in range(1, min(max_rows, max_tokens) + 1):
        bucket = bucket_of(decode(rows), unit)
        assert bucket is not None and rows <= bucket <= min(max_rows, max_tokens)
