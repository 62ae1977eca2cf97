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
from weft.server.embeddings import EmbeddingRequest, plan_embeddings
from weft.server.errors import CLIENT_CLOSED, ApiError
from weft.server.metrics import UNKNOWN_MODEL, Metrics
from weft.server.openapi import documented
from weft.server.plan import Asker, Plan, find_model, plan_chat, plan_completion
from weft.server.responses import ResponseRequest, plan_response
from weft.server.schemas import ChatRequest, CompletionRequest
from weft.server.status import StatusReply
from weft.server.text import TextService
from weft.server.tokens import DetokenizeRequest, TokenizeRequest, detokenize, tokenize

R = TypeVar("R", bound=BaseModel)
T = TypeVar("T")
PARSING = ""
"""The lane of large bodies among those of the models."""
SMALL_BODY_BYTES = 1 << 16
"""A body up to here is parsed where it was read."""


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
            data, is_large = await self._read(request)
            checked = await self._check(schema, data, aside=is_large)
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

    async def reckon(
        self,
        request: Request,
        schema: type[R],
        work: Callable[[Asker, R], Awaitable[dict[str, Any]]],
    ) -> Response:
        """The answer of a route that asks no model. Raises ApiError."""
        data, is_large = await self._read(request)
        checked = await self._check(schema, data, aside=is_large)
        found = await work(self.asker(request), checked)
        return Response(msgspec.json.encode(found), media_type="application/json")

    async def _read(self, request: Request) -> tuple[Any, bool]:
        """The body, and whether it is large. Raises ApiError."""
        body = await read_body(request, self.config.max_body_bytes)
        is_large = len(body) > SMALL_BODY_BYTES
        return await self._run(lambda: decode_json(body), aside=is_large), is_large

    async def _check(self, schema: type[R], data: Any, *, aside: bool) -> R:
        """Raises ApiError."""
        checked = await self._run(lambda: parse(schema, data), aside=aside)
        self.gate.check()
        return checked

    async def _run(self, work: Callable[[], T], *, aside: bool) -> T:
        """`aside`: in the text service's threads, so that the loop turns meanwhile."""
        return await self.texts.run(PARSING, work) if aside else work()

    def asker(self, request: Request) -> Asker:
        tenant = getattr(request.state, "tenant", "")
        return Asker(hub=self.hub, texts=self.texts, tenant=tenant)

    def _label(self, data: Any) -> str:
        name = data.get("model") if isinstance(data, dict) else None
        known = {card.name for card in self.hub.models()}
        return name if isinstance(name, str) and name in known else UNKNOWN_MODEL


def _model_entry(card: ModelCard, name: str) -> dict[str, Any]:
    """Under its name or an alias; `root` says whose alias and `parent` on which model an adapter
    is, as vLLM has it."""
    parent = {} if card.base is None else {"parent": card.base}
    return {
        "id": name,
        "root": card.name,
        "object": "model",
        "created": card.created_s,
        "owned_by": "weft",
        "max_model_len": card.max_context_tokens,
        **parent,
    }


def openai_routes(front: Frontend) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models", **documented(None, "ModelList"))
    async def list_models() -> JSONResponse:
        entries = [
            _model_entry(card, name)
            for card in front.hub.models()
            if card.failed is None
            for name in (card.name, *card.aliases)
        ]
        return JSONResponse({"object": "list", "data": entries})

    @router.get("/models/{name:path}", **documented(None, "Model"))
    async def get_model(name: str) -> JSONResponse:
        cards = {card.name: card for card in front.hub.models()}
        card = cards[name] if name in cards else find_model(front.hub, name)
        return JSONResponse(_model_entry(card, name))

    @router.post("/chat/completions", **documented(ChatRequest, "ChatAnswer", streams=True))
    async def chat_completions(request: Request) -> Response:
        return await front.generate(request, ChatRequest, plan_chat)

    @router.post("/completions", **documented(CompletionRequest, "CompletionAnswer", streams=True))
    async def completions(request: Request) -> Response:
        return await front.generate(request, CompletionRequest, plan_completion)

    @router.post("/responses", **documented(ResponseRequest, "ResponseAnswer", streams=True))
    async def responses(request: Request) -> Response:
        return await front.generate(request, ResponseRequest, plan_response)

    @router.post("/embeddings", **documented(EmbeddingRequest, "EmbeddingAnswer"))
    async def embeddings(request: Request) -> Response:
        return await front.generate(request, EmbeddingRequest, plan_embeddings)

    return router


def token_routes(front: Frontend) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", **documented(TokenizeRequest, "Tokens"))
    async def tokenize_text(request: Request) -> Response:
        return await front.reckon(request, TokenizeRequest, tokenize)

    @router.post("/detokenize", **documented(DetokenizeRequest, "Detokenized"))
    async def detokenize_ids(request: Request) -> Response:
        return await front.reckon(request, DetokenizeRequest, detokenize)

    return router


def operator_routes(front: Frontend) -> APIRouter:
    router = APIRouter()

    @router.get("/health", **documented(None, "Health", also=(503,)))
    async def health(request: Request) -> JSONResponse:
        state = front.hub.health()
        numbers = msgspec.to_builtins(state)
        if len(request.app.state.keys) and request.state.visit.key is None:
            numbers = {"healthy": state.healthy}
        return JSONResponse(numbers, 200 if state.healthy else 503)

    @router.get("/ready", **documented(None, "Ready", also=(503,)))
    async def ready() -> JSONResponse:
        is_ready = front.hub.health().ready and not front.gate.draining
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @router.get("/metrics", **documented(None, "text/plain"))
    async def metrics() -> Response:
        return Response(front.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/weft/status", **documented(None, "Status"))
    async def status() -> Response:
        reply = StatusReply(
            version=weft.__version__, health=front.hub.health(), pool=front.hub.view()
        )
        return Response(msgspec.json.encode(reply), media_type="application/json")

    return router
