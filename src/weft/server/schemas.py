"""What clients may send. Every number, text and list is bounded; a field that is not served is
refused by name unless it carries the value that means nothing.

Checks that need the model (context length, vocabulary) are in `plan.py`.
"""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from fastapi import Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json
from starlette.requests import ClientDisconnect

from weft.server.errors import CLIENT_CLOSED, ApiError, bad_request

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_PROMPTS = 128
MAX_TOKENS = 1 << 24
MAX_NAME_CHARS = 256
BODY_LIMIT_S = 60.0
"""A client has this long to send its body."""

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
"""Accepted and without effect: they steer a vendor's platform, not the answer."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "n": (None, 1),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "prompt_logprobs": (None,),
    "reasoning_effort": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Known fields that are not served, each with the values that mean "not used"."""

_MESSAGE_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "reasoning": (None,),
    "reasoning_content": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}


def _whole(value: Any) -> Any:
    """16.0 for 16: some clients know one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


def _arm(value: Any) -> str | None:
    """Which form of a field this is, by its first element; None: no form at all."""
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return "<list>" if isinstance(value, list) else None
    first = value[0]
    if isinstance(first, str):
        return "<texts>"
    if isinstance(first, list):
        return "<lists>"
    return "<ids>" if isinstance(first, int) and not isinstance(first, bool) else "<list>"


def _either(message: str) -> Discriminator:
    return Discriminator(_arm, custom_error_type="wrong_form", custom_error_message=message)


def _arm_or_list(value: Any) -> str | None:
    arm = _arm(value)
    return arm if arm in (None, "<text>") else "<list>"


def _text_or(message: str) -> Discriminator:
    return Discriminator(_arm_or_list, custom_error_type="wrong_form", custom_error_message=message)


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[
        list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")
    ]
    | Annotated[
        list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<lists>")
    ],
    _either("must be a text, a list of texts, a list of token ids or a list of such lists"),
]
Stops = Annotated[
    Annotated[Stop, Tag("<text>")]
    | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<list>")],
    _text_or(f"must be a text or a list of at most {MAX_STOPS} texts"),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Usage so far in every chunk, as load clients ask for."""
    include_obfuscation: bool | None = None
    """Accepted; chunks are never padded."""


class Common(_Strict):
    """The fields of both generating routes."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, le=MAX_TOKENS)] | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1, le=MAX_TOKENS)] | None = None
    min_tokens: Annotated[Whole, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop: Stops | None = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None
    ) = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    """Adds `token_ids` to every choice."""


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: Prompt


class TextPart(_Strict):
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    _text_or("must be a text or a list of text parts"),
]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing_content", "content is required for this role")
        return self

    def plain(self) -> dict[str, Any]:
        """As templates know it: text parts joined by newlines, `developer` as `system`."""
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
        return message


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=MAX_TOKENS)] | None = None


R = TypeVar("R", bound=Common)


def parse(schema: type[R], data: Any) -> R:
    """The checked request. Raises ApiError 400 naming the first field that is wrong."""
    if not isinstance(data, dict):
        raise bad_request("the body must be a JSON object")
    fields = _drop_neutral(data, UNSUPPORTED, "")
    fields = {key: value for key, value in fields.items() if key not in IGNORED}
    messages = fields.get("messages")
    if isinstance(messages, list) and len(messages) <= MAX_MESSAGES:
        fields["messages"] = [
            _drop_neutral(message, _MESSAGE_UNSUPPORTED, f"messages[{i}].")
            if isinstance(message, dict)
            else message
            for i, message in enumerate(messages)
        ]
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from None


def _drop_neutral(
    data: dict[str, Any], unsupported: Mapping[str, tuple[Any, ...]], where: str
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in data.items():
        if key not in unsupported:
            kept[key] = value
        elif not any(_same(value, neutral) for neutral in unsupported[key]):
            raise bad_request(
                f"`{where}{key}` is not supported by this server; leave it out",
                param=f"{where}{key}",
                code="unsupported_parameter",
            )
    return kept


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and not a bool standing for a number or the other way round."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _explain(error: ValidationError) -> ApiError:
    detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _path(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return bad_request(f"unknown field `{param}`", param=param, code="unknown_parameter")
    if detail["type"] == "missing":
        return bad_request(f"`{param}` is required", param=param, code="missing_parameter")
    return bad_request(f"`{param}`: {detail['msg']}", param=param, code="invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content", "<list>", 1) -> messages[0].content[1]."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path[:200]


async def read_json(request: Request, max_bytes: int) -> Any:
    """The body, read no further than the bound. Raises ApiError 400, 408, 413, 415, or 499 when the
    client left (nobody reads that answer)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(
            415,
            "send the body as JSON with the header Content-Type: application/json",
            code="unsupported_media_type",
        )
    too_large = ApiError(
        413,
        f"the body is larger than {max_bytes} bytes",
        code="body_too_large",
        headers={"Connection": "close"},
    )
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_LIMIT_S):
            async for piece in request.stream():
                body += piece
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {BODY_LIMIT_S:g} s",
            code="body_too_slow",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise ApiError(CLIENT_CLOSED, "the client left before its body was whole") from None
    try:
        return from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}", code="invalid_json") from None


def openapi_schemas() -> dict[str, Any]:
    """JSON Schemas of the request bodies by name, for the OpenAPI document's components."""
    schemas: dict[str, Any] = {}
    for model in (ChatRequest, CompletionRequest):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return schemas
