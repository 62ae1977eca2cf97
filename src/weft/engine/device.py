"""What the device is and how much of it the arena gets. Asked once, at the worker's start."""

import importlib.util
import os
from typing import Literal

import msgspec
import torch

from weft.core.errors import WeftError
from weft.memory.limits import memory_limit_bytes

CPU_GRANULE_BYTES = 1 << 20
CUDA_GRANULE_BYTES = 64 << 20
CPU_SHARE = 0.25
ENGINE_SHARE, ENGINE_BYTES = 0.02, 2 << 30
"""On CUDA, kept for activations, logits and workspaces: this share of the device and at least
these bytes, on top of what context and libraries were measured to take."""


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    kind: Literal["cpu", "cuda"]
    name: str
    granule_bytes: int
    arena_bytes: int
    """A multiple of granule_bytes: weights and KV of all models together."""


def probe(kind: Literal["auto", "cpu", "cuda"], device_memory_bytes: int | None) -> DeviceFacts:
    """Look at the device; on CUDA this creates its context and measures what that takes.

    device_memory_bytes: the arena's size; None takes 25 % of the memory on a CPU, and what the
    engine leaves on CUDA. Raises WeftError if there is no such device or not that much memory.
    """
    missing = _cuda_misses()
    if kind == "cuda" and missing:
        raise WeftError(f"no CUDA device can be used: {missing}")
    if kind == "cpu" or missing:
        return _probe_cpu(device_memory_bytes)
    return _probe_cuda(device_memory_bytes)


def _cuda_misses() -> str | None:
    """Why CUDA cannot be used, None if it can."""
    if not torch.cuda.is_available():
        return "torch sees none; check the driver, or set engine.device to cpu"
    for module in ("triton", "cuda.bindings"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"the package {module} is missing; install weft[gpu]"
    return None


def _facts(
    kind: Literal["cpu", "cuda"], name: str, granule: int, usable: int, wanted: int | None
) -> DeviceFacts:
    if wanted is not None and wanted > usable:
        raise WeftError(
            f"engine.device_memory is {wanted >> 20} MiB, {name} has {usable >> 20} MiB for it; "
            "lower it or leave it out"
        )
    size = (usable if wanted is None else wanted) // granule * granule
    if size <= 0:
        raise WeftError(f"{name} has no memory for weights; set engine.device_memory")
    return DeviceFacts(kind=kind, name=name, granule_bytes=granule, arena_bytes=size)


def _probe_cpu(wanted: int | None) -> DeviceFacts:
    total = memory_limit_bytes()
    name = f"CPU with {len(os.sched_getaffinity(0))} cores"
    if wanted is None:
        return _facts("cpu", name, CPU_GRANULE_BYTES, int(total * CPU_SHARE), None)
    return _facts("cpu", name, CPU_GRANULE_BYTES, total, wanted)


def _probe_cuda(wanted: int | None) -> DeviceFacts:
    device = torch.device("cuda", torch.cuda.current_device())
    # A product of each kind makes the libraries load their kernels and take their workspaces.
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones((64, 64), dtype=dtype, device=device)
        torch.mm(x, x)
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    usable = free - max(ENGINE_BYTES, int(total * ENGINE_SHARE))
    name = torch.cuda.get_device_name(device)
    return _facts("cuda", name, CUDA_GRANULE_BYTES, max(0, usable), wanted)
