"""Chat templates: found beside the tokenizer, rendered in an immutable sandbox.

A template is a program that came with a checkpoint. It sees plain strings, lists and dicts, may not
change them, may not run past a deadline and may not write more than a bound. The environment is
the one templates are written for (transformers' `apply_chat_template`): blocks trimmed, loop
controls, `generation` blocks, `tojson` without HTML escapes, `raise_exception`, `strftime_now`.
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from weft.core.errors import WeftError

MAX_TEMPLATE_CHARS = 1 << 20
MAX_REPEATED = 1 << 20
"""Longest string or list a template may make by multiplication."""

FALLBACK_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For models without a template: one `role: content` line a message, then `assistant:`."""


class TemplateFailure(Exception):
    """The template refused the messages or broke a bound; the message is meant for the client."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; in serving it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Checks the deadline at every attribute, item and call, so that no loop can hide from it."""

    intercepted_binops = frozenset(["**", "*", "%"])

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,  # nothing is computed before the limits hold
        )
        self._clock = clock
        self.deadline_s = float("inf")

    def check_time(self) -> None:
        if self._clock() > self.deadline_s:
            raise TemplateFailure("the chat template took too long")

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_time()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.check_time()
        if operator == "**":
            raise SecurityError("powers are not allowed in chat templates")
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("a chat template asks for a field that is too wide")
        if operator == "*" and max(_repeated(left, right), _repeated(right, left)) > MAX_REPEATED:
            raise SecurityError("a chat template repeats a text too often")
        return super().call_binop(context, operator, left, right)


_WIDE = re.compile(r"\d{5}|\*")


def _repeated(value: Any, times: Any) -> int:
    """Length of a text or list repeated by `*`; 0 for numbers."""
    if isinstance(value, (str, list, tuple)) and isinstance(times, int):
        return len(value) * times
    return 0


def _raise_exception(message: object) -> None:
    raise TemplateFailure(f"the chat template refuses these messages: {str(message)[:500]}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def check_template(source: str) -> None:
    """Only reads it; nothing of it runs. Raises WeftError when it is no template."""
    if len(source) > MAX_TEMPLATE_CHARS:
        raise WeftError(f"the chat template is longer than {MAX_TEMPLATE_CHARS} characters")
    try:
        _Sandbox(time.monotonic).parse(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise WeftError(f"the chat template does not parse: {error}") from None


class ChatTemplate:
    """A compiled template with the tokens it may write. `render` is called by one thread at a time
    per object: the deadline belongs to the environment. It stops what it can see; templates of
    checkpoints are rendered where all of it can be stopped (`rendering`)."""

    def __init__(
        self,
        source: str,
        *,
        tokens: Mapping[str, str] | None = None,
        max_chars: int,
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises WeftError when `source` is no template."""
        check_template(source)
        self._clock = clock
        self._environment = _Sandbox(clock)
        self._environment.filters["tojson"] = _tojson
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise WeftError(f"the chat template does not parse: {error}") from None
        self._tokens = dict(tokens or {})
        self._max_chars = max_chars
        self._limit_s = limit_s

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        args: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """`args` are further variables of the template's own. Raises TemplateFailure."""
        self._environment.deadline_s = self._clock() + self._limit_s
        context: dict[str, Any] = {
            **(args or {}),
            **self._tokens,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": [dict(tool) for tool in tools] or None,
            "documents": [dict(document) for document in documents] or None,
        }
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(context):
                self._environment.check_time()
                size += len(piece)
                if size > self._max_chars:
                    raise TemplateFailure(
                        f"the rendered messages are longer than {self._max_chars} characters"
                    )
                pieces.append(piece)
        except TemplateFailure:
            raise
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise TemplateFailure(
                f"the chat template failed on these messages: {type(error).__name__}: "
                f"{str(error)[:200]}"
            ) from None
        except (RecursionError, MemoryError, AttributeError) as error:
            raise TemplateFailure(
                f"the chat template failed on these messages: {type(error).__name__}"
            ) from None
        return "".join(pieces)


def find_template(
    folder: Path, tokenizer_config: Mapping[str, Any], *, own: str | None = None
) -> str | None:
    """The template's source: `own`, a file, else chat_template.jinja, else the string in
    tokenizer_config.json or the entry `default` of its list. None when the model has none. Raises
    WeftError."""
    file = Path(own) if own is not None else folder / "chat_template.jinja"
    if own is not None and not file.is_file():
        raise WeftError(f"{file}: no such file; chat_template names it")
    if file.is_file():
        return _read_template(file)
    entry = tokenizer_config.get("chat_template")
    return entry if isinstance(entry, str) else _named_template(entry, "default")


def find_tool_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template that some checkpoints have for chats with tools: the entry `tool_use` of the
    list, or additional_chat_templates/tool_use.jinja. Raises WeftError."""
    file = folder / "additional_chat_templates" / "tool_use.jinja"
    if file.is_file():
        return _read_template(file)
    return _named_template(tokenizer_config.get("chat_template"), "tool_use")


def _read_template(file: Path) -> str:
    if file.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
        raise WeftError(f"{file}: larger than {4 * MAX_TEMPLATE_CHARS} bytes")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise WeftError(f"{file}: not UTF-8") from None


def _named_template(entries: object, name: str) -> str | None:
    for item in entries if isinstance(entries, list) else ():
        if isinstance(item, dict) and item.get("name") == name:
            source = item.get("template")
            return source if isinstance(source, str) else None
    return None


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on, given as strings or as {"content": ...}."""
    found: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = tokenizer_config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[key] = value
    return found
