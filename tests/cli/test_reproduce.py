"""What `reproduce` refuses, and what it takes from a manifest."""

from __future__ import annotations

import dataclasses
import decimal
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ddp_eval.cli.reproduce import list_changes, parse
from ddp_eval.config import Config
from ddp_eval.errors import UserError

MANIFEST: dict[str, Any] = {
    "config": dataclasses.asdict(Config(model_args={"pretrained": "demo"}, tasks=["t"], output_path="run", limit=3.0)),
    "model": {"pretrained": "demo", "model_files": {"files": {"a": "1", "b": "2"}}, "tokenizer_files": {"files": {"a": "1"}}},
    "tasks": {"versions": {"t": 1, "group": 1}},
    "packages": {"torch": "2", "numpy": "1"},
    "prompts_by_task": {"t": "x"},
    "documents_by_task": {"t": "d"},
    "working_directory": "/nowhere",
}
SAME: dict[str, Any] = {
    **{name: MANIFEST[name] for name in ("model", "packages", "prompts_by_task", "documents_by_task")},
    "versions": {"t": 1},
}


def test_the_same_is_let_through():
    """Catches a reproduction refused for nothing: groups have versions, and no prompts."""
    assert list_changes(MANIFEST, SAME) == []


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"model": {**SAME["model"], "model_files": {"files": {"a": "1", "b": "3"}}}}, ("model", "the model has other files: b")),
        (
            {"model": {**SAME["model"], "tokenizer_files": {"files": {}}}},
            ("model", "the files of the tokenizer could not be read now"),
        ),
        ({"versions": {"t": 2}}, ("versions", "task t has version 2, not 1")),
        ({"prompts_by_task": {"t": "y"}}, ("prompts", "the prompts of task t are other ones")),
        ({"prompts_by_task": {"t": "x", "u": "z"}}, ("prompts", "the prompts of task u are other ones")),
        (
            {"documents_by_task": {"t": "e"}},
            ("documents", "task t has the same prompts, but other documents or right answers"),
        ),
        ({"prompts_by_task": {"t": "y"}, "documents_by_task": {"t": "e"}}, ("prompts", "the prompts of task t are other ones")),
        ({"packages": {"torch": "3", "numpy": "1"}}, ("packages", "torch is 3, not 2")),
        ({"packages": {"torch": "2"}}, ("packages", "numpy is missing, not 1")),
    ],
)
def test_every_change_has_a_name(change, wanted):
    """Catches a change that goes through, or is refused without saying what it is."""
    assert list_changes(MANIFEST, {**SAME, **change}) == [wanted]


def describe(documents, targets="{{answer}}"):
    """What the manifest says of a task of these documents, two requests each, that all ask the same."""
    from lm_eval.api.instance import Instance

    from ddp_eval.tasks.fingerprints import describe_prompts

    pairs = [(doc_id, doc, idx) for doc_id, doc in enumerate(documents) for idx in range(2)]
    instances = [Instance("loglikelihood", doc, ("ask", str(idx)), idx, ("t", doc_id, 1)) for doc_id, doc, idx in pairs]
    return describe_prompts(instances, {"t": SimpleNamespace(config=SimpleNamespace(doc_to_target=targets))})


def test_documents_have_a_digest_of_their_own():
    """Catches right answers that count for nothing, and digests that differ between processes though nothing changed."""
    first, other = describe([{"answer": 0}, {"answer": 1}]), describe([{"answer": 1}, {"answer": 1}])
    assert first["prompts_by_task"] == other["prompts_by_task"]
    assert first["documents_by_task"] != other["documents_by_task"]
    assert first["documents_by_task"] != describe([{"answer": 0}, {"answer": 1}], "{{other}}")["documents_by_task"]
    golds = [[{"answer": kind(gold)}] for kind in (np.int64, np.float32, decimal.Decimal) for gold in (0, 1)]
    for zero, one in zip(golds[::2], golds[1::2], strict=True):
        assert describe(zero)["documents_by_task"] != describe(one)["documents_by_task"]
    ring: list[Any] = []
    ring.append(ring)
    for odd in (object, set, lambda: ring, lambda: lambda: None):  # the last stands where a task has code for its targets
        assert describe([{"a": odd()}], odd())["documents_by_task"] == describe([{"a": odd()}], odd())["documents_by_task"]


def test_an_older_manifest_is_not_refused():
    """Catches runs of an earlier version that can no longer be reproduced, since they tell nothing of their documents."""
    older = {name: value for name, value in MANIFEST.items() if name != "documents_by_task"}
    assert list_changes(older, SAME) == []


@pytest.fixture
def run(tmp_path):
    def write(**change) -> Path:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "manifest.json").write_text(json.dumps({**MANIFEST, **change}))
        return tmp_path / "run"

    return write


