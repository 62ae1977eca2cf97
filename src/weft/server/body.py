"""A request's body: read within bounds, checked against a schema, refused by the name of the first
field that is wrong."""

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from weft.server.bodies import check_json_shape
from weft.server.errors import CLIENT_CLOSED, ApiError, bad_request
from weft.server.fields import MAX_MESSAGES

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
    }
)
"""Accepted and without effect: they steer a vendor's platform, not the answer."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (None,),
    "allowed_token_ids": (None,),
    "audio": (None,),
    "background": (None, False),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "conversation": (None,),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "include": (None, []),
    "include_reasoning": (None, True),
    "include_stop_str_in_output": (None, False),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "max_tool_calls": (None,),
    "mm_processor_kwargs": (None,),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, True),
    "prediction": (None,),
    "prompt_embeds": (None,),
    "reasoning": (None,),
    "reasoning_effort": (None,),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "truncation": (None, "disabled"),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "verbosity": (None,),
    "vllm_xargs": (None,),
    "web_search_options": (None,),
}
"""Known fields that a route may not serve, each with the values that mean "not used"."""

_MESSAGE_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
}

B = TypeVar("B", bound=BaseModel)


def parse(schema: type[B], data: Any) -> B:
    """The checked request. Raises ApiError 400 naming the first field that is wrong."""
    if not isinstance(data, dict):
        raise bad_request("the body must be a JSON object")
    served = schema.model_fields
    refused = {key: neutral for key, neutral in UNSUPPORTED.items() if key not in served}
    fields = _drop_neutral(data, refused, "")
    fields = {key: value for key, value in fields.items() if key in served or key not in IGNORED}
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


def unsupported(name: str, remedy: str = "leave it out") -> ApiError:
    return bad_request(
        f"`{name}` is not supported by this server; {remedy}",
        param=name,
        code="unsupported_parameter",
    )


def _drop_neutral(
    data: dict[str, Any], refused: Mapping[str, tuple[Any, ...]], where: str
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in data.items():
        if key not in refused:
            kept[key] = value
        elif not any(_same(value, neutral) for neutral in refused[key]):
            raise unsupported(f"{where}{key}")
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
    message = f"`{param}`: {detail['msg']}" if param else detail["msg"]
    return bad_request(message, param=param or None, code="invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content", "<list>", 1) -> messages[0].content[1]."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path[:200]


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, read no further than the bound. Raises ApiError 408, 413, 415, or 499 when the
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
    return bytes(body)


def decode_json(body: bytes) -> Any:
    """Raises ApiError 400."""
    check_json_shape(body)
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}", code="invalid_json") from None
