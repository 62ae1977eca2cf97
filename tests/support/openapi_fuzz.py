"""Requests drawn from a served OpenAPI document by schemathesis, and what must hold of answers:
no 5xx, no hang, nothing undocumented."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)
NAMES = ("m", "n")
"""The models that the server must have."""
_IDS = {"type": "array", "items": {"enum": [0, 5, 77]}, "minItems": 1, "maxItems": 20}
_WORDS = {"type": "string", "minLength": 1, "maxLength": 40}
_PROMPTS = {
    "anyOf": [_WORDS, _IDS, {"type": "array", "items": _WORDS, "minItems": 1, "maxItems": 5}]
}
SHORT = {"prompt": _PROMPTS, "input": _WORDS, "tokens": _IDS}


def narrow(url: str) -> Any:
    """The served document with fewer ways to be refused, so that most requests are served."""
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schemas = document.raw_schema["components"]["schemas"]
    for name, body in schemas.items():
        fields = body.get("properties", {})
        if "maxLength" in fields.get("model", {}):
            fields["model"] |= {"enum": list(NAMES)}
        for field in ("logit_bias", "chat_template_kwargs", "tools", "tool_choice", "dimensions"):
            if name.endswith("Request"):
                fields.pop(field, None)
        for field in ("prompt", "input", "tokens"):
            if name.endswith("Request") and field in fields:
                fields[field] = SHORT[field]
        for field in ("guided_json", "guided_regex", "guided_grammar", "structured_outputs"):
            fields.pop(field, None)
    message = schemas["Message"]["properties"]
    message["content"] = {"type": "string", "minLength": 1, "maxLength": 50}
    message.pop("tool_calls")
    message.pop("reasoning_content")
    schemas["Message"]["required"] = ["role", "content"]
    return document


OPERATIONS = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/embeddings",
    "POST /v1/responses",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /health",
    "GET /ready",
    "GET /metrics",
    "GET /weft/status",
)


def fuzz(document: Any, operation: str, mode: GenerationMode, max_examples: int) -> list[int]:
    """The statuses of the answers."""
    method, path = operation.split(" ")
    statuses: list[int] = []

    @seed(1)
    @settings(
        max_examples=max_examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        database=None,
    )
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def drawn(case: Any) -> None:
        statuses.append(case.call_and_validate(checks=CHECKS, timeout=20).status_code)

    drawn()
    return statuses


def fuzz_all(document: Any, narrowed: Any, operation: str, max_examples: int) -> None:
    """Requests that fit the document, requests that break it, and requests that are served."""
    part = max_examples // 3 + 1
    fuzz(document, operation, GenerationMode.POSITIVE, part)
    if operation.startswith("POST"):
        broken = fuzz(document, operation, GenerationMode.NEGATIVE, part)
        assert 200 not in broken
    statuses = fuzz(narrowed, operation, GenerationMode.POSITIVE, part)
    if operation != "GET /v1/models/{name}":
        assert 200 in statuses
