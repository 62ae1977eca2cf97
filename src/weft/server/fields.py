"""Bounds and field types that the request schemas share."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_PROMPTS = 128
MAX_INPUTS = 1024
"""Of one embeddings request."""
MAX_CHOICES = 128
"""Choices of one answer: prompts times n."""
MAX_TOKENS = 1 << 24
MAX_NAME_CHARS = 256
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_PRIORITY = 1000
MAX_GRAMMAR_CHARS = 1 << 16
MAX_ENUM = 1024
MAX_TOOLS = 128
MAX_DESCRIPTION_CHARS = 1 << 16
MAX_TOOL_CALLS = 128
MAX_DOCUMENTS = 256
MAX_TEMPLATE_ARGS = 16


def _whole(value: Any) -> Any:
    """16.0 for 16: some clients know one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole(low: int, high: int) -> Any:
    """The type of a whole number within bounds, both included."""
    return Annotated[int, Field(ge=low, le=high), BeforeValidator(_whole)]


TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
TopLogprobs = whole(0, MAX_LOGPROBS)


def _arm(value: Any) -> str | None:
    """Which form of a field this is, by its first element; None: no form at all."""
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return "<list>" if isinstance(value, list) else None
    first = value[0]
    if isinstance(first, str):
        return "<texts>"
    if isinstance(first, list):
        return "<lists>"
    return "<ids>" if isinstance(first, int) and not isinstance(first, bool) else "<list>"


def _either(message: str) -> Discriminator:
    return Discriminator(_arm, custom_error_type="wrong_form", custom_error_message=message)


def _arm_or_list(value: Any) -> str | None:
    arm = _arm(value)
    return arm if arm in (None, "<text>") else "<list>"


def text_or_list(message: str) -> Discriminator:
    """Tells `<text>` from `<list>`."""
    return Discriminator(_arm_or_list, custom_error_type="wrong_form", custom_error_message=message)


_FORMS = _either("must be a text, a list of texts, a list of token ids or a list of such lists")
_PROMPTS = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
_INPUTS = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[str], _PROMPTS, Tag("<texts>")]
    | Annotated[list[TokenIds], _PROMPTS, Tag("<lists>")],
    _FORMS,
]
Inputs = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[str], _INPUTS, Tag("<texts>")]
    | Annotated[list[TokenIds], _INPUTS, Tag("<lists>")],
    _FORMS,
]
Stops = Annotated[
    Annotated[Stop, Tag("<text>")]
    | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<list>")],
    text_or_list(f"must be a text or a list of at most {MAX_STOPS} texts"),
]


CLOSED: dict[str, Any] = {"additionalProperties": False}
"""Of a dictionary whose keys have a pattern: no other keys."""


class Strict(BaseModel):
    """Refuses unknown fields and changes no types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    text_or_list("must be a text or a list of text parts"),
]
