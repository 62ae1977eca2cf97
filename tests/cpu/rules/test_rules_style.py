"""Rules of style that a linter does not know. The import rule is in tests/cpu/test_imports.py."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PURE = {
    "core", "config", "slo", "cost", "ledger", "workload", "policy", "sched", "pool", "sim",
}  # fmt: skip
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 600
"""About 500 is the aim; this is where it stops being about."""


@functools.cache
def sources() -> dict[Path, ast.Module]:
    """Every file of weft and its syntax tree."""
    files = sorted((ROOT / "src").rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in files}


def test_no_failure_is_swallowed_blindly() -> None:
    wrong = []
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                named = ast.unparse(node.type) if node.type else "everything"
                blind = named in {"everything", "Exception", "BaseException"}
                if blind and all(isinstance(part, ast.Pass) for part in node.body):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_functions_of_the_pure_rooms_fit_a_screen() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path, tree in sources().items()
        if path.relative_to(ROOT / "src" / "weft").parts[0] in PURE
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not wrong


def test_no_file_is_too_long() -> None:
    tops = ("src", "tests", "demo", "scripts", "benchmarks")
    files = [path for top in tops for path in (ROOT / top).rglob("*.py")]
    long = [
        str(path.relative_to(ROOT))
        for path in files
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES
    ]
    assert not long


def test_what_documents_point_to_is_there() -> None:
    """Tests, results and pages named in README.md and docs exist."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    wrong = [
        f"{document.relative_to(ROOT)}: {path}"
        for document in documents
        for path in re.findall(
            r"`((?:tests|benchmarks|docs|demo|examples|scripts)/[\w./-]+)`",
            document.read_text(encoding="utf-8"),
        )
        if not (ROOT / path).exists()
    ]
    assert not wrong
