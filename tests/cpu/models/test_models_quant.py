"""Quantized models against plain models of the same numbers; and the canary for each form."""

from pathlib import Path

import numpy as np
import pytest
import torch

from support.plain import PlainModel, packed_weights
from support.quant_tiny import FORMS, quant_checkpoint
from support.tiny_adapter import lora_weights, tiny_adapter
from weft.core.errors import WeftError
from weft.core.model import STORED_BYTES
from weft.models import image as image_module
from weft.models.check import check_checkpoint
from weft.models.hf_config import read_model_config
from weft.models.image import build_image, image_key, image_layout
from weft.models.safetensors_file import open_checkpoint

NEW_TOKENS = 12
TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 0.0}
"""Of logits of about unit size. The weights are the same bits in every dtype but float64, where
the products round in another order."""


def prompt_of(seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(6, 128, 30)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float64") for name in FORMS),
        *(("fp8-channel", "float32"), ("fp8-block", "bfloat16")),
        *(("awq-32", "float32"), ("gptq", "bfloat16")),
    ],
)
def test_a_quantized_model_is_the_plain_model_of_its_numbers(
    tmp_path: Path, name: str, dtype: str
) -> None:
    quant, plain = quant_checkpoint(tmp_path, FORMS[name], family="qwen2")
    ours, theirs = PlainModel(quant, dtype=dtype), PlainModel(plain, dtype=dtype)
    tokens, logits = ours.generate(prompt_of(1), NEW_TOKENS)
    expected, expected_logits = theirs.generate(prompt_of(1), NEW_TOKENS)
    assert float((logits - expected_logits).abs().max()) <= TOLERANCE[dtype]
    assert tokens == expected


@pytest.mark.parametrize("name", ["fp8-tensor", "awq-32", "packed-asym"])
@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3", "phi3"])
def test_other_classes(tmp_path: Path, family: str, name: str) -> None:
    """Norms, windows and fused projections around quantized matrices; parts of a matrix that is
    one in the checkpoint."""
    quant, plain = quant_checkpoint(tmp_path, FORMS[name], family=family)
    ours, theirs = PlainModel(quant, dtype="float64"), PlainModel(plain, dtype="float64")
    tokens, logits = ours.generate(prompt_of(5), 6)
    expected, expected_logits = theirs.generate(prompt_of(5), 6)
    assert tokens == expected
    assert float((logits - expected_logits).abs().max()) <= TOLERANCE["float64"]


def test_adapters_on_a_quantized_base(tmp_path: Path) -> None:
    """As on the plain base of the same numbers; and they do change the answer."""
    quant, plain = quant_checkpoint(tmp_path, FORMS["awq-32"])
    ours, theirs = PlainModel(quant, dtype="float64"), PlainModel(plain, dtype="float64")
    bare, _ = ours.generate(prompt_of(6), NEW_TOKENS)
    path = tiny_adapter(tmp_path / "adapter", theirs.arch)
    for model in (ours, theirs):
        model.adapter = lora_weights(path, model.arch)
    tokens, _ = ours.generate(prompt_of(6), NEW_TOKENS)
    assert tokens == theirs.generate(prompt_of(6), NEW_TOKENS)[0]
    assert tokens != bare


@pytest.mark.parametrize("name", ["fp8-channel", "awq-32", "gptq", "packed-asym"])
def test_batches_and_chunks_change_no_token(tmp_path: Path, name: str) -> None:
    quant, _ = quant_checkpoint(tmp_path, FORMS[name])
    plain, _ = PlainModel(quant, dtype="float64").generate(prompt_of(2), NEW_TOKENS)
    for chunk in (1, 7):
        model = PlainModel(quant, dtype="float64", page_tokens=3)
        assert model.generate(prompt_of(2), NEW_TOKENS, chunk=chunk, seed=chunk)[0] == plain


