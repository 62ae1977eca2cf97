"""The demo's own checkpoints: deterministic, of both classes, and such as weft reads."""

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from weft.models.hf_config import read_model_config

DEMO = Path(__file__).resolve().parents[2] / "demo"


@pytest.fixture
def demo_models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(DEMO), *sys.path])
    import models

    return models


@pytest.fixture
def speaker(tmp_path: Path) -> Path:
    """As much of a speaker as the others need: the tokenizer's files and three facts."""
    folder = tmp_path / "speaker"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text("{}")
    facts = {"vocab_size": 1024, "max_position_embeddings": 512, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def digest(folder: Path) -> str:
    whole = b"".join(path.read_bytes() for path in sorted(folder.iterdir()))
    return hashlib.sha256(whole).hexdigest()


def test_the_five_are_built_the_same_every_time(
    demo_models: ModuleType, speaker: Path, tmp_path: Path
) -> None:
    first = demo_models.build_all(tmp_path / "a", speaker=speaker)
    again = demo_models.build_all(tmp_path / "b", speaker=speaker)
    other = demo_models.build_all(tmp_path / "b2", speaker=speaker, seed=1)
    assert tuple(first) == demo_models.MODEL_NAMES
    for name in demo_models.MODEL_NAMES[1:]:
        assert digest(first[name]) == digest(again[name])
        assert digest(first[name]) != digest(other[name])
        assert not (tmp_path / "a" / f"{name}.new").exists()


def test_weft_reads_them_and_they_differ_where_models_differ(
    demo_models: ModuleType, speaker: Path, tmp_path: Path
) -> None:
    paths = demo_models.build_all(tmp_path / "a", speaker=speaker)
    archs = {name: read_model_config(paths[name]) for name in demo_models.MODEL_NAMES[1:]}
    assert {arch.family for arch in archs.values()} == {"llama", "qwen2"}
    assert {arch.tied_embeddings for arch in archs.values()} == {True, False}
    kinds = {
        "multi-head" if a.group_size == 1 else "multi-query" if a.num_kv_heads == 1 else "grouped"
        for a in archs.values()
    }
    assert kinds == {"multi-head", "multi-query", "grouped"}
    for name, arch in archs.items():
        tensors = load_file(paths[name] / "model.safetensors")
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
        assert ("lm_head.weight" in tensors) != arch.tied_embeddings
        assert ("model.layers.0.self_attn.q_proj.bias" in tensors) == arch.qkv_bias
        size = (paths[name] / "model.safetensors").stat().st_size
        assert 3e6 <= size <= 8e6
