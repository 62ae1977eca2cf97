"""The import rule and a few others, read from the source itself."""

import ast
import functools
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SRC = ROOT / "src"

CORE = {"core"}
LOW = CORE | {"slo", "cost", "ledger"}
MAY_IMPORT = {
    "core": CORE,
    "config": CORE | {"config"},
    "slo": CORE | {"slo"},
    "cost": CORE | {"cost"},
    "ledger": CORE | {"ledger"},
    "workload": CORE | {"workload"},
    "policy": LOW | {"policy"},
    "sched": LOW | {"policy", "sched"},
    "pool": LOW | {"policy", "pool"},
    "sim": LOW | {"policy", "sched", "pool", "sim", "workload", "config"},
}
"""The pure rooms: core <- {slo, cost, ledger} <- policy <- {sched, pool} <- sim."""
TORCH_ROOMS = {"memory", "kernels", "attention", "models", "engine", "tune"}
WEB = {"fastapi", "starlette", "uvicorn"}
EFFECTS = {
    "asyncio", "http", "httpx", "mmap", "multiprocessing", "os", "pathlib", "selectors", "shutil",
    "signal", "socket", "subprocess", "tempfile", "threading", "time", "urllib",
}  # fmt: skip
"""Modules that pure rooms have no use for: I/O, clocks, threads."""
NEVER = {"pickle", "cPickle", "dill", "marshal", "shelve", "transformers"}
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 600
"""About 500 is the aim; this is where it stops being about."""


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree, of everything under src."""
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def room(module: str) -> str:
    """weft.sched.turns -> sched; weft itself -> ''."""
    parts = module.split(".")
    return parts[1] if parts[0] == "weft" and len(parts) > 1 else ""


def imports(tree: ast.AST) -> set[str]:
    """Dotted names imported anywhere in the tree, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(modules()[module])}


def closure(start: str) -> set[str]:
    """Modules of weft that come along when `start` is imported (imports at the top only)."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in seen or module not in modules():
            continue
        seen.add(module)
        parts = module.split(".")
        waiting += [".".join(parts[:i]) for i in range(1, len(parts))]
        for node in modules()[module].body:
            waiting += [name for name in imports(node) if name.split(".")[0] == "weft"]
    return seen


def test_pure_rooms_import_only_what_lies_below_them() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, tree in modules().items()
        if room(module) in MAY_IMPORT
        for name in imports(tree)
        if name.startswith("weft.") and room(name) not in MAY_IMPORT[room(module)]
    ]
    assert not wrong


def test_pure_rooms_have_no_effects() -> None:
    wrong = {
        module: sorted(tops(module) & (EFFECTS | {"torch", "numpy"}))
        for module in modules()
        if room(module) in MAY_IMPORT
    }
    assert not {module: names for module, names in wrong.items() if names}


def test_only_some_rooms_import_torch() -> None:
    wrong = [m for m in modules() if "torch" in tops(m) and room(m) not in TORCH_ROOMS]
    assert not wrong


def test_only_the_server_imports_the_web_framework() -> None:
    assert not [m for m in modules() if tops(m) & WEB and room(m) != "server"]


@pytest.mark.parametrize("start", ["server", "hub", "node", "replay", "report"])
def test_frontends_start_without_torch_and_without_the_engine(start: str) -> None:
    members = [module for module in modules() if room(module) == start]
    along = set().union(*(closure(module) for module in members))
    assert not [module for module in along if "torch" in tops(module)]
    assert start != "server" or not [module for module in along if room(module) == "engine"]


def test_nothing_imports_what_is_never_needed() -> None:
    assert not [(m, names) for m in modules() if (names := tops(m) & NEVER)]


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_no_call_executes_data() -> None:
    wrong = []
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                shell = [k for k in node.keywords if k.arg == "shell"]
                if _name(node.func) in {"eval", "exec", "torch.load", "os.system"} or shell:
                    wrong.append(f"{module}:{node.lineno}")
    assert not wrong


def test_no_failure_is_swallowed_blindly() -> None:
    wrong = []
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                blind = node.type is None or _name(node.type) in {"Exception", "BaseException"}
                if blind and all(isinstance(part, ast.Pass) for part in node.body):
                    wrong.append(f"{module}:{node.lineno}")
    assert not wrong


def test_functions_of_the_pure_rooms_fit_a_screen() -> None:
    wrong = [
        f"{module}.{node.name}"
        for module, tree in modules().items()
        if room(module) in MAY_IMPORT
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not wrong


def test_no_file_is_too_long() -> None:
    files = [
        path for top in ("src", "tests", "demo", "scripts") for path in (ROOT / top).rglob("*.py")
    ]
    long = [
        str(path.relative_to(ROOT))
        for path in files
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES
    ]
    assert not long


def test_every_test_file_lies_in_one_suite_and_has_a_name_of_its_own() -> None:
    files = list((ROOT / "tests").rglob("test_*.py"))
    outside = [
        f for f in files if f.relative_to(ROOT / "tests").parts[0] not in ("cpu", "gpu", "e2e")
    ]
    assert not outside
    assert not [name for name, count in Counter(f.name for f in files).items() if count > 1]
