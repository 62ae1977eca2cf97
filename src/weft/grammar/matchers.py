"""Masks of the tokens that may come next, for the requests of one engine.

A matcher knows the state of one output. It is advanced by what was drawn since it was asked last,
or made anew from the whole output: after a re-run, or when it was forgotten for want of room. What
it answers depends on grammar and output alone.

Shape legend: W 32-bit words of a mask, one bit a token id, lowest bit first.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from weft.core.errors import WeftError
from weft.core.request import Grammar
from weft.grammar.source import limits, refuse_broken, source

MAX_TOKENIZERS = 16
MAX_COMPILED = 64
MAX_MATCHERS = 512
MAX_TOKENIZER_BYTES = 128 << 20

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Recent(Generic[K, V]):
    """The `size` values used last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """May raise what `make` raises."""
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class Vocabulary:
    """How a model's ids are to be read."""

    path: str
    """Its tokenizer.json."""
    size: int
    """Ids the model has logits for; may be more or less than the tokenizer knows."""
    eos_ids: tuple[int, ...]

    @property
    def words(self) -> int:
        return -(-self.size // 32)


@dataclass
class _State:
    grammar: Grammar
    matcher: Any
    consumed: tuple[int, ...] = ()


class Matchers:
    """Used by one thread at a time. Bounded: the least recently used are forgotten."""

    def __init__(self, max_matchers: int = MAX_MATCHERS) -> None:
        self._tokenizers: _Recent[Vocabulary, Any] = _Recent(MAX_TOKENIZERS)
        self._compiled: _Recent[tuple[Vocabulary, Grammar], Any] = _Recent(MAX_COMPILED)
        self._states: _Recent[int, _State] = _Recent(max_matchers)

    def mask(
        self,
        vocabulary: Vocabulary,
        request: int,
        grammar: Grammar,
        outputs: tuple[int, ...],
        stop_ids: Sequence[int],
    ) -> np.ndarray | None:
        """int32 [W]: what may follow `outputs`; None if nothing may, because they are complete.

        EOS and stop ids may come exactly where the grammar accepts what is there. Raises WeftError
        for a grammar (or a tokenizer) that cannot be used, or that leads nowhere.
        """
        matcher = self._advanced(vocabulary, request, grammar, outputs)
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)
        refuse_broken(matcher)
        accepting = matcher.is_accepting()
        mask = np.zeros(vocabulary.words, dtype=np.uint32)
        count = min(len(bits), len(mask))
        mask[:count] = bits[:count]
        if vocabulary.size % 32:
            mask[-1] &= np.uint32((1 << vocabulary.size % 32) - 1)
        tokenizer = self._tokenizers.get(vocabulary, lambda: _tokenizer(vocabulary))
        ends = [t for t in (*stop_ids, *vocabulary.eos_ids, *tokenizer.eos_tokens)]
        for token in _inside(ends, vocabulary):
            mask[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
        if not mask.any():
            if accepting:
                return None
            raise WeftError(
                "the grammar can only go on with a token that ends the output before it is "
                "complete; take it out of the stop token ids"
            )
        if accepting:
            for token in _inside(stop_ids, vocabulary):
                mask[token // 32] |= np.uint32(1 << token % 32)
        return mask.view(np.int32)

    def _advanced(
        self, vocabulary: Vocabulary, request: int, grammar: Grammar, outputs: tuple[int, ...]
    ) -> Any:
        """The request's matcher, after exactly `outputs`."""
        state = self._states.get(request, lambda: self._begin(vocabulary, grammar))
        known = len(state.consumed)
        if state.grammar != grammar or state.consumed != outputs[:known]:
            fresh = self._begin(vocabulary, grammar)
            state.grammar, state.matcher, known = grammar, fresh.matcher, 0
        if len(outputs) > known:
            state.matcher.consume_tokens(list(outputs[known:]))
            refuse_broken(state.matcher)
        state.consumed = outputs
        return state.matcher

    def _begin(self, vocabulary: Vocabulary, grammar: Grammar) -> _State:
        compiled = self._compiled.get(
            (vocabulary, grammar), lambda: self._compile(vocabulary, grammar)
        )
        return _State(grammar, compiled.deep_copy())

    def _compile(self, vocabulary: Vocabulary, grammar: Grammar) -> Any:
        from llguidance import LLMatcher

        tokenizer = self._tokenizers.get(vocabulary, lambda: _tokenizer(vocabulary))
        matcher = LLMatcher(tokenizer, source(grammar), log_level=0, limits=limits())
        refuse_broken(matcher)
        return matcher


def _inside(ids: Iterable[int], vocabulary: Vocabulary) -> list[int]:
    return [token for token in ids if 0 <= token < vocabulary.size]


def _tokenizer(vocabulary: Vocabulary) -> Any:
    """Raises WeftError for a tokenizer.json that is missing or cannot be read."""
    from llguidance import LLTokenizer

    path = Path(vocabulary.path)
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise WeftError(f"{path}: larger than {MAX_TOKENIZER_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
        eos = list(vocabulary.eos_ids) or None
        tokenizer = LLTokenizer(text, eos_token=eos)
        if tokenizer.vocab_size < vocabulary.size:
            tokenizer = LLTokenizer(text, n_vocab=vocabulary.size, eos_token=eos)
    except (OSError, ValueError) as error:
        raise WeftError(f"{path}: no tokenizer for grammars: {error}") from None
    return tokenizer
