"""No cache that is known by less than it holds: what was edited between two evaluations is what the second one scores.

Sources: public reports about lm_eval's request cache, about datasets' cache of `process_docs` and of local files, and about
`Dataset.from_generator`.
"""

from __future__ import annotations

import builtins
import gzip
import io
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers.dynamic_module_utils
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import _factory, _yaml_loader

from ddp_eval.analysis.difference import differences
from ddp_eval.analysis.read import Run
from ddp_eval.api import config_from_options, evaluate
from ddp_eval.engines.hf import checkpoint
from ddp_eval.errors import UserError
from ddp_eval.output import directory
from ddp_eval.system import compile_cache
from ddp_eval.tasks import collector, fingerprints, harness, select
from ddp_eval.tasks.task_sources import reading_anew
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.telemetry.meter import Phases

TASK = """\
task: edited
output_type: loglikelihood
{data}
test_split: test
doc_to_text: '{{{{text}}}} is'
doc_to_target: 'so'
metric_list: [{{metric: acc}}]
"""
LOCAL = "dataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of tasks that is the working directory, and caches of its own."""
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "lm_eval"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    made = tmp_path / "tasks"
    made.mkdir()
    monkeypatch.chdir(made)
    return made


class _Stop(Exception):
    """Carries the prompts out of lm_eval, which would go on to score them."""


@pytest.fixture
def prompts(folder: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """prompts(**options) -> the contexts that an evaluation of the task would score."""
    built: list[Any] = []
    describe = fingerprints.describe_prompts

    def describe_and_keep(instances: Any, tasks: Any) -> Any:
        built[:] = instances
        return describe(instances, tasks)

    def stop(*unused: Any) -> Any:
        raise _Stop

    monkeypatch.setattr(collector, "describe_prompts", describe_and_keep)

    def build(**options: Any) -> list[str]:
        config = config_from_options(["edited"], include_path=str(folder), **options)
        with pytest.raises(_Stop):
            harness.evaluate_tasks(config, Encoder(tiny_tokenizer, 2048, None, None), None, stop, Phases())
        return [instance.args[0] for instance in built]

    return build


def write(path: Path, text: str) -> None:
    """Write the file and leave it the time of its last change, as `cp -p`, a container image or an archive may do."""
    stamp = path.stat().st_mtime_ns if path.exists() else 10**18
    path.write_text(text)
    os.utime(path, ns=(stamp, stamp))


@pytest.mark.parametrize("word", ["true", "refresh", True, {"cache_requests": True}])
def test_prompts_of_an_edited_task(
    folder: Path, prompts: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture, word: Any
) -> None:
    """Catches --cache_requests that scores the prompts of the task as it was, for which lm_eval's cache has the same name."""
    write(folder / "rows.jsonl", '{"text": "sea"}')
    write(folder / "edited.yaml", TASK.format(data=LOCAL))
    assert prompts(cache_requests=word) == ["sea is"]
    assert "--cache_requests is ignored: prompts are built in every run, so that none is of an earlier task file" in caplog.text
    write(folder / "edited.yaml", TASK.format(data=LOCAL).replace("is'", "of'"))
    assert prompts(cache_requests=word) == ["sea of"]
    assert not (tmp_path / "lm_eval").exists()


def test_a_cache_that_lm_eval_has_written(folder: Path, prompts: Callable[..., list[str]], tmp_path: Path) -> None:
    """Catches a pickle that is opened, which runs whatever its writer wanted, and `delete` that leaves it there."""
    from lm_eval.caching import cache

    write(folder / "rows.jsonl", '{"text": "sea"}')
    write(folder / "edited.yaml", TASK.format(data=LOCAL))
    task: Any = select.TaskManager(include_path=str(folder), include_defaults=False).load(["edited"])["tasks"]["edited"]
    task.set_config("num_fewshot", 0)
    task.build_all_requests(cache_requests=True)
    (file,) = (tmp_path / "lm_eval").iterdir()
    assert cache.load_from_cache("requests-edited-0shot-rank0-world_size1-tokenizer", cache=True)
    file.write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")  # a program for pickle
    for word in ("true", "refresh", None):
        assert prompts(cache_requests=word) == ["sea is"]
    assert file.exists() and not (folder / "opened").exists()
    assert prompts(cache_requests="delete") == ["sea is"]
    assert not file.exists() and not (folder / "opened").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "compressed"])
