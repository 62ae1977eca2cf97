"""Whose weights are called what: parts of the image -> tensors of the checkpoint, as tables.

A part is one logical matrix or vector ("layers.3.q"). Parts of one layer that share a name in a
family's table lie in one tensor of the checkpoint, their rows one after another in the order of
`part_shapes` (Phi-3's fused projections).

Shapes: V vocabulary, H hidden size, Q query heads, G KV heads, D head dim, I intermediate size;
matrices are [out, in], as checkpoints have them.
"""

from collections.abc import Iterator
from typing import NamedTuple

from weft.core.model import Architecture, Family

_LLAMA = {
    "embed": "model.embed_tokens",
    "input_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "post_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
_GEMMA = _LLAMA | {
    "attention_out_norm": "post_attention_layernorm",
    "post_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_PHI3 = _LLAMA | {
    **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
}
_NAMES: dict[Family, dict[str, str]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "mistral": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": _PHI3,
}


class Source(NamedTuple):
    """Rows of a tensor of the checkpoint: `shape[0]` of them from `first_row` on."""

    tensor: str
    first_row: int
    shape: tuple[int, ...]


def part_shapes(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every part of a model and its shape, in the order the image needs them."""
    hidden, inner, vocab = arch.hidden_size, arch.intermediate_size, arch.vocab_size
    queries, keys = arch.num_q_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    yield "embed", (vocab, hidden)
    for i in range(arch.num_layers):
        layer = f"layers.{i}"
        yield f"{layer}.input_norm", (hidden,)
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{layer}.{part}", (rows, hidden)
            if arch.qkv_bias:
                yield f"{layer}.{part}_bias", (rows,)
        if arch.qk_norm:
            yield f"{layer}.q_norm", (arch.head_dim,)
            yield f"{layer}.k_norm", (arch.head_dim,)
        yield f"{layer}.o", (hidden, queries)
        if arch.o_bias:
            yield f"{layer}.o_bias", (hidden,)
        if arch.branch_norms:
            yield f"{layer}.attention_out_norm", (hidden,)
        yield f"{layer}.post_norm", (hidden,)
        for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden))):
            yield f"{layer}.{part}", shape
            if arch.mlp_bias:
                yield f"{layer}.{part}_bias", (inner,)
        yield f"{layer}.down", (hidden, inner)
        if arch.mlp_bias:
            yield f"{layer}.down_bias", (hidden,)
        if arch.branch_norms:
            yield f"{layer}.mlp_out_norm", (hidden,)
    yield "norm", (hidden,)
    if not arch.tied_embeddings:
        yield "lm_head", (vocab, hidden)


def tensor_name(arch: Architecture, part: str) -> str:
    """The tensor of the checkpoint that holds a part."""
    layer, _, own = part.rpartition(".")
    kind = "bias" if own.endswith("_bias") else "weight"
    name = f"{_NAMES[arch.family][own.removesuffix('_bias')]}.{kind}"
    return f"model.{layer}.{name}" if layer else name


def sources(arch: Architecture) -> dict[str, Source]:
    """Where each part lies."""
    rows: dict[str, int] = {}
    found: dict[str, Source] = {}
    for part, shape in part_shapes(arch):
        name = tensor_name(arch, part)
        found[part] = Source(name, rows.get(name, 0), shape)
        rows[name] = rows.get(name, 0) + shape[0]
    return found


def expected_tensors(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes a checkpoint of `arch` must have, in the order the image needs them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for source in sources(arch).values():
        end = source.first_row + source.shape[0]
        shapes[source.tensor] = (end, *source.shape[1:])
    return shapes
