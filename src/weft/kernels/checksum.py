"""A position-dependent 64-bit sum of device memory, for tests of promise 1 at full bandwidth.

sum(word[i] * (2 * i + 1)) mod 2 ** 64 over the int64 words of a piece: any single changed word
changes it (the factor is odd), and so does almost every permutation.
"""

import torch
import triton
import triton.language as tl

BLOCK_WORDS = 8192


@triton.jit(do_not_specialize=["words", "blocks"])
def _sum_kernel(words_address, offsets_ptr, out_ptr, words, blocks, BLOCK: tl.constexpr):
    """Grid (pieces, blocks): the sum of one block of one piece. The memory comes as an address: its
    first bytes may be unmapped."""
    piece = tl.program_id(0)
    block = tl.program_id(1)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets_ptr + piece)
    word = tl.load(words_address.to(offsets_ptr.dtype) + start + at, mask=at < words, other=0)
    tl.store(out_ptr + piece * blocks + block, tl.sum(word * (2 * at + 1), 0))


def device_sums(memory: torch.Tensor, offsets: list[int], num_bytes: int) -> torch.Tensor:
    """int64 [len(offsets)] on the device: the sum of each piece memory[offset : + num_bytes].

    memory: uint8 on the device, 8-byte aligned; offsets and num_bytes multiples of 8. Launched on
    the current stream, waits for nothing.
    """
    if num_bytes % 8 or any(offset % 8 for offset in offsets):
        raise ValueError("checksums are over whole 8-byte words")
    words = num_bytes // 8
    blocks = max(1, triton.cdiv(words, BLOCK_WORDS))
    places = torch.tensor([offset // 8 for offset in offsets], dtype=torch.int64)
    if memory.is_cuda:
        places = places.pin_memory().to(memory.device, non_blocking=True)
    out = torch.empty((len(offsets), blocks), dtype=torch.int64, device=memory.device)
    _sum_kernel[(len(offsets), blocks)](
        memory.data_ptr(), places, out, words, blocks, BLOCK=BLOCK_WORDS, num_warps=8
    )
    return out.sum(1)
