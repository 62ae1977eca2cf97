"""In float64 nothing is float32: the decoder against a dense forward pass in numpy's float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.dense import DenseModel
from support.plain import PlainModel
from support.tiny import ROPES, tiny_checkpoint

NEW_TOKENS = 12


def check_dense(path: Path) -> None:
    model = PlainModel(path, dtype="float64")
    dense = DenseModel(path, model.arch)
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, 128, 60)]
    for chunk in (None, 7):
        tokens, logits = model.generate(prompt, NEW_TOKENS, chunk=chunk, seed=chunk or 0)
        expected = dense.logits(prompt + tokens[:-1])[len(prompt) - 1 :]
        assert np.abs(logits.numpy() - expected).max() < 1e-10
        assert tokens == expected.argmax(-1).tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("rope", sorted(ROPES))
@pytest.mark.parametrize("tied", [False, True])
def test_float64_is_float64_everywhere(tmp_path: Path, family: str, rope: str, tied: bool) -> None:
    check_dense(tiny_checkpoint(tmp_path, family=family, rope=rope, tied=tied, heads=6, hidden=48))


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 24}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3", {}),
        ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 31}),
    ],
)
def test_float64_of_every_class(tmp_path: Path, family: str, extra: dict[str, Any]) -> None:
    check_dense(tiny_checkpoint(tmp_path, family=family, config_extra=extra))
