"""Quantized modules of a checkpoint as codes, zero points and scales: packing orders by hand, every
form against its formula, refusals by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.quant_tiny import FORMS, Form, write_stored
from weft.core.errors import WeftError
from weft.core.model import QuantForm, QuantSpec
from weft.models.quant import QuantModule, nibbles, pack_runs
from weft.models.quant_config import QuantClaim, quant_spec, read_claim
from weft.models.safetensors_file import open_checkpoint

WORD = np.array([[0x76543210]], dtype=np.int32)
"""Nibble i is i."""


def spec_of(form: QuantForm, group: int, symmetric: bool = False) -> QuantSpec:
    return QuantSpec(
        form=form,
        kind="fp8" if form.startswith("fp8") else "int4",
        group_size=group,
        scale_dtype="float16",
        symmetric=symmetric,
    )


def module_of(
    folder: Path, quant: QuantSpec, tensors: dict[str, tuple[str, np.ndarray]], shape: Any
) -> QuantModule:
    write_stored(folder / "model.safetensors", {f"m.{k}": v for k, v in tensors.items()})
    return QuantModule(open_checkpoint(folder), quant, "m", shape[0], shape[1])


def test_nibbles_are_counted_from_the_lowest_bits() -> None:
    assert nibbles(WORD).tolist() == [[list(range(8))]]
    assert nibbles(np.array([-1, 1], dtype=np.int32)).tolist() == [[15] * 8, [1] + [0] * 7]


def test_awq_order_by_hand(tmp_path: Path) -> None:
    """Nibbles 0 .. 7 of a word are outputs 0, 2, 4, 6, 1, 3, 5, 7, in weights and zero points."""
    qweight = np.zeros((32, 1), dtype=np.int32)
    qweight[5] = WORD
    tensors = {
        "qweight": ("I32", qweight),
        "qzeros": ("I32", WORD),
        "scales": ("F16", np.ones((1, 8), dtype=np.float16)),
    }
    module = module_of(tmp_path, spec_of("awq", 32), tensors, (8, 32))
    module.check_headers()
    module.check_values()
    outputs = [0, 4, 1, 5, 2, 6, 3, 7]
    assert module.codes(slice(0, 32), slice(0, 8))[5].tolist() == outputs
    assert not module.codes(slice(0, 32), slice(0, 8))[:5].any()
    assert module.zeros().tolist() == [outputs]


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq_order_by_hand(tmp_path: Path, form: QuantForm) -> None:
    """Nibble i of a weight's word is input i, of a zero point's word output i; the first format
    stores zero points less one."""
    qweight = np.zeros((4, 8), dtype=np.int32)
    qweight[1, 3] = WORD[0, 0]
    zeros = np.array([[-0x0123456 - 1]], dtype=np.int32)  # 0xfedcba9 in nibbles 0 .. 6, 15 in 7
    tensors = {
        "qweight": ("I32", qweight),
        "qzeros": ("I32", zeros),
        "scales": ("F16", np.ones((1, 8), dtype=np.float16)),
    }
    module = module_of(tmp_path, spec_of(form, 32), tensors, (8, 32))
    module.check_headers()
    module.check_values()
    assert module.codes(slice(0, 32), slice(0, 8))[8:16, 3].tolist() == list(range(8))
    assert int(module.codes(slice(0, 32), slice(0, 8)).sum()) == 28
    one = 1 if form == "gptq" else 0
    assert module.zeros().tolist() == [[v + one for v in (9, 10, 11, 12, 13, 14, 15, 15)]]


def test_compressed_order_by_hand(tmp_path: Path) -> None:
    """Nibble i of a weight's word is input i, of a zero point's word output i; both plus 8."""
    packed = np.zeros((8, 4), dtype=np.int32)
    packed[3, 1] = WORD[0, 0]
    tensors = {
        "weight_packed": ("I32", packed),
        "weight_scale": ("F16", np.ones((8, 1), dtype=np.float16)),
        "weight_zero_point": ("I32", WORD),
    }
    module = module_of(tmp_path, spec_of("compressed_int4", 32), tensors, (8, 32))
    module.check_headers()
    module.check_values()
    assert module.codes(slice(8, 16), slice(3, 4))[:, 0].tolist() == list(range(8))
    assert module.zeros().tolist() == [list(range(8))]
    one = QuantModule(module.checkpoint, spec_of("compressed_int4", 32, True), "m", 8, 32)
    assert one.zeros().tolist() == [[8] * 8]


def test_runs_by_hand() -> None:
    """Byte j of a run of 32: input j low, input j + 16 high."""
    codes = (np.arange(64) % 16).astype(np.uint8)[:, None]
    codes[16:32] = 5
    packed = pack_runs(codes, 32)[:, 0]
    assert packed[:16].tolist() == [i | 5 << 4 for i in range(16)]
    assert packed[16:].tolist() == [i | i << 4 for i in range(16)]


@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_means_its_formula(tmp_path: Path, name: str) -> None:
    form = FORMS[name]
    matrix = np.random.default_rng(1).standard_normal((200, 256)).astype(np.float32)
    stored, means = form.quantize(matrix)
    claim = read_claim("config.json", form.config)
    write_stored(tmp_path / "model.safetensors", {f"m.{k}": v for k, v in stored.items()})
    with open_checkpoint(tmp_path) as checkpoint:
        quant = quant_spec(claim, checkpoint, {"x": ("m",)}, {"m": (200, 256)})
        assert quant.scale_dtype == ("float32" if name.startswith("fp8") else "float16")
        assert quant.dense == ()
        module = QuantModule(checkpoint, quant, "m", 200, 256)
        module.check_headers()
        module.check_values()
        scales, dtype = module.scales()
        assert dtype == quant.scale_dtype
        group = quant.group_size or 256
        wide = np.repeat(scales.astype(np.float64), group, axis=0).T
        if quant.kind == "fp8":
            from support.quant_tiny import FP8_TABLE

            ours = FP8_TABLE[checkpoint.array(module.weight)] * wide
        else:
            codes = np.concatenate(
                [
                    module.codes(slice(at, at + 64), slice(first, first + 100))
                    for at in range(0, 256, 64)
                    for first in (0, 100)
                ]
            )
            codes = codes.reshape(4, 2, 64, 100).transpose(1, 3, 0, 2).reshape(200, 256)
            ours = (codes - np.repeat(module.zeros().astype(np.float64), group, axis=0).T) * wide
        del scales
    assert np.array_equal(ours, means)
    assert float(np.abs(ours - matrix).mean()) < 0.12, "and it is near what was quantized"


Change = Callable[[dict[str, tuple[str, np.ndarray]]], None]


def put(name: str, dtype: str, value: np.ndarray) -> Change:
    return lambda tensors: tensors.update({name: (dtype, value)})


def edit(name: str, at: Any, value: Any) -> Change:
    def change(tensors: dict[str, tuple[str, np.ndarray]]) -> None:
        dtype, array = tensors[name]
        array = np.array(array)
        array[at] = value
        tensors[name] = (dtype, array)

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("awq-32", put("qweight", "I32", np.zeros((64, 7), np.int32)), r"'m\.qweight' has shape"),
        ("awq-32", put("qweight", "I64", np.zeros((64, 8))), r"'m\.qweight' has dtype int64"),
        ("awq-32", lambda t: t.pop("qzeros") and None, r"'m\.qzeros' is missing"),
        ("awq-32", put("qzeros", "I32", np.zeros((1, 8), np.int32)), r"ask for \[2, 8\]"),
        ("awq-32", put("scales", "F16", np.ones((4, 64), np.float16)), r"ask for \[2, 64\]"),
        ("awq-32", edit("scales", (1, 5), np.nan), r"scale that is not finite"),
        ("gptq", edit("scales", (0, 5), np.inf), r"scale that is not finite"),
        ("gptq", edit("g_idx", 3, 7), r"'m\.g_idx' is not in order: act-order"),
        ("gptq", put("g_idx", "I32", np.zeros(3, np.int32)), r"'m\.g_idx' has shape \[3\]"),
        ("gptq", put("g_idx", "F32", np.zeros(64, np.float32)), r"'m\.g_idx' has dtype float32"),
        ("gptq-sym", edit("qzeros", (0, 0), 0x77777778), r"'m\.qzeros' is not symmetric"),
        ("gptq-sym", edit("qzeros", ..., 0x55555555), r"'m\.qzeros' is not symmetric"),
        ("packed-asym", lambda t: t.pop("weight_zero_point") and None, "zero_point' is missing"),
        ("packed-sym", put("weight_g_idx", "I32", np.arange(64, dtype=np.int32)), "act-order"),
        ("fp8-channel", put("weight_scale", "F32", np.ones(2, np.float32)), r"ask for \[\] or "),
        ("fp8-channel", put("weight_scale", "BF16", np.full(64, 0x7F80, np.uint16)), "not finite"),
        ("fp8-channel", put("weight", "F32", np.ones((64, 64), np.float32)), "has dtype float32"),
    ],
)  # fmt: skip
def test_modules_that_are_refused(tmp_path: Path, name: str, change: Change, message: str) -> None:
    form: Form = FORMS[name]
    stored, _ = form.quantize(np.random.default_rng(0).standard_normal((64, 64)).astype("f4"))
    change(stored)
    claim: QuantClaim = read_claim("config.json", form.config)
    quant = spec_of(claim.form, claim.group_size, claim.symmetric)
    with pytest.raises(WeftError, match=message) as info:
        module = module_of(tmp_path, quant, stored, (64, 64))
        module.check_headers()
        module.check_values()
    assert "\n" not in str(info.value)


def test_a_scale_of_zero_is_a_group_of_zeros(tmp_path: Path) -> None:
    """Allowed: it is what a group of zeros is quantized to."""
    stored, _ = FORMS["awq-32"].quantize(np.ones((8, 64), dtype=np.float32) * np.arange(64))
    edit("scales", 0, 0.0)(stored)
    module_of(tmp_path, spec_of("awq", 32), stored, (8, 64)).check_values()
