"""The decoder of the Llama family (Llama, Yi, Qwen2): a function of (weights, inputs).

Shape legend: T tokens, S sampling rows, H hidden size, Q query heads, G KV heads, D head dim,
E = D / 2, V vocabulary, I intermediate size, B gate/up blocks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from weft.attention.base import AttentionBackend, ForwardBatch, KvView
from weft.core.model import Architecture, RopeSpec
from weft.models.layout import gate_up_blocks, image_layout
from weft.models.linear import DenseLinear, Linear
from weft.models.ops import Ops, TorchOps

__all__ = ["Decoder", "ForwardBatch", "KvView", "rope_tables", "torch_dtype"]

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of an `Architecture.dtype`."""
    return _DTYPES[name]


@dataclass(frozen=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: Linear
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Typed views over one weight image, and the forward pass over them.

    The views stay valid as long as `weights` does; what lies beneath may be unmapped and mapped
    again between steps (the same addresses). Making a Decoder reads no weight byte.
    """

    def __init__(
        self,
        arch: Architecture,
        weights: torch.Tensor,
        *,
        max_tokens: int | None = None,
        ops: Ops | None = None,
    ) -> None:
        """weights: uint8, at least the whole image, on the device the model runs on.

        max_tokens: positions the rotary table covers; default arch.max_position.
        """
        layout = image_layout(arch)
        if weights.dtype != torch.uint8 or weights.numel() < layout.num_bytes:
            raise ValueError(f"need {layout.num_bytes} bytes of weights as uint8")
        views = {
            name: weights[entry.offset : entry.offset + entry.num_bytes]
            .view(torch_dtype(entry.dtype))
            .view(entry.shape)
            for name, entry in layout.tensors.items()
        }
        self.arch = arch
        self.dtype = torch_dtype(arch.dtype)
        self.device = weights.device
        self.ops: Ops = ops or TorchOps()
        self._blocks = gate_up_blocks(arch)
        self._embed = views["embed"]
        self._norm = views["norm"]
        self._lm_head = views.get("lm_head", self._embed)
        self._layers = [_layer_views(views, i) for i in range(arch.num_layers)]
        self._cos, self._sin = rope_tables(
            arch.rope,
            arch.head_dim,
            min(max_tokens or arch.max_position, arch.max_position),
            dtype=self.dtype,
            device=self.device,
        )

    def kv_view(self, range_bytes: torch.Tensor, page_tokens: int) -> KvView:
        """The model's KV range (uint8, whole virtual range) as its pages."""
        return KvView.over(
            range_bytes,
            dtype=self.dtype,
            num_layers=self.arch.num_layers,
            page_tokens=page_tokens,
            num_kv_heads=self.arch.num_kv_heads,
            head_dim=self.arch.head_dim,
        )

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch,
        attention: AttentionBackend,
        kv: KvView,
        before_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Logits [S, V] of `batch.sample_tokens`, in the model's dtype; K and V of all tokens are
        in the pool afterwards. `attention.plan(batch, kv)` must have been called.

        before_layer is called with -1 before the embedding is read, with i before layer i, with
        num_layers before the final norm and head: a load may be followed, extent by extent (extent
        i + 1 of the image layout is what the part announced by i reads; a tied head reads extent 0
        again). Never waits for the device.
        """
        announce = before_layer or _ignore
        announce(-1)
        residual_TH = self._embed[batch.token_ids]
        cos_TE, sin_TE = self._cos[batch.positions], self._sin[batch.positions]
        delta_TH: torch.Tensor | None = None
        for i, layer in enumerate(self._layers):
            announce(i)
            x_TH, residual_TH = self._norm_after(delta_TH, residual_TH, layer.input_norm)
            x_TH = self._attend(i, layer, x_TH, cos_TE, sin_TE, attention, kv)
            x_TH, residual_TH = self._norm_after(x_TH, residual_TH, layer.post_norm)
            delta_TH = self._mlp(layer, x_TH)
        announce(self.arch.num_layers)
        chosen = batch.sample_tokens
        assert delta_TH is not None
        x_SH, _ = self._norm_after(delta_TH[chosen], residual_TH[chosen], self._norm)
        return torch.mm(x_SH, self._lm_head.t())[:, : self.arch.vocab_size]

    def _norm_after(
        self, delta_TH: torch.Tensor | None, residual_TH: torch.Tensor, weight_H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        eps = self.arch.norm_eps
        if delta_TH is None:
            return self.ops.rms_norm(residual_TH, weight_H, eps), residual_TH
        return self.ops.add_rms_norm(delta_TH, residual_TH, weight_H, eps)

    def _attend(
        self,
        index: int,
        layer: _Layer,
        x_TH: torch.Tensor,
        cos_TE: torch.Tensor,
        sin_TE: torch.Tensor,
        attention: AttentionBackend,
        kv: KvView,
    ) -> torch.Tensor:
        arch = self.arch
        tokens, group = x_TH.shape[0], arch.group_size
        heads = layer.qkv(x_TH).view(tokens, arch.num_kv_heads, group + 2, arch.head_dim)
        v_TGD = heads[:, :, group + 1]
        rotated = self.ops.rotary(
            heads[:, :, : group + 1].reshape(tokens, -1, arch.head_dim), cos_TE, sin_TE
        ).view(tokens, arch.num_kv_heads, group + 1, arch.head_dim)
        q_TQD = rotated[:, :, :group].reshape(tokens, arch.num_q_heads, arch.head_dim)
        out_TQD = attention.run(index, q_TQD, rotated[:, :, group], v_TGD, kv)
        return layer.o(out_TQD.view(tokens, -1))

    def _mlp(self, layer: _Layer, x_TH: torch.Tensor) -> torch.Tensor:
        blocks = layer.gate_up(x_TH).view(x_TH.shape[0], self._blocks, 2, -1)
        return layer.down(self.ops.silu_mul(blocks))


def rope_tables(
    rope: RopeSpec,
    head_dim: int,
    num_positions: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [num_positions, head_dim / 2] in `dtype`: float32 arithmetic rounded to `dtype`
    as in transformers, except that float64 is computed in float64.

    The llama3 kind stretches low frequencies (Llama 3.1; transformers' rope init "llama3").
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_dim, 2, dtype=wide) / head_dim
    frequency = 1.0 / (rope.theta**exponent)
    if rope.kind == "llama3":
        frequency = _llama3_frequencies(rope, frequency)
    angle = torch.arange(num_positions, dtype=wide)[:, None] * frequency[None, :]
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def _llama3_frequencies(rope: RopeSpec, frequency: torch.Tensor) -> torch.Tensor:
    low, high, old = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position
    wavelength = 2 * math.pi / frequency
    smooth = (old / wavelength - low) / (high - low)
    blended = (1 - smooth) * frequency / rope.factor + smooth * frequency
    scaled = torch.where(wavelength > old / low, frequency / rope.factor, frequency)
    medium = (wavelength >= old / high) & (wavelength <= old / low)
    return torch.where(medium, blended, scaled)


def _layer_views(views: dict[str, torch.Tensor], index: int) -> _Layer:
    def view(name: str) -> torch.Tensor:
        return views[f"layers.{index}.{name}"]

    bias = views.get(f"layers.{index}.qkv_bias")
    return _Layer(
        input_norm=view("input_norm"),
        qkv=DenseLinear(view("qkv").flatten(0, 1), None if bias is None else bias.flatten()),
        o=DenseLinear(view("o"), transposed=True),
        post_norm=view("post_norm"),
        gate_up=DenseLinear(view("gate_up").flatten(0, 2)),
        down=DenseLinear(view("down"), transposed=True),
    )


def _ignore(_: int) -> None:
    """Nobody follows a load."""
