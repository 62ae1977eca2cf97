"""What a model is: its architecture (for the engine) and its sizes (for the ledger).

Shape legend: L layers, H hidden size, Q query heads, K KV heads, D head dim, V vocabulary.
"""

from typing import Literal

import msgspec

from weft.core.ids import ModelName

DType = Literal["bfloat16", "float16", "float32", "float64"]

DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

STORED_BYTES: dict[str, int] = DTYPE_BYTES | {"float8_e4m3": 1, "uint8": 1}
"""Sizes of everything a weight image holds: a model's own dtype, and quantized weights."""


RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
Family = Literal["llama", "qwen2", "mistral", "qwen3", "gemma2", "gemma3", "phi3"]
Activation = Literal["silu", "gelu_tanh"]


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding, in the words of transformers' rope kinds. What a kind does not use keeps
    its default. The frequencies are worked out in `models.rope`."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    rotary_dim: int = 0
    """Leading dimensions of a head that are rotated; 0: all of them."""
    factor: float = 1.0
    attention_factor: float = 1.0
    """cos and sin are multiplied by it (yarn, longrope)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    """Longest context before it was stretched (dynamic: `max_position` itself)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: round the ends of its ramp to whole dimensions."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    """longrope: divisors of the frequencies, for contexts up to the original length and beyond."""


QuantForm = Literal["fp8", "fp8_inv", "awq", "gptq", "gptq_v2", "compressed_int4"]
"""fp8: `weight_scale` (plain fp8 and compressed-tensors); fp8_inv: `weight_scale_inv`."""


class QuantSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How the matrices of a model are quantized (`docs/quantization.md`). Embeddings, norms, biases
    and lm_head are not; nor are the matrices named in `dense`."""

    form: QuantForm
    """How the checkpoint stores them."""
    kind: Literal["fp8", "int4"]
    """How the image stores them: one byte or half a byte a weight."""
    group_size: int
    """Inputs that share a scale; 0: all inputs of an output."""
    scale_dtype: DType
    """Dtype of the scales in the image, as in the checkpoint."""
    symmetric: bool = False
    """4-bit: every zero point is 8."""
    dense: tuple[str, ...] = ()
    """Matrices of the image that are stored in the model's dtype, such as "layers.3.down"."""


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a forward pass needs besides weights. Built from config.json, never executed.

    Model classes differ in these values only; the decoder asks nobody's name.
    """

    family: Family
    """Whose tensor names the checkpoint uses (`models.names`)."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope: RopeSpec
    local_rope: RopeSpec | None = None
    """Of layers with a window; None: the same as of all others."""
    windows: tuple[int, ...] = ()
    """Per layer how many tokens a token sees, itself included; 0: all before it. (): all 0."""
    qkv_bias: bool
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Queries and keys are normed per head before they are rotated."""
    branch_norms: bool = False
    """What attention and MLP give is normed before it is added to the residual."""
    norm_offset: float = 0.0
    """Norms multiply by weight + norm_offset."""
    activation: Activation = "silu"
    embed_scale: float = 1.0
    attention_scale: float | None = None
    """Scores are multiplied by it; None: 1 / sqrt(head_dim)."""
    attention_cap: float | None = None
    """Scores s become cap * tanh(s / cap)."""
    logit_cap: float | None = None
    """The same for logits."""
    tied_embeddings: bool
    dtype: DType
    """Dtype of weights (but for quantized ones), activations and KV on the device."""
    quant: QuantSpec | None = None

    def window(self, layer: int) -> int:
        """Tokens that a token of this layer sees; 0: all."""
        return self.windows[layer] if self.windows else 0

    @property
    def longest_context(self) -> int:
        """The longest context that can be asked for. Beyond `max_position` (what is served unless
        somebody asks) only a dynamic rope goes."""
        stretch = self.rope.factor if self.rope.kind == "dynamic" else 1.0
        return int(self.max_position * stretch)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


def choose_page_tokens(kv_bytes_per_token: int) -> int:
    """Tokens a KV page: the smallest power of two in 16..128 with page bytes >= 1 MiB, else 128."""
    for tokens in (16, 32, 64, 128):
        if tokens * kv_bytes_per_token >= 1 << 20:
            return tokens
    return 128


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model as the ledger and the schedulers see it: sizes, limits, wishes; no tensors."""

    name: ModelName
    weight_bytes: int
    """Bytes of the packed weight image, the same on host and device."""
    num_layers: int
    page_tokens: int
    page_bytes: int
    max_context_tokens: int
    """Prompt and output together may not exceed this."""
    base: ModelName | None = None
    """This is a LoRA adapter of `base`: it has weights, but no KV and no turns of its own."""
    eos_ids: tuple[int, ...] = ()
    vocab_size: int
    pinned: bool = False
    """Never evicted once resident."""
    preload: bool = False
    """Loaded once as soon as it is assigned and there is room."""
    keep_alive_s: float = -1
    """Idle for so long since its last request, its weights leave the device; negative: never for
    that reason."""
    weight: float = 1.0
    """Share of turn time relative to the other models."""
    ttft_slo_s: float = 10.0
    tbt_slo_s: float = 0.1


class AdapterShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine must know of a LoRA adapter besides the architecture of its base. Its
    scaling is folded into its weights."""

    ranks: tuple[tuple[int, int, int, int], ...]
    """Per layer the rank at qkv, o, gate_up and down, a multiple of 16; 0: nothing there."""


def adapter_spec(name: str, base: ModelSpec, *, weight_bytes: int, pinned: bool) -> ModelSpec:
    """The scheduling view of an adapter on `base`: an image of its own, all else from the base."""
    return msgspec.structs.replace(
        base, name=ModelName(name), base=base.name, weight_bytes=weight_bytes, pinned=pinned
    )


def model_spec(
    name: str,
    arch: Architecture,
    *,
    weight_bytes: int,
    eos_ids: tuple[int, ...],
    max_context_tokens: int | None = None,
    page_tokens: int | None = None,
    pinned: bool = False,
    preload: bool = False,
    keep_alive_s: float = -1,
    weight: float = 1.0,
    ttft_slo_s: float = 10.0,
    tbt_slo_s: float = 0.1,
) -> ModelSpec:
    """The scheduling view of `arch`. `page_tokens` overrides the size rule (small in tests)."""
    tokens = page_tokens or choose_page_tokens(arch.kv_bytes_per_token)
    return ModelSpec(
        name=ModelName(name),
        weight_bytes=weight_bytes,
        num_layers=arch.num_layers,
        page_tokens=tokens,
        page_bytes=tokens * arch.kv_bytes_per_token,
        max_context_tokens=min(max_context_tokens or arch.max_position, arch.longest_context),
        eos_ids=eos_ids,
        vocab_size=arch.vocab_size,
        pinned=pinned,
        preload=preload,
        keep_alive_s=keep_alive_s,
        weight=weight,
        ttft_slo_s=ttft_slo_s,
        tbt_slo_s=tbt_slo_s,
    )
