"""The HTTP routes. Thin: read, check, hand over."""

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

import weft
from weft.config.pool_config import ServerConfig
from weft.hub.base import Hub, ModelCard
from weft.server.answer import Answer, Gate
from weft.server.body import decode_json, parse, read_body
from weft.server.errors import CLIENT_CLOSED, ApiError
from weft.server.metrics import UNKNOWN_MODEL, Metrics
from weft.server.plan import Asker, Plan, find_model, plan_chat, plan_completion
from weft.server.schemas import ChatRequest, CompletionRequest
from weft.server.status import StatusReply
from weft.server.text import TextService

R = TypeVar("R", bound=BaseModel)


class Frontend:
    """What the routes share: one frontend's hub, texts, metrics, gate and limits."""

    def __init__(
        self, hub: Hub, config: ServerConfig, texts: TextService, metrics: Metrics, gate: Gate
    ) -> None:
        self.hub = hub
        self.config = config
        self.texts = texts
        self.metrics = metrics
        self.gate = gate

    async def generate(
        self,
        request: Request,
        schema: type[R],
        plan: Callable[[Asker, R], Awaitable[Plan]],
    ) -> Answer:
        """Raises ApiError for what is refused before the hub hears of it."""
        arrival_s = time.monotonic()
        data: Any = None
        try:
            data = decode_json(await read_body(request, self.config.max_body_bytes))
            checked = parse(schema, data)
            self.gate.check()
            planned = await plan(self.asker(request), checked)
        except ApiError as error:
            outcome = "cancelled" if error.status == CLIENT_CLOSED else "refused"
            self.metrics.requests.labels(self._label(data), outcome).inc()
            raise
        return Answer(
            self.hub,
            planned,
            self.metrics,
            self.gate,
            request_id=request.state.request_id,
            arrival_s=arrival_s,
            keepalive_s=self.config.keepalive_s,
        )

    def asker(self, request: Request) -> Asker:
        tenant = getattr(request.state, "tenant", "")
        return Asker(hub=self.hub, texts=self.texts, tenant=tenant)

    def _label(self, data: Any) -> str:
        name = data.get("model") if isinstance(data, dict) else None
        known = {card.name for card in self.hub.models()}
        return name if isinstance(name, str) and name in known else UNKNOWN_MODEL


def _body(schema: type[BaseModel]) -> dict[str, Any]:
    """The request body for the OpenAPI document (the routes read and check it themselves)."""
    reference = {"$ref": f"#/components/schemas/{schema.__name__}"}
    content = {"application/json": {"schema": reference}}
    return {"requestBody": {"required": True, "content": content}}


_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is refused.", "content": _ERROR},
    "5XX": {"description": "The server cannot answer now.", "content": _ERROR},
}
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _model_entry(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created_s,
        "owned_by": "weft",
        "max_model_len": card.max_context_tokens,
    }


def openai_routes(front: Frontend) -> APIRouter:
    router = APIRouter(prefix="/v1", responses=_ERRORS)

    @router.get("/models")
    async def list_models() -> JSONResponse:
        entries = [_model_entry(card) for card in front.hub.models() if card.failed is None]
        return JSONResponse({"object": "list", "data": entries})

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> JSONResponse:
        cards = {card.name: card for card in front.hub.models()}
        card = cards[name] if name in cards else find_model(front.hub, name)
        return JSONResponse(_model_entry(card))

    @router.post("/chat/completions", openapi_extra=_body(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await front.generate(request, ChatRequest, plan_chat)

    @router.post("/completions", openapi_extra=_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await front.generate(request, CompletionRequest, plan_completion)

    return router


def operator_routes(front: Frontend) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health(request: Request) -> JSONResponse:
        state = front.hub.health()
        numbers = msgspec.to_builtins(state)
        if len(request.app.state.keys) and request.state.visit.key is None:
            numbers = {"healthy": state.healthy}
        return JSONResponse(numbers, 200 if state.healthy else 503)

    @router.get("/ready")
    async def ready() -> JSONResponse:
        is_ready = front.hub.health().ready and not front.gate.draining
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(front.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/weft/status")
    async def status() -> Response:
        reply = StatusReply(
            version=weft.__version__, health=front.hub.health(), pool=front.hub.view()
        )
        return Response(msgspec.json.encode(reply), media_type="application/json")

    return router
