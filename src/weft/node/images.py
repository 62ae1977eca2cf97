"""Which models there are, where their weight images lie in the host store, and building them.

    0 .. images_bytes            weight images, each at a multiple of 2 MiB
    .. places.room_bytes         room for images of models that are added later
    parked_offset .. store_bytes parked KV (of all units of the node)

A model that cannot be served (unknown class, broken or too large checkpoint) gets a reason instead
of a place; the others are not touched by it.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from weft.config.pool_config import ModelConfig, PoolConfig, served_entries
from weft.core.errors import WeftError
from weft.core.ids import ModelName
from weft.core.model import AdapterShape, Architecture, ModelSpec, model_spec
from weft.engine.base import ImageRef
from weft.memory.host_store import HostStore
from weft.models.adapter import adapter_key, adapter_layout, build_adapter, read_adapter
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
    """A model or an adapter with a place for its image."""

    config: ModelConfig
    path: Path
    spec: ModelSpec
    arch: Architecture
    """Of an adapter: its base's."""
    image: ImageRef
    text_path: Path
    """Where its tokenizer is: an adapter has its base's."""
    adapter: AdapterShape | None = None


class FailedModel(msgspec.Struct, frozen=True, kw_only=True):
    config: ModelConfig
    path: Path
    reason: str


class StorePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The host store's layout."""

    models: tuple[ServedModel, ...]
    failed: tuple[FailedModel, ...]
    places: "ImagePlaces"
    parked_offset: int
    parked_bytes: int

    @property
    def images_bytes(self) -> int:
        """Where the images end now."""
        return self.places.end_bytes

    @property
    def store_bytes(self) -> int:
        return self.parked_offset + self.parked_bytes


class ImagePlaces:
    """Which image lies where in the first `room_bytes` of the store, and how many models use it.

    A place that comes free is given to the next image that fits. Where the store is registered
    with a device its memory is overwritten then; it must not be punched in between.
    """

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes
        self._images: dict[str, ImageRef] = {}
        self._users: dict[str, int] = {}

    @property
    def end_bytes(self) -> int:
        """Where the last image ends."""
        return max((image.offset + image.num_bytes for image in self._images.values()), default=0)

    @property
    def used_bytes(self) -> int:
        return sum(image.num_bytes for image in self._images.values())

    def take(self, key: str, num_bytes: int) -> ImageRef | None:
        """A place for one more user of this image, in the first gap that is large enough; None if
        there is none."""
        image = self._images.get(key)
        if image is None:
            offset = 0
            for other in sorted(self._images.values(), key=lambda image: image.offset):
                if offset + num_bytes <= other.offset:
                    break
                offset = _align(other.offset + other.num_bytes, IMAGE_ALIGN)
            if offset + num_bytes > self.room_bytes:
                return None
            image = self._images[key] = ImageRef(key=key, offset=offset, num_bytes=num_bytes)
        self._users[key] = self._users.get(key, 0) + 1
        return image

    def give(self, key: str) -> ImageRef | None:
        """One user less. Returns the image when that was the last one: its place is free."""
        self._users[key] -= 1
        if self._users[key]:
            return None
        del self._users[key]
        return self._images.pop(key)


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model's files before their weights are read."""

    path: Path
    arch: Architecture
    key: str
    """Of its image: changes when the files change."""
    num_bytes: int
    """Of its image."""
    eos_ids: tuple[int, ...]
    text_path: Path
    adapter: AdapterShape | None = None
    """It is an adapter; `arch`, `eos_ids` and `text_path` are its base's."""


def model_path(model: ModelConfig, base_dir: Path) -> Path:
    # Not Path.resolve: that raises on a link that leads to itself.
    return Path(os.path.realpath(base_dir / model.path))


def read_checkpoint(model: ModelConfig, base_dir: Path) -> Checkpoint:
    """Read config and headers, no weights. Raises WeftError, OSError."""
    path = model_path(model, base_dir)
    arch = read_model_config(path, model.dtype)
    return Checkpoint(
        path=path,
        arch=arch,
        key=_key(path, arch),
        num_bytes=image_layout(arch).num_bytes,
        eos_ids=read_eos_ids(path),
        text_path=path,
    )


def read_adapter_of(base: Checkpoint, entry: ModelConfig, base_dir: Path) -> Checkpoint:
    """The same of an adapter on `base`. Raises WeftError, OSError."""
    path = model_path(entry, base_dir)
    shape = read_adapter(path, base.arch)
    return Checkpoint(
        path=path,
        arch=base.arch,
        key=adapter_key(path, base.arch),
        num_bytes=adapter_layout(base.arch, shape).num_bytes,
        eos_ids=base.eos_ids,
        text_path=base.text_path,
        adapter=shape,
    )


