"""Where a frontend may be served, and how it starts and stops."""

import asyncio
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import httpx
import pytest

from support.fake_hub import FakeHub
from support.live import live, pool_config
from weft.core.errors import WeftError
from weft.server.answer import Answer, Gate
from weft.server.app import create_app
from weft.server.binding import check_bind, is_loopback
from weft.server.serve import listen, serve, url_of

TESTS = Path(__file__).parents[2]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback_is_served_by_default(host: str) -> None:
    check_bind(host, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "", "127.0.0.1.x"])
def test_any_other_address_needs_insecure(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(WeftError, match="--insecure"):
        check_bind(host, insecure=False)
    check_bind(host, insecure=True)


def test_serve_itself_refuses_an_open_address() -> None:
    hub = FakeHub([], lambda _: [])
    app = create_app(hub, pool_config(hub))
    with pytest.raises(WeftError, match="--insecure"):
        asyncio.run(serve(app, "0.0.0.0", 0))


def test_a_port_in_use_is_said_in_one_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(WeftError, match="choose another with --port"):
            listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_said_in_one_line() -> None:
    with pytest.raises(WeftError, match="cannot serve on"):
        listen("203.0.113.7", 0)


def test_ipv6_has_brackets_in_its_url() -> None:
    try:
        sock = listen("[::1]", 0)
    except WeftError:
        pytest.skip("no IPv6 here")
    with sock:
        assert url_of(sock).startswith("http://[::1]:")


def test_an_answer_that_begins_after_the_cut_ends_at_once() -> None:
    """It was being tokenised when the others were cut: nobody would wait for it."""
    told: list[str] = []

    class Late:
        stop = staticmethod(told.append)

    gate = Gate()
    gate.enter(cast(Answer, Late()))
    assert told == []
    gate.cut()
    gate.enter(cast(Answer, Late()))
    assert told == ["cut", "cut"]


def test_a_served_port_is_free_again_afterwards() -> None:
    hub = FakeHub([], lambda _: [])

    async def scenario() -> int:
        async with live(hub) as server, httpx.AsyncClient(base_url=server.url) as client:
            assert (await client.get("/health")).status_code == 200
            return int(server.url.rsplit(":", 1)[1])

    port = asyncio.run(scenario())
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) != 0


SCRIPT = """
import asyncio, sys
from pathlib import Path
from typing import cast
import httpx
sys.path[:0] = sys.argv[1:3]
from support.fake_hub import FakeHub, Hold, card, spoken
from support.live import pool_config
from weft.server.answer import Answer, Gate
from weft.server.app import create_app
from weft.server.serve import serve

urls = []

async def main():
    hold = Hold()
    hub = FakeHub([card("m", Path("/nowhere"))], lambda _: [hold, *spoken([9])])
    app = create_app(hub, pool_config(hub))

    async def answer_once_stopping():
        await hold.reached.wait()
        print("held", flush=True)
        while not app.state.gate.draining:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # time in which uvicorn's own handler would close the port
        async with httpx.AsyncClient() as client:
            print((await client.get(urls[0] + "/ready")).status_code, flush=True)
        hold.release()

    def on_ready(url):
        urls.append(url)
        print(url, flush=True)

    answering = asyncio.create_task(answer_once_stopping())
    await serve(app, "127.0.0.1", 0, on_ready=on_ready)
    await answering

asyncio.run(main())
print("clean", flush=True)
"""


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end_and_what_comes_after_serve_run(sig: signal.Signals) -> None:
    command = [sys.executable, "-c", SCRIPT, str(TESTS), str(TESTS.parent / "src")]
    body = {"model": "m", "prompt": [1]}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        ThreadPoolExecutor() as pool,
    ):
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        reply = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
        assert process.stdout.readline() == "held\n"
        process.send_signal(sig)
        assert process.stdout.readline() == "503\n"
        assert reply.result().status_code == 200
        assert process.stdout.read() == "clean\n"
        assert process.wait() == 0
