"""A model as an executor holds it: views over its address ranges and its rows' device state.

Shape legend: N slots.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from weft.attention.base import KvView
from weft.core.model import Architecture, ModelSpec
from weft.core.unit import UnitSpec
from weft.engine.base import ImageRef
from weft.memory.base import Arena
from weft.models.decoder import Decoder
from weft.models.layout import ImageLayout, image_layout


@dataclass(frozen=True)
class BoundModel:
    """A model an executor knows: views over its two ranges and its device-side row state."""

    spec: ModelSpec
    arch: Architecture
    image: ImageRef
    layout: ImageLayout
    decoder: Decoder
    weights_bytes: torch.Tensor
    """uint8 over the whole weight range."""
    kv_bytes: torch.Tensor
    """uint8 over the whole KV range."""
    kv: KvView
    page_table: torch.Tensor
    """int32 [N, pages of the longest context that the arena can hold]: page ids of each slot."""


def kv_range_bytes(unit: UnitSpec) -> int:
    """Size of every model's virtual KV range: as many granules as the arena has."""
    return unit.num_granules * unit.granule_bytes


def bind_model(
    arena: Arena,
    unit: UnitSpec,
    spec: ModelSpec,
    arch: Architecture,
    image: ImageRef,
    make_decoder: Callable[..., Decoder] = Decoder,
) -> BoundModel:
    """Reserve the ranges of a model and make the views over them. Reads nothing that is mapped.

    Raises ValueError if spec, architecture and image do not fit together, ArenaError if the name
    is bound already or there is no address space.
    """
    layout = image_layout(arch)
    if image.num_bytes != layout.num_bytes or spec.weight_bytes != layout.num_bytes:
        raise ValueError(
            f"{spec.name}: the image has {image.num_bytes} bytes and the spec {spec.weight_bytes}, "
            f"the architecture needs {layout.num_bytes}"
        )
    if spec.page_bytes != spec.page_tokens * arch.kv_bytes_per_token:
        raise ValueError(f"{spec.name}: page_bytes {spec.page_bytes} do not fit the architecture")
    arena.reserve(spec.name, layout.num_bytes, kv_range_bytes(unit))
    try:
        weights = arena.tensor(spec.name, "weights")
        kv_bytes = arena.tensor(spec.name, "kv")
        # No request is longer than the pages there are, however long a context config.json claims.
        asked = -(-spec.max_context_tokens // spec.page_tokens)
        max_pages = max(1, min(asked, kv_bytes.numel() // spec.page_bytes))
        max_tokens = min(spec.max_context_tokens, max_pages * spec.page_tokens)
        decoder = make_decoder(
            arch, weights, max_tokens=max_tokens, context_tokens=spec.max_context_tokens
        )
        return BoundModel(
            spec=spec,
            arch=arch,
            image=image,
            layout=layout,
            decoder=decoder,
            weights_bytes=weights,
            kv_bytes=kv_bytes,
            kv=decoder.kv_view(kv_bytes, spec.page_tokens),
            page_table=torch.zeros(
                (unit.num_slots, max_pages), dtype=torch.int32, device=weights.device
            ),
        )
    except BaseException:
        arena.release(spec.name)
        raise
