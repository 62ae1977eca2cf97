"""The packed weight image: where every tensor lies. Pure; the bytes are made in `image`.

One image per model, the same bytes on host and device, one contiguous extent per layer in layer
order, so that a load is a list of copies and a forward pass may follow it layer by layer. Rows are
ordered so that each tensor-parallel degree in {1, 2, 4, 8} that divides the KV heads is a set of
contiguous ranges:

    embed            [Vp, H]          Vp = V rounded up to 8 (8 equal blocks of rows)
    layers.i.input_norm   [H]
    layers.i.qkv     [G, (Q/G + 2) * D, H]   per KV head g: its query heads, its K, its V
    layers.i.qkv_bias     [G, (Q/G + 2) * D]        where arch.qkv_bias
    layers.i.q_norm, k_norm   [D]     where arch.qk_norm
    layers.i.o       [Q * D, H]       stored [in, out]
    layers.i.o_bias  [H]              where arch.o_bias
    layers.i.attention_out_norm   [H] where arch.branch_norms
    layers.i.post_norm    [H]         before the MLP
    layers.i.gate_up [B, 2, I/B, H]   per block b: gate rows of b, then up rows of b
    layers.i.gate_up_bias [B, 2, I/B] where arch.mlp_bias
    layers.i.down    [I, H]           stored [in, out]
    layers.i.down_bias    [H]         where arch.mlp_bias
    layers.i.mlp_out_norm [H]         where arch.branch_norms
    norm             [H]
    lm_head          [Vp, H]          absent where embeddings are tied

What becomes of qkv, o, gate_up and down where they are quantized is in `quant_layout`.

Shape legend: V vocabulary, H hidden size, G KV heads, Q query heads, D head dim, I intermediate
size, B gate/up blocks (8, or the largest smaller power of two that divides I).
"""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from weft.core.model import STORED_BYTES, Architecture
from weft.models.quant_layout import QuantTensor, is_quantized, matrix_tensors

FORMAT_VERSION = 1
EXTENT_ALIGN = 4096
TENSOR_ALIGN = 256
VOCAB_BLOCKS = 8


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor in the image. `scale` names the tensor of its scales, for quantized formats."""

    offset: int
    shape: tuple[int, ...]
    dtype: str
    scale: str | None = None

    @property
    def num_bytes(self) -> int:
        count = STORED_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


class LayoutExtent(msgspec.Struct, frozen=True):
    """A contiguous part of the image that is loaded as one: "embed", "layers.i" or "head"."""

    name: str
    offset: int
    num_bytes: int


class ImageLayout(msgspec.Struct, frozen=True):
    """Extents in load order: embed, layers.0 .. layers.L-1, head (final norm and lm_head).

    Extent i + 1 is layer i. Extents begin at multiples of 4096 bytes, tensors at multiples of 256;
    gaps are zero. `num_bytes` is a multiple of 4096.
    """

    num_bytes: int
    extents: tuple[LayoutExtent, ...]
    tensors: dict[str, TensorEntry]


class _Planned(NamedTuple):
    extent: str
    name: str
    shape: tuple[int, ...]


class _Stored(NamedTuple):
    extent: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: str | None


def padded_vocab(arch: Architecture) -> int:
    """Rows of the embedding table in the image."""
    return -(-arch.vocab_size // VOCAB_BLOCKS) * VOCAB_BLOCKS


def gate_up_blocks(arch: Architecture) -> int:
    """Blocks in which gate and up rows alternate."""
    blocks = 8
    while arch.intermediate_size % blocks:
        blocks //= 2
    return blocks


def image_layout(arch: Architecture) -> ImageLayout:
    """Where everything lies in the image of `arch`."""
    tensors: dict[str, TensorEntry] = {}
    extents: list[LayoutExtent] = []
    start = at = 0
    current = "embed"
    for extent, name, shape, dtype, scale in _stored(arch):
        if extent != current:
            end = _align(at, EXTENT_ALIGN)
            extents.append(LayoutExtent(current, start, end - start))
            start = at = end
            current = extent
        entry = TensorEntry(_align(at, TENSOR_ALIGN), shape, dtype, scale)
        tensors[name] = entry
        at = entry.offset + entry.num_bytes
    end = _align(at, EXTENT_ALIGN)
    extents.append(LayoutExtent(current, start, end - start))
    return ImageLayout(end, tuple(extents), tensors)


def _stored(arch: Architecture) -> Iterator[_Stored]:
    """Every tensor; a quantized matrix is followed by its scales and zero points."""
    blocks = {"qkv": arch.num_kv_heads, "gate_up": gate_up_blocks(arch)}
    for extent, name, shape in _planned(arch):
        tensors = [QuantTensor(name, shape, arch.dtype, None)]
        if arch.quant is not None and is_quantized(arch, name):
            own = name.rpartition(".")[2]
            tensors = matrix_tensors(
                arch.quant, name, shape, blocks=blocks.get(own, 1), transposed=own not in blocks
            )
        for tensor in tensors:
            yield _Stored(extent, *tensor)


def _planned(arch: Architecture) -> Iterator[_Planned]:
    hidden, inner, vocab = arch.hidden_size, arch.intermediate_size, padded_vocab(arch)
    rows_per_kv_head = (arch.group_size + 2) * arch.head_dim
    blocks = gate_up_blocks(arch)
    vector = (hidden,)
    parts: list[tuple[str, tuple[int, ...], bool]] = [
        ("input_norm", vector, True),
        ("qkv", (arch.num_kv_heads, rows_per_kv_head, hidden), True),
        ("qkv_bias", (arch.num_kv_heads, rows_per_kv_head), arch.qkv_bias),
        ("q_norm", (arch.head_dim,), arch.qk_norm),
        ("k_norm", (arch.head_dim,), arch.qk_norm),
        ("o", (arch.num_q_heads * arch.head_dim, hidden), True),
        ("o_bias", vector, arch.o_bias),
        ("attention_out_norm", vector, arch.branch_norms),
        ("post_norm", vector, True),
        ("gate_up", (blocks, 2, inner // blocks, hidden), True),
        ("gate_up_bias", (blocks, 2, inner // blocks), arch.mlp_bias),
        ("down", (inner, hidden), True),
        ("down_bias", vector, arch.mlp_bias),
        ("mlp_out_norm", vector, arch.branch_norms),
    ]
    yield _Planned("embed", "embed", (vocab, hidden))
    for i in range(arch.num_layers):
        layer = f"layers.{i}"
        for name, shape, present in parts:
            if present:
                yield _Planned(layer, f"{layer}.{name}", shape)
    yield _Planned("head", "norm", (hidden,))
    if not arch.tied_embeddings:
        yield _Planned("head", "lm_head", (vocab, hidden))


def _align(value: int, to: int) -> int:
    return -(-value // to) * to
