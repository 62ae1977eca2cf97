"""What `weft check PATH` finds out about a model folder, without torch and without reading weights
(configurations, headers and the tokenizer's presence only)."""

from pathlib import Path

import msgspec

from weft.core.errors import WeftError
from weft.core.model import DTYPE_BYTES, Architecture, choose_page_tokens
from weft.models.hf_config import read_eos_ids, read_model_config
from weft.models.image import check_tensors, expected_tensors, image_layout
from weft.models.json_file import read_json
from weft.models.safetensors_file import open_checkpoint


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """A model folder in numbers. Fields that depend on an unreadable file are None."""

    path: str
    class_name: str | None = None
    family: str | None = None
    dtype: str | None = None
    """The checkpoint's own, which is what it is served in by default."""
    parameters: int | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    num_q_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    max_context_tokens: int | None = None
    window: int | None = None
    """The widest sliding window, None where no layer has one."""
    tied_embeddings: bool | None = None
    quantization: str | None = None
    """How most matrices are quantized; None: not at all."""
    rope: str | None = None
    eos_ids: tuple[int, ...] = ()
    image_bytes: dict[str, int] = {}
    """Bytes of the packed weight image for each dtype it can be served in."""
    kv_bytes_per_token: int | None = None
    page_tokens: int | None = None
    page_bytes: int | None = None
    stored_dtypes: dict[str, int] = {}
    """Bytes of the checkpoint's tensors by the dtype they are stored in."""
    shards: int | None = None
    tokenizer: bool = False
    chat_template: bool = False
    problems: tuple[str, ...] = ()
    """Why the model cannot be served; empty if it can."""
    notes: tuple[str, ...] = ()
    """What works but may surprise."""

    @property
    def servable(self) -> bool:
        return not self.problems


def check_checkpoint(path: Path) -> CheckReport:
    """Look at everything that can be checked without reading the weights. Raises nothing for a bad
    checkpoint: all that is wrong with it is in `problems`."""
    path = Path(path)
    problems: list[str] = []
    notes: list[str] = []
    facts: dict[str, object] = {"path": str(path)}
    arch: Architecture | None = None
    try:
        arch = read_model_config(path)
        facts |= _arch_facts(path, arch)
    except WeftError as error:
        problems.append(str(error))
    try:
        eos_ids = read_eos_ids(path)
        facts["eos_ids"] = eos_ids
        if not eos_ids:
            notes.append("no eos_token_id: answers end at max_tokens only")
        elif arch is not None and max(eos_ids) >= arch.vocab_size:
            notes.append(f"eos id {max(eos_ids)} is outside the vocabulary of {arch.vocab_size}")
    except WeftError as error:
        if str(error) not in problems:
            problems.append(str(error))
    try:
        facts |= _weight_facts(path, arch)
    except WeftError as error:
        if str(error) not in problems:
            problems.append(str(error))
    try:
        facts |= _text_facts(path, notes)
    except WeftError as error:
        problems.append(str(error))
    return msgspec.convert(
        facts | {"problems": tuple(problems), "notes": tuple(notes)}, CheckReport
    )


def _arch_facts(path: Path, arch: Architecture) -> dict[str, object]:
    page_tokens = choose_page_tokens(arch.kv_bytes_per_token)
    as_dtype = {name: msgspec.structs.replace(arch, dtype=name) for name in DTYPE_BYTES}
    return {
        "class_name": read_json(path / "config.json")["architectures"][0],
        "family": arch.family,
        "dtype": arch.dtype,
        "parameters": _parameters(arch),
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_q_heads": arch.num_q_heads,
        "num_kv_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "max_context_tokens": arch.max_position,
        "window": max(arch.windows, default=0) or None,
        "tied_embeddings": arch.tied_embeddings,
        "quantization": _quantization(arch),
        "rope": arch.rope.kind,
        "image_bytes": {name: image_layout(one).num_bytes for name, one in as_dtype.items()},
        "kv_bytes_per_token": arch.kv_bytes_per_token,
        "page_tokens": page_tokens,
        "page_bytes": page_tokens * arch.kv_bytes_per_token,
    }


def _quantization(arch: Architecture) -> str | None:
    quant = arch.quant
    if quant is None:
        return None
    scales = f"groups of {quant.group_size}" if quant.group_size else "a scale an output"
    left = f", {len(quant.dense)} matrices are not" if quant.dense else ""
    return f"{quant.form}, {scales}{left}"


def _parameters(arch: Architecture) -> int:
    total = 0
    for shape in expected_tensors(arch).values():
        count = 1
        for size in shape:
            count *= size
        total += count
    return total


def _weight_facts(path: Path, arch: Architecture | None) -> dict[str, object]:
    with open_checkpoint(path) as checkpoint:
        stored: dict[str, int] = {}
        for info in checkpoint.tensors.values():
            stored[info.dtype] = stored.get(info.dtype, 0) + info.num_bytes
        if arch is not None:
            check_tensors(checkpoint, arch)
        return {"stored_dtypes": stored, "shards": len(checkpoint.files)}


def _text_facts(path: Path, notes: list[str]) -> dict[str, object]:
    tokenizer = (path / "tokenizer.json").is_file()
    if not tokenizer:
        notes.append("no tokenizer.json: only token ids can be asked for")
    template = (path / "chat_template.jinja").is_file()
    config = path / "tokenizer_config.json"
    if not template and config.is_file():
        template = bool(read_json(config).get("chat_template"))
    if not template:
        notes.append("no chat template: chats get a plain one, a line `role: content` a message")
    return {"tokenizer": tokenizer, "chat_template": template}
