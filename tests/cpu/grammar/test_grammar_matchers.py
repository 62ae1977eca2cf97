"""Whatever is drawn under a mask fits its grammar: random tokens, random schemas, any order of
questions."""

import json
import re
import threading
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from support.tiny import EOS_ID, write_tokenizer
from weft.core.errors import WeftError
from weft.core.request import Grammar
from weft.grammar.matchers import Matchers
from weft.grammar.source import check_grammar
from weft.grammar.tokenizers import Tokenizers, Vocabulary

SIZE = 512


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, SIZE)
    return Vocabulary(str(folder / "tokenizer.json"), SIZE, (EOS_ID,))


@lru_cache
def tokenizer_of(path: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


def text_of(vocabulary: Vocabulary, tokens: tuple[int, ...]) -> str:
    tokenizer = tokenizer_of(vocabulary.path)
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False))


def allowed(mask: np.ndarray) -> list[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return [int(i) for i in np.nonzero(bits)[0]]


def babble(
    vocabulary: Vocabulary,
    grammar: Grammar,
    rng: Random,
    *,
    stop_ids: tuple[int, ...] = (EOS_ID,),
    most: int = 400,
) -> tuple[tuple[int, ...], bool]:
    """Random tokens that the masks allow: (tokens, whether they came to an end)."""
    matchers, outputs = Matchers(), ()
    while len(outputs) < most:
        mask = matchers.mask(vocabulary, 1, grammar, outputs, stop_ids)
        if mask is None:
            return outputs, True
        choices = allowed(mask)
        ends = [t for t in choices if t in stop_ids]
        closing = [t for t in choices if text_of(vocabulary, (t,)) in ('"', "}", "]")]
        token = (
            rng.choice(ends or closing or choices) if rng.random() < 0.4 else rng.choice(choices)
        )
        if token in stop_ids:
            return outputs, True
        outputs += (token,)
    return outputs, False


def random_schema(rng: Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["integer", "number", "boolean", "null", "string", "enum", "bounded"]
    kinds += ["object", "array", "either"] if depth < 3 else []
    match rng.choice(kinds):
        case "enum":
            return {"enum": rng.sample(["a", "b c", 1, None, True, 'q"'], rng.randint(1, 4))}
        case "bounded":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 30)}
        case "string":
            low = rng.randint(0, 3)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 5)}
        case "object":
            names = rng.sample(["x", "yy", "z z", 'k"'], rng.randint(0, 3))
            required = [n for n in names if rng.random() < 0.6]
            properties = {n: random_schema(rng, depth + 1) for n in names}
            return {
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": False,
            }
        case "array":
            low = rng.randint(0, 2)
            most = low + rng.randint(0, 2)
            return {
                "type": "array",
                "items": random_schema(rng, depth + 1),
                "minItems": low,
                "maxItems": most,
            }
        case "either":
            return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
        case kind:
            return {"type": kind}


