"""POST /v1/responses: the stateless core. Input items become a conversation; the answer's items are
written by `responses_wire`."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import Field, Tag, model_validator

from weft.core.request import Grammar, Sampling
from weft.hub.base import NewRequest
from weft.server.body import unsupported
from weft.server.chat import Setting, set_up, ways_of
from weft.server.errors import bad_request
from weft.server.fields import (
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    MAX_PARTS,
    MAX_TOKENS,
    MAX_TOOLS,
    Name,
    Strict,
    text_or_list,
    whole,
)
from weft.server.formats import (
    JsonObjectFormat,
    JsonSchema,
    TextFormat,
    by_type,
    schema_text,
)
from weft.server.messages import (
    Conversation,
    Description,
    FunctionCall,
    FunctionName,
    NamedFunction,
    NamedTool,
    ToolCall,
    ToolWord,
    check_names,
    word_or_object,
)
from weft.server.plan import Asker, Plan, find_model, room_for, sampling_of, tenant_of
from weft.server.responses_wire import ResponseWriter
from weft.server.schemas import Drawn


class InputText(Strict):
    type: Literal["input_text"]
    text: str


class OutputText(Strict):
    """What an assistant said before, as it was answered."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


Parts = Annotated[
    list[
        Annotated[
            Annotated[InputText, Tag("<input_text>")] | Annotated[OutputText, Tag("<output_text>")],
            by_type("input_text", "output_text"),
        ]
    ],
    Field(max_length=MAX_PARTS, fail_fast=True),
]
ItemContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Parts, Tag("<list>")],
    text_or_list("must be a text or a list of text parts"),
]
Status = Literal["in_progress", "completed", "incomplete"]


class MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemContent
    id: Name | None = None
    status: Status | None = None


class CallItem(Strict):
    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Annotated[str, Field(max_length=1 << 20)]
    id: Name | None = None
    status: Status | None = None


class CallOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: Name
    output: ItemContent
    id: Name | None = None
    status: Status | None = None


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    id: Name | None = None
    summary: list[Any] | None = None
    content: Annotated[list[ReasoningText], Field(max_length=MAX_PARTS, fail_fast=True)] | None = (
        None
    )
    encrypted_content: Literal[None] = None
    status: Status | None = None


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[CallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    by_type("message", "function_call", "function_call_output", "reasoning", absent="message"),
]
Input = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[
        list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), Tag("<list>")
    ],
    text_or_list("must be a text or a list of items"),
]


class FlatTool(Strict):
    type: Literal["function"]
    name: FunctionName
    description: Description | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class FlatChoice(Strict):
    type: Literal["function"]
    name: FunctionName


class FlatSchemaFormat(Strict):
    type: Literal["json_schema"]
    name: Name | None = None
    description: Description | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[FlatSchemaFormat, Tag("<json_schema>")],
            by_type("text", "json_object", "json_schema"),
        ]
        | None
    ) = None
    verbosity: Literal[None] = None


