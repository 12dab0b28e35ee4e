"""Fields that came to the files of a run, and files that came to be read: by the rules of all that is read back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ddp_eval.engines.hf import config_check, model_files
from ddp_eval.errors import UserError
from ddp_eval.output import journal, shapes

REQUESTS = {"prompt_cut": {"task": {"requests": 2, "first": [[0, 1], [None, None]]}}}
DOCUMENTS = {"nan_metrics": {"task": {"documents": 1, "first": [0]}}}


@pytest.mark.parametrize(
    ("irregular", "sentence"),
    [
        ({**REQUESTS, **DOCUMENTS}, None),
        ({"of another version": {"task": {}}}, None),
        ([], "ddp_eval.irregular must be an object, got []"),
        ({"prompt_cut": {"task": {"requests": "2", "first": []}}}, 'requests must be a whole number, 0 or more, got "2"'),
        ({"prompt_cut": {"task": {"requests": 2}}}, "ddp_eval.irregular.prompt_cut.task.first must be a list, got null"),
        ({"prompt_cut": {"task": {"requests": 2, "first": [[0]]}}}, "first must hold a document and a choice, got [0]"),
    ],
)
def test_irregular_requests(irregular: Any, sentence: str | None) -> None:
    """Catches a traceback where a complete run is found again, whose notes are said once more."""
    found = shapes.RESULTS({"ddp_eval": {"irregular": irregular}})
    assert found is None if sentence is None else str(found).endswith(sentence)


def test_digests_in_a_manifest() -> None:
    """Catches a traceback over digests of task files, or of a model's code, that are none."""
    assert shapes.MANIFEST({"task_files": {"a.yaml": "0"}, "model": {"code_files": None}}) is None
    assert shapes.MANIFEST({"task_files": {"a.yaml": 3}}) == "task_files.a.yaml must be text, got 3"
    assert shapes.MANIFEST({"model": {"code_files": {"files": []}}}) == "model.code_files.files must be an object, got []"


def test_a_journal_that_is_a_pipe(tmp_path: Path) -> None:
    """Catches a start that waits for a writer, and one that takes what it cannot read for nothing."""
    os.mkfifo(tmp_path / f"1{journal.SUFFIX}")
    assert journal.holds_work(tmp_path)


def test_an_index_that_says_it_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches shards without a digest: the loader takes the last of two equal keys, and reads an index of any size."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.safetensors").write_bytes(b"")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}, "weight_map": {"a": "parts/a.safetensors"}}')
    assert "parts/a.safetensors" in model_files.names_of_model(tmp_path)
    monkeypatch.setattr(model_files, "_MAX_JSON_BYTES", 20)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is too large: more than 20 bytes$"):
        model_files.names_of_model(tmp_path)


def test_a_config_that_is_cut(tmp_path: Path) -> None:
    """Catches transformers' own words, which do not name the file, and a second rule for one file."""
    file = tmp_path / "config.json"
    file.write_text('{"vocab_size": ')
    with pytest.raises(UserError, match=r"config\.json is not JSON: "):
        config_check.check_file(str(file), "name", {})
    file.write_text(json.dumps({"vocab_size": 0}))
    with pytest.raises(UserError, match=r"^the config of name has vocab_size=0"):
        config_check.check_file(str(file), "name", {})
    config_check.check_file(str(file), "name", {"vocab_size": 8})