def test_the_config_comes_back(run):
    """Catches tuples that JSON made lists, and a run written over its own original."""
    order = parse([str(run()), "--allow", "packages"])
    assert order.config == dataclasses.replace(
        Config(**{**MANIFEST["config"], "seed": tuple(MANIFEST["config"]["seed"])}), output_path=f"{run()}.again"
    )
    assert order.inspect is not None
    order.inspect({**SAME, "packages": {}})
    with pytest.raises(UserError, match=r"the prompts of task t are other ones \(--allow prompts runs it all the same\)"):
        order.inspect({**SAME, "packages": {}, "prompts_by_task": {"t": "y"}})


def test_other_ranks_may_need_another_layout(run):
    """Catches a run in layers over many ranks that a machine of one could not repeat."""
    directory = run(config={**MANIFEST["config"], "layout": "layers:4"})
    assert parse([str(directory)]).config.layout == "layers:4"
    assert parse([str(directory), "--layout", "replicas"]).config.layout == "replicas"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"class": "Llama"}}, "was given a loaded model by a program"),
        ({"config": {**MANIFEST["config"], "warp": 1}}, "has the setting warp, which this version of ddp_eval does not know"),
    ],
)
def test_what_cannot_be_run_again(run, change, sentence):
    """Catches a traceback for a manifest that is whole and yet of no use here."""
    with pytest.raises(UserError, match=sentence):
        parse([str(run(**change))])


@pytest.mark.parametrize(
    ("change", "flag", "sentence"),
    [
        ({"trust_remote_code": True}, "--trust_remote_code", "runs Python code of its model or data set"),
        ({"model_args": {"pretrained": "x", "trust_remote_code": True}}, "--trust_remote_code", "runs Python code of its model"),
        ({"model_args": {"pretrained": "x", "attn_implementation": "who/kernel"}}, "--trust_remote_code", "runs Python code"),
        (
            {"metadata": {"tokenizer": "who/repo"}},
            "--trust_remote_code",
            r'load another tokenizer .*\(metadata tokenizer "who/repo"\)',
        ),
        (
            {"metadata": {"max_seq_lengths": [4096], "model": "who/repo"}},
            "--trust_remote_code",
            "load another tokenizer than the",
        ),
        ({"confirm_run_unsafe_code": True}, "--confirm_run_unsafe_code", "runs code that a model writes"),
        ({"include_path": "tasks"}, "--trust_task_files", r"runs the Python code \(evil.py\) of task files in .*/tasks"),
        (
            {"tasks": ["t", "tasks/one.yaml"]},
            "--trust_task_files",
            r"runs the Python code \(evil.py\) of task files in .*one.yaml",
        ),
        ({"tasks": ["t", "tasks"]}, "--trust_task_files", r"runs the Python code \(evil.py\) of task files in .*/tasks"),
    ],
)
def test_no_code_runs_on_a_manifests_word(run, tmp_path, monkeypatch, change, flag, sentence):
    """Catches a stranger's manifest that has code run here without a flag on this command line."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "evil.py").touch()
    (tmp_path / "tasks" / "one.yaml").touch()
    monkeypatch.chdir(tmp_path)
    directory = run(config={**MANIFEST["config"], **change}, working_directory=str(tmp_path))
    with pytest.raises(UserError, match=sentence + f".*: {flag} allows it"):
        parse([str(directory)])
    assert parse([str(directory), flag]).config.output_path
    gone = run(config={**MANIFEST["config"], **change}, working_directory="/nowhere")  # relative paths start from here
    with pytest.raises(UserError, match=sentence + f".*: {flag} allows it"):
        parse([str(gone)])


def test_tasks_may_load_the_models_own_tokenizer(run):
    """Catches runs of RULER that are refused for naming the model's tokenizer a second time."""
    config = {**MANIFEST["config"], "metadata": {"tokenizer": "demo", "max_seq_lengths": [4096]}}
    assert parse([str(run(config=config))]).config.metadata == config["metadata"]


def test_a_directory_without_task_files_may_have_a_tasks_name(run, tmp_path, monkeypatch):
    """Catches a run that is refused over a directory of results, named after its task, beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").mkdir()
    assert parse([str(run(working_directory=str(tmp_path)))]).config.tasks == ["t"]


def test_a_complete_run_is_no_reproduction(run, tmp_path):
    """Catches a second reproduction that finds the first one complete, runs nothing, and calls that identical."""
    directory, other = run(), tmp_path / "run.again"
    other.mkdir()
    (other / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"run\.again already holds a complete run: --overwrite runs it again"):
        parse([str(directory)])
    assert parse([str(directory), "--overwrite"]).config.overwrite
    (other / "manifest.json").unlink()
    assert not parse([str(directory)]).config.overwrite


def test_what_a_run_was_to_do_with_what_it_found_is_not_repeated(run):
    """Catches a run once started with --fresh that, reproduced into another run's directory, deletes it."""
    config = {**MANIFEST["config"], "fresh": True, "preflight": True, "cache_requests": "true"}
    found = parse([str(run(config=config))]).config
    assert (found.fresh, found.preflight, found.cache_requests) == (False, False, None)


def test_no_run_no_reproduction(tmp_path):
    """Catches a traceback for a directory without a manifest, and for a run that would be replaced by its copy."""
    with pytest.raises(UserError, match="holds no complete run"):
        parse([str(tmp_path)])
