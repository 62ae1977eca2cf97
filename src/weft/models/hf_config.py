"""config.json of a Hugging Face folder -> `Architecture`. Read, checked, never executed.

Key names and defaults follow transformers' LlamaConfig and Qwen2Config, in the spelling of v4
(`rope_theta`, `rope_scaling`, `torch_dtype`) and of v5 (`rope_parameters`, `dtype`).
"""

import math
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from weft.core.errors import WeftError
from weft.core.model import Architecture, DType, RopeSpec
from weft.models.json_file import read_json

SUPPORTED: dict[str, Literal["llama", "qwen2"]] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
}
MAX_EOS_IDS = 64


def read_model_config(path: Path, dtype: str = "auto") -> Architecture:
    """The architecture of the model in folder `path`.

    dtype "auto" is the checkpoint's own: config.json's word, else that of the stored weights.
    Raises WeftError naming the file and the key, and for an unknown class the supported list.
    """
    file = Path(path) / "config.json"
    reader = _Reader(str(file), read_json(file))
    family = SUPPORTED[_class_name(reader)]
    _refuse_unsupported(reader, family)
    heads = reader.integer("num_attention_heads", 1, 1024)
    hidden = reader.integer("hidden_size", 2, 1 << 16)
    kv_heads = reader.integer("num_key_value_heads", 1, 1024, default=heads)
    if heads % kv_heads:
        reader.fail("num_key_value_heads", f"{kv_heads} does not divide {heads} attention heads")
    head_dim = reader.integer("head_dim", 2, 1024, default=0)
    if head_dim == 0:
        if hidden % heads:
            reader.fail("hidden_size", f"{hidden} is not divisible by {heads} attention heads")
        head_dim = hidden // heads
    if head_dim % 2:
        reader.fail("head_dim", f"{head_dim} is odd; rotary embedding needs an even number")
    return Architecture(
        family=family,
        num_layers=reader.integer("num_hidden_layers", 1, 1024),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", 1, 1 << 20),
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=reader.integer("vocab_size", 1, 1 << 20),
        max_position=reader.integer("max_position_embeddings", 1, 1 << 24),
        norm_eps=reader.number("rms_norm_eps", 1e-15, 0.1, default=1e-6),
        rope=_rope(reader),
        qkv_bias=family == "qwen2",
        tied_embeddings=reader.boolean("tie_word_embeddings", default=False),
        dtype=_dtype(reader, Path(path), dtype),
    )


def read_eos_ids(path: Path) -> tuple[int, ...]:
    """Token ids that end an answer: generation_config.json's, else config.json's; may be empty.

    Ascending, without duplicates. Raises WeftError on anything but an id or a list of ids.
    """
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        if name == "generation_config.json" and not file.is_file():
            continue
        value = read_json(file).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if len(ids) > MAX_EOS_IDS or not all(_is_int(i) and 0 <= i < 1 << 20 for i in ids):
            raise WeftError(f"{file}: `eos_token_id` must be a token id or a list of token ids")
        return tuple(sorted(set(ids)))
    return ()


def _class_name(reader: "_Reader") -> str:
    classes = reader.raw.get("architectures")
    if not isinstance(classes, list) or not classes:
        reader.fail("architectures", f"is missing; supported: {', '.join(SUPPORTED)}")
    name = classes[0]
    if not isinstance(name, str) or name not in SUPPORTED:
        reader.fail(
            "architectures",
            f"{str(name)[:80]} is not supported; supported: {', '.join(SUPPORTED)}",
        )
    return str(name)


def _refuse_unsupported(reader: "_Reader", family: str) -> None:
    """Everything that would change the forward pass and that we do not compute."""
    act = reader.raw.get("hidden_act", "silu")
    if act != "silu":
        reader.fail("hidden_act", f"{str(act)[:40]!r} is not supported; only 'silu' is")
    if reader.raw.get("quantization_config") is not None:
        reader.fail("quantization_config", "quantized checkpoints are not supported; dequantize")
    partial = reader.number("partial_rotary_factor", 0.0, 1.0, default=1.0)
    if partial != 1.0:
        reader.fail("partial_rotary_factor", "partial rotary embedding is not supported")
    if family == "llama":
        for key in ("attention_bias", "mlp_bias"):
            if reader.boolean(key, default=False):
                reader.fail(key, "true is not supported for LlamaForCausalLM")
        return
    if reader.boolean("use_sliding_window", default=False):
        reader.fail("use_sliding_window", "sliding window attention is not supported")
    kinds = reader.raw.get("layer_types")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        reader.fail("layer_types", "only full_attention layers are supported")


def _rope(reader: "_Reader") -> RopeSpec:
    """Old spelling: rope_theta beside rope_scaling; v5: everything in rope_parameters."""
    key = "rope_parameters" if reader.raw.get("rope_parameters") is not None else "rope_scaling"
    raw = reader.raw.get(key)
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        reader.fail(key, f"must be an object, got {type(raw).__name__}")
    part = _Reader(f"{reader.where}: `{key}`", raw)
    theta = reader.number("rope_theta", 1.0, 1e12, default=10000.0)
    theta = part.number("rope_theta", 1.0, 1e12, default=theta)
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        if part.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
            part.fail("partial_rotary_factor", "partial rotary embedding is not supported")
        return RopeSpec(theta=theta)
    if kind != "llama3":
        part.fail("rope_type", f"{str(kind)[:40]!r} is not supported; supported: default, llama3")
    low = part.number("low_freq_factor", 1e-6, 1e6)
    high = part.number("high_freq_factor", 1e-6, 1e6)
    if low >= high:
        part.fail("low_freq_factor", "must be smaller than high_freq_factor")
    return RopeSpec(
        kind="llama3",
        theta=theta,
        factor=part.number("factor", 1.0, 1e6),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=part.integer("original_max_position_embeddings", 1, 1 << 24),
    )


def _dtype(reader: "_Reader", path: Path, wanted: str) -> DType:
    if wanted != "auto":
        return _as_dtype(wanted, f"dtype {wanted!r}")
    for key in ("dtype", "torch_dtype"):
        value = reader.raw.get(key)
        if value is not None:
            text = str(value)[:40].removeprefix("torch.")
            return _as_dtype(text, f"{reader.where}: `{key}` {text!r}")
    from weft.models.safetensors_file import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return checkpoint.main_dtype()


def _as_dtype(text: str, what: str) -> DType:
    for name in get_args(DType):
        if text == name:
            return name  # type: ignore[no-any-return]
    raise WeftError(f"{what} is not supported; set dtype to one of {', '.join(get_args(DType))}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _Reader:
    """Typed, bounded look-ups in one JSON object, with errors that name file and key."""

    def __init__(self, where: str, raw: dict[str, Any]) -> None:
        self.where = where
        self.raw = raw

    def fail(self, key: str, message: str) -> NoReturn:
        raise WeftError(f"{self.where}: `{key}`: {message}")

    def integer(self, key: str, low: int, high: int, *, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                self.fail(key, "is missing")
            return default
        if not _is_int(value) or not low <= value <= high:
            self.fail(key, f"must be an integer in {low} .. {high}")
        return int(value)

    def number(self, key: str, low: float, high: float, *, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                self.fail(key, "is missing")
            return default
        if not (_is_int(value) or isinstance(value, float)) or not low <= value <= high:
            self.fail(key, f"must be a number in {low} .. {high}")
        if not math.isfinite(value):
            self.fail(key, "must be finite")
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, "must be true or false")
        return bool(value)
