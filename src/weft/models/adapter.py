"""LoRA adapters in PEFT format: reading them without trusting them, and packing their image.

A folder with adapter_config.json and adapter_model.safetensors. An adapter's image is one extent,
for each layer and each of the decoder's four fused products that it touches:

    layers.i.PART.a   [R, in]
    layers.i.PART.b   [out, R]     rows in the order of the base's image, scaling folded in

R is the sum of the ranks of the modules fused in PART (q, k, v; gate, up), rounded up to 16; a
module's rows of `b` are zero outside its own columns. So x a^T b^T is what the adapter adds.

Shape legend: H hidden size, Q query heads, G KV heads, D head dim, I intermediate size, R rank.
"""

import hashlib
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from weft.core.errors import WeftError
from weft.core.model import DTYPE_BYTES, AdapterShape, Architecture
from weft.models.convert import convert
from weft.models.json_file import read_json
from weft.models.layout import (
    EXTENT_ALIGN,
    TENSOR_ALIGN,
    ImageLayout,
    LayoutExtent,
    TensorEntry,
    gate_up_blocks,
)
from weft.models.safetensors_file import Checkpoint, open_tensors

FORMAT_VERSION = 1
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PARTS = ("qkv", "o", "gate_up", "down")
"""The order of `AdapterShape.ranks`."""
MAX_RANK = 1024
MAX_PATTERNS = 4096
RANK_ALIGN = 16

_NUMPY = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4", "float64": "<f8"}
_FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
    "down": ("mlp.down_proj",),
}
_PART_OF = {module: part for part, modules in _FUSED.items() for module in modules}
_WHOLE = {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?((?:[a-z_]+\.){0,4}layers\.([0-9]{1,5})\.([a-z_]+\.[a-z_]+))"
    r"\.lora_(A|B)(?:\.default)?\.weight"
)
_PLAIN_KEY = re.compile(r"\^?(?:[A-Za-z0-9_.]|\\\.){1,256}")
_INIT = {"gaussian", "eva", "orthogonal", "true", "false"}
"""Ways to begin a training that leave the base as it is."""
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
"""Of the training, or told by the tensors that are there."""
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"}
_REFUSED = {
    "use_dora": "DoRA (use_dora)",
    "modules_to_save": "whole modules beside the LoRA (modules_to_save)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "lora_bias": "biases of LoRA matrices (lora_bias)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "repeated layers (layer_replication)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
}


class _Settings(NamedTuple):
    rank: int
    alpha: float
    root: bool
    ranks: dict[str, Any]
    alphas: dict[str, Any]


class _Module(NamedTuple):
    """LoRA on one linear layer of the base."""

    layer: int
    name: str
    rank: int
    scale: float
    a: str
    b: str


def read_adapter(path: Path, arch: Architecture) -> AdapterShape:
    """Check configuration and headers of an adapter for a base of `arch`. Reads no weights.
    Raises WeftError naming the file, whatever is wrong with it."""
    with _open(path) as checkpoint:
        modules = _modules(checkpoint, arch, _read_config(path))
    return _shape(modules, arch)


