"""`weft load`, `weft reload` and the like: commands to a running server over its private socket."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from weft.core.errors import WeftError

TIMEOUT_S = 30.0

Url = Annotated[str, typer.Option(help="The server; its port tells the socket.", envvar="WEFT_URL")]
Socket = Annotated[Path | None, typer.Option(help="The admin socket, where it is not the default.")]
Model = Annotated[str, typer.Argument(help="A model's name or alias.")]
Wait = Annotated[float, typer.Option("--wait", help="Seconds to wait for it; 0: not at all.")]
URL = "http://127.0.0.1:8321"


def socket_of(url: str, given: Path | None) -> Path:
    """Where the server answers its operator. Raises WeftError."""
    from weft.server.admin_socket import default_socket, runtime_dir

    if given is not None:
        return given
    try:
        port = urlsplit(url).port or 80
    except ValueError:
        raise WeftError(f"{url!r} is no URL; write one such as {URL}") from None
    path = default_socket(port)
    if not path.exists():
        there = sorted(runtime_dir().glob("admin-*.sock"))
        others = f"; there are {', '.join(map(str, there))}, give --socket" if there else ""
        raise WeftError(
            f"no server of this user on port {port} (no {path}){others}; `weft serve` starts one"
        )
    return path


def ask(
    command: str, url: str, socket: Path | None, *, wait_s: float | None = None, **body: Any
) -> dict[str, Any]:
    """Send a command, or GET /admin/models. Raises WeftError with what the server says."""
    import httpx

    path = socket_of(url, socket)
    transport = httpx.HTTPTransport(uds=str(path))
    timeout = httpx.Timeout(TIMEOUT_S + (wait_s or 0.0))
    if wait_s is not None:
        body["wait_s"] = wait_s
    try:
        with httpx.Client(transport=transport, base_url="http://weft", timeout=timeout) as client:
            if command == "models":
                reply = client.get("/admin/models")
            else:
                reply = client.post(f"/admin/{command}", json=body)
        answer = reply.json()
    except (httpx.HTTPError, ValueError) as error:
        raise WeftError(f"{path} does not answer: {error}; is the server running?") from None
    if reply.status_code != 200:
        raise WeftError(answer.get("error", {}).get("message", f"status {reply.status_code}"))
    found: dict[str, Any] = answer
    return found


def load(
    model: Annotated[str, typer.Argument(help="A name, an alias, or a checkpoint's folder.")],
    name: Annotated[str | None, typer.Option(help="Serve a folder under this name.")] = None,
    wait_s: Wait = 600.0,
    url: Url = URL,
    socket: Socket = None,
) -> None:
    """Bring a model's weights onto the device.

    A folder must lie under one of `admin.model_roots`; it becomes a model until the next reload.

    \b
    Examples:
      weft load coder
      weft load ./models/new-one --name experiment
    """
    path = Path(model)
    asked = str(path.resolve()) if path.is_dir() and "/" in model else model
    body = {"name": name} if name else {}
    _tell_state(ask("load", url, socket, wait_s=wait_s, model=asked, **body))


def unload(model: Model, wait_s: Wait = 600.0, url: Url = URL, socket: Socket = None) -> None:
    """Take a model's weights off the device once it has no work. Its next request brings it back.

    \b
    Example:
      weft unload coder
    """
    _tell_state(ask("unload", url, socket, model=model, wait_s=wait_s))


def pin(model: Model, url: Url = URL, socket: Socket = None) -> None:
    """Never let a model's weights leave the device.

    \b
    Example:
      weft pin speaker
    """
    answer = ask("pin", url, socket, model=model)
    typer.echo(f"{answer['model']} is pinned, now {answer['state']}")


def unpin(model: Model, url: Url = URL, socket: Socket = None) -> None:
    """Let a pinned model leave again when room is needed.

    \b
    Example:
      weft unpin speaker
    """
    answer = ask("unpin", url, socket, model=model)
    typer.echo(f"{answer['model']} is no longer pinned, now {answer['state']}")


def reload(url: Url = URL, socket: Socket = None) -> None:
    """Have the server read its pool.yaml again.

    Exit code 1 if a model could not be served. An invalid file changes nothing.

    \b
    Example:
      weft reload
    """
    report = ask("reload", url, socket)
    for key in ("added", "changed", "updated", "removed"):
        if report[key]:
            typer.echo(f"{key}: {', '.join(report[key])}")
    if report["needs_restart"]:
        typer.echo(f"needs a restart: {', '.join(report['needs_restart'])}")
    for name, reason in report["failed"].items():
        typer.echo(f"failed: {name}: {reason}", err=True)
    if not any(report.values()):
        typer.echo("nothing changed")
    if report["failed"]:
        raise typer.Exit(1)


def drain(url: Url = URL, socket: Socket = None) -> None:
    """Have the server refuse new requests, finish those in hand, and end.

    \b
    Example:
      weft drain
    """
    answer = ask("drain", url, socket)
    typer.echo(f"draining, {answer['unfinished']} requests in hand")


def models(url: Url = URL, socket: Socket = None) -> None:
    """List what is served and where it is.

    \b
    Example:
      weft models
    """
    for entry in ask("models", url, socket)["models"]:
        state = "failed" if entry["failed"] else entry["state"]
        marks = [f"alias {alias}" for alias in entry["aliases"]]
        marks += ["pinned"] if entry["pinned"] else []
        typer.echo("  ".join([f"{entry['model']:30} {state:9} {entry['path']}", *marks]))
        if entry["failed"]:
            typer.echo(f"    {entry['failed']}")


def _tell_state(answer: dict[str, Any]) -> None:
    seconds = f" after {answer['seconds']:.1f} s" if answer["seconds"] >= 0.05 else ""
    typer.echo(f"{answer['model']} is {answer['state']}{seconds}")


COMMANDS: tuple[Callable[..., None], ...] = (load, unload, pin, unpin, reload, drain, models)


def register(app: typer.Typer) -> None:
    for command in COMMANDS:
        app.command()(command)
