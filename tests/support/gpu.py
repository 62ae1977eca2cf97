"""Marks for tests that need a CUDA device, with the reason why they are skipped."""

import importlib.util
from dataclasses import fields, replace

import pytest
import torch

from weft.attention.base import ForwardBatch


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    for name in ("triton", "cuda"):
        if importlib.util.find_spec(name) is None:
            return f"the package {name} is missing"
    return None


needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or "a CUDA device is there"),
]


def to_cuda(batch: ForwardBatch) -> ForwardBatch:
    """The same step with its tensors on the device."""
    moved = {
        f.name: value.to("cuda")
        for f in fields(batch)
        if isinstance(value := getattr(batch, f.name), torch.Tensor)
    }
    return replace(batch, **moved)
