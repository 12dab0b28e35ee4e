"""What tools that read lm_eval's output find in a run directory. Source: a public report about a tool of this kind, whose results
stood under names of its own, so that scripts made for lm_eval's output found nothing."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
import lm_eval.utils
import pytest
import tolerance
import torch
from places import GENERATION_TASKS, ROOT

from ddp_eval import demo
from ddp_eval.analysis.difference import compare_runs
from ddp_eval.analysis.read import read_run
from ddp_eval.cli import flags as cli
from ddp_eval.distributed.world import World
from ddp_eval.errors import UserError
from ddp_eval.output import directory, lm_eval_names
from ddp_eval.output import write as results
from ddp_eval.run.runner import run

GENERATION = str(GENERATION_TASKS)
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"

# What is not as lm_eval writes it: patterns of places in results_<date>.json and in the samples. The table of
# docs/reference/lm-eval.md has the same rows.
ONLY_OURS = {r"/ddp_eval": "`ddp_eval`"}
ONLY_THEIRS = {r"/config/model_args/logits_cache|/configs/[^/]+/metadata/logits_cache": "`model_args`"}
OTHER_VALUES = {
    r"/date|/total_evaluation_time_seconds": "`date`, `total_evaluation_time_seconds`",
    r"/pretty_env_info": "`pretty_env_info`",
    r"/config/batch_sizes(\[\d+\])?": "`config.batch_sizes`",
    r"/configs/.*doc_to_target": "functions of a task",
    r"/samples/[^/]+\[\d+\]/doc_id": "`doc_id`",
}


@pytest.fixture(autouse=True)
def tasks_of_the_tests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides know the tests' tasks alone; nobody needs a launcher's variables of whoever runs the tests."""
    from ddp_eval.tasks import select

    made = lm_eval.tasks.TaskManager

    def few(include_path: Any = None, **options: Any) -> Any:
        paths = [include_path] if isinstance(include_path, str) else list(include_path or [])
        return made(
            include_path=[demo.TASKS_PATH, *(path for path in paths if path != demo.TASKS_PATH)],
            **{**options, "include_defaults": False},
        )

    monkeypatch.setattr(select, "TaskManager", few)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)


