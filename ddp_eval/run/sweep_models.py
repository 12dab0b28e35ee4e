"""Which models a sweep is over: from names, paths and patterns to a name, a step and a place in the order for each."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ddp_eval.errors import UserError
from ddp_eval.output.lock import LOCK
from ddp_eval.output.status import STATUS
from ddp_eval.output.write import MANIFEST, RESULTS
from ddp_eval.run.sweep_options import SweepOptions

# What stands in a sweep's directory beside its runs.
_TAKEN = (LOCK, "logs", "report.html", "status.json", "sweep.csv", "sweep.json", "sweep_metrics.json")
# What a run directory holds, from its first moment on, and a checkpoint.
_OF_RUNS = (LOCK, STATUS, MANIFEST, RESULTS)
_OF_CHECKPOINTS = ("config.json", "adapter_config.json")
# A number behind one of these words, or a name that is a number, is the step of a training run.
_STEP = re.compile(r"(?:^|[^a-z])(?:steps?|checkpoint|ckpt|iter|iteration|global_?step|batch)[-_=]?0*(\d+)", re.IGNORECASE)


class SweptModel(NamedTuple):
    """name: of its run directory. model: as `pretrained` or `peft` takes it. step: of the training run, where a name has it."""

    name: str
    model: str
    revision: str | None
    step: int | None

    @property
    def is_local(self) -> bool:
        return os.path.isdir(os.path.expanduser(self.model))


Known = Mapping[tuple[str, str | None], str]  # {(model, revision): name}


def list_models(options: SweepOptions, known: Known | None = None) -> list[SweptModel]:
    """All that there are now, in order: by specification, those of a pattern and revisions by their numbers.

    known: names that models have had in this sweep, which they keep when others of the same name come.
    Raises UserError where two would share a run directory.
    """
    named: dict[str, str] = {}
    for spec in options.models:
        for name, model in _expand(spec, options):
            named.setdefault(model, name)
    counts = Counter(named.values())
    found = []
    for model, name in named.items():
        own = name if counts[name] == 1 else _with_parent(model)
        for revision in options.revisions or (None,):
            if revision is not None and os.path.isdir(os.path.expanduser(model)):
                raise UserError(f"--revisions are of models on the hub, and {model} is a directory")
            full = own if revision is None else f"{own}-{revision.replace('/', '-')}"
            before = (known or {}).get((model, revision), "")
            full = before if _is_name(before) else full
            found.append(SweptModel(full, model, revision, step_of(revision or "", name)))
    for name, count in Counter(one.name for one in found).items():
        if count > 1:
            models = [one.model for one in found if one.name == name]
            raise UserError(f"--models {' and '.join(models)} would both be evaluated in {name}: give them separate sweeps")
    for one in found:
        if one.name in _TAKEN:
            raise UserError(f"--models {one.model} would be evaluated in {one.name}, which a sweep has for itself: rename it")
    return found


def is_removed(options: SweepOptions, model: str) -> bool:
    """Whether one of the patterns would find a model of this path, and it is not there (of a name nobody knows).

    Not where that cannot be told: a directory above it cannot be read, or the part before the first * is not there (a file system
    that is not mounted now).
    """
    parts = Path(model).parts
    patterns = [Path(os.path.expanduser(spec)).parts for spec in options.models if glob.has_magic(spec)]
    found = [own for own in patterns if len(own) == len(parts) and all(map(fnmatch.fnmatchcase, parts, own))]
    return bool(found) and all(_can_read(Path(*own[: _count_fixed(own)])) for own in found) and is_missing(model)


def is_missing(model: str) -> bool:
    """Whether there certainly is no directory of this path: not where a disk or a permission hides it."""
    try:
        return not stat.S_ISDIR(os.stat(os.path.expanduser(model)).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False


def _can_read(directory: Path) -> bool:
    try:
        with os.scandir(directory) as entries:
            next(entries, None)
    except OSError:
        return False
    return True


def _expand(spec: str, options: SweepOptions) -> list[tuple[str, str]]:
    """(name, model) of what a specification stands for now. A pattern may also find the sweep's own directory, and its runs."""
    if not glob.has_magic(spec):
        return [(os.path.basename(os.path.abspath(spec)) or "model", spec)]
    parts = Path(os.path.expanduser(spec)).parts
    fixed = _count_fixed(parts)
    paths = [path.rstrip("/") for path in glob.glob(os.path.expanduser(spec)) if os.path.isdir(path)]
    paths = [path for path in paths if not _is_own(path, options)]
    return [("-".join(Path(path).parts[fixed:]), path) for path in sorted(paths, key=natural_key)]


def _count_fixed(parts: Sequence[str]) -> int:
    """How many parts of a pattern's path come before the first that is one."""
    return next(place for place, part in enumerate(parts) if glob.has_magic(part))


def _is_own(path: str, options: SweepOptions) -> bool:
    """Whether a directory is the sweep's, or a run's in there. Checkpoints may lie there, too, and be evaluated in place."""
    place, whole = os.path.realpath(path), os.path.realpath(options.output_path)
    if place == whole:
        return True
    if os.path.commonpath([place, whole]) != whole:
        return False
    folder = os.path.join(place, options.subfolder)
    if any(os.path.lexists(os.path.join(folder, name)) for name in _OF_CHECKPOINTS):
        return False
    return os.path.relpath(place, whole) in _TAKEN or any(os.path.lexists(os.path.join(place, name)) for name in _OF_RUNS)


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and "/" not in text


def _with_parent(model: str) -> str:
    return "-".join(Path(model.rstrip("/")).parts[-2:]).replace("/", "")


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Orders checkpoint-9 before checkpoint-10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def step_of(*texts: str) -> int | None:
    """
    >>> step_of("step3000"), step_of("checkpoint-0020"), step_of("500"), step_of("pythia-70m")
    (3000, 20, 500, None)
    """
    for text in texts:
        if re.fullmatch(r"\d+", text):
            return int(text)
        if found := _STEP.search(text):
            return int(found[1])
    return None


def sort_revisions(revisions: Sequence[str]) -> tuple[str, ...]:
    """Each once, by their numbers."""
    return tuple(sorted(dict.fromkeys(revisions), key=natural_key))
