"""Random cases for the attention kernels, the same for the interpreter and the device."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class AttentionCase:
    """A pool of several layers, of which `layer` is read, and rows at random pages."""

    q: torch.Tensor
    kv: torch.Tensor
    table: torch.Tensor
    slots: list[int]
    starts: list[int]
    counts: list[int]
    scale: float
    window: int = 0
    cap: float | None = None

    @property
    def how(self) -> dict[str, Any]:
        """Scale, window and cap, as the kernels take them."""
        return {"scale": self.scale, "window": self.window, "cap": self.cap}

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    def int32(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.q.device)

    def row_tokens(self) -> list[int]:
        """Index of each row's first token."""
        return [sum(self.counts[:i]) for i in range(len(self.counts))]


def attention_case(
    *,
    seed: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    page_tokens: int,
    starts: list[int],
    counts: list[int],
    dtype: torch.dtype,
    device: str = "cpu",
    layers: int = 3,
    layer: int = 1,
    window: int = 0,
    cap: float | None = None,
) -> AttentionCase:
    gen = torch.Generator().manual_seed(seed)
    rows = len(starts)
    need = [-(-(s + c) // page_tokens) for s, c in zip(starts, counts, strict=True)]
    pages = sum(need) + 3
    pool = torch.randn(pages, layers, 2, page_tokens, kv_heads, head_dim, generator=gen)
    order = torch.randperm(pages, generator=gen)
    slots = torch.randperm(rows + 2, generator=gen)[:rows].tolist()
    # Entries that no row owns are absurd: reading them would fault or corrupt.
    table = torch.full((rows + 2, max(need) + 2), 2**30, dtype=torch.int32)
    at = 0
    for slot, n in zip(slots, need, strict=True):
        table[slot, :n] = order[at : at + n].int()
        at += n
    q = torch.randn(sum(counts), q_heads, head_dim, generator=gen)
    # Poison what lies past each row's last token: a kernel that reads it shows it.
    for slot, start, count in zip(slots, starts, counts, strict=True):
        last = start + count
        pool[int(table[slot, (last - 1) // page_tokens]), :, :, (last - 1) % page_tokens + 1 :] = (
            float("nan")
        )
        # The same for what lies before its window; whole pages of that are nobody's.
        oldest = max(0, start - window + 1) if window else 0
        page, offset = oldest // page_tokens, oldest % page_tokens
        pool[int(table[slot, page]), :, :, :offset] = float("nan")
        table[slot, :page] = 2**30
    return AttentionCase(
        q=q.to(device, dtype),
        kv=pool.to(device, dtype)[:, layer],
        table=table.to(device),
        slots=slots,
        starts=starts,
        counts=counts,
        scale=head_dim**-0.5 if cap is None else 1.0,
        window=window,
        cap=cap,
    )


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out.double() - ref.double()).norm() / ref.double().norm())
