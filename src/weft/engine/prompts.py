"""What a step reports of prompts: log probabilities of what follows each token, and pooled states.

Shape legend: T tokens of a step, P scored positions, H hidden size, V vocabulary.
"""

import numpy as np
import torch

from weft.core.actions import Row, StepPlan
from weft.engine.logprobs import score
from weft.engine.step import Step
from weft.models.decoder import Decoder, LayerStates

SLICE_TOKENS = 64
"""Positions whose logits exist at once: 64 x 150,000 x 4 bytes are 38 MB."""


def scored_positions(plan: StepPlan) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the step with a target, and the targets, row by row: int64 [P] each."""
    places: list[int] = []
    targets: list[int] = []
    at = 0
    for row in plan.rows:
        places.extend(range(at, at + len(row.targets)))
        targets.extend(row.targets)
        at += row.num_tokens
    return np.array(places, dtype=np.int64), np.array(targets, dtype=np.int64)


def report_prompts(step: Step, states: LayerStates) -> None:
    """Launch what the rows' `targets` and `embed` ask for, and the copies to the host."""
    assert step.prompt_parts is not None
    decoder, rows = step.model.decoder, step.plan.rows
    tokens_P, targets_P = step.prompt_parts
    if len(targets_P):
        top = max(row.target_logprobs for row in rows if row.targets)
        scored = _score(decoder, states, tokens_P, targets_P, top)
        step.prompt_scored = step.buffers.result("prompt", tuple(scored.shape), torch.float64)
        step.prompt_scored.copy_(scored, non_blocking=True)
    if any(row.embed is not None for row in rows):
        pooled = _pool(decoder, states, rows)
        step.pooled = step.buffers.result("pooled", tuple(pooled.shape), torch.float32)
        step.pooled.copy_(pooled, non_blocking=True)


def _score(
    decoder: Decoder,
    states: LayerStates,
    tokens_P: torch.Tensor,
    targets_P: torch.Tensor,
    top: int,
) -> torch.Tensor:
    """See `logprobs.score`; slice by slice, so that memory does not grow with the step."""
    parts: list[torch.Tensor] = []
    for at in range(0, len(tokens_P), SLICE_TOKENS):
        chosen = slice(at, at + SLICE_TOKENS)
        logits_PV = decoder.logits(decoder.final_states(states, tokens_P[chosen]))
        parts.append(score(logits_PV, targets_P[chosen], top))
    return torch.cat(parts)


def _pool(decoder: Decoder, states: LayerStates, rows: tuple[Row, ...]) -> torch.Tensor:
    """float32 [rows with `embed`, H]. Sums are made in float32, of float64 in float64."""
    parts: list[torch.Tensor] = []
    at = 0
    for row in rows:
        first, at = at, at + row.num_tokens
        if row.embed is None:
            continue
        first = at - 1 if row.embed == "last" else first
        part = LayerStates(states.delta_TH[first:at], states.residual_TH[first:at])
        chosen = torch.arange(at - first, device=part.delta_TH.device)
        x_TH = decoder.final_states(part, chosen)
        wide = torch.float64 if x_TH.dtype == torch.float64 else torch.float32
        parts.append(x_TH.to(wide).sum(0).to(torch.float32))
    return torch.stack(parts)
