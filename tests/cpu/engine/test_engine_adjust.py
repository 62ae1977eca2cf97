"""Penalties, biases, masks, min_p and log probabilities against numpy and transformers."""

from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from support.answers import adjustments_of
from weft.core.actions import Row
from weft.core.ids import RequestId, SlotId
from weft.core.request import Sampling
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
from weft.engine.logprobs import LEAST, score, unpack
from weft.engine.sampler import SamplingBatch, sample

VOCAB = 67
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
INF = float("inf")


def row(sampling: Sampling, outputs: tuple[int, ...] = (), prompt: tuple[int, ...] = ()) -> Row:
    return Row(
        request=RequestId(0),
        slot=SlotId(0),
        start=0,
        num_tokens=1,
        input=None,
        sample=sampling,
        output_index=len(outputs),
        outputs=outputs,
        prompt_ids=tuple(sorted({*prompt})),
    )


def logits_of(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def adjusted(logits: torch.Tensor, rows: list[Row], words: torch.Tensor | None = None) -> Any:
    """All rows at once, as the runner does it."""
    at, ids, values = (torch.tensor(a) for a in bias_arrays(rows))
    bias = Bias(Entries(at, ids), values)
    at, ids, factors, shifts = (torch.tensor(a) for a in penalty_arrays(rows))
    masks = None if words is None else Masks(torch.arange(len(words)), words)
    return adjust(logits, Adjustments(masks, bias, Penalties(Entries(at, ids), factors, shifts)))


def by_hand(logits: np.ndarray, row: Row) -> np.ndarray:
    """The definition, one token after another."""
    s = row.sample
    assert s is not None
    out = logits.astype(np.float64).copy()
    for token, value in s.logit_bias:
        out[token] += value
    for token in range(len(out)):
        count = row.outputs.count(token)
        if count or token in row.prompt_ids:
            out[token] = out[token] * s.repetition_penalty ** (1 if out[token] <= 0 else -1)
        out[token] -= s.frequency_penalty * count + s.presence_penalty * (count > 0)
    return out


def random_row(rng: Random) -> Row:
    sampling = Sampling(
        presence_penalty=rng.choice([0.0, -1.0, 0.7]),
        frequency_penalty=rng.choice([0.0, -0.3, 1.1]),
        repetition_penalty=rng.choice([1.0, 0.5, 1.7]),
        logit_bias=tuple(
            (rng.randrange(VOCAB), rng.uniform(-5, 5)) for _ in range(rng.randrange(5))
        ),
    )
    outputs = tuple(rng.randrange(20) for _ in range(rng.randrange(40)))
    prompt = tuple(rng.randrange(30) for _ in range(rng.randrange(40)))
    return row(sampling, outputs, prompt)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_penalties_and_biases_are_what_they_say(dtype: torch.dtype) -> None:
    rng = Random(0)
    rows = [random_row(rng) for _ in range(60)]
    logits = logits_of(60, dtype=dtype)
    before = logits.clone()
    got = adjusted(logits, rows)
    assert torch.equal(logits, before), "the raw logits are still needed"
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = np.stack([by_hand(x.double().numpy(), r) for x, r in zip(logits, rows, strict=True)])
    np.testing.assert_allclose(got.double().numpy(), want, rtol=1e-5, atol=1e-5)
    alone = [
        adjust(logits[i : i + 1], adjustments_of(r) or Adjustments()) for i, r in enumerate(rows)
    ]
    assert torch.equal(torch.cat(alone), got), "a row depends on its company"


def test_repetition_penalty_and_bias_are_those_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

    logits = logits_of(1, 3)
    prompt, outputs = (3, 9, 9, 12), (9, 40, 41)
    ours = adjusted(logits, [row(Sampling(repetition_penalty=1.4), outputs, prompt)])
    seen = torch.tensor([[*prompt, *outputs]])
    theirs = RepetitionPenaltyLogitsProcessor(1.4)(seen, logits.clone())
    torch.testing.assert_close(ours, theirs)
    bias = ((5, 2.5), (7, -3.0))
    ours = adjusted(logits, [row(Sampling(logit_bias=bias))])
    theirs = SequenceBiasLogitsProcessor({(5,): 2.5, (7,): -3.0})(seen, logits.clone())
    torch.testing.assert_close(ours, theirs)


def test_masks_let_through_what_their_bits_say() -> None:
    rng = np.random.default_rng(0)
    allowed = rng.random((7, 96)) < 0.3
    words = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    logits = logits_of(7, 5)
    got = adjusted(logits, [row(Sampling())] * 7, torch.tensor(words))
    want = torch.where(torch.tensor(allowed[:, :VOCAB]), logits, -INF)
    assert torch.equal(got, want)


def test_masked_tokens_stay_masked_whatever_is_added() -> None:
    words = torch.tensor([[0b1000, 0, 0]], dtype=torch.int32)
    sampling = Sampling(logit_bias=((5, 100.0),), repetition_penalty=0.1, presence_penalty=-50.0)
    got = adjusted(logits_of(1), [row(sampling, (5, 6), (7,))], words)
    assert torch.isinf(got).sum() == VOCAB - 1
    assert int(got.argmax()) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=0.6, min_p=0.05),
        Sampling(temperature=2.0, min_p=0.3),
        Sampling(temperature=1.0, min_p=1.0),
    ],
    ids=str,
)
def test_min_p_keeps_what_transformers_keeps(dtype: torch.dtype, sampling: Sampling) -> None:
    from transformers import MinPLogitsWarper

    logits = logits_of(1, 8, dtype)
    draws = 4000
    rows = [row(sampling)] * draws
    batch = SamplingBatch.from_rows(rows)
    batch.seed.copy_(torch.arange(draws))
    drawn = {int(t) for t in sample(logits.expand(draws, VOCAB), batch)}
    warped = MinPLogitsWarper(sampling.min_p)(torch.zeros(1, 1), logits / sampling.temperature)
    kept = {int(t) for t in torch.nonzero(warped[0] > -INF)}
    shares = torch.softmax(warped[0], -1)
    assert drawn <= kept
    assert {t for t in kept if shares[t] > 0.01} <= drawn


