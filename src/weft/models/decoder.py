"""The decoder of the Llama family and its relatives: a function of (weights, inputs).

What tells model classes apart is data (`core.model.Architecture`); nothing here asks for a name.

Shape legend: T tokens, S sampling rows, H hidden size, Q query heads, G KV heads, D head dim,
E rotary dim / 2, V vocabulary, I intermediate size, B gate/up blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from weft.attention.base import (
    AttentionBackend,
    AttentionParams,
    ForwardBatch,
    HeadNorms,
    HeadsBackend,
    KvView,
)
from weft.core.model import Architecture
from weft.kernels.quant_weight import QuantMatmul, QuantWeight, TorchQuantMatmul
from weft.models.layout import gate_up_blocks, image_layout
from weft.models.linear import DenseLinear, Linear, QuantLinear
from weft.models.lora import LoraBatch
from weft.models.ops import Ops, TorchOps
from weft.models.quant_layout import is_quantized, run_inputs
from weft.models.rope import rope_tables

__all__ = ["Decoder", "ForwardBatch", "KvView", "torch_dtype"]

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_BYTES = ("float8_e4m3", "uint8")
"""Dtypes of quantized weights: seen as bytes here."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of an `Architecture.dtype`."""
    return _DTYPES[name]


@dataclass(frozen=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: Linear
    norms: HeadNorms | None
    o: Linear
    attention_out_norm: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    mlp_out_norm: torch.Tensor | None
    attention: AttentionParams
    rope: int
    """Which of the decoder's rotary tables."""


@dataclass(frozen=True)
class LayerStates:
    """What the last layer leaves: its own result, not yet added to the residual."""

    delta_TH: torch.Tensor
    residual_TH: torch.Tensor


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
        context_tokens: int | None = None,
        ops: Ops | None = None,
        matmul: QuantMatmul | None = None,
    ) -> None:
        """weights: uint8, at least the whole image, on the device the model runs on.

        context_tokens: the longest context the model is served with, by its name and not by what
        memory there is; default arch.max_position. Some rope kinds depend on it (`models.rope`).
        max_tokens: positions the rotary tables cover; default context_tokens.
        matmul: products with quantized weights; default plain torch.
        """
        layout = image_layout(arch)
        if weights.dtype != torch.uint8 or weights.numel() < layout.num_bytes:
            raise ValueError(f"need {layout.num_bytes} bytes of weights as uint8")
        views = {
            name: weights[entry.offset : entry.offset + entry.num_bytes]
            .view(torch.uint8 if entry.dtype in _BYTES else torch_dtype(entry.dtype))
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
        linears = _Linears(arch, views, matmul or TorchQuantMatmul(), self.ops)
        self._layers = [_layer_views(views, linears, arch, i) for i in range(arch.num_layers)]
        context = context_tokens or arch.max_position
        ropes = (arch.rope,) if arch.local_rope is None else (arch.rope, arch.local_rope)
        self._ropes = [
            rope_tables(
                rope,
                arch.head_dim,
                min(max_tokens or context, context),
                dtype=self.dtype,
                device=self.device,
                context_tokens=context,
            )
            for rope in ropes
        ]
        # transformers rounds this factor to the model's dtype before it multiplies.
        self._embed_scale = float(torch.tensor(arch.embed_scale, dtype=self.dtype))

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
        lora: LoraBatch | None = None,
        *,
        logits_out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [S, V] of `batch.sample_tokens`, in the model's dtype; a view of `logits_out`
        [S, logits_width] if that is given. See `run_layers`."""
        states = self.run_layers(batch, attention, kv, before_layer, lora)
        return self.logits(self.final_states(states, batch.sample_tokens), logits_out)

    @torch.inference_mode()
    def run_layers(
        self,
        batch: ForwardBatch,
        attention: AttentionBackend,
        kv: KvView,
        before_layer: Callable[[int], None] | None = None,
        lora: LoraBatch | None = None,
    ) -> LayerStates:
        """All tokens through all layers; K and V of all of them are in the pool afterwards.
        `attention.plan(batch, kv)` must have been called.

        before_layer is called with -1 before the embedding is read, with i before layer i, with
        num_layers before the final norm and head: a load may be followed, extent by extent (extent
        i + 1 of the image layout is what the part announced by i reads; a tied head reads extent 0
        again). Never waits for the device. lora: the step's tokens that use adapters.
        """
        announce = before_layer or _ignore
        announce(-1)
        residual_TH = self._embed[batch.token_ids]
        if self._embed_scale != 1.0:
            residual_TH = residual_TH * self._embed_scale
        ropes = self._ropes
        if not isinstance(attention, HeadsBackend):
            ropes = [(cos[batch.positions], sin[batch.positions]) for cos, sin in ropes]
        delta_TH: torch.Tensor | None = None
        for i, layer in enumerate(self._layers):
            announce(i)
            x_TH, residual_TH = self._norm_after(delta_TH, residual_TH, layer.input_norm)
            x_TH = self._attend(i, layer, x_TH, ropes[layer.rope], attention, kv, lora)
            x_TH = self._norm_branch(x_TH, layer.attention_out_norm)
            x_TH, residual_TH = self._norm_after(x_TH, residual_TH, layer.post_norm)
            x_TH = self._mlp(i, layer, x_TH, lora)
            delta_TH = self._norm_branch(x_TH, layer.mlp_out_norm)
        announce(self.arch.num_layers)
        assert delta_TH is not None
        return LayerStates(delta_TH, residual_TH)

    @torch.inference_mode()
    def final_states(self, states: LayerStates, chosen_S: torch.Tensor) -> torch.Tensor:
        """[S, H]: what the head reads, and an embedding is made of, at these tokens of the step:
        the hidden states after the last norm."""
        delta_SH, residual_SH = states.delta_TH[chosen_S], states.residual_TH[chosen_S]
        return self._norm_after(delta_SH, residual_SH, self._norm)[0]

    @torch.inference_mode()
    def logits(self, x_SH: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[S, V] from `final_states`; a view of `out` [S, logits_width] if that is given."""
        logits_SV = self.ops.product(x_SH, self._lm_head.t(), out=out)
        cap = self.arch.logit_cap
        if cap is not None:
            logits_SV.div_(cap).tanh_().mul_(cap)
        return logits_SV[:, : self.arch.vocab_size]

    @property
    def logits_width(self) -> int:
        """Columns of the LM head in the image: the vocabulary, filled up."""
        return self._lm_head.shape[0]

    def _norm_after(
        self, delta_TH: torch.Tensor | None, residual_TH: torch.Tensor, weight_H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed residual after the branch's result is added, and the new residual."""
        eps, offset = self.arch.norm_eps, self.arch.norm_offset
        if delta_TH is None:
            return self.ops.rms_norm(residual_TH, weight_H, eps, offset), residual_TH
        return self.ops.add_rms_norm(delta_TH, residual_TH, weight_H, eps, offset)

    def _norm_branch(self, x_TH: torch.Tensor, weight_H: torch.Tensor | None) -> torch.Tensor:
        if weight_H is None:
            return x_TH
        return self.ops.rms_norm(x_TH, weight_H, self.arch.norm_eps, self.arch.norm_offset)

    def _attend(
        self,
        index: int,
        layer: _Layer,
        x_TH: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        attention: AttentionBackend,
        kv: KvView,
        lora: LoraBatch | None,
    ) -> torch.Tensor:
        arch = self.arch
        tokens, group = x_TH.shape[0], arch.group_size
        heads = _product(layer.qkv, x_TH, lora, index, "qkv")
        heads = heads.view(tokens, arch.num_kv_heads, group + 2, arch.head_dim)
        if isinstance(attention, HeadsBackend):
            out_TQD = attention.run_heads(index, heads, rope, layer.norms, kv, layer.attention)
        else:
            q_TQD, k_TGD = self._rotate(heads, rope, layer.norms)
            v_TGD = heads[:, :, group + 1]
            out_TQD = attention.run(index, q_TQD, k_TGD, v_TGD, kv, layer.attention)
        return _product(layer.o, out_TQD.view(tokens, -1), lora, index, "o")

    def _rotate(
        self,
        heads_TGXD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        norms: HeadNorms | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [T, Q, D] and keys [T, G, D], normed where the model does so, and rotated."""
        arch = self.arch
        tokens, group = heads_TGXD.shape[0], arch.group_size
        keyed = heads_TGXD[:, :, : group + 1]
        if norms is not None:
            keyed = torch.cat(
                (
                    self._norm_heads(keyed[:, :, :group], norms.query_D),
                    self._norm_heads(keyed[:, :, group:], norms.key_D),
                ),
                dim=2,
            )
        rotated = self.ops.rotary(keyed.reshape(tokens, -1, arch.head_dim), *rope)
        rotated = rotated.view(tokens, arch.num_kv_heads, group + 1, arch.head_dim)
        q_TQD = rotated[:, :, :group].reshape(tokens, arch.num_q_heads, arch.head_dim)
        return q_TQD, rotated[:, :, group]

    def _norm_heads(self, heads: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        flat = heads.reshape(-1, heads.shape[-1])
        normed = self.ops.rms_norm(flat, weight_D, self.arch.norm_eps, self.arch.norm_offset)
        return normed.view(heads.shape)

    def _mlp(
        self, index: int, layer: _Layer, x_TH: torch.Tensor, lora: LoraBatch | None
    ) -> torch.Tensor:
        fused = _product(layer.gate_up, x_TH, lora, index, "gate_up")
        blocks = fused.view(x_TH.shape[0], self._blocks, 2, -1)
        x_TI = self.ops.act_mul(blocks, self.arch.activation)
        return _product(layer.down, x_TI, lora, index, "down")


def _product(
    linear: Linear, x_TI: torch.Tensor, lora: LoraBatch | None, layer: int, part: str
) -> torch.Tensor:
    """x through one of the fused products, and through the adapters beside it."""
    y_TO = linear(x_TI)
    return y_TO if lora is None else lora.add(y_TO, x_TI, layer, part)


class _Linears:
    """The matrices of the image, quantized or not."""

    def __init__(
        self,
        arch: Architecture,
        views: dict[str, torch.Tensor],
        matmul: QuantMatmul,
        ops: Ops,
    ) -> None:
        self._arch = arch
        self._views = views
        self._matmul = matmul
        self._ops = ops

    def __call__(self, name: str, *, transposed: bool = False) -> Linear:
        """transposed: the image stores it [in, out]."""
        bias, view = self._views.get(f"{name}_bias"), self._views[name]
        bias_O = None if bias is None else bias.flatten()
        if not is_quantized(self._arch, name):
            flat = view if transposed else view.flatten(0, -2)
            return DenseLinear(flat, bias_O, transposed=transposed, ops=self._ops)
        quant = self._arch.quant
        assert quant is not None
        scale = self._views[f"{name}.scale"]
        per_byte = 2 if quant.kind == "int4" else 1
        inputs = per_byte * view.shape[0 if transposed else -1]
        weight = QuantWeight(
            kind=quant.kind,
            data=view.t()[None] if transposed else view.view(scale.shape[0], -1, view.shape[-1]),
            scale=scale,
            zero=self._views.get(f"{name}.zero"),
            inputs=inputs,
            run=run_inputs(quant, inputs) if quant.kind == "int4" else 0,
        )
        return QuantLinear(weight, bias_O, self._matmul)


def _layer_views(
    views: dict[str, torch.Tensor], linears: _Linears, arch: Architecture, index: int
) -> _Layer:
    def view(name: str) -> torch.Tensor:
        return views[f"layers.{index}.{name}"]

    def maybe(name: str) -> torch.Tensor | None:
        return views.get(f"layers.{index}.{name}")

    window = arch.window(index)
    q_norm, k_norm = maybe("q_norm"), maybe("k_norm")
    norms = None
    if q_norm is not None and k_norm is not None:
        norms = HeadNorms(q_norm, k_norm, arch.norm_eps, arch.norm_offset)
    return _Layer(
        input_norm=view("input_norm"),
        qkv=linears(f"layers.{index}.qkv"),
        norms=norms,
        o=linears(f"layers.{index}.o", transposed=True),
        attention_out_norm=maybe("attention_out_norm"),
        post_norm=view("post_norm"),
        gate_up=linears(f"layers.{index}.gate_up"),
        down=linears(f"layers.{index}.down", transposed=True),
        mlp_out_norm=maybe("mlp_out_norm"),
        attention=AttentionParams(
            scale=arch.attention_scale, window=window, cap=arch.attention_cap
        ),
        rope=1 if window and arch.local_rope is not None else 0,
    )


def _ignore(_: int) -> None:
    """Nobody follows a load."""
