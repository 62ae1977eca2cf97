"""Adapter folders that strangers wrote: refused by name, and nothing but a WeftError ever."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.lora_cases import small_architecture
from support.tiny import write_safetensors
from support.tiny_adapter import (
    ALL_TARGETS,
    adapter_config,
    adapter_tensors,
    packed_adapter,
    tiny_adapter,
)
from weft.core.errors import WeftError
from weft.core.model import AdapterShape, Architecture
from weft.models.adapter import adapter_key, adapter_layout, build_adapter, read_adapter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def arch() -> Architecture:
    import torch

    return small_architecture(torch.float32, hidden=24, inner=40)


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def retensor(folder: Path, change: Callable[[dict[str, np.ndarray]], None], arch: Any) -> None:
    tensors = adapter_tensors(arch)
    change(tensors)
    write_safetensors(folder / TENSORS, tensors, dtype="float32")


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"peft_type": None}, "peft_type 'None'"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias 'all'"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"something_new": 3}, "something_new"),
        ({"r": 0}, "`r`"),
        ({"r": True}, "`r`"),
        ({"r": 1 << 40}, "`r`"),
        ({"r": 8}, "ask for"),
        ({"lora_alpha": "big"}, "`lora_alpha`"),
        ({"lora_alpha": 10**400}, "`lora_alpha`"),
        ({"use_rslora": "yes"}, "`use_rslora`"),
        ({"rank_pattern": {"(a+)+$": 4}}, "regular expression"),
        ({"alpha_pattern": {".*q_proj": 4}}, "regular expression"),
        ({"rank_pattern": {"q_proj": -1}}, "out of bounds"),
        ({"alpha_pattern": {"q_proj": 1e300}}, "out of bounds"),
        ({"rank_pattern": [1]}, "must be an object"),
        ({"rank_pattern": {f"m{i}": 1 for i in range(5000)}}, "at most"),
        ({"rank_pattern": {"q_proj": 5}}, "ask for"),
    ],
)
def test_a_configuration_that_is_not_served_is_refused_by_name(
    tmp_path: Path, arch: Architecture, changes: dict[str, Any], message: str
) -> None:
    folder = tiny_adapter(tmp_path, arch)
    rewrite(folder, **changes)
    with pytest.raises(WeftError, match=message) as info:
        read_adapter(folder, arch)
    assert str(tmp_path) in str(info.value)
    assert "\n" not in str(info.value)


def test_what_only_concerns_the_training_is_no_obstacle(tmp_path: Path, arch: Any) -> None:
    folder = tiny_adapter(tmp_path, arch)
    rewrite(folder, target_modules="all-linear", lora_dropout=0.1, base_model_name_or_path="x/y")
    rewrite(folder, revision="main", layers_to_transform=[0, 1], task_type=None, eva_config=None)
    shape = read_adapter(folder, arch)
    assert shape.ranks == ((16, 16, 16, 16),) * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "no LoRA tensors"),
        (lambda t: t.pop(f"{LAYER}.lora_A.weight"), "only one of"),
        (lambda t: t.update({f"{LAYER}.lora_magnitude_vector": np.ones(3)}), "not supported"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.ones((4, 24))}), "lm_h"),
        (
            lambda t: t.update(
                {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 24))}
            ),
            "embed_tokens",
        ),
        (lambda t: t.update({f"{LAYER}.lora_B.bias": np.ones(72)}), "not supported"),
        (lambda t: t.update({"base_model.model.score.weight": np.ones((2, 24))}), "score"),
        (
            lambda t: t.update(
                {LAYER.replace("layers.0", "layers.7") + ".lora_A.weight": np.ones((4, 24))}
            ),
            "layer that the base does not have",
        ),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": np.ones((4, 25))}), "ask for"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": np.ones((4,))}), "ask for"),
        (lambda t: t.update({f"{LAYER}.lora_A.default.weight": np.ones((4, 24))}), "there twice"),
        (
            lambda t: t.update(
                {
                    LAYER.replace("q_proj", "qkv_proj") + ".lora_A.weight": np.ones((4, 24)),
                    LAYER.replace("q_proj", "qkv_proj") + ".lora_B.weight": np.ones((120, 4)),
                }
            ),
            "both self_attn.qkv_proj and its parts",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_base_are_refused_by_name(
    tmp_path: Path, arch: Any, change: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    folder = tiny_adapter(tmp_path, arch)
    retensor(folder, change, arch)
    with pytest.raises(WeftError, match=message):
        read_adapter(folder, arch)


def test_a_pickle_is_never_opened(tmp_path: Path, arch: Any) -> None:
    folder = tiny_adapter(tmp_path, arch)
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(WeftError, match="never unpickled"):
        read_adapter(folder, arch)
    with pytest.raises(WeftError, match="cannot be read"):
        read_adapter(tmp_path / "nowhere", arch)


def test_the_scaling_is_folded_in_and_padding_is_zero(tmp_path: Path, arch: Any) -> None:
    plain = tiny_adapter(tmp_path / "a", arch, rank=3, lora_alpha=3)
    scaled = tiny_adapter(tmp_path / "b", arch, rank=3, lora_alpha=12)
    rooted = tiny_adapter(tmp_path / "c", arch, rank=3, lora_alpha=3, use_rslora=True)
    images = [packed_adapter(folder, arch)[1] for folder in (plain, scaled, rooted)]
    shape, _ = packed_adapter(plain, arch)
    entry = adapter_layout(arch, shape).tensors["layers.1.qkv.b"]
    b = [i[entry.offset : entry.offset + entry.num_bytes].view("<f4") for i in images]
    b = [one.reshape(entry.shape) for one in b]
    assert entry.shape == (120, 16) and not b[0][:, 9:].any() and b[0][:, :9].any()
    np.testing.assert_array_equal(b[1], 4 * b[0])
    np.testing.assert_allclose(b[2], 3**0.5 * b[0], rtol=1e-6)


def test_the_key_follows_files_and_configuration(tmp_path: Path, arch: Any) -> None:
    folder = tiny_adapter(tmp_path, arch)
    first = adapter_key(folder, arch)
    assert adapter_key(folder, arch) == first
    rewrite(folder, lora_alpha=9)
    second = adapter_key(folder, arch)
    tiny_adapter(tmp_path, arch, targets=ALL_TARGETS[:3], lora_alpha=9)
    assert len({first, second, adapter_key(folder, arch)}) == 3


def test_an_adapter_that_changed_meanwhile_is_not_packed(tmp_path: Path, arch: Any) -> None:
    folder = tiny_adapter(tmp_path, arch)
    shape = read_adapter(folder, arch)
    out = memoryview(bytearray(adapter_layout(arch, shape).num_bytes))
    tiny_adapter(tmp_path, arch, rank=20)
    with pytest.raises(WeftError, match="changed while it was read"):
        build_adapter(folder, arch, shape, out)


# -- hostile files -------------------------------------------------------------------------------


def damage(folder: Path, rng: random.Random) -> None:
    """Make one thing, or several, wrong somewhere."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        rng.choice([_flip, _cut, _header, _config_value, _config_text, _length])(folder, rng)


