"""The CPU arena obeys, refuses contradictions, and never holds more than what is mapped."""

import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from weft.memory.arena_cpu import CpuArena, resident_bytes
from weft.memory.base import UNMAPPED, ArenaError, RangeName, mapping_difference

GRANULE = 8192


def arena(num_granules: int = 6, *, poison: bool = False) -> CpuArena:
    made = CpuArena(GRANULE, num_granules, poison=poison)
    made.reserve("a", 3 * GRANULE - 5, 4 * GRANULE)
    made.reserve("b", GRANULE, 2 * GRANULE)
    return made


def test_map_write_unmap_gives_memory_back_at_the_same_address() -> None:
    made = arena()
    whole = made.tensor("a", "weights")
    assert whole.numel() == 3 * GRANULE
    address = whole.data_ptr()
    made.map("a", "weights", [0, 1, 2], [5, 0, 3])
    whole.fill_(7)
    assert resident_bytes(whole) == 3 * GRANULE
    made.unmap("a", "weights", [1], [0])
    assert made.mapped()["a/weights"] == (5, UNMAPPED, 3)
    assert made.tensor("a", "weights").data_ptr() == address
    assert int(whole[:GRANULE].sum()) == 7 * GRANULE
    assert resident_bytes(whole[GRANULE : 2 * GRANULE]) == 0
    made.map("a", "weights", [1], [1])
    assert int(whole[GRANULE : 2 * GRANULE].sum()) == 0


def test_poison_shows_reads_of_what_was_never_written() -> None:
    made = arena(poison=True)
    made.map("a", "kv", [2], [4])
    fresh = made.tensor("a", "kv")[2 * GRANULE : 3 * GRANULE]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert math.isnan(float(fresh.view(dtype)[0]))
    fresh.zero_()
    made.unmap("a", "kv", [2], [4])
    made.map("a", "kv", [2], [4])
    assert bool((fresh == 255).all())


@pytest.mark.parametrize(
    ("model", "name", "at", "granules", "words"),
    [
        ("a", "weights", [0], [1], "holds granule 0 already"),
        ("a", "kv", [0], [0], "granule 0 is mapped at a/weights"),
        ("a", "kv", [0, 1], [1, 6], "outside 0 .. 5"),
        ("a", "kv", [0, -1], [1, 2], "outside 0 .. 3"),
        ("a", "kv", [0, 4], [1, 2], "outside 0 .. 3"),
        ("a", "kv", [0, 1], [2, 2], "twice"),
        ("a", "kv", [1, 1], [1, 2], "twice"),
        ("a", "kv", [0, 1], [1], "2 places for 1"),
        ("c", "kv", [0], [1], "not reserved"),
    ],
)
def test_a_refused_map_changes_nothing(
    model: str, name: RangeName, at: list[int], granules: list[int], words: str
) -> None:
    made = arena()
    made.map("a", "weights", [0], [0])
    before = made.mapped()
    with pytest.raises(ArenaError, match=words):
        made.map(model, name, at, granules)
    assert made.mapped() == before
    assert made.mapped_granules == 1


@pytest.mark.parametrize(
    ("at", "granules"), [([1], [0]), ([0], [1]), ([0, 1], [0, 1]), ([0, 0], [0, 0])]
)
def test_a_refused_unmap_changes_nothing(at: list[int], granules: list[int]) -> None:
    made = arena()
    made.map("a", "weights", [0], [0])
    made.tensor("a", "weights")[0] = 9
    with pytest.raises(ArenaError):
        made.unmap("a", "weights", at, granules)
    assert int(made.tensor("a", "weights")[0]) == 9
    assert made.mapped_granules == 1


def test_release_and_reserve() -> None:
    made = arena()
    made.map("b", "kv", [0], [0])
    with pytest.raises(ArenaError, match="still holds granules"):
        made.release("b")
    with pytest.raises(ArenaError, match="reserved already"):
        made.reserve("b", 1, 1)
    made.unmap("b", "kv", [0], [0])
    view = made.tensor("b", "kv")
    made.release("b")
    with pytest.raises(ArenaError, match="not reserved"):
        made.tensor("b", "kv")
    view.fill_(1)  # a view outlives the range: its memory is still there
    made.reserve("b", 1, GRANULE * 5)
    assert made.tensor("b", "kv").numel() == 5 * GRANULE
    made.close()
    made.close()


def test_mapping_difference_names_the_first() -> None:
    assert mapping_difference({"a/kv": (1, -1)}, {"a/kv": (1,), "b/kv": (-1, -1)}) is None
    assert mapping_difference({"a/kv": (1, 2)}, {"a/kv": (1,)}) == (
        "a/kv[1]: the arena has granule 2, the ledger -1"
    )
    assert "b/kv[0]" in (mapping_difference({}, {"b/kv": (4,)}) or "")


