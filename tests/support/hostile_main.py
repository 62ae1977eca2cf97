"""Serve hostile model folders as far as they let: `python -m support.hostile_main DIR FIRST COUNT`.

A process of its own, because it limits its own memory and processor time: a folder that asks for
much of either ends it. Prints how many folders were refused, and how many could be computed.
"""

import resource
import sys
from pathlib import Path

import numpy as np
import torch

from support.hostile import Mutator, fresh
from support.plain import make_batch
from weft.attention.reference import ReferenceAttention
from weft.core.errors import WeftError
from weft.core.model import Architecture
from weft.models.check import check_checkpoint
from weft.models.decoder import Decoder
from weft.models.hf_config import read_eos_ids, read_model_config
from weft.models.image import build_image, image_key, image_layout
from weft.models.safetensors_file import open_checkpoint

MAX_DATA_BYTES = 2 << 30
CPU_SECONDS_A_FOLDER = 2
MAX_IMAGE_BYTES = 1 << 24


def serve(path: Path) -> None:
    """All that weft does with a folder, up to a step. Raises WeftError alone."""
    report = check_checkpoint(path)
    try:
        arch = read_model_config(path)
        read_eos_ids(path)
        image_key(path, arch)
        with open_checkpoint(path) as checkpoint:
            size = image_layout(arch).num_bytes
            image = np.zeros(size if size < MAX_IMAGE_BYTES else 0, np.uint8)
            if image.size:
                build_image(checkpoint, arch, memoryview(image))
    except WeftError as error:
        if report.servable:
            raise AssertionError(f"check calls it servable: {error}") from error
        raise
    if image.size:
        step(arch, torch.from_numpy(image))


def step(arch: Architecture, image: torch.Tensor) -> None:
    """Whatever was accepted can be computed, if only to NaN."""
    decoder = Decoder(arch, image, max_tokens=8)
    tokens = min(3, arch.max_position)
    kv = decoder.kv_view(torch.zeros(arch.kv_bytes_per_token * 8, dtype=torch.uint8), 8)
    batch = make_batch([([0] * tokens, 0)], [[0]])
    attention = ReferenceAttention()
    attention.plan(batch, kv)
    assert decoder.forward(batch, attention, kv).shape == (1, arch.vocab_size)


def main(folder: Path, first: int, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    seconds = 30 + CPU_SECONDS_A_FOLDER * count
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    refused = 0
    for seed in range(first, first + count):
        fresh(folder)
        Mutator(folder, seed).build()
        try:
            serve(folder)
        except WeftError as error:
            refused += 1
            text = str(error)
            assert len(text) < 2000 and "\n" not in text, f"seed {seed}: {text[:3000]!r}"
        except BaseException:
            print(f"seed {seed}", flush=True)
            raise
    print(f"refused {refused} of {count}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
