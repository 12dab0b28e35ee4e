"""Fixtures for all tests: no network, OMP_NUM_THREADS threads (1), and tiny models that each session builds once."""

from __future__ import annotations

import functools
import logging
import os
import tempfile

# Before transformers and datasets are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import tiny_models
import torch
from torch.utils import collect_env

pytest.register_assert_rewrite("engine_runs", "lm_eval_answers")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
# lm_eval has torch ask a dozen programs about the machine at the end of each evaluation.
collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)
# A test must fail for the change that it is run on: not because the machine is busy, nor for an example drawn by chance.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Make a cache home for ddp_eval that the session's processes share. The user's other caches are linked there: the hub's."""
    if hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist inherits that of the main process
    home = tempfile.TemporaryDirectory(prefix="cache_home_")
    config.add_cleanup(home.cleanup)
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for cache in users.iterdir() if users.is_dir() else ():
        if cache.name != "ddp_eval":
            Path(home.name, cache.name).symlink_to(cache.absolute())
    os.environ["XDG_CACHE_HOME"] = home.name
    if "ATEN_CPU_CAPABILITY" in os.environ:  # torch's cache of compiled code is not keyed by it, and offers vectors that are off
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(home.name, "inductor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of modules that start processes, by what they import."""
    for item in items:
        members = vars(item.module).values() if isinstance(item, pytest.Function) else ()
        if any("launch" in (getattr(member, "__module__", ""), getattr(member, "__name__", "")) for member in members):
            item.add_marker(pytest.mark.processes)


@pytest.fixture
def no_lm_eval_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the test lm_eval's index of its own 14,000 task files, which takes 8 s to read: it knows those of --include_path."""
    from ddp_eval.tasks import select

    task_manager = select.TaskManager
    monkeypatch.setattr(select, "TaskManager", lambda **options: task_manager(**{**options, "include_defaults": False}))


@pytest.fixture(autouse=True)
def levels_of_loggers() -> None:
    """What a command within this process has done to logging ends with its test: other tests compare whole logs."""
    for name in ("", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("ddp_eval", "lm_eval"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer for the tiny models. Tests may not change it."""
    return tiny_models.make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """tiny_model(kind, attn_implementation=None) -> a random model, the same object for the same arguments."""
    made: dict[Any, Any] = {}

    def get(kind: str, attn_implementation: str | None = None) -> Any:
        key = kind, attn_implementation
        if key not in made:
            made[key] = tiny_models.make_model(kind, attn_implementation)
        return made[key]

    return get


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_model_path(kind) -> a directory with that model and its tokenizer, saved once."""
    saved: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in saved:
            saved[kind] = tiny_models.save_model(kind, tmp_path_factory.mktemp(kind))
        return saved[kind]

    return get
