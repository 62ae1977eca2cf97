"""Tokens become text without split characters, and stop strings are found wherever they fall."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from support.tiny import write_tokenizer
from weft.server.detokenize import MAX_HELD_TOKENS, Detokenizer, StopStrings


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tok")
    write_tokenizer(folder, 300)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def pieces_of(tokenizer: Tokenizer, ids: list[int], tail: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, tail)
    return [detokenizer.push(token) for token in ids] + [detokenizer.finish()]


PLAIN = st.characters(exclude_characters="�", codec="utf-8")


@given(text=st.text(PLAIN, max_size=60), cut=st.integers(0, 8))
def test_pieces_join_to_the_text_and_never_split_a_character(
    tokenizer: Tokenizer, text: str, cut: int
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    cut = min(cut, len(ids))
    pieces = pieces_of(tokenizer, ids[cut:], ids[:cut])
    prompt = tokenizer.decode(ids[:cut]).rstrip("�")
    if (cut and not prompt) or cut == len(ids):
        return  # no whole character before the output, or no output
    assert prompt + "".join(pieces) == tokenizer.decode(ids)
    assert all("�" not in piece for piece in pieces)


def test_the_replacement_character_itself_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a�b�", add_special_tokens=False).ids
    assert "".join(pieces_of(tokenizer, ids, [])) == "a�b�"


def test_a_character_is_held_until_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é🙂", add_special_tokens=False).ids
    assert len(ids) == 6
    assert pieces_of(tokenizer, ids, []) == ["", "é", "", "", "", "🙂", ""]


def test_bytes_that_are_no_text_are_given_out_in_the_end(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("é", add_special_tokens=False).ids[0]
    pieces = pieces_of(tokenizer, [half] * (MAX_HELD_TOKENS + 2), [])
    assert pieces[MAX_HELD_TOKENS - 1] != ""
    assert set("".join(pieces)) == {"�"}


def test_many_tokens_without_text_do_not_grow_the_window() -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "".join(chr(96 + i) for i in ids if i)

    detokenizer = Detokenizer(decode, [1])
    assert "".join(detokenizer.push(0) for _ in range(10 * MAX_HELD_TOKENS)) == ""
    assert detokenizer.push(2) == "b"
    assert longest <= MAX_HELD_TOKENS + 2


def test_a_leading_space_is_text_after_a_prompt() -> None:
    """Decoders of the SentencePiece kind drop the first space of what they are given."""
    words = {1: "▁The", 2: "▁capital", 3: "▁is", 4: "▁Par", 5: "is"}
    metaspace = decoders.Metaspace()

    def decode(ids: list[int]) -> str:
        return metaspace.decode([words[i] for i in ids])

    detokenizer = Detokenizer(decode, [1, 2])
    assert [detokenizer.push(i) for i in (3, 4, 5)] == [" is", " Par", "is"]
    assert Detokenizer(decode).push(3) == "is"


def find(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopStrings(stops)
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.found is not None:
            return out, matcher.found
    return out + matcher.finish(), None


def test_a_stop_string_across_pieces_is_cut_and_its_beginning_held_back() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("one E") == "one "
    assert matcher.push("N") == ""
    assert matcher.push("E") == "EN"
    assert matcher.push("NDtail") == ""
    assert matcher.found == "END"
    assert matcher.push("more") == ""


def test_of_two_that_end_together_the_longer_wins() -> None:
    assert find(["c", "abc"], ["xab", "c"]) == ("x", "abc")


def naive(stops: list[str], text: str) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=0, max_size=3),
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
)
def test_stop_strings_agree_with_the_plain_search(stops: list[str], pieces: list[str]) -> None:
    assert find(stops, pieces) == naive(stops, "".join(pieces))


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
    text=st.text("abc", max_size=20),
)
def test_nothing_is_given_out_that_might_belong_to_a_stop_string(
    stops: list[str], text: str
) -> None:
    matcher = StopStrings(stops)
    out = ""
    for end, char in enumerate(text, start=1):
        out += matcher.push(char)
        if matcher.found is not None:
            break
        held = text[len(out) : end]
        assert text.startswith(out)
        assert any(stop.startswith(held) for stop in stops)
