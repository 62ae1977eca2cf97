"""Text in and out: a tokenizer and a chat template per model, and the threads they run in.

Lengths are bounded before tokenising, rendering and tokenising happen in an own thread pool, and
a request waits for them only so long. transformers is not imported: `tokenizers` reads
tokenizer.json, jinja2 renders the template.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from weft.core.errors import WeftError
from weft.hub.base import ModelCard
from weft.server.errors import ApiError, bad_request
from weft.server.guard import Guard, NoMark
from weft.server.messages import Conversation
from weft.server.names import TokenNames
from weft.server.rendering import CheckpointTemplate
from weft.server.templates import (
    FALLBACK_TEMPLATE,
    ChatTemplate,
    TemplateFailure,
    find_template,
    find_tool_template,
    special_tokens,
)
from weft.server.tools.families import find_family, instructed

CHARS_PER_TOKEN = 8
"""A prompt longer than this many characters per token of context is refused unread."""
MIN_PROMPT_CHARS = 4096
"""... but a prompt up to here is always tokenised, however short the context."""
TEXT_LIMIT_S = 10.0
TEXT_THREADS = 4
MAX_JOBS_PER_MODEL = 2
"""Threads one model may keep busy, so that a stuck template cannot stop the others."""
MAX_WAITING_JOBS = 4096
"""Prompts that wait for a thread. The memory they take is bounded where bodies are read."""
MAX_TOKENIZER_BYTES = 256 << 20
MAX_TOKENIZER_CONFIG_BYTES = 64 << 20

T = TypeVar("T")


def max_prompt_chars(max_context_tokens: int) -> int:
    return max(MIN_PROMPT_CHARS, CHARS_PER_TOKEN * max_context_tokens)


class TextModel:
    """A model's tokenizer and template. Its methods are called in threads of `TextService`,
    except `decode`, which is quick."""

    def __init__(self, card: ModelCard, *, limit_s: float = TEXT_LIMIT_S) -> None:
        """Reads the model's folder; a folder without tokenizer.json is served by token ids alone.
        Raises WeftError."""
        self.name = card.name
        self.vocab_size = card.vocab_size
        self.max_chars = max_prompt_chars(card.max_context_tokens)
        self._lock = threading.Lock()
        folder = Path(card.path)
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        self._names = TokenNames(self._tokenizer)
        config = _read_config(folder / "tokenizer_config.json")
        source = find_template(folder, config, own=card.chat_template)
        self.has_template = source is not None
        self._specials = _special_ids(self._tokenizer)
        self._guard = Guard(list(self._specials))
        self._plain_file = folder / "tokenizer.json"
        self._plain: Tokenizer | None = None
        tool_source = None if card.chat_template else find_tool_template(folder, config)
        self.family = find_family(tool_source or source, self._specials.get, card.tool_parser)
        """How the model calls functions."""
        self.reasons = "<think>" in (source or "") or "</think>" in (source or "")
        """Its template knows reasoning between <think> and </think>."""
        tokens = special_tokens(config)

        def template(text: str | None) -> ChatTemplate | CheckpointTemplate:
            if text is None:
                return ChatTemplate(
                    FALLBACK_TEMPLATE, tokens=tokens, max_chars=self.max_chars, limit_s=limit_s
                )
            return CheckpointTemplate(
                text, tokens=tokens, max_chars=self.max_chars, limit_s=limit_s / 2
            )

        self._template = template(source)
        self._tool_template = template(tool_source) if tool_source else self._template

    def _render(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> str:
        """Raises TemplateFailure."""
        template = self._tool_template if given["tools"] else self._template
        if isinstance(template, CheckpointTemplate):
            return template.render(messages, **given)
        with self._lock:
            return template.render(messages, **given)

    @property
    def has_text(self) -> bool:
        return self._tokenizer is not None

    def encode_chat(
        self, talk: Conversation, *, add_special_tokens: bool = False
    ) -> tuple[tuple[int, ...], str]:
        """Ids, and the end of the rendered text. The template writes its special tokens itself,
        unless the model has none and the plain form is used. Special tokens spelt in the messages
        are plain text (see `guard`). Raises ApiError."""
        if talk.tools and self.family.instructs:
            talk = instructed(talk)
        given = (talk.messages, talk.tools, talk.documents, talk.args)
        self.check_chars(sum(_size(part) for part in given), "messages")
        try:
            (messages, tools, documents, args), mark = self._guard.mark(
                [list(talk.messages), list(talk.tools), list(talk.documents), talk.args]
            )
        except NoMark:
            raise bad_request(
                "messages use all of U+FDD0 to U+FDEF; leave one of these code points out",
                param="messages",
            ) from None
        try:
            text = self._render(
                messages,
                tools=tools,
                documents=documents,
                args=args,
                add_generation_prompt=talk.add_generation_prompt,
            )
        except TemplateFailure as error:
            raise bad_request(str(error), param="messages") from None
        adds = add_special_tokens or not self.has_template
        if mark is None:
            return self._encode(text, add_special_tokens=adds, param="messages"), text[-64:]
        tokenizer, plain = self._tokenizers("messages")
        ids = self._guard.encode(
            text,
            mark,
            lambda piece: _ids(tokenizer, piece),
            lambda piece: _ids(plain, piece),
        )
        if adds:
            ids = [*tokenizer.encode("", add_special_tokens=True).ids, *ids]
        return self._checked(tuple(ids), "messages"), text[-64:].replace(mark, "")

    def encode_prompt(
        self, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> tuple[int, ...]:
        """Tokenises a completion's prompt, with the special tokens the tokenizer adds to a text.
        Raises ApiError."""
        self.check_chars(len(text), param)
        return self._encode(text, add_special_tokens=add_special_tokens, param=param)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens; "" for a model without a tokenizer."""
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def decode_keeping(self, marks: Mapping[str, int], ids: list[int]) -> str:
        """As `decode`, with these special tokens left as they are spelt."""
        spelt = {token: mark for mark, token in marks.items()}
        if not any(token in spelt for token in ids):
            return self.decode(ids)
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token in spelt:
                parts += [self.decode(run) if run else "", spelt[token]]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self.decode(run) if run else ""])

    def special_ids_of(self, texts: Sequence[str]) -> dict[str, int]:
        """Ids of those texts that are special tokens."""
        return {text: self._specials[text] for text in texts if text in self._specials}

    def decode_whole(self, ids: list[int]) -> str:
        """Text of `ids` with special tokens. Raises ApiError."""
        tokenizer, _ = self._tokenizers("tokens", plain=False)
        text: str = tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def token_text(self, token: int) -> str:
        """The text of one token inside a text, special ones as they are written; U+FFFD stands for
        bytes that are no whole character."""
        return self._names.text(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that the token adds to a text."""
        return self._names.bytes(token)

    def check_chars(self, size: int, param: str) -> None:
        """Raises ApiError 400 for more characters than the context may hold."""
        if size > self.max_chars:
            raise bad_request(
                f"{param} has {size} characters; model {self.name!r} takes at most "
                f"{self.max_chars}",
                param=param,
                code="context_length_exceeded",
            )

    def _encode(self, text: str, *, add_special_tokens: bool, param: str) -> tuple[int, ...]:
        tokenizer, _ = self._tokenizers(param, plain=False)
        ids = _ids(tokenizer, text, add_special_tokens=add_special_tokens)
        return self._checked(tuple(ids), param)

    def _tokenizers(self, param: str, *, plain: bool = True) -> tuple[Tokenizer, Tokenizer]:
        """The tokenizer, and one to which special tokens are plain text, read when it is first
        needed. Raises ApiError."""
        if self._tokenizer is None:
            raise bad_request(
                f"model {self.name!r} has no tokenizer.json; send token ids to /v1/completions",
                param=param,
            )
        if not plain:
            return self._tokenizer, self._tokenizer
        with self._lock:
            if self._plain is None:
                self._plain = _read_tokenizer(self._plain_file)
                if self._plain is None:
                    raise ApiError(503, f"model {self.name!r} lost its tokenizer.json")
                self._plain.encode_special_tokens = True
        return self._tokenizer, self._plain

    def _checked(self, ids: tuple[int, ...], param: str) -> tuple[int, ...]:
        if not ids:
            raise bad_request(f"{param} holds no token", param=param)
        if max(ids) >= self.vocab_size:
            raise bad_request(
                f"{param} holds the token id {max(ids)}, which the tokenizer of model "
                f"{self.name!r} knows and the model does not ({self.vocab_size} ids)",
                param=param,
            )
        return ids


def _ids(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """As a batch of one: `encode` keeps Python's lock, a second for a megabyte, in which the event
    loop would stand still."""
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids


def _size(value: Any) -> int:
    """Characters of all the texts in it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + _size(item) for key, item in value.items())
    return sum(_size(item) for item in value) if isinstance(value, (list, tuple)) else 0


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, int]:
    if tokenizer is None:
        return {}
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if token.special}


