"""The shapes of OpenAI's answers, as bytes."""

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from weft.server.choice import Choice, Piece
from weft.server.errors import ApiError
from weft.server.plan import Plan

DONE = b"data: [DONE]\n\n"
HELD = b": weft: held while the model comes in\n\n"
WAITING = b": weft: waiting for its turn\n\n"


def event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    return event(error.body())


class Writer:
    """Writes one HTTP answer's pieces in the form of its route."""

    def __init__(self, plan: Plan, request_id: str) -> None:
        self._plan = plan
        kind = "chat.completion" if plan.chat else "text_completion"
        suffix = ".chunk" if plan.chat and plan.stream else ""
        self._head = {
            "id": f"{'chatcmpl' if plan.chat else 'cmpl'}-{request_id}",
            "object": kind + suffix,
            "created": int(time.time()),
            "model": plan.card.name,
        }
        self._begun: set[int] = set()

    def chunk(self, choice: Choice, piece: Piece, choices: Sequence[Choice]) -> bytes:
        """The events of one piece; the first of a chat choice carries the role."""
        out = b""
        if self._plan.chat and choice.index not in self._begun:
            self._begun.add(choice.index)
            first = {"role": "assistant", "content": ""}
            out += self._event(self._delta(choice.index, first, None), choices)
        if self._plan.chat:
            delta = {"content": piece.text} if piece.text or piece.finish is None else {}
            entry = self._delta(choice.index, delta, piece.finish)
        else:
            entry = {
                "index": choice.index,
                "text": piece.text,
                "logprobs": None,
                "finish_reason": piece.finish,
            }
        if self._plan.token_ids:
            entry["token_ids"] = piece.tokens
        return out + self._event(entry, choices)

    def usage_chunk(self, choices: Sequence[Choice]) -> bytes:
        return event({**self._head, "choices": [], "usage": usage(choices)})

    def whole(
        self, choices: Sequence[Choice], texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> bytes:
        """The body of an answer that is not streamed. All choices are done."""
        entries: list[dict[str, Any]] = []
        for choice, text, tokens in zip(choices, texts, ids, strict=True):
            entry: dict[str, Any] = {"index": choice.index}
            if self._plan.chat:
                entry["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                entry["text"] = text
            entry |= {"logprobs": None, "finish_reason": choice.outcome}
            if self._plan.token_ids:
                entry["token_ids"] = tokens
            entries.append(entry)
        return msgspec.json.encode({**self._head, "choices": entries, "usage": usage(choices)})

    def _delta(self, index: int, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _event(self, entry: dict[str, Any], choices: Sequence[Choice]) -> bytes:
        value: dict[str, Any] = {**self._head, "choices": [entry]}
        if self._plan.running_usage:
            value["usage"] = usage(choices)
        elif self._plan.include_usage:
            value["usage"] = None
        return event(value)


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    prompt = sum(choice.prompt_tokens for choice in choices)
    output = sum(choice.output_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
    }
