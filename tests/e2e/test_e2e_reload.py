"""A running pool is changed: by reloads of its file, and by an operator's commands."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from support.pool_process import PoolProcess, poll, running_pool, stream_text
from support.tiny import tiny_checkpoint
from weft.cli import main as cli
from weft.core.errors import WeftError

PROMPT = [3, 7, 11, 5]


def checkpoint(folder: Path, seed: int) -> Path:
    return tiny_checkpoint(
        folder, seed=seed, dtype="float64", hidden=128, intermediate=256, vocab=256
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PoolProcess, Path, str]]:
    """One pool for all tests, its folder, and its first configuration."""
    folder = tmp_path_factory.mktemp("reload")
    for seed, name in enumerate(("ant", "bee", "cat", "dog")):
        checkpoint(folder / "roots" / name, seed)
    (folder / "elsewhere").mkdir()
    checkpoint(folder / "elsewhere" / "eel", 8)
    (folder / "roots" / "link").symlink_to(folder / "elsewhere" / "eel")
    models = [{"name": n, "path": f"roots/{n}"} for n in ("ant", "bee")]
    engine = {"device_memory": "12M", "spare_host_memory": "16M"}
    with running_pool(
        folder, models, engine=engine, turn_s=0.05, admin={"model_roots": ["roots"]}
    ) as running:
        running.wait_ready()
        yield running, folder, running.config_file.read_text()


@pytest.fixture
def pool(shared: tuple[PoolProcess, Path, str]) -> PoolProcess:
    """The pool as it was at first."""
    running, _, first = shared
    running.config_file.write_text(first)
    assert not command(running, "reload")["failed"]
    poll(lambda: set(_states(running)) == {"ant", "bee"}, 30, running)
    return running


@pytest.fixture
def folder(shared: tuple[PoolProcess, Path, str]) -> Path:
    return shared[1]


def complete(pool: PoolProcess, model: str, tokens: int = 8, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, **more}
    body |= {"ignore_eos": True, "return_token_ids": True}
    return httpx.post(f"{pool.url}/v1/completions", json=body, timeout=60)


def ids(pool: PoolProcess, model: str) -> list[int]:
    reply = complete(pool, model)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["token_ids"]


def command(pool: PoolProcess, verb: str, /, **body: Any) -> dict[str, Any]:
    with pool.admin() as admin:
        reply = admin.post(f"/admin/{verb}", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(pool: PoolProcess, verb: str, /, **body: Any) -> str:
    with pool.admin() as admin:
        reply = admin.post(f"/admin/{verb}", json=body)
    assert reply.status_code == 409, reply.text
    return reply.json()["error"]["message"]


def state(pool: PoolProcess, model: str) -> str:
    with pool.admin() as admin:
        entries = admin.get("/admin/models").json()["models"]
    return next(entry["state"] for entry in entries if entry["model"] == model)


def entry(name: str, path: str | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "path": f"roots/{path or name}", **more}


def test_models_are_added_changed_and_removed_while_requests_run(pool: PoolProcess) -> None:
    bee, ant = ids(pool, "bee"), ids(pool, "ant")
    removed = pool.log().count("state=removed")

    async def scenario() -> tuple[str, str]:
        begun = asyncio.Event()
        body = {"max_tokens": 400, "temperature": 0, "ignore_eos": True, "on_text": begun.set}
        async with pool.client() as client:
            plain = await stream_text(client, "bee", PROMPT, **body)
            begun.clear()
            running = asyncio.create_task(stream_text(client, "bee", PROMPT, **body))
            await begun.wait()
            pool.configure(models=[entry("bee", "cat", aliases=["b"]), entry("dog")])
            report = await asyncio.to_thread(command, pool, "reload")
            assert report["added"] == ["dog"] and report["changed"] == ["bee"]
            assert report["removed"] == ["ant"] and not report["failed"], report
            return plain, await running

    plain, ran = asyncio.run(scenario())
    assert plain == ran, "what had begun goes on with the old weights"
    assert complete(pool, "ant").status_code == 404
    poll(lambda: complete(pool, "b").status_code == 200, 30, pool)
    new = ids(pool, "bee")
    assert new != bee and ids(pool, "b") == new and ids(pool, "dog") not in (new, bee, ant)
    names = [m["id"] for m in httpx.get(f"{pool.url}/v1/models").json()["data"]]
    assert set(names) == {"bee", "b", "dog"}
    poll(lambda: pool.log().count("state=removed") == removed + 2, 30, pool)
    assert {m for m in _states(pool)} == {"bee", "dog"}


def _states(pool: PoolProcess) -> dict[str, str]:
    unit = httpx.get(f"{pool.url}/weft/status").json()["pool"]["units"][0]
    status = unit["status"] or {"models": []}  # it has not spoken yet
    return {model["name"]: model["state"] for model in status["models"]}


def test_places_of_removed_models_are_used_again(pool: PoolProcess) -> None:
    """More models come and go than there is room for, each with the answers it always gives."""
    first = {}
    removed = pool.log().count("state=removed")
    for turn in range(6):
        name = ("cat", "dog")[turn % 2]
        pool.configure(models=[entry("ant"), entry(name)])
        report = command(pool, "reload")
        assert not report["failed"], report
        answer = ids(pool, name)
        assert first.setdefault(name, answer) == answer
        gone = removed + turn + 1
        poll(lambda gone=gone: pool.log().count("state=removed") == gone, 30, pool)
    assert first["cat"] != first["dog"]


def test_wishes_change_at_once_and_the_rest_is_named(pool: PoolProcess) -> None:
    before = ids(pool, "ant")
    pool.configure(
        models=[entry("ant", pinned=True, defaults={"max_tokens": 3}), entry("bee")],
        slo={"ttft_s": "3s"},
        turn_s=0.1,
    )
    report = command(pool, "reload")
    assert report["updated"] == ["ant", "bee"] and report["needs_restart"] == ["turn_s"]
    assert not report["changed"] and ids(pool, "ant") == before
    cards = httpx.get(f"{pool.url}/weft/status").json()["pool"]["models"]
    assert [card["ttft_slo_s"] for card in cards] == [3.0, 3.0]
    body = {"model": "ant", "prompt": PROMPT, "ignore_eos": True}
    reply = httpx.post(f"{pool.url}/v1/completions", json=body).json()
    assert reply["usage"]["completion_tokens"] == 3
    assert "is pinned" in refused(pool, "unload", model="ant")


def test_an_invalid_file_changes_nothing_and_is_reported(pool: PoolProcess) -> None:
    before = httpx.get(f"{pool.url}/v1/models").json()
    good = pool.config_file.read_text()
    pool.config_file.write_text("models: [")
    assert "not YAML" in refused(pool, "reload")
    pool.process.send_signal(signal.SIGHUP)
    poll(lambda: "reload=refused" in pool.log(), 10, pool)
    pool.config_file.write_text(good)
    pool.configure(models=[entry("ant"), entry("bee", "nowhere"), entry("new", "nowhere")])
    report = command(pool, "reload")
    assert set(report["failed"]) == {"bee", "new"} and not report["changed"]
    assert ids(pool, "bee"), "what is served stays when the new one cannot be"
    assert complete(pool, "new").status_code == 503
    pool.config_file.write_text(good)
    assert command(pool, "reload")["removed"] == ["new"]
    assert httpx.get(f"{pool.url}/v1/models").json() == before


def test_sighup_and_a_watched_file_reload(pool: PoolProcess) -> None:
    pool.configure(models=[entry("ant"), entry("cat")], watch=True)
    pool.process.send_signal(signal.SIGHUP)
    poll(lambda: complete(pool, "cat").status_code == 200, 30, pool)
    pool.configure(models=[entry("ant"), entry("dog")])
    poll(lambda: complete(pool, "dog").status_code == 200, 30, pool)
    assert complete(pool, "cat").status_code == 404


def test_load_unload_and_pin(pool: PoolProcess) -> None:
    assert command(pool, "load", model="bee", wait_s=30)["state"] == "resident"
    again = command(pool, "load", model="bee", wait_s=30)
    assert again["state"] == "resident" and again["seconds"] < 30, "waited for no report"
    assert command(pool, "unload", model="bee", wait_s=30)["state"] == "absent"
    assert ids(pool, "bee")
    poll(lambda: state(pool, "bee") == "resident", 10, pool)
    assert command(pool, "pin", model="bee")["pinned"]
    assert "unpin" in refused(pool, "unload", model="bee")
    assert not command(pool, "unpin", model="bee")["pinned"]
    assert command(pool, "unload", model="bee", wait_s=30)["state"] == "absent"
    assert "no model" in refused(pool, "load", model="nobody")


def test_the_command_line_speaks_to_the_socket(pool: PoolProcess) -> None:
    def weft(*args: str) -> Any:
        socket = ["--socket", str(pool.admin_socket)]
        return CliRunner().invoke(cli.app, [*args, *socket])

    assert weft("load", "bee").output.startswith("bee is resident")
    assert weft("unload", "bee").output.startswith("bee is absent")
    assert "ant is pinned" in weft("pin", "ant").output
    assert "pinned" in weft("models").output and "no longer" in weft("unpin", "ant").output
    assert weft("reload").output == "nothing changed\n"
    pool.configure(models=[entry("ant"), entry("new", "nowhere")], turn_s=0.2)
    result = weft("reload")
    assert result.exit_code == 1
    for line in ("removed: bee", "needs a restart: turn_s", "failed: new: "):
        assert line in result.output
    with pytest.raises(WeftError, match="no model"):
        raise weft("load", "nobody").exception
    url = ["--url", pool.url]
    said = CliRunner().invoke(cli.app, ["run", "ant", "hi", "--max-tokens", "3", *url])
    assert said.exit_code == 0 and said.output.endswith("\n") and len(said.output) > 1


def test_only_checkpoints_under_declared_roots_are_loaded_by_path(
    pool: PoolProcess, folder: Path
) -> None:
    outside = str(folder / "elsewhere" / "eel")
    for path in (outside, "link", "../elsewhere/eel", "/etc", "roots/../../elsewhere/eel"):
        assert "admin.model_roots" in refused(pool, "load", model=path), path
    assert command(pool, "load", model="cat", wait_s=30)["state"] == "resident"
    assert command(pool, "load", model=str(folder / "roots" / "dog"), name="d", wait_s=30)
    assert ids(pool, "cat") and ids(pool, "d")
    assert "taken" in refused(pool, "load", model=str(folder / "roots" / "dog"), name="ant")
    assert sorted(command(pool, "reload")["removed"]) == ["cat", "d"], "the file is the truth"


def test_drain_ends_the_server(pool: PoolProcess) -> None:
    """The last one here."""
    assert command(pool, "drain")["draining"]
    assert pool.process.wait(30) == 0
    assert not pool.admin_socket.exists()
