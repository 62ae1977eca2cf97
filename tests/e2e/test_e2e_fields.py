"""The fields of requests through a whole pool with a tiny float64 model, against transformers."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.pool_process import PoolProcess, running_pool
from support.tiny import EOS_ID, tiny_checkpoint

PROMPT = [9, 33, 71, 20, 15, 40]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "seed": 3}
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
    for name in ("left", "right")
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    folder = tmp_path_factory.mktemp("fields")
    tiny_checkpoint(folder / "m", dtype="float64", vocab=300, max_position=1024)
    models = [{"name": "m", "path": "m"}]
    with running_pool(folder, models, engine={"device_memory": "12M"}) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def oracle(pool: PoolProcess) -> Any:
    folder = pool.log_file.parent / "m"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def ask(pool: PoolProcess, path: str, **body: Any) -> Any:
    reply = httpx.post(f"{pool.url}{path}", json={"model": "m", **body}, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompts_log_probabilities(pool: PoolProcess, oracle: Any, max_tokens: int) -> None:
    reply = ask(
        pool, "/v1/completions", prompt=PROMPT, echo=True, logprobs=2, max_tokens=max_tokens
    )
    scores = reply["choices"][0]["logprobs"]
    with torch.no_grad():
        expected = oracle(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    wanted = [expected[i, token].item() for i, token in enumerate(PROMPT[1:])]
    assert len(scores["tokens"]) == len(PROMPT) + max_tokens
    assert scores["token_logprobs"][0] is None
    assert scores["token_logprobs"][1 : len(PROMPT)] == pytest.approx(wanted, abs=1e-5)
    for i, top in enumerate(scores["top_logprobs"][1 : len(PROMPT)]):
        assert max(top.values()) == pytest.approx(expected[i].max().item(), abs=1e-5)


def test_an_embedding(pool: PoolProcess, oracle: Any) -> None:
    reply = ask(pool, "/v1/embeddings", input=[PROMPT, PROMPT[:3]])
    for entry, prompt in zip(reply["data"], (PROMPT, PROMPT[:3]), strict=True):
        with torch.no_grad():
            states = oracle.model(torch.tensor([prompt])).last_hidden_state[0]
        wanted = torch.nn.functional.normalize(states[-1], dim=0)
        assert entry["embedding"] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_choices_are_the_same_again_and_differ(pool: PoolProcess) -> None:
    body = {"prompt": PROMPT, "n": 4, "seed": 5, "max_tokens": 8, "ignore_eos": True}
    first, again = (ask(pool, "/v1/completions", **body) for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert len(set(texts)) > 1
    alone = ask(pool, "/v1/completions", **{**body, "n": 1})
    assert alone["choices"][0]["text"] == texts[0]


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_follows_its_schema(pool: PoolProcess, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    body = {**CHAT, "seed": seed, "max_tokens": 400}
    reply = ask(pool, "/v1/chat/completions", **body, response_format=form)
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop"
    answer = json.loads(choice["message"]["content"])
    assert answer["a"] in (1, 2) and isinstance(answer["b"], bool) and len(answer) == 2


def test_an_answer_is_one_of_the_choices(pool: PoolProcess) -> None:
    outputs = {"choice": ["yes", "no", "perhaps"]}
    reply = ask(pool, "/v1/chat/completions", **CHAT, structured_outputs=outputs, n=5)
    assert {c["message"]["content"] for c in reply["choices"]} <= set(outputs["choice"])


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "right"}}]
)
def test_a_forced_call_is_a_call(pool: PoolProcess, choice: Any) -> None:
    reply = ask(
        pool,
        "/v1/chat/completions",
        **CHAT,
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=300,
    )
    (answer,) = reply["choices"]
    assert answer["finish_reason"] == "tool_calls", answer
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] in (("left", "right") if choice == "required" else ("right",))
    assert json.loads(call["function"]["arguments"])["a"] in (1, 2)


def test_a_response(pool: PoolProcess) -> None:
    reply = ask(pool, "/v1/responses", input="hi", max_output_tokens=5, temperature=0)
    assert reply["usage"]["output_tokens"] <= 5
    assert reply["output"] or reply["status"] == "completed"


def test_bias_and_penalties_steer(pool: PoolProcess) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 6, "return_token_ids": True}
    forced = ask(pool, "/v1/completions", **body, logit_bias={"77": 100})
    assert forced["choices"][0]["token_ids"] == [77] * 6
    varied = ask(
        pool, "/v1/completions", **body, logit_bias={"77": 10, "78": 10}, frequency_penalty=2
    )
    assert len(set(varied["choices"][0]["token_ids"])) > 1
    ended = ask(pool, "/v1/completions", **body, logit_bias={str(EOS_ID): 100})
    assert ended["choices"][0]["finish_reason"] == "stop"
    long = ask(pool, "/v1/completions", **body, logit_bias={str(EOS_ID): 100}, min_tokens=3)
    assert len(long["choices"][0]["token_ids"]) == 3


def test_cached_tokens_are_told(pool: PoolProcess) -> None:
    body = {"prompt": [7] * 300, "max_tokens": 1}
    details = [
        ask(pool, "/v1/completions", **body, **salt)["usage"]["prompt_tokens_details"]
        for salt in ({}, {}, {"cache_salt": "other"})
    ]
    cached = [detail["cached_tokens"] for detail in details]
    assert cached[0] == 0 and cached[1] > 0 and cached[2] == 0
