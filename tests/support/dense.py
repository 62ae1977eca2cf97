"""A dense forward pass in numpy's float64, written as plainly as possible.

For whatever transformers cannot be the oracle of: its norm, softmax and angles are float32 islands.
"""

import math
from pathlib import Path

import numpy as np

from weft.core.model import Architecture, RopeSpec
from weft.models.safetensors_file import open_checkpoint


class DenseModel:
    """The same model from the same checkpoint, written as plainly as possible."""

    def __init__(self, path: Path, arch: Architecture) -> None:
        self.arch = arch
        with open_checkpoint(path) as checkpoint:
            self.weights = {
                name: checkpoint.array(name).astype(np.float64) for name in checkpoint.tensors
            }
        unfuse(self.weights, arch)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """[len(tokens), V]."""
        arch, w = self.arch, self.weights
        x = w["model.embed_tokens.weight"][tokens] * arch.embed_scale
        after, before, last = (
            f"{part}_layernorm"
            for part in ("post_attention", "pre_feedforward", "post_feedforward")
        )
        for i in range(arch.num_layers):
            name = f"model.layers.{i}"
            h = self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.self_attn", i)
            x = x + (self.norm(h, f"{name}.{after}") if arch.branch_norms else h)
            h = self.norm(x, f"{name}.{before if arch.branch_norms else after}")
            h = self.mlp(h, f"{name}.mlp")
            x = x + (self.norm(h, f"{name}.{last}") if arch.branch_norms else h)
        head = "model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"
        return cap(self.norm(x, "model.norm") @ w[head].T, arch.logit_cap)

    def mlp(self, h: np.ndarray, name: str) -> np.ndarray:
        gate, up = self.linear(h, f"{name}.gate_proj"), self.linear(h, f"{name}.up_proj")
        if self.arch.activation == "silu":
            active = gate / (1 + np.exp(-gate))
        else:
            active = gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
        return self.linear(active * up, f"{name}.down_proj")

    def linear(self, h: np.ndarray, name: str) -> np.ndarray:
        return h @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        weight = self.weights[f"{name}.weight"] + self.arch.norm_offset
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.arch.norm_eps) * weight

    def attention(self, h: np.ndarray, name: str, layer: int) -> np.ndarray:
        arch = self.arch

        def heads(part: str, count: int) -> np.ndarray:
            return self.linear(h, f"{name}.{part}_proj").reshape(len(h), count, arch.head_dim)

        q, k = heads("q", arch.num_q_heads), heads("k", arch.num_kv_heads)
        v = heads("v", arch.num_kv_heads)
        if arch.qk_norm:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        window = arch.window(layer)
        rope = arch.local_rope if window and arch.local_rope else arch.rope
        q, k = self.rotate(q, rope), self.rotate(k, rope)
        position = np.arange(len(h))
        ahead = position[None] - position[:, None]
        hidden = (ahead > 0) | (ahead <= -window) if window else ahead > 0
        out = np.empty_like(q)
        for head in range(arch.num_q_heads):
            group = head // arch.group_size
            scale = arch.attention_scale or 1 / math.sqrt(arch.head_dim)
            scores = cap(q[:, head] @ k[:, group].T * scale, arch.attention_cap)
            scores[hidden] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
        return self.linear(out.reshape(len(h), -1), f"{name}.o_proj")

    def rotate(self, x: np.ndarray, rope: RopeSpec) -> np.ndarray:
        """As complex numbers: of the rotated dimensions the first half is the real part."""
        half = (rope.rotary_dim or self.arch.head_dim) // 2
        frequency = np.array([self.frequency(d, rope) for d in range(half)])
        turn = np.exp(1j * np.arange(len(x))[:, None] * frequency)[:, None] * rope.attention_factor
        turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
        return np.concatenate((turned.real, turned.imag, x[..., 2 * half :]), axis=-1)

    def frequency(self, d: int, rope: RopeSpec) -> float:
        dim = rope.rotary_dim or self.arch.head_dim
        frequency = rope.theta ** (-2 * d / dim)
        turns = rope.original_max_position * frequency / (2 * math.pi)
        if rope.kind == "linear":
            return frequency / rope.factor
        if rope.kind == "longrope":
            is_long = self.arch.max_position > rope.original_max_position
            return frequency / (rope.long_factor if is_long else rope.short_factor)[d]
        if rope.kind == "yarn":
            ends = [
                dim
                * math.log(rope.original_max_position / (2 * math.pi * beta))
                / (2 * math.log(rope.theta))
                for beta in (rope.beta_fast, rope.beta_slow)
            ]
            low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), dim - 1)
            ramp = min(max((d - low) / (high - low), 0.0), 1.0)
            return frequency / rope.factor * ramp + frequency * (1 - ramp)
        if rope.kind != "llama3":
            return frequency
        if turns < rope.low_freq_factor:
            return frequency / rope.factor
        if turns > rope.high_freq_factor:
            return frequency
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return (1 - smooth) * frequency / rope.factor + smooth * frequency


def cap(x: np.ndarray, limit: float | None) -> np.ndarray:
    return x if limit is None else limit * np.tanh(x / limit)


def unfuse(weights: dict[str, np.ndarray], arch: Architecture) -> None:
    """Phi-3's fused matrices under the names of the others."""
    queries, keys = arch.num_q_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    for fused in [name for name in weights if "qkv_proj" in name or "gate_up_proj" in name]:
        whole = weights.pop(fused)
        if "qkv_proj" in fused:
            for part, rows in zip("qkv", np.split(whole, [queries, queries + keys]), strict=True):
                weights[fused.replace("qkv_proj", f"{part}_proj")] = rows
        else:
            for part, rows in zip(("gate", "up"), np.split(whole, 2), strict=True):
                weights[fused.replace("gate_up_proj", f"{part}_proj")] = rows
