"""The command line: what it says, how it fails, what it makes of paths and options."""

import asyncio
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from support.fake_hub import FakeHub, card
from support.live import pool_config
from support.tiny import tiny_checkpoint
from weft.cli import doctor
from weft.cli import main as cli
from weft.cli import ps as cli_ps
from weft.cli import serve as cli_serve
from weft.cli.serve import Overrides, build_config
from weft.cli.units import size_text
from weft.config.pool_config import parse_pool_config
from weft.core.errors import WeftError
from weft.hub.base import PoolView
from weft.server.app import create_app
from weft.server.serve import serve
from weft.server.status import StatusReply

runner = CliRunner()
COMMANDS = (
    *("serve", "ps", "check", "replay", "doctor", "version", "config-schema", "key"),
    *("load", "unload", "pin", "unpin", "reload", "drain", "models", "chat", "run", "import"),
)


def test_help_names_every_command_and_shows_examples() -> None:
    text = runner.invoke(cli.app, ["--help"]).output
    for command in COMMANDS:
        assert command in text
        assert runner.invoke(cli.app, [command, "--help"]).exit_code == 0
    assert "weft serve pool.yaml" in text
    assert (
        "weft serve ./models/* --device-memory"
        in runner.invoke(cli.app, ["serve", "--help"]).output
    )


def test_version_and_schema() -> None:
    assert runner.invoke(cli.app, ["version"]).output == "weft 0.1.0\n"
    schema = json.loads(runner.invoke(cli.app, ["config-schema"]).output)
    assert "models" in schema["$defs"]["PoolConfig"]["properties"]


def test_an_error_is_one_line_on_stderr_and_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["weft", "serve", str(tmp_path / "nope")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("weft: error: ")
    assert captured.err.count("\n") == 1


def test_folders_are_models_under_their_own_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    config, _ = build_config([tmp_path / "a", tmp_path / "b" / "."], Overrides())
    assert [model.name for model in config.models] == ["a", "b"]
    assert [model.path for model in config.models] == [str(tmp_path / n) for n in ("a", "b")]


def test_a_folder_may_lie_anywhere(tmp_path: Path) -> None:
    """What is merged is never written as text and read again."""
    folder = tmp_path / "models 🧵" / "speaker"
    folder.mkdir(parents=True)
    config, _ = build_config([folder], Overrides(port=1234))
    assert config.models[0].path == str(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [{name: a, path: a, max_context_tokens: -1}]", "models[0].max_context_tokens"),
        ("models: [{name: a, path: a, tbt_slo_s: .nan}]", "models[0].tbt_slo_s"),
        ('models: [{name: "a\\n", path: a}]', "letters, digits"),
        ("models: [{name: a, path: a}]\nengine: {cpu_threads: 0}", "engine.cpu_threads"),
        ("models: [{name: a, path: a}]\nserver: {max_body_bytes: -1}", "server.max_body_bytes"),
        ("models: [{name: a, path: a}]\nengine: {device: xpu}", "weft config-schema"),
        ("[" * 100_000, "not YAML"),
    ],
)
def test_a_pool_file_is_checked_whole(text: str, message: str) -> None:
    with pytest.raises(WeftError) as caught:
        parse_pool_config(text)
    assert message in str(caught.value)


def test_options_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text("models: [{name: m, path: ./m, weight: 2.0}]\nserver: {port: 99, hold_s: 5}\n")
    overrides = Overrides(
        port=0, device="cpu", device_memory="48M", policy="dedicated", dtype="float64"
    )
    config, base = build_config([file], overrides)
    assert base == tmp_path
    assert (config.server.port, config.server.hold_s, config.server.host) == (0, 5.0, "127.0.0.1")
    assert (config.engine.device, config.engine.device_memory) == ("cpu", "48M")
    assert config.policy == "dedicated"
    assert (config.models[0].dtype, config.models[0].weight) == ("float64", 2.0)
    unchanged, _ = build_config([file], Overrides())
    assert unchanged.server.port == 99


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (Overrides(port=70000), "server.port"),
        (Overrides(device="tpu"), "device"),
        (Overrides(device_memory="lots"), "not a size"),
        (Overrides(policy="random"), "policy"),
        (Overrides(dtype="int3"), "dtype"),
    ],
)
def test_a_bad_option_is_refused_with_its_place(
    tmp_path: Path, overrides: Overrides, message: str
) -> None:
    with pytest.raises(WeftError, match=message):
        build_config([tmp_path], overrides)


