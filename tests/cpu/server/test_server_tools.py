"""Function calls: read the same however they are cut, enforced by grammars, shown to templates."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fake_hub import FakeHub, card, obliging, tokens_of
from support.live import asgi_client
from support.tiny import CHAT_TEMPLATE, write_tokenizer
from support.tool_templates import FAMILIES
from weft.grammar.source import check_grammar
from weft.server.messages import Conversation
from weft.server.text import TextModel
from weft.server.tools.deltas import Collected, Reader
from weft.server.tools.families import FORMS, Family, call_grammar, family_name
from weft.server.tools.readers import CallReader, ReasoningReader

NAMES = ("f", "g")
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "Does <f>.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/x"}},
                "required": ["a"],
                "$defs": {"x": {"type": "integer"}},
            },
        },
    },
    {"type": "function", "function": {"name": "g"}},
]
TWO = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TWO = f'{TWO}\n<tool_call>\n{{"name": "g", "arguments": {{}}}}\n</tool_call>'
ANSWERS: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "just text", "just text", []),
    ("hermes", TWO, "", [("f", '{"a": 1}'), ("g", "{}")]),
    (
        "hermes",
        'so\n<tool_call>\n{"name": "f", "arguments": {"a": "}\\"<"}}\n</tool_call>\n bye',
        "so\n bye",
        [("f", '{"a": "}\\"<"}')],
    ),
    (
        "hermes",
        '<tool_call>{"arguments":{"x":[1,{}]},"name":"new"}</tool_call>',
        "",
        [("new", '{"x":[1,{}]}')],
    ),
    ("hermes", "a <tool_call> b", "a <tool_call> b", []),
    ("hermes", "a <tool_cal", "a <tool_cal", []),
    ("hermes", '<tool_call>{"n": 1}</tool_call>', '<tool_call>{"n": 1}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>\n', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
    ("hermes", "<tool_call></tool_call>x", "<tool_call></tool_call>x", []),
    ("hermes", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    (
        "llama3_json",
        ' {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    (
        "llama3_json",
        '{"name": "other", "parameters": {}}',
        '{"name": "other", "parameters": {}}',
        [],
    ),
    (
        "llama3_json",
        '{"type": "function", "name": "f", "parameters": {"a": 1}}',
        "",
        [("f", '{"a": 1}')],
    ),
    ("llama3_json", '{"a": 1} and', '{"a": 1} and', []),
    (
        "llama3_json",
        'so <|python_tag|>{"name": "new", "parameters": {"a": 1}}',
        "so",
        [("new", '{"a": 1}')],
    ),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    (
        "mistral_args",
        'x[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}',
        "x",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    ("mistral_args", '[TOOL_CALLS][{"name": "f", "arguments": {}}]', "", [("f", "{}")]),
    ("mistral_args", "[TOOL_CALLS]f[ARG]{}", "[TOOL_CALLS]f[ARG]{}", []),
    ("generic", '{"name": "f", "arguments": null}', "", [("f", "{}")]),
]


def read(reader: Reader, text: str, seed: int) -> Collected:
    """The answer, cut into pieces by `seed`; 0 leaves it whole."""
    chance = random.Random(seed)
    found = Collected()
    while text:
        cut = chance.choice([1, 1, 2, 3, 7]) if seed else len(text)
        found.add(reader.push(text[:cut]))
        text = text[cut:]
    found.add(reader.finish())
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("form", "text", "content", "calls"), ANSWERS)
def test_an_answer_is_read_the_same_however_it_is_cut(
    form: str, text: str, content: str, calls: list[tuple[str, str]], seed: int
) -> None:
    found = read(CallReader(FORMS[form], names=NAMES), text, seed)
    assert found.content == content
    assert [(call.name, call.arguments) for call in found.calls] == calls
    assert len({call.id for call in found.calls}) == len(calls)


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>"),
    *(
        "</think>",
        '{"name": "f", "arguments": {',
        '"arguments": ',
        '"name": "f"',
        '{"a": [1, "',
        "}",
    ),
    *(" " * 40, "x" * 40),
    *("]", "[", "{", '"', "\\", ",", ";", ":", " ", "\n", "f", "null", "1", "é", "<", "tool"),
]


@given(
    form=st.sampled_from(sorted(FORMS)),
    parts=st.lists(st.sampled_from(FRAGMENTS), max_size=14),
    thinks=st.booleans(),
    most=st.sampled_from([None, 1]),
    seed=st.integers(1, 1 << 30),
)
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_a_reader_and_no_cut_changes_what_it_reads(
    form: str, parts: list[str], thinks: bool, most: int | None, seed: int
) -> None:
    def reader() -> Reader:
        inner = CallReader(FORMS[form], names=NAMES, most=most)
        return ReasoningReader(inner, inside=False) if thinks else inner

    text = "".join(parts)
    whole, cut = read(reader(), text, 0), read(reader(), text, seed)
    assert (whole.content, whole.reasoning) == (cut.content, cut.reasoning)
    calls = [[(call.name, call.arguments) for call in found.calls] for found in (whole, cut)]
    assert calls[0] == calls[1]
    if not whole.calls and not thinks:
        assert whole.content == text  # what is no call is content, all of it


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize(
    "part", [" ", "[", ",", "<tool_call>x", "[TOOL_CALLS]", "<think>", '{"', "x"]
)
def test_long_answers_are_read_in_pieces_as_whole(form: str, part: str) -> None:
    """Also where the pieces in which a reader takes a long text fall inside of marks."""
    open_mark = FORMS[form].open
    text = open_mark + part * 3000
    whole, cut = (read(CallReader(FORMS[form], names=NAMES), text, seed) for seed in (0, 7))
    assert (whole.content, len(whole.calls)) == (cut.content, len(cut.calls))


@pytest.mark.parametrize("seed", range(5))
def test_one_call_alone_is_the_end(seed: int) -> None:
    found = read(CallReader(FORMS["hermes"], names=NAMES, most=1), TWO + "more", seed)
    assert (found.content, len(found.calls)) == ("", 1)


def test_mistrals_ids_are_nine_letters_and_digits() -> None:
    found = read(CallReader(FORMS["mistral"]), '[TOOL_CALLS][{"name": "f"}]', 0)
    assert len(found.calls[0].id) == 9 and found.calls[0].id.isalnum()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>\nhm\n a\n</think>\n\nyes", False, "hm\n a", "yes"),
        ("hm\n</think>\n\nyes", True, "hm", "yes"),
        ("plain <think>x</think>", False, "", "plain <think>x</think>"),
        ("<think>never ends", False, "never ends", ""),
        ("<think>\n\n</think>\n\nyes", False, "", "yes"),
        ("<thi", False, "", "<thi"),
    ],
)
def test_reasoning_is_told_from_the_answer(
    text: str, inside: bool, reasoning: str, content: str, seed: int
) -> None:
    found = read(ReasoningReader(inside=inside), text, seed)
    assert (found.reasoning, found.content) == (reasoning, content)


@pytest.mark.parametrize("answer", [None, '{"type": "object"}'])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_what_the_grammar_lets_pass_the_reader_reads(
    form: str, parallel: bool, answer: str | None
) -> None:
    from llguidance import LLMatcher, LLTokenizer

    from weft.grammar.source import source

    grammar = call_grammar(
        Family(name=form, form=FORMS[form]), TOOLS, parallel=parallel, answer=answer
    )
    check_grammar(grammar)
    object_key = "parameters" if form == "llama3_json" else "arguments"
    one = f'{{"name": "f", "{object_key}": {{"a": 1}}}}'
    said = {
        "hermes": f"<tool_call>\n{one}\n</tool_call>",
        "generic": f"<tool_call>\n{one}\n</tool_call>",
        "llama3_json": one,
        "mistral": f"[TOOL_CALLS][{one}]",
        "mistral_args": '[TOOL_CALLS]f[ARGS]{"a": 1}',
    }[form]
    for text, fits in ((said, True), (said.replace("1", '"x"'), False), ("{}", bool(answer))):
        matcher = LLMatcher(LLTokenizer("byte"), source(grammar))
        consumed = matcher.try_consume_tokens(list(text.encode()))
        assert (consumed == len(text) and matcher.is_accepting()) == fits
    found = read(CallReader(FORMS[form], names=NAMES), said, 3)
    assert [(call.name, call.arguments) for call in found.calls] == [("f", '{"a": 1}')]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("... <tool_call>\n{} </tool_call>", "hermes"),
        ("... <|python_tag|> ...", "llama3_json"),
        ("... [TOOL_CALLS] ...", "mistral"),
        ("... [TOOL_CALLS] + name + [ARGS] ...", "mistral_args"),
        ("<tool_call>\n<function=example>", "generic"),
        (CHAT_TEMPLATE, "generic"),
    ],
)
def test_the_family_is_what_the_template_teaches(template: str, name: str) -> None:
    assert family_name(template) == name


HERMES_TEMPLATE = (
    "{% if tools %}<|user|>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<tool_call></tool_call><|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'assistant' if m.role == 'assistant' else 'user' }}|>"
    "{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if documents %}{{ documents[0].title }}{% endif %}{{ mood or '' }}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path, 300)
    (tmp_path / "chat_template.jinja").write_text(HERMES_TEMPLATE)
    return tmp_path


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "What is f(1)?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "2"},
]


def test_tools_and_their_history_render_as_transformers_do(folder: Path) -> None:
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(folder)
    expected = oracle.apply_chat_template(
        HISTORY,
        tools=TOOLS,
        documents=[{"title": "T", "text": "x"}],
        mood="!",
        add_generation_prompt=True,
        return_dict=False,
    )
    asked = [json.loads(json.dumps(message)) for message in HISTORY]
    asked[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1}'
    hub = FakeHub([card("m", folder, context=4096)], obliging(tokens_of(folder, "ok")))
    body = {
        "messages": asked,
        "tools": TOOLS,
        "documents": [{"title": "T", "text": "x"}],
        "chat_template_kwargs": {"mood": "!"},
    }
    assert post(hub, body).status_code == 200
    assert list(hub.opened[0].prompt) == list(expected)


SAID = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    "llama3_json": '{"name": "f", "parameters": {"a": 1}}',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]',
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_turn_with_a_call_goes_round_in_every_family(folder: Path, family: str) -> None:
    """The model calls, the client answers, and the second prompt is the one of transformers."""
    from transformers import AutoTokenizer

    (folder / "chat_template.jinja").write_text(FAMILIES[family])
    oracle = AutoTokenizer.from_pretrained(folder)
    hub, reply = ask(folder, SAID[family])
    message = reply.json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
    history = [
        {"role": "user", "content": "hi"},
        message,
        {"role": "tool", "tool_call_id": call["id"], "content": "2"},
    ]
    hub.opened.clear()
    assert post(hub, {"messages": history, "tools": TOOLS}).status_code == 200
    known = {**call, "function": {"name": "f", "arguments": {"a": 1}}}
    history[1] = {"role": "assistant", "content": "", "tool_calls": [known]}
    expected = oracle.apply_chat_template(
        history, tools=TOOLS, add_generation_prompt=True, return_dict=False
    )
    assert list(hub.opened[0].prompt) == list(expected)


def test_a_checkpoints_own_template_for_tools_is_used(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["chat_template"] = [
        {"name": "default", "template": CHAT_TEMPLATE},
        {"name": "tool_use", "template": FAMILIES["hermes"]},
    ]
    file.write_text(json.dumps(config))
    text = TextModel(card("m", folder, context=4096))
    assert text.family.name == "hermes"
    with_tools, _ = text.encode_chat(Conversation(messages=HISTORY, tools=TOOLS))
    without, _ = text.encode_chat(Conversation(messages=HISTORY[:1]))
    assert "# Tools" in text.decode(list(with_tools))
    assert "im_start" not in text.decode(list(without))


def post(hub: FakeHub, body: dict[str, Any]) -> httpx.Response:
    async def scenario() -> httpx.Response:
        async with asgi_client(hub) as client:
            return await client.post("/v1/chat/completions", json={"model": "m", **body})

    return asyncio.run(scenario())


def ask(folder: Path, said: str, **body: Any) -> tuple[FakeHub, httpx.Response]:
    hub = FakeHub([card("m", folder, context=4096)], obliging(tokens_of(folder, said)))
    messages = [{"role": "user", "content": "hi"}]
    reply = post(hub, {"messages": messages, "tools": TOOLS, **body})
    assert reply.status_code == 200, reply.text
    return hub, reply


@pytest.mark.parametrize("stream", [False, True])
def test_calls_come_as_tool_calls(folder: Path, stream: bool) -> None:
    hub, reply = ask(folder, "Let me see.\n" + TWO, stream=stream)
    if stream:
        lines = [x[6:] for x in reply.text.split("\n") if x.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines]
        content, calls, finish = "", {}, choices[-1]["finish_reason"]
        for choice in choices:
            content += choice["delta"].get("content", "")
            for part in choice["delta"].get("tool_calls", ()):
                if "id" in part:
                    assert part["type"] == "function"
                    calls[part["index"]] = [part["function"]["name"], ""]
                calls[part["index"]][1] += part["function"]["arguments"]
        found = [calls[i] for i in range(len(calls))]
    else:
        (choice,) = reply.json()["choices"]
        content, finish = choice["message"]["content"], choice["finish_reason"]
        functions = [call["function"] for call in choice["message"]["tool_calls"]]
        found = [[function["name"], function["arguments"]] for function in functions]
    assert (content, finish) == ("Let me see.", "tool_calls")
    assert found == [["f", '{"a": 1}'], ["g", "{}"]]
    assert hub.opened[0].sampling.grammar is None


def test_a_call_alone_has_no_content_and_parallel_calls_can_be_refused(folder: Path) -> None:
    _, reply = ask(folder, TWO, parallel_tool_calls=False)
    message = reply.json()["choices"][0]["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 1


def test_none_hides_the_tools(folder: Path) -> None:
    hub, reply = ask(folder, TWO, tool_choice="none")
    assert reply.json()["choices"][0]["message"]["content"] == TWO
    text = TextModel(card("m", folder))
    assert "Does" not in text.decode(list(hub.opened[0].prompt))


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [("required", {"f", "g"}), ({"type": "function", "function": {"name": "g"}}, {"g"})],
)
def test_a_call_can_be_forced(folder: Path, choice: Any, allowed: set[str]) -> None:
    hub, _ = ask(folder, TWO, tool_choice=choice)
    grammar = hub.opened[0].sampling.grammar
    assert grammar is not None and grammar.kind == "lark"
    assert {name for name in NAMES if f'{{"const":"{name}"}}' in grammar.text} == allowed


def test_a_form_and_tools_leave_both_open(folder: Path) -> None:
    hub, reply = ask(folder, '{"x": 1}', response_format={"type": "json_object"})
    grammar = hub.opened[0].sampling.grammar
    assert grammar is not None and "answer: %json" in grammar.text
    assert reply.json()["choices"][0]["message"]["content"] == '{"x": 1}'


def test_a_template_without_tools_gets_them_in_a_message(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    text = TextModel(card("m", folder, context=4096))
    assert text.family.name == "generic"
    ids, _ = text.encode_chat(Conversation(messages=HISTORY, tools=TOOLS))
    shown = text.decode(list(ids))
    assert '"name": "f"' in shown and "<tool_response>\n2" in shown
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}' in shown


def test_a_mark_that_is_a_special_token_is_still_seen(folder: Path) -> None:
    """Mistral's and Llama's marks are dropped from texts by every tokenizer."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["[TOOL_CALLS]"] = tokenizer["model"]["vocab"].pop("<|user|>")
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace("<|user|>", "[TOOL_CALLS]")
    file.write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text("[TOOL_CALLS]{{ tools }}{{ messages[0].content }}")
    said = '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]'
    assert tokens_of(folder, said)[0] == 3
    hub, reply = ask(folder, said, tool_choice="required")
    (call,) = reply.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
    grammar = hub.opened[0].sampling.grammar
    assert grammar is not None and "<[3]>" in grammar.text


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_comes_apart(folder: Path, stream: bool) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}<think>\n")
    _, reply = ask(folder, "hm</think>\n\nyes", stream=stream, tools=[])
    if stream:
        lines = [x[6:] for x in reply.text.split("\n") if x.startswith("data: {")]
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
        thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
        content = "".join(delta.get("content", "") for delta in deltas)
    else:
        message = reply.json()["choices"][0]["message"]
        thought, content = message["reasoning_content"], message["content"]
    assert (thought, content) == ("hm", "yes")
