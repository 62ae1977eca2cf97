"""StepPlan -> tensors -> Decoder.forward -> sampler -> tokens, on any device.

What a request carries from step to step stays on the device: its row of the model's page table and
its last token. No host synchronisation happens here: `iterate` only launches, and what it reports
is copied to the host asynchronously; the executor says when it has arrived. What only the host can
work out (penalties, grammar masks) is prepared while the device computes the forward pass.

Shape legend: T tokens of a step, R rows, S sampling rows, K stop ids, N slots, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch

from weft.attention.base import AttentionBackend, ForwardBatch
from weft.core.actions import Row, StepPlan
from weft.core.errors import INVALID_REQUEST, WeftError
from weft.core.unit import UnitSpec
from weft.engine.adapters import StepAdapters
from weft.engine.adjust import (
    Adjustments,
    Bias,
    Entries,
    Masks,
    Penalties,
    adjust,
    bias_arrays,
    penalty_arrays,
)
from weft.engine.graphs import DecodeGraphs, bucket_of, fill_lora, fill_up
from weft.engine.logprobs import score
from weft.engine.model import BoundModel
from weft.engine.plan_check import check_plan
from weft.engine.prompts import report_prompts, scored_positions
from weft.engine.sampler import SamplingBatch, sample
from weft.engine.staging import Buffers, page_entries, stage_rows, stop_table
from weft.engine.step import Step
from weft.grammar.matchers import Matchers
from weft.grammar.tokenizers import Vocabulary
from weft.models.decoder import LayerStates
from weft.models.lora import LoraPlan

LogitsTap = Callable[[StepPlan, int, torch.Tensor], None]
"""(plan, iteration, clone of logits [S, V]): for tests that compare bits."""

Sampler = Callable[[torch.Tensor, SamplingBatch], torch.Tensor]
"""(logits [S, V], parameters) -> int64 [S]."""


class Runner:
    """Executes the steps of one lane, in order. Called by one thread at a time, on the stream on
    which the lane's work is to run."""

    def __init__(
        self,
        unit: UnitSpec,
        device: torch.device,
        attention: AttentionBackend,
        last_token: torch.Tensor,
        *,
        sampler: Sampler = sample,
        adapters: StepAdapters | None = None,
        logits_tap: LogitsTap | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """last_token: int64 [N] on the device, shared by the lanes of a unit. sampler: see
        `engine.sampler.sample`, whose meaning it must have. adapters: default none. graphs: where
        decode steps run."""
        self._unit = unit
        self._device = device
        self._attention = attention
        self._last_token = last_token
        self._sampler = sampler
        self._adapters = adapters or StepAdapters()
        self._tap = logits_tap
        self._graphs = graphs
        self._matchers = Matchers()
        # depth steps in flight and the one being prepared.
        self._ring = [Buffers(unit, device) for _ in range(unit.depth + 1)]

    def ready(self, model: BoundModel, plan: StepPlan, tell: Callable[[], None]) -> bool:
        """Whether `iterate` will not be held up by reading the model's tokenizer for a grammar. If
        it would be, a thread reads it and calls `tell`; ask again then."""
        if not any(row.sample is not None and row.sample.grammar for row in plan.rows):
            return True
        return self._matchers.tokenizers.ready(_vocabulary(model), tell)

    def close(self) -> None:
        """Nothing is told any more."""
        self._matchers.tokenizers.close()

    @torch.inference_mode()
    def prepare(self, model: BoundModel, plan: StepPlan) -> Step:
        """Check the plan, upload its inputs and write its new page table entries.

        Raises ValueError for a plan that contradicts the unit or the model, RuntimeError if too
        many steps are unreleased; neither has any effect.
        """
        check_plan(plan, model, self._unit)
        lora = self._adapters.plan(plan)
        if plan.repeat > self._ring[0].tokens.shape[0]:
            raise ValueError(f"repeat {plan.repeat} exceeds max_repeat {self._unit.max_repeat}")
        # Steps of different models need not end in the order they began: any free one will do.
        buffers = next((one for one in self._ring if not one.in_use), None)
        if buffers is None:
            raise RuntimeError("more steps in flight than the unit's depth")
        buffers.in_use = True
        step = Step(plan, model, buffers)
        try:
            stage_rows(plan, buffers)
            if self._graphs is not None:
                step.bucket = bucket_of(plan, self._unit)
                if step.bucket is not None:
                    fill_up(buffers, len(plan.rows), step.bucket)
                    if lora is not None:
                        fill_lora(buffers, lora, step.bucket)
                        step.lora_caps = lora.caps
            buffers.upload()
            # What is filled up has the adapters' part at a fixed place.
            self._stage_early(step, None if step.lora_caps else lora)
        except BaseException:
            step.release()
            raise
        return step

    @torch.inference_mode()
    def iterate(self, step: Step, before_layer: Callable[[int], None] | None = None) -> None:
        """Launch the next iteration: forward, draw, remember the tokens on the device, and copy
        them to the host (`step.tokens(i)` once the copy has arrived)."""
        iteration, plan, buffers = step.launched, step.plan, step.buffers
        if iteration:
            self._advance(step, buffers)
        else:
            gathered = sum(row.input is None for row in plan.rows)
            if gathered:
                slots = buffers.view("gather_slots", gathered)
                buffers.view("token_ids", sum(step.row_tokens)).index_copy_(
                    0, buffers.view("gather_tokens", gathered), self._last_token[slots]
                )
        states: LayerStates | None = None
        if self._graphs is not None and step.bucket is not None:
            logits_SV = self._graphs.forward(step, before_layer)
        else:
            states, logits_SV = self._forward(step, before_layer)
        if self._tap is not None:
            self._tap(plan, iteration, logits_SV.clone())
        if step.sampling is not None:
            self._draw(step, step.sampling, logits_SV)
        if step.prompt_parts is not None:
            assert states is not None, "a step that is filled up has no prompt"
            report_prompts(step, states)
        step.launched += 1

    def _forward(
        self, step: Step, before_layer: Callable[[int], None] | None
    ) -> tuple[LayerStates, torch.Tensor]:
        """What the layers left at every token, and logits [S, V]."""
        model, decoder = step.model, step.model.decoder
        batch = self._batch(step, step.buffers, len(step.plan.rows))
        self._attention.plan(batch, model.kv)
        states = decoder.run_layers(batch, self._attention, model.kv, before_layer, step.lora)
        return states, decoder.logits(decoder.final_states(states, batch.sample_tokens))

    @property
    def graph_kinds(self) -> int:
        """Kinds of decode steps that replay a graph."""
        return 0 if self._graphs is None else self._graphs.count

    def forget(self, model: BoundModel) -> None:
        """It is about to be unbound; no step of it is in flight."""
        if self._graphs is not None:
            self._graphs.forget(model)

    def _advance(self, step: Step, buffers: Buffers) -> None:
        """A repeated step holds decode rows only: one token a row, in row order."""
        rows = len(step.plan.rows)
        torch.index_select(
            self._last_token, 0, buffers.view("slots", rows), out=buffers.view("token_ids", rows)
        )
        buffers.view("positions", rows).add_(1)
        buffers.view("row_starts", rows, torch.int32).add_(1)
        if step.sampling is not None:
            step.sampling.advance_()

    def _stage_early(self, step: Step, lora: LoraPlan | None) -> None:
        """Page table entries, stop ids, biases and the rows of adapters: what differs in size from
        plan to plan."""
        plan, table = step.plan, step.model.page_table
        rows = [plan.rows[j] for j in step.sampling_rows]
        stops = stop_table(plan)
        scoring = np.array([i for i, _ in step.scoring], dtype=np.int64)
        scored = scored_positions(plan)
        entries = page_entries(plan, table.shape[1])
        arrays = [*entries, stops.reshape(-1), *bias_arrays(rows), scoring, *scored]
        arrays += self._adapters.arrays(lora)
        put = step.buffers.early.put(arrays)
        places, pages, stop_ids, at, ids, values, scoring_rows, scored_tokens, targets = put[:-2]
        step.lora = self._adapters.batch(lora, *put[-2:])
        if len(places):
            table.view(-1).index_copy_(0, places, pages.to(torch.int32))
        if len(values):
            step.bias = Bias(Entries(at, ids), values)
        if len(targets) or any(row.embed is not None for row in plan.rows):
            step.prompt_parts = scored_tokens, targets
        if len(scoring):
            step.scoring_rows = scoring_rows
        if rows:
            step.sampling = self._sampling(rows, step.buffers, stop_ids.view(stops.shape))

    def _sampling(self, rows: list[Row], buffers: Buffers, stop_ids: torch.Tensor) -> SamplingBatch:
        count = len(rows)
        random = [s for row in rows if (s := row.sample) is not None and not s.greedy]
        return SamplingBatch(
            temperature=buffers.view("temperature", count, torch.float64),
            top_p=buffers.view("top_p", count, torch.float64),
            top_k=buffers.view("top_k", count),
            min_p=buffers.view("min_p", count, torch.float64),
            seed=buffers.view("seed", count),
            output_index=buffers.view("output_index", count),
            stop_ids=stop_ids,
            min_remaining=buffers.view("min_remaining", count),
            any_random=bool(random),
            any_truncated=any(s.top_k > 0 or s.top_p < 1.0 for s in random),
            any_min_p=any(s.min_p > 0.0 for s in random),
            any_masked=stop_ids.shape[1] > 0,
        )

    # -- drawing --------------------------------------------------------------------------------

    def _draw(self, step: Step, batch: SamplingBatch, logits_SV: torch.Tensor) -> None:
        buffers, iteration, count = step.buffers, step.launched, len(step.sampling_rows)
        adjustments = self._adjustments(step)
        adjusted_SV = adjust(logits_SV, adjustments) if adjustments else logits_SV
        drawn = self._sampler(adjusted_SV, batch)
        self._last_token.index_copy_(0, buffers.view("sample_slots", count), drawn)
        buffers.tokens[iteration, :count].copy_(drawn, non_blocking=True)
        if step.scoring_rows is not None:
            top = max(top for _, top in step.scoring)
            scored = score(logits_SV[step.scoring_rows], drawn[step.scoring_rows], top)
            if step.scored is None:
                shape = (step.plan.repeat, *scored.shape)
                step.scored = buffers.result("scored", shape, torch.float64)
            step.scored[iteration].copy_(scored, non_blocking=True)

    def _adjustments(self, step: Step) -> Adjustments:
        """What is to be done to this iteration's logits. For stepwise rows the host works here,
        while the device is busy with the forward pass."""
        rows = [step.plan.rows[j] for j in step.sampling_rows]
        settings = [row.sample for row in rows if row.sample is not None]
        if not any(s.stepwise for s in settings):
            return Adjustments(bias=step.bias)
        masked, words = self._masks(step)
        arrays = [*penalty_arrays(rows), masked, words.reshape(-1)]
        at, ids, factors, shifts, masked_rows, packed = step.buffers.late.put(arrays)
        penalties = Penalties(Entries(at, ids), factors, shifts) if len(ids) else None
        masks = None
        if len(masked_rows):
            masks = Masks(masked_rows, packed.view(len(masked), -1).view(torch.int32))
        return Adjustments(masks=masks, bias=step.bias, penalties=penalties)

    def _masks(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """Sampling rows with a grammar and int64 pairs of mask words for each; notes rows that are
        complete or cannot go on, whose draw is void."""
        vocabulary = _vocabulary(step.model)
        places: list[int] = []
        masks: list[np.ndarray] = []
        for i, j in enumerate(step.sampling_rows):
            row = step.plan.rows[j]
            if row.sample is None or row.sample.grammar is None:
                continue
            try:
                mask = self._matchers.mask(
                    vocabulary, row.request, row.sample.grammar, row.outputs, row.stop_ids
                )
            except WeftError as error:
                step.errors[j] = f"{INVALID_REQUEST}: {error}"
                continue
            if mask is None:
                step.complete.add(j)
                continue
            places.append(i)
            masks.append(np.pad(mask, (0, len(mask) % 2)).view(np.int64))
        width = (vocabulary.words + 1) // 2
        words = np.stack(masks) if masks else np.zeros((0, width), dtype=np.int64)
        return np.array(places, dtype=np.int64), words

    def _batch(self, step: Step, buffers: Buffers, rows: int) -> ForwardBatch:
        total = sum(step.row_tokens)
        done = step.launched
        return ForwardBatch(
            token_ids=buffers.view("token_ids", total),
            positions=buffers.view("positions", total),
            token_rows=buffers.view("token_rows", total),
            row_offsets=buffers.view("row_offsets", rows + 1, torch.int32),
            row_starts=buffers.view("row_starts", rows, torch.int32),
            row_tokens=buffers.view("row_tokens", rows, torch.int32),
            slots=buffers.view("slots", rows),
            page_table=step.model.page_table,
            sample_tokens=buffers.view("sample_tokens", len(step.sampling_rows)),
            starts=tuple(start + done for start in step.row_starts),
            num_tokens=step.row_tokens,
        )


def _vocabulary(model: BoundModel) -> Vocabulary:
    spec = model.spec
    return Vocabulary(
        model.image.tokenizer or "", model.arch.vocab_size, spec.eos_ids, model=spec.name
    )
