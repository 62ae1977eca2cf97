"""Parameters of requests on the device: the draw equals the CPU's, nothing waits for the device,
and what streams report agrees with a float32 reference on the same tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from support.answers import GRAMMARS, random_sampling
from support.engine_kit import Engine, TinyModel, tiny_models, unit_for
from support.gpu import needs_gpu
from support.plain import PlainModel, make_batch
from support.unit_kit import UnitRun
from weft.core.actions import Row
from weft.core.ids import ModelName, RequestId, SlotId
from weft.core.request import Request, Sampling
from weft.engine.adjust import (
    Adjustments,
    Bias,
    Entries,
    Masks,
    Penalties,
    adjust,
    bias_arrays,
    penalty_arrays,
)
from weft.engine.base import Executor
from weft.engine.logprobs import score
from weft.engine.sampler import SamplingBatch, sample

pytestmark = needs_gpu

ROWS, VOCAB = 48, 32_003
GRANULE = 2 << 20


def random_rows(rng: Random) -> list[Row]:
    rows: list[Row] = []
    for i in range(ROWS):
        sampling = random_sampling(rng, VOCAB)
        outputs = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(200)))
        rows.append(
            Row(
                request=RequestId(i),
                slot=SlotId(i),
                start=0,
                num_tokens=1,
                input=None,
                sample=sampling,
                output_index=len(outputs),
                stop_ids=(3, 5),
                min_remaining=rng.choice([0, 2]),
                outputs=outputs,
                prompt_ids=tuple(sorted(rng.sample(range(VOCAB), 300))),
            )
        )
    return rows


def on_device(rows: list[Row], words: torch.Tensor, device: str) -> Adjustments:
    def put(arrays: list[np.ndarray]) -> list[torch.Tensor]:
        return [torch.tensor(array).to(device) for array in arrays]

    at, ids, values = put(bias_arrays(rows))
    places, tokens, factors, shifts = put(penalty_arrays(rows))
    return Adjustments(
        masks=Masks(torch.arange(0, ROWS, 3, device=device), words.to(device)),
        bias=Bias(Entries(at, ids), values),
        penalties=Penalties(Entries(places, tokens), factors, shifts),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_device_draws_what_the_cpu_draws(dtype: torch.dtype) -> None:
    """And scores to rounding; and while it is launched the host never waits."""
    rng = Random(0)
    rows = random_rows(rng)
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(ROWS, VOCAB, generator=generator) * 4).to(dtype)
    words = torch.randint(-(1 << 31), 1 << 31, (ROWS // 3, -(-VOCAB // 32)), generator=generator)
    words = words.to(torch.int32)
    batch = SamplingBatch.from_rows(rows)
    here = on_device(rows, words, "cpu")
    wanted = sample(adjust(logits, here), batch)
    there, moved = on_device(rows, words, "cuda"), batch.to("cuda")
    far = logits.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        adjusted = adjust(far, there)
        drawn = sample(adjusted, moved)
        scored = score(far, drawn, 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(adjusted.cpu(), adjust(logits, here), rtol=1e-6, atol=1e-6)
    # Gumbel noise takes logarithms, which differ in the last place: a near tie may part.
    assert int((drawn.cpu() == wanted).sum()) >= ROWS - 1
    expected = score(logits, drawn.cpu(), 20)
    assert torch.equal(scored[:, 1:21].cpu(), expected[:, 1:21]) or dtype == torch.float32
    torch.testing.assert_close(scored.cpu()[:, 21:], expected[:, 21:], rtol=1e-5, atol=1e-5)


def make(*args: object, **options: object) -> Executor:
    from weft.engine.cuda_executor import CudaExecutor

    return CudaExecutor(*args, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    folder = tmp_path_factory.mktemp("models")
    shape = {"layers": 3, "hidden": 256, "heads": 8, "kv_heads": 2, "head_dim": 64}
    return tiny_models(folder, {"a": {**shape, "tokenizer": True}}, dtype="float32", page_tokens=16)


@pytest.fixture
def engine(models: dict[str, TinyModel]) -> Iterator[Engine]:
    unit = unit_for(
        models, granule_bytes=GRANULE, host_chunk_bytes=1 << 20, kv_tokens=8192, max_repeat=4
    )
    with Engine(models, unit, make=make, verify=True) as made:
        yield made


def test_streams_report_what_a_reference_says_of_the_same_tokens(engine: Engine) -> None:
    rng = Random(2)
    vocab = engine.models["a"].arch.vocab_size
    requests = [
        Request(
            id=RequestId(i),
            model=ModelName("a"),
            prompt=tuple(rng.randrange(vocab) for _ in range(rng.randint(2, 120))),
            max_tokens=rng.randint(1, 24),
            sampling=Sampling(
                temperature=rng.choice([0.0, 1.0]),
                seed=i,
                logprobs=3,
                repetition_penalty=rng.choice([1.0, 1.2]),
                min_p=0.05,
            ),
            prompt_logprobs=rng.choice([None, 2]),
            ignore_eos=True,
        )
        for i in range(20)
    ]
    unit = UnitRun(engine)
    for request in requests:
        unit.request(request)
    unit.drain()
    assert not unit.errors
    plain = PlainModel(engine.models["a"].path, "float32")
    for request in requests:
        tokens = [*request.prompt, *unit.tokens[request.id]]
        wanted = _log_softmax(plain, tokens)
        said = [*unit.prompt_logprobs.get(request.id, ())]
        first = 1 if request.prompt_logprobs is not None else len(request.prompt)
        said += unit.logprobs[request.id]
        assert [one.token for one in said] == tokens[first:]
        for position, one in enumerate(said, first):
            values = [one.logprob, *(value for _, value in one.top)]
            ids = [one.token, *(token for token, _ in one.top)]
            np.testing.assert_allclose(values, wanted[position - 1, ids], atol=5e-3)


def test_embeddings_and_grammars(engine: Engine) -> None:
    vocab = engine.models["a"].arch.vocab_size
    rng = Random(4)
    prompts = [tuple(rng.randrange(vocab) for _ in range(n)) for n in (1, 40, 150)]
    embeds = [
        Request(id=RequestId(i), model=ModelName("a"), prompt=prompt, max_tokens=0, embed=kind)
        for i, (prompt, kind) in enumerate((p, k) for p in prompts for k in ("last", "mean"))
    ]
    grammars = [
        Request(
            id=RequestId(100 + i),
            model=ModelName("a"),
            prompt=prompts[1],
            max_tokens=60,
            sampling=Sampling(temperature=1.0, seed=i, grammar=grammar),
        )
        for i, grammar in enumerate(GRAMMARS)
    ]
    unit = UnitRun(engine)
    for request in [*embeds, *grammars]:
        unit.request(request)
    unit.drain()
    assert not unit.errors
    plain = PlainModel(engine.models["a"].path, "float32")
    for request in embeds:
        states = _final_states(plain, request.prompt)
        want = states[-1] if request.embed == "last" else states.mean(0)
        parts = [np.frombuffer(part, dtype="<f4") for part in unit.embeddings[request.id]]
        got = np.sum(parts, axis=0) / (1 if request.embed == "last" else len(request.prompt))
        np.testing.assert_allclose(got, want.numpy(), atol=5e-3, rtol=5e-3)
    ended = [r for r in grammars if unit.finish[r.id] == "stop"]
    assert ended
    for request in ended:
        if request.sampling.grammar and request.sampling.grammar.kind.startswith("json"):
            json.loads(_text(engine.models["a"].path, unit.tokens[request.id]))


def _final_states(model: PlainModel, prompt: tuple[int, ...] | list[int]) -> torch.Tensor:
    pages = model.random_pages(len(prompt), np.random.default_rng(0))
    batch = make_batch([(prompt, 0)], [pages])
    model.attention.plan(batch, model.kv)
    states = model.decoder.run_layers(batch, model.attention, model.kv)
    return model.decoder.final_states(states, torch.arange(len(prompt)))


def _log_softmax(model: PlainModel, tokens: list[int]) -> np.ndarray:
    logits = model.decoder.logits(_final_states(model, tokens))
    return torch.log_softmax(logits.float(), dim=-1).numpy()


def _text(path: Path, tokens: list[int]) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(path / "tokenizer.json")).decode(tokens))
