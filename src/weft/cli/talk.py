"""The commands `weft chat`, `weft run` and `weft import`, as typer sees them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from weft.core.errors import WeftError

Url = Annotated[str, typer.Option(help="The server; $WEFT_API_KEY is its key.", envvar="WEFT_URL")]
Model = Annotated[str, typer.Argument(help="A model's name or alias.")]
System = Annotated[str | None, typer.Option(help="A system message.")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the most probable token.")]
URL = "http://127.0.0.1:8321"


def _options(max_tokens: int | None, temperature: float | None) -> dict[str, Any]:
    given = {"max_tokens": max_tokens, "temperature": temperature}
    return {key: value for key, value in given.items() if value is not None}


def chat(
    model: Model,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    url: Url = URL,
) -> None:
    """Talk with a model, at the terminal or from a pipe (one question a line).

    \b
    Examples:
      weft chat speaker
      weft chat coder --system "Answer in one line." --temperature 0
      printf 'Hello\\nAnd now?\\n' | weft chat speaker
    """
    from weft.cli import chat as room

    with room.connect(url) as client:
        talk = room.Talk(client, model, system=system, options=_options(max_tokens, temperature))
        raise typer.Exit(room.chat(talk))


def run(
    model: Model,
    prompt: Annotated[list[str], typer.Argument(help="What to say.")],
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    url: Url = URL,
) -> None:
    """Ask a model one thing.

    \b
    Examples:
      weft run speaker "Write a haiku about looms."
      weft run coder --temperature 0 explain this: $(cat error.txt)
    """
    from weft.cli import chat as room

    with room.connect(url) as client:
        talk = room.Talk(client, model, system=system, options=_options(max_tokens, temperature))
        raise typer.Exit(room.answer(talk, " ".join(prompt)))


def import_(
    kind: Annotated[str, typer.Argument(help="What wrote the file: llama-swap.")],
    file: Annotated[Path, typer.Argument(help="Its configuration.")],
) -> None:
    """Print a pool.yaml made from another server's configuration. Nothing in it is executed.

    What could not be carried over stands in comments at the top.

    \b
    Example:
      weft import llama-swap config.yaml > pool.yaml
    """
    from weft.cli.import_swap import convert, render
    from weft.cli.serve import read_config_text

    if kind != "llama-swap":
        raise WeftError(f"{kind!r}: only llama-swap's configuration can be read")
    config, notes = convert(read_config_text(file), str(file))
    typer.echo(render(config, notes, file.name))


def register(app: typer.Typer) -> None:
    app.command()(chat)
    app.command()(run)
    app.command("import")(import_)
