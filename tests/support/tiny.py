"""Tiny checkpoints in Hugging Face layout whose answers depend on all of their context.

No transformers here. The weights are random but scaled so that attention matters: at the usual
init a tiny model barely looks at its cache, and equality on it would prove nothing. How much it
matters is measured in tests/cpu/models/test_models_canary.py.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

SPECIALS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
BOS_ID, EOS_ID, END_ID = 1, 2, 5
SAFETENSORS_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
ROPES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 64},
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
FAMILY_CONFIG: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "gemma2": {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "attn_logit_softcapping": 8.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 1000.0,
    },
    "phi3": {"pad_token_id": 0},
}
"""What a family's config.json says beyond the common keys."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}"
    "{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_checkpoint(
    folder: Path,
    *,
    family: str = "llama",
    seed: int = 0,
    dtype: str = "float32",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate: int = 128,
    vocab: int = 128,
    tied: bool = False,
    rope: str = "default",
    rope_style: str = "v4",
    theta: float = 10000.0,
    max_position: int = 512,
    shards: int = 1,
    tokenizer: bool = True,
    eos: int | list[int] = EOS_ID,
    norm_eps: float = 1e-5,
    config_extra: dict[str, Any] | None = None,
) -> Path:
    """Write a model into `folder` (made if absent) and return it.

    family: a key of CLASSES. rope: a key of ROPES. rope_style "v4" writes rope_theta and
    rope_scaling, "v5" rope_parameters. head_dim None is hidden // heads and leaves the key out of
    config.json where the class has the same default. config_extra outranks everything; the tensors
    follow its biases.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    gemma = family.startswith("gemma")
    config: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_position,
        "rms_norm_eps": norm_eps,
        "tie_word_embeddings": tied,
        "bos_token_id": BOS_ID,
        "eos_token_id": eos,
        "torch_dtype" if rope_style == "v4" else "dtype": dtype,
    }
    if head_dim is not None or family == "qwen3" or gemma:
        config["head_dim"] = head_dim or hidden // heads
    config |= FAMILY_CONFIG.get(family, {}) | (config_extra or {})
    size = head_dim or hidden // heads
    config |= _rope_config(family, rope, rope_style, theta, size, config)
    _write_json(folder / "config.json", config | (config_extra or {}))
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": eos, "do_sample": False},
    )
    tensors = random_tensors(
        np.random.default_rng(seed),
        qkv_bias=family == "qwen2" or bool(config.get("attention_bias")),
        o_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
        qk_norm=family in ("qwen3", "gemma3"),
        gemma=gemma,
        fused=family == "phi3",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        intermediate=intermediate,
        vocab=vocab,
        tied=tied,
    )
    write_safetensors_model(folder, tensors, dtype=dtype, shards=shards)
    if tokenizer:
        write_tokenizer(folder, vocab)
    return folder


def _rope_config(
    family: str, rope: str, style: str, theta: float, head_dim: int, config: dict[str, Any]
) -> dict[str, Any]:
    """The keys of a rotary embedding in one of the two spellings."""
    scaling = ROPES[rope]
    if rope == "longrope":
        pairs = int(head_dim * config.get("partial_rotary_factor", 1.0)) // 2
        scaling = {
            **(scaling or {}),
            "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
            "long_factor": [1.5 + 0.5 * i for i in range(pairs)],
        }
        if family == "phi3":
            config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    if style == "v4":
        return {"rope_theta": theta, "rope_scaling": scaling}
    parameters = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    if family == "phi3":
        parameters["partial_rotary_factor"] = config.get("partial_rotary_factor", 1.0)
    if family != "gemma3":
        return {"rope_parameters": parameters}
    local = {"rope_type": "default", "rope_theta": config.pop("rope_local_base_freq")}
    return {"rope_parameters": {"full_attention": parameters, "sliding_attention": local}}


def random_tensors(
    rng: np.random.Generator,
    *,
    qkv_bias: bool,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    tied: bool,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    gemma: bool = False,
    fused: bool = False,
) -> dict[str, np.ndarray]:
    """Float32 weights under Hugging Face names. Normed inputs have unit variance, so a matrix of
    std s / sqrt(in) gives outputs of std s.

    gemma: norms around the branches too, all as weight + 1, embeddings that are scaled up.
    fused: one matrix for Q, K and V, one for gate and up (Phi-3).
    """
    one = 0.0 if gemma else 1.0

    def matrix(rows: int, columns: int, std: float) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * (std / columns**0.5)).astype(np.float32)

    def vector(size: int, mean: float, std: float) -> np.ndarray:
        return (mean + std * rng.standard_normal(size)).astype(np.float32)

    # Scores get a std of 2 * 2 = 4: sharp, else attention over a long context averages to nothing
    # and the answer falls into a loop. Branches outweigh the embedding, else a tied model repeats
    # its last token.
    spread = 0.1 if gemma else hidden**0.5 * 0.3
    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden, spread)}
    for i in range(layers):
        name = f"model.layers.{i}"
        for part, out in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            std = 3.0 if part == "v" else 2.0
            tensors[f"{name}.self_attn.{part}_proj.weight"] = matrix(out * head_dim, hidden, std)
            if qkv_bias:
                tensors[f"{name}.self_attn.{part}_proj.bias"] = vector(out * head_dim, 0.0, 0.5)
        tensors[f"{name}.self_attn.o_proj.weight"] = matrix(hidden, heads * head_dim, 3.0)
        tensors[f"{name}.mlp.gate_proj.weight"] = matrix(intermediate, hidden, 1.5)
        tensors[f"{name}.mlp.up_proj.weight"] = matrix(intermediate, hidden, 1.5)
        tensors[f"{name}.mlp.down_proj.weight"] = matrix(hidden, intermediate, 1.5)
        tensors[f"{name}.input_layernorm.weight"] = vector(hidden, one, 0.1)
        tensors[f"{name}.post_attention_layernorm.weight"] = vector(hidden, one, 0.1)
        if gemma:
            tensors[f"{name}.pre_feedforward_layernorm.weight"] = vector(hidden, one, 0.1)
            tensors[f"{name}.post_feedforward_layernorm.weight"] = vector(hidden, one, 0.1)
        if qk_norm:
            for part in "qk":
                weight = vector(head_dim, one + 1.0, 0.1)
                tensors[f"{name}.self_attn.{part}_norm.weight"] = weight
        if o_bias:
            tensors[f"{name}.self_attn.o_proj.bias"] = vector(hidden, 0.0, 0.5)
        if mlp_bias:
            for part, size in (("gate", intermediate), ("up", intermediate), ("down", hidden)):
                tensors[f"{name}.mlp.{part}_proj.bias"] = vector(size, 0.0, 0.5)
        if fused:
            _fuse(tensors, f"{name}.self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj")
            _fuse(tensors, f"{name}.mlp", ("gate_proj", "up_proj"), "gate_up_proj")
    tensors["model.norm.weight"] = vector(hidden, one, 0.1)
    if not tied:
        tensors["lm_head.weight"] = matrix(vocab, hidden, 3.0)
    return tensors


def _fuse(tensors: dict[str, np.ndarray], name: str, parts: tuple[str, ...], fused: str) -> None:
    rows = [tensors.pop(f"{name}.{part}.weight") for part in parts]
    tensors[f"{name}.{fused}.weight"] = np.concatenate(rows)


def write_safetensors_model(
    folder: Path, tensors: dict[str, np.ndarray], *, dtype: str = "float32", shards: int = 1
) -> None:
    """model.safetensors, or `shards` files and model.safetensors.index.json."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype=dtype)
        return
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        write_safetensors(folder / file, part, dtype=dtype)
        weight_map |= dict.fromkeys(part, file)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": 0}, "weight_map": weight_map},
    )


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], *, dtype: str) -> None:
    """One safetensors file (https://huggingface.co/docs/safetensors), values rounded to dtype."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    at = 0
    for name, value in tensors.items():
        blob = encode(value, dtype)
        header[name] = {
            "dtype": SAFETENSORS_DTYPE[dtype],
            "shape": list(value.shape),
            "data_offsets": [at, at + len(blob)],
        }
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def encode(value: np.ndarray, dtype: str) -> bytes:
    """Little-endian bytes; bfloat16 rounds to nearest even."""
    if dtype != "bfloat16":
        return value.astype(dtype).tobytes()
    bits = value.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level BPE with exactly `vocab` ids (112 at least): specials, then bytes (printable
    ASCII first; all 256 from vocab 262 on), then merges."""
    if vocab < 112:
        raise ValueError("the tokenizer needs a vocabulary of at least 112")
    alphabet = _byte_alphabet()
    order = [
        *range(32, 127),
        10,
        9,
        *(b for b in range(256) if not 32 <= b < 127 and b not in (9, 10)),
    ]
    tokens = [*SPECIALS, *(alphabet[b] for b in order)][:vocab]
    merges: list[str] = []
    letters = "etaoinshrdlu" + alphabet[32]
    for first in letters:
        for second in letters:
            if len(tokens) < vocab and first + second not in tokens:
                merges.append(f"{first} {second}")
                tokens.append(first + second)
    tokens += [f"<unused{i}>" for i in range(len(tokens), vocab)]
    specials = [
        {
            "id": i,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, text in enumerate(SPECIALS)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {text: i for i, text in enumerate(tokens)},
        "merges": merges,
    }
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": specials,
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": model,
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "model_max_length": 512,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in plain}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(plain))
    return table


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
