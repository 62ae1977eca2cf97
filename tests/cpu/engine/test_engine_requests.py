"""Every parameter of a request under the real scheduler and the CPU executor, in a unit with too
little memory: tokens, log probabilities, prompt scores and embeddings equal the plain answer
(promise 3), whatever was chunked, parked, requeued or run beside."""

from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from support.answers import GRAMMARS, Answer, plain_answer, random_sampling, same_logprobs
from support.engine_kit import Engine, TinyModel, tiny_models, unit_for
from support.fake_device import FakeDevice
from support.oracle import oracle
from support.plain import PlainModel
from support.replay_kit import LogitsLog, drive_replay, first_difference
from support.unit_kit import UnitRun
from weft.core.actions import CopyKv, UnitAction
from weft.core.errors import WeftError
from weft.core.ids import ModelName, RequestId
from weft.core.request import Grammar, Request, Sampling
from weft.core.unit import UnitSpec
from weft.engine.cuda_executor import CudaExecutor
from weft.sim.replayer import PlanReplayer

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
    models: dict[str, TinyModel],
    spec: UnitSpec,
    requests: list[Request],
    rng: Random,
    **options: Any,
) -> UnitRun:
    with Engine(models, spec, threads=1, **options) as engine:
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


def check_all(
    folder: Path, seed: int, count: int, options: dict[str, Any] | None = None, **fields: int
) -> tuple[list[UnitAction], set[str]]:
    models = tiny_models(folder, MODELS, dtype="float64", page_tokens=8)
    plain = {name: PlainModel(model.path, "float64") for name, model in models.items()}
    rng = Random(seed)
    requests = [random_request(i, models, rng) for i in range(count)]
    unit = play(models, tight(models, **fields), requests, rng, **options or {})
    seen: set[str] = set()
    for request in requests:
        try:
            want = plain_answer(plain[request.model], request, models[request.model].spec.eos_ids)
        except WeftError as error:
            assert unit.errors[request.id].endswith(str(error))
            continue
        check_answer(unit, request, want)
        seen |= kinds_of(request, want)
    return unit.actions, seen


@pytest.mark.parametrize("depth", [1, 2])
def test_every_answer_equals_its_plain_answer(tmp_path: Path, depth: int) -> None:
    actions, seen = check_all(tmp_path, depth, 40, depth=depth, max_step_tokens=24)
    assert seen >= EVERY_KIND, f"nobody asked for {EVERY_KIND - seen}"
    assert sum(isinstance(a, CopyKv) and a.to == "device" for a in actions) >= 2


def test_every_answer_equals_its_plain_answer_on_the_cuda_executor(tmp_path: Path) -> None:
    """On a stand-in for the device: what is shared with CUDA but for kernels and streams."""
    options = {"make": CudaExecutor, "device": FakeDevice(7), "verify": True}
    check_all(tmp_path, 11, 40, options, depth=2, max_step_tokens=24)


