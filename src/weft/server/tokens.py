"""POST /tokenize and /detokenize, as vLLM has them."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from weft.server.errors import bad_request
from weft.server.fields import MAX_NAME_CHARS, MAX_TOKENS, Strict, TokenId
from weft.server.messages import Conversing, Messages
from weft.server.plan import Asker, check_ids, find_model

ModelName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


class TokenizeRequest(Conversing):
    """POST /tokenize: a prompt, or messages."""

    model: ModelName
    prompt: str | None = None
    messages: Messages | None = None  # type: ignore[assignment]
    add_special_tokens: bool | None = None
    """By default as generation does: for prompts, not for messages."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of", "send either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: ModelName
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]


async def tokenize(asker: Asker, request: TokenizeRequest) -> dict[str, Any]:
    """Raises ApiError."""
    card = find_model(asker.hub, request.model)
    text = await asker.texts.model(card)
    adds = request.add_special_tokens

    def work() -> dict[str, Any]:
        if request.prompt is not None:
            ids = text.encode_prompt(request.prompt, add_special_tokens=adds is not False)
        else:
            text.check_chars(request.argument_chars(), "messages")
            ids, _ = text.encode_chat(request.conversation(), add_special_tokens=adds is True)
        strings = [text.token_text(i) for i in ids] if request.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": card.max_context_tokens,
            "tokens": ids,
            "token_strs": strings,
        }

    return await asker.texts.run(card.name, work)


async def detokenize(asker: Asker, request: DetokenizeRequest) -> dict[str, Any]:
    """Special tokens are written out. Raises ApiError."""
    card = find_model(asker.hub, request.model)
    text = await asker.texts.model(card)
    if len(request.tokens) > card.max_context_tokens:
        raise bad_request(
            f"model {card.name!r} takes at most {card.max_context_tokens} tokens",
            param="tokens",
            code="context_length_exceeded",
        )
    ids = check_ids(request.tokens, card, "tokens")
    return {"prompt": await asker.texts.run(card.name, lambda: text.decode_whole(list(ids)))}