def read_all(
    entries: Iterable[tuple[ModelConfig, ModelConfig | None]], base_dir: Path
) -> "dict[str, Checkpoint | str]":
    """What is known of each model's and adapter's files, by name; or why they cannot be served.
    `entries`: with the model under each adapter, which comes before it."""
    found: dict[str, Checkpoint | str] = {}
    for entry, base in entries:
        try:
            if base is None:
                found[entry.name] = read_checkpoint(entry, base_dir)
            elif isinstance(below := found[base.name], Checkpoint):
                found[entry.name] = read_adapter_of(below, entry, base_dir)
            else:
                found[entry.name] = f"its base {base.name} cannot be served: {below}"
        except (WeftError, OSError) as error:
            found[entry.name] = str(error)
    return found


def make_served(
    model: ModelConfig,
    config: PoolConfig,
    found: Checkpoint,
    image: ImageRef,
    below: str,
    base: ModelName | None = None,
) -> ServedModel:
    """`below`: the name of these weights in the scheduler (see `hub.models`); `base`: that of the
    model under an adapter. Raises WeftError."""
    spec = _spec(model, config, found, image, below)
    return ServedModel(
        config=model,
        path=found.path,
        spec=spec if base is None else msgspec.structs.replace(spec, base=base),
        arch=found.arch,
        image=image,
        text_path=found.text_path,
        adapter=found.adapter,
    )


def plan_store(
    config: PoolConfig, base_dir: Path, budget_bytes: int, *, spare_bytes: int | None = 0
) -> StorePlan:
    """Read every model's config and headers, and give out the host store. Reads no weights.

    `spare_bytes` are kept for images of models that are added later; None: a quarter of what the
    images leave.
    """
    served: list[ServedModel] = []
    failed: list[FailedModel] = []
    places = ImagePlaces(budget_bytes)
    entries = list(served_entries(config))
    known = read_all(entries, base_dir)
    for model, base in entries:
        try:
            found = known[model.name]
            if isinstance(found, str):
                raise WeftError(found)
            if base is not None and any(other.config.name == base.name for other in failed):
                raise WeftError(f"its base {base.name} cannot be served")
            image = places.take(found.key, found.num_bytes)
            if image is None:
                raise WeftError(
                    f"{found.path}: {found.num_bytes >> 20} MiB of weights do not fit the host "
                    f"store of {budget_bytes >> 20} MiB beside the models before it; raise "
                    "engine.host_memory"
                )
            try:
                below = None if base is None else ModelName(base.name)
                served.append(make_served(model, config, found, image, model.name, below))
            except (WeftError, OSError):
                places.give(found.key)
                raise
        except (WeftError, OSError) as error:
            path = model_path(model, base_dir)
            failed.append(FailedModel(config=model, path=path, reason=str(error)))
    end = places.end_bytes
    left = budget_bytes - end
    spare = left // 4 if spare_bytes is None else min(spare_bytes, left)
    places.room_bytes = end + _floor(spare, 4096)
    parked_bytes = _floor(budget_bytes - places.room_bytes, 4096)
    parked_offset = _align(places.room_bytes, 4096)
    if parked_offset + parked_bytes > CHUNK_BYTES:
        # Whole chunks of its own. The hole before it takes no memory: the store is sparse.
        parked_offset = _align(places.room_bytes, CHUNK_BYTES)
    return StorePlan(
        models=tuple(served),
        failed=tuple(failed),
        places=places,
        parked_offset=parked_offset,
        parked_bytes=parked_bytes,
    )


def _spec(
    model: ModelConfig, config: PoolConfig, found: Checkpoint, image: ImageRef, below: str
) -> ModelSpec:
    ttft_s, tbt_s, keep_s = model.ttft_slo_s, model.tbt_slo_s, model.keep_alive_s
    return model_spec(
        below,
        found.arch,
        weight_bytes=image.num_bytes,
        eos_ids=found.eos_ids,
        max_context_tokens=model.max_context_tokens,
        pinned=model.pinned,
        preload=model.preload,
        keep_alive_s=config.keep_alive_s if keep_s is None else keep_s,
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
    """Write the model's image into the store. Returns None, or why it cannot be served.

    For a thread: numpy lets go of the interpreter while it copies.
    """
    image = model.image
    try:
        view = host.view(image.offset, image.num_bytes)
        if model.adapter is not None:
            build_adapter(model.path, model.arch, model.adapter, view)
            progress(image.num_bytes)
            key = adapter_key(model.path, model.arch)
        else:
            with open_checkpoint(model.path) as checkpoint:
                build_image(checkpoint, model.arch, view, progress, threads)
            key = _key(model.path, model.arch)
        if key == image.key:
            return None
        reason = f"{model.path}: changed while it was read; reload when it is complete"
    except BuildStopped:
        raise
    except (WeftError, OSError) as error:
        reason = str(error)
    except Exception as error:
        # A checkpoint that trips our reader is a fault of one model, not of the pool.
        log.exception("building the image of %s failed", model.config.name)
        reason = f"{model.path}: cannot be read: {type(error).__name__}: {error}"
    return reason


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


def _floor(value: int, to: int) -> int:
    return max(0, value // to * to)
