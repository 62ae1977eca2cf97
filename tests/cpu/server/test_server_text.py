"""Templates and tokenisation: the same as transformers, and bounded."""

import asyncio
import gc
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from support.fake_hub import card
from support.tiny import write_tokenizer
from weft.core.errors import WeftError
from weft.server.errors import ApiError
from weft.server.messages import Conversation
from weft.server.templates import ChatTemplate, TemplateFailure, find_template, special_tokens
from weft.server.text import TextModel, TextService, max_prompt_chars

CHAT = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Hi  there\n"},
    {"role": "assistant", "content": 'Hello "you".'},
    {"role": "user", "content": "naïve 🙂?"},
]
TEMPLATES = {
    "blocks": """
{%- if messages[0]['role'] == 'system' -%}
    {%- set rest = messages[1:] -%}
    {{ '<|user|>' + messages[0]['content'] + '\n' }}
{%- else -%}
    {%- set rest = messages -%}
{%- endif %}
  {% for message in rest %}
    {%- if loop.first %}{{ bos_token }}{% endif %}
{{ '<|' + message['role'] + '|>' }}
{{ message['content'] | trim }}{{ eos_token }}
  {% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}""",
    "namespace and controls": """
{%- set ns = namespace(found=false, count=0) -%}
{%- for message in messages -%}
  {%- if message.role == 'system' %}{% set ns.found = true %}{% continue %}{% endif -%}
  {%- set ns.count = ns.count + 1 -%}
  {%- if ns.count > 2 %}{% break %}{% endif -%}
  {{ message.role | upper }}={{ message | tojson }};
{%- endfor -%}
{{ ns.found }}{{ ns.count }}{{ 'x' * 3 }}{{ '%s-%d' % ('a', 5) }}
{%- if tools is not none %}tools{% endif %}{% if tools %}more{% endif %}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' -%}
{% generation %}{{ m.content }}{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}
{% endfor %}""",
    "macro": """{% macro say(m) %}<{{ m.role }}>{{ m['content'] }}{% endmacro %}
{{ bos_token }}{% for m in messages %}{{ say(m) }}{% endfor %}
{% if date_string is not defined %}{% set date_string = "today" %}{% endif %}{{ date_string }}""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path, 300)
    return tmp_path


def set_template(folder: Path, template: Any) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("chat_template", None)
    if template is not None:
        config["chat_template"] = template
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_rendering_and_ids_are_those_of_transformers(folder: Path, name: str) -> None:
    from transformers import AutoTokenizer

    set_template(folder, TEMPLATES[name])
    oracle = AutoTokenizer.from_pretrained(folder)
    expected = oracle.apply_chat_template(
        CHAT, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    text = TextModel(card("m", folder))
    assert list(text.encode_chat(Conversation(messages=CHAT))[0]) == list(expected)
    assert list(text.encode_prompt("Hi <s>")) == oracle("Hi <s>")["input_ids"]
    assert text.decode(list(expected)) == oracle.decode(expected, skip_special_tokens=True)


def add_bos_by_itself(folder: Path) -> None:
    """Let the tokenizer put <s> before every text, as Llama's does."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(tokenizer))


def test_a_template_writes_its_special_tokens_itself(folder: Path) -> None:
    """Else every chat would begin with two of them."""
    from transformers import AutoTokenizer

    add_bos_by_itself(folder)
    oracle = AutoTokenizer.from_pretrained(folder)
    text = TextModel(card("m", folder))
    expected = oracle.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert list(text.encode_chat(Conversation(messages=CHAT))[0]) == list(expected)
    assert text.encode_chat(Conversation(messages=CHAT))[0][:2].count(1) == 1
    assert list(text.encode_prompt("Hi")) == oracle("Hi")["input_ids"]
    assert text.encode_prompt("Hi")[0] == 1
    set_template(folder, None)
    assert TextModel(card("m", folder)).encode_chat(Conversation(messages=CHAT))[0][0] == 1


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert find_template(tmp_path, {}) is None
    assert find_template(tmp_path, {"chat_template": "a"}) == "a"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert find_template(tmp_path, {"chat_template": named}) == "d"
    assert find_template(tmp_path, {"chat_template": named[:1]}) is None
    (tmp_path / "chat_template.jinja").write_text("file")
    assert find_template(tmp_path, {"chat_template": "a"}) == "file"


def test_special_tokens_may_be_objects() -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "x": 1}
    assert special_tokens(config) == {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_model_without_a_template_gets_the_plain_form(folder: Path) -> None:
    set_template(folder, None)
    text = TextModel(card("m", folder))
    ids, _ = text.encode_chat(Conversation(messages=[{"role": "user", "content": "hi"}]))
    assert text.decode(list(ids)) == "user: hi\nassistant:"


def render(source: str, **options: Any) -> str:
    limits = {"max_chars": 10_000, "limit_s": 10.0, **options}
    return ChatTemplate(source, **limits).render(CHAT)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'x' * 100000000 }}",
        "{{ 100000000 * [1] }}",
        "{{ '%9999999d' % 1 }}",
        "{% for i in range(100000000) %}{% endfor %}",
        "{{ undefined_thing.attribute }}",
        "{{ 1 / 0 }}",
        "{{ messages[0] + 1 }}",
        "{{ raise_exception('no ' + messages[0].role) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
    ],
)
def test_a_hostile_template_fails_with_a_message(source: str) -> None:
    with pytest.raises(TemplateFailure) as failure:
        render(source)
    assert len(str(failure.value)) < 800


