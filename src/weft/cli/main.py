"""The `weft` command. Every subcommand imports what it needs when it runs: `weft --help` and
`weft ps` must not wait for torch or a web framework."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from weft.cli import admin, key, talk
from weft.core.errors import WeftError

DEFAULT_URL = "http://127.0.0.1:8321"


class _Group(TyperGroup):
    """Adds `replay`, whose options live in its own room, when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted({*super().list_commands(ctx), "replay"})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name == "replay" and "replay" not in self.commands:
            from weft.replay.cli import replay

            sub = typer.Typer(add_completion=False, rich_markup_mode=None)
            sub.command("replay")(replay)
            self.add_command(typer.main.get_command(sub), "replay")
        return super().get_command(ctx, cmd_name)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Serve many language models from few GPUs behind one OpenAI-compatible endpoint.\n\n"
    "\b\n"
    "  weft serve ./models/speaker ./models/coder\n"
    "  weft serve pool.yaml\n"
    "  weft ps --watch\n"
    "  weft chat speaker\n"
    "  weft reload\n\n"
    "Completion of commands and options: weft --install-completion.",
)

app.add_typer(key.app, name="key")
admin.register(app)
talk.register(app)

Url = Annotated[str, typer.Option(help="The server.", envvar="WEFT_URL")]


@app.command()
def serve(
    paths: Annotated[
        list[Path], typer.Argument(help="Model folders, or one pool.yaml.", metavar="PATH")
    ],
    host: Annotated[str | None, typer.Option(help="Address [default: 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port [default: 8321]; 0: a free one.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Weights and KV on the device, such as 48M or 40G.")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Weight images and parked KV in host memory, such as 8G.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="weft or dedicated.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, bfloat16, float16, float32 or float64, for all models."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow an address that others can reach.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    trace: Annotated[
        Path | None, typer.Option(help="Write the plan log and timelines into this folder.")
    ] = None,
) -> None:
    """Serve models, a folder under its own name.

    \b
    Examples:
      weft serve ./models/speaker
      weft serve ./models/* --device-memory 48M
      weft serve pool.yaml --port 8000
    """
    from weft.cli.serve import Overrides, run

    overrides = Overrides(
        host=host,
        port=port,
        device=device,
        device_memory=device_memory,
        host_memory=host_memory,
        policy=policy,
        dtype=dtype,
    )
    run(
        paths,
        overrides,
        insecure=insecure,
        log_level=log_level,
        log_format=log_format,
        trace_dir=trace,
    )


@app.command()
def ps(
    url: Url = DEFAULT_URL,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Repeat, with tokens/s.")] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", help="Seconds between polls.", min=0.1, max=3600)
    ] = 1.0,
) -> None:
    """Show who holds what in a running pool.

    \b
    Examples:
      weft ps
      weft ps --watch --url http://127.0.0.1:8000
    """
    from weft.cli.ps import show, watch_status

    if watch:
        watch_status(url, interval_s)
    else:
        show(url)


@app.command()
def check(
    paths: Annotated[list[Path], typer.Argument(help="Model folders.", metavar="PATH")],
) -> None:
    """Say whether checkpoints can be served.

    Nothing is loaded. Exit code 1 if one of them cannot be served.

    \b
    Example:
      weft check ./models/*
    """
    from weft.cli.check import check_paths

    raise typer.Exit(check_paths(paths))


@app.command()
def doctor(
    port: Annotated[int, typer.Option(help="The port you want to serve on.")] = 8321,
) -> None:
    """Look at this machine, and say what to do.

    \b
    Example:
      weft doctor
    """
    from weft.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(port))


@app.command()
def version() -> None:
    """Print the version."""
    import weft

    typer.echo(f"weft {weft.__version__}")


@app.command("config-schema")
def config_schema() -> None:
    """Print the JSON Schema of pool.yaml, for editors.

    \b
    Example:
      weft config-schema > pool.schema.json
    """
    import json

    from weft.config.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def main() -> None:
    """Entry point. A WeftError is one line on stderr and exit code 2."""
    try:
        app(prog_name="weft")
    except WeftError as error:
        line = " ".join(str(error).split())
        typer.echo(f"weft: error: {line}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
