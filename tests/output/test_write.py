"""The run directory: whole files or none, nobody else's files touched, the same bytes for the same content."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddp_eval.errors import UserError
from ddp_eval.output import tables, versions, write
from ddp_eval.output.tables import Scores, read_scores, write_scores
from ddp_eval.output.write import prepare_directory, write_run
from ddp_eval.system import machine
from ddp_eval.system.digests import digest_directory, digest_strings
from ddp_eval.system.machine import git_commit

SAMPLES = [
    {
        "doc_id": 0,
        "doc": {"question": "Où ?", "answer": np.int64(1)},
        "target": 1,
        "arguments": [("Où ?", " ici"), ("Où ?", " là")],
        "resps": [[(-1.5, True)], [(np.float64(-0.25), np.bool_(False))]],
        "filtered_resps": [(-1.5, True), (-0.25, False)],
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": "d",
        "prompt_hash": "p",
        "target_hash": "t",
        "acc": np.float32(1.0),
        "perplexity": float("nan"),
    },
    {
        "doc_id": 1,
        "doc": {},
        "target": ["a", "b"],
        "arguments": [("text", {"until": ["\n"], "seen": {"x"}})],
        "resps": [["generated"]],
        "filtered_resps": ["generated"],
        "filter": "strict-match",
        "acc": 0,
    },
]


def example_scores() -> Scores:
    is_greedy: list[Any] = [np.bool_(True), False, None]
    return Scores(
        task=["arc", "arc", "wiki"],
        doc_id=[0, 0, 7],
        idx=[0, 1, 0],
        loglikelihood=[-1.25, math.nan, -1e-300],
        is_greedy=is_greedy,
        num_tokens=np.array([3, 4, 900], dtype=np.int64),
    )


def write_example(directory: Path, samples=None) -> None:
    write_scores(directory, example_scores())
    write_run(directory, {"results": {"arc": {"acc,none": np.float64(0.5)}}}, {"seed": [0, 1234]}, samples)


def names_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


@pytest.fixture
def no_room(monkeypatch):
    """A disk that is full when a file is synced, which is when a real one tells."""

    def refuse(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write.os, "fsync", refuse)


def test_prepare_creates_parents_and_leaves_nothing(tmp_path):
    """Would catch a probe file left in the new directory, and a second preparation refused because of the first."""
    for _ in range(2):
        directory = prepare_directory(tmp_path / "a" / "b", overwrite=False)
        assert directory == tmp_path / "a" / "b"
        assert names_in(directory) == []


def test_prepare_returns_an_absolute_path(tmp_path, monkeypatch):
    """Would catch a run written elsewhere because a task changed the working directory meanwhile."""
    monkeypatch.chdir(tmp_path)
    assert prepare_directory("run", overwrite=False) == tmp_path / "run"


def test_prepare_refuses_a_file(tmp_path):
    """Would catch a traceback, or a file replaced by a directory, when --output_path names results.json itself."""
    path = tmp_path / "results.json"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"^--output_path must be a directory, got the file .*results.json: give another path$"):
        prepare_directory(path, overwrite=True)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("place", ["file/run", "/proc", "/proc/run", "nul\0", "n" * 300])
def test_prepare_refuses_what_cannot_be_written(tmp_path, place):
    """Would catch a check by permission bits, which say yes to root for all of these."""
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("needs a /proc file system")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"(?s)^--output_path .* cannot be written to \(.+\): give a directory that can be$"):
        prepare_directory(tmp_path / place, overwrite=False)


@pytest.mark.parametrize("name", ["manifest.json", "results.json", "scores.parquet", "samples_arc.jsonl"])
def test_prepare_refuses_another_run(tmp_path, name):
    """Would catch an earlier run overwritten in silence, also one that a full disk cut short before its manifest."""
    (tmp_path / name).write_text("earlier")
    os.utime(tmp_path / name, (86400 * 365, 86400 * 365))
    with pytest.raises(UserError, match=r"already holds a run of 1970-12-3\d|already holds a run of 1971-01-01") as refused:
        prepare_directory(tmp_path, overwrite=False)
    assert str(refused.value).endswith("; give another --output_path, or --overwrite to replace it")
    assert (tmp_path / name).read_text() == "earlier"


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    """Would catch --overwrite emptying a user's directory, and samples of an old task that survive into the new run."""
    write_example(tmp_path, {"arc": SAMPLES})
    for name in ("telemetry.json", ".scores.parquet.ddp_eval.tmp"):
        (tmp_path / name).write_text("")
    mine = ["notes.txt", "mine.tmp", "samples.jsonl", "other_results.json", "results.json.bak"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / "samples_kept.jsonl").mkdir()
    prepare_directory(tmp_path, overwrite=True)
    assert names_in(tmp_path) == sorted([*mine, "samples_kept.jsonl"])


