"""A frontend on a loopback port, in the test's own event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import msgspec

from weft.config.pool_config import ModelConfig, PoolConfig, ServerConfig
from weft.hub.base import Hub
from weft.server.app import create_app
from weft.server.serve import serve


def pool_config(
    hub: Hub, *, keepalive_s: float = 10.0, max_body_bytes: int = 1 << 20
) -> PoolConfig:
    return PoolConfig(
        models=[ModelConfig(name=card.name, path=card.path) for card in hub.models()],
        server=ServerConfig(
            keepalive_s=keepalive_s, max_body_bytes=max_body_bytes, access_log=True
        ),
    )


class Live:
    def __init__(self, url: str, stop: asyncio.Event, task: "asyncio.Task[None]") -> None:
        self.url = url
        self.stop = stop
        self.task = task


@asynccontextmanager
async def live(
    hub: Hub,
    *,
    keepalive_s: float = 10.0,
    max_body_bytes: int = 1 << 20,
    grace_s: float = 10.0,
    server: ServerConfig | None = None,
) -> AsyncIterator[Live]:
    config = pool_config(hub, keepalive_s=keepalive_s, max_body_bytes=max_body_bytes)
    if server is not None:
        config = msgspec.structs.replace(config, server=server)
    app = create_app(hub, config)
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(
        serve(app, "127.0.0.1", 0, stop=stop, on_ready=url.set_result, grace_s=grace_s)
    )
    try:
        await asyncio.wait({url, task}, return_when=asyncio.FIRST_COMPLETED)
        yield Live(url.result(), stop, task)
    finally:
        stop.set()
        await task


@asynccontextmanager
async def asgi_client(
    hub: Hub, *, max_body_bytes: int = 1 << 20
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application without a socket; streamed answers arrive whole."""
    app = create_app(hub, pool_config(hub, max_body_bytes=max_body_bytes))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        yield client
