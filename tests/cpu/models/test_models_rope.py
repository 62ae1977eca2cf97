"""Rotary tables against transformers' own functions, and what they may not depend on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.oracle import assert_same_answer, oracle, oracle_logits
from support.plain import PlainModel
from support.tiny import ROPES, tiny_checkpoint
from weft.core.errors import WeftError
from weft.core.model import RopeSpec, model_spec
from weft.models.hf_config import read_model_config
from weft.models.rope import rope_tables

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 128,
    "dtype": "float32",
}


def draw_scaling(kind: str, rng: np.random.Generator) -> dict[str, Any]:
    """Parameters of a kind as config.json has them, optional ones there or not."""

    def maybe(key: str, *values: Any) -> dict[str, Any]:
        value = (*values, None)[int(rng.integers(len(values) + 1))]
        return {} if value is None else {key: value}

    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(rng.choice([1.0, 2.0, 7.5]))}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": float(rng.choice([2.0, 4.0]))}
        scaling["original_max_position_embeddings"] = int(rng.choice([64, 512]))
    if kind == "yarn":
        scaling |= maybe("attention_factor", 0.7, 1.3) | maybe("beta_fast", 16, 64.0)
        scaling |= maybe("beta_slow", 0.5, 2) | maybe("truncate", True, False)
        scaling |= maybe("mscale", 1.0, 0.7) | maybe("mscale_all_dim", 0.5, 0.0)
        scaling |= maybe("original_max_position_embeddings", 128, 256)
    if kind == "longrope":
        scaling |= {
            f"{name}_factor": rng.uniform(1, 8, 32).tolist() for name in ("short", "long")
        } | maybe("attention_factor", 1.25)
        scaling |= maybe("original_max_position_embeddings", 128, 256)
        if rng.integers(2):
            del scaling["factor"]
    return scaling


def read(folder: Path, scaling: dict[str, Any], style: str, theta: float, **more: Any) -> RopeSpec:
    config = BASE | more
    if style == "v4":
        config |= {"rope_theta": theta, "rope_scaling": scaling}
    else:
        config |= {"rope_parameters": scaling | {"rope_theta": theta}}
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_config(folder).rope


@pytest.mark.parametrize("kind", sorted(ROPES))
@pytest.mark.parametrize("seed", range(12))
def test_tables_equal_transformers(tmp_path: Path, kind: str, seed: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rng = np.random.default_rng(seed)
    scaling, theta = draw_scaling(kind, rng), float(rng.choice([1e4, 5e5]))
    spec = read(tmp_path, scaling, ("v4", "v5")[seed % 2], theta)
    context = int(rng.choice([100, 1024, 3000]))
    theirs = LlamaConfig(**{k: v for k, v in BASE.items() if k not in ("architectures", "dtype")})
    theirs.rope_parameters = scaling | {"rope_theta": theta}
    theirs.standardize_rope_params()
    init = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    frequency, factor = init(theirs, device=torch.device("cpu"), seq_len=context)
    angle = torch.arange(100)[:, None] * frequency
    cos, sin = rope_tables(spec, 64, 100, dtype=torch.float32, context_tokens=context)
    torch.testing.assert_close(cos, angle.cos() * factor, rtol=0, atol=3e-5)
    torch.testing.assert_close(sin, angle.sin() * factor, rtol=0, atol=3e-5)
    wide = rope_tables(spec, 64, 100, dtype=torch.float64, context_tokens=context)
    torch.testing.assert_close(wide[0].float(), cos, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", sorted(ROPES))
def test_a_tables_length_does_not_decide_what_is_in_it(tmp_path: Path, kind: str) -> None:
    """Two units with more or less memory, one served context: the same K."""
    spec = read(tmp_path, draw_scaling(kind, np.random.default_rng(0)), "v5", 1e4)
    for context in (100, 4000):
        short, long = (
            rope_tables(spec, 64, n, dtype=torch.float32, context_tokens=context) for n in (50, 900)
        )
        assert torch.equal(short[0], long[0][:50])
        assert torch.equal(short[1], long[1][:50])


def test_dynamic_beyond_its_length_is_transformers_at_the_served_context(tmp_path: Path) -> None:
    """transformers' frequencies for a sequence of exactly the served length, fixed from the first
    token on; up to the original length nothing is stretched."""
    path = tiny_checkpoint(tmp_path, rope="dynamic", max_position=64)
    arch = read_model_config(path)
    assert (arch.max_position, arch.longest_context) == (64, 256)
    assert model_spec("m", arch, weight_bytes=1, eos_ids=()).max_context_tokens == 64
    wanted = model_spec("m", arch, weight_bytes=1, eos_ids=(), max_context_tokens=10**6)
    assert wanted.max_context_tokens == 256
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, 128, 150)]
    theirs = oracle_logits(oracle(path), prompt, len(prompt))
    for chunk in (None, 17, 1):
        model = PlainModel(path, dtype="float32", context_tokens=150)
        ours, logits = model.generate(prompt, 1, chunk=chunk)
        assert_same_answer(ours, logits, theirs, tolerance=1e-4)
    other = PlainModel(path, dtype="float32", context_tokens=256).generate(prompt, 1)[1]
    assert float((other - logits).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(("context", "tokens"), [(64, 40), (200, 150)])
def test_longrope_on_both_sides_of_the_original_length(
    tmp_path: Path, family: str, context: int, tokens: int
) -> None:
    path = tiny_checkpoint(tmp_path, family=family, rope="longrope", max_position=200)
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, 128, tokens)]
    theirs = oracle(path)
    for chunk in (None, 13):
        model = PlainModel(path, dtype="float32", context_tokens=context)
        ours, logits = model.generate(prompt, 10, chunk=chunk)
        expected = oracle_logits(theirs, prompt + ours[:-1], tokens)
        assert_same_answer(ours, logits, expected, tolerance=1e-4)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "mrope"}, "mrope.*supported: default, linear"),
        ({"rope_type": ["yarn"]}, "rope_type"),
        ({"rope_type": "yarn", "factor": 1e9}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": -1}, "attention_factor"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate"),
        ({"rope_type": "longrope", "long_factor": [1.0] * 32}, "short_factor"),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [0.0] * 32},
            "long_factor",
        ),
        ({"rope_type": "longrope", "original_max_position_embeddings": 1}, "2 or more"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "whole heads"),
    ],
)
def test_refusals_name_the_key(tmp_path: Path, scaling: dict[str, Any], words: str) -> None:
    for style in ("v4", "v5"):
        with pytest.raises(WeftError, match=words):
            read(tmp_path, scaling, style, 1e4)


def test_edges_are_refused_and_never_divided_by(tmp_path: Path) -> None:
    with pytest.raises(WeftError, match=r"rope_theta.*more than 1"):
        read(tmp_path, {"rope_type": "yarn", "factor": 2.0}, "v4", 1.0)
    with pytest.raises(WeftError, match="more than two"):
        read(tmp_path, {"rope_type": "dynamic", "factor": 2.0}, "v4", 1e4, head_dim=2)


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 4.0}, {}])
def test_of_two_spellings_the_one_transformers_goes_by(
    tmp_path: Path, scaling: dict[str, Any]
) -> None:
    """Both are there where a v4 key was added by hand to what v5 has saved."""
    both = {"rope_scaling": scaling, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    path = tiny_checkpoint(tmp_path, config_extra=both | {"rope_theta": 2e4})
    model = PlainModel(path, dtype="float32")
    prompt = [3, 5, 7, 9, 11, 13]
    ours, logits = model.generate(prompt, 6)
    theirs = oracle_logits(oracle(path), prompt + ours[:-1], len(prompt))
    assert_same_answer(ours, logits, theirs, 2e-4)