def test_write_run_leaves_the_files_of_a_run(tmp_path):
    """Would catch temporary files left behind, the samples repeated inside results.json, and numpy values in it as strings."""
    results_dict = {"results": {"arc": {"acc,none": np.float64(0.5), "n": np.int64(3)}}, "samples": {"arc": []}, "ddp_eval": {}}
    write_scores(tmp_path, example_scores())
    write_run(tmp_path, results_dict, {"flags": {"limit": None}}, {"arc": SAMPLES, "a/b": []})
    assert names_in(tmp_path) == ["manifest.json", "results.json", "samples_a__b.jsonl", "samples_arc.jsonl", "scores.parquet"]
    assert json.loads((tmp_path / "results.json").read_text()) == {"results": {"arc": {"acc,none": 0.5, "n": 3}}, "ddp_eval": {}}
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"flags": {"limit": None}}
    assert "samples" in results_dict


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    """Would catch a manifest, the mark of a complete run, beside files that are not there yet."""
    order = []
    replace = os.replace
    monkeypatch.setattr(write.os, "replace", lambda old, new: (order.append(Path(new).name), replace(old, new)))
    write_example(tmp_path, {"arc": SAMPLES})
    assert order == ["scores.parquet", "samples_arc.jsonl", "results.json", "manifest.json"]


def test_writing_twice_gives_the_same_bytes(tmp_path):
    """Would catch a timestamp or hash order in a file, which makes equal runs look different."""
    digests = []
    for name in ("one", "two"):
        write_example(prepare_directory(tmp_path / name, overwrite=False), {"arc": SAMPLES})
        digests.append(digest_directory(tmp_path / name))
    write_example(tmp_path / "two", {"arc": SAMPLES})
    assert digests[0] == digests[1] == digest_directory(tmp_path / "two")


def test_scores_come_back_to_the_bit(tmp_path):
    """Would catch float32 on the way, NaN read as missing, and None of a rolling request read as False."""
    write_example(tmp_path)
    scores = read_scores(tmp_path / "scores.parquet")
    assert scores.task == ["arc", "arc", "wiki"]
    assert scores.is_greedy == [True, False, None]
    assert [list(scores.doc_id), list(scores.idx), list(scores.num_tokens)] == [[0, 0, 7], [0, 1, 0], [3, 4, 900]]
    assert isinstance(scores.loglikelihood, np.ndarray) and scores.loglikelihood.dtype == np.float64
    assert scores.loglikelihood.tobytes() == np.array([-1.25, math.nan, -1e-300]).tobytes()
    assert len(scores) == 3


def test_scores_bytes_depend_on_content_alone(tmp_path):
    """Would catch lists and numpy arrays of the same numbers, or no rows at all, written under another schema."""
    write_example(tmp_path)
    first = (tmp_path / "scores.parquet").read_bytes()
    again = tables._encode_scores(read_scores(tmp_path / "scores.parquet"))
    assert hashlib.sha256(first).hexdigest() == hashlib.sha256(again).hexdigest()
    (tmp_path / "none.parquet").write_bytes(tables._encode_scores(Scores([], [], [], [], [], [])))
    assert len(read_scores(tmp_path / "none.parquet")) == 0


def test_scores_of_unequal_length_are_refused():
    """Would catch rows shifted against each other by a missing value."""
    with pytest.raises(ValueError, match="column idx must have 2 rows as task has, got 1"):
        Scores(task=["a", "a"], doc_id=[0, 1], idx=[0], loglikelihood=[0.0, 0.0], is_greedy=[True, True], num_tokens=[1, 1])


