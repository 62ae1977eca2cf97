"""`weft check`: a folder in numbers, and everything wrong with it at once."""

import json
from pathlib import Path

import numpy as np
import pytest

from support.tiny import CLASSES, tiny_checkpoint
from weft.core.errors import WeftError
from weft.models.check import check_checkpoint
from weft.models.hf_config import read_model_config
from weft.models.image import build_image, image_key, image_layout
from weft.models.safetensors_file import open_checkpoint


def test_a_good_checkpoint(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, family="qwen2", dtype="bfloat16", shards=2)
    report = check_checkpoint(path)
    assert report.servable
    assert report.notes == ()
    assert (report.class_name, report.family, report.dtype) == (
        "Qwen2ForCausalLM",
        "qwen2",
        "bfloat16",
    )
    assert (report.num_layers, report.num_q_heads, report.num_kv_heads, report.head_dim) == (
        2,
        4,
        2,
        16,
    )
    assert report.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert (report.page_tokens, report.page_bytes) == (128, 128 * 256)
    assert report.tokenizer
    assert report.chat_template
    assert report.eos_ids == (2,)
    assert report.shards == 2
    assert report.stored_dtypes == {"bfloat16": 2 * report.parameters}
    for dtype, size in report.image_bytes.items():
        assert size == image_layout(read_model_config(path, dtype)).num_bytes


@pytest.mark.parametrize("family", sorted(CLASSES))
def test_every_class_is_checked(tmp_path: Path, family: str) -> None:
    report = check_checkpoint(tiny_checkpoint(tmp_path, family=family))
    assert report.problems == ()
    assert report.class_name == CLASSES[family]
    assert report.stored_dtypes == {"float32": 4 * (report.parameters or 0)}
    assert report.window == (24 if family.startswith("gemma") else None)


def test_an_empty_folder_lists_what_is_missing(tmp_path: Path) -> None:
    report = check_checkpoint(tmp_path)
    assert not report.servable
    assert len(report.problems) == 2
    assert "config.json" in report.problems[0]
    assert "model.safetensors" in report.problems[1]
    assert len(report.notes) == 2
    assert "plain one" in report.notes[1], "the server falls back to a template of its own"


def test_several_faults_are_told_at_once(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, eos=500, tokenizer=False)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 130}))
    (path / "tokenizer_config.json").write_text("[")
    report = check_checkpoint(path)
    assert len(report.problems) == 2
    assert "gate_proj" in report.problems[0]
    assert "tokenizer_config.json" in report.problems[1]
    assert any("500" in note for note in report.notes)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_garbage_in_any_file_is_a_problem_not_a_crash(tmp_path: Path, name: str) -> None:
    path = tiny_checkpoint(tmp_path)
    (path / name).write_bytes(b"\xff\x00garbage" * 10)
    report = check_checkpoint(path)
    assert not report.servable
    assert any(name in problem for problem in report.problems)


def test_flipped_bytes_anywhere_are_read_or_refused(tmp_path: Path) -> None:
    """Random damage to every file of a sharded checkpoint, all the way to the image."""
    path = tiny_checkpoint(tmp_path, shards=2, layers=1, hidden=16, heads=2, kv_heads=1)
    rng = np.random.default_rng(0)
    refused = 0
    for file in sorted(path.glob("*")):
        whole = file.read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for at in rng.integers(0, min(len(whole), 3000), int(rng.integers(1, 4))):
                damaged[int(at)] = int(rng.integers(256))
            file.write_bytes(damaged)
            report = check_checkpoint(path)
            try:
                arch = read_model_config(path)
                image_key(path, arch)
                with open_checkpoint(path) as checkpoint:
                    size = image_layout(arch).num_bytes
                    if size < 1 << 24:
                        build_image(checkpoint, arch, memoryview(bytearray(size)))
            except WeftError:
                refused += 1
                assert not report.servable
        file.write_bytes(whole)
    assert refused > 50
