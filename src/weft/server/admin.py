"""The admin plane: what an operator may do to a running pool, over HTTP of its own.

It listens on a private Unix socket, where the kernel says who speaks: only the user who runs the
server and root are heard. On a TCP port, if one is configured, a key is needed. It shares nothing
with the public application, so no mistake in a route there can open it.
"""

import asyncio
import contextlib
import functools
import hashlib
import hmac
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from weft.core.errors import WeftError
from weft.server.admin_socket import bind_socket
from weft.server.connection import Bounds, Connection, sweep_for_ever

log = logging.getLogger("weft.admin")

MAX_BODY_BYTES = 64 << 10
MAX_WAIT_S = 3600.0
TCP_BOUNDS = Bounds(max_connections=64, slow_reader_s=60.0)
"""Of the port, which strangers may reach: they would take the descriptors of everybody."""
ROOT = 0


class ModelCommand(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of load, unload, pin and unpin."""

    model: str
    """A name or alias; for load also the path of a checkpoint under a declared root."""
    name: str | None = None
    """With load of a path: the name to serve it under. Default: the folder's."""
    wait_s: float = 0.0
    """Answer when it is done, or after so long."""


class NoBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of reload and drain: none, or {}."""


class Operator(Protocol):
    """Who carries commands out. Methods raise WeftError for what an operator can mend."""

    async def load(self, command: ModelCommand) -> dict[str, Any]: ...

    async def unload(self, command: ModelCommand) -> dict[str, Any]: ...

    async def pin(self, command: ModelCommand, pinned: bool) -> dict[str, Any]: ...

    async def reload(self) -> dict[str, Any]: ...

    def drain(self) -> dict[str, Any]: ...

    def models(self) -> dict[str, Any]: ...


def create_admin_app(operator: Operator) -> Starlette:
    """POST /admin/{load,unload,pin,unpin,reload,drain} and GET /admin/models; JSON both ways."""

    def on_model(work: Callable[[ModelCommand], Awaitable[dict[str, Any]]]) -> Any:
        async def handle(request: Request) -> Response:
            return await _answer(request, ModelCommand, work)

        return handle

    async def reload(request: Request) -> Response:
        return await _answer(request, NoBody, lambda _: operator.reload())

    async def drain(request: Request) -> Response:
        async def work(_: NoBody) -> dict[str, Any]:
            return operator.drain()

        return await _answer(request, NoBody, work)

    async def models(_: Request) -> Response:
        return JSONResponse(operator.models())

    posts = {
        "load": on_model(operator.load),
        "unload": on_model(operator.unload),
        "pin": on_model(lambda command: operator.pin(command, True)),
        "unpin": on_model(lambda command: operator.pin(command, False)),
        "reload": reload,
        "drain": drain,
    }
    routes = [Route(f"/admin/{name}", work, methods=["POST"]) for name, work in posts.items()]
    return Starlette(routes=[*routes, Route("/admin/models", models, methods=["GET"])])


async def _answer(
    request: Request, schema: type[Any], work: Callable[[Any], Awaitable[dict[str, Any]]]
) -> Response:
    try:
        body = await _read(request)
        command = msgspec.json.decode(body or b"{}", type=schema)
        if isinstance(command, ModelCommand) and not 0 <= command.wait_s <= MAX_WAIT_S:
            raise WeftError(f"wait_s must lie in 0 .. {MAX_WAIT_S:g}")
        return JSONResponse(await work(command))
    except msgspec.DecodeError as error:
        return _error(400, str(error))
    except WeftError as error:
        return _error(409, str(error))
    except ClientDisconnect:
        return _error(400, "the client left")


async def _read(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise WeftError(f"a command has at most {MAX_BODY_BYTES} bytes")
    return body


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": " ".join(message.split())}}, status)


class WithKey:
    """Lets those in who send `Authorization: Bearer KEY` with a key of this hash."""

    def __init__(self, app: ASGIApp, key_sha256: str) -> None:
        """key_sha256: 64 hexadecimal digits."""
        self._app = app
        self._digest = bytes.fromhex(key_sha256)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._allowed(scope):
            await _error(401, "an admin key is needed")(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                digest = hashlib.sha256(value[7:].strip()).digest()
                return hmac.compare_digest(digest, self._digest)
        return False


class OwnerOnly(H11Protocol):
    """HTTP on a Unix socket for the server's own user and root; the kernel says who connects."""

    _refused = False

    def connection_made(self, transport: Any) -> None:
        ours: socket.socket = transport.get_extra_info("socket")
        peer = ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", peer)
        if uid not in (ROOT, os.getuid()):
            log.warning("admin=refused uid=%d", uid)
            self._refused = True
            transport.abort()
            return
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._refused:
            super().connection_lost(exc)


class _Server(uvicorn.Server):
    """uvicorn without signals: the public server answers those."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@contextlib.asynccontextmanager
async def serve_admin(
    app: ASGIApp, path: Path, tcp: socket.socket | None = None, key_sha256: str | None = None
) -> AsyncIterator[None]:
    """Serve `app` on a private Unix socket at `path`, and for those with the key on `tcp` (a bound
    socket, closed at the end). Raises WeftError."""
    sock = bind_socket(path)
    servers = [(_server(app, OwnerOnly), sock)]
    if tcp is not None and key_sha256 is not None:
        bounded = functools.partial(Connection, bounds=TCP_BOUNDS)
        servers.append((_server(WithKey(app, key_sha256), bounded), tcp))
    tasks = [asyncio.create_task(server.serve(sockets=[sock])) for server, sock in servers]
    sweepers = [
        asyncio.create_task(sweep_for_ever(server.server_state.connections, TCP_BOUNDS))
        for server, _ in servers[1:]
    ]
    try:
        while not all(server.started for server, _ in servers):
            if any(task.done() for task in tasks):
                raise WeftError(f"the admin socket {path} cannot be served")
            await asyncio.sleep(0.01)
        log.info("admin=serving socket=%s", path)
        yield
    finally:
        for sweeper in sweepers:
            sweeper.cancel()
        for server, _ in servers:
            server.should_exit = True
        await asyncio.wait(tasks)
        for _, sock in servers:
            sock.close()
        path.unlink(missing_ok=True)


def _server(app: ASGIApp, protocol: Callable[..., asyncio.Protocol]) -> _Server:
    config = uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        h11_max_incomplete_event_size=16 << 10,
        timeout_graceful_shutdown=1,
    )
    return _Server(config)