@pytest.mark.parametrize("seed", range(4))
def test_prompt_scores_and_embeddings_are_those_of_transformers(tmp_path: Path, seed: int) -> None:
    """In float32, in chunks, beside others."""
    rng = Random(seed)
    shape = rng.choice([{}, {"family": "qwen2"}, {"tied": True}, {"family": "qwen3"}])
    models = tiny_models(tmp_path, {"a": shape}, dtype="float32")
    vocab = models["a"].arch.vocab_size
    prompts = [tuple(rng.randrange(vocab) for _ in range(rng.randint(2, 90))) for _ in range(6)]
    kinds: list[dict[str, Any]] = [{"prompt_logprobs": 5}, {"embed": "last"}, {"embed": "mean"}]
    requests = [
        Request(id=RequestId(i), model=ModelName("a"), prompt=p, max_tokens=0, **kinds[i % 3])
        for i, p in enumerate(prompts)
    ]
    unit = play(models, unit_for(models, max_step_tokens=16), requests, rng)
    theirs = oracle(models["a"].path)
    for request in requests:
        with torch.inference_mode():
            out = theirs(torch.tensor([request.prompt]), output_hidden_states=True)
        if request.prompt_logprobs is not None:
            want = torch.log_softmax(out.logits[0, :-1].float(), dim=-1)
            for i, got in enumerate(unit.prompt_logprobs[request.id]):
                assert got.token == request.prompt[i + 1]
                assert abs(got.logprob - float(want[i, got.token])) < 2e-4
                top = want[i].topk(5).values.tolist()
                np.testing.assert_allclose([v for _, v in got.top], top, atol=2e-4)
            assert i + 2 == len(request.prompt)
            continue
        states = out.hidden_states[-1][0].numpy()
        wanted = states[-1] if request.embed == "last" else states.mean(0)
        parts = [np.frombuffer(p, dtype="<f4") for p in unit.embeddings[request.id]]
        got_state = np.sum(parts, axis=0)
        got_state /= 1 if request.embed == "last" else len(request.prompt)
        np.testing.assert_allclose(got_state, wanted, atol=2e-4)


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


def test_a_grammar_that_cannot_be_used_fails_alone(tmp_path: Path) -> None:
    """Also where the frontend's check cannot know: there is no tokenizer, or the fields of the
    request contradict each other."""
    models = tiny_models(tmp_path, {"a": MODELS["a"], "b": {}}, dtype="float64", page_tokens=8)
    eos = models["a"].spec.eos_ids
    letter = Tokenizer.from_file(str(models["a"].path / "tokenizer.json")).encode("b").ids[0]

    def asked(i: int, model: str, grammar: Grammar | None, **more: Any) -> Request:
        return Request(
            id=RequestId(i),
            model=ModelName(model),
            prompt=(7, 8, 9),
            max_tokens=12,
            sampling=Sampling(grammar=grammar),
            **more,
        )

    good = [asked(i, "a", grammar) for i, grammar in enumerate([None, *GRAMMARS])]
    bad = {
        90: (asked(90, "a", Grammar(kind="lark", text="start: nobody")), "cannot be used"),
        91: (asked(91, "b", Grammar(kind="json_object")), "no tokenizer for grammars"),
        92: (asked(92, "a", Grammar(kind="regex", text="b"), stop_ids=(letter,)), "can only go on"),
    }
    rng = Random(1)
    requests = [*good, *(request for request, _ in bad.values())]
    rng.shuffle(requests)
    unit = play(models, unit_for(models), requests, rng)
    plain = PlainModel(models["a"].path, "float64")
    for request in good:
        check_answer(unit, request, plain_answer(plain, request, eos))
    for i, (request, reason) in bad.items():
        assert unit.tokens[request.id] == []
        assert unit.errors[RequestId(i)].startswith("invalid_request: ")
        assert reason in unit.errors[RequestId(i)]


def test_a_plan_log_with_every_parameter_replays_bitwise(tmp_path: Path) -> None:
    """Promise 2: the same steps give the same bits and tokens, whatever runs between them."""
    models = tiny_models(tmp_path, MODELS, dtype="float32", page_tokens=8)
    rng = Random(6)
    requests = [random_request(i, models, rng) for i in range(20)]
    wanted, log = LogitsLog(), LogitsLog()
    unit = play(models, tight(models), requests, rng, logits_tap=wanted)
    steps = unit.recorder.record()
    assert any(row.outputs for step in steps for row in step.plan.rows)
    spec = unit_for(models, num_slots=12, parked_bytes=16 << 20)
    with Engine(models, spec, logits_tap=log) as engine:
        replayer = PlanReplayer(spec, [m.spec for m in models.values()], steps, seed=1)
        drive_replay(engine, replayer)
    assert replayer.mismatches() == []
    assert first_difference(wanted.kept, log.kept) is None
