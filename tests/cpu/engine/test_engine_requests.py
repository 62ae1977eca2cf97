"""Every parameter of a request under the real scheduler and the CPU executor, in a unit with too
little memory: tokens, log probabilities, prompt scores and embeddings equal the plain answer
(promise 3), whatever was chunked, parked, requeued or run beside."""

from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest

from support.answers import Answer, plain_answer, random_sampling, same_logprobs
from support.engine_kit import Engine, TinyModel, tiny_models, unit_for
from support.plain import PlainModel
from support.unit_kit import UnitRun
from weft.core.actions import CopyKv, UnitAction
from weft.core.errors import WeftError
from weft.core.ids import ModelName, RequestId
from weft.core.request import Request
from weft.core.unit import UnitSpec

MODELS = {
    "a": {"tokenizer": True},
    "b": {"family": "qwen2", "heads": 6, "kv_heads": 1, "head_dim": 24, "tokenizer": True},
}


def tight(models: dict[str, TinyModel], **fields: int) -> UnitSpec:
    """Room for the larger model and some granules of KV."""
    granule_bytes = unit_for(models).granule_bytes
    largest = max(-(-m.spec.weight_bytes // granule_bytes) for m in models.values())
    return unit_for(models, num_granules=largest + 24, **{"max_repeat": 4, **fields})


def random_request(number: int, models: dict[str, TinyModel], rng: Random) -> Request:
    name = rng.choice(list(models))
    vocab = models[name].arch.vocab_size
    kind = rng.random()
    embed = None if kind > 0.2 else rng.choice(["last", "mean"])
    scored = embed is None and kind < 0.45
    nothing = embed is not None or (scored and rng.random() < 0.3)
    return Request(
        id=RequestId(number),
        model=ModelName(name),
        prompt=tuple(rng.randrange(vocab) for _ in range(rng.choice([1, 2, rng.randint(3, 60)]))),
        max_tokens=0 if nothing else rng.randint(1, 20),
        min_tokens=rng.choice([0, 0, 3]),
        sampling=random_sampling(rng, vocab),
        stop_ids=tuple(rng.sample(range(vocab), rng.choice([0, 4]))),
        ignore_eos=rng.random() < 0.5,
        prompt_logprobs=rng.choice([0, 1, 4]) if scored else None,
        embed=embed,
    )


def check_answer(unit: UnitRun, request: Request, want: Answer) -> None:
    got, who = unit.tokens[request.id], f"{request}"
    if "only go on with a token that ends" in unit.errors.get(request.id, ""):
        assert request.sampling.grammar is not None and request.stop_ids
        assert got == want.tokens[: len(got)], who
        return
    assert request.id not in unit.errors, unit.errors
    assert (got, unit.finish[request.id]) == (want.tokens, want.finish), who
    same_logprobs(unit.logprobs[request.id], want.logprobs)
    same_logprobs(unit.prompt_logprobs.get(request.id, ()), want.prompt_logprobs)
    if want.embedding is None:
        assert request.id not in unit.embeddings
        return
    parts = [np.frombuffer(part, dtype="<f4") for part in unit.embeddings[request.id]]
    total = np.sum(parts, axis=0, dtype=np.float32)
    if request.embed == "last":
        assert len(parts) == 1
        np.testing.assert_array_equal(total, want.embedding.astype(np.float32))
    else:
        mean = total / len(request.prompt)
        np.testing.assert_allclose(mean, want.embedding, rtol=1e-5, atol=1e-6)


EVERY_KIND = {"min_p", "penalised", "biased", "scored", "prompt", "last", "mean", "drew nothing"}
EVERY_KIND |= {"grammar cut", "grammar stop"}


def kinds_of(request: Request, answer: Answer) -> set[str]:
    """What this request is a case of."""
    sampling = request.sampling
    kinds = {
        "min_p": sampling.min_p and not sampling.greedy,
        "penalised": sampling.penalised,
        "biased": sampling.logit_bias,
        "scored": answer.logprobs,
        "prompt": len(answer.prompt_logprobs) > 24,
        "drew nothing": request.prefill_only and request.embed is None,
        request.embed or "": request.embed,
        f"grammar {'stop' if answer.finish == 'stop' else 'cut'}": sampling.grammar,
    }
    return {name for name, is_one in kinds.items() if is_one}


def play(
    models: dict[str, TinyModel], spec: UnitSpec, requests: list[Request], rng: Random
) -> UnitRun:
    with Engine(models, spec, threads=1) as engine:
        unit = UnitRun(engine)
        left = list(requests)
        while left or not unit.idle:
            for _ in range(rng.choice([0, 0, 1, 2])):
                if left:
                    unit.request(left.pop(0))
            if not unit.idle:
                unit.step()
        unit.drain()
        return unit


def check_all(folder: Path, seed: int, count: int, **fields: int) -> list[UnitAction]:
    models = tiny_models(folder, MODELS, dtype="float64", page_tokens=8)
    plain = {name: PlainModel(model.path, "float64") for name, model in models.items()}
    rng = Random(seed)
    requests = [random_request(i, models, rng) for i in range(count)]
    unit = play(models, tight(models, **fields), requests, rng)
    seen: set[str] = set()
    for request in requests:
        try:
            want = plain_answer(plain[request.model], request, models[request.model].spec.eos_ids)
        except WeftError as error:
            assert unit.errors[request.id].endswith(str(error))
            continue
        check_answer(unit, request, want)
        seen |= kinds_of(request, want)
    missing = EVERY_KIND - seen
    assert not missing, f"nobody asked for {missing}"
    return unit.actions


@pytest.mark.parametrize("depth", [1, 2])
def test_every_answer_equals_its_plain_answer(tmp_path: Path, depth: int) -> None:
    actions = check_all(tmp_path, depth, 40, depth=depth, max_step_tokens=24)
    assert sum(isinstance(a, CopyKv) and a.to == "device" for a in actions) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_many_answers(tmp_path: Path, seed: int) -> None:
    rng = Random(seed)
    check_all(
        tmp_path,
        seed + 100,
        60,
        depth=rng.choice([1, 2]),
        num_slots=rng.choice([4, 8]),
        max_rows=rng.choice([2, 8]),
        max_step_tokens=rng.choice([8, 16, 64]),
        max_repeat=rng.choice([1, 4, 16]),
        parked_bytes=rng.choice([0, 1 << 15, 1 << 22]),
    )


def test_a_rerun_continues_what_was_sent(tmp_path: Path) -> None:
    """Cut at every token: the rest of tokens and log probabilities is the same, and what was said
    of the prompt is not said again."""
    models = tiny_models(tmp_path, {"a": MODELS["a"]}, dtype="float64", page_tokens=8)
    plain = PlainModel(models["a"].path, "float64")
    rng = Random(3)
    eos = models["a"].spec.eos_ids
    with Engine(models, tight(models), threads=1) as engine:
        unit = UnitRun(engine)
        cut: list[tuple[Request, Answer, int]] = []
        while len(cut) < 40:
            request = random_request(len(cut), models, rng)
            if not request.sampling.stepwise or request.prefill_only:
                continue
            try:
                want = plain_answer(plain, request, eos)
            except WeftError:
                continue
            for at in range(1, len(want.tokens) + (want.finish == "stop")):
                copy = msgspec.structs.replace(request, id=RequestId(len(cut)))
                cut.append((copy, want, at))
                unit.request(copy, want.tokens[:at])
        unit.drain()
    for request, want, at in cut:
        assert (unit.tokens[request.id], unit.finish[request.id]) == (want.tokens, want.finish)
        same_logprobs(unit.logprobs[request.id], want.logprobs[at:])
        assert request.id not in unit.prompt_logprobs
