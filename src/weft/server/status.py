"""What GET /weft/status answers. Plain structs: the command line reads them without a server."""

import msgspec

from weft.hub.base import Health, PoolView


class StatusReply(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    health: Health
    pool: PoolView