class ResponseRequest(Drawn):
    """POST /v1/responses."""

    input: Input
    instructions: str | None = None
    max_output_tokens: whole(1, MAX_TOKENS) | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Annotated[ToolWord, Tag("<text>")] | Annotated[FlatChoice, Tag("<object>")],
            word_or_object("must be none, auto, required or a function of the tools"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    store: bool | None = None
    """Nothing is stored: only false."""
    previous_response_id: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    """Refused: send the whole conversation as input."""
    metadata: Annotated[dict[Name, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | (
        None
    ) = None
    """Comes back in the answer."""

    @model_validator(mode="after")
    def _has_no_twins(self) -> Self:
        check_names([tool.name for tool in self.tools or ()])
        return self


async def plan_response(asker: Asker, request: ResponseRequest) -> Plan:
    """Raises ApiError."""
    if request.store:
        raise unsupported("store", "nothing is kept here; send store: false")
    if request.previous_response_id is not None:
        raise unsupported("previous_response_id", "send the whole conversation as input")
    card = find_model(asker.hub, request.model)
    text = await asker.texts.model(card)
    items = [] if isinstance(request.input, str) else request.input
    calls = [item for item in items if isinstance(item, CallItem)]
    text.check_chars(sum(len(call.arguments) for call in calls), "input")
    choice = request.tool_choice
    named = choice
    if isinstance(choice, FlatChoice):
        named = NamedTool(type="function", function=NamedFunction(name=choice.name))
    assert not isinstance(named, FlatChoice)
    wish = _wish(request)

    def prepare() -> Setting:
        talk = conversation(request)
        ways = ways_of(named, request.parallel_tool_calls, talk.tools)
        return set_up(text, talk, ways, wish)

    setting = await asker.texts.run(card.name, prepare)
    max_tokens = room_for(card, setting.prompt, request.max_output_tokens)
    sampling = sampling_of(request, card, logprobs=None, grammar=setting.grammar)
    new = NewRequest(
        model=card.name,
        prompt=setting.prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        priority=request.priority or 0,
        tenant=tenant_of(asker, request.cache_salt),
    )
    return Plan(
        card=card,
        requests=(new,),
        decode=setting.decode,
        writer=partial(ResponseWriter, _told(request, card.name, sampling), setting.reader),
        stream=bool(request.stream),
    )


def _wish(request: ResponseRequest) -> tuple[Grammar, str] | None:
    form = request.text.format if request.text is not None else None
    if isinstance(form, JsonObjectFormat):
        return Grammar(kind="json_object"), "text.format"
    if isinstance(form, FlatSchemaFormat):
        return Grammar(kind="json_schema", text=schema_text(form.schema_)), "text.format"
    return None


def conversation(request: ResponseRequest) -> Conversation:
    """Raises ApiError 400."""
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        thought = ""
        for i, item in enumerate(request.input):
            if isinstance(item, ReasoningItem):
                thought += "".join(part.text for part in item.content or ())
                continue
            own = isinstance(item, CallItem) or (
                isinstance(item, MessageItem) and item.role == "assistant"
            )
            _add(messages, item, f"input[{i}]", thought if own else "")
            thought = "" if own else thought
    if not messages:
        raise bad_request("input holds no message", param="input", code="invalid_value")
    tools: list[dict[str, Any]] = []
    for tool in request.tools or ():
        function: dict[str, Any] = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        if tool.parameters is not None:
            function["parameters"] = tool.parameters
        tools.append({"type": "function", "function": function})
    return Conversation(messages=messages, tools=tools)


def _add(
    messages: list[dict[str, Any]],
    item: MessageItem | CallItem | CallOutputItem,
    where: str,
    thought: str,
) -> None:
    """Calls belong to the assistant's message before them. Raises ApiError 400."""
    if isinstance(item, CallOutputItem):
        content = _text_of(item.output)
        messages.append({"role": "tool", "content": content, "tool_call_id": item.call_id})
        return
    if isinstance(item, MessageItem):
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": _text_of(item.content)})
    else:
        call = ToolCall(
            id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments)
        )
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call.plain(where))
    if thought:
        messages[-1]["reasoning_content"] = thought


def _text_of(content: str | Sequence[InputText | OutputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _told(request: ResponseRequest, model: str, sampling: Sampling) -> dict[str, Any]:
    """What the answer repeats of the request."""
    form = request.text.format if request.text is not None else None
    choice = request.tool_choice
    shown = choice.model_dump() if isinstance(choice, FlatChoice) else choice
    return {
        "model": model,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "temperature": sampling.temperature,
        "text": {
            "format": {"type": "text"}
            if form is None
            else form.model_dump(by_alias=True, exclude_none=True)
        },
        "tool_choice": "auto" if shown is None else shown,
        "tools": [
            tool.model_dump() | {"strict": bool(tool.strict)} for tool in request.tools or ()
        ],
        "top_p": sampling.top_p,
    }
