"""A `Grammar` as llguidance reads it, within bounds on size, depth and the work it may cause.

llguidance (https://github.com/guidance-ai/llguidance) counts its work in fuel and items instead of
time, so that a grammar is accepted or refused the same everywhere.
"""

import json
from functools import lru_cache
from typing import Any

from weft.core.errors import WeftError
from weft.core.request import Grammar

MAX_CHARS = 1 << 16
"""Of a grammar's text: the largest one that passes takes some 0.4 s to compile."""
MAX_DEPTH = 64
"""Of nested objects and arrays in a JSON Schema."""
MAX_CHOICES = 1024
FIRST_BYTES = 3
"""Of one output are tried: some grammars are compiled and then have too many ways to go on."""
BLANKS = r"[ \n\r\t]{1,16}"
"""Between the tokens of a JSON text: a new line and seven levels of two, not for ever."""
LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


def source(grammar: Grammar) -> str:
    """The text that llguidance compiles. Raises WeftError beyond a bound, or if `text` is not what
    its kind says."""
    from llguidance import LLMatcher

    if len(grammar.text) > MAX_CHARS:
        raise WeftError(
            f"the grammar has {len(grammar.text)} characters; make it at most {MAX_CHARS}"
        )
    match grammar.kind:
        case "json_object":
            return _from_schema({"type": "object"})
        case "json_schema":
            return _from_schema(_parse_json(grammar.text, "the JSON Schema"))
        case "choice":
            return _from_choices(_parse_json(grammar.text, "the list of choices"))
        case "regex":
            return str(LLMatcher.grammar_from_regex(grammar.text))
        case "lark":
            return str(LLMatcher.grammar_from_lark(grammar.text))


def limits() -> Any:
    """llguidance's bounds on the work of compiling and of each mask."""
    from llguidance import LLParserLimits

    return LLParserLimits(**LIMITS)


@lru_cache(maxsize=256)
def check_grammar(grammar: Grammar) -> None:
    """Raises WeftError, in one line, for a grammar that no engine will take. Works for up to half a
    second: not for an event loop's thread."""
    from llguidance import LLMatcher

    matcher = LLMatcher(_bytes_tokenizer(), source(grammar), log_level=0, limits=limits())
    for _ in range(FIRST_BYTES):
        refuse_broken(matcher)
        allowed = matcher.compute_bitmask()
        first = next((byte for byte in range(256) if allowed[byte // 8] >> byte % 8 & 1), None)
        if first is None:
            break
        matcher.consume_token(first)
    refuse_broken(matcher)


def refuse_broken(matcher: Any) -> None:
    """Raises WeftError if llguidance gave this grammar up, with its reason on one line."""
    if matcher.is_error():
        reason = " ".join(str(matcher.get_error()).split())[:300]
        raise WeftError(f"the grammar cannot be used: {reason}")


@lru_cache(maxsize=1)
def _bytes_tokenizer() -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _from_schema(schema: object) -> str:
    from llguidance import LLMatcher

    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise WeftError("a JSON Schema is an object, or true")
    # Parsed and written anew: llguidance pastes the text into its own.
    text = json.dumps(schema, allow_nan=False)
    return str(LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": BLANKS}))


def _from_choices(choices: object) -> str:
    if not isinstance(choices, list) or not 1 <= len(choices) <= MAX_CHOICES:
        raise WeftError(f"choices are a list of 1 .. {MAX_CHOICES} strings")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise WeftError("every choice is a string of at least one character")
    literals = (json.dumps(choice, ensure_ascii=False) for choice in choices)
    return "start: " + " | ".join(literals)


def _parse_json(text: str, what: str) -> object:
    """Raises WeftError for what is no JSON, has numbers that are none, or is nested too deep."""
    try:
        value: object = json.loads(text, parse_constant=_no_constant)
        _check_depth(value, what)
        # Escapes can spell what is no character, and 1e999 is no number.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise WeftError(f"{what} is nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeEncodeError:
        raise WeftError(f"{what} has a lone surrogate, which is no character") from None
    except ValueError as error:
        raise WeftError(f"{what} is not valid JSON: {error}") from None
    return value


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number of JSON")


def _check_depth(value: object, what: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[object] = []
        for one in level:
            if isinstance(one, dict):
                below.extend(one.values())
            elif isinstance(one, list):
                below.extend(one)
        if not below:
            return
        level = below
    raise WeftError(f"{what} is nested deeper than {MAX_DEPTH} levels")
