"""LoRA adapters as an executor holds them, and which rows of a step use which."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from weft.core.actions import StepPlan
from weft.core.ids import ModelName
from weft.core.model import AdapterShape, Architecture, ModelSpec
from weft.engine.base import ImageRef
from weft.memory.base import Arena
from weft.models.adapter import adapter_layout
from weft.models.layout import ImageLayout
from weft.models.lora import LoraBatch, LoraOps, LoraPlan, LoraWeights, TorchLora, plan_lora


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter an executor knows: views over its weight range. It has no KV."""

    spec: ModelSpec
    image: ImageRef
    layout: ImageLayout
    weights_bytes: torch.Tensor
    """uint8 over the whole weight range."""
    lora: LoraWeights


def bind_adapter(
    arena: Arena, spec: ModelSpec, arch: Architecture, shape: AdapterShape, image: ImageRef
) -> BoundAdapter:
    """Reserve the range of an adapter on a base of `arch`, and make the views over it. Reads
    nothing that is mapped.

    Raises ValueError if spec, shape and image do not fit together, ArenaError as `bind_model`.
    """
    layout = adapter_layout(arch, shape)
    if spec.base is None or len(shape.ranks) != arch.num_layers:
        raise ValueError(f"{spec.name}: not an adapter for {arch.num_layers} layers")
    if image.num_bytes != layout.num_bytes or spec.weight_bytes != layout.num_bytes:
        raise ValueError(
            f"{spec.name}: the image has {image.num_bytes} bytes and the spec {spec.weight_bytes}, "
            f"the adapter needs {layout.num_bytes}"
        )
    arena.reserve(spec.name, layout.num_bytes, 0)
    try:
        weights = arena.tensor(spec.name, "weights")
        return BoundAdapter(spec, image, layout, weights, LoraWeights(arch, shape, weights))
    except BaseException:
        arena.release(spec.name)
        raise


def adapters_of(plan: StepPlan) -> list[ModelName]:
    """The adapters a step uses, each once, in order of its rows."""
    return list(dict.fromkeys(row.adapter for row in plan.rows if row.adapter is not None))


class StepAdapters:
    """Lays out steps whose rows use adapters. Made once an executor."""

    def __init__(
        self, bound: Mapping[ModelName, BoundAdapter] | None = None, ops: LoraOps | None = None
    ) -> None:
        """bound: what the executor knows now, whenever it is asked. ops: default torch."""
        self._bound: Mapping[ModelName, BoundAdapter] = {} if bound is None else bound
        self._ops: LoraOps = ops or TorchLora()

    def plan(self, plan: StepPlan) -> LoraPlan | None:
        """None where all rows use the bare base. Raises ValueError for an adapter that is not
        bound, or is one of another model."""
        if not adapters_of(plan):
            return None
        rows = []
        for row in plan.rows:
            adapter = None if row.adapter is None else self._bound.get(row.adapter)
            if row.adapter is not None and (adapter is None or adapter.spec.base != plan.model):
                raise ValueError(f"{plan.model} has no adapter {row.adapter!r}")
            rows.append((None if adapter is None else adapter.lora, row.num_tokens))
        return plan_lora(rows)

    @staticmethod
    def arrays(plan: LoraPlan | None) -> list[np.ndarray]:
        """What `batch` needs on the device: tokens and blocks, flat int64."""
        words = ([], []) if plan is None else (plan.tokens, plan.blocks)
        return [np.array(one, dtype=np.int64) for one in words]

    def batch(
        self, plan: LoraPlan | None, tokens: torch.Tensor, blocks: torch.Tensor
    ) -> LoraBatch | None:
        """With `arrays` on the device."""
        if plan is None:
            return None
        return LoraBatch(plan.groups, tokens, blocks.view(-1, 3), plan.widths, self._ops)

    @property
    def ops(self) -> LoraOps:
        return self._ops