def test_paths_that_do_not_go_together(tmp_path: Path) -> None:
    (tmp_path / "x" / "m").mkdir(parents=True)
    (tmp_path / "y" / "m").mkdir(parents=True)
    file = tmp_path / "pool.yaml"
    file.write_text("modles: []\n")
    for paths, message in (
        ([tmp_path / "x" / "m", tmp_path / "y" / "m"], "same name"),
        ([file, tmp_path / "x"], "give it alone"),
        ([file], "modles"),
        ([tmp_path / "none.yaml"], "cannot be read"),
        ([tmp_path / "nope"], "config.json"),
    ):
        with pytest.raises(WeftError, match=message):
            build_config(paths, Overrides())


def test_an_open_address_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="--insecure"):
        cli_serve.run(
            [tmp_path],
            Overrides(host="0.0.0.0"),
            insecure=False,
            log_level="info",
            trace_dir=None,
        )


def test_the_ready_text_has_a_request_that_works_as_printed(tmp_path: Path) -> None:
    config, _ = build_config([tmp_path], Overrides())
    text = cli_serve.ready_text(config, "http://127.0.0.1:1")
    body = json.loads(text.split("-d '")[1].rstrip("'"))
    assert body["model"] == tmp_path.name
    assert "1 model at http://127.0.0.1:1/v1" in text


@contextmanager
def served(hub: FakeHub) -> Iterator[str]:
    """A frontend in a thread of its own, as `weft ps` has nothing to do with its event loop."""
    ready = threading.Event()
    state: dict[str, object] = {}

    def main() -> None:
        async def run() -> None:
            stop = asyncio.Event()
            state["stop"] = stop
            state["loop"] = asyncio.get_running_loop()

            def on_ready(url: str) -> None:
                state["url"] = url
                ready.set()

            app = create_app(hub, pool_config(hub))
            await serve(app, "127.0.0.1", 0, stop=stop, on_ready=on_ready)

        asyncio.run(run())

    thread = threading.Thread(target=main)
    thread.start()
    try:
        assert ready.wait(30)
        yield str(state["url"])
    finally:
        loop, stop = state["loop"], state["stop"]
        assert isinstance(loop, asyncio.AbstractEventLoop) and isinstance(stop, asyncio.Event)
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def fake_hub(tmp_path: Path) -> FakeHub:
    cards = [card("speaker", tmp_path), card("torn", tmp_path, failed="no shard 2")]
    return FakeHub(cards, lambda _: [])


