"""The configuration of a pool.

Three lines serve a model:

    models:
      - name: speaker
        path: ./models/speaker
"""

import re
from typing import Any, Literal

import msgspec
import yaml

from weft.core.errors import WeftError
from weft.core.model import DType

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$")
MAX_CONFIG_BYTES = 1 << 20
MAX_MODELS = 1024


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    path: str
    """A folder in Hugging Face layout; relative paths start at the configuration file."""
    dtype: DType | Literal["auto"] = "auto"
    """auto: the checkpoint's own dtype. float64 is for the CPU."""
    max_context_tokens: int | None = None
    pinned: bool = False
    weight: float = 1.0
    ttft_slo_s: float | None = None
    tbt_slo_s: float | None = None


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: int = 8321
    hold_s: float = 120.0
    """How long a request may wait to begin before it gets 503."""
    max_queue: int = 1024
    """Unfinished requests in the pool before new ones get 429."""
    max_body_bytes: int = 8 << 20
    keepalive_s: float = 10.0
    """A silent stream gets an SSE comment this often."""


class SloConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ttft_s: float = 10.0
    tbt_s: float = 0.1


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_memory: str | None = None
    """The arena: weights and KV of all models together, such as "48M" or "40G". Default: on CUDA
    what the device has left after the engine's own overhead, on the CPU 25 % of the memory."""
    host_memory: str | None = None
    """The host store: weight images and parked KV. Default: 50 % of the machine's memory (or of
    the cgroup's limit)."""
    depth: int = 2
    """Steps in flight: 1 = no overlap, 2 = overlap."""
    max_rows: int = 64
    max_step_tokens: int = 512
    max_repeat: int = 16
    cpu_threads: int | None = None


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    models: list[ModelConfig]
    policy: Literal["weft", "dedicated"] = "weft"
    turn_s: float | None = None
    """Length of a decode turn at weight 1 while other models wait; default: the preset's."""
    slo: SloConfig = SloConfig()
    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()


def parse_bytes(text: str) -> int:
    """ "48M", "1.5GiB", "1000000" -> bytes (powers of 1024). Raises WeftError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise WeftError(f"not a size: {text!r}; write a number and K, M, G or T, such as 48M")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_pool_config(text: str, *, source: str = "pool.yaml") -> PoolConfig:
    """Check `text` whole. Raises WeftError with the path of the first thing wrong."""
    if len(text) > MAX_CONFIG_BYTES:
        raise WeftError(f"{source}: larger than {MAX_CONFIG_BYTES} bytes")
    try:
        raw: Any = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise WeftError(f"{source}: not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise WeftError(f"{source}: expected keys such as 'models:', got {type(raw).__name__}")
    return make_pool_config(raw, source=source)


def make_pool_config(raw: dict[str, Any], *, source: str) -> PoolConfig:
    """The same from plain values. Raises WeftError with the path of the first thing wrong."""
    try:
        config = msgspec.convert(raw, PoolConfig)
    except msgspec.ValidationError as error:
        raise WeftError(
            f"{source}: {error}; `weft config-schema` says what may stand there"
        ) from None
    _check(config, source)
    return config


def _check(config: PoolConfig, source: str) -> None:
    if not 1 <= len(config.models) <= MAX_MODELS:
        raise WeftError(f"{source}: `$.models` needs 1 to {MAX_MODELS} entries")
    seen: set[str] = set()
    for i, model in enumerate(config.models):
        where = f"`$.models[{i}]`"
        if not _NAME.fullmatch(model.name):
            raise WeftError(
                f"{source}: {where}.name {model.name!r}: letters, digits and . _ : / @ - only"
            )
        if model.name in seen:
            raise WeftError(f"{source}: {where}.name {model.name!r} is used twice")
        seen.add(model.name)
    engine, server = config.engine, config.server
    bounds: list[tuple[str, float | None, float, float]] = [
        *(bound for i, model in enumerate(config.models) for bound in _model_bounds(i, model)),
        ("engine.cpu_threads", engine.cpu_threads, 1, 1024),
        ("server.max_body_bytes", server.max_body_bytes, 1024, 1 << 30),
        ("turn_s", config.turn_s, 0.001, 3600),
        ("engine.depth", engine.depth, 1, 2),
        ("engine.max_rows", engine.max_rows, 1, 1024),
        ("engine.max_step_tokens", engine.max_step_tokens, 16, 65536),
        ("engine.max_repeat", engine.max_repeat, 1, 256),
        ("server.port", server.port, 0, 65535),
        ("server.hold_s", server.hold_s, 0.1, 86400),
        ("server.max_queue", server.max_queue, 1, 1_000_000),
        ("server.keepalive_s", server.keepalive_s, 0.1, 3600),
        ("slo.ttft_s", config.slo.ttft_s, 0.001, 86400),
        ("slo.tbt_s", config.slo.tbt_s, 0.0001, 3600),
    ]
    for path, value, low, high in bounds:
        if value is not None and not low <= value <= high:
            raise WeftError(f"{source}: `$.{path}` is {value}; it must lie in {low} .. {high}")
    for path, size in (
        ("engine.device_memory", engine.device_memory),
        ("engine.host_memory", engine.host_memory),
    ):
        if size is not None:
            try:
                parse_bytes(size)
            except WeftError as error:
                raise WeftError(f"{source}: `$.{path}`: {error}") from None


def _model_bounds(i: int, model: ModelConfig) -> list[tuple[str, float | None, float, float]]:
    return [
        (f"models[{i}].weight", model.weight, 0.01, 100),
        (f"models[{i}].max_context_tokens", model.max_context_tokens, 2, 1 << 24),
        (f"models[{i}].ttft_slo_s", model.ttft_slo_s, 0.001, 86400),
        (f"models[{i}].tbt_slo_s", model.tbt_slo_s, 0.0001, 3600),
    ]


def json_schema() -> dict[str, Any]:
    """JSON Schema of pool.yaml, for editors."""
    return msgspec.json.schema(PoolConfig)
