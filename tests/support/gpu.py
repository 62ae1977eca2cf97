"""Marks for tests that need a CUDA device, with the reason why they are skipped."""

import importlib.util

import pytest
import torch


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
