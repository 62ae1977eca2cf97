"""Which pages hold the KV of which tokens, so that a request with the same beginning need not
compute it again.

A block is one whole page of tokens and everything before it, named by a chained digest: equal
digests mean equal tokens at equal positions, of the same tenant, model and adapter. Its KV lies in
a page of the device, in extents of the host store, or in both. Nothing here is ever needed: a block
is given up whenever somebody asks for its room.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from weft.core.ids import PageId
from weft.core.request import Extent
from weft.ledger.extents import ALIGN_BYTES, ExtentAllocator

Digest = bytes
DIGEST_BYTES = 32
MAX_SHARE = 0.25
"""Of the host store's region for parked KV that blocks may take: what was written once stays in the
machine's memory."""


def root_digest(*names: str) -> Digest:
    """Where a chain begins: whatever besides the tokens decides what the KV is and who may see it
    (tenant, model, adapter, their versions)."""
    digest = blake2b(digest_size=DIGEST_BYTES, person=b"weft-prefix-root")
    for name in names:
        encoded = name.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def next_digest(parent: Digest, ids: Sequence[int]) -> Digest:
    """Of one more page of token ids (each 0 .. 2^32 - 1)."""
    return blake2b(parent + array("I", ids).tobytes(), digest_size=DIGEST_BYTES).digest()


@dataclass(eq=False, slots=True)
class Block:
    """The KV of one page of tokens. At least one of `page` and `extents` is there."""

    index: "PrefixIndex"
    digest: Digest
    page: PageId | None = None
    extents: tuple[Extent, ...] = ()
    pins: int = 0
    """Copies in flight that read its extents."""


class PrefixIndex:
    """The blocks of one model. Who holds pages and in which order they are given up is the
    business of `KvSpace`; that of extents, of `HostShelf`.

    `unsaved`: blocks, of any model, that lie on the device only and are worth a copy in the host
    store: nobody uses them just now, or somebody found them. Oldest first.
    """

    def __init__(self, unsaved: dict[Block, None] | None = None) -> None:
        self.unsaved: dict[Block, None] = {} if unsaved is None else unsaved
        self.blocks: dict[Digest, Block] = {}
        self.by_page: dict[PageId, Block] = {}
        self.num_hosted = 0
        """Blocks with extents."""

    def enter(self, digest: Digest, page: PageId) -> Block | None:
        """Say what a page holds. None, with no effect, if another page holds it already (the first
        one stays: others may share it) or this one is known for something."""
        if page in self.by_page:
            return None
        block = self.blocks.get(digest)
        if block is None:
            block = self.blocks[digest] = Block(self, digest)
        elif block.page is not None:
            return None
        block.page = page
        self.by_page[page] = block
        return block

    def find(self, digests: Iterator[Digest]) -> list[Block]:
        """The longest beginning of the chain that is there."""
        found: list[Block] = []
        for digest in digests:
            block = self.blocks.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def drop_page(self, page: PageId) -> None:
        """The page will hold something else. No effect if it held nothing known."""
        block = self.by_page.pop(page, None)
        if block is not None:
            block.page = None
            self.unsaved.pop(block, None)
            self._forget_empty(block)

    def want_saved(self, page: PageId) -> None:
        """What the index knows this page to hold is worth a copy in the host store."""
        block = self.by_page[page]
        if not block.extents:
            self.unsaved[block] = None

    def drop_extents(self, block: Block) -> None:
        """The caller (`HostShelf`) gives them back."""
        block.extents = ()
        self.num_hosted -= 1
        self._forget_empty(block)

    def _forget_empty(self, block: Block) -> None:
        if block.page is None and not block.extents:
            del self.blocks[block.digest]

    def check_integrity(self) -> None:
        for digest, block in self.blocks.items():
            assert block.digest == digest and block.index is self
            assert block.page is not None or block.extents, "a block that lies nowhere"
            assert block.pins >= 0 and (block.extents or not block.pins)
        pages = {b.page: b for b in self.blocks.values() if b.page is not None}
        assert pages == self.by_page, "pages and blocks disagree"
        assert all(b.page is not None and not b.extents for b in self.unsaved)
        assert self.num_hosted == sum(bool(b.extents) for b in self.blocks.values())


class HostShelf:
    """Extents of one region of the host store, for parked requests and, in what they leave, for
    blocks: least recently used first, blocks are given up when a request needs the room."""

    def __init__(self, extents: ExtentAllocator, max_share: float = MAX_SHARE) -> None:
        self.extents = extents
        self.max_bytes = int(extents.num_bytes * max_share)
        """Blocks take no more than this."""
        self.unsaved: dict[Block, None] = {}
        """What the indices want copied here."""
        self.held_bytes = 0
        self._blocks: dict[Block, None] = {}
        """Oldest first."""

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def take(self, num_bytes: int) -> tuple[Extent, ...] | None:
        """For a request: blocks make way."""
        extents = self.extents.take(num_bytes)
        if extents is not None or _whole(num_bytes) > self.extents.free_bytes + self.held_bytes:
            return extents
        while extents is None and self._give_up_oldest():
            extents = self.extents.take(num_bytes)
        return extents

    def take_for_block(self, num_bytes: int) -> tuple[Extent, ...] | None:
        """Room for one more block; older ones make way, requests do not."""
        size = _whole(num_bytes)
        if size > min(self.max_bytes, self.extents.free_bytes + self.held_bytes):
            return None
        while self.held_bytes + size > self.max_bytes or self.extents.free_bytes < size:
            if not self._give_up_oldest():
                return None
        self.held_bytes += size
        return self.extents.take(num_bytes)

    def give_untaken(self, extents: tuple[Extent, ...]) -> None:
        """What `take_for_block` gave is not used after all."""
        self.held_bytes -= _size(extents)
        self.extents.give(extents)

    def put(self, block: Block, extents: tuple[Extent, ...]) -> None:
        """The KV of `block` lies there now. If it does already elsewhere, these are given back."""
        if block.extents or block.index.blocks.get(block.digest) is not block:
            self.give_untaken(extents)
            return
        block.extents = extents
        block.index.num_hosted += 1
        block.index.unsaved.pop(block, None)
        self._blocks[block] = None

    def touch(self, block: Block) -> None:
        """It was used: it is given up after all others."""
        if block in self._blocks:
            del self._blocks[block]
            self._blocks[block] = None

    def drop(self, block: Block) -> None:
        """Give its extents back. Legal when no copy reads them."""
        assert not block.pins, "a copy reads this"
        if block.extents:
            del self._blocks[block]
            self.give_untaken(block.extents)
            block.index.drop_extents(block)

    def drop_all(self, index: PrefixIndex) -> None:
        """The model is gone."""
        for block in [b for b in self._blocks if b.index is index]:
            self.drop(block)

    def _give_up_oldest(self) -> bool:
        block = next((b for b in self._blocks if not b.pins), None)
        if block is not None:
            self.drop(block)
        return block is not None

    def check_integrity(self) -> None:
        """`extents` is checked by its owner."""
        for block in self._blocks:
            assert block.extents and block.index.blocks.get(block.digest) is block


def _whole(num_bytes: int) -> int:
    """What so many bytes take of the region."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _size(extents: tuple[Extent, ...]) -> int:
    return _whole(sum(extent.num_bytes for extent in extents))
