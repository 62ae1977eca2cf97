"""Identifiers. All are plain values, so that actions and events serialise as they are."""

from typing import NewType

RequestId = NewType("RequestId", int)
"""Unique in one pool's life; given by the hub."""

ModelName = NewType("ModelName", str)
"""The name a model is served under; unique in a pool."""

ActionId = NewType("ActionId", int)
"""Unique in one incarnation of a unit; ascending in the order of planning."""

PageId = NewType("PageId", int)
"""Index of a KV page in its model's own virtual KV range: page p lies at p * page_bytes."""

GranuleId = NewType("GranuleId", int)
"""Index of a physical granule of the arena, 0 .. num_granules - 1."""

SlotId = NewType("SlotId", int)
"""Index of a request's device-side row state (page table row and last sampled token)."""
