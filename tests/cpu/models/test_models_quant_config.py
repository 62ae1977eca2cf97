"""quantization_config: what is read, and refusals that name the key and the remedy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.quant_tiny import FORMS, write_stored
from weft.core.errors import WeftError
from weft.models.quant_config import QuantClaim, quant_spec, read_claim
from weft.models.safetensors_file import open_checkpoint


@pytest.mark.parametrize(
    ("name", "claim"),
    [
        ("fp8-tensor", QuantClaim("fp8", 0)),
        ("fp8-channel", QuantClaim("fp8", 0)),
        ("fp8-block", QuantClaim("fp8", 128)),
        ("fp8-plain", QuantClaim("fp8", 0)),
        ("fp8-plain-block", QuantClaim("fp8_inv", 128)),
        ("awq-32", QuantClaim("awq", 32)),
        ("awq-all", QuantClaim("awq", 0)),
        ("gptq", QuantClaim("gptq", 64, False)),
        ("gptq-sym", QuantClaim("gptq", 32, True)),
        ("gptq-v2", QuantClaim("gptq_v2", 32, False)),
        ("packed-sym", QuantClaim("compressed_int4", 32, True)),
        ("packed-asym", QuantClaim("compressed_int4", 64, False)),
        ("packed-channel", QuantClaim("compressed_int4", 0, True)),
    ],
)
def test_supported(name: str, claim: QuantClaim) -> None:
    assert read_claim("config.json", FORMS[name].config) == claim


def test_spellings_of_real_checkpoints() -> None:
    """Older AutoAWQ keys; act-order that orders nothing; FP8 of DeepSeek and Qwen."""
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"}
    assert read_claim("c", old) == QuantClaim("awq", 128)
    config = FORMS["gptq-all"].config | {"desc_act": True, "sym": True, "damp_percent": 0.01}
    assert read_claim("c", config) == QuantClaim("gptq", 0, True)
    qwen = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    assert read_claim("c", qwen | {"weight_block_size": [128, 128]}) == QuantClaim("fp8_inv", 128)


def changed(name: str, path: str, value: Any) -> dict[str, Any]:
    """The form's configuration with one value changed, at keys joined by dots."""
    import copy

    config = copy.deepcopy(FORMS[name].config)
    part = config
    *way, last = path.split(".")
    for key in way:
        part = part[key]
    part[last] = value
    return config