def test_min_p_comes_before_top_k_and_top_p_and_leaves_greedy_rows_alone() -> None:
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, :4] = torch.tensor([3.0, 2.9, 1.0, 0.9])
    together = Sampling(temperature=1.0, min_p=0.5, top_p=0.95)
    batch = SamplingBatch.from_rows([row(together)] * 2000)
    batch.seed.copy_(torch.arange(2000))
    # Of what min_p leaves, top_p 0.95 keeps both; of everything it would keep a third.
    assert {int(t) for t in sample(logits.expand(2000, VOCAB), batch)} == {0, 1}
    greedy = SamplingBatch.from_rows([row(Sampling(min_p=1.0)), row(together)])
    assert int(sample(logits.expand(2, VOCAB), greedy)[0]) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities_against_numpy_with_ties_to_the_lowest_id(dtype: torch.dtype) -> None:
    logits = logits_of(30, 2).round().to(dtype)  # many equal ones
    logits[3, 7] = float("nan")
    logits[4] = -INF
    logits[5, 10:] = -INF
    targets = torch.arange(30)
    scored = score(logits, targets, 12).numpy()
    wide = np.float64 if dtype == torch.float64 else np.float32
    for i, line in enumerate(scored):
        x = np.where(np.isnan(logits[i].double().numpy()), -INF, logits[i].double().numpy())
        with np.errstate(all="ignore"):
            want = np.nan_to_num(
                x - x.max() - np.log(np.exp(x - x.max()).sum()), nan=LEAST, neginf=LEAST
            )
        want = want.astype(wide)
        got = unpack(line, i, 12)
        assert got.token == i
        assert abs(got.logprob - want[i]) < 1e-5
        order = sorted(range(VOCAB), key=lambda t: (-round(float(want[t]), 4), t))[:12]
        assert [t for t, _ in got.top] == order
        np.testing.assert_allclose([v for _, v in got.top], want[order], atol=1e-5)
        assert unpack(line, i, 3).top == got.top[:3]
        assert unpack(line, i, 0).top == ()


def test_more_log_probabilities_than_tokens_are_all_of_them() -> None:
    (line,) = score(torch.zeros(1, 5), torch.tensor([2]), 20).numpy()
    assert [t for t, _ in unpack(line, 2, 20).top] == [0, 1, 2, 3, 4]
