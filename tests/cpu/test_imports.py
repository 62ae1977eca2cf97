"""The import rule of the design (rooms and who may use whom), read from the source with ast, and
what a process has really loaded after importing a room."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
PACKAGE = SRC / "weft"

BASE = {"core"}
FACTS = BASE | {"slo", "cost", "ledger"}
DECIDE = FACTS | {"policy"}
PURE: dict[str, set[str]] = {
    "core": BASE,
    "config": BASE,
    "workload": BASE,
    "slo": BASE,
    "cost": BASE,
    "ledger": BASE,
    "policy": FACTS,
    "sched": DECIDE,
    "pool": DECIDE,
    "sim": DECIDE | {"sched", "pool", "workload", "config"},
}
"""Pure rooms and the rooms each may import besides itself."""

TEXT_BELOW: dict[str, set[str]] = {"grammar": BASE}
"""Rooms that know text and may be used on both sides, and what each may import besides itself."""

DEVICE: dict[str, set[str]] = {
    "memory": BASE,
    "kernels": BASE,
    "attention": BASE | {"kernels"},
    "models": BASE | {"attention", "kernels"},
    "engine": BASE | {"memory", "kernels", "attention", "models", "grammar"},
}
"""Rooms of the device and the rooms each may import besides itself: none that starts processes,
speaks to others or decides."""
TORCH_ROOMS = {"memory", "kernels", "attention", "models", "engine", "tune"}
WEB = {"fastapi", "starlette", "uvicorn", "pydantic", "pydantic_core"}
TEXT = {"tokenizers", "jinja2"}
IMPURE = {
    "asyncio",
    "concurrent",
    "datetime",
    "multiprocessing",
    "os",
    "pathlib",
    "requests",
    "secrets",
    "shutil",
    "signal",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "urllib",
}
"""Input, output, threads and clocks: not in a pure room."""
NOWHERE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "transformers"}
WORKER_SIDE = {"engine", "attention", "kernels", "memory", "worker", "tune", "sched"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imports_of(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def read(file: Path) -> set[str]:
    package = ".".join(file.relative_to(SRC).parent.parts)
    return set(imports_of(ast.parse(file.read_text(encoding="utf-8")), package))


IMPORTS = {file: read(file) for file in FILES}


def weft_rooms(file: Path) -> set[str]:
    """Rooms of weft a file imports; names that are no room (weft.__version__) are left out."""
    rooms = {
        name.split(".")[1] for name in IMPORTS[file] if name.startswith("weft.") and "." in name
    }
    return {room for room in rooms if (PACKAGE / room).is_dir()}


def tops(file: Path) -> set[str]:
    return {name.split(".")[0] for name in IMPORTS[file]}


def where(file: Path) -> str:
    return str(file.relative_to(SRC))


def test_the_rooms_of_this_test_exist() -> None:
    assert {room for room in PURE if not (PACKAGE / room).is_dir()} == set()
    assert len(FILES) > 30


def test_only_the_device_rooms_import_torch() -> None:
    wrong = [where(f) for f in FILES if "torch" in tops(f) and room_of(f) not in TORCH_ROOMS]
    assert wrong == []


def test_only_the_server_imports_the_web_framework_and_text() -> None:
    wrong = [where(f) for f in FILES if tops(f) & (WEB | TEXT) and room_of(f) != "server"]
    assert wrong == []


def test_nobody_imports_what_runs_foreign_code_or_transformers() -> None:
    assert [where(f) for f in FILES if tops(f) & NOWHERE] == []


@pytest.mark.parametrize(("room", "below"), sorted((PURE | DEVICE | TEXT_BELOW).items()))
def test_a_room_imports_only_what_lies_below(room: str, below: set[str]) -> None:
    wrong = {
        where(file): sorted(weft_rooms(file) - below - {room})
        for file in FILES
        if room_of(file) == room and weft_rooms(file) - below - {room}
    }
    assert wrong == {}


@pytest.mark.parametrize("room", sorted(PURE))
def test_a_pure_room_has_no_clock_and_no_input_or_output(room: str) -> None:
    wrong = {
        where(file): sorted(tops(file) & IMPURE)
        for file in FILES
        if room_of(file) == room and tops(file) & IMPURE
    }
    assert wrong == {}


def calls_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("room", sorted(PURE))
def test_chance_in_a_pure_room_has_a_seed_and_no_file_is_opened(room: str) -> None:
    wrong = [
        (where(file), call)
        for file in FILES
        if room_of(file) == room
        for call in calls_of(ast.parse(file.read_text(encoding="utf-8")))
        if call in ("open", "input") or (call.startswith("random.") and call != "random.Random")
    ]
    unseeded = [
        where(file)
        for file in FILES
        if room_of(file) == room and "random.Random()" in file.read_text(encoding="utf-8")
    ]
    assert wrong == [] and unseeded == []


def test_no_code_is_made_from_text_and_no_shell_is_asked() -> None:
    wrong = [
        (where(file), call)
        for file in FILES
        for call in calls_of(ast.parse(file.read_text(encoding="utf-8")))
        if call in ("eval", "exec", "torch.load", "os.system", "os.popen")
    ]
    shells = [where(file) for file in FILES if "shell=True" in file.read_text(encoding="utf-8")]
    assert wrong == [] and shells == []


def test_the_server_knows_nothing_of_workers() -> None:
    wrong = {
        where(file): sorted(weft_rooms(file) & (WORKER_SIDE | {"models", "node"}))
        for file in FILES
        if room_of(file) == "server" and weft_rooms(file) & (WORKER_SIDE | {"models", "node"})
    }
    assert wrong == {}


def modules_of(room: str) -> list[str]:
    return [
        ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
        for file in FILES
        if room_of(file) == room and file.name != "__main__.py"
    ]


def loaded_after(modules: list[str]) -> set[str]:
    """Top-level modules in a fresh process after importing `modules`."""
    code = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(modules)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SRC), "PATH": "/usr/bin:/bin"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_grammars_are_read_by_one_room_and_only_when_one_comes() -> None:
    assert [where(f) for f in FILES if "llguidance" in tops(f) and room_of(f) != "grammar"] == []
    loaded = loaded_after([*modules_of("grammar"), *modules_of("server")])
    assert not loaded & {"llguidance", "torch"}


@pytest.mark.parametrize("room", ["server", "node", "hub", "transport", "cli", "replay", "report"])
def test_a_room_beside_the_worker_loads_no_torch(room: str) -> None:
    assert loaded_after(modules_of(room)) & {"torch", "transformers", "triton", "cuda"} == set()


def test_the_command_loads_neither_torch_nor_a_web_framework() -> None:
    loaded = loaded_after(["weft.cli.main", "weft.cli.ps", "weft.cli.serve", "weft.cli.doctor"])
    assert loaded & {"torch", "numpy", *WEB, *TEXT} == set()


def test_the_pure_rooms_load_nothing_heavy() -> None:
    modules = [module for room in PURE for module in modules_of(room)]
    assert loaded_after(modules) & {"torch", "numpy", "httpx", *WEB, *TEXT} == set()


def test_every_test_file_has_a_name_of_its_own_and_lies_in_one_room() -> None:
    """Same base names would collide, and a file outside the three folders would never run."""
    tests = SRC.parent / "tests"
    files = sorted(tests.rglob("test_*.py"))
    names = [file.name for file in files]
    assert [name for name in set(names) if names.count(name) > 1] == []
    assert [
        str(f) for f in files if f.relative_to(tests).parts[0] not in ("cpu", "gpu", "e2e")
    ] == []
