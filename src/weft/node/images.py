"""Which models there are, where their weight images lie in the host store, and building them.

    0 .. images_bytes            weight images, one after the other, each at a multiple of 2 MiB
    parked_offset .. store_bytes parked KV (of all units of the node)

A model that cannot be served (unknown class, broken or too large checkpoint) gets a reason instead
of a place; the others are not touched by it.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from weft.config.pool_config import ModelConfig, PoolConfig
from weft.core.errors import WeftError
from weft.core.model import Architecture, ModelSpec, model_spec
from weft.engine.base import ImageRef
from weft.memory.host_store import HostStore
from weft.models.hf_config import read_eos_ids, read_model_config
from weft.models.image import build_image, image_key, image_layout
from weft.models.safetensors_file import open_checkpoint

log = logging.getLogger("weft.node")

IMAGE_ALIGN = 2 << 20
CHUNK_BYTES = 1 << 30
"""As `UnitSpec.host_chunk_bytes`: copies may not cross separately registered chunks."""


class BuildStopped(Exception):
    """Raised by a `progress` callback to end a build; `build` lets it through."""


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model with a place for its image."""

    config: ModelConfig
    path: Path
    spec: ModelSpec
    arch: Architecture
    image: ImageRef


class FailedModel(msgspec.Struct, frozen=True, kw_only=True):
    config: ModelConfig
    path: Path
    reason: str


class StorePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The host store's layout."""

    models: tuple[ServedModel, ...]
    failed: tuple[FailedModel, ...]
    images_bytes: int
    parked_offset: int
    parked_bytes: int

    @property
    def store_bytes(self) -> int:
        return self.parked_offset + self.parked_bytes


def plan_store(config: PoolConfig, base_dir: Path, budget_bytes: int) -> StorePlan:
    """Read every model's config and headers, and give out the host store. Reads no weights."""
    served: list[ServedModel] = []
    failed: list[FailedModel] = []
    images: dict[str, ImageRef] = {}
    end = 0
    for model in config.models:
        # Not Path.resolve: that raises on a link that leads to itself, here still outside the try.
        path = Path(os.path.realpath(base_dir / model.path))
        try:
            arch = read_model_config(path, model.dtype)
            key = _key(path, arch)
            image = images.get(key)
            if image is None:
                size = image_layout(arch).num_bytes
                if _align(end, IMAGE_ALIGN) + size > budget_bytes:
                    raise WeftError(
                        f"{path}: {size >> 20} MiB of weights do not fit the host store of "
                        f"{budget_bytes >> 20} MiB beside the models before it; raise "
                        "engine.host_memory"
                    )
                image = ImageRef(key=key, offset=_align(end, IMAGE_ALIGN), num_bytes=size)
                images[key] = image
                end = image.offset + size
            spec = _spec(model, config, arch, path, image)
        except (WeftError, OSError) as error:
            failed.append(FailedModel(config=model, path=path, reason=str(error)))
        else:
            served.append(ServedModel(config=model, path=path, spec=spec, arch=arch, image=image))
    parked_bytes = _floor(budget_bytes - end, 4096)
    parked_offset = _align(end, 4096)
    if parked_offset + parked_bytes > CHUNK_BYTES:
        # Whole chunks of its own. The hole before it takes no memory: the store is sparse.
        parked_offset = _align(end, CHUNK_BYTES)
    return StorePlan(
        models=tuple(served),
        failed=tuple(failed),
        images_bytes=end,
        parked_offset=parked_offset,
        parked_bytes=parked_bytes,
    )


def _spec(
    model: ModelConfig, config: PoolConfig, arch: Architecture, path: Path, image: ImageRef
) -> ModelSpec:
    ttft_s, tbt_s = model.ttft_slo_s, model.tbt_slo_s
    return model_spec(
        model.name,
        arch,
        weight_bytes=image.num_bytes,
        eos_ids=read_eos_ids(path),
        max_context_tokens=model.max_context_tokens,
        pinned=model.pinned,
        weight=model.weight,
        ttft_slo_s=config.slo.ttft_s if ttft_s is None else ttft_s,
        tbt_slo_s=config.slo.tbt_s if tbt_s is None else tbt_s,
    )


def _key(path: Path, arch: Architecture) -> str:
    """`image_key`, told apart by the files themselves: it goes by size and time, and two small
    checkpoints may be written within one tick of the file system's clock."""
    files = sorted(path.glob("*.safetensors"))
    stats = [os.stat(file) for file in files]
    who = ",".join(f"{s.st_dev}:{s.st_ino}" for s in stats)
    return hashlib.blake2b(f"{image_key(path, arch)} {who}".encode(), digest_size=32).hexdigest()


def build(
    model: ServedModel, host: HostStore, progress: Callable[[int], None], threads: int
) -> str | None:
    """Write the model's image into the store. Returns None, or why it cannot be served; the
    place is a hole again then. For a thread: numpy lets go of the interpreter while it copies."""
    image = model.image
    try:
        with open_checkpoint(model.path) as checkpoint:
            view = host.view(image.offset, image.num_bytes)
            build_image(checkpoint, model.arch, view, progress, threads)
        if _key(model.path, model.arch) == image.key:
            return None
        reason = f"{model.path}: changed while it was read; start again when it is complete"
    except BuildStopped:
        raise
    except (WeftError, OSError) as error:
        reason = str(error)
    except Exception as error:
        # A checkpoint that trips our reader is a fault of one model, not of the pool.
        log.exception("building the image of %s failed", model.config.name)
        reason = f"{model.path}: cannot be read: {type(error).__name__}: {error}"
    host.punch(image.offset, image.num_bytes)
    return reason


def by_image(models: Sequence[ServedModel]) -> list[list[ServedModel]]:
    """Models that share one image, in the order of their first."""
    groups: dict[str, list[ServedModel]] = {}
    for model in models:
        groups.setdefault(model.image.key, []).append(model)
    return list(groups.values())


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


def _floor(value: int, to: int) -> int:
    return max(0, value // to * to)