class TextService:
    """The text models of a frontend and the threads that work for them."""

    def __init__(self, *, threads: int = TEXT_THREADS, limit_s: float = TEXT_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weft-text")
        self._models: dict[str, tuple[ModelCard, asyncio.Task[TextModel]]] = {}
        self._lanes: dict[str, asyncio.Semaphore] = {}
        self._waiting = 0
        self.served: Callable[[], Collection[str]] | None = None
        """Names of the models that there are; texts of others are forgotten when one is read."""

    async def model(self, card: ModelCard) -> TextModel:
        """The model's text side, read at first use and when its card has changed. Raises ApiError
        503 when it is broken."""
        known, task = self._models.get(card.name, (None, None))
        if task is None or known != card:
            if self.served is not None:
                names = {*self.served(), card.name}
                self._models = {name: kept for name, kept in self._models.items() if name in names}
            task = asyncio.get_running_loop().create_task(self._load(card))
            self._models[card.name] = (card, task)
        try:
            return await asyncio.shield(task)
        except WeftError as error:
            raise ApiError(503, str(error), code="model_failed", retry_after_s=30) from None

    async def _load(self, card: ModelCard) -> TextModel:
        def load() -> TextModel:
            return TextModel(card, limit_s=self._limit_s)

        return await asyncio.get_running_loop().run_in_executor(self._pool, load)

    async def run(self, model: str, work: Callable[[], T]) -> T:
        """`work` in a thread. Raises ApiError 429 when too many wait, 503 when it takes too long
        (the thread is then left to finish on its own, and its model's lane stays taken)."""
        if self._waiting >= MAX_WAITING_JOBS:
            raise ApiError(
                429, "too many prompts wait to be tokenised", code="queue_full", retry_after_s=1
            )
        lane = self._lanes.setdefault(model, asyncio.Semaphore(MAX_JOBS_PER_MODEL))
        self._waiting += 1
        try:
            async with asyncio.timeout(self._limit_s):
                await lane.acquire()
                job = asyncio.get_running_loop().run_in_executor(self._pool, work)
                job.add_done_callback(lambda _: lane.release())
                job.add_done_callback(_forget)
                return await asyncio.shield(job)
        except TimeoutError:
            raise ApiError(
                503,
                f"rendering and tokenising took longer than {self._limit_s:g} s",
                code="text_timeout",
                retry_after_s=5,
            ) from None
        finally:
            self._waiting -= 1

    def close(self) -> None:
        for _, task in self._models.values():
            task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _forget(job: "asyncio.Future[Any]") -> None:
    """Take the error of a job that may have nobody waiting, so that it is not reported as lost."""
    if not job.cancelled():
        job.exception()


def _read_tokenizer(file: Path) -> Tokenizer | None:
    if not file.is_file():
        return None
    if file.stat().st_size > MAX_TOKENIZER_BYTES:
        raise WeftError(f"{file}: larger than {MAX_TOKENIZER_BYTES} bytes")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise WeftError(f"{file}: not a tokenizer: {str(error)[:200]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    if file.stat().st_size > MAX_TOKENIZER_CONFIG_BYTES:
        raise WeftError(f"{file}: larger than {MAX_TOKENIZER_CONFIG_BYTES} bytes")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeftError(f"{file}: not JSON: {str(error)[:200]}") from None
    if not isinstance(config, dict):
        raise WeftError(f"{file}: expected an object")
    return config
