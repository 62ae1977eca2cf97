"""Bounds on a request itself, and what is said of it on its way to the client."""

from typing import Any

import msgspec
import pytest

from support.pool_cases import request, spec
from weft.core.actions import Emit
from weft.core.ids import RequestId
from weft.core.request import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PROMPT_LOGPROBS,
    Request,
    Sampling,
    TokenLogprobs,
)
from weft.policy.dispatch.least_loaded import LeastLoaded
from weft.pool import events as ev
from weft.pool.actions import Reply
from weft.pool.scheduler import PoolScheduler
from weft.pool.shape import shape_error

NAN = float("nan")


def asked(**change: Any) -> Request:
    sampling = {k: v for k, v in change.items() if k in Sampling.__struct_fields__}
    rest = {k: v for k, v in change.items() if k not in sampling}
    return msgspec.structs.replace(request(1), sampling=Sampling(**sampling), **rest)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"max_tokens": 0, "prompt_logprobs": 0},
        {"max_tokens": 0, "embed": "mean"},
        {"prompt_logprobs": MAX_LOGPROBS, "logprobs": MAX_LOGPROBS},
        {"logit_bias": ((0, 100.0), (spec("m").vocab_size - 1, -100.0))},
        {"repetition_penalty": 0.01, "presence_penalty": -2.0, "min_p": 1.0},
    ],
    ids=str,
)
def test_what_may_be_asked(change: dict[str, Any]) -> None:
    assert shape_error(asked(**change), spec("m")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ()}, "at least one token"),
        ({"max_tokens": 0}, "0 is for prompt_logprobs and embeddings"),
        ({"max_tokens": 1, "embed": "last"}, "an embedding draws no tokens"),
        ({"max_tokens": 0, "embed": "last", "prompt_logprobs": 1}, "has no prompt_logprobs"),
        ({"max_tokens": -1, "prompt_logprobs": 1}, "max_tokens"),
        ({"prompt": (10**6,)}, "prompt ids"),
        ({"logit_bias": ((-1, 1.0),)}, "token ids in logit_bias"),
        ({"logit_bias": ((10**6, 1.0),)}, "token ids in logit_bias"),
        ({"logit_bias": ((1, 101.0),)}, "values of logit_bias"),
        ({"logit_bias": ((1, NAN),)}, "values of logit_bias"),
        ({"logit_bias": ((1, 1.0),) * (MAX_LOGIT_BIAS + 1)}, "at most 1024"),
        ({"temperature": NAN}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"min_p": 1.1}, "top_p and min_p"),
        ({"top_p": NAN}, "top_p and min_p"),
        ({"presence_penalty": NAN}, "presence_penalty"),
        ({"frequency_penalty": -101.0}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logprobs": MAX_LOGPROBS + 1}, "logprobs of at most"),
        ({"prompt_logprobs": -1}, "prompt_logprobs of at most"),
    ],
    ids=str,
)
def test_what_may_not_be_asked(change: dict[str, Any], message: str) -> None:
    error = shape_error(asked(**change), spec("m"))
    assert error is not None and message in error.message
    assert error.status == 400


def test_scores_of_a_long_prompt_are_bounded() -> None:
    wide = msgspec.structs.replace(spec("m"), max_context_tokens=1 << 20)
    prompt = (0,) * (MAX_PROMPT_LOGPROBS // 21 + 1)
    assert shape_error(asked(prompt=prompt, prompt_logprobs=19), wide) is None
    error = shape_error(asked(prompt=prompt, prompt_logprobs=20), wide)
    assert error is not None and "too many" in error.message


def test_all_that_a_unit_says_reaches_the_client() -> None:
    pool = PoolScheduler(LeastLoaded())
    pool.handle([ev.UnitAdded(unit=0), ev.ModelAdded(spec=spec("m"))], 0)
    pool.handle([ev.ModelReady(model=spec("m").name), ev.UnitUp(unit=0, incarnation=1)], 1)
    pool.handle([ev.NewRequest(request=request(1))], 2)
    said: dict[str, Any] = {
        "tokens": (7,),
        "logprobs": (TokenLogprobs(7, -0.5, ((7, -0.5),)),),
        "prompt_logprobs": (TokenLogprobs(3, -2.0),),
        "cached_tokens": 3,
    }
    last: dict[str, Any] = {"tokens": (), "embedding": (b"1234",)}

    def replies(**emit: Any) -> list[Reply]:
        event = ev.Emitted(unit=0, incarnation=1, emit=Emit(request=RequestId(1), **emit))
        return [a for a in pool.handle([event], 3) if isinstance(a, Reply)]

    assert replies(**said) == [Reply(request=RequestId(1), **said)]
    assert replies(**last, finish="stop") == [Reply(request=RequestId(1), **last, finish="stop")]


def test_nothing_drawn_is_no_reason_to_end_a_held_request() -> None:
    """max_tokens 0 is not reached before the unit has said so."""
    pool = PoolScheduler(LeastLoaded())
    pool.handle([ev.UnitAdded(unit=0), ev.ModelAdded(spec=spec("m"))], 0)
    asking = asked(max_tokens=0, embed="last")
    assert not [a for a in pool.handle([ev.NewRequest(request=asking)], 1) if isinstance(a, Reply)]
    assert pool.held == 1
