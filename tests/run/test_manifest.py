"""Whether a run's model is still the model: by a look at its files where nobody touched them, else by all of their bytes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import ddp_eval
from ddp_eval.distributed.world import World
from ddp_eval.packs.batches import NO_TEXTS
from ddp_eval.packs.cut import CostModel, plan_packs
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.run import resume
from ddp_eval.run.manifest import describe_model, is_same_model, see_model
from ddp_eval.run.resume import journal_key
from ddp_eval.system import digests

PLACE = 300_000  # of the byte that changes: in the middle of a megabyte


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(name) -> a directory with a model's files."""

    def make(name="model"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(2**20))
        return folder

    return make


def change_a_byte(folder, keep_time=False):
    path = folder / "model.safetensors"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[PLACE] ^= 1
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # on older kernels it stands still for up to 10 ms
        path.write_bytes(data)
        if keep_time:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def args(folder):
    return {"pretrained": str(folder)}


def manifest_of(folder):
    return {"model": describe_model(str(folder), args(folder), None)}


@pytest.mark.parametrize("keep_time", [False, True])
def test_one_byte_of_the_weights(keep_time, checkpoint):
    """Catches old numbers shown for weights that were trained on, or zeroed, where nobody takes a sample."""
    folder = checkpoint()
    manifest = manifest_of(folder)
    assert is_same_model(manifest, args(folder))
    change_a_byte(folder, keep_time)
    assert not is_same_model(manifest, args(folder))


def test_same_bytes_elsewhere(checkpoint, tmp_path):
    """Catches a finished run that is refused because its checkpoint was copied, touched or lies on another node's disk."""
    folder = checkpoint()
    manifest = manifest_of(folder)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert see_model(args(copy)) != see_model(args(folder))
    assert is_same_model(manifest, args(copy))
    os.utime(folder / "model.safetensors")
    assert is_same_model(manifest, args(folder))


def test_untouched_files_are_not_read(checkpoint, monkeypatch):
    """Catches a finished run that takes minutes to say that it is finished."""
    folder = checkpoint()
    manifest = manifest_of(folder)
    monkeypatch.setattr(digests, "digest_directory", lambda *names: pytest.fail("the files were read"))
    assert is_same_model(manifest, args(folder))


def test_files_out_of_reach(checkpoint):
    """Catches a finished run that nobody can look at once its model was deleted from the cache."""
    manifest = manifest_of(checkpoint())
    assert is_same_model(manifest, {"pretrained": "some/hub-model-that-is-not-here"})


@pytest.fixture
def key():
    """key(folder) -> the key of a small plan's journals with that model."""
    requests = requests_from_lists([[1, 2, 3], [1, 2, 4]], [1, 1])
    plan = plan_packs(requests, CostModel(forward=1e30, dense=False), 100)[0]
    world = World(0, 0, 1, torch.device("cpu"))
    return lambda folder: journal_key(
        plan, NO_TEXTS, {"class": "HFEngine"}, world, describe_model(str(folder), args(folder), None)
    )


def test_key_of_a_copy(key, checkpoint, tmp_path):
    """Catches a resume refused on another node, whose copy of the weights has other times, and numbers of two models mixed."""
    folder = checkpoint()
    before = key(folder)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert key(tmp_path / "copy") == before
    change_a_byte(folder)
    assert key(folder) != before


@pytest.mark.parametrize(
    ("module", "matters"),
    [
        *(("engines/ops/masks.py", True), ("engines/hf/engine.py", True), ("engines/ops/logprobs.py", True)),
        *(("analysis/report.py", False), ("cli/plan.py", False)),
    ],
)
def test_key_of_other_code(module, matters, key, checkpoint, tmp_path, monkeypatch):
    """Catches packs of two versions of an engine mixed in one run, and hours lost because a report was mended."""
    folder = checkpoint()
    before = key(folder)
    package = tmp_path / "ddp_eval"
    shutil.copytree(Path(ddp_eval.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(ddp_eval, "__file__", str(package / "__init__.py"))
    assert key(folder) == before
    with open(package / module, "a") as file:
        file.write("# mended\n")
    assert (key(folder) != before) is matters


def test_code_that_is_named_exists():
    """Catches a module that was renamed and no longer counts."""
    package = Path(ddp_eval.__file__).parent
    assert all((package / name).exists() for name in resume._CODE)
