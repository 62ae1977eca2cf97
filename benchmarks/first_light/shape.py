"""Qwen2.5-7B's shape, and steps of it without a scheduler."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from weft.core.actions import Row, StepPlan
from weft.core.ids import ModelName, PageId, RequestId, SlotId
from weft.core.model import Architecture, ModelSpec, RopeSpec, model_spec
from weft.core.request import Sampling
from weft.core.unit import UnitSpec
from weft.engine.base import ImageRef
from weft.engine.cuda_device import CudaDevice
from weft.engine.model import BoundModel, bind_model
from weft.engine.runner import Runner
from weft.models.decoder import Decoder
from weft.models.layout import image_layout

GRANULE_BYTES = 64 << 20
CONTEXT_TOKENS = 32768


def qwen_config() -> dict[str, Any]:
    """config.json of the shape."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 151643,
    }


def tiny_config() -> dict[str, Any]:
    """A small shape of the same class, to try the scripts."""
    return qwen_config() | {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "eos_token_id": 2047,
        "max_position_embeddings": 2048,
    }


def qwen_architecture() -> Architecture:
    """The same as the engine sees it, for runs without files."""
    return Architecture(
        family="qwen2",
        num_layers=28,
        hidden_size=3584,
        intermediate_size=18944,
        num_q_heads=28,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=152064,
        max_position=CONTEXT_TOKENS,
        norm_eps=1e-6,
        rope=RopeSpec(theta=1000000.0),
        qkv_bias=True,
        tied_embeddings=False,
        dtype="bfloat16",
    )


def granules(num_bytes: int) -> int:
    return -(-num_bytes // GRANULE_BYTES)


class Bench:
    """One model with random weights in an arena, stepped by a Runner."""

    def __init__(self, *, kv_tokens: int, max_rows: int = 256, max_step_tokens: int = 8192) -> None:
        self.device = CudaDevice()
        self.arch = qwen_architecture()
        layout = image_layout(self.arch)
        self.spec: ModelSpec = model_spec(
            "bench", self.arch, weight_bytes=layout.num_bytes, eos_ids=()
        )
        weights = granules(layout.num_bytes)
        kv = granules(-(-kv_tokens // self.spec.page_tokens) * self.spec.page_bytes)
        self.unit = UnitSpec(
            granule_bytes=GRANULE_BYTES,
            num_granules=weights + kv,
            host_bytes=0,
            num_slots=max_rows,
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
        )
        self.arena = self.device.arena(self.unit)
        self.stream = self.device.stream()
        with self.stream.use():
            self.model: BoundModel = bind_model(
                self.arena,
                self.unit,
                self.spec,
                self.arch,
                ImageRef(key="random", offset=0, num_bytes=layout.num_bytes),
                partial(Decoder, ops=self.device.ops()),
            )
            self.arena.map("bench", "weights", range(weights), range(weights))
            self.arena.map("bench", "kv", range(kv), range(weights, weights + kv))
            self.model.weights_bytes.view(torch.bfloat16).normal_(0.0, 0.02)
            self.model.kv_bytes[: kv * GRANULE_BYTES].view(torch.bfloat16).normal_()
            last = torch.zeros(max_rows, dtype=torch.int64, device="cuda")
            self.runner = Runner(
                self.unit,
                self.device.torch_device,
                self.device.attention(),
                last,
                sampler=self.device.sampler(),
            )

    def rows(self, starts: Sequence[int], counts: Sequence[int]) -> tuple[Row, ...]:
        """Rows at these positions, pages one after another."""
        out, page = [], 0
        for slot, (start, count) in enumerate(zip(starts, counts, strict=True)):
            need = -(-(start + count) // self.spec.page_tokens)
            out.append(
                Row(
                    request=RequestId(slot),
                    slot=SlotId(slot),
                    start=start,
                    num_tokens=count,
                    input=None if count == 1 else tuple(range(count)),
                    sample=Sampling(temperature=0.6, seed=slot),
                    append_pages=tuple(PageId(page + i) for i in range(need)),
                )
            )
            page += need
        return tuple(out)

    def step(self, rows: tuple[Row, ...]) -> tuple[float, float]:
        """(milliseconds the CPU took to launch, milliseconds on the device)."""
        plan = StepPlan(model=ModelName("bench"), rows=rows)
        with self.stream.use():
            begin_s = time.perf_counter()
            begin = self.stream.record()
            step = self.runner.prepare(self.model, plan)
            self.runner.iterate(step)
            end = self.stream.record()
            launched_s = time.perf_counter() - begin_s
            self.stream.synchronize()
            step.release()
        return launched_s * 1e3, self.device.elapsed_ns(begin, end) / 1e6

    def measure(
        self, starts: Sequence[int], counts: Sequence[int], repeats: int = 12
    ) -> dict[str, float]:
        """Medians after three warm-ups."""
        rows = self.rows(starts, counts)
        times = [self.step(rows) for _ in range(repeats + 3)][3:]
        middle = len(times) // 2
        return {
            "launch_ms": round(sorted(t[0] for t in times)[middle], 2),
            "device_ms": round(sorted(t[1] for t in times)[middle], 2),
        }

    def close(self) -> None:
        torch.cuda.synchronize()
        self.arena.close()
