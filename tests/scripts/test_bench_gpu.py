"""The parts of scripts/bench_gpu.sh: what they run, what keeps them from running, and their report. None of them computes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import bench_gpu
import gpu_check
import pytest

CHECKED = {"missing": [], "tests_missing": [], "problem": "", "free_bytes": 140e9, "compiler": "gcc"}
CHECKED |= {"hardware": {}, "packages": {"torch": "2"}}


def arguments(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *flags])
    return bench_gpu.read_arguments()


def make_parts(monkeypatch, tmp_path, *flags, **checked):
    return {part.name: part for part in bench_gpu.make_parts(arguments(monkeypatch, *flags), tmp_path, CHECKED | checked)}


@pytest.mark.parametrize("flags", [["--rehearse"], []])
def test_the_parts_name_what_is_there(monkeypatch, tmp_path, flags):
    """Catches scripts, tests and tasks that have moved and flags that a script does not take: the card would find them first."""
    args = arguments(monkeypatch, *flags)
    parts = make_parts(monkeypatch, tmp_path, *flags, "--vllm_python", sys.executable)
    words = [word for part in parts.values() for argument in part.argv for word in argument.split()]
    assert all(Path(word).exists() for word in words if word.endswith(".py"))
    assert (bench_gpu.REPOSITORY / "tests" / "gpu").is_dir() and args.generation_path.is_dir() and args.include_path.is_dir()
    assert sum(part.needs_s for part in parts.values()) < args.budget_s
    for name in ("speed_1b", "speed_8b", "generation_1b", "vllm"):
        argv = json.loads(parts[name].argv[-1])[1] if name == "vllm" else list(parts[name].argv)
        monkeypatch.setattr(sys, "argv", argv[1:])
        taken = importlib.import_module(Path(argv[1]).stem).read_arguments()
        assert Path(taken.out) == parts[name].record and taken.cpu == bool(flags)
    assert "lm_eval vllm" in taken.peers.split(";") and taken.model == str(tmp_path / "weights")


def test_parts_that_cannot_run_are_skipped_with_the_reason(monkeypatch, tmp_path):
    """Catches 8 B parameters on a card that has no room for them, and minutes spent on what is not installed."""
    parts = make_parts(
        monkeypatch, tmp_path, "--vllm_python", "/nowhere/python", free_bytes=30e9, tests_missing=["hypothesis (x)"]
    )
    missing = {name: part.missing for name, part in parts.items() if part.missing}
    assert missing == {
        "tests": "hypothesis (x)",
        "speed_8b": "30 GB free on the device, it takes 60",
        "vllm": "python of --vllm_python does not have vllm and lm_eval",
    }
    monkeypatch.setattr(bench_gpu.importlib.util, "find_spec", lambda name: None)
    assert make_parts(monkeypatch, tmp_path, "--rehearse")["vllm"].missing == "vLLM is not installed"


def test_only_takes_the_parts_that_it_names_and_those_before_them(monkeypatch, tmp_path, capsys):
    """Catches a misspelt part that is left out without a word, and one without the models that it reads."""
    parts = list(make_parts(monkeypatch, tmp_path, "--rehearse").values())
    assert [part.name for part in bench_gpu.choose(parts, "probe_1b,tests")] == ["tests", "models", "probe_1b"]
    assert bench_gpu.choose(parts, None) == parts
    with pytest.raises(SystemExit) as refused:
        bench_gpu.choose(parts, "probe")
    assert refused.value.code == 2 and "--only takes tests,models,speed_1b," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (CHECKED | {"missing": ["lm_eval (No module named 'lm_eval')"]}, "cannot import lm_eval (No module named 'lm_eval')"),
        (
            CHECKED | {"problem": "torch 2 sees no CUDA device"},
            "torch 2 sees no CUDA device; --rehearse runs the parts on the CPU",
        ),
        (None, "gpu_check.py failed: it fell over"),
    ],
)
def test_nothing_starts_where_no_part_could_run(monkeypatch, capsys, answer, reason):
    """Catches minutes of a card spent on parts that fail one after another, and tests that are done since all are skipped."""
    args = arguments(monkeypatch)
    printed = f"a library's line\n{json.dumps(answer)}\n" if answer else ""
    ran = types.SimpleNamespace(stdout=printed, stderr="it fell over")
    monkeypatch.setattr(subprocess, "run", lambda *rest, **more: ran)
    with pytest.raises(SystemExit) as refused:
        bench_gpu.check(args)
    assert refused.value.code == 2 and reason in capsys.readouterr().err


def test_imports_are_tried():
    """Catches a package that is there but does not load."""
    assert gpu_check.try_imports(["json"]) == []
    assert gpu_check.try_imports(["json", "no_such_module_here"]) == [
        "no_such_module_here (No module named 'no_such_module_here')"
    ]


def test_tasks_of_ones_own_need_their_generation_tasks(monkeypatch, capsys):
    """Catches generation over the tests' tasks beside tasks of another directory."""
    with pytest.raises(SystemExit):
        arguments(monkeypatch, "--include_path", "tasks")
    assert "--include_path needs --tasks and --generation_tasks" in capsys.readouterr().err


@pytest.mark.parametrize("rehearse", [False, True])
def test_what_counts_as_failed(rehearse):
    """Catches a rehearsal that passes although a part never came to its end, or never began."""
    parts = [bench_gpu.Part("vllm", [], 1, 1, missing="not installed"), bench_gpu.Part("speed", [], 1, 1)]

    def passes(name, state, why=""):
        return bench_gpu.is_as_expected({"part": name, "state": state, "why": why}, parts, rehearse)

    assert passes("vllm", "skipped", "not installed") and passes("speed", "done")
    assert not passes("speed", "failed", "exit code 1") and not passes("speed", "interrupted", "by a signal")
    assert passes("speed", "ended", "after its 9 s") == passes("speed", "skipped", "1 s left, it needs 9") == (not rehearse)


def test_the_report_says_what_each_part_came_to():
    """Catches reasons that are lost, a part's own table that is not in the report, and why one that was cut short ended."""
    parts = [
        {"part": "tests", "state": "done", "why": "", "seconds": 12.0, "last": ["3 passed"]},
        {
            "part": "speed",
            "state": "ended",
            "why": "after its 9 s",
            "seconds": 9.0,
            "last": ["slow"],
            "md": "| a row |",
            "json": {},
        },
        {"part": "vllm", "state": "skipped", "why": "vLLM is not installed"},
    ]
    report = {"date": "d", "commit": "c", "command": "x", "checked": CHECKED, "parts": parts}
    text = bench_gpu.format_report(report)
    assert "| vllm | skipped (vLLM is not installed) |" in text and "| speed | ended in 9 s (after its 9 s) |" in text
    assert "3 passed" in text and "| a row |" in text and "slow" in text
