"""Checkpoints that strangers wrote: read whole, or refused with one clear line."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tiny import encode, tiny_checkpoint, write_safetensors
from weft.core.errors import WeftError
from weft.models.safetensors_file import INDEX, SINGLE, open_checkpoint


def write_raw(
    folder: Path, header: Any, data: bytes = b"\0" * 64, *, length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (folder / SINGLE).write_bytes(size + text + data)
    return folder


def entry(**change: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | change


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_reads_what_was_written(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.standard_normal((i, 3)).astype(np.float32) for i in range(4)}
    write_safetensors(tmp_path / SINGLE, tensors, dtype=dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        assert checkpoint.main_dtype() == dtype
        for name, value in tensors.items():
            array = checkpoint.array(name)
            assert array.shape == value.shape
            assert array.tobytes() == encode(value, dtype)
            del array


def test_reads_what_the_official_writer_wrote(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"a": value, "scalar": np.array(2, np.float32)}, tmp_path / SINGLE)
    with open_checkpoint(tmp_path) as checkpoint:
        assert np.array_equal(checkpoint.array("a"), value)
        assert checkpoint.array("scalar").shape == ()


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    one = tiny_checkpoint(tmp_path / "one")
    three = tiny_checkpoint(tmp_path / "three", shards=3)
    with open_checkpoint(one) as a, open_checkpoint(three) as b:
        assert len(b.files) == 3
        assert set(a.tensors) == set(b.tensors)
        assert all(a.array(name).tobytes() == b.array(name).tobytes() for name in a.tensors)


def test_links_as_in_hub_caches_are_followed(tmp_path: Path) -> None:
    real = tiny_checkpoint(tmp_path / "blobs", shards=2)
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in real.iterdir():
        (linked / file.name).symlink_to(file)
    with open_checkpoint(linked) as checkpoint:
        assert checkpoint.tensors


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "does not begin"),
        (b"[]", "does not begin"),
        (b"{", "not valid JSON"),
        (b'{"a": 1}', "malformed"),
        (b'{"a": {}, "a": {}}', "twice"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "deep|malformed"),
        (b'{"a": NaN}', "NaN"),
        (b"{\xff}", "not valid JSON"),
        ({"a": entry(dtype="I8")}, "dtype I8 is not supported; supported: BF16"),
        ({"a": entry(dtype="F8_E4M3")}, "F8_E4M3"),
        ({"a": entry(dtype=["F32"])}, "dtype"),
        ({"a": entry(dtype=None)}, "dtype"),
        ({"a": entry(shape=None)}, "shape"),
        ({"a": entry(shape=[4.0])}, "shape"),
        ({"a": entry(shape=[True, 4])}, "shape"),
        ({"a": entry(shape=[-4])}, "shape"),
        ({"a": entry(shape=[1] * 9)}, "shape"),
        ({"a": entry(shape=[1 << 61, 1 << 61, 0])}, "needs 0"),
        ({"a": entry(shape=[10**40])}, "shape"),
        ({"a": entry(shape=[1 << 61, 1 << 61])}, "data_offsets span"),
        ({"a": entry(data_offsets=[0, 12])}, "span 12 bytes, F32 .4. needs 16"),
        ({"a": entry(data_offsets=[16, 0])}, "span"),
        ({"a": entry(data_offsets=[-16, 0])}, "data_offsets"),
        ({"a": entry(data_offsets=[0.0, 16.0])}, "data_offsets"),
        ({"a": entry(data_offsets=[0, 16, 32])}, "data_offsets"),
        ({"a": entry(data_offsets={"0": 16})}, "data_offsets"),
        ({"a": entry(data_offsets=[56, 72])}, "truncated"),
        ({"a": entry(), "b": entry(data_offsets=[8, 24])}, "'b' overlaps 'a'"),
        ({"a": entry(), "b": entry()}, "overlaps"),
        ({"x" * 600: entry()}, "malformed"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, words: str) -> None:
    with pytest.raises(WeftError, match=words) as refusal:
        open_checkpoint(write_raw(tmp_path, header))
    assert SINGLE in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("length", [100_000_001, 1 << 63, (1 << 64) - 1, 1000])
def test_absurd_header_lengths(tmp_path: Path, length: int) -> None:
    with pytest.raises(WeftError, match=r"absurd|truncated"):
        open_checkpoint(write_raw(tmp_path, {}, length=length))


def test_truncation_at_any_length_is_noticed(tmp_path: Path) -> None:
    file = tiny_checkpoint(tmp_path, layers=1, tokenizer=False) / SINGLE
    whole = file.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(WeftError, match="truncated"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../model-00001-of-00002.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".hidden.safetensors",
        "model.bin",
        "a\0.safetensors",
        "",
        "x" * 300 + ".safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_shard_names_that_are_not_plain(tmp_path: Path, name: Any) -> None:
    tiny_checkpoint(tmp_path, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeftError, match="plain"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{"])
def test_malformed_index(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(WeftError, match=r"weight_map|JSON"):
        open_checkpoint(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    tensor = next(t for t, name in index["weight_map"].items() if name == names[0])

    def expect(change: dict[str, str], words: str) -> None:
        text = json.dumps({"weight_map": index["weight_map"] | change})
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(WeftError, match=words):
            open_checkpoint(tmp_path)

    expect({tensor: names[1]}, "is not in")
    expect({"ghost": names[0]}, "ghost")
    expect({tensor: "absent.safetensors"}, "absent.safetensors")
    expect({f"t{i}": f"s{i}.safetensors" for i in range(1025)}, "more than 1024 shards")
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / names[0]).read_bytes())
    expect({"x": "copy.safetensors"}, "is also in")


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="Hugging Face"):
        open_checkpoint(tmp_path)
    with pytest.raises(WeftError, match="Hugging Face"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never unpickled")
    with pytest.raises(WeftError, match="convert it to safetensors"):
        open_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "pipe.safetensors"}}')
    with pytest.raises(WeftError, match="not a regular file"):
        open_checkpoint(tmp_path)


SIZES = st.integers(-2, 20) | st.integers() | st.floats() | st.none()
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "", 3]),
        "shape": st.lists(SIZES, max_size=3) | SIZES,
        "data_offsets": st.lists(SIZES, max_size=3) | st.tuples(SIZES, SIZES),
    },
)


@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=3), ENTRIES | SIZES, max_size=3)
    | st.binary(max_size=40).map(lambda raw: b"{" + raw),
    length=st.none() | st.integers(0, (1 << 64) - 1) | st.integers(0, 60),
    data=st.binary(max_size=64),
)
def test_any_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any, length: int | None, data: bytes
) -> None:
    folder = write_raw(tmp_path_factory.mktemp("raw"), header, data, length=length)
    try:
        with open_checkpoint(folder) as checkpoint:
            for name, info in checkpoint.tensors.items():
                assert checkpoint.array(name).nbytes == info.num_bytes
    except WeftError as refusal:
        assert str(folder) in str(refusal)


def test_a_shard_that_shrinks_after_it_was_opened_is_an_error_and_no_signal(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    with open_checkpoint(folder) as checkpoint:
        name = "model.norm.weight"
        assert checkpoint.array(name).size
        os.truncate(folder / "model.safetensors", 4096)
        with pytest.raises(WeftError, match="became shorter"):
            checkpoint.array(name)


def test_a_shard_that_is_deleted_after_it_was_opened_is_read_to_its_end(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    with open_checkpoint(folder) as checkpoint:
        before = checkpoint.array("model.norm.weight").copy()
        (folder / "model.safetensors").unlink()
        assert (checkpoint.array("model.norm.weight") == before).all()
