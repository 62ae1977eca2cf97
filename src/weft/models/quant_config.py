"""`quantization_config` of config.json -> `QuantSpec`. What is not supported is refused by name.

The configuration says which form; which matrices are quantized is read from the tensors that are
there, not from `ignore` or `modules_to_not_convert`, whose spelling differs from tool to tool.

Sources of the forms: AutoAWQ (awq/modules/linear/gemm.py), AutoGPTQ and GPTQModel
(checkpoint_format), compressed-tensors (quantization/quant_args.py), transformers'
FineGrainedFP8Config.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn, get_args

import msgspec

from weft.core.errors import WeftError
from weft.core.model import DTYPE_BYTES, DType, QuantForm, QuantSpec
from weft.models.quant_layout import run_inputs
from weft.models.safetensors_file import Checkpoint

METHODS = "fp8, compressed-tensors (float-quantized, pack-quantized with 4 bits), awq, gptq"
BLOCK = 128
"""Side of the blocks that share an FP8 scale, where blocks do."""
MARKERS: dict[QuantForm, str] = {
    "fp8": "weight_scale",
    "fp8_inv": "weight_scale_inv",
    "awq": "qweight",
    "gptq": "qweight",
    "gptq_v2": "qweight",
    "compressed_int4": "weight_packed",
}
"""The tensor that shows that a module is quantized."""
SCALES: dict[QuantForm, str] = {
    "fp8": "weight_scale",
    "fp8_inv": "weight_scale_inv",
    "awq": "scales",
    "gptq": "scales",
    "gptq_v2": "scales",
    "compressed_int4": "weight_scale",
}


class QuantClaim(NamedTuple):
    """What the configuration says."""

    form: QuantForm
    group_size: int
    symmetric: bool = False


def read_claim(where: str, raw: object) -> QuantClaim:
    """The form that `quantization_config` names; `where` is for messages. Raises WeftError."""
    reader = _Reader(f"{where}: `quantization_config`", raw)
    method = reader.raw.get("quant_method")
    if method == "fp8":
        return _read_fp8(reader)
    if method == "compressed-tensors":
        return _read_compressed(reader)
    if method == "awq":
        return _read_awq(reader)
    if method == "gptq":
        return _read_gptq(reader)
    reader.refuse("quant_method", method, METHODS)


def quant_spec(
    claim: QuantClaim,
    checkpoint: Checkpoint,
    matrices: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> QuantSpec:
    """The claim, with what only the tensors say: which matrices are quantized, and the scales'
    dtype. Reads headers.

    matrices: for each matrix of the image the modules it consists of; shapes: [O, I] of every
    module's weight. Raises WeftError where a matrix is quantized in part, where lm_head or the
    embeddings are, where nothing is, and where group sizes do not fit.
    """
    claim = _as_stored(claim, checkpoint)
    marker, scale = MARKERS[claim.form], SCALES[claim.form]
    dense: list[str] = []
    scale_dtypes: set[str] = set()
    spec = QuantSpec(
        form=claim.form,
        kind="fp8" if claim.form in ("fp8", "fp8_inv") else "int4",
        group_size=claim.group_size,
        scale_dtype="float32",
        symmetric=claim.symmetric,
    )
    for name, modules in matrices.items():
        quantized = [f"{module}.{marker}" in checkpoint.tensors for module in modules]
        if not any(quantized):
            dense.append(name)
            continue
        if not all(quantized):
            raise WeftError(
                f"{checkpoint.path}: of {', '.join(modules)} only some are quantized; they are one "
                "matrix here: quantize all of them or none"
            )
        for module in modules:
            _check_inputs(checkpoint, spec, module, shapes[module])
            info = checkpoint.tensors.get(f"{module}.{scale}")
            if info is not None:
                scale_dtypes.add(info.dtype)
    for module in ("lm_head", "model.embed_tokens"):
        if f"{module}.{marker}" in checkpoint.tensors:
            raise WeftError(
                f"{checkpoint.path}: {module} is quantized, which is not supported; quantize the "
                "model without it (it is in `ignore` or `modules_to_not_convert` by default)"
            )
    if len(dense) == len(matrices):
        raise WeftError(
            f"{checkpoint.path}: config.json has a `quantization_config`, but no tensor "
            f"*.{marker} is there; remove it from config.json if the weights are not quantized"
        )
    found = [dtype for dtype in get_args(DType) if scale_dtypes == {dtype}]
    return msgspec.structs.replace(
        spec, dense=tuple(dense), scale_dtype=found[0] if found else "float32"
    )


def _as_stored(claim: QuantClaim, checkpoint: Checkpoint) -> QuantClaim:
    """One scale a tensor is called `weight_scale` by most, `weight_scale_inv` by transformers."""
    if claim.form != "fp8" or any(name.endswith(".weight_scale") for name in checkpoint.tensors):
        return claim
    inverse = any(name.endswith(".weight_scale_inv") for name in checkpoint.tensors)
    return claim._replace(form="fp8_inv") if inverse else claim


def _check_inputs(
    checkpoint: Checkpoint, spec: QuantSpec, module: str, shape: tuple[int, ...]
) -> None:
    outputs, inputs = shape
    where = f"{checkpoint.path}: {module}"
    if spec.group_size and inputs % spec.group_size:
        raise WeftError(
            f"{where}: {inputs} inputs are not a multiple of the group size {spec.group_size}; "
            "quantize with a group size that divides them"
        )
    if spec.kind == "int4" and (outputs % 8 or not run_inputs(spec, inputs)):
        raise WeftError(
            f"{where}: 4-bit weights need inputs and groups that are multiples of 32 and outputs "
            f"that are multiples of 8, this matrix has {outputs} outputs and {inputs} inputs"
        )


def _read_fp8(reader: "_Reader") -> QuantClaim:
    scheme = reader.raw.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        reader.refuse("activation_scheme", scheme, "dynamic, static (computed as weight-only)")
    fmt = reader.raw.get("fmt") or "e4m3"
    if fmt not in ("e4m3", "float8_e4m3fn"):
        reader.refuse("fmt", fmt, "e4m3")
    reader.must_be("scale_fmt", (None, "float", "ue8m0"))
    block = reader.raw.get("weight_block_size")
    if block is None:
        return QuantClaim("fp8", 0)
    if block != [BLOCK, BLOCK]:
        reader.refuse("weight_block_size", block, f"null, [{BLOCK}, {BLOCK}]")
    return QuantClaim("fp8_inv", BLOCK)


def _read_awq(reader: "_Reader") -> QuantClaim:
    version = str(reader.raw.get("version", "gemm")).lower()
    if version != "gemm":
        reader.refuse("version", version, "gemm")
    bits = reader.raw.get("bits", reader.raw.get("w_bit"))
    if bits != 4:
        reader.refuse("bits", bits, "4")
    reader.must_be("zero_point", (True,), default=True)
    group = reader.group("group_size" if "group_size" in reader.raw else "q_group_size")
    return QuantClaim("awq", group)


def _read_gptq(reader: "_Reader") -> QuantClaim:
    reader.must_be("bits", (4,))
    group = reader.group("group_size")
    act_order = reader.raw.get("desc_act", False)
    if act_order not in (False, None) and group:
        reader.fail(
            "desc_act",
            "act-order (true) is not supported: inputs of a group lie apart; use a checkpoint "
            'quantized with "desc_act": false',
        )
    form = reader.raw.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        reader.refuse("checkpoint_format", form, "gptq, gptq_v2")
    reader.must_be("is_marlin_format", (False, None))
    reader.must_be("lm_head", (False, None))
    reader.must_be("pack_dtype", ("int32", None))
    if reader.raw.get("dynamic"):
        reader.fail("dynamic", "settings that differ by module are not supported; quantize alike")
    return QuantClaim(
        "gptq" if form == "gptq" else "gptq_v2", group, reader.raw.get("sym", False) is True
    )


def _read_compressed(reader: "_Reader") -> QuantClaim:
    form = reader.raw.get("format")
    if form not in ("float-quantized", "naive-quantized", "pack-quantized"):
        reader.refuse("format", form, "float-quantized, naive-quantized, pack-quantized")
    sparsity = reader.raw.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        reader.fail("sparsity_config", "sparse weights are not supported; use a dense checkpoint")
    if reader.raw.get("transform_config"):
        reader.fail("transform_config", "transforms are not supported; use a plain checkpoint")
    groups = reader.raw.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        reader.fail("config_groups", "must be one group of settings for all quantized matrices")
    group = _Reader(f"{reader.where}.config_groups", next(iter(groups.values())))
    if group.raw.get("output_activations"):
        group.fail("output_activations", "quantized outputs are not supported; leave them out")
    weights = _Reader(f"{group.where}.weights", group.raw.get("weights"))
    weights.must_be("dynamic", (False, None))
    if form == "pack-quantized":
        return _read_packed(weights)
    weights.must_be("type", ("float",))
    weights.must_be("num_bits", (8,))
    weights.must_be("symmetric", (True,), default=True)
    strategy = weights.raw.get("strategy")
    if strategy in ("tensor", "channel"):
        return QuantClaim("fp8", 0)
    if strategy != "block":
        weights.refuse("strategy", strategy, "tensor, channel, block")
    if weights.raw.get("block_structure") not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
        weights.refuse("block_structure", weights.raw.get("block_structure"), f"[{BLOCK}, {BLOCK}]")
    return QuantClaim("fp8", BLOCK)


def _read_packed(weights: "_Reader") -> QuantClaim:
    weights.must_be("type", ("int",))
    weights.must_be("num_bits", (4,))
    weights.must_be("actorder", (None, False, "weight", "static"))
    strategy = weights.raw.get("strategy")
    if strategy not in ("group", "channel"):
        weights.refuse("strategy", strategy, "group, channel")
    symmetric = weights.raw.get("symmetric", True)
    if not isinstance(symmetric, bool):
        weights.fail("symmetric", "must be true or false")
    group = weights.group("group_size") if strategy == "group" else 0
    return QuantClaim("compressed_int4", group, symmetric)


class _Reader:
    """Look-ups in one JSON object, with errors that name the key."""

    def __init__(self, where: str, raw: object) -> None:
        self.where = where
        if not isinstance(raw, dict):
            raise WeftError(f"{where} must be an object")
        self.raw: dict[str, Any] = raw

    def fail(self, key: str, message: str) -> NoReturn:
        raise WeftError(f"{self.where}: `{key}`: {message}")

    def refuse(self, key: str, value: object, supported: str) -> NoReturn:
        self.fail(key, f"{str(value)[:80]!r} is not supported; supported: {supported}")

    def must_be(self, key: str, values: tuple[object, ...], default: object = None) -> None:
        value = self.raw.get(key, default)
        if not any(value is one or (type(value) is type(one) and value == one) for one in values):
            self.refuse(key, value, ", ".join(str(one) for one in values if one is not None))

    def group(self, key: str) -> int:
        """A group size; -1 (all inputs) is 0."""
        value = self.raw.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            if value == -1:
                return 0
            if 32 <= value <= 1 << 16 and value % 32 == 0:
                return value
        self.refuse(key, value, "multiples of 32, such as 128, and -1 for all inputs")


assert set(get_args(QuantForm)) == set(MARKERS) == set(SCALES)
assert set(get_args(DType)) == set(DTYPE_BYTES)
