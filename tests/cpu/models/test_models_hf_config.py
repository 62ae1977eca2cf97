"""config.json -> Architecture: what is supported, and refusals that say what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tiny import tiny_checkpoint
from weft.core.errors import WeftError
from weft.core.model import RopeSpec
from weft.models.hf_config import read_eos_ids, read_model_config

LLAMA31: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def write(folder: Path, config: Any, name: str = "config.json") -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / name).write_text(text)
    return folder


def test_llama_31_8b(tmp_path: Path) -> None:
    arch = read_model_config(write(tmp_path, LLAMA31))
    assert (arch.family, arch.head_dim, arch.group_size, arch.dtype) == (
        "llama",
        128,
        4,
        "bfloat16",
    )
    assert arch.kv_bytes_per_token == 131072
    assert arch.rope == RopeSpec(kind="llama3", theta=500000.0, factor=8.0)
    assert read_eos_ids(tmp_path) == (128001, 128008, 128009)


def test_qwen_25_7b(tmp_path: Path) -> None:
    arch = read_model_config(write(tmp_path, QWEN25), dtype="float32")
    assert (arch.family, arch.qkv_bias, arch.dtype) == ("qwen2", True, "float32")
    assert arch.rope.theta == 1e6


def test_v5_spelling_is_the_same_model(tmp_path: Path) -> None:
    old = read_model_config(write(tmp_path, LLAMA31))
    new = dict(LLAMA31)
    parameters = new.pop("rope_scaling") | {"rope_theta": new.pop("rope_theta")}
    new["rope_parameters"], new["dtype"] = parameters, new.pop("torch_dtype")
    assert read_model_config(write(tmp_path, new)) == old


def test_generation_config_names_the_eos(tmp_path: Path) -> None:
    write(tmp_path, LLAMA31)
    write(tmp_path, {"eos_token_id": 7}, "generation_config.json")
    assert read_eos_ids(tmp_path) == (7,)
    write(tmp_path, {}, "generation_config.json")
    assert read_eos_ids(tmp_path) == (128001, 128008, 128009)
    for bad in ("two", [1, -1], [True], {"a": 1}, 1 << 40, [1] * 100):
        write(tmp_path, {"eos_token_id": bad}, "generation_config.json")
        with pytest.raises(WeftError, match="eos_token_id"):
            read_eos_ids(tmp_path)


def test_dtype_of_the_weights_where_config_is_silent(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, dtype="float16")
    config = json.loads((path / "config.json").read_text())
    del config["torch_dtype"]
    write(path, config)
    assert read_model_config(path).dtype == "float16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported; supp"),
        ({"architectures": None}, "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"),
        ({"architectures": [["LlamaForCausalLM"]]}, "not supported"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"mlp_bias": "no"}, "mlp_bias"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act.*silu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "'su'.*default, linear, dynamic"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor.*missing"),
        ({"rope_scaling": {"rope_type": "yarn", "mscale": "x"}}, "mscale"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor.*64 numbers"),
        ({"rope_scaling": {"full_attention": {}}}, "full_attention.*all layers"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "low_freq_factor.*missing"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": 1025}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"num_hidden_layers": [2]}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers.*missing"),
        ({"hidden_size": 1 << 17}, "hidden_size"),
        ({"hidden_size": 4097}, "hidden_size.*divisible"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"head_dim": 63}, "head_dim.*odd"),
        ({"head_dim": -2}, "head_dim"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"vocab_size": "128"}, "vocab_size"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rms_norm_eps": 1e400}, "not JSON|valid JSON"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"torch_dtype": ["float32"]}, "torch_dtype"),
    ],
)
def test_refusals_name_the_key(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(WeftError, match=words) as refusal:
        read_model_config(write(tmp_path, LLAMA31 | change))
    assert "config.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_windows_that_contradict_are_refused_by_name(tmp_path: Path) -> None:
    sliding = {"layer_types": ["sliding_attention"] * 28}
    for change in (
        sliding,
        sliding | {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "layer_types": ["sliding_attention"]},
        {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 28},
        {"use_sliding_window": True, "sliding_window": 0},
    ):
        with pytest.raises(WeftError, match=r"sliding|layer_types"):
            read_model_config(write(tmp_path, QWEN25 | change))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "deeper"),
        ('{"a":' * 100_000, "deeper"),
        # A string without end, full of quotes: to look for the end from each of them takes hours.
        ('{"' + '\\"' * 1_000_000, "not valid JSON"),
        ('{"rms_norm_eps": NaN}', "NaN"),
        ('{"hidden_size": 1, "hidden_size": 2}', "twice"),
        ('{"hidden_size": ' + "9" * 10_000 + "}", "not valid JSON"),
        ('{"a": "' + "x" * (9 << 20) + '"}', "larger than"),
        ('{"a": "\\ud800"}', "architectures"),
        ("\ufeff{}", "not valid JSON"),
    ],
)
def test_hostile_json(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(WeftError, match=words):
        read_model_config(write(tmp_path, text))


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="no such file"):
        read_model_config(tmp_path / "absent")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(WeftError, match="no such file"):
        read_model_config(tmp_path)
    with pytest.raises(WeftError):
        read_model_config(Path("a\0b"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(sorted(LLAMA31 | QWEN25 | {"head_dim": 0, "dtype": 0})), value=JSON)
def test_any_value_of_any_key_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("config")
    for base in (LLAMA31, QWEN25):
        try:
            arch = read_model_config(write(folder, base | {key: value}))
            read_eos_ids(folder)
        except WeftError:
            continue
        assert 1 <= arch.num_layers <= 1024
