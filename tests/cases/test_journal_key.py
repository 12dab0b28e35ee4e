"""The key of journals names everything that decides what is in them, so that no resume mixes the numbers of two programs."""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import ddp_eval
from ddp_eval.distributed.world import World
from ddp_eval.packs.batches import NO_TEXTS
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.packs.rows import plan_rows
from ddp_eval.run import resume

PACKAGE = Path(ddp_eval.__file__).parent
LAYOUTS = (
    "load",
    "kinds",
    "data_parallel",
    "pipeline_parallel",
    "tensor_parallel",
    "fully_sharded",
)  # which layout.KINDS names, not imports
STARTS = (
    *PACKAGE.glob("engines/**/*.py"),
    *(PACKAGE / "placement" / f"{name}.py" for name in LAYOUTS),
    PACKAGE / "run" / "execute.py",
    PACKAGE / "run" / "self_check.py",
)
# Modules that engines and execution use and that decide no number, each with what makes sure of it.
NO_NUMBERS = {
    "config.py": "flags of an unfinished run are compared one by one",
    "demo/__init__.py": "the files of the demo model have digests, as those of any model",
    "distributed/launch_environment.py": "reads what the launcher says of ranks",
    "distributed/leader_signs.py": "how long to wait for rank 0 of a caller's group",
    "distributed/meeting.py": "how ranks find each other",
    "distributed/progress.py": "the progress line",
    "distributed/store.py": "texts about ranks and errors",
    "distributed/watchdog.py": "timeouts and messages",
    "output/journal.py": "its format has a version of its own, and each record a checksum",
    "output/lm_eval_names.py": "other names of files that were written",
    "output/status.py": "status.json",
    "output/tables.py": "writes what was computed",
    "output/versions.py": "versions are in the key themselves",
    "output/write.py": "writes what was computed",
    "placement/memory.py": "which layout fits; the layout is in the key",
    "placement/speed.py": "which layout is the fastest; the layout is in the key",
    "run/preflight.py": "checks nodes before any work",
    "system/compile_cache.py": "where torch keeps compiled kernels",
    "system/digests.py": "digests are in the key themselves",
    "system/files.py": "reads and writes files of the run directory",
    "system/hub.py": "advice in error messages",
    "system/launch_id.py": "which launch this is",
    "system/machine.py": "the hardware is every journal's origin, and another one is reported",
    "system/network.py": "network addresses",
    "system/processes.py": "process ids",
    "system/read_back.py": "refuses files, and gives the others as they are",
    "system/text.py": "counts and sizes in words",
    "telemetry/meter.py": "measures time and bytes",
    "telemetry/timeline.py": "shortens what was measured, for the page",
    "values.py": "reads flags",
}


def _imported(path: Path) -> set[Path]:
    """The modules of this package that a file imports, anywhere in it but for type checking alone."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "no relative imports"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        todo += ast.iter_child_nodes(node)
    places = [PACKAGE.parent.joinpath(*name.split(".")) for name in names if name.startswith("ddp_eval.")]
    return {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}


def _used() -> set[str]:
    """Every module that engines and execution import, however indirectly, by its place in the package."""
    found: set[Path] = set()
    todo = list(STARTS)
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _imported(path)
    return _names(found)


def _names(paths: Iterable[Path]) -> set[str]:
    """Places in the package, without those of an __init__.py that holds nothing but a docstring."""
    return {path.relative_to(PACKAGE).as_posix() for path in paths if len(ast.parse(path.read_text(encoding="utf-8")).body) > 1}


def test_every_module_that_decides_numbers_is_in_the_key() -> None:
    """Catches a module that engines or execution came to use, whose change would mix old packs with new ones in a resume."""
    covered = _names(path for name in resume._CODE for path in _modules(PACKAGE / name))
    assert {"packs/pairs.py", "engines/ops/logprobs.py", "engines/ops/masks.py"} <= covered & _used()
    assert _used() - covered == set(NO_NUMBERS), "put new modules into resume._CODE, or here with the reason"
    assert covered <= _used(), "in the key and used by nobody"


def _modules(place: Path) -> list[Path]:
    return list(place.rglob("*.py")) if place.is_dir() else [place]


def test_versions_of_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a new peft or bitsandbytes whose packs go with those of the old one, as a new torch's do not."""
    plan = plan_rows(requests_from_lists([[1, 2, 3, 4], [1, 2, 5, 6]], [1, 2]), 64)[0]
    world = World(0, 0, 1, torch.device("cpu"))

    def key() -> bytes:
        return resume.journal_key(plan, NO_TEXTS, {"name": "hf"}, world, {"model_files": {"sha256": "a"}})

    def key_with_another(package: str) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", lambda name: "0.0" if name == package else version(name))
            return key()

    version = importlib.metadata.version
    assert len({key(), *map(key_with_another, ("tokenizers", "numpy", "peft"))}) == 4
    assert key_with_another("lm_eval") == key(), "it makes prompts, and they are in the plan"
