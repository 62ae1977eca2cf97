"""The plain run: one model, one process, no scheduler. What every other way of running must equal.

Pages are scattered at random over a pool filled with NaN, so that reading a page that is not
the row's, or a position not yet written, cannot go unnoticed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from weft.attention.base import AttentionBackend, ForwardBatch, KvView
from weft.attention.reference import ReferenceAttention
from weft.core.actions import Row
from weft.core.ids import RequestId, SlotId
from weft.core.model import Architecture
from weft.core.request import Sampling
from weft.engine.sampler import SamplingBatch, sample
from weft.models.decoder import Decoder
from weft.models.hf_config import read_model_config
from weft.models.image import build_image, image_layout
from weft.models.lora import LoraWeights, TorchLora, batch_of, plan_lora
from weft.models.safetensors_file import open_checkpoint


def packed_weights(path: Path, arch: Architecture, threads: int = 1) -> torch.Tensor:
    """The model's weight image as a uint8 tensor, gaps included."""
    out = np.full(image_layout(arch).num_bytes, 0xFF, dtype=np.uint8)
    with open_checkpoint(path) as checkpoint:
        build_image(checkpoint, arch, memoryview(out), threads=threads)
    return torch.from_numpy(out)


def make_batch(
    rows: Sequence[tuple[Sequence[int], int]],
    pages: Sequence[Sequence[int]],
    *,
    sampling_rows: Sequence[int] | None = None,
) -> ForwardBatch:
    """rows: (token ids, start) each; pages: page ids of each row. Slots are row numbers."""
    counts = [len(ids) for ids, _ in rows]
    starts = [start for _, start in rows]
    offsets = np.concatenate(([0], np.cumsum(counts)))
    chosen = range(len(rows)) if sampling_rows is None else sampling_rows
    width = max(len(p) for p in pages)
    table = torch.full((len(rows), width), 1 << 30, dtype=torch.int32)  # past the end: garbage
    for slot, ids in enumerate(pages):
        table[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return ForwardBatch(
        token_ids=torch.tensor([t for ids, _ in rows for t in ids]),
        positions=torch.tensor([s + i for ids, s in rows for i in range(len(ids))]),
        token_rows=torch.tensor([r for r, n in enumerate(counts) for _ in range(n)]),
        row_offsets=torch.tensor(offsets, dtype=torch.int32),
        row_starts=torch.tensor(starts, dtype=torch.int32),
        row_tokens=torch.tensor(counts, dtype=torch.int32),
        slots=torch.arange(len(rows)),
        page_table=table,
        sample_tokens=torch.tensor([int(offsets[r + 1]) - 1 for r in chosen], dtype=torch.int64),
        starts=tuple(starts),
        num_tokens=tuple(counts),
    )


@dataclass
class PlainModel:
    """A checkpoint with a private pool of pages."""

    path: Path
    dtype: str = "auto"
    page_tokens: int = 4
    num_pages: int = 256
    context_tokens: int | None = None
    attention: AttentionBackend = field(default_factory=ReferenceAttention)
    adapter: LoraWeights | None = None
    """All rows use it."""
    arch: Architecture = field(init=False)
    decoder: Decoder = field(init=False)
    kv: KvView = field(init=False)

    def __post_init__(self) -> None:
        self.arch = read_model_config(self.path, self.dtype)
        weights = packed_weights(self.path, self.arch)
        self.decoder = Decoder(self.arch, weights, context_tokens=self.context_tokens)
        page_bytes = self.page_tokens * self.arch.kv_bytes_per_token
        raw = torch.empty(self.num_pages * page_bytes, dtype=torch.uint8)
        self.kv = self.decoder.kv_view(raw, self.page_tokens)
        self.kv.pages.fill_(float("nan"))

    def random_pages(self, tokens: int, rng: np.random.Generator) -> list[int]:
        """Distinct page ids for a request of so many tokens."""
        count = -(-tokens // self.page_tokens)
        return [int(p) for p in rng.permutation(self.num_pages)[:count]]

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits of one step."""
        self.attention.plan(batch, self.kv)
        plan = plan_lora([(self.adapter, count) for count in batch.num_tokens])
        lora = batch_of(plan, TorchLora()) if plan.groups else None
        return self.decoder.forward(batch, self.attention, self.kv, lora=lora)

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        sampling: Sampling | None = None,
        chunk: int | None = None,
        seed: int = 0,
        tamper: Callable[["PlainModel", list[int], int], None] | None = None,
    ) -> tuple[list[int], torch.Tensor]:
        """(tokens, logits [max_tokens, V]). Never stops early. The prompt goes in chunks of `chunk`
        tokens, whole if None. tamper(self, page ids, position) is called before each decode step.
        """
        pages = self.random_pages(len(prompt) + max_tokens, np.random.default_rng(seed))
        step = chunk or len(prompt)
        for at in range(0, len(prompt), step):
            logits = self.forward(make_batch([(prompt[at : at + step], at)], [pages]))
        out: list[int] = []
        kept: list[torch.Tensor] = []
        for i in range(max_tokens):
            kept.append(logits[0])
            row = Row(
                request=RequestId(0),
                slot=SlotId(0),
                start=0,
                num_tokens=1,
                input=None,
                sample=sampling or Sampling(),
                output_index=i,
            )
            out.append(int(sample(logits, SamplingBatch.from_rows([row]))[0]))
            position = len(prompt) + i
            if i + 1 < max_tokens:
                if tamper is not None:
                    tamper(self, pages, position)
                logits = self.forward(make_batch([([out[-1]], position)], [pages]))
        return out, torch.stack(kept)
