"""The OpenAPI document: what FastAPI cannot see, because the routes read, check and write bodies
themselves."""

from collections.abc import Sequence
from typing import Any

import msgspec
from pydantic import BaseModel

from weft.hub.base import Health
from weft.server.embeddings import EmbeddingRequest
from weft.server.responses import ResponseRequest
from weft.server.schemas import ChatRequest, CompletionRequest
from weft.server.status import StatusReply
from weft.server.tokens import DetokenizeRequest, TokenizeRequest

REQUESTS: tuple[type[BaseModel], ...] = (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ResponseRequest,
    TokenizeRequest,
)

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
LOGPROB: Schema = {"type": "number", "maximum": 0}
OBJECT: Schema = {"type": "object"}
NULLABLE_TEXT: Schema = {"type": ["string", "null"]}


def fixed(value: str) -> Schema:
    return {"type": "string", "const": value}


def words(*values: str | None) -> Schema:
    return {"enum": list(values)}


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def record(optional: Sequence[str] = (), **fields: Schema) -> Schema:
    """An object of exactly these fields."""
    return {
        "type": "object",
        "properties": fields,
        "required": [name for name in fields if name not in optional],
        "additionalProperties": False,
    }


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_USAGE = record(
    prompt_tokens=WHOLE,
    completion_tokens=WHOLE,
    total_tokens=WHOLE,
    prompt_tokens_details=record(cached_tokens=WHOLE),
)
_TOKEN_LOGPROB = {"token": TEXT, "logprob": LOGPROB, "bytes": listed(WHOLE)}
_PROMPT_LOGPROBS = listed(
    maybe(
        {
            "type": "object",
            "additionalProperties": record(
                logprob=LOGPROB, rank={"type": ["integer", "null"]}, decoded_token=TEXT
            ),
        }
    )
)
_COMPLETION_LOGPROBS = record(
    tokens=listed(TEXT),
    token_logprobs=listed(maybe(LOGPROB)),
    top_logprobs=listed(maybe({"type": "object", "additionalProperties": LOGPROB})),
    text_offset=listed(WHOLE),
)
_CHAT_LOGPROBS = record(
    content=listed(record(**_TOKEN_LOGPROB, top_logprobs=listed(record(**_TOKEN_LOGPROB)))),
    refusal={"type": "null"},
)
_TOOL_CALL = record(id=TEXT, type=fixed("function"), function=record(name=TEXT, arguments=TEXT))
_HEAD = {"id": TEXT, "created": WHOLE, "model": TEXT}
_ITEM = {
    "type": "object",
    "required": ["type", "id", "status"],
    "properties": {
        "type": words("message", "reasoning", "function_call"),
        "id": TEXT,
        "status": words("completed", "incomplete"),
    },
}

