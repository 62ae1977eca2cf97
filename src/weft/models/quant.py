"""Reading quantized matrices of a checkpoint. numpy only; nothing is trusted, nothing executed.

Every form is brought to one: codes 0 .. 15 and zero points, or E4M3 bytes, and scales, in the
order of `quant_layout`. What each form stores (nibble i of a word: bits 4 i .. 4 i + 3):

    awq              qweight [I, O/8]  nibble i: output AWQ_ORDER[i] of the word's 8
                     qzeros [I/S, O/8] alike; scales [I/S, O]
    gptq, gptq_v2    qweight [I/8, O]  nibble i: input i of the word's 8
                     qzeros [I/S, O/8] nibble i: output i; gptq stores zero - 1, gptq_v2 zero
                     scales [I/S, O]; g_idx [I], absent or i // S
    compressed_int4  weight_packed [O, I/8] nibble i: input i, signed + 8; weight_scale [O, I/S]
                     weight_zero_point [O/8, I/S] nibble i: output i, signed + 8; absent: 0
    fp8              weight [O, I] E4M3; weight_scale of one number, [O] or [O, 1], or of blocks
                     [O/128, I/128]
    fp8_inv          alike, weight_scale_inv of blocks

Shape legend: O outputs, I inputs, S inputs that share a scale, P inputs of a run of packed bytes.
"""

from dataclasses import dataclass

import numpy as np

from weft.core.errors import WeftError
from weft.core.model import DTYPE_BYTES, QuantSpec
from weft.models.quant_config import BLOCK, MARKERS, SCALES
from weft.models.quant_layout import group_inputs, run_inputs
from weft.models.safetensors_file import Checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_PLACE = np.argsort(AWQ_ORDER)
_SYMMETRIC_ZERO = 8


