"""The torch twin of `kernels.checksum`, for bytes on the host; needs no Triton."""

import torch

_STRIP_WORDS = 1 << 22


def word_sum(*parts: torch.Tensor) -> int:
    """sum(word[i] * (2 * i + 1)) mod 2 ** 64, as signed int64, of uint8 tensors, concatenated.

    Each part must be a multiple of 8 bytes.
    """
    total = at = 0
    for part in parts:
        words = part.view(torch.int64)
        for begin in range(0, words.numel(), _STRIP_WORDS):
            strip = words[begin : begin + _STRIP_WORDS]
            index = torch.arange(at, at + strip.numel(), dtype=torch.int64)
            total += int((strip * (2 * index + 1)).sum())
            at += strip.numel()
    low = total & (1 << 64) - 1
    return low - (1 << 64) if low >> 63 else low
