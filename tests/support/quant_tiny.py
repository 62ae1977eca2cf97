"""Tiny quantized checkpoints, each with the plain one that it means.

Every form is written from its documentation, nibble by nibble, and dequantized by its formula in
float64 numpy: none of it uses weft's readers.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file

from support.tiny import tiny_checkpoint, write_safetensors_model

Stored = dict[str, tuple[str, np.ndarray]]
"""Suffix of a tensor's name -> safetensors dtype and its bytes as an array of that shape."""
PARTS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    *("self_attn.qkv_proj", "mlp.gate_up_proj"),
)


class Form(NamedTuple):
    """How a matrix [O, I] is stored, and what config.json says."""

    quantize: Callable[[np.ndarray], tuple[Stored, np.ndarray]]
    config: dict[str, Any]


def fp8_number(byte: int) -> float:
    """E4M3 as its definition says (OCP FP8): no infinities, 0x7F and 0xFF are NaN."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


FP8_TABLE = np.array([fp8_number(byte) for byte in range(256)])


def fp8_bytes(values: np.ndarray) -> np.ndarray:
    """Rounded to E4M3."""
    wide = torch.from_numpy(values.astype(np.float32))
    return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def awq_words(values: np.ndarray) -> np.ndarray:
    """[N, O] of 0 .. 15 -> int32 [N, O / 8] in AutoAWQ's order."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
    for column in range(words.shape[1]):
        for i in range(8):
            part = values[:, column * 8 + order[i]].astype(np.uint32)
            words[:, column] |= part << np.uint32(4 * i)
    return words.view(np.int32)