@pytest.fixture
def model(tiny_model_path: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A relative name with a slash in it, as of the hub: it is the folder's name."""
    (tmp_path / "org").mkdir()
    place = tmp_path / "org" / "tiny"
    place.symlink_to(tiny_model_path("llama"))
    monkeypatch.chdir(tmp_path)
    return "org/tiny"


def by_us(*flags: str) -> dict[str, Any]:
    config, _ = cli.parse([*flags, "--device", "cpu"])
    found = run(config, World(0, 0, 1, torch.device("cpu")))
    assert found is not None
    return found


def by_lm_eval(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """`lm-eval run`, as its console script calls it."""
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.setattr(sys, "argv", ["lm-eval", "run", *flags, "--device", "cpu"])
    cli_evaluate()


def read_tree(place: Path) -> dict[str, Any]:
    """results_<date>.json, with the samples by task, of the one model below `place`; every file has the same date."""
    (folder,) = [entry for entry in place.iterdir() if entry.is_dir()]
    (file,) = folder.glob("results_*.json")
    date = file.name.removeprefix("results_").removesuffix(".json")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d{6}", date) and folder.name == "org__tiny"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    samples = {}
    for path in sorted(folder.iterdir()):
        if path != file:
            task = path.name.removeprefix("samples_").removesuffix(f"_{date}.jsonl")
            samples[task] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return found | {"samples": samples}


def differences(theirs: Any, ours: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(what, place) of two trees: "only theirs", "only ours", "type", "length", "value". Numbers are equal within rounding."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in dict.fromkeys((*theirs, *ours)):
            if key not in ours or key not in theirs:
                yield ("only ours" if key in ours else "only theirs", f"{place}/{key}")
            else:
                yield from differences(theirs[key], ours[key], f"{place}/{key}")
    elif isinstance(theirs, list) and isinstance(ours, list):
        if len(theirs) != len(ours):
            yield "length", place
        for index, (one, other) in enumerate(zip(theirs, ours, strict=False)):
            yield from differences(one, other, f"{place}[{index}]")
    elif type(theirs) is not type(ours):
        yield "type", place
    elif theirs != ours and not is_rounding(theirs, ours):
        yield "value", place


def is_rounding(theirs: Any, ours: Any) -> bool:
    """Of a log-probability or a metric, also where it is text, as in samples.

    A word has ten tokens or fewer, so a perplexity of words moves by no more of itself than they do; a token costs a nat or more,
    so no sum does either.
    """
    rounding = tolerance.of_kind("llama")
    try:
        numbers = float(theirs), float(ours)
    except (TypeError, ValueError):
        return False
    return "." in str(theirs) and math.isclose(*numbers, rel_tol=rounding.nats(10) - rounding.nats(0), abs_tol=rounding.nats(10))


LAMBADA = ["--tasks", "demo_lambada,demo_wikitext", "--limit", "2", "--model_args"]
KINDS = {
    "scores, a group and texts": ["--tasks", "demo_mmlu,gen_boolean", "--limit", "2", "-s", "--gen_kwargs", "max_gen_toks=4"],
    "no samples": [*LAMBADA, "pretrained=org/tiny,logits_cache=False,dtype=float32", "--seed", "1,None,3,4", "--batch_size", "2"],
    "predictions": [*LAMBADA, "pretrained=org/tiny", "--predict_only", "--trust_remote_code", "--num_fewshot", "0"],
    "chat": [
        "--tasks",
        "gen_boolean",
        "--limit",
        "2",
        "-s",
        "--apply_chat_template",
        "--system_instruction",
        "Be good.",
        "-b",
        "1",
    ],
    "documents out of order": ["--tasks", "demo_hellaswag", "--samples", '{"demo_hellaswag": [5, 2]}', "-s"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_write_the_same_trees(kind: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a key that lm_eval's readers look for and do not find, and a value of another type: null for a text, say."""
    if kind == "chat":
        place = tmp_path / "chat"
        place.mkdir()
        for file in (tmp_path / model).resolve().iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        settings = json.loads((place / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
        (tmp_path / model).unlink()
        place.rename(tmp_path / model)
    given = KINDS[kind] if "--model_args" in KINDS[kind] else [*KINDS[kind], "--model_args", f"pretrained={model}"]
    flags = [*given, "--include_path", GENERATION]
    by_lm_eval(monkeypatch, *flags, "--output_path", "theirs")
    by_us(*flags, "--output_path", "ours")
    theirs, ours = read_tree(tmp_path / "theirs"), read_tree(tmp_path / "ours")
    expected = {"only ours": ONLY_OURS, "only theirs": ONLY_THEIRS, "value": OTHER_VALUES, "length": {}, "type": {}}
    found = list(differences(theirs, ours))
    wrong = [(what, place) for what, place in found if not any(re.fullmatch(pattern, place) for pattern in expected[what])]
    assert wrong == []
    assert ("only ours", "/ddp_eval") in found and bool(ours["samples"]) == (kind != "no samples")
    assert bool(theirs["task_hashes"]) == (kind != "no samples")
    numbered = [place for what, place in found if place.endswith("/doc_id")]
    assert len(numbered) == (2 if kind == "documents out of order" else 0)  # lm_eval's fault, ours are right
    if numbered:
        assert [one["doc_id"] for one in ours["samples"]["demo_hellaswag"]] == [2, 5]


def test_docs_name_every_difference() -> None:
    """Catches a difference from lm_eval's files that the tests know and users are not told of."""
    text = (ROOT / "docs" / "reference" / "lm-eval.md").read_text(encoding="utf-8")
    table = text[text.index("| in lm_eval's files |") :]
    table = table[: table.index("\n\n")]
    for name in (*ONLY_OURS.values(), *ONLY_THEIRS.values(), *OTHER_VALUES.values()):
        assert f"\n| {name} |" in table, name


def zeno_frames(place: Path) -> dict[str, tuple[list[Any], ...]]:
    """As lm_eval's scripts/zeno_visualize.py reads a directory of models: {task: (labels, outputs, each metric's column)}."""
    found = {}
    for folder in [Path(entry) for entry in os.scandir(place) if entry.is_dir()]:
        files = [file.as_posix() for file in folder.iterdir() if file.is_file()]
        summary = json.loads(Path(lm_eval.utils.get_latest_filename(lm_eval.utils.get_results_filenames(files))).read_text())
        sample_files = lm_eval.utils.get_sample_results_filenames(files)
        assert re.sub(r"[\"<>:/|\\?*\[\]]+", "__", json.dumps(summary["config"]["model_args"]))
        for task, config in summary["configs"].items():
            latest = lm_eval.utils.get_latest_filename([Path(name).name for name in sample_files if task in name])
            assert lm_eval.utils.get_file_task_name(latest) == task
            data = [json.loads(line.strip()) for line in (folder / latest).read_text(encoding="utf-8").splitlines()]
            outputs = [", ".join(str(answer[0]) for answer in one["filtered_resps"]) for one in data]
            metrics = [[one[metric["metric"]] for one in data] for metric in config["metric_list"]]
            assert all(one["arguments"]["gen_args_0"]["arg_0"] for one in data)
            found[task] = ([one["target"] for one in data], outputs, *metrics)
    return found


def test_lm_evals_own_readers(model: str, tmp_path: Path) -> None:
    """Catches files that lm_eval's scripts and its hub logger's card do not find, do not group by task, or cannot load."""
    datasets = pytest.importorskip("datasets")
    given = ["--tasks", "demo_mmlu,gen_boolean", "--include_path", GENERATION, "--limit", "2", "-s"]
    returned = by_us(*given, "--model_args", f"pretrained={model}", "-o", "runs")
    frames = zeno_frames(tmp_path / "runs")
    assert set(frames) == set(returned["configs"]) and all(len(labels) == 2 for labels, *_ in frames.values())
    (file,) = (tmp_path / "runs" / "org__tiny").glob("results_*.json")
    summary = json.loads(file.read_text())
    for column in ("results", "groups"):
        assert lm_eval.utils.make_table(summary, column) == lm_eval.utils.make_table(returned, column)
    date = lm_eval.utils.get_file_datetime(file.name).replace(".json", "")
    for task in frames:
        loaded = datasets.load_dataset(
            "json", data_files=str(file.with_name(f"samples_{task}_{date}.jsonl")), split="train", cache_dir=str(tmp_path / "c")
        )
        assert len(loaded) == 2 and set(loaded.column_names) >= {"doc_id", "arguments", "filtered_resps", "doc_hash"}


def listing(place: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(place)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


RUN = ["--tasks", "demo_lambada", "--limit", "1", "--bootstrap_iters", "0", "-s", "--model_args"]


def test_one_set_for_a_run(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second set of files when a finished run is shown again, resumed, or replaced, and one that outlives its run."""
    place = tmp_path / "run"
    flags = [*RUN, f"pretrained={model}", "-o", "run"]

    def stop(*_: Any) -> dict[str, Any]:
        raise UserError("stopped between results.json and the manifest")

    monkeypatch.setattr("ddp_eval.telemetry.summary.summarize", stop)
    with pytest.raises(UserError, match="stopped between"):
        by_us(*flags)
    first = set(listing(place / "org__tiny"))
    assert len(first) == 2 and not (place / "manifest.json").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    by_us(*flags)
    second = listing(place)
    names = [name for name in second if name.startswith("org__tiny/")]
    assert len(names) == 2 and not first & {name.partition("/")[2] for name in names}
    assert (place / names[0]).samefile(place / "results.json") and (place / names[1]).samefile(
        place / "samples_demo_lambada.jsonl"
    )
    by_us(*flags)
    assert listing(place) == second
    # lm_eval's own output in the same folder stays
    theirs = place / "org__tiny" / "results_2026-01-01T00-00-00.000001.json"
    theirs.write_text("{}")
    (tmp_path / "other").symlink_to((tmp_path / model).resolve())
    by_us(*RUN, "pretrained=other", "-o", "run", "--overwrite")
    assert [file.name for file in (place / "org__tiny").iterdir()] == [theirs.name]
    assert len(list((place / "other").iterdir())) == 2
    by_us(*RUN, f"pretrained={model}", "-o", "run", "--overwrite")
    assert not (place / "other").exists() and len(list((place / "org__tiny").iterdir())) == 3


def test_the_folder_is_no_run_of_its_own(model: str, tmp_path: Path) -> None:
    """Catches a comparison with the other names that takes them for lm_eval's run, and lm_eval's beside them taken for ours."""
    by_us(*RUN, f"pretrained={model}", "-o", "run")
    found = compare_runs(read_run("run"), read_run("run/org__tiny"))
    assert found["identical"] and found["differences"] == [] and found["b"]["kind"] == "ddp_eval"
    (theirs,) = (tmp_path / "run" / "org__tiny").glob("samples_*")
    sample = json.loads(theirs.read_text())
    sample["resps"] = [[["-1.5", "False"]]]
    theirs.with_name("samples_demo_lambada_2026-01-01T00-00-00.000001.jsonl").write_text(json.dumps(sample) + "\n")
    beside = read_run("run/org__tiny")
    assert beside.kind == "lm_eval" and beside.requests["demo_lambada"].loglikelihood.tolist() == [-1.5]
    assert compare_runs(read_run("run"), read_run("run"))["identical"]
    # and none of lm_eval's that lie in the run directory itself stand for the run's own samples
    dated = tmp_path / "run" / "samples_demo_lambada_2026-01-01T00-00-00.000001.jsonl"
    dated.write_text(json.dumps(sample) + "\n")
    assert read_run("run").samples["demo_lambada"].name == "samples_demo_lambada.jsonl"


@pytest.mark.parametrize("refusal", [PermissionError(1, "Operation not permitted"), OSError(95, "Operation not supported")])
def test_copies_where_there_are_no_hard_links(refusal: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file system without hard links that ends a run or leaves it without lm_eval's names."""

    def refuse(*_: Any) -> None:
        raise refusal

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path, "org__tiny")
    (file,) = (tmp_path / "org__tiny").glob("results_*")
    assert file.read_bytes() == (tmp_path / "results.json").read_bytes() and not file.samefile(tmp_path / "results.json")
    results.prepare_directory(tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def write(place: Path, model: str) -> dict[str, str]:
    """A run directory as the runner writes one. Returns the names that it chose."""
    names = lm_eval_names.choose_names({"model_name_sanitized": model})
    summary = {"results": {}, "ddp_eval": {lm_eval_names.SECTION: names}}
    results.write_run(place, summary, {"config": {}}, {"arc": []})
    return names


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("org__tiny", "org__tiny"),
        (".__tiny", ".__tiny"),  # pretrained=./tiny
        ("..", "__.."),
        (".", "__."),
        ("journal", "__journal"),
        ("Manifest.json", "__Manifest.json"),
        ("ü" * 300, "ü" * 100),
    ],
)
def test_names_of_models(model: str, folder: str, tmp_path: Path) -> None:
    """Catches files outside of the run directory, in the journal's or instead of a file of the run, and names no disk takes."""
    place = tmp_path / "run"
    place.mkdir()
    assert write(place, model)["folder"] == folder
    assert len(list((place / folder).iterdir())) == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    results.prepare_directory(place, overwrite=True)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "names", [{"folder": "../outside"}, {"folder": "link"}, {"date": ".*"}, {"folder": None}, "text", {"folder": ".."}]
)
def test_names_from_somebody_else(names: Any, tmp_path: Path) -> None:
    """Catches --overwrite that removes files outside of the directory because a results.json from elsewhere says so."""
    place, outside = tmp_path / "run", tmp_path / "outside"
    place.mkdir()
    outside.mkdir()
    kept = outside / "results_2026-01-01T00-00-00.000001.json"
    kept.write_text("mine")
    (place / "link").symlink_to(outside)
    given = {"folder": "x", "date": "2026-01-01T00-00-00.000001", **names} if isinstance(names, dict) else names
    (place / "results.json").write_text(json.dumps({"ddp_eval": {lm_eval_names.SECTION: given}}))
    results.prepare_directory(place, overwrite=True)
    assert kept.read_text() == "mine" and not (place / "results.json").exists()


@pytest.mark.parametrize("obstacle", ["file", "link"])
def test_a_folder_that_cannot_be(obstacle: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches hours of work that end in an error because somebody's file has the model's name; or files that follow a link."""
    place, outside = tmp_path / "run", tmp_path / "outside"
    place.mkdir()
    outside.mkdir()
    (place / "org__tiny").write_text("mine") if obstacle == "file" else (place / "org__tiny").symlink_to(outside)
    with caplog.at_level(logging.WARNING, "ddp_eval"):
        write(place, "org__tiny")
    assert (place / "manifest.json").is_file() and list(outside.iterdir()) == []
    assert "the files of the run are not under lm_eval's names" in caplog.text


def test_another_model_in_the_same_directory(model: str, tmp_path: Path) -> None:
    """Catches a refusal that leaves users of lm_eval, which keeps several models in one directory, without what to do."""
    by_us(*RUN, f"pretrained={model}", "-o", "run")
    (tmp_path / "other").symlink_to((tmp_path / model).resolve())
    for more in ([], ["--limit", "2"]):
        with pytest.raises(UserError, match=r"; give each model an --output_path of its own, such as run-other, or --overwrite"):
            by_us(*RUN, "pretrained=other", "-o", "run", *more)
    with pytest.raises(UserError, match=r"; give another --output_path, or --overwrite"):
        by_us(*RUN, f"pretrained={model}", "-o", "run", "--num_fewshot", "1")
    assert directory.find_finished(cli.parse([*RUN, f"pretrained={model}", "-o", "run", "--device", "cpu"])[0], lambda _: True)