WEIGHTS = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("awq-32", "quant_method", "bitsandbytes", "'bitsandbytes' is not .*: fp8"),
        ("awq-32", "quant_method", None, "`quant_method`: 'None' is not supported"),
        ("awq-32", "version", "gemv_fast", "`version`: 'gemv_fast' is not supported; .* gemm"),
        ("awq-32", "bits", 8, "`bits`: '8' is not supported; supported: 4"),
        ("awq-32", "zero_point", False, "`zero_point`"),
        ("awq-32", "group_size", 24, "`group_size`: '24' is not supported; supported: multiples"),
        ("awq-32", "group_size", 0, "`group_size`"),
        ("awq-32", "group_size", True, "`group_size`"),
        ("awq-32", "group_size", "128", "`group_size`"),
        ("awq-32", "group_size", 1 << 40, "`group_size`"),
        ("gptq", "bits", 3, "`bits`: '3'"),
        ("gptq", "bits", 4.0, "`bits`: '4.0'"),
        ("gptq", "desc_act", True, '`desc_act`: act-order .*"desc_act": false'),
        ("gptq", "checkpoint_format", "marlin", "`checkpoint_format`: 'marlin' .* gptq, gptq_v2"),
        ("gptq", "is_marlin_format", True, "`is_marlin_format`"),
        ("gptq", "lm_head", True, "`lm_head`"),
        ("gptq", "pack_dtype", "int16", "`pack_dtype`: 'int16'"),
        ("gptq", "dynamic", {"-:x": {}}, "`dynamic`: settings that differ"),
        ("fp8-plain", "activation_scheme", "block", "`activation_scheme`: 'block'"),
        ("fp8-plain", "fmt", "e5m2", "`fmt`: 'e5m2' is not supported; supported: e4m3"),
        ("fp8-plain-block", "weight_block_size", [64, 64], "`weight_block_size`"),
        ("fp8-tensor", "format", "int-quantized", "`format`: 'int-quantized' .* pack-quantized"),
        ("fp8-tensor", "format", "nvfp4-pack-quantized", "`format`"),
        ("fp8-tensor", "sparsity_config", {"format": "sparse-24-bitmask"}, "`sparsity_config`"),
        ("fp8-tensor", "transform_config", {"config_groups": {}, "r": 1}, "`transform_config`"),
        ("fp8-tensor", "config_groups", {}, "`config_groups`: must be one group"),
        ("fp8-tensor", "config_groups", {"a": {}, "b": {}}, "`config_groups`: must be one group"),
        ("fp8-tensor", "config_groups", {"a": 3}, "config_groups must be an object"),
        ("fp8-tensor", "config_groups", {"a": {}}, "weights must be an object"),
        ("fp8-tensor", f"{WEIGHTS}.num_bits", 4, "weights: `num_bits`: '4'"),
        ("fp8-tensor", f"{WEIGHTS}.type", "int", "weights: `type`: 'int'"),
        ("fp8-tensor", f"{WEIGHTS}.dynamic", True, "weights: `dynamic`"),
        ("fp8-tensor", f"{WEIGHTS}.symmetric", False, "weights: `symmetric`"),
        ("fp8-tensor", f"{WEIGHTS}.strategy", "token", "`strategy`: 'token' .* channel, block"),
        ("fp8-block", f"{WEIGHTS}.block_structure", [1, 128], "`block_structure`"),
        ("packed-sym", f"{WEIGHTS}.num_bits", 8, "weights: `num_bits`: '8'"),
        ("packed-sym", f"{WEIGHTS}.actorder", "group", "weights: `actorder`: 'group'"),
        ("packed-sym", f"{WEIGHTS}.strategy", "tensor", "`strategy`: 'tensor' .* group, channel"),
        ("packed-sym", f"{WEIGHTS}.symmetric", "yes", "`symmetric`: must be true or false"),
    ],
)  # fmt: skip
def test_refused_by_name(name: str, path: str, value: Any, message: str) -> None:
    with pytest.raises(WeftError, match=message) as info:
        read_claim("config.json", changed(name, path, value))
    assert "\n" not in str(info.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(sorted({key for form in FORMS.values() for key in form.config}))


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(FORMS)), key=KEYS, value=JSON)
def test_anything_is_read_or_refused(name: str, key: str, value: Any) -> None:
    try:
        claim = read_claim("config.json", FORMS[name].config | {key: value})
    except WeftError:
        return
    assert claim.group_size in (0, 128) or claim.group_size % 32 == 0


def tensors(shape: tuple[int, int], *modules: str) -> dict[str, tuple[str, np.ndarray]]:
    stored, _ = FORMS["awq-32"].quantize(np.random.default_rng(0).standard_normal(shape))
    return {f"{module}.{name}": part for module in modules for name, part in stored.items()}


MATRICES = {"layers.0.gate_up": ("gate", "up"), "layers.0.down": ("down",)}


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (("gate", "down"), "of gate, up only some are quantized"),
        (("gate", "up", "lm_head"), "lm_head is quantized, which is not supported"),
        (("gate", "up", "model.embed_tokens"), "model.embed_tokens is quantized"),
        ((), r"no tensor \*\.qweight is there"),
    ],
)
def test_what_only_the_tensors_tell(tmp_path: Path, there: tuple[str, ...], message: str) -> None:
    kept = {"other.scales": tensors((8, 64), "x")["x.scales"]}
    write_stored(tmp_path / "model.safetensors", tensors((8, 64), *there) | kept)
    shapes = dict.fromkeys(("gate", "up", "down"), (8, 64))
    claim = QuantClaim("awq", 32)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(WeftError, match=message):
        quant_spec(claim, checkpoint, MATRICES, shapes)


def test_matrices_left_alone_are_noted(tmp_path: Path) -> None:
    write_stored(tmp_path / "model.safetensors", tensors((8, 64), "gate", "up"))
    shapes = dict.fromkeys(("gate", "up", "down"), (8, 64))
    with open_checkpoint(tmp_path) as checkpoint:
        quant = quant_spec(QuantClaim("awq", 32), checkpoint, MATRICES, shapes)
        assert quant.dense == ("layers.0.down",)
        for shape, message in (((8, 80), "not a multiple of the group size"), ((12, 64), "of 8")):
            with pytest.raises(WeftError, match=message):
                quant_spec(QuantClaim("awq", 32), checkpoint, MATRICES, shapes | {"up": shape})
        with pytest.raises(WeftError, match="multiples of 32"):
            quant_spec(QuantClaim("awq", 0), checkpoint, MATRICES, shapes | {"up": (8, 40)})
