"""One plan being executed, and what it reports."""

from collections.abc import Sequence

import torch

from weft.core.actions import Run, StepPlan
from weft.core.events import StepDone
from weft.core.request import TokenLogprobs
from weft.engine.adjust import Bias
from weft.engine.logprobs import unpack
from weft.engine.model import BoundModel
from weft.engine.sampler import SamplingBatch
from weft.engine.staging import NO_TOKEN, Buffers
from weft.models.lora import LoraBatch


class Step:
    """Made by `Runner.prepare`; `release` gives its buffers back. What it says of an iteration may
    be read when that iteration's copies to the host have arrived."""

    def __init__(self, plan: StepPlan, model: BoundModel, buffers: Buffers) -> None:
        self.plan = plan
        self.model = model
        self.buffers = buffers
        self.launched = 0
        """Iterations launched so far."""
        self.sampling_rows = [j for j, row in enumerate(plan.rows) if row.sample is not None]
        self.row_starts = tuple(row.start for row in plan.rows)
        self.row_tokens = tuple(row.num_tokens for row in plan.rows)
        self.bucket: int | None = None
        """Rows that the step was filled up to; None: it was not."""
        self.sampling: SamplingBatch | None = None
        self.bias: Bias | None = None
        self.lora: LoraBatch | None = None
        self.lora_caps: tuple[int, ...] = ()
        """Of a step that is filled up and has adapters: see `LoraPlan.caps`."""
        self.complete: set[int] = set()
        """Rows whose grammar lets nothing follow."""
        self.errors: dict[int, str] = {}
        """Why a row cannot go on, as "code: message"."""
        self.scoring: list[tuple[int, int]] = [
            (i, row.sample.logprobs)
            for i, row in enumerate(plan.rows[j] for j in self.sampling_rows)
            if row.sample is not None and row.sample.logprobs is not None
        ]
        """Sampling rows that report the log probability of what they draw, and how many others'."""
        self.scoring_rows: torch.Tensor | None = None
        """The same rows, int64 on the device; None where none does."""
        self.scored: torch.Tensor | None = None
        """float64 [repeat, scoring rows, ..] on the host: see `logprobs.score`."""
        self.prompt_parts: tuple[torch.Tensor, torch.Tensor] | None = None
        """Tokens of the step to score and their targets, int64 [P] on the device; None where no row
        reports of its prompt."""
        self.prompt_scored: torch.Tensor | None = None
        """float64 [P, ..] on the host: all rows' targets, one after another."""
        self.pooled: torch.Tensor | None = None
        """float32 [rows with `embed`, H] on the host."""

    def tokens(self, iteration: int) -> tuple[int, ...]:
        """The token each row drew, NO_TOKEN where none."""
        drawn = self.buffers.tokens[iteration, : len(self.sampling_rows)].tolist()
        out = [NO_TOKEN] * len(self.plan.rows)
        for j, token in zip(self.sampling_rows, drawn, strict=True):
            if j not in self.complete and j not in self.errors:
                out[j] = token
        return tuple(out)

    def logprobs(self, iteration: int) -> tuple[TokenLogprobs | None, ...]:
        """Per row, for the rows that asked; empty where none did."""
        if self.scored is None:
            return ()
        tokens = self.tokens(iteration)
        out: list[TokenLogprobs | None] = [None] * len(tokens)
        for scored, (i, top) in zip(self.scored[iteration].numpy(), self.scoring, strict=True):
            j = self.sampling_rows[i]
            if tokens[j] != NO_TOKEN:
                out[j] = unpack(scored, tokens[j], top)
        return tuple(out)

    def prompt_logprobs(self) -> tuple[tuple[TokenLogprobs, ...], ...]:
        """Per row, for its targets; empty where no row has any."""
        if self.prompt_scored is None:
            return ()
        scored = iter(self.prompt_scored.numpy())
        return tuple(
            tuple(unpack(next(scored), target, row.target_logprobs) for target in row.targets)
            for row in self.plan.rows
        )

    def embeddings(self) -> tuple[bytes | None, ...]:
        """Per row; empty where no row asked for any."""
        if self.pooled is None:
            return ()
        vectors = iter(self.pooled.numpy())
        return tuple(
            None if row.embed is None else next(vectors).astype("<f4").tobytes()
            for row in self.plan.rows
        )

    def row_errors(self) -> tuple[str | None, ...]:
        if not self.errors:
            return ()
        return tuple(self.errors.get(j) for j in range(len(self.plan.rows)))

    def release(self) -> None:
        """The device has finished every launched iteration: the buffers may be written again."""
        self.buffers.in_use = False


def step_done(
    action: Run,
    step: Step,
    iterations: range,
    *,
    last: bool,
    token_ns: Sequence[int],
    device_ns: int,
) -> StepDone:
    """The report of these iterations, all of which have arrived."""
    logprobs = tuple(step.logprobs(i) for i in iterations)
    return StepDone(
        action=action.id,
        iterations=len(iterations),
        last=last,
        tokens=tuple(step.tokens(i) for i in iterations),
        token_ns=tuple(token_ns),
        device_ns=device_ns,
        logprobs=logprobs if any(logprobs) else (),
        prompt_logprobs=step.prompt_logprobs(),
        embeddings=step.embeddings(),
        errors=step.row_errors(),
    )