def words_along(values: np.ndarray, axis: int) -> np.ndarray:
    """0 .. 15 -> int32, eight neighbours along an axis in a word, the first in the lowest bits."""
    moved = np.moveaxis(values, axis, 0).astype(np.uint32)
    words = np.zeros((moved.shape[0] // 8, *moved.shape[1:]), dtype=np.uint32)
    for i in range(8):
        words |= moved[i::8] << np.uint32(4 * i)
    return np.ascontiguousarray(np.moveaxis(words, 0, axis)).view(np.int32)


def four_bits(
    matrix: np.ndarray, group: int, *, symmetric: bool = False, low: int = 0, high: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(codes [O, I], zeros [O, I/S], float16 scales [O, I/S], the numbers they mean in float64)."""
    outputs, inputs = matrix.shape
    size = inputs if group == -1 else group
    parts = matrix.reshape(outputs, inputs // size, size).astype(np.float64)
    if symmetric:
        scale = np.abs(parts).max(-1) / 7
        zero = np.full(scale.shape, 8.0)
    else:
        scale = (parts.max(-1) - parts.min(-1)) / 15
        zero = np.clip(np.round(-parts.min(-1) / scale), low, high)
    scale = scale.astype(np.float16)
    wide = scale.astype(np.float64)[..., None]
    codes = np.clip(np.round(parts / wide) + zero[..., None], 0, 15)
    means = (codes - zero[..., None]) * wide
    return (
        codes.reshape(matrix.shape).astype(np.uint8),
        zero.astype(np.uint8),
        scale,
        means.reshape(matrix.shape),
    )


def awq(group: int) -> Form:
    def quantize(matrix: np.ndarray) -> tuple[Stored, np.ndarray]:
        codes, zeros, scales, means = four_bits(matrix, group)
        stored: Stored = {
            "qweight": ("I32", awq_words(codes.T)),
            "qzeros": ("I32", awq_words(zeros.T)),
            "scales": ("F16", scales.T),
        }
        return stored, means

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return Form(quantize, config | {"zero_point": True, "modules_to_not_convert": None})


def gptq(group: int, *, v2: bool = False, symmetric: bool = False, stored_zero: int = 7) -> Form:
    """stored_zero: what symmetric checkpoints hold for 8."""

    def quantize(matrix: np.ndarray) -> tuple[Stored, np.ndarray]:
        low, high = (0, 15) if v2 else (1, 16)
        codes, zeros, scales, means = four_bits(
            matrix, group, symmetric=symmetric, low=low, high=high
        )
        kept = np.full_like(zeros, stored_zero) if symmetric else zeros - low
        inputs = matrix.shape[1]
        size = inputs if group == -1 else group
        stored: Stored = {
            "qweight": ("I32", words_along(codes.T, 0)),
            "qzeros": ("I32", words_along(kept.T, 1)),
            "scales": ("F16", scales.T),
            "g_idx": ("I32", (np.arange(inputs) // size).astype(np.int32)),
        }
        return stored, means

    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False}
    config |= {"sym": symmetric, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    return Form(quantize, config)


def _compressed(fmt: str, weights: dict[str, Any], activations: Any = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
    }


def packed(group: int, *, symmetric: bool) -> Form:
    """compressed-tensors, pack-quantized."""

    def quantize(matrix: np.ndarray) -> tuple[Stored, np.ndarray]:
        codes, zeros, scales, means = four_bits(matrix, group, symmetric=symmetric)
        stored: Stored = {
            "weight_packed": ("I32", words_along(codes, 1)),
            "weight_scale": ("F16", scales),
            "weight_shape": ("I64", np.array(matrix.shape)),
        }
        if not symmetric:
            stored["weight_zero_point"] = ("I32", words_along(zeros, 0))
        return stored, means

    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "actorder": None}
    weights |= {"strategy": "channel" if group == -1 else "group"}
    weights |= {"group_size": None if group == -1 else group}
    return Form(quantize, _compressed("pack-quantized", weights))


def fp8(scheme: str, *, plain: bool = False) -> Form:
    """scheme: tensor, channel or block. plain: quant_method fp8, else compressed-tensors."""

    def quantize(matrix: np.ndarray) -> tuple[Stored, np.ndarray]:
        size = np.abs(matrix)
        if scheme == "tensor":
            scale = np.array(size.max() / 448)
            wide = np.full(matrix.shape, scale)
        elif scheme == "channel":
            scale = size.max(1, keepdims=True) / 448
            wide = np.broadcast_to(scale, matrix.shape)
        else:
            outputs, inputs = matrix.shape
            tall = -(-outputs // 128) * 128
            blocks = np.zeros((tall, inputs))
            blocks[:outputs] = size
            scale = blocks.reshape(tall // 128, 128, inputs // 128, 128).max((1, 3)) / 448
            wide = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:outputs]
        codes = fp8_bytes(matrix / wide)
        scale = scale.astype(np.float32)
        again = {"tensor": scale, "channel": scale, "block": None}[scheme]
        if again is None:
            again = np.repeat(np.repeat(scale, 128, 0), 128, 1)[: matrix.shape[0]]
        means = FP8_TABLE[codes] * again.astype(np.float64)
        name = "weight_scale_inv" if plain and scheme == "block" else "weight_scale"
        stored: Stored = {"weight": ("F8_E4M3", codes), name: ("F32", scale)}
        if plain and scheme == "tensor":
            stored["input_scale"] = ("F32", np.array(0.5, dtype=np.float32))
        return stored, means

    if plain:
        config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        if scheme == "block":
            config["weight_block_size"] = [128, 128]
        else:
            config["activation_scheme"] = "static"
        return Form(quantize, config)
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    weights |= {"strategy": scheme}
    if scheme == "block":
        weights["block_structure"] = [128, 128]
    tokens = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    return Form(quantize, _compressed("float-quantized", weights, tokens))


FORMS: dict[str, Form] = {
    "fp8-tensor": fp8("tensor"),
    "fp8-channel": fp8("channel"),
    "fp8-block": fp8("block"),
    "fp8-plain": fp8("tensor", plain=True),
    "fp8-plain-block": fp8("block", plain=True),
    "awq-32": awq(32),
    "awq-128": awq(128),
    "awq-all": awq(-1),
    "gptq": gptq(64),
    "gptq-sym": gptq(32, symmetric=True),
    "gptq-sym-8": gptq(32, symmetric=True, stored_zero=8),
    "gptq-all": gptq(-1),
    "gptq-v2": gptq(32, v2=True),
    "packed-sym": packed(32, symmetric=True),
    "packed-asym": packed(64, symmetric=False),
    "packed-channel": packed(-1, symmetric=True),
}


def quant_checkpoint(
    folder: Path,
    form: Form,
    *,
    seed: int = 0,
    dense: Callable[[str], bool] = lambda module: False,
    family: str = "llama",
    tied: bool = False,
    change: Callable[[dict[str, tuple[str, np.ndarray]]], None] | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Two models: quantized, and plain float64 weights of the same numbers. dense: modules that are
    left as they are. change: what a test does to the quantized tensors before they are written.
    config: what it changes in quantization_config."""
    sizes = {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "intermediate": 256}
    plain_path = folder / "plain"
    quant_path = folder / "quant"
    tiny_checkpoint(plain_path, family=family, tied=tied, seed=seed, **sizes)
    extra = {"quantization_config": form.config | (config or {})}
    tiny_checkpoint(quant_path, family=family, tied=tied, config_extra=extra, **sizes)
    plain = load_file(plain_path / "model.safetensors")
    stored: dict[str, tuple[str, np.ndarray]] = {}
    for name, value in list(plain.items()):
        module = name.removesuffix(".weight")
        if module.endswith(PARTS) and name.endswith(".weight") and not dense(module):
            parts, means = form.quantize(value)
            stored |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
            plain[name] = means
        else:
            stored[name] = ("F32", value)
    if change is not None:
        change(stored)
    write_safetensors_model(plain_path, plain, dtype="float64")
    write_stored(quant_path / "model.safetensors", stored)
    return quant_path, plain_path


def write_stored(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """One safetensors file of tensors of different dtypes."""
    header: dict[str, Any] = {}
    blobs: list[bytes] = []
    at = 0
    for name, (dtype, value) in tensors.items():
        blob = np.ascontiguousarray(value).tobytes()
        span = [at, at + len(blob)]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": span}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
