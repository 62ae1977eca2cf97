"""The shapes of /v1/completions and /v1/chat/completions."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from weft.server import wire
from weft.server.choice import Choice, Piece
from weft.server.errors import ApiError
from weft.server.logprobs import (
    CompletionLogprobs,
    Namer,
    chat_logprobs,
    joined,
    prompt_logprobs,
)
from weft.server.tools.deltas import Collected, PlainReader, Reader, shaped_delta


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer is to be written."""

    model: str
    namer: Namer
    logprobs: bool = False
    prompt_logprobs: bool = False
    token_ids: bool = False
    include_usage: bool = False
    running_usage: bool = False
    """Usage so far in every chunk (`stream_options.continuous_usage_stats`)."""
    echo: tuple[tuple[str, int], ...] | None = None
    """For every choice its prompt's text and first id, to be repeated before the answer."""
    reader: Callable[[], Reader] = PlainReader
    """Chats: what reads the text of one choice."""


class _OpenAIWriter:
    """What both forms share: head, usage, the end."""

    def __init__(self, form: Form, head: dict[str, Any]) -> None:
        self._form = form
        self._head = head | {"created": int(time.time()), "model": form.model}

    def opening(self) -> bytes:
        return b""

    def closing(self, choices: Sequence[Choice]) -> bytes:
        if not self._form.include_usage:
            return wire.DONE
        last = {**self._head, "choices": [], "usage": wire.usage(choices)}
        return wire.event(last) + wire.DONE

    def failure(self, error: ApiError) -> bytes:
        return wire.event(error.body())

    def _event(self, entry: dict[str, Any], choices: Sequence[Choice]) -> bytes:
        value: dict[str, Any] = {**self._head, "choices": [entry]}
        if self._form.running_usage:
            value["usage"] = wire.usage(choices)
        elif self._form.include_usage:
            value["usage"] = None
        return wire.event(value)

    def _body(self, entries: list[dict[str, Any]], choices: Sequence[Choice]) -> bytes:
        return msgspec.json.encode({**self._head, "choices": entries, "usage": wire.usage(choices)})

    def _extras(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """Fields beyond OpenAI's."""
        extras: dict[str, Any] = {}
        if self._form.token_ids:
            extras["token_ids"] = piece.tokens
        if self._form.prompt_logprobs and first:
            extras["prompt_logprobs"] = prompt_logprobs(piece.prompt_logprobs, self._form.namer)
        return extras


class CompletionWriter(_OpenAIWriter):
    def __init__(self, form: Form, request_id: str) -> None:
        super().__init__(form, {"id": f"cmpl-{request_id}", "object": "text_completion"})
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def chunk(self, choice: Choice, piece: Piece, choices: Sequence[Choice]) -> bytes:
        return self._event(self._entry(choice, piece, piece.finish), choices)

    def whole(self, choices: Sequence[Choice], pieces: Sequence[Piece]) -> bytes:
        entries = [
            self._entry(choice, piece, choice.outcome)
            for choice, piece in zip(choices, pieces, strict=True)
        ]
        return self._body(entries, choices)

    def _entry(self, choice: Choice, piece: Piece, finish: str | None) -> dict[str, Any]:
        first = choice.index not in self._logprobs
        logprobs = self._logprobs.setdefault(choice.index, CompletionLogprobs(self._form.namer))
        text = piece.text
        parts: list[dict[str, Any]] = []
        if first and self._form.echo is not None:
            prompt, first_id = self._form.echo[choice.index]
            text = prompt + text
            parts = [logprobs.first(first_id, prompt), logprobs.push(piece.prompt_logprobs)]
        entry: dict[str, Any] = {"index": choice.index, "text": text, "logprobs": None}
        if self._form.logprobs:
            entry["logprobs"] = joined([*parts, logprobs.push(piece.logprobs)])
        entry["finish_reason"] = finish
        return entry | self._extras(piece, first=first)


class ChatWriter(_OpenAIWriter):
    def __init__(self, form: Form, request_id: str, *, stream: bool) -> None:
        kind = "chat.completion.chunk" if stream else "chat.completion"
        super().__init__(form, {"id": f"chatcmpl-{request_id}", "object": kind})
        self._readers: dict[int, Reader] = {}
        self._called: set[int] = set()

    def chunk(self, choice: Choice, piece: Piece, choices: Sequence[Choice]) -> bytes:
        """The first event of a choice carries the role, the last one the reason of the end."""
        out = b""
        first = choice.index not in self._readers
        reader = self._readers.setdefault(choice.index, self._form.reader())
        if first:
            opening = {"role": "assistant", "content": ""}
            out += self._event(self._entry(choice, opening, None, None), choices)
        deltas = reader.push(piece.text)
        if piece.finish is not None:
            deltas += reader.finish()
        if any(delta.call is not None for delta in deltas):
            self._called.add(choice.index)
        finish = piece.finish
        if finish == "stop" and choice.index in self._called:
            finish = "tool_calls"
        empty: dict[str, Any] = {} if finish is not None else {"content": ""}
        shaped = [shaped_delta(delta) for delta in deltas] or [empty]
        for i, delta in enumerate(shaped):
            logprobs = None
            if self._form.logprobs and i == 0:
                logprobs = chat_logprobs(piece.logprobs, self._form.namer)
            entry = self._entry(choice, delta, logprobs, finish if i == len(shaped) - 1 else None)
            if i == 0:
                entry |= self._extras(piece, first=first)
            out += self._event(entry, choices)
        return out

    def whole(self, choices: Sequence[Choice], pieces: Sequence[Piece]) -> bytes:
        entries: list[dict[str, Any]] = []
        for choice, piece in zip(choices, pieces, strict=True):
            reader = self._form.reader()
            answer = Collected([*reader.push(piece.text), *reader.finish()])
            finish = choice.outcome
            if answer.calls and finish == "stop":
                finish = "tool_calls"
            logprobs = None
            if self._form.logprobs:
                logprobs = chat_logprobs(piece.logprobs, self._form.namer)
            entry: dict[str, Any] = {
                "index": choice.index,
                "message": answer.message(),
                "logprobs": logprobs,
                "finish_reason": finish,
            }
            entries.append(entry | self._extras(piece, first=False))
        body = {**self._head, "choices": entries, "usage": wire.usage(choices)}
        if self._form.prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs(pieces[0].prompt_logprobs, self._form.namer)
        return msgspec.json.encode(body)

    def _entry(
        self, choice: Choice, delta: dict[str, Any], logprobs: Any, finish: str | None
    ) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
