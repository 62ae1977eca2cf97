"""`weft check`: what a model folder holds and whether it can be served."""

from collections.abc import Sequence
from pathlib import Path

import typer

from weft.cli.units import size_text
from weft.models.check import CheckReport, check_checkpoint


def check_paths(paths: Sequence[Path]) -> int:
    """Prints a block per folder. 1 when a problem was found."""
    failed = False
    for path in paths:
        report = check_checkpoint(path)
        failed |= not report.servable
        for line in report_lines(report):
            typer.echo(line)
    return int(failed)


def report_lines(report: CheckReport) -> list[str]:
    """The verdict first, then sizes, then what is wrong and what may surprise."""
    lines = [f"{report.path}: {'can be served' if report.servable else 'CANNOT BE SERVED'}"]
    if report.class_name is not None:
        parameters = report.parameters or 0
        lines.append(
            f"  {report.class_name}, {parameters / 1e6:,.1f} M parameters, {report.dtype}, "
            f"{report.num_layers} layers of {report.hidden_size}, {report.num_q_heads}/"
            f"{report.num_kv_heads} heads of {report.head_dim}, vocabulary {report.vocab_size}"
            + (f", sliding window {report.window}" if report.window else "")
        )
    if report.dtype is not None and report.kv_bytes_per_token is not None:
        image = report.image_bytes.get(report.dtype, 0)
        lines.append(
            f"  weights {size_text(image)} on host and device, KV "
            f"{size_text(report.kv_bytes_per_token)} a token, context "
            f"{report.max_context_tokens} tokens, pages of {report.page_tokens} tokens"
        )
    lines += [f"  problem: {problem}" for problem in report.problems]
    lines += [f"  note: {note}" for note in report.notes]
    return lines
