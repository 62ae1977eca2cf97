"""What the modelled executor computes instead of a model: functions of hashes of token ids, and the
plain run that every request must get whatever else happens."""

import zlib
from collections.abc import Iterable, Sequence

from weft.core.actions import StepPlan
from weft.core.errors import INVALID_REQUEST
from weft.core.ids import ModelName
from weft.core.request import Grammar, Pooling, Sampling, TokenLogprobs

MASK = (1 << 64) - 1
BAD_GRAMMAR = Grammar(kind="lark", text="no grammar")
"""The modelled engine cannot use this one."""
BAD_GRAMMAR_ERROR = f"{INVALID_REQUEST}: the grammar cannot be used"


def mix(state: int, value: int) -> int:
    """A 64-bit hash step (splitmix64's finaliser)."""
    z = (state * 0x9E3779B97F4A7C15 + value + 0x632BE59BD9B4E019) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def draw(
    context: int,
    sampling: Sampling,
    vocab_size: int,
    outputs: Sequence[int] = (),
    prompt_ids: Sequence[int] = (),
    output_index: int | None = None,
) -> int:
    """The modelled model's next token: a function of all ids before it, of seed and output
    position where it is sampled, and of what stepwise rows carry. Grammars end now and then."""
    index = len(outputs) if output_index is None else output_index
    noise = 0 if sampling.greedy else mix(sampling.seed, index)
    if sampling.stepwise:
        for token in (*outputs, vocab_size, *prompt_ids):
            noise = mix(noise, token)
    drawn = mix(context, noise)
    if sampling.grammar is not None and drawn % 9 == 0:
        return -1
    return drawn % vocab_size


def score(context: int, token: int, top: int) -> TokenLogprobs:
    """Log probabilities of the modelled model after `context`."""
    best = tuple((mix(context, rank) % 1000, -float(rank)) for rank in range(top))
    return TokenLogprobs(token, -float(mix(context, token) % 1000), best)


def contexts_of(
    ids: Iterable[int], context: int = 0, adapter: ModelName | None = None
) -> list[int]:
    """The hash at every position, with this adapter at work at each."""
    weights = None if adapter is None else zlib.crc32(adapter.encode())
    out: list[int] = []
    for token in ids:
        context = mix(context, token)
        if weights is not None:
            context = mix(context, weights)
        out.append(context)
    return out


def embedding_of(contexts: Sequence[int], pooling: Pooling) -> bytes:
    """Not a vector but a statement of which positions were pooled."""
    chosen = contexts[-1:] if pooling == "last" else contexts
    return b"".join(context.to_bytes(8, "little") for context in chosen)


def expected_stream(
    prompt: Iterable[int],
    sampling: Sampling,
    *,
    adapter: ModelName | None = None,
    max_tokens: int,
    min_tokens: int,
    stop_ids: frozenset[int],
    vocab_size: int,
) -> list[int]:
    """The plain run: what a request must get whatever else happens."""
    prompt = tuple(prompt)
    context = contexts_of(prompt, adapter=adapter)[-1]
    prompt_ids = sorted({*prompt}) if sampling.repetition_penalty != 1.0 else ()
    out: list[int] = []
    while len(out) < max_tokens:
        token = draw(context, sampling, vocab_size, out, prompt_ids)
        if token < 0 or (token in stop_ids and len(out) >= min_tokens):
            break
        out.append(token)
        context = contexts_of([token], context, adapter)[-1]
    return out


def row_errors(plan: StepPlan) -> tuple[str | None, ...]:
    """Rows whose grammar cannot be used."""
    bad = [r.sample is not None and r.sample.grammar == BAD_GRAMMAR for r in plan.rows]
    return tuple(BAD_GRAMMAR_ERROR if b else None for b in bad) if any(bad) else ()
