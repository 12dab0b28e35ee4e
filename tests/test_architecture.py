"""The architecture, by the source alone: who may import whom, how long a function may be, and what test modules may import.

A rule's exceptions are what breaks it today. They must shrink: one that is no longer needed fails the test as well.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from places import PROGRAMS, ROOT

# From top to bottom. A module imports from lower layers and from its own part of a layer, never from another part of its layer.
LAYERS = (
    ("__init__",),
    ("integrations",),
    ("__main__", "api", "lm"),
    ("cli",),
    ("run",),
    ("placement",),
    ("engines", "tasks", "analysis"),
    ("distributed",),
    ("output",),
    ("config",),
    ("layout", "telemetry", "packs", "values"),
    ("system", "demo"),
    ("errors",),
)
LONGEST_FUNCTION = 60  # lines, its nested functions included
DEEPEST_NESTING = 2  # levels of functions within a function

UPWARD_IMPORTS: set[str] = set()
IMPORT_CIRCLES: set[str] = set()
LM_EVAL_ELSEWHERE: set[str] = set()
TORCH_DISTRIBUTED_ELSEWHERE: set[str] = set()
PACKS_IMPORT_MORE: set[str] = set()
SLOW_IMPORTS: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
NESTED_FUNCTIONS: set[str] = set()

TESTS = ROOT / "tests"
PACKAGE = ROOT / "ddp_eval"
PATHS = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in PATHS.items() if not name.startswith("demo.tasks")}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names that a file imports, in functions and for type checking as well; `from a import b` gives a.b."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return frozenset(names)


def first_parts(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def imported_modules(module: str) -> set[str]:
    """Modules of the package that one of its modules imports."""
    names = {name.removeprefix("ddp_eval.") for name in imported(MODULES[module]) if name.startswith("ddp_eval.")}
    return {name if name in MODULES else name.rpartition(".")[0] or "__init__" for name in names} - {module}


def importers(package: str) -> set[str]:
    """Modules of ours that import `package` or something in it."""
    return {module for module, path in MODULES.items() if any(f"{name}.".startswith(f"{package}.") for name in imported(path))}


def modules_in(*parts: str) -> set[str]:
    return {module for module in MODULES if module.partition(".")[0] in parts}


def assert_only(found: set[str], exceptions: set[str]) -> None:
    assert not found - exceptions, f"against the rule: {sorted(found - exceptions)}"
    assert not exceptions - found, f"no longer needed among the exceptions: {sorted(exceptions - found)}"


def test_imports_go_down() -> None:
    """Catches a module that imports one above it: it can then not be read, tested or changed without it."""
    depth = {part: number for number, parts in enumerate(LAYERS) for part in parts}
    assert {module.partition(".")[0] for module in MODULES} == set(depth), "each part of the package needs a layer"
    found = set()
    for module in MODULES:
        part = module.partition(".")[0]
        for other in imported_modules(module):
            other_part = other.partition(".")[0]
            if part != other_part and depth[other_part] <= depth[part]:
                found.add(f"{module} -> {other}")
    assert_only(found, UPWARD_IMPORTS)


def test_no_circle_of_imports() -> None:
    """Catches modules that can only be imported in one order."""
    reached = {module: imported_modules(module) for module in MODULES}
    for middle in MODULES:
        for module, others in reached.items():
            if middle in others:
                reached[module] = others | reached[middle]
    circles = {tuple(sorted(other for other in reached[one] if one in reached[other])) for one in MODULES if one in reached[one]}
    assert_only({" <-> ".join(circle) for circle in circles}, IMPORT_CIRCLES)


def test_where_lm_eval_is_imported() -> None:
    """Catches a new release of lm_eval that must be followed all over the package, and ranks that load it in vain."""
    assert_only(importers("lm_eval") - modules_in("tasks", "lm"), LM_EVAL_ELSEWHERE)


def test_no_print_on_stderr() -> None:
    """Catches a sentence in two writes, between which another rank's may stand: `watchdog.say` makes one."""
    calls = {
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stderr.write")
        if ast.unparse(node.func) != "print" or any(keyword.arg == "file" for keyword in node.keywords)
    }
    assert_only(calls, set())


def test_where_torch_distributed_is_imported() -> None:
    """Catches a collective far from where one sees which ranks join it."""
    assert_only(importers("torch.distributed") - modules_in("distributed"), TORCH_DISTRIBUTED_ELSEWHERE)


def test_packs_are_arithmetic() -> None:
    """Catches a plan that depends on a model, a device or the run."""
    found = set()
    for module in modules_in("packs"):
        others = first_parts(MODULES[module]) - {"ddp_eval", "numpy"} - sys.stdlib_module_names
        others |= imported_modules(module) - modules_in("packs", "system", "errors")
        found |= {f"{module} -> {other}" for other in others}
    assert_only(found, PACKS_IMPORT_MORE)


IMPORT_EACH = """
import importlib, os, sys
for name in sys.argv[1:]:
    child = os.fork()  # an interpreter that has imported nothing yet
    if not child:
        importlib.import_module(name)
        os._exit("torch" in sys.modules or "lm_eval" in sys.modules)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


def test_flags_and_files_are_read_without_torch() -> None:
    """Catches --help, compare and report that wait seconds for torch or lm_eval."""
    light = sorted(f"ddp_eval.{module}" for module in {"cli.flags", *modules_in("output", "analysis", "telemetry")})
    done = subprocess.run([sys.executable, "-c", IMPORT_EACH, *light], capture_output=True, text=True, check=True, cwd=ROOT)
    assert_only({name.removeprefix("ddp_eval.") for name in done.stdout.split()}, SLOW_IMPORTS)


def functions(tree: ast.AST, prefix: str, level: int = 0) -> Iterator[tuple[str, int, int]]:
    """(dotted name, lines, in how many functions it stands) of every function."""
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}.{getattr(node, 'name', '')}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, (node.end_lineno or 0) - node.lineno + 1, level
            yield from functions(node, name, level + 1)
        else:
            yield from functions(node, name if isinstance(node, ast.ClassDef) else prefix, level)


def test_functions_are_short() -> None:
    """Catches a function that nobody can read in one go."""
    found = [function for module, path in MODULES.items() for function in functions(tree_of(path), module)]
    assert_only({name for name, lines, _ in found if lines > LONGEST_FUNCTION}, LONG_FUNCTIONS)
    assert_only({name for name, _, level in found if level > DEEPEST_NESTING}, NESTED_FUNCTIONS)


def test_no_test_module_imports_another() -> None:
    """Catches helpers that stand among tests: they belong into tests/support."""
    others = {path: {name for name in first_parts(path) if name.startswith("test_")} for path in TESTS.rglob("*.py")}
    assert {path: names for path, names in others.items() if names} == {}


def test_tests_keep_lm_evals_tasks() -> None:
    """Catches an import of quick_main, even by way of another program: it hides lm_eval's tasks from all tests of the process."""
    hiding = {"quick_main"} | {path.stem for path in PROGRAMS.glob("*.py") if "quick_main" in first_parts(path)}
    assert len(hiding) > 5
    assert [path for path in TESTS.rglob("*.py") if PROGRAMS not in path.parents and hiding & first_parts(path)] == []
