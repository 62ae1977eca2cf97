"""A linear cost model: what the modelled executor charges, and what planners may ask.

Defaults are one H200 with a 7B model in bf16 (benchmarks and h200 measurements: 55 GB/s host
link, 4.3 ms a decode step, 20 us a prefill token).
"""

import msgspec

from weft.core.actions import CopyKv, Drop, Load, MapKv, StepPlan, UnmapKv
from weft.core.model import ModelSpec


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """Times of a unit's actions, in nanoseconds; linear in what they touch."""

    step_ns: int = 4_300_000
    """A step's floor: reading the weights once."""
    token_ns: int = 20_000
    """Each token of a step."""
    link_bytes_per_s: float = 55e9
    """Host link, each direction."""
    granule_map_ns: int = 90_000
    call_ns: int = 10_000
    """Floor of any action."""

    def iteration_ns(self, plan: StepPlan) -> int:
        """One iteration of a step."""
        return self.step_ns + self.token_ns * sum(row.num_tokens for row in plan.rows)

    def copy_ns(self, num_bytes: int) -> int:
        return self.call_ns + int(num_bytes / self.link_bytes_per_s * 1e9)

    def move_ns(self, action: Load | Drop | MapKv | UnmapKv | CopyKv, spec: ModelSpec) -> int:
        match action:
            case Load(granules=granules):
                return self.copy_ns(spec.weight_bytes) + self.granule_map_ns * len(granules)
            case CopyKv(pages=pages):
                return self.copy_ns(len(pages) * spec.page_bytes)
            case _:
                return self.call_ns + self.granule_map_ns * len(action.granules)
