"""The fields that say how tokens are drawn, several choices, and log probabilities."""

import asyncio
import itertools
import json
import math
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tokenizers import Tokenizer, decoders, models

from support.fake_hub import FakeHub, card, logprob_of, obliging, tokens_of
from support.live import asgi_client
from support.tiny import write_tokenizer
from weft.core.request import Grammar, SamplingDefaults, TokenLogprobs
from weft.hub.base import Chunk
from weft.server.names import TokenNames
from weft.server.plan import choice_seed

USER = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    write_tokenizer(path, 300)
    return path


def hub_of(folder: Path, text: str = "hello", **options: Any) -> FakeHub:
    return FakeHub([card("m", folder)], obliging(tokens_of(folder, text), **options))


def post(hub: FakeHub, path: str, **body: Any) -> httpx.Response:
    async def scenario() -> httpx.Response:
        async with asgi_client(hub) as client:
            return await client.post(path, json={"model": "m", **body})

    reply = asyncio.run(scenario())
    assert reply.status_code == 200, reply.text
    return reply


def events_of(reply: httpx.Response) -> list[Any]:
    lines = [line[6:] for line in reply.text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_every_field_reaches_the_hub(folder: Path) -> None:
    hub = hub_of(folder)
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.2,
        "seed": 11,
    }
    post(
        hub,
        CHAT,
        messages=USER,
        **fields,
        logit_bias={"9": 2, "5": -100},
        logprobs=True,
        top_logprobs=3,
        prompt_logprobs=2,
        min_tokens=2,
        stop_token_ids=[7, 7],
        priority=-3,
        cache_salt="s",
        response_format={"type": "json_object"},
    )
    new = hub.opened[0]
    for name, value in fields.items():
        assert getattr(new.sampling, name) == value
    assert new.sampling.logit_bias == ((5, -100.0), (9, 2.0))
    assert (new.sampling.logprobs, new.prompt_logprobs) == (3, 2)
    assert (new.min_tokens, new.stop_ids, new.priority) == (2, (7,), -3)
    assert new.tenant == "\0s"
    assert new.sampling.grammar == Grammar(kind="json_object")


@pytest.mark.parametrize(
    ("field", "value", "grammar"),
    [
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
            Grammar(kind="json_schema", text='{"type":"object"}'),
        ),
        ("structured_outputs", {"regex": "a+"}, Grammar(kind="regex", text="a+")),
        ("structured_outputs", {"choice": ["a", "b"]}, Grammar(kind="choice", text='["a","b"]')),
        ("structured_outputs", {"json_object": True}, Grammar(kind="json_object")),
        ("guided_json", '{"type": "null"}', Grammar(kind="json_schema", text='{"type": "null"}')),
        ("guided_grammar", 'start: "a"', Grammar(kind="lark", text='start: "a"')),
        ("response_format", {"type": "text"}, None),
    ],
)
def test_a_form_becomes_a_grammar(
    folder: Path, field: str, value: Any, grammar: Grammar | None
) -> None:
    hub = hub_of(folder)
    post(hub, TEXT, prompt="a", **{field: value})
    assert hub.opened[0].sampling.grammar == grammar


def test_choices_have_seeds_of_their_own_and_the_prompt_counts_once(folder: Path) -> None:
    hub = hub_of(folder)
    reply = post(hub, TEXT, prompt=["ab", "xyz"], n=3, seed=5, max_tokens=2).json()
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    seeds = [new.sampling.seed for new in hub.opened]
    assert seeds[:3] == seeds[3:] == [choice_seed(5, i) for i in range(3)]
    assert seeds[0] == 5 and len(set(seeds[:3])) == 3
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert reply["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 12,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 1 + 1},
    }


