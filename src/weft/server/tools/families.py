"""How families of models write function calls: how to tell the family, how to read its answers, and
the grammar that makes an answer a call.

The family is what the model's chat template teaches it, or `tool_parser` in the model's
configuration. A template that knows no tools gets them in a system message, in Hermes' form.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from weft.core.request import Grammar
from weft.server.errors import bad_request
from weft.server.messages import Conversation
from weft.server.tools.deltas import Reader
from weft.server.tools.readers import CallForm, CallReader, short_call_id

HERMES = CallForm(open="<tool_call>", close="</tool_call>")
LLAMA = CallForm(open="<|python_tag|>", frame=";,", bare=True)
MISTRAL = CallForm(open="[TOOL_CALLS]", frame="[],", make_id=short_call_id)
MISTRAL_ARGS = CallForm(open="[TOOL_CALLS]", frame="[],", named="[ARGS]", make_id=short_call_id)
GENERIC = CallForm(open="<tool_call>", close="</tool_call>", frame="`;,", bare=True)

FORMS: dict[str, CallForm] = {
    "hermes": HERMES,
    "llama3_json": LLAMA,
    "mistral": MISTRAL,
    "mistral_args": MISTRAL_ARGS,
    "generic": GENERIC,
}
"""By the names `tool_parser` takes."""


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """A model's way to call functions."""

    name: str
    form: CallForm
    instructs: bool = False
    """Its template shows no tools: a system message does."""
    special_ids: Mapping[str, int] = {}
    """Ids of those marks that are special tokens."""


def family_name(template: str) -> str:
    """The family that a template's own words show."""
    if "[TOOL_CALLS]" in template:
        return "mistral_args" if "[ARGS]" in template else "mistral"
    if "<tool_call>" in template and "<function=" not in template:
        return "hermes"
    if "<|python_tag|>" in template or '{"name": function name, "parameters"' in template:
        return "llama3_json"
    return "generic"


def find_family(
    template: str | None, special_id: Callable[[str], int | None], override: str | None = None
) -> Family:
    """`special_id` knows the special tokens' ids."""
    name = override or family_name(template or "")
    form = FORMS[name]
    ids = {mark: special_id(mark) for mark in (form.open, form.close, form.named) if mark}
    return Family(
        name=name,
        form=form,
        instructs="tools" not in (template or ""),
        special_ids={mark: found for mark, found in ids.items() if found is not None},
    )


def instructed(talk: Conversation) -> Conversation:
    """With the tools in a system message at the beginning."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in talk.tools)
    text = (
        "You may call functions to answer. Their signatures, one JSON object a line:\n"
        f"{lines}\n"
        "To call one, answer with a JSON object of its name and arguments between tags, and with "
        "nothing else:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )
    messages = [_spoken(message) for message in talk.messages]
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        messages = [first, *messages[1:]]
    else:
        messages = [{"role": "system", "content": text}, *messages]
    return msgspec.structs.replace(talk, messages=messages, tools=())


def _spoken(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for a template that knows neither calls nor results."""
    plain = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = [
        "<tool_call>\n" + json.dumps(call["function"], ensure_ascii=False) + "\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    if calls:
        plain["content"] = "\n".join([*([plain["content"]] if plain["content"] else []), *calls])
    if message["role"] == "tool":
        response = f"<tool_response>\n{message['content']}\n</tool_response>"
        plain = {"role": "user", "content": response}
    return plain


def reader_of(family: Family, tools: Sequence[Mapping[str, Any]], *, parallel: bool) -> Reader:
    names = [tool["function"]["name"] for tool in tools]
    return CallReader(family.form, names=names, most=None if parallel else 1)


def call_grammar(
    family: Family,
    tools: Sequence[Mapping[str, Any]],
    *,
    parallel: bool,
    answer: str | None = None,
) -> Grammar:
    """What makes an answer one call or several of `tools`, in the family's own form; or, with
    `answer`, a JSON value of that JSON Schema instead."""
    form = family.form

    def mark(text: str) -> str:
        found = family.special_ids.get(text)
        return json.dumps(text) if found is None else f"<[{found}]>"

    if form.close:
        block = f'{mark(form.open)} "\\n" any_call "\\n" {mark(form.close)}'
        more = ' ("\\n" block)*'
    elif form.named:
        block, more = f"{mark(form.open)} any_call", " block*"
    elif form.bare:
        block, more = "any_call", ""
    else:
        many = ' (", " any_call)*' if parallel else ""
        block, more = f'{mark(form.open)} "[" any_call{many} "]"', ""
    start = f"block{more if parallel else ''}"
    rules = [f"any_call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        name = json.dumps(tool["function"]["name"])
        head = f"{name} {mark(form.named)} " if form.named else ""
        rules.append(f"call_{i}: {head}%json {_call_schema(form, tool['function'])}")
    if answer is not None:
        rules.append(f"answer: %json {answer}")
        start += " | answer"
    return Grammar(kind="lark", text="\n".join([f"start: {start}", f"block: {block}", *rules]))


_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _call_schema(form: CallForm, function: Mapping[str, Any]) -> str:
    """One function's call, or its arguments alone. Definitions move to the top, where references
    look for them."""
    schema = dict(function.get("parameters") or {"type": "object"})
    if form.named:
        return _compact({"x-guidance": _STYLE, **schema})
    shared = {key: schema.pop(key) for key in ("$defs", "definitions") if key in schema}
    arguments = "parameters" if form is LLAMA else "arguments"
    whole = {
        "x-guidance": _STYLE,
        "type": "object",
        "properties": {"name": {"const": function["name"]}, arguments: schema},
        "required": ["name", arguments],
        "additionalProperties": False,
        **shared,
    }
    return _compact(whole)


def _compact(value: object) -> str:
    """Raises ApiError 400."""
    try:
        return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise bad_request(
            "`tools` holds a number that is too large for JSON", param="tools", code="invalid_value"
        ) from None
