"""Published configurations of every class, and what each class refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.tiny import CLASSES, tiny_checkpoint
from weft.core.errors import WeftError
from weft.core.model import Architecture, RopeSpec
from weft.models.hf_config import read_model_config

MISTRAL_7B_V01: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA2_9B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}
GEMMA3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
PHI3_128K: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0 + i for i in range(48)],
        "short_factor": [1.0] * 48,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}


def read(folder: Path, config: dict[str, Any]) -> Architecture:
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_config(folder)


def test_mistral_7b(tmp_path: Path) -> None:
    arch = read(tmp_path, MISTRAL_7B_V01)
    assert arch.windows == (4096,) * 32
    assert read(tmp_path, MISTRAL_7B_V01 | {"sliding_window": None}).windows == ()
    silent = {k: v for k, v in MISTRAL_7B_V01.items() if k != "sliding_window"}
    assert read(tmp_path, silent).windows == (4096,) * 32, "transformers' default"


def test_qwen3_8b(tmp_path: Path) -> None:
    arch = read(tmp_path, QWEN3_8B)
    assert (arch.qk_norm, arch.qkv_bias, arch.windows, arch.rope.theta) == (True, False, (), 1e6)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = read(tmp_path, QWEN3_8B | {"rope_scaling": yarn}).rope
    assert (rope.kind, rope.factor, rope.original_max_position) == ("yarn", 4.0, 32768)
    assert rope.attention_factor == pytest.approx(1.1386294)
    window = {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 30}
    assert read(tmp_path, QWEN3_8B | window).windows == (0,) * 30 + (1024,) * 6


def test_gemma2_9b(tmp_path: Path) -> None:
    arch = read(tmp_path, GEMMA2_9B)
    assert arch.windows == (4096, 0) * 21
    assert (arch.attention_cap, arch.logit_cap, arch.attention_scale) == (50.0, 30.0, 1 / 16)
    assert (arch.branch_norms, arch.norm_offset, arch.tied_embeddings) == (True, 1.0, True)
    assert (arch.activation, arch.embed_scale) == ("gelu_tanh", 3584**0.5)
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    bare = read(tmp_path, GEMMA2_9B | caps)
    assert (bare.attention_cap, bare.logit_cap) == (None, None)


def test_gemma3_1b_in_both_spellings(tmp_path: Path) -> None:
    arch = read(tmp_path, GEMMA3_1B)
    assert arch.windows == ((512,) * 5 + (0,)) * 4 + (512, 512)
    assert (arch.rope, arch.local_rope) == (RopeSpec(theta=1e6), RopeSpec(theta=1e4))
    assert (arch.qk_norm, arch.attention_cap, arch.logit_cap) == (True, None, None)
    gone = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
    new = {k: v for k, v in GEMMA3_1B.items() if k not in gone}
    kinds = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(26)]
    ropes = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
    }
    assert read(tmp_path, new | {"layer_types": kinds, "rope_parameters": ropes}) == arch
    scaled = read(tmp_path, GEMMA3_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert scaled.rope == RopeSpec(kind="linear", factor=8.0, theta=1e6)
    assert scaled.local_rope == RopeSpec(theta=1e4)


def test_phi3_128k(tmp_path: Path) -> None:
    arch = read(tmp_path, PHI3_128K)
    assert (arch.rope.kind, arch.rope.original_max_position) == ("longrope", 4096)
    assert arch.rope.attention_factor == pytest.approx(1.1902380714)
    assert arch.windows == (262144,) * 32
    su = PHI3_128K["rope_scaling"] | {"type": "su"}
    assert read(tmp_path, PHI3_128K | {"rope_scaling": su}).rope == arch.rope
    part = {k: v[:36] for k, v in su.items() if k != "type"} | {"type": "longrope"}
    half = read(tmp_path, PHI3_128K | {"rope_scaling": part, "partial_rotary_factor": 0.75})
    assert half.rope.rotary_dim == 72


@pytest.mark.parametrize("style", ["v4", "v5"])
@pytest.mark.parametrize("family", sorted(CLASSES))
def test_what_transformers_saves_again_is_the_same_model(
    tmp_path: Path, family: str, style: str
) -> None:
    """Its own v5 spelling, with every default written out."""
    import transformers

    rope = "longrope" if family == "phi3" else "yarn"
    path = tiny_checkpoint(tmp_path / "ours", family=family, rope=rope, rope_style=style, layers=3)
    config = transformers.AutoConfig.from_pretrained(path)
    config.save_pretrained(tmp_path / "theirs")
    assert read_model_config(tmp_path / "theirs") == read_model_config(path)


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (MISTRAL_7B_V01, {"layer_types": ["full_attention"] * 32}, "same attention in all"),
        (MISTRAL_7B_V01, {"attention_bias": True}, "attention_bias"),
        (MISTRAL_7B_V01, {"sliding_window": 0}, "sliding_window"),
        (MISTRAL_7B_V01, {"sliding_window": "4096"}, "sliding_window"),
        (QWEN3_8B, {"layer_types": ["sliding_attention"] * 36}, "sliding_window.*missing"),
        (QWEN3_8B, {"hidden_act": "relu"}, "relu.*supported: silu"),
        (GEMMA2_9B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA2_9B, {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
        (GEMMA2_9B, {"attn_logit_softcapping": "x"}, "attn_logit_softcapping"),
        (GEMMA2_9B, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        (GEMMA2_9B, {"sliding_window": None}, "sliding_window.*missing"),
        (GEMMA2_9B, {"hidden_activation": "gelu"}, "hidden_activation"),
        (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3_1B, {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        (GEMMA3_1B, {"rope_parameters": {"rope_theta": 1e6}}, "full_attention and sliding"),
        (GEMMA3_1B, {"rope_local_base_freq": -1}, "rope_local_base_freq"),
        (PHI3_128K, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "default, longrope"),
        (PHI3_128K, {"partial_rotary_factor": 0.52}, "not even"),
        (PHI3_128K, {"partial_rotary_factor": 0.0}, "not even"),
        (PHI3_128K, {"partial_rotary_factor": 0.5}, "24 numbers"),
    ],
)
def test_refusals_name_the_key(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(WeftError, match=words) as refusal:
        read(tmp_path, base | change)
    assert "config.json" in str(refusal.value)
