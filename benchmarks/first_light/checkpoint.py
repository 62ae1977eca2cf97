"""A random checkpoint of any shape in Hugging Face layout, written fast, and its image."""

import json
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from weft.core.model import DTYPE_BYTES, Architecture
from weft.memory.host_store import HostStore
from weft.models.hf_config import read_model_config
from weft.models.image import build_image, expected_tensors, image_layout
from weft.models.safetensors_file import open_checkpoint

SHARDS = 8
THREADS = 16


def _std(name: str, shape: tuple[int, ...], layers: int) -> float:
    """Branches as large as what they add to, scores of std 2, logits of std 3: attention matters,
    and rounding errors do not grow without bounds."""
    if "embed_tokens" in name:
        return 1.0
    if name.endswith("bias"):
        return 0.3
    gain = {"q_proj": 1.4, "k_proj": 1.4, "lm_head": 3.0}
    gain |= {"o_proj": 3.0 / layers**0.5, "down_proj": 3.0 / layers**0.5}
    factor = next((value for key, value in gain.items() if key in name), 1.0)
    return factor / shape[-1] ** 0.5


def _random(name: str, shape: tuple[int, ...], arch: Architecture, seed: int) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gen = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=gen, device=device)
    x = 1.0 + 0.1 * x if "norm" in name else x * _std(name, shape, arch.num_layers)
    return x.to(getattr(torch, arch.dtype)).cpu()


def write_checkpoint(folder: Path, config: dict[str, Any]) -> dict[str, float]:
    """config.json and sharded random weights. Returns what it took."""
    begin = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arch = read_model_config(folder)
    names = list(expected_tensors(arch).items())
    parts = [names[i::SHARDS] for i in range(SHARDS)]
    seeds = {name: i for i, (name, _) in enumerate(names)}

    def write(index: int) -> dict[str, str]:
        file = f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors"
        _write_shard(folder / file, parts[index], arch, seeds)
        return {name: file for name, _ in parts[index]}

    with ThreadPoolExecutor(SHARDS) as pool:
        where: dict[str, str] = {}
        for placed in pool.map(write, range(SHARDS)):
            where |= placed
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"seconds": time.perf_counter() - begin, "bytes": size}


def _write_shard(
    path: Path,
    tensors: list[tuple[str, tuple[int, ...]]],
    arch: Architecture,
    seeds: dict[str, int],
) -> None:
    kind = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}[arch.dtype]
    header: dict[str, Any] = {}
    at = 0
    for name, shape in tensors:
        size = DTYPE_BYTES[arch.dtype]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors:
            values = _random(name, shape, arch, seeds[name])
            out.write(memoryview(values.view(torch.uint8).numpy()))


def build_into(host: HostStore, folder: Path, arch: Architecture) -> float:
    """The image at the beginning of the store. Returns seconds."""
    begin = time.perf_counter()
    size = image_layout(arch).num_bytes
    with open_checkpoint(folder) as checkpoint, host.view(0, size) as out:
        build_image(checkpoint, arch, out, threads=THREADS)
    return time.perf_counter() - begin
