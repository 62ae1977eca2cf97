"""Token ids to text, a token at a time, and stop strings.

Both work token by token whatever the chunks were, so the text of an answer does not depend on how
its tokens were grouped on their way here.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "�"
PROMPT_TAIL_TOKENS = 12
"""Ids of the prompt that the first output token is decoded behind (a leading space is text). Enough
to hold a whole character between two that are cut."""
MAX_HELD_TOKENS = 24
"""Tokens that may wait for the rest of a character. A character is at most 4 bytes, so a longer
wait means bytes that are no UTF-8: they are shown as U+FFFD."""

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Incremental decoding with a window: the text of ids[start:] minus the text of the part of it
    that was already given out. Text is held back while it ends in U+FFFD, so a character is
    never split.

        ids  ... | start ......... given | given ...... end
                   decoded as context      decoded behind it, the difference is new
    """

    def __init__(self, decode: Decode, prompt_tail: Sequence[int] = ()) -> None:
        """`decode` turns ids into text, special tokens left out; it never raises."""
        self._decode = decode
        self._ids = list(prompt_tail[-PROMPT_TAIL_TOKENS:])
        self._given = len(self._ids)
        self._context = decode(self._ids) if self._ids else ""
        for cut in range(1, min(4, len(self._ids))):
            if not self._context.endswith(REPLACEMENT):
                break
            before = decode(self._ids[:-cut])
            if not before.endswith(REPLACEMENT):  # the prompt ends inside a character
                self._given, self._context = len(self._ids) - cut, before

    def push(self, token: int) -> str:
        """The text that became certain with this token, often "" inside a character."""
        self._ids.append(token)
        text = self._decode(self._ids)
        held = len(self._ids) - self._given
        if text.endswith(REPLACEMENT) and held < MAX_HELD_TOKENS:
            return ""
        return self._give(text)

    def finish(self) -> str:
        """What was still held back."""
        if self._given == len(self._ids):
            return ""
        return self._give(self._decode(self._ids))

    def _give(self, text: str) -> str:
        new = text[len(self._context) :]
        if new:
            self._ids = self._ids[self._given :]
            self._given = len(self._ids)
            self._context = self._decode(self._ids)
        elif len(self._ids) - self._given >= MAX_HELD_TOKENS:
            del self._ids[self._given :]  # tokens without text, such as special ones
        return new


class StopStrings:
    """Finds the first of several strings in a text that arrives in pieces.

    One Knuth-Morris-Pratt state per string: the state is the longest end of the text so far that
    may be the beginning of the string, which is exactly what must be held back.
    Of several strings that end at the same character the longest wins.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty."""
        self._stops = tuple(stops)
        self._failure = [_failure_table(stop) for stop in self._stops]
        self._state = [0] * len(self._stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that can be given out. Once `found` is set there is none
        after this."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        buffer = self._held + text
        for i, char in enumerate(text):
            stop = self._advance(char)
            if stop is not None:
                self.found = stop
                self._held = ""
                return buffer[: len(buffer) - len(text) + i + 1 - len(stop)]
        hold = max(self._state)
        self._held = buffer[len(buffer) - hold :]
        return buffer[: len(buffer) - hold]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        found: str | None = None
        for i, stop in enumerate(self._stops):
            state = self._state[i]
            while state and stop[state] != char:
                state = self._failure[i][state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                if found is None or len(stop) > len(found):
                    found = stop
                state = self._failure[i][state - 1]
            self._state[i] = state
        return found


def _failure_table(pattern: str) -> list[int]:
    """table[i]: length of the longest proper prefix of pattern[: i + 1] that is also its end."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        table[i] = length
    return table