def adapter_layout(arch: Architecture, shape: AdapterShape) -> ImageLayout:
    """Where everything lies in the image."""
    tensors: dict[str, TensorEntry] = {}
    at = 0
    for i, ranks in enumerate(shape.ranks):
        for part, rank in zip(PARTS, ranks, strict=True):
            if not rank:
                continue
            rows, columns = part_sizes(arch, part)
            for name, size in (("a", (rank, columns)), ("b", (rows, rank))):
                at = -(-at // TENSOR_ALIGN) * TENSOR_ALIGN
                entry = TensorEntry(at, size, arch.dtype)
                tensors[f"layers.{i}.{part}.{name}"] = entry
                at += entry.num_bytes
    num_bytes = -(-at // EXTENT_ALIGN) * EXTENT_ALIGN
    return ImageLayout(num_bytes, (LayoutExtent("adapter", 0, num_bytes),), tensors)


def part_sizes(arch: Architecture, part: str) -> tuple[int, int]:
    """Outputs and inputs of a fused product of the decoder."""
    queries, keys = arch.num_q_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    return {
        "qkv": (queries + 2 * keys, arch.hidden_size),
        "o": (arch.hidden_size, queries),
        "gate_up": (2 * arch.intermediate_size, arch.hidden_size),
        "down": (arch.hidden_size, arch.intermediate_size),
    }[part]


def adapter_key(path: Path, arch: Architecture) -> str:
    """Content address of the image: 64 hex digits over the format, `arch`, the configuration and
    the name, size, time, place and header of the tensors."""
    digest = hashlib.blake2b(digest_size=32)
    with _open(path) as checkpoint:
        (stamp,) = checkpoint.stamps()
        info = os.stat(checkpoint.files[0])
        facts = f"{info.st_dev}:{info.st_ino}:{stamp.num_bytes}:{stamp.mtime_ns}"
        config = msgspec.json.encode(read_json(path / CONFIG))
        parts = (b"lora", str(FORMAT_VERSION).encode(), msgspec.json.encode(arch), config)
        for part in (*parts, facts.encode(), stamp.header):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def build_adapter(path: Path, arch: Architecture, shape: AdapterShape, out: memoryview) -> None:
    """Write the image into `out`. Raises WeftError, also if the files are no longer those that
    `shape` was read from."""
    layout = adapter_layout(arch, shape)
    if out.nbytes < layout.num_bytes:
        raise ValueError(f"the image needs {layout.num_bytes} bytes, got {out.nbytes}")
    with _open(path) as checkpoint:
        modules = _modules(checkpoint, arch, _read_config(path))
        if _shape(modules, arch) != shape:
            raise WeftError(f"{path}: changed while it was read; start again when it is complete")
        image = np.frombuffer(out, dtype=np.uint8, count=layout.num_bytes)
        image[:] = 0
        columns: dict[tuple[int, str], int] = {}
        for module in modules:
            part = _PART_OF[module.name]
            first = columns.get((module.layer, part), 0)
            columns[module.layer, part] = first + module.rank
            name = f"layers.{module.layer}.{part}"
            own = slice(first, first + module.rank)
            a_RI = _view(image, layout.tensors[f"{name}.a"])
            a_RI[own] = convert(
                checkpoint.array(module.a), checkpoint.tensors[module.a].dtype, arch.dtype
            )
            b_OR = _view(image, layout.tensors[f"{name}.b"])
            _place_rows(arch, module, b_OR[:, own], _scaled(checkpoint, module, arch))


def _open(path: Path) -> Checkpoint:
    file = Path(path) / TENSORS
    try:
        foreign = not file.exists() and (Path(path) / "adapter_model.bin").exists()
    except (OSError, ValueError) as error:
        raise WeftError(f"{path}: cannot be read: {error}") from None
    if foreign:
        raise WeftError(
            f"{path}: only adapter_model.bin, which is never unpickled here; save the adapter as "
            "safetensors"
        )
    return open_tensors(file)


def _view(image: np.ndarray, entry: TensorEntry) -> np.ndarray:
    raw = image[entry.offset : entry.offset + entry.num_bytes]
    return raw.view(_NUMPY[entry.dtype]).reshape(entry.shape)


def _scaled(checkpoint: Checkpoint, module: _Module, arch: Architecture) -> np.ndarray:
    """B of a module times its scaling, rounded once to the base's dtype."""
    wide = "float64" if arch.dtype == "float64" else "float32"
    b_OR = convert(checkpoint.array(module.b), checkpoint.tensors[module.b].dtype, wide)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are values here
        return convert(b_OR * b_OR.dtype.type(module.scale), wide, arch.dtype)


def _place_rows(arch: Architecture, module: _Module, target: np.ndarray, rows: np.ndarray) -> None:
    """Rows of a module's B in the order of the fused product of the base's image."""
    group, dim, heads = arch.group_size, arch.head_dim, arch.num_kv_heads
    rank, name = module.rank, module.name
    if _PART_OF[name] == "qkv":
        fused = target.reshape(heads, group + 2, dim, rank)
        places = {"q": slice(0, group), "k": slice(group, group + 1), "v": slice(group + 1, None)}
        counts = {"q": group, "k": 1, "v": 1}
        at = 0
        for which in ("q", "k", "v") if name == _WHOLE["qkv"] else (name[len("self_attn.")],):
            count = heads * counts[which] * dim
            own = rows[at : at + count].reshape(heads, counts[which], dim, rank)
            fused[:, places[which]] = own
            at += count
    elif _PART_OF[name] == "gate_up":
        blocks = gate_up_blocks(arch)
        fused = target.reshape(blocks, 2, arch.intermediate_size // blocks, rank)
        halves = {"mlp.gate_proj": (0,), "mlp.up_proj": (1,)}.get(name, (0, 1))
        for half, own in zip(halves, np.split(rows, len(halves)), strict=True):
            fused[:, half] = own.reshape(blocks, -1, rank)
    else:
        target[:] = rows


def _shape(modules: list[_Module], arch: Architecture) -> AdapterShape:
    total = [dict.fromkeys(PARTS, 0) for _ in range(arch.num_layers)]
    for module in modules:
        total[module.layer][_PART_OF[module.name]] += module.rank
    ranks = [tuple(-(-one[part] // RANK_ALIGN) * RANK_ALIGN for part in PARTS) for one in total]
    return msgspec.convert({"ranks": ranks}, AdapterShape)


# -- what strangers wrote ------------------------------------------------------------------------


def _read_config(path: Path) -> _Settings:
    where = f"{Path(path) / CONFIG}"
    config = read_json(Path(path) / CONFIG)

    def refuse(what: str) -> WeftError:
        return WeftError(f"{where}: {what} is not supported; plain LoRA is")

    if config.get("peft_type") != "LORA":
        raise refuse(f"peft_type {str(config.get('peft_type'))[:80]!r}")
    if config.get("bias", "none") != "none":
        raise refuse(f"bias {str(config['bias'])[:80]!r}")
    for name, value in config.items():
        if name in _REFUSED and value:
            raise refuse(_REFUSED[name])
        if value and name not in _HARMLESS | _READ | _REFUSED.keys():
            raise refuse(f"`{name[:80]}`")
    init = config.get("init_lora_weights", True)
    if init is not None and str(init).lower() not in _INIT:
        raise refuse(f"init_lora_weights {str(init)[:80]!r}, which changes the base's weights,")
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not _is_rank(rank):
        raise WeftError(f"{where}: `r` must be an integer of 1 .. {MAX_RANK}")
    if not _is_alpha(alpha):
        raise WeftError(f"{where}: `lora_alpha` must be a number of at most a million")
    root = config.get("use_rslora", False)
    if root is not None and not isinstance(root, bool):
        raise WeftError(f"{where}: `use_rslora` must be true or false")
    ranks = _pattern(config.get("rank_pattern"), f"{where}: `rank_pattern`")
    alphas = _pattern(config.get("alpha_pattern"), f"{where}: `alpha_pattern`")
    if not all(map(_is_rank, ranks.values())) or not all(map(_is_alpha, alphas.values())):
        raise WeftError(f"{where}: a value of `rank_pattern` or `alpha_pattern` is out of bounds")
    return _Settings(rank, float(alpha), bool(root), ranks, alphas)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_alpha(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= 1e6 and math.isfinite(value)


def _pattern(value: object, where: str) -> dict[str, Any]:
    """Plain module names only: a stranger's regular expression may take for ever."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise WeftError(f"{where} must be an object with at most {MAX_PATTERNS} keys")
    for key in value:
        if not _PLAIN_KEY.fullmatch(key):
            raise WeftError(
                f"{where}: {key[:80]!r} is a regular expression; write plain module names"
            )
    return value


def _of_pattern(pattern: dict[str, Any], module: str, default: float) -> float:
    """The first entry whose key ends the module's name (from its beginning where it has a ^)."""
    for key, value in pattern.items():
        plain = key.removeprefix("^").replace("\\.", ".")
        if module == plain or (not key.startswith("^") and module.endswith(f".{plain}")):
            return float(value)
    return default


def _modules(checkpoint: Checkpoint, arch: Architecture, settings: _Settings) -> list[_Module]:
    """What the tensors are for, in the order of the image. Every tensor must be for something."""
    file = checkpoint.files[0]
    found: dict[tuple[int, str], dict[str, str]] = {}
    full: dict[tuple[int, str], str] = {}
    for tensor in checkpoint.tensors:
        match = _TENSOR.fullmatch(tensor)
        if match is None or match[3] not in _PART_OF:
            raise WeftError(
                f"{file}: tensor {tensor[:200]!r} is not supported; LoRA is on the attention's and "
                "MLP's projections of the layers only"
            )
        place = (int(match[2]), match[3])
        if place[0] >= arch.num_layers:
            raise WeftError(
                f"{file}: tensor {tensor[:200]!r} is for a layer that the base does not have "
                f"(it has {arch.num_layers}); is this another model's adapter?"
            )
        if full.setdefault(place, match[1]) != match[1] or match[4] in found.get(place, {}):
            raise WeftError(f"{file}: tensor {tensor[:200]!r} is there twice")
        found.setdefault(place, {})[match[4]] = tensor
    if not found:
        raise WeftError(f"{file}: holds no LoRA tensors")
    _check_overlaps(file, set(found))
    order = {module: i for i, module in enumerate(_PART_OF)}
    return [
        _module(checkpoint, arch, settings, place, full[place], found[place])
        for place in sorted(found, key=lambda place: (place[0], order[place[1]]))
    ]


def _check_overlaps(file: Path, places: set[tuple[int, str]]) -> None:
    for layer, name in places:
        part = _PART_OF[name]
        if _WHOLE.get(part) == name and any(
            (layer, other) in places for other in _FUSED[part] if other != name
        ):
            raise WeftError(f"{file}: layer {layer} has both {name} and its parts")


def _module(
    checkpoint: Checkpoint,
    arch: Architecture,
    settings: _Settings,
    place: tuple[int, str],
    full_name: str,
    tensors: dict[str, str],
) -> _Module:
    """Check one pair of tensors against the base and the configuration."""
    file, (layer, name) = checkpoint.files[0], place
    if set(tensors) != {"A", "B"}:
        raise WeftError(f"{file}: {full_name[:200]} has only one of lora_A and lora_B")
    rank = int(_of_pattern(settings.ranks, full_name, settings.rank))
    rows, columns = _module_sizes(arch, name)
    for tensor, shape in ((tensors["A"], (rank, columns)), (tensors["B"], (rows, rank))):
        info = checkpoint.tensors[tensor]
        if info.dtype not in DTYPE_BYTES:
            raise WeftError(f"{file}: tensor {tensor[:200]!r} has dtype {info.dtype}; floats only")
        if info.shape != shape:
            raise WeftError(
                f"{file}: tensor {tensor[:200]!r} has shape {list(info.shape)}, base and "
                f"adapter_config.json ask for {list(shape)}"
            )
    alpha = _of_pattern(settings.alphas, full_name, settings.alpha)
    scale = alpha / math.sqrt(rank) if settings.root else alpha / rank
    return _Module(layer, name, rank, scale, tensors["A"], tensors["B"])


def _module_sizes(arch: Architecture, name: str) -> tuple[int, int]:
    """Outputs and inputs of one of the base's linear layers."""
    rows, columns = part_sizes(arch, _PART_OF[name])
    dim = arch.head_dim
    own = {
        "self_attn.q_proj": arch.num_q_heads * dim,
        "self_attn.k_proj": arch.num_kv_heads * dim,
        "self_attn.v_proj": arch.num_kv_heads * dim,
        "mlp.gate_proj": arch.intermediate_size,
        "mlp.up_proj": arch.intermediate_size,
    }
    return own.get(name, rows), columns
