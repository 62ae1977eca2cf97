"""/tokenize and /detokenize against the tokenizer itself, and against what generation counts; and
every field that is known but not served is refused by its name."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, processors

from support.fake_hub import FakeHub, card, obliging, tokens_of
from support.live import asgi_client
from support.tiny import SPECIALS, write_tokenizer
from weft.server.body import UNSUPPORTED

TEXT = "Grüße, 東京! well <|x|>"
USER = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    write_tokenizer(path, 300)
    file = str(path / "tokenizer.json")
    own = Tokenizer.from_file(file)
    begin = SPECIALS[0]
    own.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, own.token_to_id(begin))]
    )
    own.save(file)
    return path


def post(folder: Path, path: str, **body: Any) -> tuple[httpx.Response, FakeHub]:
    hub = FakeHub([card("m", folder)], obliging(tokens_of(folder, "hello")))

    async def scenario() -> httpx.Response:
        async with asgi_client(hub) as client:
            return await client.post(path, json={"model": "m", **body})

    return asyncio.run(scenario()), hub


@pytest.mark.parametrize("special", [None, True, False])
def test_a_prompt_becomes_the_tokenizers_ids_and_back(folder: Path, special: bool | None) -> None:
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = own.encode(TEXT, add_special_tokens=special is not False).ids
    assert (wanted[0] == own.token_to_id(SPECIALS[0])) == (special is not False)
    reply, _ = post(
        folder, "/tokenize", prompt=TEXT, add_special_tokens=special, return_token_strs=True
    )
    said = reply.json()
    assert said["tokens"] == wanted and said["count"] == len(wanted)
    assert said["max_model_len"] == card("m", folder).max_context_tokens
    assert len(said["token_strs"]) == len(wanted)
    back, _ = post(folder, "/detokenize", tokens=wanted)
    assert back.json() == {"prompt": own.decode(wanted, skip_special_tokens=False)}
    assert TEXT in back.json()["prompt"]


def test_a_tokenized_request_is_what_generation_is_asked_with(folder: Path) -> None:
    for route, body in (
        ("/v1/completions", {"prompt": TEXT}),
        ("/v1/chat/completions", {"messages": USER}),
    ):
        ids = post(folder, "/tokenize", **body)[0].json()["tokens"]
        answer, hub = post(folder, route, max_tokens=4, **body)
        assert answer.status_code == 200, answer.text
        assert list(hub.opened[-1].prompt) == ids
        assert answer.json()["usage"]["prompt_tokens"] == len(ids)


def test_ids_beyond_the_vocabulary_are_refused(folder: Path) -> None:
    reply, _ = post(folder, "/detokenize", tokens=[5, 1 << 20])
    assert reply.status_code == 400 and reply.json()["error"]["param"].startswith("tokens")
    neither, _ = post(folder, "/tokenize")
    assert neither.status_code == 400


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_a_field_that_is_not_served_is_refused_by_its_name(folder: Path, field: str) -> None:
    refused, hub = post(folder, "/v1/completions", prompt="hi", **{field: {"a": "value"}})
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == field and field in error["message"]
    assert not hub.opened, "the hub never hears of it"


def test_a_field_that_nobody_knows_is_refused_by_its_name(folder: Path) -> None:
    refused, _ = post(folder, "/v1/completions", prompt="hi", temprature=1)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "temprature"
