"""Who may ask: keys, their hashes and their limits; the Host header; origins of pages."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from support.fake_hub import FakeHub, Hold, card, spoken
from support.live import pool_config
from support.tiny import write_tokenizer
from weft.config.pool_config import make_pool_config
from weft.config.server_config import KeyConfig, ServerConfig
from weft.core.errors import WeftError
from weft.hub.base import Chunk, ModelCard, NewRequest
from weft.server.app import create_app
from weft.server.door_hub import DoorHub
from weft.server.keys import KeyRing, hash_of, new_key
from weft.server.limits import ColdModels, KeyLimits, TokenBucket
from weft.server.visit import Visit, current_visit

ALICE, OPS = new_key(), new_key()
BODY = {"model": "small", "prompt": [5], "max_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, 300)
    return folder


@pytest.fixture
def hub(folder: Path) -> FakeHub:
    cards = [card("small", folder), card("large", folder), card("broken", folder, failed="bad")]
    return FakeHub(cards, lambda _: spoken([9, 9, 9]))


def keys(**alice: Any) -> tuple[KeyConfig, ...]:
    return (
        KeyConfig(name="alice", sha256=hash_of(ALICE), **alice),
        KeyConfig(name="ops", sha256=hash_of(OPS), operator=True),
    )


@asynccontextmanager
async def client_of(
    hub: FakeHub, server: ServerConfig, *, url: str = "http://localhost"
) -> AsyncIterator[httpx.AsyncClient]:
    config = msgspec.structs.replace(pool_config(hub), server=server)
    app = create_app(hub, config)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=url) as client,
    ):
        yield client


def asking(hub: FakeHub, server: ServerConfig, *requests: dict[str, Any]) -> list[httpx.Response]:
    """The answers to `httpx` requests, one after the other, by one application."""

    async def scenario() -> list[httpx.Response]:
        async with client_of(hub, server) as client:
            return [await client.request(**{"method": "GET", **request}) for request in requests]

    return asyncio.run(scenario())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


PATHS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/small"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/metrics"),
    ("GET", "/weft/status"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/nothing/here"),
    ("GET", "/"),
    ("OPTIONS", "/v1/models"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("GET", "/ready/../v1/models"),
    ("GET", "/%68ealth%00"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_every_path_needs_a_key(hub: FakeHub, method: str, path: str) -> None:
    bad = ({}, bearer("wrong"), bearer(ALICE[:-1]), bearer(hash_of(ALICE)), bearer(""))
    bad += ({"Authorization": ALICE}, {"Authorization": f"Basic {ALICE}"}, bearer("x" * 5000))
    for headers in bad:
        (reply,) = asking(
            hub, ServerConfig(keys=keys()), {"method": method, "url": path, "headers": headers}
        )
        assert reply.status_code == 401, (headers, reply.text)
        error = reply.json()["error"]
        assert error["type"] == "authentication_error" and error["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"].startswith("Bearer")
        assert reply.headers["x-request-id"]
        assert ALICE not in reply.text and "small" not in reply.text
    assert hub.opened == []


def test_two_authorization_headers_are_refused(hub: FakeHub) -> None:
    headers = [("Authorization", f"Bearer {ALICE}"), ("Authorization", f"Bearer {OPS}")]
    request = {"url": "/v1/models", "headers": headers}
    assert asking(hub, ServerConfig(keys=keys()), request)[0].status_code == 401


def test_health_and_ready_are_open_and_say_nothing(hub: FakeHub) -> None:
    for path, content in (("/health", {"healthy": True}), ("/ready", {"ready": True})):
        plain, keyed = asking(
            hub,
            ServerConfig(keys=keys()),
            {"url": path},
            {"url": path, "headers": bearer(ALICE)},
        )
        assert plain.status_code == keyed.status_code == 200
        assert plain.json() == content
    numbers = asking(hub, ServerConfig(), {"url": "/health"})[0].json()
    assert numbers["waiting"] == 0  # without keys nothing is hidden


def test_a_key_is_accepted(hub: FakeHub) -> None:
    request = {"method": "POST", "url": "/v1/completions", "json": BODY, "headers": bearer(ALICE)}
    server = ServerConfig(keys=keys(tenant="team", priority=7))
    assert asking(hub, server, request)[0].status_code == 200
    assert (hub.opened[0].tenant, hub.opened[0].priority) == ("team", 7)
    hub.opened.clear()
    assert asking(hub, ServerConfig(keys=keys()), request)[0].status_code == 200
    assert hub.opened[0].tenant == "alice"
    hub.opened.clear()
    assert asking(hub, ServerConfig(), request)[0].status_code == 200
    assert hub.opened[0].tenant == ""


def test_a_salt_divides_what_a_key_shares(hub: FakeHub) -> None:
    body = {**BODY, "cache_salt": "s"}
    request = {"method": "POST", "url": "/v1/completions", "json": body, "headers": bearer(ALICE)}
    assert asking(hub, ServerConfig(keys=keys()), request)[0].status_code == 200
    assert hub.opened[0].tenant == "alice\0s"


def test_only_an_operator_reads_the_pools_state(hub: FakeHub) -> None:
    for path in ("/metrics", "/weft/status"):
        alice, ops = asking(
            hub,
            ServerConfig(keys=keys()),
            {"url": path, "headers": bearer(ALICE)},
            {"url": path, "headers": bearer(OPS)},
        )
        assert alice.status_code == 403
        assert alice.json()["error"]["code"] == "operator_only"
        assert ops.status_code == 200


def test_a_model_that_a_key_may_not_use_does_not_exist_for_it(hub: FakeHub) -> None:
    listed, hidden, asked, mine = asking(
        hub,
        ServerConfig(keys=keys(models=("sm*", "nothing"))),
        {"url": "/v1/models", "headers": bearer(ALICE)},
        {"url": "/v1/models/large", "headers": bearer(ALICE)},
        {
            "method": "POST",
            "url": "/v1/completions",
            "json": {**BODY, "model": "large"},
            "headers": bearer(ALICE),
        },
        {"method": "POST", "url": "/v1/completions", "json": BODY, "headers": bearer(ALICE)},
    )
    assert [entry["id"] for entry in listed.json()["data"]] == ["small"]
    for reply in (hidden, asked):
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"
    assert mine.status_code == 200
    assert [new.model for new in hub.opened] == ["small"]


def test_models_that_failed_are_not_listed(hub: FakeHub) -> None:
    (reply,) = asking(hub, ServerConfig(), {"url": "/v1/models"})
    assert [entry["id"] for entry in reply.json()["data"]] == ["small", "large"]


def test_an_alias_opens_a_model(folder: Path) -> None:
    named = msgspec.structs.replace(card("m-8b", folder), aliases=("chat",))
    ring = KeyRing.load(keys(models=("chat",)), Path())
    key = ring.find(ALICE.encode())
    assert key is not None
    assert key.allows(named) and not key.allows(card("m-8b", folder))


def test_requests_a_minute(hub: FakeHub) -> None:
    request = {"method": "POST", "url": "/v1/completions", "json": BODY, "headers": bearer(ALICE)}
    replies = asking(hub, ServerConfig(keys=keys(requests_per_minute=2)), *[request] * 3)
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    error = replies[-1].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 25 <= int(replies[-1].headers["retry-after"]) <= 30
    other = {**request, "headers": bearer(OPS)}
    assert asking(hub, ServerConfig(keys=keys(requests_per_minute=1)), other)[0].status_code == 200


def test_tokens_a_minute_are_those_of_prompts_and_answers(hub: FakeHub) -> None:
    """3 of the prompt and 3 of the answer: 6 of 10, then 12; the third has to wait."""
    body = {**BODY, "prompt": [5, 6, 7]}
    request = {"method": "POST", "url": "/v1/completions", "json": body, "headers": bearer(ALICE)}
    replies = asking(hub, ServerConfig(keys=keys(tokens_per_minute=10)), *[request] * 3)
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert 25 <= int(replies[-1].headers["retry-after"]) <= 30  # 5 tokens at 10 a minute


def test_a_request_of_many_prompts_is_admitted_as_a_whole(hub: FakeHub) -> None:
    body = {**BODY, "prompt": [[5] * 4] * 5}
    request = {"method": "POST", "url": "/v1/completions", "json": body, "headers": bearer(ALICE)}
    replies = asking(hub, ServerConfig(keys=keys(tokens_per_minute=10)), *[request] * 2)
    assert [reply.status_code for reply in replies] == [200, 429]
    assert len(hub.opened) == 5


def test_cold_models_a_minute(hub: FakeHub) -> None:
    """`small` is resident on the fake's unit, `large` is not."""

    def ask(model: str) -> dict[str, Any]:
        body = {**BODY, "model": model}
        return {"method": "POST", "url": "/v1/completions", "json": body, "headers": bearer(ALICE)}

    none = ServerConfig(keys=keys(cold_models_per_minute=0))
    warm, cold = asking(hub, none, ask("small"), ask("large"))
    assert (warm.status_code, cold.status_code) == (200, 429)
    assert int(cold.headers["retry-after"]) == 60
    one = ServerConfig(keys=keys(cold_models_per_minute=1))
    first, again = asking(hub, one, ask("large"), ask("large"))
    assert first.status_code == again.status_code == 200  # one model, however often


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_fills_evenly_and_never_over() -> None:
    bucket = TokenBucket(60, 0.0)
    assert bucket.wait_s(60, 0.0) is None
    bucket.take(60, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(1.0)
    assert bucket.wait_s(1, 1.0) is None
    bucket.take(100, 1.0)  # owed
    assert bucket.wait_s(1, 1.0) == pytest.approx(100.0)
    assert bucket.wait_s(60, 1000.0) is None
    assert bucket.wait_s(10_000, 1000.0) is None, "larger than the bucket: when it is full"
    bucket.take(1, 1000.0)
    assert bucket.wait_s(10_000, 1000.0) == pytest.approx(1.0)


def test_cold_models_are_counted_for_a_minute() -> None:
    cold = ColdModels(2)
    for at_s, model in enumerate("ab"):
        assert cold.wait_s(model, at_s) is None
        cold.note(model, at_s)
    assert cold.wait_s("a", 30.0) is None
    assert cold.wait_s("c", 30.0) == pytest.approx(30.0)
    assert cold.wait_s("c", 60.0) is None


def test_what_nobody_fetched_is_charged_when_the_client_leaves(folder: Path) -> None:
    """Else a reader that never reads has its answers for nothing."""
    clock = Clock()
    limits = KeyLimits(
        requests_per_minute=None, tokens_per_minute=60, cold_models_per_minute=None, clock=clock
    )

    class Ahead(AsyncIterator[Chunk]):
        unfetched = 40

        async def __anext__(self) -> Chunk:
            return Chunk(tokens=(1,) * 10)

    class Inner(FakeHub):
        def open(self, new: NewRequest) -> Any:
            request, _ = super().open(new)
            return request, Ahead()

    inner = Inner([card("small", folder)], lambda _: [Hold()])
    hub = DoorHub(inner, clock=clock)
    key = KeyRing.load(keys(), Path()).find(ALICE.encode())
    assert key is not None
    key.limits = limits
    visit = Visit(request_id="r", arrival_s=clock(), key=key)

    async def scenario() -> None:
        current_visit.set(visit)
        request, chunks = hub.open(NewRequest(model="small", prompt=(1,) * 20, max_tokens=100))
        await anext(chunks)
        assert limits.wait_for_tokens(30) is None
        hub.cancel(request)
        hub.cancel(request)

    asyncio.run(scenario())
    assert limits.wait_for_tokens(1) == 11  # 20 + 10 + 40 of 60: ten owed
    assert inner.cancelled == [1, 1]


def test_keys_are_exchanged_without_forgetting_what_was_used() -> None:
    clock = Clock()
    old = KeyRing.load(keys(requests_per_minute=1), Path(), clock=clock)
    alice = old.find(ALICE.encode())
    assert alice is not None and alice.limits.take_request() is None
    same = KeyRing.load(keys(requests_per_minute=1), Path(), before=old, clock=clock)
    kept = same.find(ALICE.encode())
    assert kept is not None and kept.limits.take_request() == 60
    other = KeyRing.load(keys(requests_per_minute=2), Path(), before=old, clock=clock)
    changed = other.find(ALICE.encode())
    assert changed is not None and changed.limits.take_request() is None


def test_a_hash_may_lie_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "alice.sha256"
    file.write_text(f"sha256:{hash_of(ALICE)}  -\n")
    ring = KeyRing.load((KeyConfig(name="a", file="alice.sha256"),), tmp_path)
    assert ring.find(ALICE.encode()) is not None
    assert ring.find(b"") is None
    both = (*keys(), KeyConfig(name="twin", file="alice.sha256"))
    with pytest.raises(WeftError, match="same hash"):
        KeyRing.load(both, tmp_path)
    for content in (ALICE, "", "\xff"):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(WeftError, match=r"hash|SHA-256"):
            KeyRing.load((KeyConfig(name="a", file="alice.sha256"),), tmp_path)
    with pytest.raises(WeftError, match="cannot be read"):
        KeyRing.load((KeyConfig(name="a", file="nowhere"),), tmp_path)


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All digests are compared, by the function made for it, wherever the right one stands."""
    from weft.server import keys as module

    compared: list[bytes] = []
    plain: Callable[[bytes, bytes], bool] = module.hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return plain(a, b)

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    ring = KeyRing.load(keys(), Path())
    for given in (ALICE, OPS, "neither"):
        compared.clear()
        ring.find(given.encode())
        assert [len(a) for a in compared] == [32, 32]


BAD_KEYS: list[Any] = [
    {"name": "a"},
    {"name": "a", "sha256": "abc"},
    {"name": "a", "sha256": ALICE},
    {"name": "a b", "sha256": "0" * 64},
    {"name": "a", "sha256": "0" * 64, "file": "x"},
    {"name": "a", "sha256": "0" * 64, "models": []},
    {"name": "a", "sha256": "0" * 64, "requests_per_minute": 0},
    {"name": "a", "sha256": "0" * 64, "tokens_per_minute": -1},
    {"name": "a", "sha256": "0" * 64, "tenant": "a/b"},
    {"name": "a", "sha256": "0" * 64, "key": "plain"},
]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_wrong_key_entry_is_said(key: Any) -> None:
    raw = {"models": [{"name": "m", "path": "p"}], "server": {"keys": [key]}}
    with pytest.raises(WeftError, match=r"keys\[0\]|keys\[\.\.\.\]"):
        make_pool_config(raw, source="pool.yaml")


def test_the_same_key_twice_is_said() -> None:
    for names in (("a", "a"), ("a", "b")):
        raw = {
            "models": [{"name": "m", "path": "p"}],
            "server": {"keys": [{"name": name, "sha256": "0" * 64} for name in names]},
        }
        with pytest.raises(WeftError, match=r"keys\[1\]"):
            make_pool_config(raw, source="pool.yaml")


@pytest.mark.parametrize(
    ("host", "allowed", "status"),
    [
        ("localhost", (), 200),
        ("localhost:8321", (), 200),
        ("127.0.0.1:8321", (), 200),
        ("[::1]:8321", (), 200),
        ("LOCALHOST.", (), 200),
        ("evil.example", (), 403),
        ("evil.example:8321", (), 403),
        ("localhost.evil.example", (), 403),
        ("127.0.0.1.evil.example", (), 403),
        ("192.168.1.2", (), 403),
        ("", (), 403),
        ("api.example.org", ("api.example.org",), 200),
        ("API.example.org:443", ("api.example.org",), 200),
        ("a.b.example.org", ("*.example.org",), 200),
        ("example.org", ("*.example.org",), 403),
        ("evilexample.org", ("*.example.org",), 403),
    ],
)
def test_a_page_under_another_name_is_refused(
    hub: FakeHub, host: str, allowed: tuple[str, ...], status: int
) -> None:
    server = ServerConfig(allowed_hosts=allowed)
    (reply,) = asking(hub, server, {"url": "/v1/models", "headers": {"Host": host}})
    assert reply.status_code == status
    if status == 403:
        assert reply.json()["error"]["code"] == "host_not_allowed"


def test_with_keys_or_another_address_any_name_will_do(hub: FakeHub) -> None:
    headers = {"Host": "gpu7.example", **bearer(ALICE)}
    request = {"url": "/v1/models", "headers": headers}
    for server in (ServerConfig(keys=keys()), ServerConfig(host="0.0.0.0")):
        assert asking(hub, server, request)[0].status_code == 200
    strict = ServerConfig(keys=keys(), allowed_hosts=("other.example",))
    assert asking(hub, strict, request)[0].status_code == 403


def test_pages_of_other_origins_are_told_nothing_unless_configured(hub: FakeHub) -> None:
    origin = "https://chat.example.org"
    preflight = {
        "method": "OPTIONS",
        "url": "/v1/models",
        "headers": {"Origin": origin, "Access-Control-Request-Method": "GET"},
    }
    simple = {"url": "/v1/models", "headers": {"Origin": origin}}
    for reply in asking(hub, ServerConfig(), preflight, simple):
        assert not any(name.startswith("access-control") for name in reply.headers)
    open_to_it = ServerConfig(cors_origins=(origin,), keys=keys())
    checked, refused = asking(hub, open_to_it, preflight, simple)
    assert checked.status_code == 200
    assert checked.headers["access-control-allow-origin"] == origin
    assert refused.status_code == 401
    strange = {**simple, "headers": {"Origin": "https://evil.example"}}
    assert "access-control-allow-origin" not in asking(hub, open_to_it, strange)[0].headers


def test_too_many_headers_are_refused(hub: FakeHub) -> None:
    headers = {f"x-{i}": "1" for i in range(101)}
    (reply,) = asking(hub, ServerConfig(), {"url": "/v1/models", "headers": headers})
    assert reply.status_code == 431


def test_the_access_log_is_a_line_without_content(
    hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    request = {"method": "POST", "url": "/v1/completions", "json": BODY, "headers": bearer(ALICE)}
    odd = {"url": "/a%0Aaccess id=forged", "headers": {**bearer(ALICE), "x-request-id": "r-1"}}

    def lines(server: ServerConfig) -> list[str]:
        caplog.clear()
        asking(hub, server, request, odd)
        return [r.getMessage() for r in caplog.records if r.name == "weft.access"]

    assert lines(ServerConfig(keys=keys())) == []
    first, second = lines(ServerConfig(keys=keys(), access_log=True))
    assert (
        "key=alice method=POST path='/v1/completions' status=200 outcome=stop model=small" in first
    )
    assert ALICE not in first + second and hash_of(ALICE) not in first + second
    assert "id=r-1" in second and "status=404" in second and "\n" not in second


def test_a_card_of_an_adapter_counts_its_base_as_cold(folder: Path) -> None:
    adapter: ModelCard = msgspec.structs.replace(card("tuned", folder), base="small")
    hub = FakeHub([card("small", folder), adapter], lambda _: spoken([9]))
    server = ServerConfig(keys=keys(cold_models_per_minute=0))
    body = {**BODY, "model": "tuned"}
    request = {"method": "POST", "url": "/v1/completions", "json": body, "headers": bearer(ALICE)}
    assert asking(hub, server, request)[0].status_code == 200
