"""Promise 4: how far below the best logit of a float32 reference each emitted token lies.

One teacher-forced pass over whole streams in float32, layer by layer with weights upcast one layer
at a time. Written on torch alone, straight from the model's definition: it shares nothing with the
decoder but the names in the image layout.

Shape legend: T tokens of all streams, H hidden size, Q query heads, G KV heads, D head dim.
"""

import torch
import torch.nn.functional as F

from weft.core.model import Architecture
from weft.models.layout import gate_up_blocks, image_layout

STRIP_TOKENS = 4096


class Reference:
    """`image`: the packed image as uint8, on the host."""

    def __init__(self, arch: Architecture, image: torch.Tensor, device: torch.device) -> None:
        assert arch.rope.kind == "default" and not arch.tied_embeddings
        self._arch, self._image, self._device = arch, image, device
        self._entries = image_layout(arch).tensors

    def _weight(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        raw = self._image[entry.offset : entry.offset + entry.num_bytes].to(self._device)
        return raw.view(getattr(torch, entry.dtype)).view(entry.shape).float()

    @torch.inference_mode()
    def shortfalls(self, streams: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
        """streams: (prompt, emitted). Per stream, for every emitted token, the best logit given
        its own prefix minus the token's own (0: it is the best)."""
        arch, device = self._arch, self._device
        ids = [[*prompt, *emitted][:-1] for prompt, emitted in streams]
        lengths = [len(x) for x in ids]
        flat = torch.tensor([t for x in ids for t in x], device=device)
        x_TH = self._weight("embed")[flat]
        cos, sin = self._rotary(max(lengths))
        for i in range(arch.num_layers):
            self._layer(f"layers.{i}", x_TH, lengths, cos, sin)
        norm, head = self._weight("norm"), self._weight("lm_head")[: arch.vocab_size]
        out, at = [], 0
        for (prompt, emitted), length in zip(streams, lengths, strict=True):
            own_TH = self._norm(x_TH[at + len(prompt) - 1 : at + length], norm)
            logits = own_TH @ head.T
            drawn = torch.tensor(emitted, device=device)
            out.append((logits.amax(-1) - logits.gather(1, drawn[:, None])[:, 0]).cpu())
            at += length
        return out

    def _rotary(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        dim = self._arch.head_dim
        inverse = self._arch.rope.theta ** -(torch.arange(0, dim, 2).double() / dim)
        angle = torch.arange(positions).double()[:, None] * inverse
        return angle.cos().float().to(self._device), angle.sin().float().to(self._device)

    def _norm(self, x_TH: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x_TH.square().mean(-1, keepdim=True) + self._arch.norm_eps)
        return x_TH * scale * weight

    def _layer(
        self,
        name: str,
        x_TH: torch.Tensor,
        lengths: list[int],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        """In place."""
        arch = self._arch
        weights = {
            part: self._weight(f"{name}.{part}")
            for part in ("input_norm", "qkv", "o", "post_norm", "gate_up", "down")
        }
        qkv = weights["qkv"].flatten(0, 1)
        bias = self._weight(f"{name}.qkv_bias").flatten() if arch.qkv_bias else None
        at = 0
        for length in lengths:
            own_TH = x_TH[at : at + length]
            heads = F.linear(self._norm(own_TH, weights["input_norm"]), qkv, bias)
            heads = heads.view(length, arch.num_kv_heads, arch.group_size + 2, arch.head_dim)
            q = _rotate(heads[:, :, :-2].flatten(1, 2), cos[:length], sin[:length])
            k = _rotate(heads[:, :, -2], cos[:length], sin[:length])
            k, v = (part.repeat_interleave(arch.group_size, 1) for part in (k, heads[:, :, -1]))
            mixed = F.scaled_dot_product_attention(
                *(part.transpose(0, 1)[None] for part in (q, k, v)), is_causal=True
            )
            own_TH += mixed[0].transpose(0, 1).flatten(1) @ weights["o"]
            at += length
        blocks = gate_up_blocks(arch)
        for begin in range(0, len(x_TH), STRIP_TOKENS):
            own_TH = x_TH[begin : begin + STRIP_TOKENS]
            both = self._norm(own_TH, weights["post_norm"]) @ weights["gate_up"].flatten(0, 2).T
            gate, up = both.view(len(own_TH), blocks, 2, -1).unbind(2)
            own_TH += (F.silu(gate) * up).flatten(1) @ weights["down"]


def _rotate(x_TND: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x_TND.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
