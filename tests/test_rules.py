"""The rules that the code keeps: who imports whom, who prints, how long a function is, what `--help` costs."""

import ast
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kontext.options import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kontext"

GROUND = {
    "errors",
    "console",
    "files",
    "tensors",
    "device",
    "processes",
    "__version__",
}  # what every part above the maths may use
MATHS = {"model", "flow", "denoiser", "sampler", "timesteps", "quant", "memory", "backends", "compiling"}
BELOW_COMMANDS = GROUND | MATHS | {"checkpoints", "lora", "data", "generation", "training"}

# Part of the package -> the other parts it may import. Imports point downward only.
LAYERS: dict[str, set[str]] = {
    "__init__": {"generation"},  # the door for programs, opened when it is asked for
    "__main__": {"cli"},
    "cli": {"allocation", "app", "options", "commands", "console", "errors", "readahead", "__version__"},
    "app": {"options"},
    "options": {"errors"},
    "commands": BELOW_COMMANDS | {"options"},
    "training": GROUND | MATHS | {"generation", "data", "lora"},
    "generation": GROUND | MATHS | {"allocation", "checkpoints", "lora", "data"},
    "lora": GROUND | {"checkpoints", "quant", "model"},
    "data": GROUND | {"model"},
    "checkpoints": GROUND | {"quant", "model", "readahead"},
    "backends": {"errors", "model"},
    "compiling": {"errors", "model"},
    "memory": {"errors", "model"},
    "quant": {"errors", "model"},
    "timesteps": {"errors", "flow"},
    "sampler": {"flow"},
    "denoiser": {"model"},
    "flow": set(),
    "model": {"errors"},
    "device": {"errors", "console", "processes"},
    "processes": {"errors"},
    "files": {"errors", "tensors"},
    "tensors": set(),
    "console": set(),
    "errors": set(),
    "allocation": set(),
    "readahead": set(),
}
# The maths stands on torch alone; type annotations of transformers' classes do not count.
MATHS_PACKAGES = {"torch", "einops"}
LIGHT = ("cli", "app", "options", "readahead", "console", "errors", "__init__", "__main__")
HEAVY = {"torch", "transformers", "accelerate", "diffusers", "safetensors", "PIL", "numpy", "bitsandbytes"}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(tree: ast.AST) -> Iterator[str]:
    """The dotted names of all that a module imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "kontext":
                yield from (f"kontext.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def _without_type_checking(tree: ast.Module) -> ast.Module:
    """The module without its `if TYPE_CHECKING:` blocks."""
    kept = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
    ]
    return ast.Module(kept, type_ignores=[])


def _functions(paths: list[Path]) -> list[tuple[int, str]]:
    """Length in lines and name of every function, the shortest first."""
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append((length, f"{path.relative_to(ROOT)}: {node.name}"))
    return sorted(found)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    part = _part(path)
    assert part in LAYERS, f"give {part} its place in LAYERS"
    tree = _without_type_checking(ast.parse(path.read_text(encoding="utf-8")))
    names = [name.split(".") for name in _imports(tree)]
    ours = {name[1] for name in names if name[0] == "kontext" and len(name) > 1}
    assert ours - {part} <= LAYERS[part]
    assert "pickle" not in {name[0] for name in names}, "a pickle from a user's file can run anything"
    if part in MATHS:
        others = {name[0] for name in names} - {"kontext"} - sys.stdlib_module_names
        assert others <= MATHS_PACKAGES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_console_prints(path: Path) -> None:
    if path == PACKAGE / "console.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "print" not in called and not used & {"sys.stdout", "sys.stderr"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_and_leftovers(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert path.stem not in ("utils", "helpers", "common", "misc"), "a file is named after its idea"
    assert ast.get_docstring(ast.parse(text)), "a module says what it is"
    assert not [word for word in ("TODO", "FIXME", "XXX", "type: ignore\n", "noqa\n") if word in text]


def test_functions_are_short() -> None:
    functions = _functions(SOURCES)
    lengths = [length for length, _ in functions]
    assert statistics.median(lengths) <= 10
    assert lengths[len(lengths) * 9 // 10] <= 30
    assert functions[-1][0] <= 60, f"{functions[-1][1]} has {functions[-1][0]} lines"


@pytest.mark.parametrize("folder", ["kontext", "tests", "examples"])
def test_files_are_short(folder: str) -> None:
    paths = [path for path in (ROOT / folder).rglob("*.py") if ".venv" not in path.parts]
    long = {
        str(path.relative_to(ROOT)): count
        for path in paths
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 320
    }
    assert not long


@pytest.mark.parametrize("part", LIGHT)
def test_what_help_needs_imports_nothing_heavy(part: str) -> None:
    paths = [path for path in SOURCES if _part(path) == part]
    assert paths
    for path in paths:
        imported = {name.split(".")[0] for name in _imports(ast.parse(path.read_text(encoding="utf-8")))}
        assert not imported & HEAVY, path


def test_help_loads_no_heavy_package() -> None:
    lines = [["--help"], *([command, "--help"] for command in COMMANDS)]
    script = (
        "import sys; from kontext.cli import main\n"
        f"assert [main(line) for line in {lines}] == [0] * {len(lines)}\n"
        f"loaded = {HEAVY} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", [[], *([command] for command in COMMANDS)], ids=lambda line: " ".join(line))
def test_help_answers_in_half_a_second(line: list[str]) -> None:
    """Processor time of some run: what else the machine does is not to count."""
    assert any(_processor_seconds([*line, "--help"]) < 0.5 for _ in range(20))


def _processor_seconds(line: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "kontext", *line]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
