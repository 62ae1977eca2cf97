"""`weft replay`: the command."""

import asyncio
import os
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from weft.core.errors import WeftError
from weft.replay.client import Settings, fetch_models, make_client
from weft.replay.driver import plan_requests, replay_requests
from weft.replay.progress import watching
from weft.replay.records import ModelFacts, Result
from weft.report.tables import failure_lines, legend, replay_table
from weft.workload.generators import gamma_arrivals, uniform_rows
from weft.workload.trace import TraceRow, compress, cut, parse_trace, scale_lengths, spread

MAX_FILE_BYTES = 256 << 20
PLAIN_WIDTH = 132
DEFAULT_CONTEXT = 2048
DEFAULT_VOCAB = 256
"""Where the server does not tell: any tokenizer has as many ids."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What to replay, before the server is asked for its models."""

    rows: tuple[TraceRow, ...]
    words: str
    skew: float
    seed: int
    context: int | None = None
    output_share: float = 0.5


def read_trace(path: Path, *, limit: int | None, speed: float) -> tuple[tuple[TraceRow, ...], str]:
    """A trace file's rows, cut and compressed, and that in words. Raises WeftError."""
    text = _read(path, "a trace")
    rows = compress(cut(parse_trace(text, source=str(path)), limit), speed)
    if not rows:
        raise WeftError(f"{path}: no requests in it")
    services = len({row.service for row in rows})
    return rows, (
        f"{path.name}: {len(rows)} requests of {services} service{'s' if services > 1 else ''}, "
        f"time x {speed:g}"
    )


def _read(path: Path, kind: str) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise WeftError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; cut it first")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeftError(f"{path}: cannot be read as {kind}: {error}") from None


def _range(text: str, option: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise WeftError(f"{option} {text!r}: write a number or LOW-HIGH") from None


def _choose(served: list[ModelFacts], wanted: str | None) -> list[ModelFacts]:
    if wanted is None:
        if not served:
            raise WeftError("the server serves no model")
        return served
    known = {facts.name: facts for facts in served}
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise WeftError(f"--models: not served: {', '.join(missing)}; served: {', '.join(known)}")
    return [known[name] for name in names]


async def replay_workload(
    workload: Workload,
    settings: Settings,
    *,
    models: str | None,
    text: str | None,
    console: Console,
) -> Result:
    """Ask the server for its models, fit the workload to them, and replay it."""
    async with make_client(settings) as client:
        chosen = _choose(await fetch_models(client), models)
    contexts = [facts.max_context_tokens for facts in chosen if facts.max_context_tokens]
    context = workload.context or (min(contexts) if contexts else DEFAULT_CONTEXT)
    rows = scale_lengths(workload.rows, context, output_share=workload.output_share)
    arrivals = spread(
        rows, [facts.name for facts in chosen], skew=workload.skew, seed=workload.seed
    )
    vocabularies = [facts.vocab_size for facts in chosen if facts.vocab_size]
    vocab_size = min(vocabularies) if len(vocabularies) == len(chosen) else DEFAULT_VOCAB
    requests = plan_requests(arrivals, seed=workload.seed, vocab_size=vocab_size, text=text)
    words = (
        f"{workload.words}, lengths scaled to a context of {context:,} tokens, "
        f"Zipf skew {workload.skew:g} over {len(chosen)} models, seed {workload.seed}"
    )
    with watching(console) as watch:
        return await replay_requests(requests, chosen, settings, workload=words, watch=watch)


def show(result: Result, console: Console) -> None:
    console.print(replay_table(result, console.width))
    for line in legend(result):
        console.print(line, highlight=False)
    for line in failure_lines(result.requests):
        console.print(f"failed: {line}", style="red", highlight=False, markup=False)


def make_console() -> Console:
    """As wide as the table where there is no terminal to ask."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def check_writable(path: Path) -> None:
    """Before the replay, not after it: records that cannot be kept are lost. Raises WeftError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise WeftError(f"--out {path}: cannot be written: {error.strerror}") from None


def write_result(result: Result, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def exit_code(result: Result) -> int:
    """0: every request was answered whole. 1: some failed. 130: interrupted."""
    return 130 if result.interrupted else int(result.total.failures > 0)


def replay(
    trace: Annotated[
        Path | None,
        typer.Argument(help="CSV: timestamp (s), model, prompt_tokens, output_tokens."),
    ] = None,
    url: Annotated[str, typer.Option(help="The server.", envvar="WEFT_URL")] = (
        "http://127.0.0.1:8321"
    ),
    models: Annotated[
        str | None, typer.Option(help="Comma-separated, busiest first. Default: all served.")
    ] = None,
    speed: Annotated[float, typer.Option(help="Time runs so many times as fast.")] = 1.0,
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many requests.", min=1)
    ] = None,
    skew: Annotated[float, typer.Option(help="Zipf exponent of the models' shares.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of spreading, prompts and sampling.")] = 0,
    context: Annotated[
        int | None,
        typer.Option(help="Scale lengths to so many tokens. Default: the models' own context."),
    ] = None,
    output_share: Annotated[
        float, typer.Option(help="Part of the context that outputs may take.")
    ] = 0.5,
    rate: Annotated[
        float | None, typer.Option(help="Instead of a trace: so many requests a second.")
    ] = None,
    requests: Annotated[int, typer.Option(help="With --rate: how many.")] = 100,
    cv: Annotated[float, typer.Option(help="With --rate: burstiness; 1 is Poisson.")] = 1.0,
    prompt_tokens: Annotated[str, typer.Option(help="With --rate: LOW-HIGH.")] = "100-1000",
    output_tokens: Annotated[str, typer.Option(help="With --rate: LOW-HIGH.")] = "100-400",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    text: Annotated[
        Path | None,
        typer.Option(help="Prompts are passages of this file instead of random token ids."),
    ] = None,
    plain: Annotated[
        bool, typer.Option(help="Send OpenAI's own fields only; answers may end early.")
    ] = False,
    timeout_s: Annotated[float, typer.Option(help="A longer request has failed.")] = 600.0,
    out: Annotated[Path | None, typer.Option(help="Write every record as JSON here.")] = None,
) -> None:
    """Replay a trace over HTTP with streaming, and measure what the clients saw."""
    # Long because typer reads the options from the signature: half of it is their list.
    if (trace is None) == (rate is None):
        raise WeftError("give a trace file or --rate, not both")
    if out is not None:
        check_writable(out)
    if trace is not None:
        rows, words = read_trace(trace, limit=limit, speed=speed)
    else:
        assert rate is not None
        arrivals = gamma_arrivals(rate * speed, requests, cv=cv, seed=seed)
        lengths = (
            _range(prompt_tokens, "--prompt-tokens"),
            _range(output_tokens, "--output-tokens"),
        )
        rows = uniform_rows(arrivals, prompt_tokens=lengths[0], output_tokens=lengths[1], seed=seed)
        words = f"{requests} requests, {rate * speed:g}/s with cv {cv:g}, {prompt_tokens} tokens in"
    settings = Settings(
        url=url,
        temperature=temperature,
        seed=seed,
        timeout_s=timeout_s,
        extensions=not plain,
        api_key=os.environ.get("WEFT_API_KEY"),
    )
    workload = Workload(
        rows=rows, words=words, skew=skew, seed=seed, context=context, output_share=output_share
    )
    console = make_console()
    passages = _read(text, "a text") if text else None
    result = asyncio.run(
        replay_workload(workload, settings, models=models, text=passages, console=console)
    )
    show(result, console)
    if out is not None:
        write_result(result, out)
    raise typer.Exit(exit_code(result))
