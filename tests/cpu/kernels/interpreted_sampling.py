"""Run by test_kernels_interpreter.py in a process of its own with TRITON_INTERPRET=1."""

import os

import numpy as np
import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1"

from weft.core.actions import Row  # noqa: E402
from weft.core.ids import RequestId, SlotId  # noqa: E402
from weft.core.request import Sampling  # noqa: E402
from weft.engine.sampler import SamplingBatch, sample  # noqa: E402
from weft.kernels import sampling  # noqa: E402


def batch_of(temperatures: list[float], seed: int) -> SamplingBatch:
    rows = [
        Row(
            request=RequestId(i),
            slot=SlotId(i),
            start=0,
            num_tokens=1,
            input=None,
            sample=Sampling(temperature=t, seed=seed * 1000 + i - 5),
            output_index=7 * i,
        )
        for i, t in enumerate(temperatures)
    ]
    return SamplingBatch.from_rows(rows)


def draw(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    with np.errstate(over="ignore", invalid="ignore"):
        return sampling.draw(logits, batch.temperature, batch.seed, batch.output_index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [50, 5000])
def test_draws_what_the_twin_draws(
    dtype: torch.dtype, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "BLOCK_V", 1024)
    gen = torch.Generator().manual_seed(vocab)
    wide = (3 * torch.randn(8, vocab + 3, generator=gen)).to(dtype)
    logits = wide[:, :vocab]
    logits[1, 3] = float("nan")
    for seed in range(6):
        batch = batch_of([0.0, 1.0, 0.6, 1.5, 0.0, 0.01, 1.0, 3.0], seed)
        assert torch.equal(draw(logits, batch), sample(logits, batch))


def test_ties_go_to_the_lowest_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK_V", 16)
    logits = torch.zeros(2, 70)
    logits[0, 20:] = 1.0
    logits[1] = float("-inf")
    batch = batch_of([0.0, 0.0], 1)
    assert draw(logits, batch).tolist() == [20, 0]
    assert sample(logits, batch).tolist() == [20, 0]
