"""LoRA in a forward pass: different adapters and the bare base in one step.

A step's tokens are grouped by adapter. After each fused product y = x W the decoder lets every
group add x a^T b^T of its adapter (see `models.adapter` for a and b); tokens of the bare base are
in no group. What a token gets depends on its own adapter only, not on who else is in the step.

Shape legend: T tokens of the step, N tokens with an adapter, I inputs, O outputs, R rank,
L layers, B blocks.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from weft.core.model import AdapterShape, Architecture
from weft.models.adapter import PARTS, adapter_layout

BLOCK_TOKENS = 16
"""A block is up to so many tokens of one group: what a kernel's program takes."""


class LoraWeights:
    """Typed views over the image of one adapter. Making them reads no weight byte."""

    def __init__(self, arch: Architecture, shape: AdapterShape, weights: torch.Tensor) -> None:
        """weights: uint8, at least the whole image, on the device the base runs on."""
        layout = adapter_layout(arch, shape)
        if weights.dtype != torch.uint8 or weights.numel() < layout.num_bytes:
            raise ValueError(f"need {layout.num_bytes} bytes of weights as uint8")
        views = {
            name: weights[entry.offset : entry.offset + entry.num_bytes]
            .view(getattr(torch, entry.dtype))
            .view(entry.shape)
            for name, entry in layout.tensors.items()
        }
        self.shape = shape
        self.a_RI = {
            (i, part): views[f"layers.{i}.{part}.a"]
            for i, ranks in enumerate(shape.ranks)
            for part, rank in zip(PARTS, ranks, strict=True)
            if rank
        }
        self.b_OR = {(i, part): views[f"layers.{i}.{part}.b"] for i, part in self.a_RI}
        self.table = torch.tensor(
            [
                [self._address(self.a_RI, i, part), self._address(self.b_OR, i, part), rank]
                for i, ranks in enumerate(shape.ranks)
                for part, rank in zip(PARTS, ranks, strict=True)
            ],
            dtype=torch.int64,
            device=weights.device,
        )
        """int64 [L * 4, 3] on the device: addresses of a and b, and the rank, of each product."""
        self.table_address = self.table.data_ptr()

    @staticmethod
    def _address(views: dict[tuple[int, str], torch.Tensor], layer: int, part: str) -> int:
        view = views.get((layer, part))
        return 0 if view is None else view.data_ptr()


class LoraGroup(NamedTuple):
    """The tokens of a step that use one adapter: entries first .. first + count - 1 of
    `LoraBatch.tokens_N`."""

    weights: LoraWeights
    first: int
    count: int


class LoraPlan(NamedTuple):
    """A step's groups as plain numbers, to be copied to the device."""

    groups: tuple[LoraGroup, ...]
    tokens: list[int]
    """Places in the step of the tokens of each group, one group after another."""
    blocks: list[int]
    """Three words a block: address of the adapter's table, first entry of `tokens`, count."""
    widths: tuple[tuple[int, ...], ...]
    """Per layer and product the highest rank that any group has there."""

    @property
    def caps(self) -> tuple[int, ...]:
        """For each product a rank that no layer exceeds: 0, or a power of two. Few different ones
        come up, so steps that have them in common may share a graph."""
        highest = (max(layer[i] for layer in self.widths) for i in range(len(PARTS)))
        return tuple(1 << (rank - 1).bit_length() if rank else 0 for rank in highest)


class LoraBatch(NamedTuple):
    """What the decoder is given. Tensors are on the model's device."""

    groups: tuple[LoraGroup, ...]
    tokens_N: torch.Tensor
    """int64: indices of tokens of the step, all different."""
    blocks_B3: torch.Tensor
    """int64, as `LoraPlan.blocks`; those of no token may be anywhere."""
    widths: tuple[tuple[int, ...], ...]
    """As in `LoraPlan`, or more."""
    ops: "LoraOps"

    @property
    def block_tokens(self) -> int:
        return BLOCK_TOKENS

    def place(self, layer: int, part: str) -> int:
        """Row of a product in `LoraWeights.table`."""
        return layer * len(PARTS) + PARTS.index(part)

    def rank(self, layer: int, part: str) -> int:
        """No group has a higher one there."""
        return self.widths[layer][PARTS.index(part)]

    def add(self, y_TO: torch.Tensor, x_TI: torch.Tensor, layer: int, part: str) -> torch.Tensor:
        """y with what the adapters make of x added, in place."""
        if self.rank(layer, part):
            self.ops.add(y_TO, x_TI, self, layer, part)
        return y_TO


class LoraOps(Protocol):
    """The seam for fused kernels. Implementations are stateless."""

    def add(
        self, y_TO: torch.Tensor, x_TI: torch.Tensor, batch: LoraBatch, layer: int, part: str
    ) -> None:
        """Add to the rows `batch.tokens_N` of y, in place, and touch no other."""
        ...


class TorchLora:
    """The plain implementation, on any device: some small operations per adapter."""

    def add(
        self, y_TO: torch.Tensor, x_TI: torch.Tensor, batch: LoraBatch, layer: int, part: str
    ) -> None:
        for weights, first, count in batch.groups:
            a_RI = weights.a_RI.get((layer, part))
            if a_RI is None:
                continue
            tokens = batch.tokens_N[first : first + count]
            low_NR = torch.mm(x_TI[tokens], a_RI.t())
            # No index comes twice, so nothing here depends on an order of additions.
            y_TO.index_add_(0, tokens, torch.mm(low_NR, weights.b_OR[layer, part].t()))


def batch_of(plan: LoraPlan, ops: LoraOps, device: torch.device | str = "cpu") -> LoraBatch:
    """The plan in tensors of its own."""
    tokens = torch.tensor(plan.tokens, dtype=torch.int64, device=device)
    blocks = torch.tensor(plan.blocks, dtype=torch.int64, device=device).view(-1, 3)
    return LoraBatch(plan.groups, tokens, blocks, plan.widths, ops)


def plan_lora(rows: Sequence[tuple[LoraWeights | None, int]]) -> LoraPlan:
    """rows: adapter and number of tokens of each row of a step, in order."""
    places: dict[int, list[int]] = {}
    weights_of: dict[int, LoraWeights] = {}
    at = 0
    for weights, count in rows:
        if weights is not None:
            places.setdefault(weights.table_address, []).extend(range(at, at + count))
            weights_of[weights.table_address] = weights
        at += count
    groups: list[LoraGroup] = []
    tokens: list[int] = []
    blocks: list[int] = []
    for address, own in places.items():
        groups.append(LoraGroup(weights_of[address], len(tokens), len(own)))
        for first in range(0, len(own), BLOCK_TOKENS):
            blocks += [address, len(tokens) + first, min(BLOCK_TOKENS, len(own) - first)]
        tokens += own
    shapes = [group.weights.shape.ranks for group in groups]
    widths = tuple(
        tuple(max(ranks) for ranks in zip(*layers, strict=True))
        for layers in zip(*shapes, strict=True)
    )
    return LoraPlan(tuple(groups), tokens, blocks, widths)
