"""Readers of answers: calls between marks, calls as bare JSON, reasoning before all.

Every reader gives the same contents, reasoning and calls however its text was cut into pieces.
"""

import re
import secrets
import string
from collections.abc import Callable, Collection

import msgspec

from weft.server.tools.deltas import CallDelta, Delta, PlainReader, Reader
from weft.server.tools.scan import MAX_HEAD_CHARS, CallScanner

MAX_BLANKS = 64
"""Blanks that are dropped (and so held back) before a call, and before and after reasoning."""
BLOCK_CHARS = 4096
"""Text is taken in pieces of this size, so that the cost of a cut has a bound."""
_ALPHABET = string.ascii_letters + string.digits


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """Nine letters and digits, which Mistral's templates insist on."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


def trailing_blanks(text: str) -> int:
    """How many of the last MAX_BLANKS characters are blanks at the end."""
    tail = text[-MAX_BLANKS:]
    return len(tail) - len(tail.rstrip())


def held_suffix(text: str, mark: str) -> int:
    """Length of the longest end of `text` that may be the beginning of `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0


class _Calls:
    """Gives the calls of one answer their ids and numbers."""

    def __init__(self, make_id: Callable[[], str], most: int | None) -> None:
        self._make_id = make_id
        self._most = most
        self.count = 0

    @property
    def full(self) -> bool:
        return self._most is not None and self.count >= self._most

    def begin(self, name: str) -> Delta:
        self.count += 1
        return Delta(call=CallDelta(index=self.count - 1, id=self._make_id(), name=name))

    def more(self, arguments: str) -> list[Delta]:
        if not arguments:
            return []
        return [Delta(call=CallDelta(index=self.count - 1, arguments=arguments))]


class CallForm(msgspec.Struct, frozen=True, kw_only=True):
    """How a family of models writes calls. Between `open` and `close` stand objects with name and
    arguments, or, if `named`, a name and the object of its arguments."""

    open: str
    close: str = ""
    frame: str = ""
    """Characters besides blanks that may stand around the objects."""
    bare: bool = False
    """An answer that begins with an object which names a known function is a call too."""
    named: str = ""
    """What stands between a name and its arguments."""
    make_id: Callable[[], str] = call_id


class CallReader:
    """Content and calls. What turns out to be no call is content; blanks before calls are dropped.

    States: start (nothing was said yet), text, frame (inside `open`, between the objects), name,
    call. `aside` is what was taken for a frame since the last content or call.
    """

    def __init__(
        self, form: CallForm, *, names: Collection[str] = (), most: int | None = None
    ) -> None:
        """At most `most` calls are given, and nothing after the last of them."""
        self._form = form
        self._names = frozenset(names)
        self._calls = _Calls(form.make_id, most)
        self._marks = [mark for mark in (form.open, form.close) if mark]
        self._state = "start" if form.bare else "text"
        self._held = ""
        self._aside = ""
        self._scanner = CallScanner()
        self._begun = False

    def push(self, text: str) -> list[Delta]:
        deltas: list[Delta] = []
        for at in range(0, len(text), BLOCK_CHARS):
            deltas += self._push(text[at : at + BLOCK_CHARS])
        return deltas

    def _push(self, text: str) -> list[Delta]:
        steps = {
            "start": self._start,
            "text": self._text,
            "frame": self._frame,
            "name": self._name,
            "call": self._call,
        }
        deltas: list[Delta] = []
        buffer = self._held + text
        while buffer:
            if self._calls.full and self._state != "call":
                buffer = ""
                break
            before = len(buffer), self._state
            buffer = steps[self._state](buffer, deltas)
            if (len(buffer), self._state) == before:
                break
        self._held = buffer
        return deltas

    def finish(self) -> list[Delta]:
        held, self._held = self._held, ""
        if self._state == "call":
            return [] if self._begun else _said(self._aside + self._scanner.raw)
        if self._calls.full or (self._calls.count and not held.strip()):
            return []
        return _said(self._aside + held if self._opened or not self._calls.count else held)

    @property
    def _opened(self) -> bool:
        """Nothing came of the last opening mark yet."""
        return self._form.open in self._aside

    def _start(self, buffer: str, deltas: list[Delta]) -> str:
        rest = buffer.lstrip()
        if not rest and len(buffer) <= MAX_BLANKS:
            return buffer
        if rest.startswith("{") and len(buffer) - len(rest) <= MAX_BLANKS:
            self._aside = buffer[: len(buffer) - len(rest)]
            self._begin_call(CallScanner())
            return rest
        self._state = "text"
        return buffer

    def _text(self, buffer: str, deltas: list[Delta]) -> str:
        at = buffer.find(self._form.open)
        end = at if at >= 0 else len(buffer) - held_suffix(buffer, self._form.open)
        content = buffer[: end - trailing_blanks(buffer[:end])]
        deltas += _said(content)
        if at < 0:
            return buffer[len(content) :]
        self._aside = buffer[len(content) : at] + self._form.open
        self._state = "frame"
        return buffer[at + len(self._form.open) :]

    def _frame(self, buffer: str, deltas: list[Delta]) -> str:
        """Takes one mark or character."""
        for mark in self._marks:
            if buffer.startswith(mark):
                self._aside += mark
                if mark == self._form.close:
                    deltas += self._give_back()
                return buffer[len(mark) :]
            if mark.startswith(buffer):
                return buffer
        char = buffer[0]
        if char == "{":
            self._begin_call(CallScanner())
            return buffer
        if len(self._aside) > MAX_HEAD_CHARS:
            deltas += self._give_back()
            return buffer
        if char.isspace() or char in self._form.frame:
            self._aside += char
            return buffer[1:]
        if self._form.named and self._opened and _NAME.match(char):
            self._state = "name"
        else:
            deltas += self._give_back()
        return buffer

    def _name(self, buffer: str, deltas: list[Delta]) -> str:
        whole = _NAME.match(buffer)
        assert whole is not None
        name, rest = whole[0], buffer[whole.end() :]
        if len(name) > MAX_HEAD_CHARS:
            deltas += self._give_back()
            return buffer
        if not rest or (self._form.named.startswith(rest) and rest != self._form.named):
            return buffer
        if rest.startswith(self._form.named):
            self._aside += name + self._form.named
            self._begin_call(CallScanner(name=name))
            return rest[len(self._form.named) :]
        deltas += self._give_back()
        return buffer

    def _give_back(self) -> list[Delta]:
        """The frame is over; without any call in it, it was content."""
        said = _said(self._aside) if self._opened else []
        self._aside, self._state = "", "text"
        return said

    def _begin_call(self, scanner: CallScanner) -> None:
        self._scanner, self._begun, self._state = scanner, False, "call"

    def _call(self, buffer: str, deltas: list[Delta]) -> str:
        scanner = self._scanner
        i = -1
        while i + 1 < len(buffer):
            i += 1
            i += scanner.skip(buffer, i)
            if i == len(buffer):
                break
            scanner.push(buffer[i])
            if not self._begun and scanner.name is not None and not self._is_call(scanner.name):
                scanner.failed = True
            if scanner.failed:
                return self._failed(buffer[i + 1 :], deltas)
            if not self._begun and scanner.name is not None:
                self._begun, self._aside = True, ""
                deltas.append(self._calls.begin(scanner.name))
            if scanner.done:
                deltas += self._calls.more(scanner.take())
                self._state = "frame"
                return buffer[i + 1 :]
        if self._begun:
            deltas += self._calls.more(scanner.take())
        return ""

    def _is_call(self, name: str) -> bool:
        """After a mark any name is one: the client hears what the model asked for."""
        return self._opened or self._calls.count > 0 or name in self._names

    def _failed(self, rest: str, deltas: list[Delta]) -> str:
        """The object is no call. What was begun cannot be taken back."""
        if self._begun:
            deltas += self._calls.more(self._scanner.take())
        else:
            deltas += _said(self._aside + self._scanner.raw)
        self._aside, self._state = "", "text"
        return rest


_NAME = re.compile(r"[A-Za-z0-9_.:/-]+")


def _said(text: str) -> list[Delta]:
    return [Delta(content=text)] if text else []


class ReasoningReader:
    """`<think>...</think>` at the beginning is reasoning, the rest is for `inner`."""

    OPEN, CLOSE = "<think>", "</think>"

    def __init__(self, inner: Reader | None = None, *, inside: bool) -> None:
        """`inside`: the prompt has already opened the reasoning."""
        self._inner = inner or PlainReader()
        self._state = "inside" if inside else "start"
        self._fresh = True
        self._held = ""

    def push(self, text: str) -> list[Delta]:
        buffer = self._held + text
        self._held = ""
        if self._state == "start":
            rest = buffer.lstrip()
            is_near = len(buffer) - len(rest) <= MAX_BLANKS
            if is_near and self.OPEN.startswith(rest) and rest != self.OPEN:
                self._held = buffer
                return []
            if is_near and rest.startswith(self.OPEN):
                self._state, buffer = "inside", rest[len(self.OPEN) :]
            else:
                self._state = "outside"
        deltas: list[Delta] = []
        if self._state == "inside":
            buffer = self._inside(buffer, deltas)
        if self._state == "after":
            buffer = buffer.lstrip()
            if buffer:
                self._state = "outside"
        if self._state == "outside" and buffer:
            deltas += self._inner.push(buffer)
        return deltas

    def _inside(self, buffer: str, deltas: list[Delta]) -> str:
        """What follows the reasoning, if it is over; blanks around the reasoning are dropped."""
        if self._fresh:
            buffer = buffer.lstrip()
            self._fresh = not buffer
        at = buffer.find(self.CLOSE)
        if at >= 0:
            thought = buffer[: at - trailing_blanks(buffer[:at])]
            if thought:
                deltas.append(Delta(reasoning=thought))
            self._state = "after"
            return buffer[at + len(self.CLOSE) :]
        keep = held_suffix(buffer, self.CLOSE)
        keep += trailing_blanks(buffer[: len(buffer) - keep])
        thought = buffer[: len(buffer) - keep]
        if thought:
            deltas.append(Delta(reasoning=thought))
        self._held = buffer[len(buffer) - keep :]
        return ""

    def finish(self) -> list[Delta]:
        held, self._held = self._held, ""
        if self._state == "inside":
            thought = held[: len(held) - trailing_blanks(held)]
            return [Delta(reasoning=thought)] if thought else []
        deltas = self._inner.push(held) if held else []
        return [*deltas, *self._inner.finish()]
