"""Log probabilities of the model itself: of its raw logits, before anything is done to them.

Shape legend: P positions, V vocabulary, K most probable ids.
"""

import numpy as np
import torch

from weft.core.request import TokenLogprobs

LEAST = -9999.0
"""What is less probable than this is reported as this: a logit of minus infinity has no finite
logarithm, and JSON has no other."""


def score(logits_PV: torch.Tensor, targets_P: torch.Tensor, top: int) -> torch.Tensor:
    """float64 [P, 1 + 2K]: the target's log probability, the `top` most probable ids and theirs,
    best first, equal ones by id. For `unpack`.

    Log-softmax in float32, in float64 for float64 logits; NaN counts as minus infinity.
    """
    wide = torch.float64 if logits_PV.dtype == torch.float64 else torch.float32
    x_PV = logits_PV.to(wide)
    x_PV = torch.log_softmax(torch.where(torch.isnan(x_PV), float("-inf"), x_PV), dim=-1)
    x_PV = torch.nan_to_num(x_PV, nan=LEAST, neginf=LEAST).clamp_(min=LEAST)
    parts = [x_PV.gather(1, targets_P[:, None])]
    if top:
        ids_PK = _best_ids(x_PV, min(top, x_PV.shape[1]))
        parts += [ids_PK, x_PV.gather(1, ids_PK)]
    return torch.cat([part.to(torch.float64) for part in parts], dim=1)


def unpack(scored: np.ndarray, token: int, top: int) -> TokenLogprobs:
    """One row of `score`, for its target `token` and the `top` best of those that are there."""
    width = (len(scored) - 1) // 2
    ids, values = scored[1 : 1 + width][:top], scored[1 + width :][:top]
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return TokenLogprobs(token, float(scored[0]), tuple((int(i), v) for i, v in pairs))


def _best_ids(x_PV: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [P, K]: which of equals topk names is nobody's promise, so the id is part of the key
    where it fits (float32 as integers in the same order), and a stable sort does where not."""
    if x_PV.dtype == torch.float64:
        return torch.sort(x_PV, dim=-1, descending=True, stable=True).indices[:, :count]
    bits = x_PV.contiguous().view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    vocab = x_PV.shape[1]
    keys = (ordered << 32) + (vocab - 1 - torch.arange(vocab, device=x_PV.device))
    return vocab - 1 - (torch.topk(keys, count, dim=-1).values & 0xFFFFFFFF)
