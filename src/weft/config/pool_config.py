"""The configuration of a pool.

Three lines serve a model:

    models:
      - name: speaker
        path: ./models/speaker
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import yaml

from weft.config.server_config import ServerConfig as ServerConfig
from weft.config.server_config import check_server
from weft.config.values import check_values, parse_bytes, with_durations
from weft.core.errors import WeftError
from weft.core.model import DType
from weft.core.request import Pooling, SamplingDefaults

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$")
MAX_CONFIG_BYTES = 1 << 20
MAX_MODELS = 1024
MAX_ALIASES = 64
MAX_ADAPTERS = 1024
TOOL_PARSERS = ("hermes", "llama3_json", "mistral", "mistral_args", "generic")
_KEY_HASH = re.compile(r"^[0-9a-f]{64}$")


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    """The name in requests, unique in the pool as models' names are."""
    path: str
    """A folder in PEFT format (adapter_config.json, adapter_model.safetensors); relative paths
    start at the configuration file."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    """The name in requests: letters, digits and . _ : / @ -, unique in the pool."""
    path: str
    """A folder in Hugging Face layout; relative paths start at the configuration file."""
    aliases: tuple[str, ...] = ()
    """Other names for it in requests. Unique in the pool, as names are."""
    dtype: DType | Literal["auto"] = "auto"
    """auto: the checkpoint's own dtype. float64 is for the CPU."""
    max_context_tokens: int | None = None
    """Prompt and output together may not exceed this. Default: what the checkpoint says."""
    pinned: bool = False
    """Its weights come in as soon as there is room and never leave the device."""
    preload: bool = False
    """Its weights come in when the server starts, and stay until room is needed."""
    keep_alive_s: float | None = None
    """Idle for this long, its weights leave the device: 0 at once, -1 never for that reason.
    Default: the pool's `keep_alive_s`. A model that left comes back with its next request."""
    weight: float = 1.0
    """Share of the device's time beside other busy models."""
    ttft_slo_s: float | None = None
    """Objective for the time to the first token. Default: `slo.ttft_s`."""
    tbt_slo_s: float | None = None
    """Objective for the time between tokens. Default: `slo.tbt_s`."""
    defaults: SamplingDefaults = SamplingDefaults()
    """For requests that do not say. Default: the pool's `defaults`."""
    chat_template: str | None = None
    """A file with a Jinja template instead of the checkpoint's own; relative paths start at the
    configuration file."""
    adapters: tuple[AdapterConfig, ...] = ()
    """LoRA adapters on this model. Each is served as a model of its own name and shares the
    weights of this one."""
    tool_parser: str | None = None
    """How it writes function calls: hermes, llama3_json, mistral, mistral_args or generic.
    Default: what its chat template teaches it."""
    pooling: Pooling = "last"
    """How `/v1/embeddings` makes one vector of a text: the last token's state, or the mean."""


class SloConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ttft_s: float = 10.0
    """Time to the first token."""
    tbt_s: float = 0.1
    """Time between tokens."""


class AdminConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    socket: str | None = None
    """Path of the Unix socket for `weft load`, `weft reload` and so on; only this user (and root)
    may speak there. Default: a private folder of its own, found by the command line."""
    port: int | None = None
    """Answer administrators on this TCP port of `server.host` as well; needs `key_sha256`."""
    key_sha256: str | None = None
    """The hash of the key for that port, 64 hexadecimal digits; `weft key new` makes both."""
    model_roots: tuple[str, ...] = ()
    """Folders whose checkpoints an administrator may add by path (`weft load PATH`); relative
    paths start at the configuration file. Default: none, only the models of this file."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    device_memory: str | None = None
    """The arena: weights and KV of all models together, such as "48M" or "40G". Default: on CUDA
    what the device has left after the engine's own overhead, on the CPU 25 % of the memory."""
    host_memory: str | None = None
    """The host store: weight images and parked KV. Default: 50 % of the machine's memory (or of
    the cgroup's limit)."""
    spare_host_memory: str | None = None
    """Part of the host store kept for weight images of models that are added later. Default: a
    quarter of what the images leave; memory that removed models leave is used again as well."""
    depth: int = 2
    """Steps in flight: 1 = no overlap, 2 = overlap."""
    max_rows: int = 64
    """Requests in one step."""
    max_step_tokens: int = 512
    """Tokens of one step: bounds how long a prefill keeps the others waiting."""
    max_repeat: int = 16
    """Decode steps launched at once when nothing can change in between."""
    prefix_cache: bool = True
    """Keep the KV of finished requests, in room nobody else wants, for requests of the same API key
    that begin with the same tokens."""
    cpu_threads: int | None = None
    """Threads of a step on the CPU. Default: torch's."""


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    models: list[ModelConfig]
    """What is served."""
    policy: Literal["weft", "dedicated"] = "weft"
    """How models share the device. dedicated: all of them stay on it for ever."""
    turn_s: float | None = None
    """Length of a decode turn at weight 1 while other models wait; default: the preset's."""
    keep_alive_s: float = -1
    """`keep_alive_s` of models that do not say: -1, weights stay until room is needed."""
    watch: bool = False
    """Reload this file when it changes. `weft reload` and SIGHUP do so in any case."""
    defaults: SamplingDefaults = SamplingDefaults()
    """For requests that do not say, to models that do not say either."""
    slo: SloConfig = SloConfig()
    """Objectives of models that have none of their own."""
    engine: EngineConfig = EngineConfig()
    """Devices and memory. A change needs a restart."""
    server: ServerConfig = ServerConfig()
    """The address and the limits of the HTTP server. A change needs a restart."""
    admin: AdminConfig = AdminConfig()
    """Loading, unloading and reloading while it runs. A change needs a restart."""


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
    check_values(raw, source)
    try:
        config = msgspec.convert(with_durations(raw), PoolConfig)
    except (msgspec.ValidationError, RecursionError) as error:
        raise WeftError(
            f"{source}: {error}; `weft config-schema` says what may stand there"
        ) from None
    _check(config, source)
    return config