ANSWERS: dict[str, Schema] = {
    "Error": record(error=record(message=TEXT, type=TEXT, param=NULLABLE_TEXT, code=NULLABLE_TEXT)),
    "CompletionAnswer": record(
        **_HEAD,
        object=fixed("text_completion"),
        choices=listed(
            record(
                ("token_ids", "prompt_logprobs"),
                index=WHOLE,
                text=TEXT,
                logprobs=maybe(_COMPLETION_LOGPROBS),
                finish_reason=words("stop", "length"),
                token_ids=listed(WHOLE),
                prompt_logprobs=_PROMPT_LOGPROBS,
            )
        ),
        usage=_USAGE,
    ),
    "ChatAnswer": record(
        ("prompt_logprobs",),
        **_HEAD,
        object=fixed("chat.completion"),
        choices=listed(
            record(
                ("token_ids",),
                index=WHOLE,
                message=record(
                    ("reasoning_content", "tool_calls"),
                    role=fixed("assistant"),
                    content=NULLABLE_TEXT,
                    refusal={"type": "null"},
                    reasoning_content=TEXT,
                    tool_calls=listed(_TOOL_CALL),
                ),
                logprobs=maybe(_CHAT_LOGPROBS),
                finish_reason=words("stop", "length", "tool_calls"),
                token_ids=listed(WHOLE),
            )
        ),
        usage=_USAGE,
        prompt_logprobs=_PROMPT_LOGPROBS,
    ),
    "EmbeddingAnswer": record(
        object=fixed("list"),
        model=TEXT,
        data=listed(
            record(
                object=fixed("embedding"),
                index=WHOLE,
                embedding={"anyOf": [listed(NUMBER), TEXT]},
            )
        ),
        usage=record(prompt_tokens=WHOLE, total_tokens=WHOLE),
    ),
    "ResponseAnswer": record(
        id=TEXT,
        object=fixed("response"),
        created_at=WHOLE,
        status=words("completed", "incomplete"),
        background={"const": False},
        error={"type": "null"},
        incomplete_details=maybe(record(reason=fixed("max_output_tokens"))),
        instructions=NULLABLE_TEXT,
        max_output_tokens={"type": ["integer", "null"]},
        max_tool_calls={"type": "null"},
        metadata={"type": "object", "additionalProperties": TEXT},
        model=TEXT,
        output=listed(_ITEM),
        parallel_tool_calls={"type": "boolean"},
        previous_response_id={"type": "null"},
        reasoning=OBJECT,
        service_tier=TEXT,
        store={"const": False},
        temperature=NUMBER,
        text=OBJECT,
        tool_choice={"anyOf": [TEXT, OBJECT]},
        tools=listed(OBJECT),
        top_logprobs=WHOLE,
        top_p=NUMBER,
        truncation=fixed("disabled"),
        usage=record(
            input_tokens=WHOLE,
            input_tokens_details=record(cached_tokens=WHOLE),
            output_tokens=WHOLE,
            output_tokens_details=record(reasoning_tokens=WHOLE),
            total_tokens=WHOLE,
        ),
        user={"type": "null"},
    ),
    "Tokens": record(
        count=WHOLE, max_model_len=WHOLE, tokens=listed(WHOLE), token_strs=maybe(listed(TEXT))
    ),
    "Detokenized": record(prompt=TEXT),
    "Model": {
        "type": "object",
        "required": ["id", "root", "object", "created", "owned_by", "max_model_len"],
        "properties": {
            "id": TEXT,
            "root": TEXT,
            "object": fixed("model"),
            "created": WHOLE,
            "owned_by": TEXT,
            "max_model_len": WHOLE,
            "parent": TEXT,
        },
    },
    "ModelList": record(object=fixed("list"), data=listed(ref("Model"))),
    "Ready": record(ready={"type": "boolean"}),
}

_EVENT: Schema = {
    "type": "object",
    "description": "One event of the stream; `data` is JSON, or [DONE].",
    "properties": {"data": TEXT, "event": TEXT},
}
_ERROR_BODY = {"application/json": {"schema": ref("Error")}}
_REFUSALS = {
    400: "The request is wrong; `param` names the place.",
    401: "No API key, or none that is known.",
    403: "The key may not use this model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too much at once; come back after Retry-After.",
    500: "The request failed.",
}
_COMMON = {
    404: "There is no such model or route.",
    503: "Not now; come back after Retry-After.",
}


def documented(
    request: type[BaseModel] | None,
    answer: str,
    *,
    streams: bool = False,
    also: Sequence[int] = (),
) -> dict[str, Any]:
    """Arguments of a route's decorator: its body, its answer (a name of `ANSWERS`, or a media
    type), its errors. `also`: statuses that carry the answer too."""
    media = answer if "/" in answer else "application/json"
    schema = TEXT if "/" in answer else ref(answer)
    content: dict[str, Any] = {media: {"schema": schema}}
    if streams:
        content["text/event-stream"] = {"schema": _EVENT}
    extra: dict[str, Any] = {}
    errors = dict(_COMMON)
    if request is not None:
        errors |= _REFUSALS
        body = {"application/json": {"schema": ref(request.__name__)}}
        extra["requestBody"] = {"required": True, "content": body}
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": _ERROR_BODY} for status, text in errors.items()
    }
    for status in (200, *also):
        responses[status] = {"description": "The answer.", "content": content}
    return {"responses": responses, "openapi_extra": extra, "response_model": None}


def complete(document: dict[str, Any]) -> None:
    """Adds all schemas that the routes refer to."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in REQUESTS:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    structs = {"Health": Health, "Status": StatusReply}
    roots, parts = msgspec.json.schema_components(
        structs.values(), ref_template="#/components/schemas/{name}"
    )
    schemas |= parts | ANSWERS
    schemas["Health"]["required"] = ["healthy"]  # all that strangers see where there are keys
    for name, root in zip(structs, roots, strict=True):
        if root != ref(name):
            schemas[name] = root