def test_streamed_choices_of_a_chat_come_apart_and_usage_is_last(folder: Path) -> None:
    hub = hub_of(folder, "well met")
    options = {"include_usage": True}
    reply = post(hub, CHAT, messages=USER, n=3, stream=True, stream_options=options)
    *events, last = events_of(reply)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3 * len(
        tokens_of(folder, "well met")
    )
    texts = {0: "", 1: "", 2: ""}
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert set(texts.values()) == {"well met"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("per_chunk", [1, 3])
def test_completion_logprobs(folder: Path, stream: bool, per_chunk: int) -> None:
    hub = hub_of(folder, "hello", per_chunk=per_chunk)
    reply = post(hub, TEXT, prompt="ab", logprobs=2, stream=stream)
    entries = [e["choices"][0]["logprobs"] for e in events_of(reply)] if stream else []
    if not stream:
        entries = [reply.json()["choices"][0]["logprobs"]]
    merged = {key: [x for entry in entries for x in entry[key]] for key in entries[0]}
    ids = [*tokens_of(folder, "ab"), *tokens_of(folder, "hello")]
    assert merged["tokens"] == ["h", "el", "l", "o"]
    assert merged["text_offset"] == [0, 1, 3, 4]
    assert merged["token_logprobs"] == [logprob_of(ids[i - 1], ids[i]) for i in range(2, 6)]
    for token, value, top in zip(
        merged["tokens"], merged["token_logprobs"], merged["top_logprobs"], strict=True
    ):
        assert top[token] == value
        assert 2 <= len(top) <= 3


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("per_chunk", [1, 20])
def test_offsets_are_those_of_the_text_also_behind_characters_in_several_tokens(
    folder: Path, per_chunk: int, as_ids: bool
) -> None:
    hub = hub_of(folder, "né🙂o, hello", per_chunk=per_chunk)
    fields = {"logprobs": 0, "echo": True, "return_tokens_as_token_ids": as_ids}
    choice = post(hub, TEXT, prompt="é a", **fields).json()["choices"][0]
    text = choice["text"]
    assert text == "é ané🙂o, hello"
    ids = [*tokens_of(folder, "é a"), *tokens_of(folder, "né🙂o, hello")]
    names = TokenNames(Tokenizer.from_file(str(folder / "tokenizer.json")))
    at = 0
    for token, offset in zip(ids, choice["logprobs"]["text_offset"], strict=True):
        assert offset == len(text.encode()[:at].decode(errors="ignore")), token
        at += len(names.bytes(token))
    assert at == len(text.encode())


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_as_harnesses_do(folder: Path, max_tokens: int, stream: bool) -> None:
    """lm-eval sends ids, echo, logprobs 1 and max_tokens 1 and drops the last entry."""
    hub = hub_of(folder)
    prompt = list(tokens_of(folder, "one two"))
    reply = post(
        hub,
        TEXT,
        prompt=[prompt, prompt[:3]],
        echo=True,
        logprobs=1,
        max_tokens=max_tokens,
        temperature=0,
        stop_token_ids=[9],
        stream=stream,
    )
    choices: list[Any] = [{"text": "", "tokens": [], "token_logprobs": [], "top_logprobs": []}]
    choices.append({key: value[:0] for key, value in choices[0].items()})
    for event in events_of(reply) if stream else [reply.json()]:
        for choice in event["choices"]:
            mine = choices[choice["index"]]
            mine["text"] += choice["text"]
            for key in ("tokens", "token_logprobs", "top_logprobs"):
                mine[key] += choice["logprobs"][key]
    for choice, ids in zip(choices, (prompt, prompt[:3]), strict=True):
        scores = choice["token_logprobs"]
        assert len(scores) == len(ids) + max_tokens
        assert choice["text"].startswith("one two"[: len(ids)])
        assert scores[0] is None and choice["top_logprobs"][0] is None
        assert scores[1 : len(ids)] == [
            logprob_of(before, token) for before, token in itertools.pairwise(ids)
        ]
        assert all(
            max(top.values()) >= score
            for score, top in zip(scores[1:], choice["top_logprobs"][1:], strict=False)
        )
    assert hub.opened[0].prompt_logprobs == 1
    assert hub.opened[0].max_tokens == max_tokens
    if max_tokens:
        assert hub.opened[0].ignore_eos and hub.opened[0].stop_ids == ()
    if not stream:
        assert reply.json()["usage"]["completion_tokens"] == 2 * max_tokens


def test_every_choice_has_the_prompts_logprobs(folder: Path) -> None:
    choices = post(hub_of(folder), TEXT, prompt="ab", echo=True, logprobs=0, n=2).json()["choices"]
    scores = [choice["logprobs"]["token_logprobs"] for choice in choices]
    assert scores[0] == scores[1] and len(scores[0]) > 2


def test_nothing_is_said_with_max_tokens_0(folder: Path) -> None:
    hub = hub_of(folder)
    reply = post(hub, TEXT, prompt="ab", max_tokens=0).json()
    assert reply["choices"][0]["text"] == "" and reply["usage"]["completion_tokens"] == 0
    assert reply["choices"][0]["finish_reason"] == "length"
    assert hub.opened[0].max_tokens == 1  # the hub draws at least one token where nothing is scored


def test_echo_without_logprobs_is_the_text(folder: Path) -> None:
    hub = hub_of(folder)
    (choice,) = post(hub, TEXT, prompt="one <s>two ", echo=True).json()["choices"]
    assert choice["text"] == "one <s>two hello"
    assert choice["logprobs"] is None
    assert hub.opened[0].prompt_logprobs is None and not hub.opened[0].ignore_eos


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_have_bytes(folder: Path, stream: bool) -> None:
    hub = hub_of(folder, "né")
    reply = post(hub, CHAT, messages=USER, logprobs=True, top_logprobs=1, stream=stream)
    entries: list[Any] = []
    for event in events_of(reply) if stream else [reply.json()]:
        logprobs = event["choices"][0]["logprobs"]
        entries += logprobs["content"] if logprobs else []
    assert [entry["bytes"] for entry in entries] == [[110], [0xC3], [0xA9]]
    assert [entry["token"] for entry in entries] == ["n", "\ufffd", "\ufffd"]
    for entry in entries:
        (top,) = entry["top_logprobs"]
        assert top["logprob"] >= entry["logprob"]


def test_half_characters_are_told_apart_in_completions(folder: Path) -> None:
    reply = post(hub_of(folder, "é"), TEXT, prompt="a", logprobs=0).json()
    assert reply["choices"][0]["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert [len(top) for top in reply["choices"][0]["logprobs"]["top_logprobs"]] == [1, 1]


def test_tokens_may_be_named_by_their_ids(folder: Path) -> None:
    hub = hub_of(folder, "h")
    reply = post(hub, TEXT, prompt="a", logprobs=0, return_tokens_as_token_ids=True).json()
    (token,) = tokens_of(folder, "h")
    assert reply["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token}"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_prompt_logprobs_have_vllms_shape(folder: Path, path: str, stream: bool) -> None:
    hub = hub_of(folder)
    body: Any = {"prompt": "abc"} if path == TEXT else {"messages": USER}
    reply = post(hub, path, **body, prompt_logprobs=1, stream=stream)
    if stream:
        found = [c for e in events_of(reply) for c in e["choices"] if "prompt_logprobs" in c]
        assert len(found) == 1
        shaped = found[0]["prompt_logprobs"]
    else:
        whole = reply.json()
        shaped = (whole if path == CHAT else whole["choices"][0])["prompt_logprobs"]
    prompt = hub.opened[0].prompt
    assert shaped[0] is None and len(shaped) == len(prompt)
    for before, token, position in zip(prompt, prompt[1:], shaped[1:], strict=False):
        assert position[str(token)]["logprob"] == logprob_of(before, token)
        assert next(entry["rank"] for entry in position.values()) == 1


def test_an_impossible_token_is_a_number(folder: Path) -> None:
    impossible = TokenLogprobs(token=9, logprob=-math.inf)
    steps = [Chunk(tokens=(9,), logprobs=(impossible,)), Chunk(finish="stop")]
    hub = FakeHub([card("m", folder)], lambda _: steps)
    reply = post(hub, TEXT, prompt="a", logprobs=0).json()
    assert reply["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_a_stop_string_ends_the_logprobs_too(folder: Path) -> None:
    hub = hub_of(folder, "one STOP two", per_chunk=5)
    reply = post(hub, TEXT, prompt="a", logprobs=0, stop="STOP").json()
    logprobs = reply["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == reply["usage"]["completion_tokens"] == 8


def test_a_token_of_a_sentencepiece_vocabulary_has_its_space_and_its_byte() -> None:
    vocab = {"a": 0, "▁the": 1, "<0xE2>": 2, "▁": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    names = TokenNames(tokenizer)
    assert (names.text(1), names.bytes(1)) == (" the", b" the")
    assert names.bytes(2) == b"\xe2"


def test_a_response_repeats_what_is_drawn_with(folder: Path) -> None:
    own = SamplingDefaults(temperature=0.3, top_p=0.5)
    own_card = msgspec.structs.replace(card("m", folder), defaults=own)
    hub = FakeHub([own_card], obliging(tokens_of(folder, "hello")))
    told = post(hub, "/v1/responses", input="hi").json()
    drawn = hub.opened[0].sampling
    assert (told["temperature"], told["top_p"]) == (drawn.temperature, drawn.top_p) == (0.3, 0.5)
