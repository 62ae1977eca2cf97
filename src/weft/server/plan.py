"""From a checked HTTP request to what the hub is asked for: model found, prompt in token ids,
every default chosen once."""

import secrets
from collections.abc import Sequence

import msgspec

from weft.core.errors import CONTEXT_LENGTH, MODEL_FAILED, MODEL_NOT_FOUND, ReplyError
from weft.core.request import Sampling
from weft.hub.base import Hub, ModelCard, NewRequest
from weft.server.errors import bad_request, from_reply
from weft.server.schemas import ChatRequest, Common, CompletionRequest
from weft.server.text import TextModel, TextService

DEFAULT_COMPLETION_TOKENS = 16
"""As the OpenAI API has it for /v1/completions; a chat may use the rest of the context."""
DEFAULT_TEMPERATURE = 1.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request: a hub request for every choice, and how its answer is written."""

    card: ModelCard
    text: TextModel
    chat: bool
    requests: tuple[NewRequest, ...]
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    running_usage: bool
    """Usage so far in every chunk (`stream_options.continuous_usage_stats`)."""
    token_ids: bool

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)


def find_model(hub: Hub, name: str) -> ModelCard:
    """Raises ApiError 404, or 503 for a model whose checkpoint is broken."""
    for card in hub.models():
        if card.name == name:
            if card.failed is not None:
                message = f"model {name!r} cannot be served: {card.failed}"
                raise from_reply(ReplyError(code=MODEL_FAILED, message=message))
            return card
    message = f"model {name!r} does not exist; GET /v1/models lists those that do"
    raise from_reply(ReplyError(code=MODEL_NOT_FOUND, message=message))


async def plan_chat(hub: Hub, texts: TextService, request: ChatRequest) -> Plan:
    """Raises ApiError."""
    card = find_model(hub, request.model)
    text = await texts.model(card)
    messages = [message.plain() for message in request.messages]
    prompt = await texts.run(card.name, lambda: text.encode_chat(messages))
    wanted = request.max_completion_tokens or request.max_tokens
    return _plan(request, card, text, [prompt], wanted, chat=True)


async def plan_completion(hub: Hub, texts: TextService, request: CompletionRequest) -> Plan:
    """Raises ApiError."""
    card = find_model(hub, request.model)
    text = await texts.model(card)
    given = request.prompt
    if isinstance(given, str):
        entries: list[str | list[int]] = [given]
    elif isinstance(given[0], int):
        entries = [[token for token in given if isinstance(token, int)]]
    else:
        entries = [entry for entry in given if not isinstance(entry, int)]

    def encode() -> list[tuple[int, ...]]:
        return [
            text.encode_prompt(entry) if isinstance(entry, str) else _check_ids(entry, card)
            for entry in entries
        ]

    prompts = await texts.run(card.name, encode)
    wanted = request.max_tokens or DEFAULT_COMPLETION_TOKENS
    return _plan(request, card, text, prompts, wanted, chat=False)


def _check_ids(ids: list[int], card: ModelCard) -> tuple[int, ...]:
    if max(ids) >= card.vocab_size:
        raise bad_request(
            f"prompt holds the token id {max(ids)}; model {card.name!r} has ids 0 to "
            f"{card.vocab_size - 1}",
            param="prompt",
            code="invalid_value",
        )
    return tuple(ids)


def _plan(
    request: Common,
    card: ModelCard,
    text: TextModel,
    prompts: Sequence[tuple[int, ...]],
    wanted: int | None,
    *,
    chat: bool,
) -> Plan:
    if any(token >= card.vocab_size for token in request.stop_token_ids or ()):
        raise bad_request(
            f"stop_token_ids: model {card.name!r} has ids 0 to {card.vocab_size - 1}",
            param="stop_token_ids",
            code="invalid_value",
        )
    if request.stream_options is not None and not request.stream:
        raise bad_request(
            "stream_options is only allowed with stream: true", param="stream_options"
        )
    options = request.stream_options
    stop = request.stop if request.stop is not None else ()
    return Plan(
        card=card,
        text=text,
        chat=chat,
        requests=tuple(_hub_request(request, card, prompt, wanted) for prompt in prompts),
        stops=(stop,) if isinstance(stop, str) else tuple(stop),
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        running_usage=bool(options and options.continuous_usage_stats),
        token_ids=bool(request.return_token_ids),
    )


def _hub_request(
    request: Common, card: ModelCard, prompt: tuple[int, ...], wanted: int | None
) -> NewRequest:
    room = card.max_context_tokens - len(prompt)
    max_tokens = wanted if wanted is not None else max(room, 1)
    if max_tokens > room:
        message = (
            f"model {card.name!r} has a context of {card.max_context_tokens} tokens; the prompt "
            f"has {len(prompt)} and {max_tokens} more were asked for"
        )
        raise from_reply(ReplyError(code=CONTEXT_LENGTH, message=message))
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise bad_request(
            f"min_tokens is {min_tokens}, more than the {max_tokens} of max_tokens",
            param="min_tokens",
            code="invalid_value",
        )
    return NewRequest(
        model=card.name,
        prompt=prompt,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        sampling=_sampling(request),
        stop_ids=tuple(dict.fromkeys(request.stop_token_ids or ())),
        ignore_eos=bool(request.ignore_eos),
    )


def _sampling(request: Common) -> Sampling:
    """Seeds are 63 bits: a negative one is folded, a missing one is drawn here, once, so that a
    request that is run again draws the same tokens."""
    temperature = DEFAULT_TEMPERATURE if request.temperature is None else request.temperature
    seed = secrets.randbits(63) if request.seed is None else request.seed % (1 << 63)
    return Sampling(
        temperature=temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(request.top_k or 0, 0),
        seed=seed,
    )
