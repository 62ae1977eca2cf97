"""One function call read from JSON text that comes in pieces: `{"name": ..., "arguments": {...}}`.

The name is known as soon as its text is whole, and the arguments are given out as they come, so a
client sees them grow.
"""

import json
import re

NAME_KEYS = ("name",)
ARGUMENT_KEYS = ("arguments", "parameters")
_PLAIN = re.compile(r'[^"\\]+')
MAX_HEAD_CHARS = 4096
"""What may stand before the name is known, arguments aside."""


class ValueScanner:
    """Finds the end of one JSON value by its brackets and quotes; whether all inside is well formed
    is for whoever uses it."""

    def __init__(self) -> None:
        self.kind = ""
        """Its first character: `{`, `[`, `"` or that of a number or word."""
        self.done = False
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def push(self, char: str) -> bool:
        """Whether `char` belongs to the value. A number or word ends before a char that does not,
        the others with their last one."""
        if not self.kind:
            self.kind = char
        if self.kind not in '{["' and char in ",}] \t\r\n":
            self.done = True
            return False
        if self._quoted:
            self._in_text(char)
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = self._depth <= 0
        return True

    @property
    def is_plain(self) -> bool:
        """Inside quotes, where nothing but a quote or a backslash means anything."""
        return self._quoted and not self._escaped

    def _in_text(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._quoted = False
            self.done = self._depth == 0


class CallScanner:
    """Reads one object, a character at a time, from its `{` on; with a name given, the object of
    the arguments alone."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.done = False
        self.failed = False
        self.raw = ""
        """All that was read."""
        self._alone = name is not None
        self._state = "open" if name is None else "begin"
        self._key = "" if name is None else ARGUMENT_KEYS[0]
        self._value: ValueScanner | None = None
        self._text = ""
        self._arguments = ""
        self._given = 0
        self._has_arguments = False

    def skip(self, text: str, at: int) -> int:
        """Takes what is plain text inside a quoted value from `at` on; how many characters."""
        if self._state != "value" or self._value is None or not self._value.is_plain:
            return 0
        run = _PLAIN.match(text, at)
        if run is None:
            return 0
        self.raw += run[0]
        if self._key in ARGUMENT_KEYS:
            self._arguments += run[0]
        elif self._key in NAME_KEYS:
            self._text += run[0]
        return run.end() - at

    def push(self, char: str) -> None:
        """Not to be called once `done` or `failed`."""
        self.raw += char
        if self._state == "value":
            self._in_value(char)
        elif self._state == "key":
            self._in_key(char)
        elif not char.isspace():
            self._between(char)
        if self.name is None and len(self.raw) - len(self._arguments) > MAX_HEAD_CHARS:
            self.failed = True

    def take(self) -> str:
        """The part of the arguments' text that has come since the last call; nothing before the
        name is known. Arguments that were written as a text come when they are whole, absent ones
        as `{}` in the end."""
        if self.name is None or (self._arguments[:1] not in ("{", "") and not self.done):
            return ""
        if self.done and not self._given:
            self._arguments = self._settled()
        fresh = self._arguments[self._given :]
        self._given = len(self._arguments)
        return fresh

    def _settled(self) -> str:
        text = self._arguments
        if text.startswith('"'):
            try:
                text = json.loads(text)
            except ValueError:
                return text
        return text if text.strip() not in ("", "null") else "{}"

    def _between(self, char: str) -> None:
        expected = {"open": "{", "first": '"}', "next": ",}", "more": '"', "colon": ":"}
        if self._state == "begin":
            self._begin_value(char)
        elif char not in expected[self._state]:
            self.failed = True
        elif char == "{":
            self._state = "first"
        elif char == '"':
            self._state, self._text, self._value = "key", char, ValueScanner()
            self._value.push(char)
        elif char == ",":
            self._state = "more"
        elif char == ":":
            self._state = "begin"
        else:
            self._end()

    def _end(self) -> None:
        self.done = self.name is not None
        self.failed = self.name is None

    def _in_key(self, char: str) -> None:
        assert self._value is not None
        self._value.push(char)
        self._text += char
        if self._value.done:
            self._key = _text_of(self._text)
            self._state = "colon"

    def _begin_value(self, char: str) -> None:
        self._state, self._text, self._value = "value", "", ValueScanner()
        if self._key in ARGUMENT_KEYS:
            if self._has_arguments:
                self.failed = True
            self._has_arguments = True
        self._in_value(char)

    def _in_value(self, char: str) -> None:
        assert self._value is not None
        if self._value.push(char):
            if self._key in ARGUMENT_KEYS:
                self._arguments += char
            elif self._key in NAME_KEYS:
                self._text += char
            if not self._value.done:
                return
            char = ""
        if self._key in NAME_KEYS and self.name is None:
            self.name = _text_of(self._text) or None
            self.failed = self.name is None
        self._state = "next"
        self.done = self._alone
        if char and not char.isspace():
            self._between(char)


def _text_of(quoted: str) -> str:
    """ "" for what is no JSON text."""
    try:
        value = json.loads(quoted)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""
