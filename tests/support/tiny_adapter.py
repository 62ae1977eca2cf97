"""Tiny LoRA adapters in PEFT format, strong enough that an answer without them is another one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.tiny import write_safetensors
from weft.core.model import AdapterShape, Architecture
from weft.models.adapter import adapter_layout, build_adapter, read_adapter
from weft.models.lora import LoraWeights

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter_config(**changes: Any) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": list(ALL_TARGETS),
        "modules_to_save": None,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        **changes,
    }


def module_sizes(arch: Architecture) -> dict[str, tuple[str, int, int]]:
    """By the last part of a module's name: its block in a layer, outputs and inputs."""
    hidden, inner = arch.hidden_size, arch.intermediate_size
    queries, keys = arch.num_q_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    return {
        "q_proj": ("self_attn", queries, hidden),
        "k_proj": ("self_attn", keys, hidden),
        "v_proj": ("self_attn", keys, hidden),
        "qkv_proj": ("self_attn", queries + 2 * keys, hidden),
        "o_proj": ("self_attn", hidden, queries),
        "gate_proj": ("mlp", inner, hidden),
        "up_proj": ("mlp", inner, hidden),
        "gate_up_proj": ("mlp", 2 * inner, hidden),
        "down_proj": ("mlp", hidden, inner),
    }


def adapter_tensors(
    arch: Architecture,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: Sequence[str] = ALL_TARGETS,
    strength: float = 0.7,
) -> dict[str, np.ndarray]:
    """Random A and B for every layer; `strength` is the size of what comes out, beside inputs of
    size one, before scaling."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for i in range(arch.num_layers):
        for target in targets:
            block, rows, columns = module_sizes(arch)[target]
            name = f"base_model.model.model.layers.{i}.{block}.{target}"
            a = rng.standard_normal((rank, columns)) / columns**0.5
            b = rng.standard_normal((rows, rank)) * strength / rank**0.5
            tensors[f"{name}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = b.astype(np.float32)
    return tensors


def tiny_adapter(
    folder: Path,
    arch: Architecture,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: Sequence[str] = ALL_TARGETS,
    strength: float = 0.7,
    dtype: str = "float32",
    **config: Any,
) -> Path:
    """Write an adapter for a base of `arch` into `folder` (made if absent) and return it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(adapter_config(r=rank, target_modules=list(targets), **config))
    (folder / "adapter_config.json").write_text(text)
    tensors = adapter_tensors(arch, seed=seed, rank=rank, targets=targets, strength=strength)
    write_safetensors(folder / "adapter_model.safetensors", tensors, dtype=dtype)
    return folder


def packed_adapter(path: Path, arch: Architecture) -> tuple[AdapterShape, np.ndarray]:
    """An adapter's image, as the node would build it."""
    shape = read_adapter(path, arch)
    out = np.full(adapter_layout(arch, shape).num_bytes, 0xFF, dtype=np.uint8)
    build_adapter(path, arch, shape, memoryview(out))
    return shape, out


def lora_weights(path: Path, arch: Architecture) -> LoraWeights:
    """An adapter, ready to be used on the CPU."""
    shape, image = packed_adapter(path, arch)
    return LoraWeights(arch, shape, torch.from_numpy(image))
