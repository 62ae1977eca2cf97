"""What the worker learns about its device."""

import pytest
import torch

from weft.core.errors import WeftError
from weft.engine.device import CPU_GRANULE_BYTES, probe
from weft.memory.limits import memory_limit_bytes


def test_the_cpu_lends_a_quarter_or_what_was_asked() -> None:
    facts = probe("cpu", None)
    assert facts.kind == "cpu" and facts.granule_bytes == CPU_GRANULE_BYTES
    assert 0 <= memory_limit_bytes() // 4 - facts.arena_bytes < CPU_GRANULE_BYTES
    assert probe("cpu", 48 << 20).arena_bytes == 48 << 20
    assert probe("cpu", (48 << 20) + 5).arena_bytes == 48 << 20


@pytest.mark.parametrize("asked", [1 << 60, 1000])
def test_impossible_sizes_name_the_remedy(asked: int) -> None:
    with pytest.raises(WeftError, match="device_memory"):
        probe("cpu", asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_cuda() -> None:
    with pytest.raises(WeftError, match="no CUDA device"):
        probe("cuda", None)
    assert probe("auto", 1 << 20).kind == "cpu"
