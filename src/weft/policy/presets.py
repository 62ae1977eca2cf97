"""Combinations of policies under a name."""

from dataclasses import dataclass

from weft.core.errors import WeftError
from weft.policy.decode.base import DecodeShare
from weft.policy.decode.round_robin import WeightedRoundRobin
from weft.policy.prefill.base import PrefillOrder
from weft.policy.prefill.fcfs import Fcfs
from weft.policy.residency.base import Residency
from weft.policy.residency.dedicated import Dedicated
from weft.policy.residency.lru import Lru

PRESETS = ("weft", "dedicated")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a unit's scheduler asks."""

    name: str
    prefill: PrefillOrder
    decode: DecodeShare
    residency: Residency


def preset(name: str, *, turn_s: float | None = None) -> Preset:
    """`weft`: the default. `dedicated`: all models resident for ever, short turns by iteration.

    Raises WeftError for an unknown name.
    """
    if name == "weft":
        decode = WeightedRoundRobin(1.0 if turn_s is None else turn_s)
        return Preset(name=name, prefill=Fcfs(), decode=decode, residency=Lru())
    if name == "dedicated":
        decode = WeightedRoundRobin(0.02 if turn_s is None else turn_s)
        return Preset(name=name, prefill=Fcfs(), decode=decode, residency=Dedicated())
    raise WeftError(f"unknown policy {name!r}; known: {', '.join(PRESETS)}")