@pytest.mark.parametrize("name", ["fp8-tensor", "awq-32", "gptq", "packed-sym"])
def test_canary(tmp_path: Path, name: str) -> None:
    """A changed code, zero point or scale of any quantized matrix changes the answer."""
    quant, _ = quant_checkpoint(tmp_path, FORMS[name])
    model = PlainModel(quant, dtype="float64")
    _, logits = model.generate(prompt_of(3), 4)
    layout = image_layout(model.arch)
    weights = packed_weights(quant, model.arch)
    for matrix in ("qkv", "o", "gate_up", "down"):
        for suffix in ("", ".scale", ".zero"):
            entry = layout.tensors.get(f"layers.1.{matrix}{suffix}")
            if entry is None:
                assert suffix == ".zero"
                assert name.startswith("fp8")
                continue
            broken = weights.clone()
            # Its last byte, which for scales is the one with the exponent; 0x12 keeps it finite.
            broken[entry.offset + entry.num_bytes - 1] ^= 0x12
            other = PlainModel(quant, dtype="float64")
            other.decoder = type(model.decoder)(model.arch, broken)
            _, changed = other.generate(prompt_of(3), 4)
            assert not torch.equal(changed, logits), (matrix, suffix)


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-plain-block", "awq-32", "gptq"])
def test_mixed_layers(tmp_path: Path, name: str) -> None:
    """Matrices that were left alone, named in `modules_to_not_convert`, `ignore` or nowhere."""

    def dense(module: str) -> bool:
        return "layers.1.mlp" in module or module.endswith("layers.0.self_attn.o_proj")

    quant, plain = quant_checkpoint(tmp_path, FORMS[name], dense=dense, tied=True)
    ours, theirs = PlainModel(quant, dtype="float64"), PlainModel(plain, dtype="float64")
    assert ours.arch.quant is not None
    assert ours.arch.quant.dense == ("layers.0.o", "layers.1.gate_up", "layers.1.down")
    tokens, _ = ours.generate(prompt_of(4), NEW_TOKENS)
    assert tokens == theirs.generate(prompt_of(4), NEW_TOKENS)[0]


def test_a_matrix_that_is_quantized_in_part_is_refused(tmp_path: Path) -> None:
    quant, _ = quant_checkpoint(
        tmp_path, FORMS["awq-32"], dense=lambda module: module.endswith("layers.1.self_attn.k_proj")
    )
    with pytest.raises(WeftError, match="only some are quantized"):
        read_model_config(quant)


@pytest.mark.parametrize(("name", "share"), [("fp8-channel", 0.3), ("awq-128", 0.2)])
def test_images_are_small(tmp_path: Path, name: str, share: float) -> None:
    """A switch moves a quarter and an eighth of float32's bytes, and scales."""
    quant, plain = quant_checkpoint(tmp_path, FORMS[name])
    ours, theirs = (image_layout(read_model_config(path, "float32")) for path in (quant, plain))
    matrices = sum(e.num_bytes for e in ours.extents if e.name.startswith("layers"))
    assert matrices < share * sum(
        e.num_bytes for e in theirs.extents if e.name.startswith("layers")
    )