def test_rows_of_an_edited_file(folder: Path, prompts: Callable[..., list[str]], kind: str) -> None:
    """Catches rows from datasets' cache, which knows a file by its path and the time of its last change."""
    data = LOCAL.replace("jsonl", "jsonl.gz") if kind == "compressed" else LOCAL if kind == "file" else "dataset_path: ./rows"
    (folder / "rows").mkdir()
    write(folder / "edited.yaml", TASK.format(data=data))
    for text in ("sea", "sky", "sun"):
        row = json.dumps({"text": text})
        write(folder / "rows.jsonl", row)
        write(folder / "rows" / "test.jsonl", row)
        (folder / "rows.jsonl.gz").write_bytes(gzip.compress(row.encode()))
        os.utime(folder / "rows.jsonl.gz", ns=(10**18, 10**18))
        assert prompts() == [f"{text} is"]


MAPPED = """\
def change(row):
    return {{"text": row["text"] + "{word}"}}
def docs(rows):
    return rows.filter(keep).map(change)
def keep(row):
    return "{word}" != row["text"]
"""


def test_code_that_changes_documents(folder: Path, prompts: Callable[..., list[str]]) -> None:
    """Catches `process_docs` as it was: datasets knows its function by its name alone, Python by time and size."""
    write(folder / "rows.jsonl", '{"text": "sea"}\n{"text": "sky"}')
    write(folder / "edited.yaml", TASK.format(data=LOCAL + "\nprocess_docs: !function code.docs"))
    for word, expected in {"one": ["seaone is", "skyone is"], "two": ["seatwo is", "skytwo is"], "sky": ["seasky is"]}.items():
        write(folder / "code.py", MAPPED.format(word=word))
        assert prompts() == expected


GENERATED = """\
import datasets, pathlib
def rows():
    yield {"text": pathlib.Path("words.txt").read_text()}
def load(**unused):
    return datasets.DatasetDict({"test": datasets.Dataset.from_generator(rows)})
"""


def test_rows_of_a_generator(folder: Path, prompts: Callable[..., list[str]]) -> None:
    """Catches a `custom_dataset` whose generator datasets ran in an earlier evaluation, and never again."""
    write(folder / "code.py", GENERATED)
    write(folder / "edited.yaml", TASK.format(data="custom_dataset: !function code.load"))
    for word in ("sea", "sky"):
        write(folder / "words.txt", word)
        assert prompts() == [f"{word} is"]


def test_a_copy_of_a_task_of_lm_evals(tmp_path: Path) -> None:
    """Catches the code of one task run for another: lm_eval gives all files beneath any lm_eval/tasks the same module name."""
    with reading_anew():
        for folder in ("a", "b"):
            code = tmp_path / folder / "lm_eval" / "tasks" / "copied" / "utils.py"
            code.parent.mkdir(parents=True)
            write(code, f"where = '{folder}'\n")
            module = _yaml_loader._load_module_with_cache(code)
            assert module.where == folder
        assert _yaml_loader._load_module_with_cache(code) is module
        from lm_eval.tasks.hellaswag import utils

        assert utils.__file__ is not None
        own = _yaml_loader._load_module_with_cache(Path(utils.__file__).resolve())
        assert own.__name__ == "lm_eval.tasks.hellaswag.utils" and sys.modules[own.__name__] is own


def test_everything_is_put_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches datasets or lm_eval left changed in a training loop's process, and documents left in the temporary directory."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    places: list[Any] = [
        (_yaml_loader, "_load_module_with_cache"),
        (_factory, "load_yaml"),
        (datasets.data_files, "_get_single_origin_metadata"),
        (datasets.Dataset, "_get_cache_file_path"),
        (datasets.io.generator, "GeneratorDatasetInputStream"),
        (ConfigurableTask, "download"),
    ]
    before = [getattr(*place) for place in places]
    write(folder / "rows.jsonl", '{"text": "sea"}')
    with pytest.raises(ZeroDivisionError), reading_anew():
        rows = datasets.load_dataset("json", data_files="rows.jsonl", split="train")
        mapped = rows.map(lambda row: {"text": row["text"].upper()})
        assert [getattr(*place) for place in places] != before and list((tmp_path / "temporary").iterdir())
        raise ZeroDivisionError
    assert [getattr(*place) for place in places] == before
    assert not list((tmp_path / "temporary").iterdir()) and mapped["text"][:] == ["SEA"]


OPENING = """\
import datasets, json, pathlib
def load(**unused):
    rows = [json.loads(pathlib.Path("rows.json").read_text()), json.load(open("more.json"))]
    open("made.txt", "w").close()
    open({cached!r}).close()
    return datasets.DatasetDict({{"test": datasets.Dataset.from_list(rows)}})
"""


