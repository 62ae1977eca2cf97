"""The admin plane's door: who is heard, and what is asked of whom."""

import asyncio
import hashlib
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from weft.core.errors import WeftError
from weft.server import admin, admin_socket
from weft.server.admin import ModelCommand, create_admin_app, serve_admin
from weft.server.connection import Bounds


class Told:
    """An operator that only notes what it is told."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    async def load(self, command: ModelCommand) -> dict[str, Any]:
        if command.model == "broken":
            raise WeftError("broken is\nbroken")
        self.log.append(("load", command.model))
        return {"model": command.model}

    async def unload(self, command: ModelCommand) -> dict[str, Any]:
        self.log.append(("unload", command.model))
        return {}

    async def pin(self, command: ModelCommand, pinned: bool) -> dict[str, Any]:
        self.log.append(("pin", command.model, pinned))
        return {}

    async def reload(self) -> dict[str, Any]:
        self.log.append("reload")
        return {}

    def drain(self) -> dict[str, Any]:
        self.log.append("drain")
        return {}

    def models(self) -> dict[str, Any]:
        return {"models": []}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runtime folder whose sockets have short paths."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="weft-admin-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    shutil.rmtree(folder)


def serving(
    work: Callable[[httpx.AsyncClient, Path], Any], told: Told, key: str | None = None
) -> None:
    async def scenario() -> None:
        path = admin_socket.default_socket(1)
        tcp = None
        if key is not None:
            tcp = socket.create_server(("127.0.0.1", 0))
        digest = hashlib.sha256((key or "").encode()).hexdigest()
        async with serve_admin(create_admin_app(told), path, tcp, digest):
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            if tcp is not None:
                transport = httpx.AsyncHTTPTransport()
                base = f"http://127.0.0.1:{tcp.getsockname()[1]}"
            else:
                base = "http://admin"
            async with httpx.AsyncClient(transport=transport, base_url=base) as client:
                await work(client, path)
        assert not path.exists()

    asyncio.run(scenario())


def test_commands_reach_the_operator_and_errors_come_back_in_one_line(short: Path) -> None:
    told = Told()

    async def work(client: httpx.AsyncClient, path: Path) -> None:
        for name in ("load", "unload", "pin", "unpin"):
            assert (await client.post(f"/admin/{name}", json={"model": "m"})).status_code == 200
        for name in ("reload", "drain"):
            assert (await client.post(f"/admin/{name}")).status_code == 200
        assert (await client.get("/admin/models")).json() == {"models": []}
        reply = await client.post("/admin/load", json={"model": "broken"})
        assert reply.status_code == 409
        assert reply.json() == {"error": {"message": "broken is broken"}}
        bad: list[Any] = [{}, {"model": 1}, {"model": "m", "force": True}, [], "x"]
        for body in bad:
            assert (await client.post("/admin/load", json=body)).status_code == 400
        for wait_s in (-1, 1e9):
            reply = await client.post("/admin/load", json={"model": "m", "wait_s": wait_s})
            assert reply.status_code == 409
        reply = await client.post("/admin/load", content=b"x" * (admin.MAX_BODY_BYTES + 1))
        assert reply.status_code == 409
        assert (await client.get("/admin/load")).status_code == 405
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0
        assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700

    serving(work, told)
    assert told.log == [
        ("load", "m"),
        ("unload", "m"),
        ("pin", "m", True),
        ("pin", "m", False),
        "reload",
        "drain",
    ]


def test_another_user_is_not_heard(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's word is read, not the client's: here we look like somebody else."""
    me = os.getuid()
    told = Told()

    async def work(client: httpx.AsyncClient, path: Path) -> None:
        monkeypatch.setattr(admin, "ROOT", -1)
        monkeypatch.setattr(admin.os, "getuid", lambda: me + 1)
        with pytest.raises(httpx.HTTPError):
            await client.post("/admin/reload")
        monkeypatch.setattr(admin.os, "getuid", lambda: me)
        assert (await client.post("/admin/reload")).status_code == 200

    serving(work, told)
    assert told.log == ["reload"]


def test_a_port_needs_the_key(short: Path) -> None:
    told = Told()

    async def work(client: httpx.AsyncClient, _: Path) -> None:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            reply = await client.post("/admin/reload", headers=headers)
            assert reply.status_code == 401
        good = {"Authorization": "Bearer secret"}
        assert (await client.post("/admin/reload", headers=good)).status_code == 200

    serving(work, told, key="secret")
    assert told.log == ["reload"]


def test_strangers_at_the_port_are_few_and_do_not_stay(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = Bounds(max_connections=2, slow_reader_s=60.0, first_request_s=0.1)
    monkeypatch.setattr(admin, "TCP_BOUNDS", bounds)

    async def work(client: httpx.AsyncClient, _: Path) -> None:
        async def silent() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            heard = await asyncio.wait_for(reader.read(), 20)  # until the server ends it
            writer.close()
            return heard

        heard = await asyncio.gather(*(silent() for _ in range(3)), return_exceptions=True)
        full = [one for one in heard if isinstance(one, bytes) and b" 503 " in one]
        assert len(full) == 1

    serving(work, Told(), key="secret")


def test_a_folder_that_others_can_enter_is_refused(short: Path) -> None:
    (short / "weft").mkdir(mode=0o755)
    with pytest.raises(WeftError, match="open to other users"):
        admin_socket.bind_socket(admin_socket.default_socket(1))


def test_a_link_in_the_place_of_the_folder_is_refused(short: Path) -> None:
    (short / "mine").mkdir(mode=0o700)
    (short / "weft").symlink_to(short / "mine")
    with pytest.raises(WeftError, match="not a folder of this user"):
        admin_socket.bind_socket(admin_socket.default_socket(1))


def test_a_dead_server_leaves_its_place_to_the_next_and_a_live_one_does_not(short: Path) -> None:
    path = admin_socket.default_socket(1)
    first = admin_socket.bind_socket(path)
    with pytest.raises(WeftError, match="another server"):
        admin_socket.bind_socket(path)
    first.close()
    second = admin_socket.bind_socket(path)
    second.close()
    with pytest.raises(WeftError, match="longer than"):
        admin_socket.bind_socket(short / ("x" * 120))