def _flip(folder: Path, rng: random.Random) -> None:
    file = folder / rng.choice([CONFIG, TENSORS])
    raw = bytearray(file.read_bytes() or b"{}")
    for _ in range(rng.choice([1, 4, 30])):
        raw[rng.randrange(min(len(raw), 3000))] = rng.randrange(256)
    file.write_bytes(raw)


def _cut(folder: Path, rng: random.Random) -> None:
    file = folder / rng.choice([CONFIG, TENSORS])
    raw = file.read_bytes()
    file.write_bytes(raw[: rng.randrange(len(raw) + 1)] + rng.choice([b"", b"\0" * 9]))


def _hostile(rng: random.Random) -> Any:
    return rng.choice(
        [
            *(None, True, -1, 0, 1, 7, 1 << 63, 10**400, 1e308, 0.5, "", "LORA", "\x00" * 50),
            *(
                "x" * 5000,
                [],
                {},
                [[]],
                {"a": {"a": {}}},
                ["q_proj"] * 300,
                "(a+)+$",
                [-1, 1 << 70],
            ),
        ]
    )


def _header(folder: Path, rng: random.Random) -> None:
    """Another header over the same data."""
    raw = (folder / TENSORS).read_bytes()
    if len(raw) < 8:
        return
    size = struct.unpack("<Q", raw[:8])[0]
    try:
        header = json.loads(raw[8 : 8 + size])
    except ValueError:
        return
    names = [name for name, entry in header.items() if isinstance(entry, dict)]
    name = rng.choice(names) if names else "x"
    entry = header.get(name)
    if isinstance(entry, dict) and rng.random() < 0.6:
        entry[rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(
            [_hostile(rng), "I64", "F8_E4M3", "BF16", [1 << 62, 1 << 62], [0], [5, 3]]
        )
    else:
        other = rng.choice(["", name * 3, name.replace("layers.0", "layers.99999"), "__metadata__"])
        header[other] = header.pop(name, _hostile(rng))
    text = json.dumps(header).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def _config_value(folder: Path, rng: random.Random) -> None:
    keys = [*adapter_config(), "use_rslora", "use_dora", "layers_to_transform", "loftq_config"]
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        config[rng.choice(keys)] = _hostile(rng)
    except (ValueError, TypeError):
        return
    (folder / CONFIG).write_text(json.dumps(config))


def _config_text(folder: Path, rng: random.Random) -> None:
    texts = ["", "[]", "null", "{" * 9000, '{"r": NaN}', '{"r": 1, "r": 2}', '{"r": ' + "9" * 6000]
    (folder / CONFIG).write_text(rng.choice(texts))


def _length(folder: Path, rng: random.Random) -> None:
    raw = (folder / TENSORS).read_bytes()
    length = rng.choice([0, 1, 8, len(raw), len(raw) - 8, 1 << 27, 1 << 63, (1 << 64) - 1])
    (folder / TENSORS).write_bytes(struct.pack("<Q", length) + raw[8:])


def try_all(folder: Path, arch: Architecture, seeds: range) -> int:
    """How many of these were refused; what is not is packed."""
    refused = 0
    for seed in seeds:
        tiny_adapter(folder, arch, targets=ALL_TARGETS[: 1 + seed % 7])
        damage(folder, random.Random(seed))
        try:
            adapter_key(folder, arch)
            shape = read_adapter(folder, arch)
            assert isinstance(shape, AdapterShape)
            out = bytearray(adapter_layout(arch, shape).num_bytes)
            build_adapter(folder, arch, shape, memoryview(out))
        except WeftError as error:
            assert 10 < len(str(error)) < 2000 and "\n" not in str(error), f"seed {seed}: {error}"
            refused += 1
    return refused


def test_250_hostile_adapters_give_clear_errors(tmp_path: Path, arch: Any) -> None:
    assert try_all(tmp_path, arch, range(250)) > 180


@pytest.mark.slow
def test_3000_hostile_adapters_give_clear_errors(tmp_path: Path, arch: Any) -> None:
    try_all(tmp_path, arch, range(1000, 4000))
