"""Masks of the tokens that may come next, for the requests of one engine.

A matcher knows the state of one output. It is advanced by what was drawn since it was asked last,
or made anew from the whole output: after a re-run, or when it was forgotten for want of room. What
it answers depends on grammar and output alone.

Shape legend: W 32-bit words of a mask, one bit a token id, lowest bit first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.core.errors import WeftError
from weft.core.request import Grammar
from weft.grammar.recent import Recent
from weft.grammar.source import limits, refuse_broken, source
from weft.grammar.tokenizers import Tokenizers, Vocabulary

MAX_COMPILED = 64
MAX_MATCHERS = 512


@dataclass
class _State:
    grammar: Grammar
    matcher: Any
    consumed: tuple[int, ...] = ()


class Matchers:
    """Used by one thread at a time. Bounded: the least recently used are forgotten."""

    def __init__(self, max_matchers: int = MAX_MATCHERS) -> None:
        self.tokenizers = Tokenizers()
        self._compiled: Recent[tuple[Vocabulary, Grammar], Any] = Recent(MAX_COMPILED)
        self._states: Recent[int, _State] = Recent(max_matchers)

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
        tokenizer = self.tokenizers.get(vocabulary)
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

        tokenizer = self.tokenizers.get(vocabulary)
        matcher = LLMatcher(tokenizer, source(grammar), log_level=0, limits=limits())
        refuse_broken(matcher)
        return matcher


def _inside(ids: Iterable[int], vocabulary: Vocabulary) -> list[int]:
    return [token for token in ids if 0 <= token < vocabulary.size]
