"""Grammars that no engine takes are refused by name, within bounds on everything."""

import json
from typing import Any

import pytest

from weft.core.errors import WeftError
from weft.core.request import Grammar
from weft.grammar.source import MAX_CHARS, MAX_CHOICES, MAX_DEPTH, check_grammar


def schema(value: Any) -> Grammar:
    return Grammar(kind="json_schema", text=value if isinstance(value, str) else json.dumps(value))


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        value = {"type": "array", "items": value}
    return value


GOOD = [
    Grammar(kind="json_object"),
    schema(True),
    schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
    schema(
        {"$defs": {"n": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}}, "$ref": "#/$defs/n"}
    ),
    schema(nested(MAX_DEPTH // 2)),
    Grammar(kind="regex", text=r"[a-z]+(/\d{2,})?"),
    Grammar(kind="choice", text=json.dumps(["yes", 'n"\\o', "é☃", "\x00\n"])),
    Grammar(kind="lark", text='start: a\na: "x" | "(" a ")"\n'),
]
BAD = [
    (schema("{"), "the JSON Schema is not valid JSON"),
    (schema("[]"), "is an object, or true"),
    (schema('{"const": "\\ud800"}'), "lone surrogate"),
    (schema('{"maximum": 1e999}'), "not JSON compliant"),
    (schema("NaN"), "NaN is not a number"),
    (schema({"type": "thing"}), "Invalid type: thing"),
    (schema({"type": "array", "contains": {"type": "null"}}), 'Unimplemented keys: \\["contains"'),
    (schema({"$ref": "http://example.org/x"}), "cannot be used"),
    (schema({"type": "string", "pattern": "("}), "unclosed group"),
    (schema(False), "is an object, or true"),
    (schema(nested(MAX_DEPTH + 1)), "nested deeper"),
    (schema("[" * 50_000), "nested deeper"),
    (schema('true}], "x": [{"json_schema": true'), "not valid JSON"),
    (schema({"description": "x" * MAX_CHARS}), f"make it at most {MAX_CHARS}"),
    (schema({"type": "object", "properties": {f"k{i}": {} for i in range(1200)}}), "max is 2000"),
    (Grammar(kind="regex", text="a("), "unclosed group"),
    (Grammar(kind="choice", text="[]"), "a list of 1 .. "),
    (Grammar(kind="choice", text='{"a": 1}'), "a list of 1 .. "),
    (Grammar(kind="choice", text='["a", 1]'), "every choice is a string"),
    (Grammar(kind="choice", text='["a", ""]'), "every choice is a string"),
    (Grammar(kind="choice", text='["\\ud800"]'), "lone surrogate"),
    (Grammar(kind="choice", text=json.dumps(["a"] * (MAX_CHOICES + 1))), "a list of 1 .. "),
    (Grammar(kind="lark", text="start: nothing"), "cannot be used"),
    (Grammar(kind="lark", text=""), "cannot be used"),
]


@pytest.mark.parametrize("grammar", GOOD, ids=lambda g: f"{g.kind}-{g.text[:20]}")
def test_good_grammars_pass(grammar: Grammar) -> None:
    check_grammar(grammar)


@pytest.mark.parametrize(("grammar", "reason"), BAD, ids=lambda g: str(g)[:40])
def test_bad_grammars_are_refused_in_one_line(grammar: Grammar, reason: str) -> None:
    with pytest.raises(WeftError, match=reason) as caught:
        check_grammar(grammar)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
