"""The ASGI application of one frontend."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import weft
from weft.config.pool_config import PoolConfig
from weft.hub.base import Hub
from weft.server.answer import Gate
from weft.server.bodies import Bodies
from weft.server.door import Door
from weft.server.door_hub import DoorHub
from weft.server.errors import ApiError, bad_request
from weft.server.keys import KeyRing
from weft.server.metrics import Metrics
from weft.server.middleware import RequestIdMiddleware
from weft.server.openapi import complete
from weft.server.routes import Frontend, openai_routes, operator_routes, token_routes
from weft.server.text import TextService

log = logging.getLogger("weft.server")


class _App(FastAPI):
    """Adds the bodies, which the routes check and write themselves, to /openapi.json."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            complete(super().openapi())
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app(
    hub: Hub,
    config: PoolConfig,
    *,
    base_dir: Path = Path(),
    texts: TextService | None = None,
) -> FastAPI:
    """An application that serves `hub`. `app.state.gate` is its `Gate`, for `serve`;
    `app.state.keys` its `KeyRing`, which may be exchanged. `base_dir`: where relative paths of the
    keys' files start. Raises WeftError for keys that cannot be read.

    Tokenizers are read in the background once the application starts, or at first use.
    """
    keys = KeyRing.load(config.server.keys, base_dir)
    own_texts = texts or TextService()
    own_texts.served = lambda: {card.name for card in hub.models()}
    gate = Gate()
    bodies = Bodies(config.server.max_body_bytes)
    front = Frontend(
        DoorHub(hub, on_open=bodies.release), config.server, own_texts, Metrics(hub), gate
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        preload = asyncio.create_task(_preload(hub, own_texts))
        try:
            yield
        finally:
            preload.cancel()
            own_texts.close()

    app = _App(
        title="weft",
        version=weft.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.gate = gate
    app.state.keys = keys
    app.state.server_config = config.server
    app.include_router(openai_routes(front))
    app.include_router(token_routes(front))
    app.include_router(operator_routes(front))
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    # The one added last is the outermost.
    app.add_middleware(
        Door, server=config.server, keys=lambda: app.state.keys, gate=gate, bodies=bodies
    )
    if config.server.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.server.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestIdMiddleware)
    return app


async def _preload(hub: Hub, texts: TextService) -> None:
    for card in hub.models():
        if card.failed is None:
            try:
                await texts.model(card)
            except ApiError as error:
                log.error("model=%s has no usable tokenizer: %s", card.name, error.message)


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no {request.url.path[:200]}; GET /openapi.json lists what there is",
        405: f"{request.method[:20]} is not a method of {request.url.path[:200]}",
    }
    codes = {404: "not_found", 405: "method_not_allowed"}
    return ApiError(
        error.status_code,
        messages.get(error.status_code, str(error.detail)),
        code=codes.get(error.status_code),
        headers=dict(error.headers or {}),
    ).response()


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    details = error.errors()
    message = str(details[0].get("msg", "invalid request")) if details else "invalid request"
    return bad_request(message[:200], code="invalid_value").response()
