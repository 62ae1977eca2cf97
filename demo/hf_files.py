"""Writes checkpoints in Hugging Face layout with nothing but torch and the standard library."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file, tensors in the given order. Format: 8 bytes of header length (little
    endian), a JSON header padded with spaces to 8 bytes, then the raw bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + num_bytes],
        }
        at += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(flat.numpy().tobytes())


def config_json(
    model_class: str,
    *,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    vocab_size: int,
    context: int,
    tied: bool,
    end_id: int,
    rope_theta: float = 10000.0,
) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM or Qwen2ForCausalLM in bf16."""
    config: dict[str, Any] = {
        "architectures": [model_class],
        "model_type": {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}[model_class],
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_q_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "rope_theta": rope_theta,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": end_id,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }
    if model_class == "LlamaForCausalLM":
        config |= {"attention_bias": False, "mlp_bias": False, "rope_scaling": None}
    else:
        config |= {"use_sliding_window": False}
    return config
