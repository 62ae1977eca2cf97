"""The packed image: where each row of the checkpoint ends up, conversions, the content address."""

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tiny import CLASSES, random_tensors, tiny_checkpoint, write_safetensors_model
from weft.core.errors import WeftError
from weft.core.model import DTYPE_BYTES, Architecture, RopeSpec
from weft.models import image as image_module
from weft.models.convert import convert
from weft.models.hf_config import read_model_config
from weft.models.image import build_image, expected_tensors, image_key, image_layout
from weft.models.safetensors_file import open_checkpoint

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TORCH |= {"float32": torch.float32, "float64": torch.float64}


def architecture(**change: Any) -> Architecture:
    facts: dict[str, Any] = {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 40,
        "intermediate_size": 96,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 10,
        "vocab_size": 130,
        "max_position": 64,
        "norm_eps": 1e-5,
        "rope": RopeSpec(),
        "qkv_bias": False,
        "tied_embeddings": False,
        "dtype": "float32",
    }
    return Architecture(**(facts | change))


def build(path: Path, arch: Architecture, **options: Any) -> np.ndarray:
    out = np.full(image_layout(arch).num_bytes, 0xAB, dtype=np.uint8)
    with open_checkpoint(path) as checkpoint:
        build_image(checkpoint, arch, memoryview(out), **options)
    return out


