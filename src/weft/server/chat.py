"""From a conversation to a prompt, the grammar of its answer and the reader of it. For chats and
responses alike."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import msgspec

from weft.core.request import Grammar
from weft.server.detokenize import Decode
from weft.server.errors import bad_request
from weft.server.formats import check
from weft.server.messages import Conversation, NamedTool
from weft.server.text import TextModel
from weft.server.tools.deltas import PlainReader, Reader
from weft.server.tools.families import call_grammar, reader_of
from weft.server.tools.readers import ReasoningReader

OPEN, CLOSE = ReasoningReader.OPEN, ReasoningReader.CLOSE


class Ways(msgspec.Struct, frozen=True, kw_only=True):
    """How functions may be called in an answer."""

    mode: Literal["none", "auto", "forced"]
    tools: Sequence[Mapping[str, Any]] = ()
    """Those that may be called."""
    parallel: bool = True


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What `set_up` finds."""

    prompt: tuple[int, ...]
    grammar: Grammar | None
    decode: Decode
    reader: Callable[[], Reader]


def ways_of(
    choice: str | NamedTool | None, parallel: bool | None, tools: Sequence[Mapping[str, Any]]
) -> Ways:
    """Raises ApiError 400 where the choice and the tools do not fit together."""
    name = choice.function.name if isinstance(choice, NamedTool) else None
    if name is None and choice != "required":
        return Ways(
            mode="auto" if tools and choice != "none" else "none",
            tools=() if choice == "none" else tools,
            parallel=parallel is not False,
        )
    fitting = [tool for tool in tools if name is None or tool["function"]["name"] == name]
    if not fitting:
        wanted = "a function" if name is None else f"the function {name!r}"
        raise bad_request(
            f"tool_choice asks for {wanted}, and tools has none such",
            param="tool_choice",
            code="invalid_value",
        )
    return Ways(mode="forced", tools=fitting, parallel=parallel is not False and name is None)


def set_up(
    text: TextModel, talk: Conversation, ways: Ways, wish: tuple[Grammar, str] | None
) -> Setting:
    """For threads of the text service. Raises ApiError 400."""
    if ways.mode == "none":
        talk = msgspec.structs.replace(talk, tools=())
    grammar = _grammar(text, ways, wish)
    prompt, end = text.encode_chat(talk)
    # A grammar rules the answer from its first token on, so nothing is thought before it.
    reasons = text.reasons and grammar is None
    inside = reasons and end.rstrip().endswith(OPEN)

    def reader() -> Reader:
        inner: Reader = PlainReader()
        if ways.mode != "none":
            inner = reader_of(text.family, ways.tools, parallel=ways.parallel)
        return ReasoningReader(inner, inside=inside) if reasons else inner

    marks = dict(text.family.special_ids) if ways.mode != "none" else {}
    if reasons:
        marks |= text.special_ids_of((OPEN, CLOSE))
    decode = partial(text.decode_keeping, marks) if marks else text.decode
    return Setting(prompt=prompt, grammar=grammar, decode=decode, reader=reader)


def _grammar(text: TextModel, ways: Ways, wish: tuple[Grammar, str] | None) -> Grammar | None:
    """The calls that must be, or the form that was asked for, or, with both a form and the freedom
    to call, either of them. Raises ApiError 400."""
    if wish is not None:
        check(*wish)
    if ways.mode == "none" or (ways.mode == "auto" and wish is None):
        return None if wish is None else wish[0]
    answer = None
    if ways.mode == "auto" and wish is not None:
        asked, field = wish
        if asked.kind not in ("json_object", "json_schema"):
            raise bad_request(
                f"`{field}` of the kind {asked.kind} does not go together with tools; send "
                'tool_choice: "none" or a JSON Schema',
                param=field,
                code="invalid_value",
            )
        # Written anew, since it is pasted into another text.
        answer = json.dumps(json.loads(asked.text)) if asked.text else '{"type": "object"}'
    # Checked with its marks spelt out: the check knows no model's special tokens.
    spelt = msgspec.structs.replace(text.family, special_ids={})
    check(call_grammar(spelt, ways.tools, parallel=ways.parallel, answer=answer), "tools")
    return call_grammar(text.family, ways.tools, parallel=ways.parallel, answer=answer)