TYPES = {"null": type(None), "boolean": bool, "string": str, "object": dict, "array": list}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """A validator of what `random_schema` makes."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    kind = schema["type"]
    if kind in ("integer", "number"):
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        whole = numeric and (kind == "number" or float(value).is_integer())
        return whole and schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if not isinstance(value, TYPES[kind]):
        return False
    if kind == "string":
        return schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "array":
        inside = schema["minItems"] <= len(value) <= schema["maxItems"]
        return inside and all(fits(one, schema["items"]) for one in value)
    if kind == "object":
        known = schema["properties"]
        whole = set(schema["required"]) <= set(value) <= set(known)
        return whole and all(fits(one, known[name]) for name, one in value.items())
    return True


@pytest.mark.parametrize("seed", range(60))
def test_what_ends_validates(vocabulary: Vocabulary, seed: int) -> None:
    rng = Random(seed)
    schema = random_schema(rng)
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    check_grammar(grammar)
    ended = 0
    for _ in range(3):
        outputs, over = babble(vocabulary, grammar, rng)
        ended += over
        if over:
            value = json.loads(text_of(vocabulary, outputs))
            assert fits(value, schema), f"{value} under {schema}"
    assert ended, f"never came to an end under {schema}"


def test_the_validator_of_this_test_can_say_no() -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}
    assert fits([1], schema)
    assert not any(fits(v, schema) for v in ([], [1, 2, 3], ["1"], [True], [1.5], {"a": 1}))


@pytest.mark.parametrize("kind", ["json_object", "regex", "choice", "lark"])
def test_the_other_kinds(vocabulary: Vocabulary, kind: Any) -> None:
    rng = Random(4)
    text = {
        "json_object": "",
        "regex": r"[a-c]{2,5}(-[0-9]+)?;",
        "choice": json.dumps(["no", "not at all", 'a"\\b\n']),
        "lark": 'start: "(" start ")" | "[" start "]" | /[xy]/\n',
    }[kind]
    ended = 0
    for _ in range(20):
        outputs, over = babble(vocabulary, Grammar(kind=kind, text=text), rng)
        ended += over
        said = text_of(vocabulary, outputs)
        if not over:
            continue
        if kind == "json_object":
            assert isinstance(json.loads(said), dict)
        elif kind == "regex":
            assert re.fullmatch(text, said)
        elif kind == "choice":
            assert said in json.loads(text)
        else:
            assert re.fullmatch(r"[(\[]*[xy][)\]]*", said)
    assert ended > 10


def test_a_matcher_that_was_forgotten_or_sent_back_says_the_same(vocabulary: Vocabulary) -> None:
    """Many outputs at once through matchers with room for three, in any order, some cut."""
    rng = Random(1)
    grammar = Grammar(kind="json_object")
    streams = [babble(vocabulary, grammar, rng, most=30)[0] for _ in range(8)]
    few, at = Matchers(max_matchers=3), [0] * 8
    for _ in range(400):
        i = rng.randrange(8)
        at[i] = (
            rng.randrange(len(streams[i]) + 1)
            if rng.random() < 0.2
            else min(at[i] + 1, len(streams[i]))
        )
        got = few.mask(vocabulary, i, grammar, streams[i][: at[i]], (EOS_ID,))
        want = Matchers().mask(vocabulary, 0, grammar, streams[i][: at[i]], (EOS_ID,))
        assert (got is None) == (want is None)
        assert got is None or np.array_equal(got, want)


def test_stop_ids_and_eos_come_exactly_where_the_grammar_accepts(vocabulary: Vocabulary) -> None:
    grammar = Grammar(kind="regex", text="a+b?")
    a, b = (_id(vocabulary, letter) for letter in "ab")
    matchers = Matchers()

    def ask(outputs: tuple[int, ...], stop_ids: tuple[int, ...]) -> list[int] | None:
        mask = matchers.mask(vocabulary, 0, grammar, outputs, stop_ids)
        return None if mask is None else allowed(mask)

    begin, going = ask((), (EOS_ID, 9)), ask((a,), (EOS_ID, 9))
    assert begin is not None and a in begin and EOS_ID not in begin and 9 not in begin
    assert going is not None and {a, b, EOS_ID, 9} <= {*going}
    ignoring = ask((a,), ())
    assert ignoring is not None and EOS_ID not in ignoring, "an ignored EOS is not drawn"
    assert ask((a, b), (EOS_ID,)) is None
    # A stop id that the grammar itself could go on with ends the output, so it waits its turn.
    assert b in (ask((a,), (b,)) or [])
    with pytest.raises(WeftError, match="ends the output before it is complete"):
        Matchers().mask(vocabulary, 0, Grammar(kind="regex", text="ab"), (a,), (b,))


def test_ids_beyond_the_tokenizer_and_beyond_the_model(vocabulary: Vocabulary) -> None:
    grammar = Grammar(kind="regex", text="[a-z]+")
    for size in (SIZE + 77, SIZE - 60):
        other = Vocabulary(vocabulary.path, size, (EOS_ID,))
        mask = Matchers().mask(other, 0, grammar, (_id(vocabulary, "a"),), (EOS_ID, 10**6))
        assert mask is not None and len(mask) == -(-size // 32)
        assert max(allowed(mask)) < min(size, SIZE)


def test_outputs_that_do_not_fit_and_tokenizers_that_are_none(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    grammar = Grammar(kind="regex", text="a+")
    with pytest.raises(WeftError, match="cannot be used"):
        Matchers().mask(vocabulary, 0, grammar, (_id(vocabulary, "z"),), ())
    with pytest.raises(WeftError, match="no tokenizer for grammars"):
        Matchers().mask(Vocabulary(str(tmp_path / "none"), 10, ()), 0, grammar, (), ())
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(WeftError, match="no tokenizer for grammars"):
        Matchers().mask(Vocabulary(str(tmp_path / "tokenizer.json"), 10, ()), 0, grammar, (), ())


def test_a_tokenizer_is_read_by_a_thread_and_its_end_is_told(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    told = threading.Event()
    tokenizers = Tokenizers()
    while not tokenizers.ready(vocabulary, told.set):
        assert told.wait(20)
    assert tokenizers.get(vocabulary).vocab_size == SIZE
    told.clear()
    missing = Vocabulary(str(tmp_path / "none"), 10, ())
    while not tokenizers.ready(missing, told.set):
        assert told.wait(20)
    with pytest.raises(WeftError, match="no tokenizer"):
        tokenizers.get(missing)
    tokenizers.close()


def test_blanks_in_json_come_to_an_end(vocabulary: Vocabulary) -> None:
    blank = _id(vocabulary, " ")
    matchers, outputs = Matchers(), (_id(vocabulary, "["),)
    grammar = Grammar(kind="json_schema", text='{"type": "array", "items": {"type": "null"}}')
    for _ in range(17):
        mask = matchers.mask(vocabulary, 0, grammar, outputs, (EOS_ID,))
        assert mask is not None
        if blank not in allowed(mask):
            break
        outputs += (blank,)
    assert len(outputs) == 1 + 16


def _id(vocabulary: Vocabulary, letter: str) -> int:
    return int(tokenizer_of(vocabulary.path).encode(letter).ids[0])
