"""Log probabilities in the three shapes clients know: completions', chat's, and vLLM's
`prompt_logprobs`."""

import codecs
from collections.abc import Sequence
from typing import Any

from weft.core.request import TokenLogprobs
from weft.server.text import TextModel

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def _number(logprob: float) -> float:
    return max(logprob, LOWEST)


class Namer:
    """How tokens are written in log probabilities."""

    def __init__(self, text: TextModel, *, as_ids: bool) -> None:
        self._text = text
        self._as_ids = as_ids

    def plain(self, token: int) -> str:
        """The text of the token alone; U+FFFD for a part of a character."""
        return f"token_id:{token}" if self._as_ids else self._text.token_text(token)

    def unique(self, token: int) -> str:
        """As `plain`, but parts of characters as `bytes:\\xe2\\x82`, as the OpenAI API has it."""
        name = self.plain(token)
        if "\ufffd" not in name:
            return name
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._text.token_bytes(token))

    def bytes(self, token: int) -> list[int]:
        return list(self._text.token_bytes(token))


class CompletionLogprobs:
    """tokens, token_logprobs, top_logprobs and text_offset of one choice, piece by piece."""

    def __init__(self, namer: Namer) -> None:
        self._namer = namer
        self._offset = 0
        """Characters of the text so far. One in several tokens begins where the first of them
        does."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def first(self, token: int, text: str) -> dict[str, Any]:
        """The first token of the echoed prompt `text`, whose probability nothing precedes. What a
        tokenizer puts in front is not in the text."""
        own = bytes(self._namer.bytes(token)).lstrip()
        in_text = text.encode().lstrip().startswith(own)
        return self._entry([(token, None, None)], in_text=in_text)

    def push(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        rows: list[tuple[int, float | None, dict[str, float] | None]] = []
        for entry in entries:
            tops: dict[str, float] = {}
            for token, logprob in (*entry.top, (entry.token, entry.logprob)):
                tops.setdefault(self._namer.unique(token), _number(logprob))
            rows.append((entry.token, _number(entry.logprob), tops))
        return self._entry(rows)

    def _entry(
        self,
        rows: Sequence[tuple[int, float | None, dict[str, float] | None]],
        *,
        in_text: bool = True,
    ) -> dict[str, Any]:
        offsets: list[int] = []
        for token, _, _ in rows:
            offsets.append(self._offset)
            if in_text:
                self._offset += len(self._utf8.decode(bytes(self._namer.bytes(token))))
        return {
            "tokens": [self._namer.unique(row[0]) for row in rows],
            "token_logprobs": [row[1] for row in rows],
            "top_logprobs": [row[2] for row in rows],
            "text_offset": offsets,
        }


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several pieces of `CompletionLogprobs` as one."""
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {key: [item for part in parts for item in part[key]] for key in keys}


def chat_logprobs(entries: Sequence[TokenLogprobs], namer: Namer) -> dict[str, Any]:
    def item(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": namer.plain(token),
            "logprob": _number(logprob),
            "bytes": namer.bytes(token),
        }

    content = [
        item(entry.token, entry.logprob)
        | {"top_logprobs": [item(token, logprob) for token, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(entries: Sequence[TokenLogprobs], namer: Namer) -> list[Any]:
    """vLLM's shape: null for the first token, then {id: {logprob, rank, decoded_token}}. The rank
    of a token outside the most probable ones is null."""
    shaped: list[Any] = [None]
    for entry in entries:
        position: dict[str, Any] = {}
        for rank, (token, logprob) in enumerate(entry.top, start=1):
            position[str(token)] = {
                "logprob": _number(logprob),
                "rank": rank,
                "decoded_token": namer.plain(token),
            }
        own = {"logprob": _number(entry.logprob), "rank": None}
        position.setdefault(str(entry.token), {**own, "decoded_token": namer.plain(entry.token)})
        shaped.append(position)
    return shaped
