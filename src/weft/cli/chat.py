"""`weft chat` and `weft run`: a talk with a served model over its HTTP interface."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

import httpx

from weft.core.errors import WeftError

MAX_LINE = 1 << 20
CONNECT_S = 10.0
IDLE_S = 180.0
"""A held stream says something every few seconds."""
HELP = "/exit ends, /clear forgets what was said, /help shows this"


class Talk:
    """A conversation: what was said so far, and the server that goes on with it."""

    def __init__(
        self,
        client: httpx.Client,
        model: str,
        *,
        system: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._client = client
        self._model = model
        self._options = options or {}
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._first)

    def clear(self) -> None:
        self.messages = list(self._first)

    def say(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. What was said is kept only when it was answered. Raises
        WeftError."""
        asked = [*self.messages, {"role": "user", "content": text}]
        body = {"model": self._model, "messages": asked, "stream": True, **self._options}
        answer: list[str] = []
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as reply:
                if reply.status_code != 200:
                    reply.read()
                    raise WeftError(_reason(reply))
                for piece in _pieces(reply):
                    answer.append(piece)
                    yield piece
        except httpx.HTTPError as error:
            raise WeftError(
                f"{self._client.base_url} does not answer ({error}); start it with `weft serve`, "
                "or give --url"
            ) from None
        self.messages = [*asked, {"role": "assistant", "content": "".join(answer)}]


def _pieces(reply: httpx.Response) -> Iterator[str]:
    for line in reply.iter_lines():
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise WeftError(str(event["error"].get("message", "the answer failed")))
        for choice in event.get("choices", ()):
            text = choice["delta"].get("content")
            if text:
                yield text
    raise WeftError("the answer broke off")


def _reason(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answers {reply.status_code}"


def connect(url: str, transport: httpx.BaseTransport | None = None) -> httpx.Client:
    """A client of the server at `url`; $WEFT_API_KEY is its key."""
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise WeftError(f"{url!r} is no URL; write one such as http://127.0.0.1:8321")
    key = os.environ.get("WEFT_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(IDLE_S, connect=CONNECT_S)
    return httpx.Client(base_url=base, headers=headers, timeout=timeout, transport=transport)


def chat(talk: Talk, lines: IO[str] = sys.stdin, out: Callable[[str], None] | None = None) -> int:
    """Read lines, answer each. At a terminal with a prompt and an editable history; on a pipe one
    answer a line. Returns the exit status: 1 if the last line got no answer."""
    write = out or _write
    at_terminal = lines.isatty()
    if at_terminal:
        import readline  # noqa: F401  (gives input() a history and editing)

        write(f"{HELP}\n")
    status = 0
    while (line := _read(lines, at_terminal)) is not None:
        match line.strip():
            case "":
                continue
            case "/exit" | "/quit" | "/bye":
                break
            case "/clear":
                talk.clear()
                continue
            case "/help":
                write(f"{HELP}\n")
                continue
        status = answer(talk, line.rstrip("\n"), write)
    return status


def answer(talk: Talk, text: str, write: Callable[[str], None] | None = None) -> int:
    """One answer, as it comes. Ctrl-C ends the answer, not the talk. Returns the exit status."""
    write = write or _write
    try:
        for piece in talk.say(text):
            write(piece)
    except KeyboardInterrupt:
        write("\n(stopped)\n")
        return 1
    except WeftError as error:
        write("\n")
        print(f"weft: {error}", file=sys.stderr)
        return 1
    write("\n")
    return 0


def _read(lines: IO[str], at_terminal: bool) -> str | None:
    """The next line; None at the end."""
    if not at_terminal:
        return lines.readline(MAX_LINE) or None
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return None


def _write(text: str) -> None:
    print(text, end="", flush=True)