def _check(config: PoolConfig, source: str) -> None:
    if not 1 <= len(config.models) <= MAX_MODELS:
        raise WeftError(f"{source}: `$.models` needs 1 to {MAX_MODELS} entries")
    _check_names(config, source)
    _check_models(config, source)
    check_server(config.server, source)
    for path, value, low, high in _bounds(config):
        if value is not None and not low <= value <= high:
            raise WeftError(f"{source}: `$.{path}` is {value}; it must lie in {low} .. {high}")
    for path, size in (
        ("engine.device_memory", config.engine.device_memory),
        ("engine.host_memory", config.engine.host_memory),
        ("engine.spare_host_memory", config.engine.spare_host_memory),
    ):
        if size is not None:
            try:
                parse_bytes(size)
            except WeftError as error:
                raise WeftError(f"{source}: `$.{path}`: {error}") from None
    key = config.admin.key_sha256
    if key is not None and not _KEY_HASH.fullmatch(key):
        raise WeftError(
            f"{source}: `$.admin.key_sha256` is not 64 hexadecimal digits; `weft key new` says"
        )
    if config.admin.port is not None and key is None:
        raise WeftError(f"{source}: `$.admin.port` needs `admin.key_sha256` beside it")


def _check_models(config: PoolConfig, source: str) -> None:
    for i, model in enumerate(config.models):
        if model.tool_parser not in (None, *TOOL_PARSERS):
            known = ", ".join(TOOL_PARSERS)
            raise WeftError(f"{source}: `$.models[{i}].tool_parser` is none of {known}")


def _check_names(config: PoolConfig, source: str) -> None:
    """Names and aliases: well formed, and nobody has another's."""
    seen: set[str] = set()
    for i, model in enumerate(config.models):
        where = f"`$.models[{i}]`"
        if len(model.aliases) > MAX_ALIASES:
            raise WeftError(f"{source}: {where}.aliases has more than {MAX_ALIASES} entries")
        if len(model.adapters) > MAX_ADAPTERS:
            raise WeftError(f"{source}: {where}.adapters has more than {MAX_ADAPTERS} entries")
        names = [("name", model.name), *(("aliases", alias) for alias in model.aliases)]
        names += [(f"adapters[{j}].name", one.name) for j, one in enumerate(model.adapters)]
        for key, name in names:
            if not _NAME.fullmatch(name):
                raise WeftError(
                    f"{source}: {where}.{key} {name!r}: letters, digits and . _ : / @ - only"
                )
            if name in seen:
                raise WeftError(f"{source}: {where}.{key} {name!r} is used twice")
            seen.add(name)


def served_entries(config: PoolConfig) -> Iterator[tuple[ModelConfig, ModelConfig | None]]:
    """Everything with a name and weights of its own, in order: each model, then its adapters with
    the model under them. An adapter has its model's wishes, but is not pinned or preloaded."""
    for model in config.models:
        yield model, None
        for one in model.adapters:
            entry = msgspec.structs.replace(
                model,
                name=one.name,
                path=one.path,
                aliases=(),
                adapters=(),
                pinned=False,
                preload=False,
            )
            yield entry, model


def _bounds(config: PoolConfig) -> Iterator[tuple[str, float | None, float, float]]:
    """(key, value, least, largest)."""
    engine = config.engine
    for i, model in enumerate(config.models):
        yield from _model_bounds(i, model)
    yield from _default_bounds("defaults", config.defaults)
    yield from (
        ("keep_alive_s", config.keep_alive_s, -1, 1e9),
        ("admin.port", config.admin.port, 0, 65535),
        ("engine.cpu_threads", engine.cpu_threads, 1, 1024),
        ("turn_s", config.turn_s, 0.001, 3600),
        ("engine.depth", engine.depth, 1, 2),
        ("engine.max_rows", engine.max_rows, 1, 1024),
        ("engine.max_step_tokens", engine.max_step_tokens, 16, 65536),
        ("engine.max_repeat", engine.max_repeat, 1, 256),
        ("slo.ttft_s", config.slo.ttft_s, 0.001, 86400),
        ("slo.tbt_s", config.slo.tbt_s, 0.0001, 3600),
    )


def _model_bounds(i: int, model: ModelConfig) -> list[tuple[str, float | None, float, float]]:
    return [
        (f"models[{i}].weight", model.weight, 0.01, 100),
        (f"models[{i}].max_context_tokens", model.max_context_tokens, 2, 1 << 24),
        (f"models[{i}].ttft_slo_s", model.ttft_slo_s, 0.001, 86400),
        (f"models[{i}].tbt_slo_s", model.tbt_slo_s, 0.0001, 3600),
        (f"models[{i}].keep_alive_s", model.keep_alive_s, -1, 1e9),
        *_default_bounds(f"models[{i}].defaults", model.defaults),
    ]


def _default_bounds(
    path: str, defaults: SamplingDefaults
) -> list[tuple[str, float | None, float, float]]:
    return [
        (f"{path}.temperature", defaults.temperature, 0, 2),
        (f"{path}.top_p", defaults.top_p, 1e-6, 1),
        (f"{path}.top_k", defaults.top_k, 0, 1 << 20),
        (f"{path}.min_p", defaults.min_p, 0, 1),
        (f"{path}.max_tokens", defaults.max_tokens, 1, 1 << 24),
    ]
