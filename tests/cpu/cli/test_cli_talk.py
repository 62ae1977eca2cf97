"""`weft chat`, `weft run`, `weft import`, and how log lines look as JSON."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from weft import logs
from weft.cli import chat, import_swap
from weft.cli import main as cli
from weft.config.pool_config import make_pool_config
from weft.core.errors import WeftError

runner = CliRunner()


def events(*pieces: str, end: str = "data: [DONE]\n\n") -> bytes:
    lines = [
        "data: " + json.dumps({"choices": [{"delta": {"content": piece}}]}) + "\n\n"
        for piece in pieces
    ]
    return (": held\n\n" + "".join(lines) + end).encode()


def talk(answers: list[httpx.Response]) -> tuple[chat.Talk, list[dict[str, Any]]]:
    """A talk with a server that says these things; the bodies it was sent."""
    asked: list[dict[str, Any]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return answers[len(asked) - 1]

    client = chat.connect("http://there", httpx.MockTransport(handle))
    return chat.Talk(client, "m", system="Be brief."), asked


def chatter(the_talk: chat.Talk, *lines: str) -> tuple[int, str]:
    out: list[str] = []
    status = chat.chat(the_talk, io.StringIO("".join(f"{line}\n" for line in lines)), out.append)
    return status, "".join(out)


def test_a_talk_remembers_what_was_said_and_answered() -> None:
    the_talk, asked = talk([httpx.Response(200, content=events(*t)) for t in ("ab", "c", "d")])
    assert chatter(the_talk, "one", "", "two", "/clear", "three", "/exit", "never") == (
        0,
        "ab\nc\nd\n",
    )
    system = {"role": "system", "content": "Be brief."}
    first = {"role": "user", "content": "one"}
    assert asked[0]["messages"] == [system, first] and asked[0]["stream"]
    said = [{"role": "assistant", "content": "ab"}, {"role": "user", "content": "two"}]
    assert asked[1]["messages"] == [system, first, *said]
    assert asked[2]["messages"] == [system, {"role": "user", "content": "three"}]


@pytest.mark.parametrize(
    "reply",
    [
        httpx.Response(503, json={"error": {"message": "no room at all"}}),
        httpx.Response(502, content=b"<html>"),
        httpx.Response(200, content=events("x", end='data: {"error": {"message": "died"}}\n\n')),
        httpx.Response(200, content=events("x", end="")),
    ],
)
def test_what_was_not_answered_is_not_remembered(
    reply: httpx.Response, capsys: pytest.CaptureFixture[str]
) -> None:
    the_talk, asked = talk([reply, httpx.Response(200, content=events("fine"))])
    assert chatter(the_talk, "one", "two")[0] == 0, "the last one was answered"
    assert [m["content"] for m in asked[1]["messages"]] == ["Be brief.", "two"]
    assert "weft: " in capsys.readouterr().err


def test_the_last_question_of_a_pipe_decides_the_exit_status() -> None:
    the_talk, _ = talk([httpx.Response(404, json={"error": {"message": "no such model"}})])
    assert chatter(the_talk, "one")[0] == 1


def test_run_says_who_does_not_answer() -> None:
    result = runner.invoke(cli.app, ["run", "m", "hi", "--url", "http://127.0.0.1:1"])
    assert result.exit_code == 1 and "weft serve" in result.output


SWAP = """
healthCheckTimeout: 60
macros:
  server: /opt/llama-server --port ${PORT}
models:
  "qwen":
    cmd: |
      ${server}
      --model /models/qwen  # the folder
      --ctx-size 8192
    aliases: [gpt-4o, default]
    ttl: 300
    useModelName: "Qwen/Qwen2.5-7B"
    env: [CUDA_VISIBLE_DEVICES=0]
  small:
    cmd: vllm serve /models/small --max-model-len=4096
  gguf:
    cmd: llama-server -m "/models/a b.gguf"
  remote:
    cmd: ssh other run
    proxy: http://other:8000
groups:
  forever:
    persistent: true
    members: [small]
hooks:
  on_startup:
    preload: [qwen]
"""


def test_llama_swap_is_converted(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(SWAP)
    result = runner.invoke(cli.app, ["import", "llama-swap", str(file)])
    assert result.exit_code == 0, result.output
    config = make_pool_config(yaml.safe_load(result.output), source="converted")
    qwen, small, gguf = config.models
    assert (qwen.path, qwen.keep_alive_s, qwen.max_context_tokens) == ("/models/qwen", 300.0, 8192)
    assert qwen.aliases == ("gpt-4o", "default", "Qwen/Qwen2.5-7B") and qwen.preload
    assert (small.path, small.pinned, small.max_context_tokens) == ("/models/small", True, 4096)
    assert gguf.path == "/models/a b.gguf"
    for said in ("qwen: env", "gguf", "remote: its cmd", "groups", "healthCheckTimeout"):
        assert f"# not carried over: {said}" in result.output, said


def test_no_name_leaves_its_comment() -> None:
    models = {"a\nadmin:\n  port: 1": {"cmd": "echo"}, "b": {"cmd": "x --model /b"}}
    text = yaml.safe_dump({"models": models, "matrix": {}})
    config, notes = import_swap.convert(text, "test")
    written = import_swap.render(config, notes, "test")
    assert yaml.safe_load(written) == {"models": [{"name": "b", "path": "/b"}]}
    assert "# not carried over: matrix" in written


def test_nothing_of_the_file_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    cmd = f"$(touch {mark}) `touch {mark}` ; touch {mark} ; x --model /m"
    config, _ = import_swap.convert(yaml.safe_dump({"models": {"a": {"cmd": cmd}}}), "test")
    assert config["models"] == [{"name": "a", "path": "/m"}] and not mark.exists()
    with pytest.raises(WeftError, match="not YAML"):
        import_swap.convert("models: {a: !!python/object/apply:os.getpid []}", "test")


def test_macros_that_name_each_other_end() -> None:
    text = {"macros": {"a": "${b}${b}", "b": "${a}${a}"}, "models": {"m": {"cmd": "${a} -m /x"}}}
    config, _ = import_swap.convert(yaml.safe_dump(text), "test")
    assert config["models"][0]["path"] == "/x"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["cmd", "ttl", "aliases", "macros", "env", "groups", "members"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_file_is_converted_or_refused(entry: Any) -> None:
    text = yaml.safe_dump({"models": {"m": entry, "n": {"cmd": "x -m /n"}}, "groups": entry})
    try:
        config, _ = import_swap.convert(text, "test")
    except WeftError:
        return
    assert config["models"]


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("model=a state=resident bytes=5", {"model": "a", "state": "resident", "bytes": "5"}),
        ("x model=a reason=no room: b=c", {"model": "a", "reason": "no room: b=c"}),
        ("plain words, 1=2", {}),
    ],
)
def test_facts_of_a_line(message: str, fields: dict[str, str]) -> None:
    assert logs.fields_of(message) == fields


def test_a_line_as_json() -> None:
    record = logging.LogRecord("weft.hub", logging.INFO, "f", 1, "model=%s unit=%d", ("a", 0), None)
    line = json.loads(logs.JsonFormatter("unit0.1").format(record))
    assert line["model"] == "a" and line["unit"] == "0" and line["level"] == "info"
    assert line["process"] == "unit0.1" and line["message"] == "model=a unit=0"
