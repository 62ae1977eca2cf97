"""Keeps a chat's texts from speaking as the template.

A client's text may hold the spelling of a special token, such as `<|im_end|>`. Rendered into the
template and tokenised it would become that token: the text could end its own message and begin
another role's. So every special token's spelling in what the client sent is cut by a mark before
rendering. Where the rendered text has no mark (nearly always) it is tokenised whole, exactly as
transformers does. Otherwise the pieces between the special tokens that the template wrote itself
are looked at one by one: those with a mark are tokenised with special tokens taken as plain text.
Special tokens of one character cannot be cut and stay what they are.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Code points that Unicode keeps free of meaning for good."""


class NoMark(Exception):
    """A text uses every one of `MARKS`."""


class Guard:
    """Knows one tokenizer's special tokens."""

    def __init__(self, specials: Sequence[str]) -> None:
        longest_first = sorted({text for text in specials if len(text) > 1}, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def mark(self, values: Sequence[Any]) -> tuple[list[Any], str | None]:
        """The values with every special token's spelling cut by a mark, and the mark; None where
        there was none to cut. Raises NoMark."""
        if not any(self._touches(value) for value in values):
            return list(values), None
        mark = self._free_mark(values)

        def cut(text: str) -> str:
            return self._specials.sub(lambda hit: hit[0][0] + mark + hit[0][1:], text)

        return [_mapped(value, cut) for value in values], mark

    def encode(
        self,
        text: str,
        mark: str,
        whole: Callable[[str], Sequence[int]],
        plain: Callable[[str], Sequence[int]],
    ) -> list[int]:
        """Ids of a rendered text with marks: `whole` knows special tokens, `plain` does not."""
        ids: list[int] = []
        clean = ""
        for piece in self._pieces(text):
            if mark in piece:
                ids += whole(clean) if clean else ()
                ids += plain(piece.replace(mark, ""))
                clean = ""
            else:
                clean += piece
        return [*ids, *(whole(clean) if clean else ())]

    def _pieces(self, text: str) -> list[str]:
        """Special tokens and what lies between them, in order."""
        pieces: list[str] = []
        at = 0
        for hit in self._specials.finditer(text):
            pieces += [text[at : hit.start()], hit[0]]
            at = hit.end()
        return [*pieces, text[at:]]

    def _touches(self, value: Any) -> bool:
        if isinstance(value, str):
            return self._specials.search(value) is not None
        if isinstance(value, Mapping):
            return any(self._touches(key) or self._touches(item) for key, item in value.items())
        return isinstance(value, list) and any(self._touches(item) for item in value)

    def _free_mark(self, values: Sequence[Any]) -> str:
        used: set[str] = set()
        for value in values:
            _mapped(value, lambda text: used.update(char for char in MARKS if char in text) or text)
        for mark in MARKS:
            if mark not in used:
                return mark
        raise NoMark


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value
