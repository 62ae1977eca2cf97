"""The canary: a test model's answer depends on all of its context, so that equality on it proves
something. Corrupting any KV page, shifting a position or dropping a token must change a token."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.plain import PlainModel, make_batch
from support.tiny import CLASSES, tiny_checkpoint

NEW_TOKENS = 40
PROMPT_TOKENS = 96
BIASED = {"attention_bias": True, "mlp_bias": True}
LATE_WINDOW = {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1}
QUICK: list[dict[str, Any]] = [
    {"family": "llama"},
    {"family": "llama", "tied": True, "rope": "yarn", "config_extra": BIASED},
    {"family": "qwen2", "tied": True, "layers": 4, "hidden": 96, "heads": 6, "kv_heads": 1},
    {"family": "mistral", "rope": "linear", "config_extra": {"sliding_window": 48}},
    {"family": "qwen3", "rope": "dynamic", "tied": True},
    {"family": "gemma2", "tied": True},
    {"family": "gemma3"},
    {"family": "phi3", "rope": "longrope", "config_extra": {"partial_rotary_factor": 0.5}},
]
"""At least one of every class, with windows shorter than the prompt where it may have them."""
MORE: list[dict[str, Any]] = [
    {"family": "qwen2"},
    {"family": "llama", "tied": True},
    {"family": "llama", "layers": 3, "heads": 4, "kv_heads": 4, "rope": "llama3"},
    {"family": "mistral"},
    {"family": "qwen2", "config_extra": LATE_WINDOW},
    {"family": "gemma2", "config_extra": {"layer_types": ["sliding_attention"] * 2}},
    {"family": "gemma3", "tied": True},
    {"family": "phi3", "config_extra": {"sliding_window": 60}},
]
SHAPES = [*QUICK, *(pytest.param(shape, marks=pytest.mark.slow) for shape in MORE)]


@pytest.fixture(params=SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PlainModel:
    return PlainModel(tiny_checkpoint(tmp_path, seed=9, **request.param), dtype="float64")


def first_seen(model: PlainModel) -> int:
    """The first position of the prompt that the first decoded token sees in some layer."""
    windows = model.arch.windows or (0,)
    return 0 if 0 in windows else PROMPT_TOKENS + 1 - max(windows)


def prompt_of(seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(6, 128, PROMPT_TOKENS)]


def test_answers_do_not_fall_into_a_loop(model: PlainModel) -> None:
    """Many different tokens, few repeats; different prompts, different answers."""
    answers = [model.generate(prompt_of(seed), NEW_TOKENS)[0] for seed in range(4)]
    for answer in answers:
        assert len(set(answer)) >= 12
        assert sum(a == b for a, b in pairwise(answer)) < NEW_TOKENS // 3
    assert len({tuple(answer[:8]) for answer in answers}) == len(answers)


def test_corrupting_any_page_changes_a_token(model: PlainModel) -> None:
    """One page after prefill, sign of its values flipped: no page of the prompt goes unnoticed,
    but those that lie outside the windows of all layers."""
    prompt = prompt_of(0)
    plain, _ = model.generate(prompt, NEW_TOKENS)
    for index in range(PROMPT_TOKENS // model.page_tokens):

        def corrupt(m: PlainModel, pages: list[int], position: int, index: int = index) -> None:
            if position == PROMPT_TOKENS:
                m.kv.pages[pages[index]].neg_()

        changed = model.generate(prompt, NEW_TOKENS, tamper=corrupt)[0] != plain
        seen, first = first_seen(model), index * model.page_tokens
        if first + model.page_tokens <= seen:
            assert not changed, f"page {index}"
        elif not seen or first >= seen + model.page_tokens:  # else: seen by a token or two
            assert changed, f"page {index}"


def test_reading_another_requests_page_changes_a_token(model: PlainModel) -> None:
    """(Swapping two whole pages of one request must not: rotary is in the keys, and a sum does not
    know its order.)"""
    prompt = prompt_of(1)
    plain, _ = model.generate(prompt, NEW_TOKENS)
    used = model.random_pages(PROMPT_TOKENS + NEW_TOKENS, np.random.default_rng(0))
    other = [p for p in range(model.num_pages) if p not in used][: PROMPT_TOKENS // 4]
    model.forward(make_batch([(prompt_of(5), 0)], [other]))
    first = -(-first_seen(model) // model.page_tokens)
    for index in range(first, PROMPT_TOKENS // model.page_tokens, 3):

        def steal(m: PlainModel, pages: list[int], position: int, index: int = index) -> None:
            if position == PROMPT_TOKENS:
                pages[index] = other[index]

        assert model.generate(prompt, NEW_TOKENS, tamper=steal)[0] != plain, f"page {index}"


def test_shifting_positions_changes_a_token(model: PlainModel) -> None:
    """The same decode rows planned one position late: a hole of stale KV, rotary off by one."""
    prompt = prompt_of(2)
    plain, _ = model.generate(prompt, NEW_TOKENS)
    pages = model.random_pages(PROMPT_TOKENS + NEW_TOKENS + 1, np.random.default_rng(0))
    model.kv.pages.fill_(0.0)
    logits = model.forward(make_batch([(prompt, 0)], [pages]))
    out: list[int] = []
    for i in range(NEW_TOKENS):
        out.append(int(logits[0].argmax()))
        logits = model.forward(make_batch([([out[-1]], PROMPT_TOKENS + i + 1)], [pages]))
    assert out != plain


def test_forgetting_one_token_of_the_prompt_changes_a_token(model: PlainModel) -> None:
    prompt = prompt_of(3)
    plain, _ = model.generate(prompt, NEW_TOKENS)
    for index in range(first_seen(model), PROMPT_TOKENS, 11):
        other = [*prompt[:index], (prompt[index] + 1) % 128, *prompt[index + 1 :]]
        assert model.generate(other, NEW_TOKENS)[0] != plain, f"token {index}"


@pytest.mark.parametrize("family", sorted(CLASSES))
def test_answers_do_not_depend_on_pages_chunks_or_page_size(tmp_path: Path, family: str) -> None:
    """And what must not change a token does not."""
    extra = {"sliding_window": 33} if family in ("mistral", "phi3") else {}
    rope = "longrope" if family == "phi3" else "dynamic"
    path = tiny_checkpoint(tmp_path, family=family, layers=3, rope=rope, config_extra=extra)
    prompt = prompt_of(4)
    plain, _ = PlainModel(path, dtype="float64").generate(prompt, NEW_TOKENS)
    for trial, (page_tokens, chunk) in enumerate([(1, 5), (3, 1), (16, 50), (128, None), (4, 31)]):
        model = PlainModel(path, dtype="float64", page_tokens=page_tokens)
        assert model.generate(prompt, NEW_TOKENS, chunk=chunk, seed=trial + 1)[0] == plain