@pytest.mark.usefixtures("no_room")
def test_full_disk_is_one_sentence_and_no_file(tmp_path):
    """Would catch a traceback at the end of a long run, and half a file under a final name."""
    with pytest.raises(UserError) as refused:
        write_example(tmp_path)
    reason = "could not be written (No space left on device): make room, or give another --output_path"
    assert str(refused.value) == f"{tmp_path / 'scores.parquet'} {reason}"
    assert names_in(tmp_path) == []


def test_disk_that_fills_up_midway_keeps_what_is_whole(tmp_path):
    """Would catch a samples file cut in its middle, by writing against a real limit; the scores before it are kept."""
    long_sample = {**SAMPLES[0], "doc": {"text": "x" * 300_000}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"samples_arc\.jsonl could not be written \(File too large\)"):
            write_example(tmp_path, {"arc": [SAMPLES[0], long_sample]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == ["scores.parquet"]


def test_what_json_cannot_write_fails_before_any_file(tmp_path):
    """Would catch results written beside no manifest because of a defect in the manifest."""
    manifest: dict[Any, Any] = {("a", "tuple"): 1}
    with pytest.raises(TypeError):
        write_run(tmp_path, {}, manifest)
    assert names_in(tmp_path) == []


def test_samples_are_the_lines_that_lm_eval_writes(tmp_path):
    """Would catch a field named, nested or written as a number otherwise than by lm_eval's own EvaluationTracker."""
    tracker_module = pytest.importorskip("lm_eval.loggers.evaluation_tracker")
    tracker = tracker_module.EvaluationTracker(output_path=str(tmp_path / "theirs.json"))
    tracker.date_id = "now"
    tracker.save_results_samples("arc", copy.deepcopy(SAMPLES))
    before = repr(SAMPLES)
    write_example(tmp_path, {"arc": SAMPLES})
    assert (tmp_path / "samples_arc.jsonl").read_bytes() == (tmp_path / "samples_arc_now.jsonl").read_bytes()
    assert repr(SAMPLES) == before


def test_values_become_json_as_in_lm_eval():
    """Would catch a metric of a numpy type that reads as a string here and as a number in lm_eval's results."""
    utils = pytest.importorskip("lm_eval.utils")
    for value in (np.bool_(True), np.int32(3), np.float16(0.5), np.float64("nan"), {"one"}, Path("p"), np.arange(2), print):
        ours, theirs = write._plain_value(value), utils.handle_non_serializable(value)
        assert (type(ours), repr(ours)) == (type(theirs), repr(theirs))


def test_half_a_character_in_a_sample_is_written(tmp_path):
    """Would catch a whole samples file lost to one lone surrogate in a data set."""
    write_example(tmp_path, {"arc": [{**SAMPLES[0], "target": "\ud83d"}]})
    assert json.loads((tmp_path / "samples_arc.jsonl").read_bytes())["target"] == "\ud83d"


def test_tasks_that_share_a_file_name_are_refused(tmp_path):
    """Would catch the samples of one task replaced by another's."""
    with pytest.raises(ValueError, match=r"tasks a/b and a:b would both write samples_a__b\.jsonl"):
        write_example(tmp_path, {"a/b": [], "a:b": []})


def test_strings_are_digested_with_their_lengths():
    """Would catch prompts that differ only in where one ends giving the same digest."""
    assert digest_strings(["ab", "c"]) != digest_strings(["a", "bc"])
    assert digest_strings([]) != digest_strings([""])
    assert digest_strings(["é"]) == hashlib.sha256((2).to_bytes(8, "little") + "é".encode()).hexdigest()


def test_a_cached_snapshot_has_the_digest_of_its_copy(tmp_path):
    """Would catch one model with two digests, and gigabytes read again although the cache names them by their SHA-256."""
    contents = {"config.json": b"{}", "model.safetensors": b"weights"}
    plain, blobs, snapshot = tmp_path / "plain", tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "0"
    for directory in (plain, blobs, snapshot):
        directory.mkdir(parents=True)
    for name, content in contents.items():
        (plain / name).write_bytes(content)
        # The hub names large files by SHA-256 and small ones by git's SHA-1.
        blob = hashlib.sha256(content).hexdigest() if name == "model.safetensors" else "a" * 40
        (blobs / blob).write_bytes(content)
        (snapshot / name).symlink_to(blobs / blob)
    blob = blobs / hashlib.sha256(b"weights").hexdigest()
    blob.write_bytes(b"not read")
    os.utime(blob, ns=(0, 0))  # before it was linked: nobody has written to it since
    assert digest_directory(snapshot) == digest_directory(plain)
    assert digest_directory(plain)["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


def test_directory_digest_sees_names_and_passes_over_the_rest(tmp_path):
    """Would catch a renamed weight file unnoticed, and a digest that changes with hidden files or asks for absent ones."""
    (tmp_path / "a").write_text("x")
    only_a = digest_directory(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".hidden").write_text("y")
    (tmp_path / "checkpoint").mkdir()
    assert digest_directory(tmp_path) == only_a == digest_directory(tmp_path, ["a", "absent", "a"])
    (tmp_path / "a").rename(tmp_path / "b")
    assert digest_directory(tmp_path)["sha256"] != only_a["sha256"]


def test_git_commit_of_tracked_files_only(tmp_path, monkeypatch):
    """Would catch an installed copy claiming the commit of the repository around it, and GIT_DIR of a hook being followed."""
    identity = ["-c", "user.name=t", "-c", "user.email=t", "-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null"]
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert git_commit(tmp_path / "absent") is None
    assert git_commit(tmp_path) is None
    git("init", "-q")
    assert git_commit(tmp_path) is None
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD").strip()
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert git_commit(tmp_path / "code") == {"commit": commit, "dirty": False}
    (tmp_path / "code" / "a.py").write_text("2")
    assert git_commit(tmp_path / "code") == {"commit": commit, "dirty": True}
    (tmp_path / "site-packages").mkdir()
    assert git_commit(tmp_path / "site-packages") is None


def test_packages_and_hardware_tell_no_secrets(monkeypatch):
    """Would catch an environment variable in the manifest, and a fact that json can't write."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    packages, hardware = versions.describe_packages(), machine.describe_hardware()
    assert packages["python"] == sys.version.split()[0]
    assert {"torch", "transformers", "numpy"} <= set(packages)
    assert hardware["usable_cpu_cores"] <= hardware["cpu_cores"]
    assert hardware["memory_bytes"] > 2**20
    assert "hf_secret" not in json.dumps([packages, hardware])


@pytest.mark.parametrize("kind", ["Kernel Module  ", "Open Kernel Module for x86_64  "])
def test_driver_version_of_both_kernel_modules(kind):
    """Would catch the 86 of x86_64, or nothing, taken for the version of the open driver."""
    text = f"NVRM version: NVIDIA UNIX {kind}550.54.15  Release Build  Tue Feb 1 00:00:00 UTC 2024\nGCC version: gcc 12.3.0"
    assert machine._driver_version(text) == "550.54.15"


def test_import_is_light():
    """Would catch torch, pyarrow or lm_eval imported with the module, seconds that every rank would pay."""
    code = "import sys, ddp_eval.output.write; print(sorted({'torch', 'pyarrow', 'lm_eval', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_numbers_that_are_none_are_counted():
    """Would catch a NaN or an infinity that vanishes in a mean, and one that is reported under another request."""
    scores, no_texts = example_scores(), tables.Texts([], [], [], [], [], [], [], [])
    assert tables.find_not_finite(scores, no_texts) == {"arc": {"requests": 1, "first": [[0, 1]]}}
    many = Scores(["a"] * 8, [3] * 8, range(8), [math.inf] * 4 + [-math.inf] * 4, [False] * 8, [1] * 8)
    assert tables.find_not_finite(many, no_texts) == {"a": {"requests": 8, "first": [[3, idx] for idx in range(5)]}}
    texts = tables.Texts(["b"] * 2, [4, 5], [0, 1], [0] * 2, ["x"] * 2, [1] * 2, [False] * 2, [False, True])
    assert tables.find_not_finite(scores, texts)["b"] == {"requests": 1, "first": [[5, 1]]}
