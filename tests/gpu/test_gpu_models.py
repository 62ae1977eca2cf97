"""The decoder and the sampler on a CUDA device: the same meaning as on the CPU, and no step that
waits for the device."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from support.gpu import to_cuda
from support.plain import PlainModel, make_batch, packed_weights
from support.tiny import CLASSES, tiny_checkpoint
from weft.attention.reference import ReferenceAttention
from weft.core.actions import Row
from weft.core.ids import RequestId, SlotId
from weft.core.request import Sampling
from weft.engine.sampler import SamplingBatch, noise_bits, sample
from weft.models.decoder import Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = "cuda"


@contextmanager
def no_host_synchronisation() -> Iterator[None]:
    """Anything in here that waits for the device raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", sorted(CLASSES))
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-3)])
def test_forward_on_cuda_equals_forward_on_the_cpu(
    tmp_path: Path, family: str, dtype: str, tolerance: float
) -> None:
    """A mixed step after a prefill; and forward itself never waits for the device."""
    rope = "longrope" if family == "phi3" else "llama3"
    path = tiny_checkpoint(tmp_path, family=family, layers=3, rope=rope)
    model = PlainModel(path, dtype=dtype)
    decoder = Decoder(model.arch, packed_weights(path, model.arch).to(CUDA))
    kv_bytes = model.page_tokens * model.arch.kv_bytes_per_token * model.num_pages
    kv = decoder.kv_view(torch.zeros(kv_bytes, dtype=torch.uint8, device=CUDA), model.page_tokens)
    kv.pages.fill_(float("nan"))
    rng = np.random.default_rng(0)
    prompts = [[int(t) for t in rng.integers(0, 128, n)] for n in (40, 9, 70)]
    pages = [[int(p) for p in part] for part in np.split(rng.permutation(60), 3)]
    steps = [
        make_batch([(p, 0) for p in prompts], pages),
        make_batch([([5], 40), ([7, 8, 9], 9), ([11], 70)], pages),
    ]
    attention = ReferenceAttention()
    for step in steps:
        expected = model.forward(step)
        on_device = to_cuda(step)
        attention.plan(on_device, kv)
        with no_host_synchronisation():
            logits = decoder.forward(on_device, attention, kv)
        assert float((logits.cpu() - expected).abs().max()) < tolerance


def test_noise_is_the_same_on_every_device() -> None:
    seeds, indexes = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)]), torch.arange(5) * 12345
    ids = torch.arange(4096)
    there = noise_bits(seeds.to(CUDA), indexes.to(CUDA), ids.to(CUDA))
    assert torch.equal(there.cpu(), noise_bits(seeds, indexes, ids))


def random_rows(count: int) -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        Row(
            request=RequestId(i),
            slot=SlotId(i),
            start=0,
            num_tokens=1,
            input=None,
            sample=Sampling(
                temperature=float(rng.choice([0.0, 0.5, 1.5])),
                top_p=float(rng.choice([1.0, 0.9, 0.3])),
                top_k=int(rng.choice([0, 1, 20])),
                seed=i,
            ),
            output_index=i,
            stop_ids=(1, 2, 3),
            min_remaining=i % 2,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [128, 32000])
def test_tokens_drawn_on_cuda(dtype: torch.dtype, vocab: int) -> None:
    """Without waiting; as on the CPU but for the last bit of a logarithm; not depending on the
    row's company; ties to the lowest id."""
    rows = random_rows(64)
    logits = (torch.randn(64, vocab, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    on_cpu = sample(logits, SamplingBatch.from_rows(rows))
    batch, there = SamplingBatch.from_rows(rows, CUDA), logits.to(CUDA)
    with no_host_synchronisation():
        drawn = sample(there, batch)
    assert int((drawn.cpu() != on_cpu).sum()) <= 1
    alone = [
        sample(there[i : i + 1], SamplingBatch.from_rows(rows[i : i + 1], CUDA)) for i in range(64)
    ]
    assert torch.equal(torch.cat(alone), drawn)
    flat = torch.zeros(4, vocab, dtype=dtype, device=CUDA)
    flat[:, 77:] = 1
    greedy = [greedy_row(row) for row in rows[:4]]
    assert sample(flat, SamplingBatch.from_rows(greedy, CUDA)).tolist() == [77] * 4


def greedy_row(row: Row) -> Row:
    return Row(
        request=row.request, slot=row.slot, start=0, num_tokens=1, input=None, sample=Sampling()
    )
