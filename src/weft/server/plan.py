"""From a checked HTTP request to what the hub is asked for: model found, prompt in token ids,
every default chosen once."""

import secrets
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b

import msgspec

from weft.core.errors import CONTEXT_LENGTH, MODEL_FAILED, MODEL_NOT_FOUND, ReplyError
from weft.core.request import Grammar, Sampling
from weft.hub.base import Hub, ModelCard, NewRequest
from weft.server.chat import Setting, set_up, ways_of
from weft.server.detokenize import Decode
from weft.server.errors import ApiError, bad_request, from_reply
from weft.server.fields import MAX_CHOICES
from weft.server.formats import check, grammar_of
from weft.server.logprobs import Namer
from weft.server.schemas import ChatRequest, Common, CompletionRequest, Drawn
from weft.server.text import TextModel, TextService
from weft.server.wire import Writer
from weft.server.wire_openai import ChatWriter, CompletionWriter, Form

DEFAULT_COMPLETION_TOKENS = 16
"""As the OpenAI API has it for /v1/completions; a chat may use the rest of the context."""
DEFAULT_TEMPERATURE = 1.0


class Asker(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request came from, and what answers it."""

    hub: Hub
    texts: TextService
    tenant: str = ""
    """Whose cached prefixes it may share."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request: a hub request for every choice, and how its answer is written."""

    card: ModelCard
    requests: tuple[NewRequest, ...]
    decode: Decode
    writer: Callable[[str], Writer]
    """By the request's id."""
    stops: tuple[str, ...] = ()
    stream: bool = False
    choices_per_prompt: int = 1
    window: int = MAX_CHOICES
    """Choices that may be open at once."""
    silent: bool = False
    """What is drawn is not shown: only the prompt was asked about."""

    @property
    def prompt_tokens(self) -> int:
        prompts = self.requests[:: self.choices_per_prompt]
        return sum(len(request.prompt) for request in prompts)


def find_model(hub: Hub, name: str) -> ModelCard:
    """By its name or an alias. Raises ApiError 404, or 503 for a broken checkpoint."""
    cards = hub.models()
    card = next((card for card in cards if card.name == name), None)
    card = card or next((card for card in cards if name in card.aliases), None)
    if card is None:
        message = f"model {name!r} does not exist; GET /v1/models lists those that do"
        raise from_reply(ReplyError(code=MODEL_NOT_FOUND, message=message))
    if card.failed is not None:
        message = f"model {name!r} cannot be served: {card.failed}"
        raise from_reply(ReplyError(code=MODEL_FAILED, message=message))
    return card


async def plan_chat(asker: Asker, request: ChatRequest) -> Plan:
    """Raises ApiError."""
    card = find_model(asker.hub, request.model)
    text = await asker.texts.model(card)
    text.check_chars(request.argument_chars(), "messages")
    wish = grammar_of(request)

    def prepare() -> Setting:
        talk = request.conversation()
        ways = ways_of(request.tool_choice, request.parallel_tool_calls, talk.tools)
        return set_up(text, talk, ways, wish)

    setting = await asker.texts.run(card.name, prepare)
    wanted = request.max_completion_tokens or request.max_tokens
    maker = _Maker(asker, request, card, setting.grammar)
    form = msgspec.structs.replace(_form(request, card, text), reader=setting.reader)
    return _plan(
        request,
        card,
        maker.all([setting.prompt], wanted),
        setting.decode,
        partial(ChatWriter, form, stream=bool(request.stream)),
    )


async def plan_completion(asker: Asker, request: CompletionRequest) -> Plan:
    """Raises ApiError."""
    card = find_model(asker.hub, request.model)
    text = await asker.texts.model(card)
    entries = prompt_entries(request.prompt)
    if len(entries) * (request.n or 1) > MAX_CHOICES:
        raise bad_request(
            f"{len(entries)} prompts with n = {request.n} are more than {MAX_CHOICES} choices",
            param="n",
            code="invalid_value",
        )
    wish = grammar_of(request)

    def prepare() -> tuple[list[tuple[int, ...]], list[str]]:
        if wish is not None:
            check(*wish)
        prompts = [encode_entry(text, card, entry) for entry in entries]
        echoes = [
            entry if isinstance(entry, str) else text.decode(list(prompt))
            for entry, prompt in zip(entries, prompts, strict=True)
            if request.echo
        ]
        return prompts, echoes

    prompts, echoes = await asker.texts.run(card.name, prepare)
    wanted = request.max_tokens
    if wanted is None and card.defaults.max_tokens is None:
        wanted = DEFAULT_COMPLETION_TOKENS
    form = _form(request, card, text)
    maker = _Maker(asker, request, card, wish[0] if wish else None)
    if request.echo:
        choices = request.n or 1
        heads = [(echo, ids[0]) for echo, ids in zip(echoes, prompts, strict=True)]
        form = msgspec.structs.replace(
            form, echo=tuple(head for head in heads for _ in range(choices))
        )
        maker.echoes(request.logprobs)
    return _plan(
        request,
        card,
        maker.all(prompts, maker.least if wanted == 0 else wanted),
        text.decode,
        partial(CompletionWriter, form),
        silent=wanted == 0,
    )


def prompt_entries(given: object) -> list[str | list[int]]:
    """The texts or lists of ids in one of the four forms of a prompt."""
    if isinstance(given, str):
        return [given]
    assert isinstance(given, list)
    return [given] if isinstance(given[0], int) else given


def encode_entry(
    text: TextModel, card: ModelCard, entry: str | list[int], param: str = "prompt"
) -> tuple[int, ...]:
    """Raises ApiError."""
    if isinstance(entry, str):
        return text.encode_prompt(entry, param=param)
    return check_ids(entry, card, param)


def check_ids(ids: Sequence[int], card: ModelCard, param: str = "prompt") -> tuple[int, ...]:
    if max(ids, default=0) >= card.vocab_size:
        raise bad_request(
            f"{param} holds the token id {max(ids)}; model {card.name!r} has ids 0 to "
            f"{card.vocab_size - 1}",
            param=param,
            code="invalid_value",
        )
    return tuple(ids)


def _form(request: Common, card: ModelCard, text: TextModel) -> Form:
    options = request.stream_options
    if options is not None and not request.stream:
        raise bad_request(
            "stream_options is only allowed with stream: true", param="stream_options"
        )
    return Form(
        model=card.name,
        namer=Namer(text, as_ids=bool(request.return_tokens_as_token_ids)),
        logprobs=request.top() is not None,
        prompt_logprobs=request.prompt_logprobs is not None,
        token_ids=bool(request.return_token_ids),
        include_usage=bool(options and options.include_usage),
        running_usage=bool(options and options.continuous_usage_stats),
    )


def _plan(
    request: Common,
    card: ModelCard,
    requests: tuple[NewRequest, ...],
    decode: Decode,
    writer: Callable[[str], Writer],
    *,
    silent: bool = False,
) -> Plan:
    stop = request.stop if request.stop is not None else ()
    return Plan(
        card=card,
        requests=requests,
        decode=decode,
        writer=writer,
        stops=(stop,) if isinstance(stop, str) else tuple(stop),
        stream=bool(request.stream),
        choices_per_prompt=request.n or 1,
        silent=silent,
    )


class _Maker:
    """Makes the hub requests of one HTTP request."""

    def __init__(
        self, asker: Asker, request: Common, card: ModelCard, grammar: Grammar | None
    ) -> None:
        self._request = request
        self._card = card
        self._tenant = tenant_of(asker, request.cache_salt)
        self._sampling = sampling_of(request, card, logprobs=request.top(), grammar=grammar)
        self._prompt_logprobs = request.prompt_logprobs
        self._echoes_logprobs = False
        check_ids(request.stop_token_ids or (), card, "stop_token_ids")

    def echoes(self, logprobs: int | None) -> None:
        """The prompt is repeated, with its log probabilities if `logprobs` says so."""
        if logprobs is not None:
            self._echoes_logprobs = True
            self._prompt_logprobs = max(logprobs, self._prompt_logprobs or 0)

    @property
    def least(self) -> int:
        """max_tokens where nothing is to be said: the hub scores a prompt without drawing, and
        draws one token for the asking where there is nothing else to do."""
        return 1 if self._prompt_logprobs is None else 0

    def all(self, prompts: Sequence[tuple[int, ...]], wanted: int | None) -> tuple[NewRequest, ...]:
        """For every prompt n requests. Without a seed every prompt gets its own. Raises
        ApiError."""
        seeds = [
            secrets.randbits(63) if self._request.seed is None else self._sampling.seed
            for _ in prompts
        ]
        return tuple(
            self._one(prompt, seed, index, wanted)
            for prompt, seed in zip(prompts, seeds, strict=True)
            for index in range(self._request.n or 1)
        )

    def _one(
        self, prompt: tuple[int, ...], seed: int, index: int, wanted: int | None
    ) -> NewRequest:
        request = self._request
        max_tokens = room_for(self._card, prompt, wanted)
        min_tokens = request.min_tokens or 0
        if min_tokens > max_tokens:
            raise bad_request(
                f"min_tokens is {min_tokens}, more than the {max_tokens} of max_tokens",
                param="min_tokens",
                code="invalid_value",
            )
        # Harnesses that score a prompt ask for one token and drop the last entry of the log
        # probabilities, so there must be one to drop.
        scores = self._echoes_logprobs and max_tokens == 1
        return NewRequest(
            model=self._card.name,
            prompt=prompt,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            sampling=msgspec.structs.replace(self._sampling, seed=choice_seed(seed, index)),
            stop_ids=() if scores else tuple(dict.fromkeys(request.stop_token_ids or ())),
            ignore_eos=bool(request.ignore_eos) or scores,
            priority=request.priority or 0,
            tenant=self._tenant,
            prompt_logprobs=self._prompt_logprobs,
        )


def room_for(card: ModelCard, prompt: Sequence[int], wanted: int | None) -> int:
    """max_tokens: as wanted, or the model's default, or the rest of the context. Raises ApiError
    when it does not fit."""
    room = card.max_context_tokens - len(prompt)
    default = room if card.defaults.max_tokens is None else min(card.defaults.max_tokens, room)
    max_tokens = wanted if wanted is not None else max(default, 1)
    if max_tokens > room:
        raise context_error(card, len(prompt), max_tokens)
    return max_tokens


def context_error(card: ModelCard, prompt_tokens: int, max_tokens: int) -> ApiError:
    message = (
        f"model {card.name!r} has a context of {card.max_context_tokens} tokens; the prompt "
        f"has {prompt_tokens} and {max_tokens} more were asked for"
    )
    return from_reply(ReplyError(code=CONTEXT_LENGTH, message=message))


def tenant_of(asker: Asker, salt: str | None) -> str:
    """Keys cannot hold a zero character, so no key and salt look like another pair."""
    return asker.tenant if salt is None else f"{asker.tenant}\0{salt}"


def choice_seed(seed: int, index: int) -> int:
    """The seed of a prompt's choice `index`: 63 bits, the seed itself for the first."""
    if index == 0:
        return seed
    digest = blake2b(
        seed.to_bytes(8, "little") + index.to_bytes(4, "little"), digest_size=8, person=b"weft-n"
    )
    return int.from_bytes(digest.digest(), "little") >> 1


def sampling_of(
    request: Drawn, card: ModelCard, *, logprobs: int | None, grammar: Grammar | None
) -> Sampling:
    """Seeds are 63 bits: a negative one is folded, a missing one is drawn here, once, so that a
    request that is run again draws the same tokens. Raises ApiError."""

    def or_default(*values: float | None) -> float:
        return next((value for value in values if value is not None), 0.0)

    defaults = card.defaults
    top_k = defaults.top_k if request.top_k is None else request.top_k

    return Sampling(
        temperature=or_default(request.temperature, defaults.temperature, DEFAULT_TEMPERATURE),
        top_p=or_default(request.top_p, defaults.top_p, 1.0),
        top_k=max(top_k or 0, 0),
        seed=secrets.randbits(63) if request.seed is None else request.seed % (1 << 63),
        min_p=or_default(request.min_p, defaults.min_p, 0.0),
        presence_penalty=or_default(request.presence_penalty, 0.0),
        frequency_penalty=or_default(request.frequency_penalty, 0.0),
        repetition_penalty=or_default(request.repetition_penalty, 1.0),
        logit_bias=_biases(request.logit_bias or {}, card),
        logprobs=logprobs,
        grammar=grammar,
    )


def _biases(given: dict[str, float], card: ModelCard) -> tuple[tuple[int, float], ...]:
    biases = {int(token): bias for token, bias in given.items()}
    check_ids(tuple(biases), card, "logit_bias")
    if len(biases) != len(given):
        raise _twice()
    return tuple(sorted(biases.items()))


def _twice() -> ApiError:
    return bad_request(
        "logit_bias names a token id twice, with and without leading zeros",
        param="logit_bias",
        code="invalid_value",
    )
