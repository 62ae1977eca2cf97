"""config.json of a Hugging Face folder -> `Architecture`. Read, checked, never executed.

Key names and defaults follow transformers' configuration classes, in the spelling of v4
(`rope_theta`, `rope_scaling`, `torch_dtype`) and of v5 (`rope_parameters`, `dtype`). A model class
is a function that reads what its configuration may say beyond the common keys; a key that would
change the forward pass in a way that is not computed is refused by name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec

from weft.core.errors import WeftError
from weft.core.model import Activation, Architecture, DType, Family, RopeSpec
from weft.models.config_reader import Reader, is_int
from weft.models.hf_rope import MAX_POSITION, read_rope, rope_spec
from weft.models.json_file import read_json
from weft.models.quant_image import read_quant

MAX_EOS_IDS = 64
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class _Sizes(NamedTuple):
    layers: int
    hidden: int
    head_dim: int


def read_model_config(path: Path, dtype: str = "auto") -> Architecture:
    """The architecture of the model in folder `path`.

    dtype "auto" is the checkpoint's own: config.json's word, else that of the stored weights.
    Raises WeftError naming the file and the key, and for an unknown class the supported list.
    """
    file = Path(path) / "config.json"
    reader = Reader(str(file), read_json(file))
    kind = SUPPORTED[_class_name(reader)]
    heads = reader.integer("num_attention_heads", 1, 1024)
    hidden = reader.integer("hidden_size", 2, 1 << 16)
    kv_heads = reader.integer("num_key_value_heads", 1, 1024, default=heads)
    if heads % kv_heads:
        reader.fail("num_key_value_heads", f"{kv_heads} does not divide {heads} attention heads")
    head_dim = reader.integer("head_dim", 2, 1024, default=kind.head_dim)
    if head_dim == 0:
        if hidden % heads:
            reader.fail("hidden_size", f"{hidden} is not divisible by {heads} attention heads")
        head_dim = hidden // heads
    if head_dim % 2:
        reader.fail("head_dim", f"{head_dim} is odd; rotary embedding needs an even number")
    layers = reader.integer("num_hidden_layers", 1, 1024)
    facts: dict[str, Any] = {
        "family": kind.family,
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": reader.integer("intermediate_size", 1, 1 << 20),
        "num_q_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": reader.integer("vocab_size", 1, 1 << 20),
        "max_position": reader.integer("max_position_embeddings", 1, MAX_POSITION),
        "norm_eps": reader.number("rms_norm_eps", 1e-15, 0.1, default=kind.norm_eps),
        "activation": _activation(reader, kind.activation_key),
        "tied_embeddings": reader.boolean("tie_word_embeddings", default=kind.tied),
        "qkv_bias": False,
        "dtype": _dtype(reader, Path(path), dtype),
    }
    arch = Architecture(**(facts | kind.read(reader, _Sizes(layers, hidden, head_dim))))
    quantization = reader.raw.get("quantization_config")
    if quantization is None:
        return arch
    quant = read_quant(Path(path), arch, str(file), quantization)
    return msgspec.structs.replace(arch, quant=quant)


def _llama(reader: Reader, sizes: _Sizes) -> dict[str, Any]:
    _refuse_windows(reader)
    bias = reader.boolean("attention_bias", default=False)
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": reader.boolean("mlp_bias", default=False),
        "rope": read_rope(reader, sizes.head_dim),
    }


def _qwen2(reader: Reader, sizes: _Sizes) -> dict[str, Any]:
    return {
        "qkv_bias": True,
        "windows": _qwen_windows(reader, sizes.layers),
        "rope": read_rope(reader, sizes.head_dim),
    }


def _qwen3(reader: Reader, sizes: _Sizes) -> dict[str, Any]:
    bias = reader.boolean("attention_bias", default=False)
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": True,
        "windows": _qwen_windows(reader, sizes.layers),
        "rope": read_rope(reader, sizes.head_dim),
    }


def _mistral(reader: Reader, sizes: _Sizes) -> dict[str, Any]:
    _refuse(reader, "attention_bias", "mlp_bias")
    window = _window(reader, default=4096)
    if any(is_local != bool(window) for is_local in _layer_types(reader, sizes.layers) or ()):
        reader.fail("layer_types", "this class has the same attention in all layers")
    return {
        "windows": (window,) * sizes.layers if window else (),
        "rope": read_rope(reader, sizes.head_dim),
    }


def _phi3(reader: Reader, sizes: _Sizes) -> dict[str, Any]:
    _refuse(reader, "attention_bias", "mlp_bias")
    window = _window(reader, default=0)
    if any(is_local != bool(window) for is_local in _layer_types(reader, sizes.layers) or ()):
        reader.fail("layer_types", "this class has the same attention in all layers")
    rope = read_rope(
        reader,
        sizes.head_dim,
        partial=True,
        kinds=("default", "longrope"),
        aliases={"su": "longrope", "yarn": "longrope"},
        original=4096,
    )
    return {"windows": (window,) * sizes.layers if window else (), "rope": rope}


def _gemma(reader: Reader, sizes: _Sizes, every: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share. Every so many layers one sees everything."""
    _refuse(reader, "use_bidirectional_attention", "mlp_bias")
    bias = reader.boolean("attention_bias", default=False)
    local = _layer_types(reader, sizes.layers)
    if local is None:
        local = tuple(bool((i + 1) % every) for i in range(sizes.layers))
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "windows": _windows_of(reader, local, _window(reader, default=4096)),
        "branch_norms": True,
        "norm_offset": 1.0,
        "embed_scale": sizes.hidden**0.5,
        "attention_scale": reader.number("query_pre_attn_scalar", 1e-6, 1e6, default=256.0) ** -0.5,
    }


