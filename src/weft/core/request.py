"""A request as the hub records it and a unit runs it. Token ids only; text is the frontend's."""

from typing import Literal

import msgspec

from weft.core.ids import ModelName, RequestId

FinishReason = Literal["stop", "length", "cancelled", "error"]


Pooling = Literal["last", "mean"]
"""An embedding is the last token's final hidden state, or the mean over all tokens."""


MAX_LOGPROBS = 20
"""Most probable tokens that may be asked for at a position."""
MAX_LOGIT_BIAS = 1024
"""Entries of a logit_bias."""
MAX_PENALTY = 100.0
"""Bound on penalties and biases, up and down; 1 / this is the least repetition penalty."""
MAX_PROMPT_LOGPROBS = 1_000_000
"""Log probabilities of one prompt: positions times (1 + the most probable ones)."""


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What the output must look like. Checked by the frontend before it gets here."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "lark"]
    text: str = ""
    """The JSON Schema, the regular expression, a JSON list of the choices, or the Lark grammar."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is drawn. Noise is a function of (seed, output position, token id) alone.

    temperature 0 is greedy (ties to the lowest id). top_k 0, top_p 1.0 and min_p 0.0 mean no
    truncation. Order: grammar and stop mask, logit_bias, repetition, presence and frequency
    penalty, temperature, min_p, top_k, top_p.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    """Tokens less probable than min_p times the most probable one are left out."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the output has already."""
    frequency_penalty: float = 0.0
    """Taken from a logit once for every time the output has the token."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or output: divided by it if positive, else multiplied."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these ids."""
    logprobs: int | None = None
    """Report the log probability of every drawn token, and of this many most probable ones.
    They are the model's own: of the raw logits, before any of the above."""
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stepwise(self) -> bool:
        """Drawing needs every earlier token of the output on the host: its next step can only be
        planned when the last one is known."""
        return self.grammar is not None or self.penalised

    @property
    def penalised(self) -> bool:
        """Logits depend on which tokens are there already."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request gets that does not say; null leaves the server's own default."""

    temperature: float | None = None
    """0 is greedy. The server's own default: 1."""
    top_p: float | None = None
    """Keep the most probable tokens up to this share. The server's own default: 1, all."""
    top_k: int | None = None
    """Keep this many most probable tokens. The server's own default: 0, all."""
    min_p: float | None = None
    """Leave out tokens less probable than this times the best. The server's own default: 0."""
    max_tokens: int | None = None
    """Longest output. The server's own default: 16 for completions, the context for chats."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities at one position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(id, log probability) of the most probable ones, best first, equal ones by id."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked. Immutable; what was answered so far travels beside it (`Submit.emitted`)."""

    id: RequestId
    model: ModelName
    prompt: tuple[int, ...]
    """At least one token."""
    max_tokens: int
    min_tokens: int = 0
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the output besides the model's EOS ids; the stop token is not emitted."""
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    """Report the log probability of every prompt token but the first, as `Sampling.logprobs`."""
    embed: Pooling | None = None
    """No token is drawn (max_tokens is 0): the answer is one vector. max_tokens may be 0 with
    `prompt_logprobs` too."""
    priority: int = 0
    """Lower runs earlier."""
    tenant: str = ""
    adapter: ModelName | None = None
    """A LoRA adapter on `model`; it is assigned to units as a model of its own, with a `base`."""
    arrival_ns: int = 0
    hold_deadline_ns: int | None = None
    """If the request has not begun by then it fails with 503."""
    reruns: int = 0
    """How often a worker died while this request was on it."""

    @property
    def prefill_only(self) -> bool:
        """Over when the prompt is computed: nothing is drawn."""
        return self.max_tokens == 0

    @property
    def whole_prompt(self) -> bool:
        """Something is reported of every prompt position, so each is computed for this request:
        KV that was found or outlived a worker does not do."""
        return self.prompt_logprobs is not None or self.embed is not None


class Extent(msgspec.Struct, frozen=True, order=True):
    """A byte range of the host store."""

    offset: int
    num_bytes: int


class ParkedKv(msgspec.Struct, frozen=True, kw_only=True):
    """KV of one request in the host store: page i of the request lies in extents, in order.

    `tokens` positions 0..tokens-1 are valid. The extents together hold ceil(tokens / page_tokens)
    whole pages, concatenated in extent order.
    """

    extents: tuple[Extent, ...]
    tokens: int