def test_files_that_a_custom_dataset_opens(folder: Path, tmp_path: Path) -> None:
    """Catches rows that a task's own code reads and that do not count as the task's files, and caches that do."""
    cached = tmp_path / "datasets" / "info.json"
    cached.parent.mkdir()
    for path in (folder / "rows.json", folder / "more.json", cached):
        write(path, '{"text": "sea"}')
    write(folder / "code.py", OPENING.format(cached=str(cached)))
    write(folder / "edited.yaml", TASK.format(data="custom_dataset: !function code.load"))
    before = builtins.open, io.open
    with reading_anew() as sources:
        select.TaskManager(include_path=str(folder), include_defaults=False).load(["edited"])
        assert (builtins.open, io.open) == before
    assert sorted(map(os.path.basename, sources.files)) == ["code.py", "edited.yaml", "more.json", "rows.json"]


def test_a_complete_run_of_an_edited_task(
    folder: Path, tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches the scores of the task as it was, taken for this very run's; and files that may change refused."""
    output = str(tmp_path / "run")
    write(folder / "_base", TASK.format(data=LOCAL + "\nprocess_docs: !function code.docs"))
    write(folder / "edited.yaml", "include: _base\n")
    write(folder / "rows.jsonl", '{"text": "sea"}')
    write(folder / "code.py", MAPPED.format(word="one"))
    options = {"include_path": str(folder), "log_samples": True, "bootstrap_iters": 0, "output_path": output}
    evaluate(tiny_model("llama"), tiny_tokenizer, ["edited"], **options)
    caplog.clear()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert sorted(map(os.path.basename, manifest["task_files"])) == ["_base", "code.py", "edited.yaml", "rows.jsonl"]
    config = config_from_options(["edited"], **options)

    def find() -> Any:
        return directory.find_finished(config, lambda manifest: True)

    assert find() is not None
    os.utime(folder / "code.py")
    (folder / "other.yaml").write_text("task: other\n")
    assert find() is not None and not caplog.text
    for name in ("_base", "code.py", "rows.jsonl"):
        text = (folder / name).read_text()
        write(folder / name, text + "\n")
        with pytest.raises(UserError, match=rf"already holds a run of .* \(the task file {folder}/{name} has changed since\)"):
            find()
        write(folder / name, text)
    (folder / "rows.jsonl").unlink()  # a download of a task's own, say
    assert find() is not None
    manifest["packages"]["torch"] = "1.0"
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.WARNING):
        assert find() is not None
    assert f"the run in {output} was made with torch 1.0 (now " in caplog.text


def test_task_files_in_a_comparison(tmp_path: Path) -> None:
    """Catches a line for every task file of two checkouts, and no word on one that was edited between two runs."""

    def run(**digests: str) -> Run:
        files = {f"/tasks/{name}.yaml": digest for name, digest in digests.items()}
        return Run(tmp_path, "ddp_eval", manifest={"task_files": files})

    (found,) = differences(run(a="1", b="2", mine="3"), run(a="1", b="4", yours="3"))
    assert found == {"group": "prompts", "key": "task_files./tasks/b.yaml", "a": "2", "b": "4"}


def test_code_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a transformers whose copies of a checkpoint's code do not go by its content, or mix up folders of one name."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = "from transformers import PretrainedConfig\nfrom .words import word\n"
    code += "class AConfig(PretrainedConfig):\n    model_type = 'a'\n    said = word\n"
    for place, word in (("x", "one"), ("x", "two"), ("y", "six"), ("x", "two")):
        folder = tmp_path / place / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "config.json", json.dumps({"model_type": "a", "auto_map": {"AutoConfig": "configuration_a.AConfig"}}))
        write(folder / "configuration_a.py", code)
        write(folder / "words.py", f"word = '{word}'\n")
        found: Any = checkpoint.load_config({"pretrained": str(folder), "trust_remote_code": True})
        assert found.said == word


@pytest.mark.parametrize("theirs", ["another user's", "writable by all", "a link"])
def test_compiled_kernels_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str) -> None:
    """Catches kernels unpickled from the shared temporary directory, where anybody can put them under this user's name first."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("USER", "me")
    monkeypatch.setenv("LOGNAME", "me")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compile_cache.keep_private()
    own = tmp_path / "torchinductor_me"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ and own.stat().st_mode & 0o777 == 0o700
    compile_cache.keep_private()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ, "as torch made it"
    if theirs == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    elif theirs == "writable by all":
        own.chmod(0o777)
    else:
        own.rename(tmp_path / "elsewhere")
        own.symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    compile_cache.keep_private()
    chosen = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert chosen.parent == tmp_path and chosen != own and chosen.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/named/by/the/user")
    compile_cache.keep_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/named/by/the/user"
