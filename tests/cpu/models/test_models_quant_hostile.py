"""Damaged quantized folders: a WeftError of one line, or an image."""

import copy
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.quant_tiny import FORMS, quant_checkpoint
from weft.core.errors import WeftError
from weft.models.check import check_checkpoint
from weft.models.hf_config import read_model_config
from weft.models.image import build_image, image_layout
from weft.models.safetensors_file import open_checkpoint

VALUES: list[Any] = [
    *(None, True, 0, -1, 1, 4, 8, 31, 32, 128, 1 << 40, 10**40, 1e300, "", "x", "A" * 10_000),
    *([], {}, [128, 128], [0, 0], {"a": {}}, "float", "channel", "group", "block", "gptq_v2"),
]
DTYPES = ["F8_E4M3", "I32", "I64", "F16", "BF16", "F32", "F64", "U8", "F4", "x", None]


def damage_config(path: Path, rng: np.random.Generator) -> None:
    """A value somewhere in quantization_config."""
    config = json.loads((path / "config.json").read_text())
    part: Any = config["quantization_config"]
    while True:
        key = str(rng.choice(sorted(part)))
        if isinstance(part[key], dict) and part[key] and rng.random() < 0.8:
            part = part[key]
            continue
        if rng.random() < 0.2:
            del part[key]
        else:
            part[key] = copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
        break
    (path / "config.json").write_text(json.dumps(config))


def damage_header(path: Path, rng: np.random.Generator) -> None:
    """Another dtype, shape, name or place of a tensor, or none."""
    file = path / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if "proj." in name]
    name = str(rng.choice(names))
    entry = header[name]
    kind = int(rng.integers(5))
    if kind == 0:
        entry["dtype"] = DTYPES[int(rng.integers(len(DTYPES)))]
    elif kind == 1:
        entry["shape"] = [int(n) for n in rng.permutation(entry["shape"])]
    elif kind == 2 and entry["shape"]:
        at = int(rng.integers(len(entry["shape"])))
        entry["shape"][at] = int(rng.choice([0, 1, 8, 64, 1 << 40]))
    elif kind == 3:
        header[str(rng.choice(names))] = header.pop(name)
    else:
        del header[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-block", "awq-32", "gptq", "packed-asym"])
def test_damage_is_refused_or_computed(tmp_path: Path, name: str) -> None:
    refused = 0
    good, _ = quant_checkpoint(tmp_path, FORMS[name])
    config = (good / "config.json").read_bytes()
    tensors = (good / "model.safetensors").read_bytes()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        (good / "config.json").write_bytes(config)
        (good / "model.safetensors").write_bytes(tensors)
        (damage_config if seed % 2 else damage_header)(good, rng)
        report = check_checkpoint(good)
        try:
            arch = read_model_config(good)
            out = np.empty(image_layout(arch).num_bytes, dtype=np.uint8)
            assert out.nbytes < 4 << 20
            with open_checkpoint(good) as checkpoint:
                build_image(checkpoint, arch, memoryview(out))
        except WeftError as error:
            refused += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 1000
        else:
            assert report.servable, report.problems
    assert 10 < refused < 40, "damage that is hardly ever noticed, or always"
