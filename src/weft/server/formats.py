"""What a client may say about the form of the answer: `response_format` (OpenAI),
`structured_outputs` and `guided_*` (vLLM). All become one `Grammar`."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from pydantic import ConfigDict, Discriminator, Field, Tag

from weft.core.errors import WeftError
from weft.core.request import Grammar
from weft.grammar.source import check_grammar
from weft.server.errors import bad_request
from weft.server.fields import MAX_ENUM, MAX_GRAMMAR_CHARS, Name, Strict

GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
ChoiceTexts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]],
    Field(min_length=1, max_length=MAX_ENUM, fail_fast=True),
]
JsonSchema = dict[str, Any]


def by_type(*known: str, absent: str | None = None) -> Discriminator:
    """Tells the forms of an object apart by its `type` (or what its absence means); tags are
    `<type>`."""

    def arm(value: Any) -> str | None:
        kind = (
            value.get("type", absent) if isinstance(value, dict) else getattr(value, "type", None)
        )
        return f"<{kind}>" if kind in known else None

    return Discriminator(
        arm,
        custom_error_type="wrong_type",
        custom_error_message=f"type must be one of {', '.join(known)}",
    )


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON Schema with a name. Both strict and not, the answer follows the schema."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, serialize_by_alias=True)

    name: Name | None = None
    description: Annotated[str, Field(max_length=MAX_GRAMMAR_CHARS)] | None = None
    schema_: JsonSchema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    by_type("text", "json_object", "json_schema"),
]


class StructuredOutputs(Strict):
    """vLLM's field: exactly one of these."""

    json_: JsonSchema | GrammarText | None = Field(default=None, alias="json")
    regex: GrammarText | None = None
    choice: ChoiceTexts | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None


class Shaped(Strict):
    """The fields of a request that shape its answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | GrammarText | None = None
    guided_regex: GrammarText | None = None
    guided_choice: ChoiceTexts | None = None
    guided_grammar: GrammarText | None = None


def grammar_of(request: Shaped) -> tuple[Grammar, str] | None:
    """The grammar and the field that asks for it. Raises ApiError 400 for more than one."""
    wishes: list[tuple[str, Any, Callable[[Any], Grammar]]] = []
    form = request.response_format
    if isinstance(form, JsonObjectFormat):
        wishes.append(("response_format", True, _any_object))
    elif isinstance(form, JsonSchemaFormat):
        schema = form.json_schema.schema_
        wishes.append(("response_format", {} if schema is None else schema, _json_schema))
    outputs = request.structured_outputs
    if outputs is not None:
        wishes += [
            ("structured_outputs.json", outputs.json_, _json_schema),
            ("structured_outputs.regex", outputs.regex, _regex),
            ("structured_outputs.choice", outputs.choice, _choice),
            ("structured_outputs.grammar", outputs.grammar, _lark),
            ("structured_outputs.json_object", outputs.json_object or None, _any_object),
        ]
        if all(value is None for name, value, _ in wishes if name.startswith("structured")):
            raise bad_request(
                "structured_outputs needs one of json, regex, choice, grammar or json_object",
                param="structured_outputs",
                code="invalid_value",
            )
    wishes += [
        ("guided_json", request.guided_json, _json_schema),
        ("guided_regex", request.guided_regex, _regex),
        ("guided_choice", request.guided_choice, _choice),
        ("guided_grammar", request.guided_grammar, _lark),
    ]
    found = [(name, value, make) for name, value, make in wishes if value is not None]
    if not found:
        return None
    if len(found) > 1:
        raise bad_request(
            f"`{found[0][0]}` and `{found[1][0]}` both shape the answer; send one of them",
            param=found[1][0],
            code="invalid_value",
        )
    name, value, make = found[0]
    return make(value), name


def _any_object(_: Any) -> Grammar:
    return Grammar(kind="json_object")


def _json_schema(schema: JsonSchema | str) -> Grammar:
    return Grammar(kind="json_schema", text=schema_text(schema))


def schema_text(schema: JsonSchema | str) -> str:
    """Raises ApiError 400 for a schema that is too long."""
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    if len(text) > MAX_GRAMMAR_CHARS:
        raise bad_request(
            f"the JSON Schema is longer than {MAX_GRAMMAR_CHARS} characters", code="invalid_value"
        )
    return text


def _regex(text: str) -> Grammar:
    return Grammar(kind="regex", text=text)


def _choice(texts: list[str]) -> Grammar:
    text = msgspec.json.encode(texts).decode()
    if len(text) > MAX_GRAMMAR_CHARS:
        raise bad_request(
            f"the choices are longer than {MAX_GRAMMAR_CHARS} characters", code="invalid_value"
        )
    return Grammar(kind="choice", text=text)


def _lark(text: str) -> Grammar:
    return Grammar(kind="lark", text=text)


def check(grammar: Grammar, field: str) -> None:
    """Compiles it once; for threads of the text service. Raises ApiError 400."""
    try:
        check_grammar(grammar)
    except WeftError as error:
        raise bad_request(
            f"`{field}` cannot be followed: {str(error)[:400]}; simplify it or leave it out",
            param=field,
            code="invalid_grammar",
        ) from None
