"""A conversation as clients send it: messages, function definitions, documents; and as chat
templates know it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import BaseModel, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError, from_json

from weft.server.bodies import check_json_shape
from weft.server.errors import ApiError, bad_request
from weft.server.fields import (
    CLOSED,
    MAX_DESCRIPTION_CHARS,
    MAX_DOCUMENTS,
    MAX_MESSAGES,
    MAX_TEMPLATE_ARGS,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
    Content,
    Name,
    Strict,
    whole,
)
from weft.server.formats import JsonSchema

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
Description = Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARS)]


class FunctionCall(Strict):
    name: Name
    arguments: Annotated[str, Field(max_length=1 << 20)]
    """JSON text of an object."""


class ToolCall(Strict):
    """A call that an assistant's message made."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: whole(0, MAX_TOOL_CALLS) | None = None

    def plain(self, where: str) -> dict[str, Any]:
        """With the arguments as an object, as templates want them. Raises ApiError 400."""
        try:
            # As strict as bodies are: no lone surrogates, no NaN, no depth without end.
            text = (self.function.arguments or "{}").encode()
            check_json_shape(text)
            arguments = from_json(text, allow_inf_nan=False)
        except (ValueError, ApiError):
            arguments = None
        if not isinstance(arguments, dict):
            raise bad_request(
                f"`{where}.function.arguments` is not the JSON text of an object",
                param=f"{where}.function.arguments",
                code="invalid_value",
            )
        call: dict[str, Any] = {} if self.id is None else {"id": self.id}
        function = {"name": self.function.name, "arguments": arguments}
        return call | {"type": "function", "function": function}


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    tool_call_id: Name | None = None
    tool_calls: (
        Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None
    ) = None
    reasoning_content: str | None = None
    """What the assistant thought before; the template decides whether it is shown again."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing_content", "content is required for this role")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise PydanticCustomError(
                "not_assistant", "tool_calls and reasoning_content belong to the role assistant"
            )
        return self

    def plain(self, where: str) -> dict[str, Any]:
        """As templates know it: text parts joined by newlines, `developer` as `system`. Raises
        ApiError 400."""
        if isinstance(self.content, list):
            content = "\n".join(part.text for part in self.content)
        else:
            content = self.content or ""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                call.plain(f"{where}.tool_calls[{i}]") for i, call in enumerate(self.tool_calls)
            ]
        return message


class FunctionDef(Strict):
    name: FunctionName
    description: Description | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDef

    def plain(self) -> dict[str, Any]:
        """As templates and transformers know it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        if self.function.parameters is not None:
            function["parameters"] = self.function.parameters
        return {"type": "function", "function": function}


class NamedFunction(Strict):
    name: FunctionName


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolWord = Literal["none", "auto", "required"]


def word_or_object(message: str) -> Discriminator:
    """Tells `<text>` from `<object>`."""

    def arm(value: Any) -> str | None:
        if isinstance(value, str):
            return "<text>"
        return "<object>" if isinstance(value, (dict, BaseModel)) else None

    return Discriminator(arm, custom_error_type="wrong_form", custom_error_message=message)


ToolChoice = Annotated[
    Annotated[ToolWord, Tag("<text>")] | Annotated[NamedTool, Tag("<object>")],
    word_or_object("must be none, auto, required or a function of the tools"),
]


class Document(Strict):
    """Given to templates that know documents."""

    title: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    text: str | None = None
    content: str | None = None
    id: Name | None = None
    doc_id: Name | None = None


TemplateWord = Annotated[str, Field(max_length=1024)]
TemplateValue = TemplateWord | bool | int | float | None
TemplateKey = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
RESERVED = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"),
        *("bos_token", "eos_token", "pad_token", "unk_token"),
    }
)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class Conversing(Strict):
    """The fields that a chat template is rendered from."""

    messages: Messages
    tools: Tools | None = None
    documents: Annotated[list[Document], Field(max_length=MAX_DOCUMENTS, fail_fast=True)] | None = (
        None
    )
    chat_template_kwargs: (
        Annotated[
            dict[TemplateKey, TemplateValue],
            Field(max_length=MAX_TEMPLATE_ARGS, json_schema_extra=CLOSED),
        ]
        | None
    ) = None
    """Switches that the model's own template knows, such as enable_thinking."""
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _means_one_thing(self) -> Self:
        taken = RESERVED & set(self.chat_template_kwargs or ())
        if taken:
            raise PydanticCustomError(
                "reserved", "chat_template_kwargs may not set {name}", {"name": min(taken)}
            )
        check_names([tool.function.name for tool in self.tools or ()])
        return self

    def argument_chars(self) -> int:
        """Of the JSON texts that `conversation` parses."""
        calls = [call for message in self.messages or () for call in message.tool_calls or ()]
        return sum(len(call.function.arguments) for call in calls)

    def conversation(self) -> "Conversation":
        """For threads of the text service, once `argument_chars` are few enough. Raises ApiError
        400."""
        messages = self.messages or []
        documents = [document.model_dump(exclude_none=True) for document in self.documents or ()]
        return Conversation(
            messages=[message.plain(f"messages[{i}]") for i, message in enumerate(messages)],
            tools=[tool.plain() for tool in self.tools or ()],
            documents=documents,
            args=dict(self.chat_template_kwargs or {}),
            add_generation_prompt=self.add_generation_prompt is not False,
        )


def check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise PydanticCustomError("twice", "two tools have the same name")


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """What a template is given. Plain values only."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    documents: Sequence[Mapping[str, Any]] = ()
    args: Mapping[str, Any] = {}
    add_generation_prompt: bool = True
