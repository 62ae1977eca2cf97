"""The text and the bytes of single tokens, as log probabilities show them."""

import re

from tokenizers import Tokenizer

MAX_CACHED = 1 << 16
REPLACEMENT = "\ufffd"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, which byte-level vocabularies are written in."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


class TokenNames:
    """Cached; called in the event loop, so every answer is one or two tiny decodings."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[int, tuple[str, bytes]] = {}
        self._anchor: list[int] = []
        self._anchor_text = ""
        if tokenizer is not None:
            # Some decoders drop the space before the first token: look at it behind another one.
            self._anchor = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
            self._anchor_text = self._decode([])

    def text(self, token: int) -> str:
        return self._entry(token)[0]

    def bytes(self, token: int) -> bytes:
        return self._entry(token)[1]

    def _entry(self, token: int) -> tuple[str, bytes]:
        entry = self._cache.get(token)
        if entry is None:
            entry = self._make(token)
            if len(self._cache) >= MAX_CACHED:
                self._cache.clear()
            self._cache[token] = entry
        return entry

    def _make(self, token: int) -> tuple[str, bytes]:
        if self._tokenizer is None:
            return "", b""
        text = self._decode([token])[len(self._anchor_text) :]
        if REPLACEMENT not in text:
            return text, text.encode()
        piece = self._tokenizer.id_to_token(token) or ""
        byte = _BYTE_TOKEN.fullmatch(piece)
        if byte is not None:
            return text, bytes([int(byte[1], 16)])
        if piece and all(char in BYTE_ALPHABET for char in piece):
            return text, bytes(BYTE_ALPHABET[char] for char in piece)
        return text, text.encode()

    def _decode(self, ids: list[int]) -> str:
        assert self._tokenizer is not None
        text: str = self._tokenizer.decode([*self._anchor, *ids], skip_special_tokens=False)
        return text