def test_the_output_is_bounded() -> None:
    with pytest.raises(TemplateFailure, match="longer than 10 characters"):
        render("{% for i in range(100) %}x{{ i }}{% endfor %}", max_chars=10)


def test_a_loop_without_output_meets_the_deadline() -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.001
        return now

    source = (
        "{% for i in range(9999) %}{% for j in range(9999) %}{% set x = j %}"
        "{% endfor %}{% endfor %}"
    )
    with pytest.raises(TemplateFailure, match="took too long"):
        render(source, limit_s=1.0, clock=clock)


def test_a_template_that_does_not_parse_is_said_at_load(folder: Path) -> None:
    set_template(folder, "{% for %}")
    with pytest.raises(WeftError, match="does not parse"):
        TextModel(card("m", folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Nope"}}'),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b"\xff"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_broken_file_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(WeftError, match=name):
        TextModel(card("m", folder))


def test_a_broken_model_is_503_and_the_others_work(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")

    async def scenario() -> None:
        texts = TextService()
        for _ in range(2):
            with pytest.raises(ApiError) as error:
                await texts.model(card("b", broken))
            assert (error.value.status, error.value.code) == (503, "model_failed")
        assert (await texts.model(card("m", folder))).has_text
        texts.close()

    asyncio.run(scenario())


def test_lengths_are_bounded_before_tokenising(folder: Path) -> None:
    text = TextModel(card("m", folder, context=1000))
    limit = max_prompt_chars(1000)
    assert limit == 8000
    assert text.encode_prompt("a" * limit)
    with pytest.raises(ApiError, match="8001 characters"):
        text.encode_prompt("a" * (limit + 1))
    with pytest.raises(ApiError, match="characters"):
        text.encode_chat(Conversation(messages=[{"role": "user", "content": "a" * (limit + 1)}]))


def test_an_id_the_model_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(ApiError, match="the model does not"):
        TextModel(card("m", folder, vocab=50)).encode_prompt("zebra")


def test_a_stuck_job_times_out_and_leaves_room_for_other_models() -> None:
    async def scenario() -> None:
        release = threading.Event()
        texts = TextService(threads=3, limit_s=0.05)
        for _ in range(2):
            with pytest.raises(ApiError) as error:
                await texts.run("stuck", lambda: release.wait(60))
            assert (error.value.status, error.value.code) == (503, "text_timeout")
        with pytest.raises(ApiError):  # both lanes of this model are taken
            await texts.run("stuck", lambda: True)
        for _ in range(20):
            assert await texts.run("other", lambda: 7) == 7
        release.set()
        texts.close()

    asyncio.run(scenario())


def test_an_error_in_a_job_is_its_callers() -> None:
    def fail() -> None:
        raise ApiError(400, "bad text")

    async def scenario() -> None:
        texts = TextService()
        with pytest.raises(ApiError, match="bad text"):
            await texts.run("m", fail)
        texts.close()

    asyncio.run(scenario())


def test_a_changed_card_is_read_anew(folder: Path) -> None:
    """A reloaded pool may serve other files, limits or templates under the same name."""

    async def scenario() -> None:
        texts = TextService()
        first = await texts.model(card("m", folder))
        assert await texts.model(card("m", folder)) is first
        other = await texts.model(card("m", folder, context=64))
        assert other is not first and other.max_chars <= first.max_chars
        texts.close()

    asyncio.run(scenario())


def test_texts_of_models_that_went_are_forgotten(folder: Path) -> None:
    async def scenario() -> None:
        texts, names = TextService(), {"a", "b"}
        texts.served = lambda: names
        gone = weakref.ref(await texts.model(card("a", folder)))
        kept = weakref.ref(await texts.model(card("b", folder)))
        names.discard("a")
        await texts.model(card("c", folder))
        gc.collect()
        assert gone() is None and kept() is not None
        texts.close()

    asyncio.run(scenario())