def _gemma2(reader: Reader, sizes: _Sizes) -> dict[str, Any]:
    return _gemma(reader, sizes, 2) | {
        "attention_cap": _cap(reader, "attn_logit_softcapping", 50.0),
        "logit_cap": _cap(reader, "final_logit_softcapping", 30.0),
        "rope": read_rope(reader, sizes.head_dim),
    }


def _gemma3(reader: Reader, sizes: _Sizes) -> dict[str, Any]:
    if _cap(reader, "attn_logit_softcapping", None) is not None:
        reader.fail("attn_logit_softcapping", "Gemma 3 does not cap its scores; remove it")
    every = reader.integer("sliding_window_pattern", 1, 1024, default=6)
    wide, local = _gemma3_ropes(reader, sizes.head_dim)
    return _gemma(reader, sizes, every) | {
        "qk_norm": True,
        "logit_cap": _cap(reader, "final_logit_softcapping", None),
        "rope": wide,
        "local_rope": local,
    }


def _gemma3_ropes(reader: Reader, head_dim: int) -> tuple[RopeSpec, RopeSpec]:
    """Of layers that see everything and of the others: v5 nests them in `rope_parameters`, v4 has
    `rope_theta` with `rope_scaling` for the former, `rope_local_base_freq` for the latter."""
    nested, scaling = reader.object("rope_parameters"), reader.object("rope_scaling")
    strange = set(nested.raw) - {"full_attention", "sliding_attention"}
    if strange:
        nested.fail(str(min(strange))[:80], "expected full_attention and sliding_attention only")
    both = []
    for key, theta_key, theta in (
        ("full_attention", "rope_theta", 1e6),
        ("sliding_attention", "rope_local_base_freq", 1e4),
    ):
        part = nested.object(key)
        if key == "full_attention":
            part = Reader(part.where, part.raw | scaling.raw)
        if part.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
            part.fail("partial_rotary_factor", "this class rotates whole heads")
        spec = rope_spec(
            part,
            theta=reader.number(theta_key, 1.0, 1e12, default=theta),
            dim=head_dim,
            max_position=reader.integer("max_position_embeddings", 1, MAX_POSITION),
        )
        both.append(spec)
    return both[0], both[1]


class _Class(NamedTuple):
    """A model class: its defaults, and what else to read."""

    family: Family
    read: Callable[[Reader, _Sizes], dict[str, Any]]
    head_dim: int = 0
    """Where config.json says nothing; 0: hidden_size / num_attention_heads."""
    norm_eps: float = 1e-6
    tied: bool = False
    activation_key: str = "hidden_act"


