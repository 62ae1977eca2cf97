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
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
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

    rope_style "v4" writes rope_theta and rope_scaling, "v5" rope_parameters. head_dim None is
    hidden // heads and leaves the key out of config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if family == "llama" else "Qwen2ForCausalLM"],
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
    if head_dim is not None:
        config["head_dim"] = head_dim
    if family == "qwen2":
        config["use_sliding_window"] = False
    scaling = LLAMA3_ROPE if rope == "llama3" else None
    if rope_style == "v4":
        config |= {"rope_theta": theta, "rope_scaling": scaling}
    else:
        config["rope_parameters"] = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    _write_json(folder / "config.json", config | (config_extra or {}))
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": eos, "do_sample": False},
    )
    tensors = random_tensors(
        np.random.default_rng(seed),
        qkv_bias=family == "qwen2",
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
) -> dict[str, np.ndarray]:
    """Float32 weights under Hugging Face names. Normed inputs have unit variance, so a matrix of
    std s / sqrt(in) gives outputs of std s."""

    def matrix(rows: int, columns: int, std: float) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * (std / columns**0.5)).astype(np.float32)

    def vector(size: int, mean: float, std: float) -> np.ndarray:
        return (mean + std * rng.standard_normal(size)).astype(np.float32)

    # Scores get a std of 2 * 2 = 4: sharp, else attention over a long context averages to nothing
    # and the answer falls into a loop. Branches outweigh the embedding, else a tied model repeats
    # its last token.
    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden, hidden**0.5 * 0.3)}
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
        tensors[f"{name}.input_layernorm.weight"] = vector(hidden, 1.0, 0.1)
        tensors[f"{name}.post_attention_layernorm.weight"] = vector(hidden, 1.0, 0.1)
    tensors["model.norm.weight"] = vector(hidden, 1.0, 0.1)
    if not tied:
        tensors["lm_head.weight"] = matrix(vocab, hidden, 3.0)
    return tensors


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
