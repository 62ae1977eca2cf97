"""The plain run equals Hugging Face transformers on the same checkpoint (DESIGN.md section 2)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.oracle import assert_same_answer, oracle, oracle_logits
from support.plain import PlainModel, make_batch
from support.tiny import tiny_checkpoint

NEW_TOKENS = 20


def draw_config(seed: int) -> dict[str, Any]:
    """A supported configuration drawn at random, with sizes that divide nothing."""
    rng = np.random.default_rng(seed)

    def pick(*options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    kv_heads = pick(1, 2, 3, 4)
    heads = kv_heads * pick(1, 1, 2, 3, 7)
    head_dim = pick(None, 8, 16, 34)
    hidden = heads * (pick(8, 16) if head_dim is None else pick(5, 9, 12))
    return {
        "family": pick("llama", "qwen2"),
        "layers": pick(1, 2, 3),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate": pick(64, 100, 77, 136),
        "vocab": pick(112, 128, 131, 250),
        "tied": pick(False, True),
        "rope": pick("default", "llama3"),
        "rope_style": pick("v4", "v5"),
        "theta": pick(10000.0, 500000.0),
        "norm_eps": pick(1e-5, 1e-6),
        "shards": pick(1, 1, 2, 3),
        "dtype": pick("float32", "float32", "bfloat16", "float16"),
        "seed": seed,
    }


def check_config(folder: Path, seed: int) -> None:
    config = draw_config(seed)
    path = tiny_checkpoint(folder, **config)
    rng = np.random.default_rng(seed + 1)
    prompt = [int(t) for t in rng.integers(0, config["vocab"], int(rng.integers(2, 90)))]
    model = PlainModel(path, dtype="float32", page_tokens=int(rng.integers(1, 6)))
    theirs = oracle(path)
    for chunk in (None, int(rng.integers(1, 17))):
        ours, logits = model.generate(prompt, NEW_TOKENS, chunk=chunk, seed=seed)
        expected = oracle_logits(theirs, prompt + ours[:-1], len(prompt))
        assert_same_answer(ours, logits, expected, tolerance=1e-4)


@pytest.mark.parametrize("seed", range(14))
def test_plain_run_equals_transformers(tmp_path: Path, seed: int) -> None:
    check_config(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_plain_run_equals_transformers_at_length(tmp_path: Path, seed: int) -> None:
    check_config(tmp_path, seed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_as_good_as_transformers(tmp_path: Path, dtype: str) -> None:
    """In bfloat16 and float16 our error against float64 is no larger than 1.5 times theirs."""
    path = tiny_checkpoint(tmp_path, dtype=dtype, layers=3)
    prompts = np.random.default_rng(0).integers(0, 128, (6, 40))
    low, exact = PlainModel(path), PlainModel(path, dtype="float64")
    theirs = oracle(path, getattr(torch, dtype))
    our_error = their_error = 0.0
    for prompt in prompts.tolist():
        pages = [list(range(10))]
        logits = [m.forward(make_batch([(prompt, 0)], pages))[0].double() for m in (low, exact)]
        expected = oracle_logits(theirs, prompt, len(prompt))[0].double()
        our_error += float((logits[0] - logits[1]).square().mean())
        their_error += float((expected - logits[1]).square().mean())
    assert our_error <= 1.5**2 * their_error


def test_rows_of_a_batch_equal_rows_alone(tmp_path: Path) -> None:
    """Prefill chunks and decode rows in one step, against the same rows in steps of their own."""
    path = tiny_checkpoint(tmp_path, family="qwen2", layers=3)
    model = PlainModel(path, dtype="float64", num_pages=512)
    rng = np.random.default_rng(3)
    starts, counts = [0, 37, 90, 5, 0, 128], [50, 1, 13, 1, 1, 1]
    prompts = [
        [int(t) for t in rng.integers(0, 128, s + n)] for s, n in zip(starts, counts, strict=True)
    ]
    ids = [int(p) for p in rng.permutation(512)]
    pages = [[ids.pop() for _ in range(-(-len(p) // 4))] for p in prompts]
    for prompt, own, start in zip(prompts, pages, starts, strict=True):
        if start:
            model.forward(make_batch([(prompt[:start], 0)], [own]))
    rows = [(p[s:], s) for p, s in zip(prompts, starts, strict=True)]
    together = model.forward(make_batch(rows, pages, sampling_rows=[0, 1, 3, 5]))
    for got, i in zip(together, [0, 1, 3, 5], strict=True):
        alone = model.forward(make_batch([(prompts[i], 0)], [pages[i]]))[0]
        assert float((got - alone).abs().max()) < 1e-11


def test_vocabulary_padding_never_shows(tmp_path: Path) -> None:
    model = PlainModel(tiny_checkpoint(tmp_path, vocab=113))
    logits = model.forward(make_batch([([1, 2, 3], 0)], [[0]]))
    assert logits.shape == (1, 113)
