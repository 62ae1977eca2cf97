"""In float64 nothing is float32: the decoder against a dense forward pass in numpy's float64.

transformers cannot be the oracle here, its norm and rotary product are float32 islands.
"""

import math
from pathlib import Path

import numpy as np
import pytest

from support.plain import PlainModel
from support.tiny import tiny_checkpoint
from weft.core.model import Architecture
from weft.models.safetensors_file import open_checkpoint

NEW_TOKENS = 12


class DenseModel:
    """The same model from the same checkpoint, written as plainly as possible."""

    def __init__(self, path: Path, arch: Architecture) -> None:
        self.arch = arch
        with open_checkpoint(path) as checkpoint:
            self.weights = {
                name: checkpoint.array(name).astype(np.float64) for name in checkpoint.tensors
            }

    def logits(self, tokens: list[int]) -> np.ndarray:
        """[len(tokens), V]."""
        arch, w = self.arch, self.weights
        x = w["model.embed_tokens.weight"][tokens]
        for i in range(arch.num_layers):
            name = f"model.layers.{i}"
            h = self.norm(x, w[f"{name}.input_layernorm.weight"])
            x = x + self.attention(h, f"{name}.self_attn")
            h = self.norm(x, w[f"{name}.post_attention_layernorm.weight"])
            gate = h @ w[f"{name}.mlp.gate_proj.weight"].T
            up = h @ w[f"{name}.mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.mlp.down_proj.weight"].T
        head = "model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"
        return self.norm(x, w["model.norm.weight"]) @ w[head].T

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.arch.norm_eps) * weight

    def attention(self, h: np.ndarray, name: str) -> np.ndarray:
        arch, w = self.arch, self.weights

        def heads(part: str, count: int) -> np.ndarray:
            out = h @ w[f"{name}.{part}_proj.weight"].T
            if arch.qkv_bias:
                out = out + w[f"{name}.{part}_proj.bias"]
            return out.reshape(len(h), count, arch.head_dim)

        q = self.rotate(heads("q", arch.num_q_heads))
        k = self.rotate(heads("k", arch.num_kv_heads))
        v = heads("v", arch.num_kv_heads)
        out = np.empty_like(q)
        for head in range(arch.num_q_heads):
            group = head // arch.group_size
            scores = q[:, head] @ k[:, group].T / math.sqrt(arch.head_dim)
            scores[np.triu_indices(len(h), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
        return out.reshape(len(h), -1) @ w[f"{name}.o_proj.weight"].T

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """As complex numbers: dimension d is the real, d + D / 2 the imaginary part."""
        half = self.arch.head_dim // 2
        frequency = np.array([self.frequency(d) for d in range(half)])
        turn = np.exp(1j * np.arange(len(x))[:, None] * frequency)[:, None]
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate((turned.real, turned.imag), axis=-1)

    def frequency(self, d: int) -> float:
        rope = self.arch.rope
        frequency = rope.theta ** (-2 * d / self.arch.head_dim)
        if rope.kind == "default":
            return frequency
        turns = rope.original_max_position * frequency / (2 * math.pi)
        if turns < rope.low_freq_factor:
            return frequency / rope.factor
        if turns > rope.high_freq_factor:
            return frequency
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return (1 - smooth) * frequency / rope.factor + smooth * frequency


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("rope", ["default", "llama3"])
@pytest.mark.parametrize("tied", [False, True])
def test_float64_is_float64_everywhere(tmp_path: Path, family: str, rope: str, tied: bool) -> None:
    path = tiny_checkpoint(tmp_path, family=family, rope=rope, tied=tied, heads=6, hidden=48)
    model = PlainModel(path, dtype="float64")
    dense = DenseModel(path, model.arch)
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, 128, 60)]
    for chunk in (None, 7):
        tokens, logits = model.generate(prompt, NEW_TOKENS, chunk=chunk, seed=chunk or 0)
        expected = dense.logits(prompt + tokens[:-1])[len(prompt) - 1 :]
        assert np.abs(logits.numpy() - expected).max() < 1e-10
        assert tokens == expected.argmax(-1).tolist()