@dataclass(frozen=True)
class QuantModule:
    """One quantized linear module of a checkpoint."""

    checkpoint: Checkpoint
    quant: QuantSpec
    module: str
    """Its name, such as "model.layers.0.self_attn.q_proj"."""
    outputs: int
    inputs: int

    def check_headers(self) -> None:
        """Presence, shapes and dtypes. Raises WeftError naming the tensor."""
        groups = self.inputs // group_inputs(self.quant, self.inputs)
        outs, ins, form = self.outputs, self.inputs, self.quant.form
        scale = SCALES[form]
        if form in ("fp8", "fp8_inv"):
            self._expect("weight", (outs, ins), dtypes=("float8_e4m3",))
            if self.quant.group_size:
                self._expect(scale, (-(-outs // BLOCK), groups))
            else:
                self._expect(scale, (), (1,), (1, 1), (outs,), (outs, 1))
        elif form == "compressed_int4":
            self._expect("weight_packed", (outs, ins // 8), dtypes=("int32",))
            self._expect(scale, (outs, groups))
            if not self.quant.symmetric:
                self._expect("weight_zero_point", (outs // 8, groups), dtypes=("int32",))
        else:
            packed = (ins, outs // 8) if form == "awq" else (ins // 8, outs)
            self._expect("qweight", packed, dtypes=("int32",))
            self._expect("qzeros", (groups, outs // 8), dtypes=("int32",))
            self._expect(scale, (groups, outs))
        for name in ("g_idx", "weight_g_idx"):
            if f"{self.module}.{name}" in self.checkpoint.tensors:
                self._expect(name, (ins,), dtypes=("int32", "int64"))

    def check_values(self) -> None:
        """What must hold of small tensors: g_idx without act-order, zero points that are as
        symmetric as config.json says, finite scales. Raises WeftError naming the tensor."""
        self._check_groups()
        self._check_zeros()
        self._check_scales()

    @property
    def weight(self) -> str:
        """FP8: the tensor [O, I] of its bytes."""
        return f"{self.module}.weight"

    def scales(self) -> tuple[np.ndarray, str]:
        """[I/S, O] and their dtype; per tensor and per block scales are repeated."""
        name = SCALES[self.quant.form]
        scales = self._array(name)
        dtype = self.checkpoint.tensors[f"{self.module}.{name}"].dtype
        if self.quant.kind == "fp8":
            if self.quant.group_size:
                scales = np.repeat(scales, BLOCK, axis=0)[: self.outputs].T
            else:
                scales = np.broadcast_to(scales.reshape(1, -1), (1, self.outputs))
        elif self.quant.form == "compressed_int4":
            scales = scales.T
        return scales, dtype

    def zeros(self) -> np.ndarray:
        """4 bits: zero points [I/S, O] as uint8, 0 .. 16."""
        groups = self.inputs // group_inputs(self.quant, self.inputs)
        if self.quant.symmetric:
            return np.full((groups, self.outputs), _SYMMETRIC_ZERO, dtype=np.uint8)
        if self.quant.form == "compressed_int4":
            packed = nibbles(self._array("weight_zero_point"))
            return packed.transpose(1, 0, 2).reshape(groups, self.outputs)
        packed = nibbles(self._array("qzeros"))
        if self.quant.form == "awq":
            packed = packed[..., _AWQ_PLACE]
        zeros = packed.reshape(groups, self.outputs)
        # AutoGPTQ's first format stores one less, and 15 means 16 (it does not wrap).
        return zeros + np.uint8(1) if self.quant.form == "gptq" else zeros

    @property
    def by_output(self) -> bool:
        """4 bits: stored output by output, so that ranges of outputs are cheap to read; else input
        by input."""
        return self.quant.form == "compressed_int4"

    def codes(self, inputs: slice, outputs: slice) -> np.ndarray:
        """4 bits: codes [I', O'] as uint8. Inputs begin and end at multiples of 8."""
        name = f"{self.module}.{MARKERS[self.quant.form]}"
        words = slice(inputs.start // 8, inputs.stop // 8)
        if self.quant.form == "compressed_int4":
            rows = self.checkpoint.rows(name, outputs.start, outputs.stop - outputs.start)
            unpacked = nibbles(rows[:, words])
            return unpacked.reshape(len(rows), -1).T
        if self.quant.form == "awq":
            rows = self.checkpoint.rows(name, inputs.start, inputs.stop - inputs.start)
            unpacked = nibbles(rows)[..., _AWQ_PLACE]
        else:
            rows = self.checkpoint.rows(name, words.start, words.stop - words.start)
            unpacked = nibbles(rows).transpose(0, 2, 1)
        return unpacked.reshape(-1, self.outputs)[:, outputs]

    def packed(self, inputs: slice, outputs: slice) -> np.ndarray:
        """4 bits: bytes [I'/2, O'] as the image has them. Inputs are whole runs."""
        return pack_runs(self.codes(inputs, outputs), self.run)

    @property
    def run(self) -> int:
        """4 bits: inputs packed together."""
        return run_inputs(self.quant, self.inputs)

    def read_ahead(self) -> None:
        """Ask the kernel for the weight's bytes."""
        form = self.quant.form
        name = "weight" if self.quant.kind == "fp8" else MARKERS[form]
        self.checkpoint.will_need(f"{self.module}.{name}")

    def _array(self, name: str) -> np.ndarray:
        return self.checkpoint.array(f"{self.module}.{name}")

    def _fail(self, name: str, message: str) -> WeftError:
        tensor = f"{self.module}.{name}"
        return WeftError(f"{self.checkpoint.file_of(tensor)}: tensor {tensor!r} {message}")

    def _expect(
        self, name: str, *shapes: tuple[int, ...], dtypes: tuple[str, ...] = tuple(DTYPE_BYTES)
    ) -> None:
        info = self.checkpoint.tensors.get(f"{self.module}.{name}")
        if info is None:
            raise WeftError(
                f"{self.checkpoint.path}: tensor {f'{self.module}.{name}'!r} is missing from the "
                f"checkpoint, which is quantized as {self.quant.form}"
            )
        if info.shape not in shapes:
            raise self._fail(
                name,
                f"has shape {list(info.shape)}, config.json and its quantization_config ask for "
                f"{' or '.join(str(list(shape)) for shape in shapes)}",
            )
        if info.dtype not in dtypes:
            raise self._fail(name, f"has dtype {info.dtype}; supported: {', '.join(dtypes)}")

    def _check_groups(self) -> None:
        for name in ("g_idx", "weight_g_idx"):
            if f"{self.module}.{name}" not in self.checkpoint.tensors:
                continue
            group = group_inputs(self.quant, self.inputs)
            if not np.array_equal(self._array(name), np.arange(self.inputs) // group):
                raise self._fail(
                    name,
                    "is not in order: act-order (desc_act) is not supported; use a checkpoint "
                    'quantized with "desc_act": false',
                )

    def _check_zeros(self) -> None:
        """Symmetric GPTQ: 7 in the first format, 8 in the second and in some that say they are
        the first (vllm-project/vllm#38966): both mean 8."""
        if self.quant.symmetric and self.quant.form in ("gptq", "gptq_v2"):
            words = self._array("qzeros").view(np.uint32)
            if words.size and words.flat[0] not in (0x77777777, 0x88888888):
                same = False
            else:
                same = bool((words == words.flat[0]).all()) if words.size else True
            if not same:
                raise self._fail(
                    "qzeros", 'is not symmetric, config.json says "sym": true; correct config.json'
                )

    def _check_scales(self) -> None:
        name = SCALES[self.quant.form]
        scales = self._array(name)
        if self.checkpoint.tensors[f"{self.module}.{name}"].dtype == "bfloat16":
            finite = (scales & 0x7F80) != 0x7F80
        else:
            finite = np.isfinite(scales)
        if not finite.all():
            raise self._fail(name, "holds a scale that is not finite; download it again")


def nibbles(words: np.ndarray) -> np.ndarray:
    """int32 [..., N] -> uint8 [..., N, 8]: bits 4 i .. 4 i + 3 of each word at i."""
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    out = np.empty((*words.shape, 8), dtype=np.uint8)
    np.bitwise_and(raw, 15, out=out[..., 0::2])
    np.right_shift(raw, 4, out=out[..., 1::2])
    return out


def pack_runs(codes: np.ndarray, run: int) -> np.ndarray:
    """Codes [I, O] -> bytes [I/2, O]: byte j of a run of `run` inputs holds its input j in the low
    half and its input j + run/2 in the high half."""
    inputs, outputs = codes.shape
    pairs = codes.reshape(inputs // run, 2, run // 2, outputs)
    packed: np.ndarray = pairs[:, 0] | (pairs[:, 1] << 4)
    return packed.reshape(inputs // 2, outputs)