SUPPORTED: dict[str, _Class] = {
    "LlamaForCausalLM": _Class("llama", _llama),
    "MistralForCausalLM": _Class("mistral", _mistral),
    "Qwen2ForCausalLM": _Class("qwen2", _qwen2),
    "Qwen3ForCausalLM": _Class("qwen3", _qwen3, head_dim=128),
    "Gemma2ForCausalLM": _Class(
        "gemma2", _gemma2, head_dim=256, tied=True, activation_key="hidden_activation"
    ),
    "Gemma3ForCausalLM": _Class(
        "gemma3", _gemma3, head_dim=256, tied=True, activation_key="hidden_activation"
    ),
    "Phi3ForCausalLM": _Class("phi3", _phi3, norm_eps=1e-5),
}


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
        if len(ids) > MAX_EOS_IDS or not all(is_int(i) and 0 <= i < 1 << 20 for i in ids):
            raise WeftError(f"{file}: `eos_token_id` must be a token id or a list of token ids")
        return tuple(sorted(set(ids)))
    return ()


def _class_name(reader: Reader) -> str:
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


def _activation(reader: Reader, key: str) -> Activation:
    name = reader.raw.get(key)
    if name is None:
        return "silu" if key == "hidden_act" else "gelu_tanh"
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        supported = ", ".join(_ACTIVATIONS)
        reader.fail(key, f"{str(name)[:40]!r} is not supported; supported: {supported}")
    return _ACTIVATIONS[name]


def _refuse(reader: Reader, *keys: str) -> None:
    for key in keys:
        if reader.boolean(key, default=False):
            reader.fail(key, "true is not supported for this class")


def _refuse_windows(reader: Reader) -> None:
    if any(_layer_types(reader, None) or ()):
        reader.fail("layer_types", "only full_attention layers are supported for this class")
    if reader.boolean("use_sliding_window", default=True) and _window(reader, default=0):
        reader.fail("sliding_window", "is not supported for this class")


def _window(reader: Reader, *, default: int) -> int:
    """`sliding_window`; null means none (0), absence the class's default."""
    if "sliding_window" not in reader.raw:
        return default
    return reader.integer("sliding_window", 1, MAX_POSITION, default=0)


def _layer_types(reader: Reader, layers: int | None) -> tuple[bool, ...] | None:
    """Per layer whether it has a window, None where config.json does not say."""
    kinds = reader.raw.get("layer_types")
    if kinds is None:
        return None
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(kinds, list) or any(not isinstance(k, str) or k not in known for k in kinds):
        reader.fail("layer_types", f"must be a list of {' and '.join(known)}")
    if layers is not None and len(kinds) != layers:
        reader.fail("layer_types", f"has {len(kinds)} entries for {layers} layers")
    return tuple(known[kind] for kind in kinds)


def _windows_of(reader: Reader, local: tuple[bool, ...], window: int) -> tuple[int, ...]:
    if not any(local):
        return ()
    if not window:
        reader.fail("sliding_window", "is missing, but there are sliding_attention layers")
    return tuple(window if is_local else 0 for is_local in local)


def _qwen_windows(reader: Reader, layers: int) -> tuple[int, ...]:
    """Layers from `max_window_layers` on have a window, unless `layer_types` says which."""
    used = reader.boolean("use_sliding_window", default=False)
    window = _window(reader, default=4096) if used else 0
    local = _layer_types(reader, layers)
    if local is None:
        first = reader.integer("max_window_layers", 0, 1 << 20, default=28)
        local = tuple(bool(window) and i >= first for i in range(layers))
    return _windows_of(reader, local, window)


def _cap(reader: Reader, key: str, default: float | None) -> float | None:
    """A soft-cap; null means none, absence the class's default."""
    if key not in reader.raw:
        return default
    return None if reader.raw[key] is None else reader.number(key, 1e-3, 1e6)


def _dtype(reader: Reader, path: Path, wanted: str) -> DType:
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
