"""What no unit could serve, whatever its state: the bounds on a request itself."""

import math

from weft.core.errors import CONTEXT_LENGTH, INVALID_REQUEST, ReplyError
from weft.core.model import ModelSpec
from weft.core.request import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_PROMPT_LOGPROBS,
    Request,
    Sampling,
)


def shape_error(request: Request, spec: ModelSpec) -> ReplyError | None:
    """Why it cannot be admitted, or None."""
    length = len(request.prompt) + request.max_tokens
    if length > spec.max_context_tokens:
        context = f"{spec.name!r} takes {spec.max_context_tokens}"
        return ReplyError(
            code=CONTEXT_LENGTH, message=f"prompt and max_tokens are {length} tokens; {context}"
        )
    message = (
        _length_error(request)
        or _ids_error(request, spec)
        or _sampling_error(request.sampling)
        or _prompt_error(request)
    )
    return ReplyError(code=INVALID_REQUEST, message=message) if message else None


def _length_error(request: Request) -> str | None:
    if not request.prompt:
        return "a request needs a prompt of at least one token"
    if request.embed is not None:
        return "an embedding draws no tokens: max_tokens must be 0" if request.max_tokens else None
    if request.max_tokens < (request.prompt_logprobs is None):
        return "max_tokens must be at least 1; 0 is for prompt_logprobs and embeddings"
    return None


def _ids_error(request: Request, spec: ModelSpec) -> str | None:
    top = spec.vocab_size - 1
    if min(request.prompt) < 0 or max(request.prompt) > top:
        return f"prompt ids of {spec.name!r} lie in 0 .. {top}"
    if any(not 0 <= token <= top for token, _ in request.sampling.logit_bias):
        return f"token ids in logit_bias of {spec.name!r} lie in 0 .. {top}"
    return None


def _sampling_error(sampling: Sampling) -> str | None:
    """Numbers of any size come from frontends; what a device would make of some is nobody's
    wish."""
    if not 0.0 <= sampling.temperature < math.inf:
        return "temperature must be a number of at least 0"
    if not (0.0 <= sampling.top_p <= 1.0 and 0.0 <= sampling.min_p <= 1.0):
        return "top_p and min_p lie in 0 .. 1"
    penalties = (sampling.presence_penalty, sampling.frequency_penalty)
    if not all(abs(penalty) <= MAX_PENALTY for penalty in penalties):
        return f"presence_penalty and frequency_penalty lie in {-MAX_PENALTY} .. {MAX_PENALTY}"
    if not 1 / MAX_PENALTY <= sampling.repetition_penalty <= MAX_PENALTY:
        return f"repetition_penalty lies in {1 / MAX_PENALTY} .. {MAX_PENALTY}"
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        return f"logit_bias names at most {MAX_LOGIT_BIAS} tokens"
    if not all(abs(value) <= MAX_PENALTY for _, value in sampling.logit_bias):
        return f"values of logit_bias lie in {-MAX_PENALTY} .. {MAX_PENALTY}"
    if not 0 <= (sampling.logprobs or 0) <= MAX_LOGPROBS:
        return f"logprobs of at most {MAX_LOGPROBS} tokens can be reported"
    return None


def _prompt_error(request: Request) -> str | None:
    top = request.prompt_logprobs
    if top is None:
        return None
    if request.embed is not None:
        return "an embedding has no prompt_logprobs"
    if not 0 <= top <= MAX_LOGPROBS:
        return f"prompt_logprobs of at most {MAX_LOGPROBS} tokens can be reported"
    count = len(request.prompt) * (1 + top)
    if count > MAX_PROMPT_LOGPROBS:
        return f"{count} prompt_logprobs are too many; ask for at most {MAX_PROMPT_LOGPROBS}"
    return None
