"""Rotary embedding in config.json -> `RopeSpec`.

v4 of transformers spells it `rope_theta` beside `rope_scaling`, v5 `rope_parameters`; values,
defaults and precedence follow transformers.modeling_rope_utils. What a kind derives from other keys
(attention factors, stretch factors) is derived here, once.
"""

import math
from typing import Any

from weft.core.model import RopeSpec
from weft.models.config_reader import Reader

MAX_POSITION = 1 << 24
_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_rope(
    reader: Reader,
    head_dim: int,
    *,
    theta: float = 10000.0,
    partial: bool = False,
    kinds: tuple[str, ...] = _KINDS,
    aliases: dict[str, str] | None = None,
    original: int | None = None,
) -> RopeSpec:
    """The one rotary embedding of a model.

    theta: the class's default. partial: the class can rotate a part of each head. kinds: what the
    class allows. aliases: its other names for kinds. original: its default for
    `original_max_position_embeddings` beside the rope object, which then outranks one inside.
    """
    part = reader.object("rope_scaling")
    if not part.raw:  # where both are there, transformers goes by the older one
        part = reader.object("rope_parameters")
    for key in ("full_attention", "sliding_attention"):
        if key in part.raw:
            part.fail(key, "this class has one rotary embedding for all layers")
    theta = reader.number("rope_theta", 1.0, 1e12, default=theta)
    outer = reader.number("partial_rotary_factor", 0.0, 1.0, default=1.0)
    share = part.number("partial_rotary_factor", 0.0, 1.0, default=outer)
    rotary_dim = int(head_dim * share)
    if share != 1.0:
        where = part if part.raw.get("partial_rotary_factor") is not None else reader
        if not partial:
            where.fail("partial_rotary_factor", "this class rotates whole heads")
        if rotary_dim < 2 or rotary_dim % 2:
            where.fail("partial_rotary_factor", f"{rotary_dim} of {head_dim} dimensions: not even")
    beside = reader.integer(
        "original_max_position_embeddings", 1, MAX_POSITION, default=original or 0
    )
    return rope_spec(
        part,
        theta=theta,
        rotary_dim=rotary_dim if rotary_dim != head_dim else 0,
        dim=rotary_dim,
        max_position=reader.integer("max_position_embeddings", 1, MAX_POSITION),
        original=beside,
        kinds=kinds,
        aliases=aliases or {},
    )


def rope_spec(
    part: Reader,
    *,
    theta: float,
    dim: int,
    max_position: int,
    rotary_dim: int = 0,
    original: int = 0,
    kinds: tuple[str, ...] = _KINDS,
    aliases: dict[str, str] | None = None,
) -> RopeSpec:
    """One object of rope parameters; `dim` dimensions are rotated. original: the value outside the
    object, which outranks the one inside; 0 if there is none."""
    theta = part.number("rope_theta", 1.0, 1e12, default=theta)
    kind = part.raw.get("rope_type", part.raw.get("type", "default"))
    kind = (aliases or {}).get(kind, kind) if isinstance(kind, str) else kind
    if kind not in kinds:
        part.fail(
            "rope_type", f"{str(kind)[:40]!r} is not supported; supported: {', '.join(kinds)}"
        )
    base: dict[str, Any] = {"theta": theta, "rotary_dim": rotary_dim}
    match kind:
        case "linear":
            return RopeSpec(kind="linear", factor=_factor(part), **base)
        case "dynamic":
            if dim <= 2:
                part.fail("rope_type", "dynamic needs more than two rotated dimensions")
            return RopeSpec(
                kind="dynamic", factor=_factor(part), original_max_position=max_position, **base
            )
        case "llama3":
            return _llama3(part, original, base)
        case "yarn":
            return _yarn(part, original, max_position, base)
        case "longrope":
            return _longrope(part, original, max_position, dim, base)
    return RopeSpec(**base)


def _factor(part: Reader) -> float:
    return part.number("factor", 1.0, 1e6)


def _original(part: Reader, beside: int, default: int | None) -> int:
    key = "original_max_position_embeddings"
    return beside or part.integer(key, 1, MAX_POSITION, default=default)


def _llama3(part: Reader, original: int, base: dict[str, Any]) -> RopeSpec:
    low = part.number("low_freq_factor", 1e-6, 1e6)
    high = part.number("high_freq_factor", 1e-6, 1e6)
    if low >= high:
        part.fail("low_freq_factor", "must be smaller than high_freq_factor")
    return RopeSpec(
        kind="llama3",
        factor=_factor(part),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=_original(part, original, None),
        **base,
    )


def _yarn(part: Reader, original: int, max_position: int, base: dict[str, Any]) -> RopeSpec:
    if base["theta"] <= 1.0:
        part.fail("rope_theta", "yarn needs more than 1")
    original = _original(part, original, max_position)
    factor = part.number("factor", 1.0, 1e6, default=max(1.0, max_position / original))
    mscale = part.number("mscale", 0.0, 1e6, default=0.0)
    over = part.number("mscale_all_dim", 0.0, 1e6, default=0.0)

    def stretch(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    inferred = stretch(mscale) / stretch(over) if mscale and over else stretch(1.0)
    return RopeSpec(
        kind="yarn",
        factor=factor,
        attention_factor=part.number("attention_factor", 0.0, 1e6, default=inferred),
        original_max_position=original,
        beta_fast=part.number("beta_fast", 0.0, 1e6, default=0.0) or 32.0,
        beta_slow=part.number("beta_slow", 0.0, 1e6, default=0.0) or 1.0,
        truncate=part.boolean("truncate", default=True),
        **base,
    )


def _longrope(
    part: Reader, original: int, max_position: int, dim: int, base: dict[str, Any]
) -> RopeSpec:
    original = _original(part, original, max_position)
    if original < 2:
        part.fail("original_max_position_embeddings", "must be 2 or more")
    factor = part.number("factor", 1e-6, 1e6, default=max_position / original)
    inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    return RopeSpec(
        kind="longrope",
        factor=factor,
        attention_factor=part.number("attention_factor", 0.0, 1e6, default=inferred),
        original_max_position=original,
        short_factor=part.numbers("short_factor", dim // 2, 1e-6, 1e6),
        long_factor=part.numbers("long_factor", dim // 2, 1e-6, 1e6),
        **base,
    )
