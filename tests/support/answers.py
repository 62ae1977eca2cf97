"""The whole plain answer of a request: one model, one row, no scheduler, nothing cached.

What every other way of running must equal: tokens exactly in float64, log probabilities and
embeddings to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch

from support.plain import PlainModel, make_batch
from weft.core.actions import Row
from weft.core.ids import RequestId, SlotId
from weft.core.request import FinishReason, Grammar, Request, Sampling, TokenLogprobs
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
from weft.engine.logprobs import score, unpack
from weft.engine.sampler import SamplingBatch, sample
from weft.grammar.matchers import Matchers
from weft.grammar.tokenizers import Vocabulary


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    embedding: np.ndarray | None = None


def vocabulary_of(model: PlainModel, eos_ids: Sequence[int]) -> Vocabulary:
    path = str(model.path / "tokenizer.json")
    return Vocabulary(path, model.arch.vocab_size, tuple(eos_ids))


def adjustments_of(row: Row, vocabulary: Vocabulary | None = None) -> Adjustments | None:
    """Of one row alone; None where its grammar lets nothing follow."""
    assert row.sample is not None
    masks, bias, penalties = None, None, None
    if row.sample.grammar is not None:
        assert vocabulary is not None
        words = Matchers().mask(vocabulary, 0, row.sample.grammar, row.outputs, row.stop_ids)
        if words is None:
            return None
        masks = Masks(torch.tensor([0]), torch.tensor(words)[None])
    at, ids, values = (torch.tensor(a) for a in bias_arrays([row]))
    if len(ids):
        bias = Bias(Entries(at, ids), values)
    at, ids, factors, shifts = (torch.tensor(a) for a in penalty_arrays([row]))
    if len(ids):
        penalties = Penalties(Entries(at, ids), factors, shifts)
    return Adjustments(masks, bias, penalties)


def plain_answer(model: PlainModel, request: Request, eos_ids: Sequence[int]) -> Answer:
    """Up to the first stop id that counts, which is not part of it."""
    answer = Answer()
    pages = model.random_pages(len(request.prompt) + request.max_tokens, np.random.default_rng(0))
    batch = make_batch([(request.prompt, 0)], [pages])
    model.attention.plan(batch, model.kv)
    states = model.decoder.run_layers(batch, model.attention, model.kv)
    final = model.decoder.final_states(states, torch.arange(len(request.prompt)))
    logits = model.decoder.logits(final)
    if request.prompt_logprobs is not None and len(request.prompt) > 1:
        targets = torch.tensor(request.prompt[1:])
        top = request.prompt_logprobs
        scored = score(logits[:-1], targets, top).numpy()
        pairs = zip(scored, request.prompt[1:], strict=True)
        answer.prompt_logprobs = [unpack(line, token, top) for line, token in pairs]
    if request.embed is not None:
        answer.embedding = (final[-1] if request.embed == "last" else final.mean(0)).numpy()
    stops = {*request.stop_ids, *(() if request.ignore_eos else eos_ids)}
    vocabulary = vocabulary_of(model, eos_ids)
    logits = logits[-1:]
    while len(answer.tokens) < request.max_tokens:
        token = _draw(logits, request, answer, tuple(stops), vocabulary)
        if token is None or (token in stops and len(answer.tokens) >= request.min_tokens):
            answer.finish = "stop"
            return answer
        top = request.sampling.logprobs
        if top is not None:
            scored = score(logits, torch.tensor([token]), top).numpy()
            answer.logprobs.append(unpack(scored[0], token, top))
        answer.tokens.append(token)
        position = len(request.prompt) + len(answer.tokens) - 1
        if len(answer.tokens) < request.max_tokens:
            logits = model.forward(make_batch([([token], position)], [pages]))
    answer.finish = "stop" if request.embed is not None else "length"
    return answer


def _draw(
    logits: torch.Tensor,
    request: Request,
    answer: Answer,
    stops: tuple[int, ...],
    vocabulary: Vocabulary,
) -> int | None:
    outputs = tuple(answer.tokens)
    row = Row(
        request=RequestId(0),
        slot=SlotId(0),
        start=0,
        num_tokens=1,
        input=None,
        sample=request.sampling,
        output_index=len(outputs),
        stop_ids=stops,
        min_remaining=max(0, request.min_tokens - len(outputs)),
        outputs=outputs,
        prompt_ids=tuple(sorted({*request.prompt})),
    )
    adjustments = adjustments_of(row, vocabulary)
    if adjustments is None:
        return None
    return int(sample(adjust(logits, adjustments), SamplingBatch.from_rows([row]))[0])


GRAMMARS = [
    Grammar(kind="json_object"),
    Grammar(
        kind="json_schema",
        text='{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": '
        '["x", "yy"]}}, "required": ["a", "b"], "additionalProperties": false}',
    ),
    Grammar(kind="regex", text="[a-f]{3,9}(-[0-9]{2})?"),
    Grammar(kind="choice", text='["yes", "no", "not yet"]'),
    Grammar(kind="lark", text='start: "(" start ")" | "x" | "y"\n'),
]


def random_sampling(rng: Random, vocab: int) -> Sampling:
    """Every parameter now and then, most often a few of them."""

    def maybe(share: float) -> bool:
        return rng.random() < share

    return Sampling(
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_p=0.9 if maybe(0.2) else 1.0,
        top_k=7 if maybe(0.2) else 0,
        seed=rng.randrange(1 << 40),
        min_p=rng.choice([0.02, 0.3]) if maybe(0.3) else 0.0,
        presence_penalty=rng.choice([-0.5, 1.5]) if maybe(0.2) else 0.0,
        frequency_penalty=rng.choice([-0.2, 0.8]) if maybe(0.2) else 0.0,
        repetition_penalty=rng.choice([0.8, 1.3]) if maybe(0.2) else 1.0,
        logit_bias=tuple((rng.randrange(vocab), rng.uniform(-9, 9)) for _ in range(5))
        if maybe(0.2)
        else (),
        logprobs=rng.choice([0, 1, 5]) if maybe(0.3) else None,
        grammar=rng.choice(GRAMMARS) if maybe(0.25) else None,
    )


def same_logprobs(got: Sequence[TokenLogprobs], want: Sequence[TokenLogprobs]) -> None:
    """Ids exactly, values to rounding. Raises AssertionError."""
    assert [x.token for x in got] == [x.token for x in want]
    for a, b in zip(got, want, strict=True):
        assert [i for i, _ in a.top] == [i for i, _ in b.top]
        values = [a.logprob, *(v for _, v in a.top)]
        np.testing.assert_allclose(values, [b.logprob, *(v for _, v in b.top)], atol=1e-9, rtol=0)
