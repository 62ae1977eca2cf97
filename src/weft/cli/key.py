"""`weft key`: API keys and their hashes. The configuration only ever holds hashes."""

import re
import sys
from typing import Annotated

import typer

from weft.core.errors import WeftError

MAX_KEY_CHARS = 512

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="API keys and their hashes.")

Name = Annotated[str, typer.Option(help="What the key is called in pool.yaml and in logs.")]


@app.command()
def new(name: Name = "default") -> None:
    """Print a fresh random key, once, and the line with its hash for pool.yaml.

    \b
    Example:
      weft key new --name alice
    """
    from weft.server.keys import hash_of, new_key

    key = new_key()
    typer.echo(f"key, for the client; it is stored nowhere and shown only now:\n  {key}\n")
    typer.echo(f"pool.yaml, under server.keys:\n{_line(name, hash_of(key))}")


@app.command("hash")
def hash_key(name: Name = "default") -> None:
    """Read a key from standard input and print the line with its hash for pool.yaml.

    Only for keys of at least 128 random bits: a word that people think of can be guessed from
    its hash.

    \b
    Example:
      openssl rand -hex 32 | tee alice.key | weft key hash --name alice
    """
    from weft.server.keys import hash_of

    key = sys.stdin.readline(MAX_KEY_CHARS + 2).strip()
    if not re.fullmatch(r"[\x21-\x7e]{20,512}", key):
        raise WeftError("a key is 20 to 512 printable characters without spaces; `weft key new`")
    typer.echo(_line(name, hash_of(key)))


def _line(name: str, digest: str) -> str:
    """One entry of server.keys. Raises WeftError for a name that could not stand there."""
    from weft.config.server_config import KeyConfig, ServerConfig, check_server

    check_server(ServerConfig(keys=(KeyConfig(name=name, sha256=digest),)), "--name")
    return f'  - {{name: "{name}", sha256: "{digest}"}}'
