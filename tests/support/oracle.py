"""Hugging Face transformers as the oracle of what a checkpoint says."""

from pathlib import Path
from typing import Any

import torch


def oracle(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of the checkpoint, eager attention."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def oracle_logits(model: Any, tokens: list[int], first: int) -> torch.Tensor:
    """Logits after each of the prefixes tokens[:first], tokens[:first + 1], ..., all tokens."""
    return model(torch.tensor([tokens])).logits[0, first - 1 :]


def assert_same_answer(
    ours: list[int], our_logits: torch.Tensor, theirs: torch.Tensor, tolerance: float
) -> None:
    """Logits within rounding, and every token the oracle's where its top two are not that close."""
    spread = float(theirs.std())
    error = float((our_logits - theirs).abs().max())
    assert error < tolerance * spread, f"logits differ by {error}, their spread is {spread}"
    top = theirs.topk(2, dim=-1)
    clear = (top.values[:, 0] - top.values[:, 1]) > 2 * tolerance * spread
    same = top.indices[:, 0] == torch.tensor(ours)
    assert bool((same | ~clear).all())
    assert int(clear.sum()) >= len(ours) - 2, "the oracle itself is hardly ever sure"