@pytest.mark.parametrize("granule", [0, -4096, 1000])
def test_a_granule_is_whole_system_pages(granule: int) -> None:
    with pytest.raises(ValueError, match="granule_bytes"):
        CpuArena(granule, 4)


class ArenaMachine(RuleBasedStateMachine):
    """Random orders against a plain model of what is where and what was written there."""

    places = st.lists(st.integers(-1, 5), max_size=4)
    ids = st.lists(st.integers(-1, 5), max_size=4)

    @initialize(poison=st.booleans())
    def begin(self, poison: bool) -> None:
        self.arena = CpuArena(GRANULE, 5, poison=poison)
        self.fresh = 0xFF if poison else 0
        self.at: dict[tuple[str, RangeName], dict[int, int]] = {}
        self.content: dict[tuple[str, RangeName, int], int] = {}
        self.stamp = 0

    @rule(model=st.sampled_from("ab"), weights=st.integers(1, 3), kv=st.integers(1, 5))
    def reserve(self, model: str, weights: int, kv: int) -> None:
        if (model, "kv") in self.at:
            with pytest.raises(ArenaError):
                self.arena.reserve(model, weights * GRANULE, kv * GRANULE)
            return
        self.arena.reserve(model, weights * GRANULE, kv * GRANULE)
        self.at[model, "weights"] = dict.fromkeys(range(weights), UNMAPPED)
        self.at[model, "kv"] = dict.fromkeys(range(kv), UNMAPPED)

    @precondition(lambda self: self.at)
    @rule(model=st.sampled_from("ab"))
    def release(self, model: str) -> None:
        ranges = [self.at.get((model, name), {}) for name in ("weights", "kv")]
        if not ranges[0] or any(g != UNMAPPED for r in ranges for g in r.values()):
            with pytest.raises(ArenaError):
                self.arena.release(model)
            return
        self.arena.release(model)
        del self.at[model, "weights"], self.at[model, "kv"]

    @precondition(lambda self: self.at)
    @rule(data=st.data(), at=places, ids=ids, exact=st.booleans())
    def map(self, data: st.DataObject, at: list[int], ids: list[int], exact: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.at)))
        if exact:
            free_places = [p for p, g in self.at[key].items() if g == UNMAPPED]
            free = sorted(set(range(5)) - self._used())
            count = data.draw(st.integers(0, min(len(free_places), len(free))))
            at, ids = free_places[:count], data.draw(st.permutations(free))[:count]
        legal = (
            len(at) == len(ids) == len(set(at)) == len(set(ids))
            and all(self.at[key].get(p) == UNMAPPED for p in at)
            and all(0 <= g < 5 and g not in self._used() for g in ids)
        )
        if not legal:
            with pytest.raises(ArenaError):
                self.arena.map(*key, at, ids)
            return
        self.arena.map(*key, at, ids)
        for place, granule in zip(at, ids, strict=True):
            self.at[key][place] = granule
            self.content[(*key, place)] = self.fresh

    @precondition(lambda self: self.at)
    @rule(data=st.data(), at=places, ids=ids, exact=st.booleans())
    def unmap(self, data: st.DataObject, at: list[int], ids: list[int], exact: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.at)))
        if exact:
            held = [p for p, g in self.at[key].items() if g != UNMAPPED]
            at = data.draw(st.permutations(held))[: data.draw(st.integers(0, len(held)))]
            ids = [self.at[key][p] for p in at]
        legal = len(at) == len(ids) == len(set(at)) and all(
            g != UNMAPPED and self.at[key].get(p) == g for p, g in zip(at, ids, strict=True)
        )
        if not legal:
            with pytest.raises(ArenaError):
                self.arena.unmap(*key, at, ids)
            return
        self.arena.unmap(*key, at, ids)
        for place in at:
            self.at[key][place] = UNMAPPED
            del self.content[(*key, place)]

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        model, name, place = data.draw(st.sampled_from(sorted(self.content)))
        self.stamp = (self.stamp + 1) % 251
        self._granule(model, name, place).fill_(self.stamp)
        self.content[model, name, place] = self.stamp

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "arena"):
            return
        expected = {f"{m}/{n}": tuple(at.values()) for (m, n), at in self.at.items()}
        assert self.arena.mapped() == expected
        assert self.arena.mapped_granules == len(self._used()) <= 5
        for (model, name, place), value in self.content.items():
            assert bool((self._granule(model, name, place) == value).all())

    def _used(self) -> set[int]:
        return {g for at in self.at.values() for g in at.values() if g != UNMAPPED}

    def _granule(self, model: str, name: RangeName, place: int) -> torch.Tensor:
        return self.arena.tensor(model, name)[place * GRANULE : (place + 1) * GRANULE]


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
