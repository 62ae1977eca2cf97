"""Tokenizers as llguidance wants them: read once, where that must not hold anybody up by a thread.

Reading one takes more than a second for 150,000 ids, compiling a grammar or making a mask some
milliseconds at most.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.core.errors import WeftError
from weft.grammar.recent import Recent

MAX_TOKENIZERS = 16
MAX_TOKENIZER_BYTES = 128 << 20

log = logging.getLogger("weft.grammar")


@dataclass(frozen=True)
class Vocabulary:
    """How a model's ids are to be read."""

    path: str
    """Its tokenizer.json."""
    size: int
    """Ids the model has logits for; may be more or less than the tokenizer knows."""
    eos_ids: tuple[int, ...]
    model: str = ""
    """Other weights under the same path have another name, and are read anew."""

    @property
    def words(self) -> int:
        """32-bit words of a mask."""
        return -(-self.size // 32)


class Tokenizers:
    """Used by one thread at a time; the readers are its own."""

    def __init__(self) -> None:
        self._read: Recent[Vocabulary, Any] = Recent(MAX_TOKENIZERS)
        self._readers: dict[Vocabulary, _Reader] = {}

    def get(self, vocabulary: Vocabulary) -> Any:
        """Reads it if nobody has. Raises WeftError for one that is missing or cannot be used."""
        return self._read.get(vocabulary, lambda: read_tokenizer(vocabulary))

    def ready(self, vocabulary: Vocabulary, tell: Callable[[], None]) -> bool:
        """Whether `get` returns or raises at once. If not, a thread reads it; ask again when it has
        called `tell`."""
        if vocabulary in self._read:
            return True
        reader = self._readers.get(vocabulary)
        if reader is None:
            reader = self._readers[vocabulary] = _Reader(vocabulary, tell)
            reader.start()
        if not reader.over:
            return False
        del self._readers[vocabulary]
        if reader.tokenizer is not None:
            self._read.get(vocabulary, lambda: reader.tokenizer)
        return True

    def close(self) -> None:
        """Wait for the readers: none calls `tell` any more."""
        for reader in self._readers.values():
            reader.join()
        self._readers.clear()


class _Reader(threading.Thread):
    def __init__(self, vocabulary: Vocabulary, tell: Callable[[], None]) -> None:
        super().__init__(name="weft-tokenizer", daemon=True)
        self._vocabulary, self._tell = vocabulary, tell
        self.tokenizer: Any = None
        self.over = False

    def run(self) -> None:
        try:
            self.tokenizer = read_tokenizer(self._vocabulary)
        except WeftError as error:
            log.warning("%s", error)  # `get` meets it again and says so to the request
        finally:
            self.over = True
            self._tell()


def read_tokenizer(vocabulary: Vocabulary) -> Any:
    """llguidance's tokenizer. Raises WeftError for a file that is missing or cannot be used."""
    from llguidance import LLTokenizer

    path = Path(vocabulary.path)
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise WeftError(f"{path}: larger than {MAX_TOKENIZER_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
        eos = list(vocabulary.eos_ids) or None
        try:
            return LLTokenizer(text, n_vocab=vocabulary.size, eos_token=eos)
        except ValueError as error:
            if "vocab size too small" not in str(error):
                raise
            return LLTokenizer(text, eos_token=eos)
    except (OSError, ValueError) as error:
        raise WeftError(f"{path}: no tokenizer for grammars: {error}") from None
