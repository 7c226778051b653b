"""The rules of the house: who may import whom, what is loaded when, and how large a room may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
PACKAGE: Final = ROOT / "launcher"
MODULES: Final = tuple(sorted(PACKAGE.rglob("*.py")))

# A room is a package or a top-level module. Each may import itself and what stands here; an entry with a dot
# opens one module of a room only.
MAY_IMPORT: Final[Mapping[str, frozenset[str]]] = {
    "__init__": frozenset(),
    "errors": frozenset(),
    "sizes": frozenset(),
    "console": frozenset({"errors", "sizes"}),
    "durable": frozenset(),
    "config": frozenset({"errors"}),
    "data": frozenset({"errors", "config", "durable"}),
    "plan": frozenset({"errors", "config", "sizes"}),
    "render": frozenset({"errors", "config", "plan", "sizes"}),
    "run": frozenset({"errors", "config", "plan", "render", "data", "durable", "sizes"}),
    "worker": frozenset(
        {
            *("errors", "config", "plan", "data", "durable", "sizes"),
            *("run.directory", "run.checkpoints", "run.outcome", "run.environment", "run.machine"),
            *("run.heartbeat", "run.nodes"),
        }
    ),
    "cli": frozenset({"errors", "console", "config", "data", "plan", "render", "run", "sizes"}),
    "__main__": frozenset({"cli"}),
}
ENGINES: Final = frozenset({"torch", "transformers", "accelerate", "deepspeed", "datasets"})
SLOW_TO_LOAD: Final = ENGINES | {"numpy", "fsspec"}
LISTS_DATA_SETS: Final = "data/data_sets.py"  # asks `datasets` what a data set of the Hub consists of
MAY_READ_ENVIRONMENT: Final = (
    "run/",
    "worker/main.py",
    *(
        "worker/export.py",
        "worker/reshard.py",
        "worker/node.py",
    ),  # they are started too, and set one for all they import
    "console.py",
    "cli/__init__.py",
)
MOST_LINES: Final = 450


def name_of(module: Path) -> str:
    """`launcher/plan/memory.py` is `launcher.plan.memory`; a package is its folder's name."""
    parts = module.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES: Final = frozenset(name_of(module) for module in MODULES)
each_module = pytest.mark.parametrize(
    "module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix()
)


def parse(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"), str(module))


def imports(module: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a module imports, inside functions and type checking too."""
    package = name_of(module) if module.stem == "__init__" else name_of(module).rpartition(".")[0]
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield node.lineno, inner if inner in NAMES else source


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).with_suffix("").parts[0]


@each_module
def test_imports_run_one_way(module: Path) -> None:
    room = room_of(module)
    assert room in MAY_IMPORT, f"{room} is a new room: say in MAY_IMPORT what it may import"
    for line, imported in imports(module):
        if imported == "launcher" or not imported.startswith("launcher."):
            continue
        inside = imported.removeprefix("launcher.")
        allowed = {room, *MAY_IMPORT[room]}
        assert any(inside == door or inside.startswith(f"{door}.") for door in allowed), (
            f"{module.name}:{line} imports {imported}; {room} may import {sorted(allowed)}"
        )


@each_module
def test_only_the_worker_imports_an_engine(module: Path) -> None:
    if room_of(module) == "worker":
        return
    asks = {"datasets"} if module.relative_to(PACKAGE).as_posix() == LISTS_DATA_SETS else set()
    found = [(line, name) for line, name in imports(module) if name.partition(".")[0] in ENGINES - asks]
    assert not found, f"{module.name} belongs to the control half and imports {found}"


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in `sys.modules` after `statement`, in a fresh interpreter."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_command_line_loads_nothing_slow() -> None:
    assert not loaded_by("import launcher.cli") & SLOW_TO_LOAD


def test_reading_text_loads_no_engine() -> None:
    loaded = loaded_by("import launcher.data.prepare, launcher.data.sources")
    assert not loaded & (ENGINES | {"pyarrow", "aiohttp", "s3fs"})


def test_what_is_loaded_can_be_seen() -> None:
    assert "numpy" in loaded_by("import numpy")


@each_module
def test_a_module_is_one_idea(module: Path) -> None:
    lines = len(module.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{module.name} has {lines} lines: about 400 is where one usually becomes two"


@each_module
def test_a_module_is_named_for_what_it_holds(module: Path) -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & set(name_of(module).split("."))


def reads_of_environment(tree: ast.Module) -> Iterator[int]:
    names = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in names)


@each_module
def test_the_environment_is_read_at_the_doors(module: Path) -> None:
    if module.relative_to(PACKAGE).as_posix().startswith(MAY_READ_ENVIRONMENT):
        return
    lines = list(reads_of_environment(parse(module)))
    assert not lines, f"{module.name} reads an environment variable at lines {lines}"


def is_mutable(value: ast.expr | None) -> bool:
    """A list, dict or set: written out, comprehended, or made by calling its name."""
    if isinstance(value, ast.Call):
        makers = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
        return isinstance(value.func, ast.Name) and value.func.id in makers
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def says_it_stays(annotation: ast.expr) -> bool:
    """`Final`, or a type whose values mypy will not let anyone change."""
    constant = {"Final", "Mapping", "Sequence", "Collection", "AbstractSet"}
    outer = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return isinstance(outer, ast.Name) and outer.id in constant


@each_module
def test_no_module_keeps_state(module: Path) -> None:
    for node in parse(module).body:
        if isinstance(node, ast.Assign):
            named_all = [ast.unparse(target) for target in node.targets] == ["__all__"]
            assert named_all or not is_mutable(node.value), (
                f"{module.name}:{node.lineno}: annotate it Final or Mapping, or make it a tuple"
            )
        elif isinstance(node, ast.AnnAssign):
            assert says_it_stays(node.annotation) or not is_mutable(node.value), (
                f"{module.name}:{node.lineno}: annotate it Final or Mapping, or make it a tuple"
            )


def test_no_function_changes_a_global() -> None:
    found = [
        f"{module.name}:{node.lineno}"
        for module in MODULES
        for node in ast.walk(parse(module))
        if isinstance(node, ast.Global)
    ]
    assert not found
