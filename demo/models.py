"""Builds five small models with random weights in Hugging Face layout, beside the one that speaks.

    python3 demo/models.py --out .demo/models

Deterministic by seed and quick; no transformers. They share the speaker's tokenizer, so text goes
in and comes out; only the speaker's makes sense. Both classes, with multi-head, grouped-query and
multi-query attention, tied and untied embeddings, with and without biases, 4 to 8 MB each.
"""

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from hf_files import config_json, write_json, write_safetensors

HERE = Path(__file__).parent
SPEAKER = HERE / "speaker"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    model_class: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool


LLAMA, QWEN2 = "LlamaForCausalLM", "Qwen2ForCausalLM"
SHAPES = (
    Shape(
        name="loom", model_class=LLAMA, num_layers=4, hidden_size=256, intermediate_size=704,
        num_q_heads=4, num_kv_heads=4, head_dim=64, tied=False,
    ),
    Shape(
        name="shuttle", model_class=QWEN2, num_layers=4, hidden_size=256, intermediate_size=640,
        num_q_heads=4, num_kv_heads=2, head_dim=64, tied=True,
    ),
    Shape(
        name="heddle", model_class=LLAMA, num_layers=6, hidden_size=192, intermediate_size=512,
        num_q_heads=6, num_kv_heads=2, head_dim=32, tied=True,
    ),
    Shape(
        name="bobbin", model_class=QWEN2, num_layers=3, hidden_size=256, intermediate_size=512,
        num_q_heads=4, num_kv_heads=1, head_dim=64, tied=False,
    ),
    Shape(
        name="treadle", model_class=LLAMA, num_layers=2, hidden_size=320, intermediate_size=768,
        num_q_heads=5, num_kv_heads=1, head_dim=64, tied=False,
    ),
)  # fmt: skip
MODEL_NAMES = ("speaker", *(shape.name for shape in SHAPES))


def random_weights(shape: Shape, vocab_size: int, seed: int) -> dict[str, torch.Tensor]:
    """Weights scaled by fan-in, so that every layer moves the answer and attention matters."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        drawn = torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))
        tensors[name] = drawn.to(torch.bfloat16)

    def vector(name: str, size: int, mean: float, std: float) -> None:
        tensors[name] = (mean + std * torch.randn(size, generator=generator)).to(torch.bfloat16)

    h, d = shape.hidden_size, shape.head_dim
    q_size, kv_size = shape.num_q_heads * d, shape.num_kv_heads * d
    matrix("model.embed_tokens.weight", vocab_size, h, gain=2.0)
    for i in range(shape.num_layers):
        layer = f"model.layers.{i}."
        vector(layer + "input_layernorm.weight", h, 1.0, 0.1)
        for part, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            matrix(f"{layer}self_attn.{part}_proj.weight", size, h, gain=1.5)
            if shape.model_class == QWEN2:
                vector(f"{layer}self_attn.{part}_proj.bias", size, 0.0, 0.2)
        matrix(layer + "self_attn.o_proj.weight", h, q_size, gain=1.5)
        vector(layer + "post_attention_layernorm.weight", h, 1.0, 0.1)
        matrix(layer + "mlp.gate_proj.weight", shape.intermediate_size, h)
        matrix(layer + "mlp.up_proj.weight", shape.intermediate_size, h)
        matrix(layer + "mlp.down_proj.weight", h, shape.intermediate_size)
    vector("model.norm.weight", h, 1.0, 0.1)
    if not shape.tied:
        matrix("lm_head.weight", vocab_size, h, gain=2.0)
    return tensors


def build(shape: Shape, out: Path, speaker: Path, seed: int) -> None:
    """Write one checkpoint folder, whole or not at all."""
    config = json.loads((speaker / "config.json").read_text(encoding="utf-8"))
    staging = out.with_name(out.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(speaker / name, staging / name)
    write_json(
        staging / "config.json",
        config_json(
            shape.model_class,
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=config["vocab_size"],
            context=config["max_position_embeddings"],
            tied=shape.tied,
            end_id=config["eos_token_id"],
        ),
    )
    tensors = random_weights(shape, config["vocab_size"], seed)
    write_safetensors(staging / "model.safetensors", tensors)
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)


def build_all(out: Path, *, speaker: Path = SPEAKER, seed: int = 0) -> dict[str, Path]:
    """All six, name -> folder. The speaker is served from where it is."""
    paths = {"speaker": speaker}
    for index, shape in enumerate(SHAPES):
        paths[shape.name] = out / shape.name
        build(shape, paths[shape.name], speaker, seed * 1000 + index)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo's small random models.")
    parser.add_argument("--out", type=Path, default=Path(".demo/models"))
    parser.add_argument("--speaker", type=Path, default=SPEAKER, help="whose tokenizer they share")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, path in build_all(args.out, speaker=args.speaker, seed=args.seed).items():
        size = (path / "model.safetensors").stat().st_size
        print(f"{name:8} {size / 1e6:5.1f} MB  {path}")


if __name__ == "__main__":
    main()