def test_ps_shows_who_holds_what(tmp_path: Path) -> None:
    with served(fake_hub(tmp_path)) as url:
        done = runner.invoke(cli.app, ["ps", "--url", f"{url}/v1"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "unfinished" in lines[0] and "host store 8.0M of 16.0M" in lines[0]
    assert "arena 5 of 12 granules" in lines[1] and "1 restarts" in lines[1]
    header = lines[2].split()
    row = next(line for line in lines if line.startswith("speaker"))
    cells = row.split()
    assert header[:4] == ["MODEL", "UNIT", "STATE", "TURN"]
    assert " ".join(cells) == "speaker 0 resident turn 2 1 4 3 1 5 6 5 100 200 -"
    assert lines[-1] == "torn cannot be served: no shard 2"
    assert "\x1b" not in done.output


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_ps_never_cuts_a_cell(tmp_path: Path, width: int) -> None:
    """A narrow terminal shows fewer columns, and all of them whole."""
    console = Console(width=width, file=io.StringIO(), force_terminal=True)
    console.print(
        cli_ps.render(status_at(fake_hub(tmp_path), 1, 2, 3), None, plain=False, width=width)
    )
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text
    for word in ("MODEL", "STATE", "TURN", "QUEUED", "RUNNING", "TOK/S", "speaker", "resident"):
        assert word in text
    assert ("PROMPT TOK" in text) == (width >= 120)


def test_ps_says_when_there_is_no_server() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(WeftError, match="weft serve"):
            cli_ps.fetch(url)
    with pytest.raises(WeftError, match="is no URL"):
        cli_ps.fetch("file:///etc/passwd")


def status_at(hub: FakeHub, at_ns: int, output_tokens: int, incarnation: int) -> StatusReply:
    view = hub.view()
    unit = view.units[0]
    assert unit.status is not None
    models = tuple(
        msgspec.structs.replace(model, output_tokens=output_tokens) for model in unit.status.models
    )
    status = msgspec.structs.replace(unit.status, at_ns=at_ns, models=models)
    unit = msgspec.structs.replace(unit, status=status, incarnation=incarnation)
    pool: PoolView = msgspec.structs.replace(view, units=(unit,))
    return StatusReply(version="0", health=hub.health(), pool=pool)


def test_rates_are_taken_between_polls_of_one_incarnation(tmp_path: Path) -> None:
    hub = fake_hub(tmp_path)
    old = status_at(hub, 1_000_000_000, 100, 1)
    new = status_at(hub, 3_000_000_000, 150, 1)
    assert cli_ps.rates_between(old, new)[0, "speaker"] == 25.0
    assert cli_ps.rates_between(old, status_at(hub, 3_000_000_000, 5, 2)) == {}
    assert cli_ps.rates_between(old, old) == {}


def test_check_says_what_is_there_and_fails_for_what_is_not(tmp_path: Path) -> None:
    good = tiny_checkpoint(tmp_path / "good")
    bad = tiny_checkpoint(tmp_path / "bad")
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = runner.invoke(cli.app, ["check", str(good)])
    assert done.exit_code == 0, done.output
    assert f"{good}: can be served" in done.output
    assert "LlamaForCausalLM" in done.output
    done = runner.invoke(cli.app, ["check", str(good), str(bad)])
    assert done.exit_code == 1
    assert f"{bad}: CANNOT BE SERVED" in done.output
    assert "problem: " in done.output


def test_doctor_reports_every_part_and_names_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "torch": "2.11",
        "cuda": True,
        "name": "H",
        "capability": [9, 0],
        "free": 1 << 30,
        "total": 80 << 30,
    }
    monkeypatch.setattr(doctor, "probe_torch", lambda: (facts, ""))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        found = {f.name: f for f in doctor.findings(sock.getsockname()[1])}
    assert {"python", "cores", "memory", "memfd", "torch", "device", "disk", "port"} <= set(found)
    assert found["memfd"].level == "ok"
    assert found["device"].level == "warn" and "1.0 GiB of 80.0 GiB" in found["device"].text
    assert found["port"].level == "warn" and "--port" in str(found["port"].remedy)
    assert all(f.remedy for f in found.values() if f.level != "ok")


def test_a_broken_torch_is_a_line_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TORCH_PROBE", "import os; os.abort()")
    found = {f.name: f for f in doctor.findings(0)}
    assert found["torch"].level == "fail"
    assert "port" in found
    assert runner.invoke(cli.app, ["doctor", "--port", "0"]).exit_code == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0B"), (1023, "1023B"), (1536, "1.5K"), (200 << 20, "200M"), (5 << 40, "5.0T")],
)
def test_sizes(value: int, text: str) -> None:
    assert size_text(value) == text
