"""What clients may send to the generating routes. Every number, text and list is bounded.

Checks that need the model (context length, vocabulary) are in `plan.py`.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from weft.server.fields import (
    CLOSED,
    MAX_BIASES,
    MAX_CHOICES,
    MAX_NAME_CHARS,
    MAX_PRIORITY,
    MAX_STOP_IDS,
    MAX_TOKENS,
    Prompt,
    Stops,
    Strict,
    TokenId,
    TopLogprobs,
    whole,
)
from weft.server.formats import Shaped
from weft.server.messages import Conversing, ToolChoice


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Usage so far in every chunk, as load clients ask for."""
    include_obfuscation: bool | None = None
    """Accepted; chunks are never padded."""


Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
BiasedId = Annotated[str, Field(pattern=r"^[0-9]{1,8}$")]
Biases = Annotated[dict[BiasedId, Bias], Field(max_length=MAX_BIASES, json_schema_extra=CLOSED)]


class Drawn(Strict):
    """How tokens are drawn."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: whole(-1, MAX_TOKENS) | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: whole(-(1 << 63), (1 << 63) - 1) | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: (
        Annotated[dict[BiasedId, Bias], Field(max_length=MAX_BIASES, json_schema_extra=CLOSED)]
        | None
    ) = None
    priority: whole(-MAX_PRIORITY, MAX_PRIORITY) | None = None
    """Lower runs earlier."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)] | None = None
    """Prompts share cached prefixes only with those of the same key and salt."""


class Common(Drawn, Shaped):
    """The fields of both generating routes."""

    n: whole(1, MAX_CHOICES) | None = None
    max_tokens: whole(1, MAX_TOKENS) | None = None
    min_tokens: whole(0, MAX_TOKENS) | None = None
    stop: Stops | None = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None
    ) = None
    ignore_eos: bool | None = None
    prompt_logprobs: TopLogprobs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    """Adds `token_ids` to every choice."""
    return_tokens_as_token_ids: bool | None = None
    """Log probabilities name tokens as `token_id:17`."""

    def top(self) -> int | None:
        """How many most probable tokens to report with every token; None: no log probabilities."""
        raise NotImplementedError


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: whole(0, MAX_TOKENS) | None = None
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    best_of: whole(1, MAX_CHOICES) | None = None
    """Only equal to n: every choice that is drawn is returned."""

    def top(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _returns_all(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise PydanticCustomError("best_of", "best_of is only served equal to n; leave it out")
        return self


class ChatRequest(Common, Conversing):
    """POST /v1/chat/completions."""

    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: whole(1, MAX_TOKENS) | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None

    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _logprobs_are_on(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs: true")
        return self
