"""Hostile model folders: good tiny checkpoints that a seeded mutator damages in any file."""

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from support.tiny import CLASSES, ROPES, tiny_checkpoint

CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
INDEX = "model.safetensors.index.json"
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 1 << 20, 1 << 31, 1 << 63, 10**40, -(10**400)),
    *(0.0, -0.5, 0.5, 1e-300, 1e300, 5e-324, "", "x", "1e400", "\ud800", "../../etc/passwd"),
    *("A" * 100_000, [], {}, [[]], [0] * 10_000, {"a": {"a": {}}}, ["full_attention"]),
    *(["sliding_attention"], "float32", "bfloat16", "yarn", "longrope", "dynamic", "linear"),
    *({"rope_type": "yarn"}, {"rope_type": "longrope"}, {"full_attention": {"rope_type": "yarn"}}),
    *({"quant_method": "fp8"}, {"quant_method": "awq", "bits": 4}, {"bits": -1}),
    *("LlamaForCausalLM", ["Gemma3ForCausalLM"], ["Phi3ForCausalLM"], ["MistralForCausalLM"]),
]
KEYS = [
    *("rope_scaling", "rope_parameters", "rope_theta", "rope_local_base_freq", "head_dim"),
    *("partial_rotary_factor", "original_max_position_embeddings", "sliding_window", "layer_types"),
    *("sliding_window_pattern", "max_window_layers", "use_sliding_window", "attention_bias"),
    *("mlp_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("hidden_activation", "quantization_config", "tie_word_embeddings", "eos_token_id", "dtype"),
]
TEXTS = [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"a":' * 5000, b"[" * 200_000, b"\0" * 4096]
TEXTS += [
    b'{"' + b'\\"' * 50_000,
    b'{"a": 1, "a": 2}',
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b" " * 65536,
]


class Mutator:
    """Damages one folder; the same seed, the same damage."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)

    def build(self) -> None:
        """A good checkpoint of a random class, then one to three damages."""
        self.folder.mkdir(parents=True)
        family = self.pick(sorted(CLASSES))
        rope = self.pick(["default", "longrope"] if family == "phi3" else sorted(ROPES))
        tiny_checkpoint(
            self.folder,
            family=family,
            layers=1,
            hidden=16,
            heads=2,
            kv_heads=1,
            intermediate=16,
            rope=rope,
            rope_style=self.pick(["v4", "v5"]),
            shards=self.pick([1, 2]),
            seed=1,
        )
        for _ in range(self.pick([1, 1, 2, 3])):
            self.damage()

    def damage(self) -> None:
        kinds: list[Callable[[], None]] = [
            *[self.change_config] * 6,
            *[self.change_header] * 6,
            *[self.change_index] * 2,
            self.flip_bytes,
            self.cut_or_grow,
            self.replace_text,
            self.replace_file,
        ]
        self.pick(kinds)()

    def pick(self, options: list[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def value(self) -> Any:
        if self.rng.integers(4) == 0:
            return [self.pick(VALUES) for _ in range(int(self.rng.integers(4)))]
        return copy.deepcopy(self.pick(VALUES))

    def any_file(self) -> Path | None:
        files = [f for f in sorted(self.folder.iterdir()) if _is_plain(f)]
        return self.pick(files) if files else None

    def change_config(self) -> None:
        file = self.folder / self.pick([*CONFIGS, "config.json", "config.json"])
        config = _load(file)
        if config is not None:
            self.change(config)
            _dump(file, config)

    def change(self, value: dict[str, Any]) -> None:
        """A key of the object or of one inside it: changed, removed or added."""
        inner = [v for v in value.values() if isinstance(v, dict) and v]
        if inner and self.rng.integers(2):
            return self.change(self.pick(inner))
        key = self.pick([*sorted(value), *KEYS])
        if self.rng.integers(5) == 0:
            value.pop(key, None)
        elif isinstance(value.get(key), int) and self.rng.integers(2):
            value[key] = int(value[key]) + int(self.rng.integers(-2, 3))
        else:
            value[key] = self.value()
        return None

    def change_index(self) -> None:
        index = _load(self.folder / INDEX) or {"weight_map": {}}
        weight_map = index.get("weight_map")
        if isinstance(weight_map, dict) and weight_map and self.rng.integers(4):
            names = ["/etc/passwd", "../model.safetensors", "absent.safetensors", 3, None, "a\0b"]
            weight_map[self.pick([*sorted(weight_map), "ghost"])] = self.pick(names)
        else:
            self.change(index)
        _dump(self.folder / INDEX, index)

    def change_header(self) -> None:
        shards = [f for f in sorted(self.folder.glob("*.safetensors")) if _is_plain(f)]
        if not shards:
            return
        file = self.pick(shards)
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8].ljust(8, b"\0"))
        try:
            header = json.loads(raw[8 : 8 + length])
        except (ValueError, RecursionError):
            return
        if not isinstance(header, dict) or not header:
            return
        entry = header[self.pick(sorted(header))]
        what = int(self.rng.integers(5))
        if what == 0 or not isinstance(entry, dict):
            self.change(header)
        elif what == 1:
            entry["shape"] = self.value()
        elif what == 2:
            entry["data_offsets"] = [self.pick(VALUES), self.pick(VALUES)]
        elif what == 3:
            entry["dtype"] = self.pick(
                ["F64", "F16", "I8", "F8_E4M3", "I32", "U8", "BOOL", 7, None]
            )
        else:
            header[self.pick(["x" * 10_000, "", "\0", "model.norm.weight", "lm_head.bias"])] = entry
        text = json.dumps(header).encode()
        size = self.pick([len(text)] * 6 + [0, 1, len(text) - 1, len(raw), 1 << 40, (1 << 64) - 1])
        file.write_bytes(struct.pack("<Q", size) + text + raw[8 + length :])

    def flip_bytes(self) -> None:
        file = self.any_file()
        if file is None or not file.stat().st_size:
            return
        raw = bytearray(file.read_bytes())
        for at in self.rng.integers(0, min(len(raw), 4000), 8):
            raw[int(at)] = int(self.rng.integers(256))
        file.write_bytes(raw)

    def cut_or_grow(self) -> None:
        file = self.any_file()
        if file is not None:
            size = file.stat().st_size
            os.truncate(file, self.pick([0, 7, 8, size // 2, max(0, size - 1), size + 9, 1 << 40]))

    def replace_text(self) -> None:
        file = self.any_file()
        if file is not None:
            file.write_bytes(self.pick(TEXTS))

    def replace_file(self) -> None:
        file = self.any_file()
        if file is None:
            return
        file.unlink()
        match int(self.rng.integers(6)):
            case 0:
                file.mkdir()
            case 1:
                os.mkfifo(file)
            case 2:
                file.symlink_to("/dev/zero")
            case 3:
                file.symlink_to(file.name)
            case 4:
                file.symlink_to("/dev/stdin")


def _is_plain(file: Path) -> bool:
    """A file that the mutator itself can read: no link, no pipe, no terabyte of nothing."""
    return not file.is_symlink() and file.is_file() and file.stat().st_size < 1 << 26


def _load(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text()) if _is_plain(file) else None
    except (ValueError, OSError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _dump(file: Path, value: Any) -> None:
    if _is_plain(file) or not os.path.lexists(file):
        file.write_text(json.dumps(value))


def fresh(folder: Path) -> None:
    """Remove what an earlier case left."""
    if folder.exists():
        shutil.rmtree(folder)