@pytest.mark.parametrize("name", ["fp8-block", "awq-32", "gptq", "packed-asym"])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_is_written_once_however_it_is_cut(
    tmp_path: Path, name: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quant, _ = quant_checkpoint(tmp_path, FORMS[name])
    arch = read_model_config(quant)
    layout = image_layout(arch)
    end = 0
    for entry in sorted(layout.tensors.values(), key=lambda entry: entry.offset):
        assert entry.offset >= end
        assert entry.num_bytes == int(np.prod(entry.shape)) * STORED_BYTES[entry.dtype]
        end = entry.offset + entry.num_bytes
        assert entry.scale is None or entry.scale in layout.tensors
    whole = packed_weights(quant, arch)
    monkeypatch.setattr(image_module, "PIECE_BYTES", 1000)
    monkeypatch.setattr("weft.models.quant_image.SLAB_BYTES", 1000)
    out = np.full(layout.num_bytes, 0xAB, dtype=np.uint8)
    seen: list[int] = []
    with open_checkpoint(quant) as checkpoint:
        build_image(checkpoint, arch, memoryview(out), threads=threads, progress=seen.append)
    assert sum(seen) == layout.num_bytes
    assert np.array_equal(out, whole.numpy())


def test_values_are_checked_before_the_first_byte(tmp_path: Path) -> None:
    def damage(stored: dict[str, tuple[str, np.ndarray]]) -> None:
        dtype, scales = stored["model.layers.1.mlp.down_proj.scales"]
        stored["model.layers.1.mlp.down_proj.scales"] = (dtype, scales * np.float16("inf"))

    quant, _ = quant_checkpoint(tmp_path, FORMS["awq-32"], change=damage)
    arch = read_model_config(quant)
    out = np.full(image_layout(arch).num_bytes, 0xAB, dtype=np.uint8)
    with open_checkpoint(quant) as checkpoint, pytest.raises(WeftError, match=r"layers\.1.*finite"):
        build_image(checkpoint, arch, memoryview(out))
    assert bool((out == 0xAB).all())


def test_fp8_weights_without_a_word_in_config_json(tmp_path: Path) -> None:
    """And scales that are missing: never read as if they were 1."""
    quant, _ = quant_checkpoint(tmp_path, FORMS["fp8-tensor"])
    config = quant / "config.json"
    config.write_text(config.read_text().replace('"quantization_config"', '"other"'))
    report = check_checkpoint(quant)
    assert "is stored as float8_e4m3" in report.problems[0]
    other, _ = quant_checkpoint(
        tmp_path / "2",
        FORMS["fp8-tensor"],
        change=lambda stored: stored.pop("model.layers.1.mlp.down_proj.weight_scale") and None,
    )
    with pytest.raises(WeftError, match=r"down_proj\.weight' is stored as float8_e4m3"):
        PlainModel(other)


def test_the_check_command_sees_what_is_wrong(tmp_path: Path) -> None:
    good, _ = quant_checkpoint(tmp_path, FORMS["gptq"])
    report = check_checkpoint(good)
    assert report.servable, report.problems
    assert report.stored_dtypes["int32"] > report.stored_dtypes["float16"]
    assert report.quantization == "gptq, groups of 64"
    bad, _ = quant_checkpoint(tmp_path / "bad", FORMS["gptq"], config={"group_size": 128})
    assert "ask for [1, 16]" in check_checkpoint(bad).problems[0]


def test_the_key_knows_the_form(tmp_path: Path) -> None:
    quant, _ = quant_checkpoint(tmp_path, FORMS["gptq"])
    key = image_key(quant, read_model_config(quant))
    config = quant / "config.json"
    config.write_text(
        config.read_text().replace('"checkpoint_format": "gptq"', '"checkpoint_format": "gptq_v2"')
    )
    assert image_key(quant, read_model_config(quant)) != key


def test_a_scale_a_tensor_by_the_name_transformers_gives_it(tmp_path: Path) -> None:
    """`weight_block_size` null: FP8Linear of transformers has a scalar `weight_scale_inv`."""

    def rename(stored: dict[str, tuple[str, np.ndarray]]) -> None:
        for name in [name for name in stored if name.endswith(".weight_scale")]:
            stored[f"{name}_inv"] = stored.pop(name)

    path, plain = quant_checkpoint(tmp_path, FORMS["fp8-plain"], change=rename)
    model, theirs = PlainModel(path, dtype="float64"), PlainModel(plain, dtype="float64")
    assert model.arch.quant is not None and model.arch.quant.form == "fp8_inv"
    ours, logits = model.generate(prompt_of(0), NEW_TOKENS)
    expected, wanted = theirs.generate(prompt_of(0), NEW_TOKENS)
    assert ours == expected and float((logits - wanted).abs().max()) < TOLERANCE["float64"]