def tensor(image: np.ndarray, arch: Architecture, name: str) -> torch.Tensor:
    entry = image_layout(arch).tensors[name]
    raw = torch.from_numpy(image[entry.offset : entry.offset + entry.num_bytes])
    return raw.view(TORCH[entry.dtype]).view(entry.shape)


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(1, 5),
    hidden=st.integers(1, 70),
    inner=st.integers(1, 70),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    half_dim=st.integers(1, 20),
    vocab=st.integers(1, 70),
    tied=st.booleans(),
    flags=st.tuples(*[st.booleans()] * 5),
    family=st.sampled_from(sorted(CLASSES)),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
)
def test_layout_is_disjoint_aligned_and_in_load_order(
    layers: int,
    hidden: int,
    inner: int,
    kv_heads: int,
    group: int,
    half_dim: int,
    vocab: int,
    tied: bool,
    flags: tuple[bool, ...],
    family: Any,
    dtype: Any,
) -> None:
    if family in ("phi3", "llama", "qwen2", "qwen3", "mistral"):
        flags = (*flags[:4], False)  # no other norms have names there
    arch = architecture(
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_kv_heads=kv_heads,
        num_q_heads=kv_heads * group,
        head_dim=2 * half_dim,
        vocab_size=vocab,
        tied_embeddings=tied,
        family=family,
        dtype=dtype,
        **dict(
            zip(("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "branch_norms"), flags, strict=True)
        ),
    )
    layout = image_layout(arch)
    names = [extent.name for extent in layout.extents]
    assert names == ["embed", *(f"layers.{i}" for i in range(layers)), "head"]
    at = 0
    for extent in layout.extents:
        assert extent.offset == at
        assert extent.offset % 4096 == extent.num_bytes % 4096 == 0
        at += extent.num_bytes
    assert at == layout.num_bytes
    end = 0
    for name, entry in sorted(layout.tensors.items(), key=lambda item: item[1].offset):
        assert entry.offset % 256 == 0
        assert entry.offset >= end
        end = entry.offset + entry.num_bytes
        home = next(e for e in layout.extents if e.offset <= entry.offset < e.offset + e.num_bytes)
        assert end <= home.offset + home.num_bytes
        assert home.name == ("head" if name in ("norm", "lm_head") else name.rsplit(".", 1)[0])
    assert ("lm_head" in layout.tensors) != tied
    values = sum(entry.num_bytes for entry in layout.tensors.values()) // DTYPE_BYTES[dtype]
    padding = (-vocab % 8) * hidden * (1 if tied else 2)
    assert values - padding == sum(int(np.prod(s)) for s in expected_tensors(arch).values())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("inner", [96, 100, 77])
def test_every_row_is_where_the_format_says(tmp_path: Path, family: str, inner: int) -> None:
    shape = {"hidden": 40, "heads": 6, "kv_heads": 2, "head_dim": 10, "intermediate": inner}
    path = tiny_checkpoint(tmp_path, family=family, vocab=130, **shape)
    arch = read_model_config(path)
    image = build(path, arch)
    with open_checkpoint(path) as checkpoint:
        theirs = {name: torch.tensor(checkpoint.array(name)) for name in checkpoint.tensors}
    for name in ("embed", "lm_head"):
        ours = tensor(image, arch, name)
        key = "model.embed_tokens.weight" if name == "embed" else "lm_head.weight"
        assert torch.equal(ours[:130], theirs[key])
        assert ours.shape == (136, 40)
        assert not ours[130:].any()
    attn, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    for ours_name, kind in (("qkv", "weight"), ("qkv_bias", "bias")):
        if kind == "bias" and family == "llama":
            continue
        q, k, v = (theirs[f"{attn}.{part}_proj.{kind}"] for part in "qkv")
        rows = [
            torch.cat((q[30 * g : 30 * g + 30], k[10 * g :][:10], v[10 * g :][:10])) for g in (0, 1)
        ]
        assert torch.equal(tensor(image, arch, f"layers.1.{ours_name}"), torch.stack(rows))
    assert torch.equal(tensor(image, arch, "layers.1.o"), theirs[f"{attn}.o_proj.weight"].t())
    assert torch.equal(tensor(image, arch, "layers.1.down"), theirs[f"{mlp}.down_proj.weight"].t())
    gate_up = tensor(image, arch, "layers.1.gate_up")
    assert gate_up.shape[0] == {96: 8, 100: 4, 77: 1}[inner]
    assert torch.equal(gate_up[:, 0].reshape(inner, 40), theirs[f"{mlp}.gate_proj.weight"])
    assert torch.equal(gate_up[:, 1].reshape(inner, 40), theirs[f"{mlp}.up_proj.weight"])
    assert torch.equal(tensor(image, arch, "norm"), theirs["model.norm.weight"])


def test_every_other_tensor_is_where_the_format_says(tmp_path: Path) -> None:
    """Biases and norms of the classes that have them."""
    bias = {"attention_bias": True, "mlp_bias": True}
    llama = tiny_checkpoint(tmp_path / "llama", intermediate=100, config_extra=bias)
    gemma = tiny_checkpoint(tmp_path / "gemma", family="gemma3")
    for path, vectors in (
        (llama, {"o_bias": "self_attn.o_proj.bias", "down_bias": "mlp.down_proj.bias"}),
        (
            gemma,
            {
                "q_norm": "self_attn.q_norm.weight",
                "k_norm": "self_attn.k_norm.weight",
                "attention_out_norm": "post_attention_layernorm.weight",
                "post_norm": "pre_feedforward_layernorm.weight",
                "mlp_out_norm": "post_feedforward_layernorm.weight",
            },
        ),
    ):
        arch = read_model_config(path)
        image = build(path, arch)
        with open_checkpoint(path) as checkpoint:
            for ours, theirs in vectors.items():
                expected = torch.tensor(checkpoint.array(f"model.layers.1.{theirs}"))
                assert torch.equal(tensor(image, arch, f"layers.1.{ours}"), expected), ours
            if path is llama:
                both = tensor(image, arch, "layers.1.gate_up_bias")
                for half, part in enumerate(("gate", "up")):
                    name = f"model.layers.1.mlp.{part}_proj.bias"
                    assert torch.equal(
                        both[:, half].flatten(), torch.tensor(checkpoint.array(name))
                    )


def test_a_fused_checkpoint_gives_the_image_of_one_that_is_not(tmp_path: Path) -> None:
    """Phi-3's matrices, and the same rows under Llama's names."""
    fused = tiny_checkpoint(tmp_path / "fused", family="phi3", seed=4)
    plain = tiny_checkpoint(tmp_path / "plain", family="llama", seed=4)
    arch = read_model_config(plain)
    assert np.array_equal(build(fused, read_model_config(fused)), build(plain, arch))
    names = [
        {n.split(".", 3)[-1] for n in expected_tensors(read_model_config(p))} for p in (fused,)
    ]
    assert {"self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"} <= names[0]


@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_threads_and_progress(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any cut gives the same bytes; progress adds up; no byte of `out` is left as it was."""
    family = ("phi3", "qwen2")[threads // 3]
    path = tiny_checkpoint(tmp_path, family=family, hidden=80, intermediate=200, shards=2)
    arch = read_model_config(path)
    whole = build(path, arch)
    assert not np.any(np.convolve(whole == 0xAB, np.ones(64), "valid") == 64)
    monkeypatch.setattr(image_module, "PIECE_BYTES", 1000)
    monkeypatch.setattr(image_module, "TILE", (7, 5))
    seen: list[int] = []
    assert np.array_equal(build(path, arch, threads=threads, progress=seen.append), whole)
    assert sum(seen) == image_layout(arch).num_bytes
    assert len(seen) > 100


@pytest.mark.parametrize("source", sorted(DTYPE_BYTES))
@pytest.mark.parametrize("wanted", sorted(DTYPE_BYTES))
def test_conversions_are_torchs(tmp_path: Path, source: str, wanted: str) -> None:
    """Exact where widening, rounded to nearest even where narrowing, with every special value."""
    arch = architecture(num_layers=1, dtype=wanted)
    bits = np.random.default_rng(0).integers(0, 1 << 32, arch.vocab_size * 40, dtype=np.uint32)
    special = [0.0, -0.0, 1.0, 65504.0, 65520.0, 3e38, 1e-45, 6e-8, 1.00390625, np.inf, -np.inf]
    floats = bits.view(np.float32).copy()
    floats[: len(special) + 1] = [*special, np.nan]
    sizes = {"layers": 1, "hidden": 40, "heads": 4, "kv_heads": 2, "head_dim": 10}
    tensors = random_tensors(
        np.random.default_rng(1), qkv_bias=False, intermediate=96, vocab=130, tied=False, **sizes
    )
    tensors["model.embed_tokens.weight"] = floats.reshape(130, 40)
    with np.errstate(all="ignore"):
        write_safetensors_model(tmp_path, tensors, dtype=source)
    with open_checkpoint(tmp_path) as checkpoint:
        raw = torch.from_numpy(np.array(checkpoint.array("model.embed_tokens.weight")))
    stored = raw.view(TORCH[source])
    expected = stored if source == wanted else stored.to(TORCH[wanted])
    ours = tensor(build(tmp_path, arch), arch, "embed")[:130]
    assert bool(((ours == expected) | (ours.isnan() & expected.isnan())).all())
    assert torch.equal(torch.signbit(ours[0, :11]), torch.signbit(expected[0, :11]))


def test_tensors_are_checked_before_the_first_byte(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    arch = read_model_config(path)

    def refusal(change: dict[str, Any]) -> str:
        other = type(arch)(**{f: getattr(arch, f) for f in arch.__struct_fields__} | change)
        out = np.full(image_layout(other).num_bytes, 0xAB, dtype=np.uint8)
        with open_checkpoint(path) as checkpoint, pytest.raises(WeftError) as info:
            build_image(checkpoint, other, memoryview(out))
        assert bool((out == 0xAB).all())
        return str(info.value)

    assert "model.layers.2.input_layernorm.weight' is missing" in refusal({"num_layers": 3})
    assert "self_attn.q_proj.bias' is missing" in refusal({"qkv_bias": True})
    message = refusal({"vocab_size": 129})
    assert "embed_tokens" in message
    assert "[128, 64], config.json asks for [129, 64]" in message
    with open_checkpoint(path) as checkpoint, pytest.raises(ValueError, match="needs"):
        build_image(checkpoint, arch, memoryview(bytearray(100)))


def test_an_untied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tied=True, config_extra={"tie_word_embeddings": False})
    with pytest.raises(WeftError, match=r"lm_head\.weight' is missing"):
        build(path, read_model_config(path))


def test_key_changes_with_whatever_changes_the_image(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, shards=2)
    arch = read_model_config(path)
    key = image_key(path, arch)
    assert key == image_key(path, arch)
    assert len(key) == 64
    wide = read_model_config(path, "float64")
    assert image_key(path, wide) != key
    shard = next(path.glob("*.safetensors"))
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    touched = image_key(path, arch)
    assert touched != key
    shard.write_bytes(shard.read_bytes() + b"\0" * 8)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert image_key(path, arch) not in (key, touched)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_shard_truncated_while_it_is_read_is_an_error_and_no_signal(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mapped files the process would end by SIGBUS."""
    monkeypatch.setattr(image_module, "PIECE_BYTES", 1000)
    path = tiny_checkpoint(tmp_path, family="phi3", shards=2)
    arch = read_model_config(path)
    shards = sorted(path.glob("*.safetensors"))

    def truncate(_: int) -> None:
        for shard in shards:
            os.truncate(shard, 6000)

    with pytest.raises(WeftError, match="became shorter while it was read"):
        build(path, arch, threads=threads, progress=truncate)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_of_its_own_beside_tied_embeddings(tmp_path: Path, dtype: str) -> None:
    """transformers uses a stored head where it differs: to leave it out would be another model."""
    path = tiny_checkpoint(tmp_path, tied=True, dtype=dtype)
    arch = read_model_config(path)
    with open_checkpoint(path) as checkpoint:
        tensors = {
            name: convert(checkpoint.array(name), dtype, "float32") for name in checkpoint.tensors
        }
    head = tensors["model.embed_tokens.weight"].copy()
    write_safetensors_model(path, tensors | {"lm_head.weight": head}, dtype=dtype)
    build(path, arch)
    head[-1, -1] += 1
    write_safetensors_model(path, tensors | {"lm_head.weight": head}, dtype=dtype)
    with pytest.raises(WeftError, match="set `tie_word_embeddings` to false"):
        build(path, arch)
    build(path, msgspec.structs.replace(arch, tied_embeddings=False))
