"""What `scripts/bench.py --commands` measures and prints, and how commands are run and measured from outside."""

from __future__ import annotations

import argparse
import math
import os
import sys

import bench
import commands
import pytest
import run_command
import sides

from ddp_eval import demo


def arguments(**more):
    options = {
        **{"model": "DIR", "dtype": "float32", "include_path": "TASKS", "batch_sizes": "1,8,16", "repeats": 2, "threads": 1},
        **{"cpu": True, "no_packing": False, "softmax_dtype": None, "gen_kwargs": None},
    }
    return argparse.Namespace(**{**options, **more})


def test_tasks_of_one_command():
    """Catches limits of single tasks that are taken for one of all, and names that are lost."""
    assert sides.read_suite("a+b+c:40") == (["a", "b", "c"], 40.0, 10.0)
    assert sides.read_suite("a") == (["a"], None, 0.25)
    for text in ("a:40+b:100", "a+", "", "a:", "a:0", "a:-1", "a:x"):
        with pytest.raises(ValueError, match="one limit for all tasks of a command, got "):
            sides.read_suite(text)


def test_differences_of_metrics_by_hand():
    """Catches standard errors, which differ by chance, and names of groups among the numbers."""
    theirs = {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "perplexity,none": 8.0}, "g": {" ": " "}}
    ours = {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.2, "perplexity,none": 10.0}, "g": {" ": " "}}
    assert sides.compare_metrics(theirs, ours) == {"a acc,none": 0.0, "a perplexity,none": pytest.approx(0.2)}


def results(accuracy, perplexity, documents=40):
    return {
        "results": {"t": {"acc,none": accuracy, "perplexity,none": perplexity}},
        **{"n-samples": {"t": {"original": 99, "effective": documents}}, "ddp_eval": {"requests": 80}},
    }


def a_run(wall_s, scoring_s, found):
    return {"wall_s": wall_s, "scoring_s": scoring_s, "results": found}


def test_medians_ratios_and_differences_by_hand():
    """Catches the best of several runs for their median, and whole commands at the batch size that only scores best."""
    theirs = {
        "1": [a_run(20.0, 10.0, results(0.5, 8.0)), a_run(22.0, 11.0, results(0.5, 8.0)), a_run(90.0, 12.0, results(0.5, 8.0))],
        "8": [a_run(24.0, 9.0, results(0.25, 8.0))] * 3,
    }
    ours = [a_run(wall_s, 2.0, results(0.5, 10.0)) for wall_s in (5.0, 5.5, 7.0)]
    row = commands.summarize(theirs, ours)
    assert row["lm_eval"] == {"wall_s": 22.0, "scoring_s": 9.0} and row["ours"] == {"wall_s": 5.5, "scoring_s": 2.0}
    assert row["lm_eval_batch_size"] == {"wall_s": 1, "scoring_s": 8} and row["ratio"] == {"wall_s": 4.0, "scoring_s": 4.5}
    assert row["worst_metric"] == "t perplexity,none" and row["max_relative_difference_of_metrics"] == pytest.approx(0.2)
    assert row["accuracies_that_differ"] == [] and (row["documents"], row["requests"]) == (40, 80)
    assert commands.format_row({"suite": "t:40", **row}) == [
        *("t:40", "40", "80", "22.0 (1)", "5.5", "**4.00**", "9.0 (8)", "2.0", "**4.50**", "0.2", "none")
    ]
    differing = commands.summarize({"8": theirs["8"]}, ours)
    assert differing["accuracies_that_differ"] == ["t acc,none"]


def test_batch_sizes_are_tried_on_a_quarter_and_the_best_take_turns(monkeypatch):
    """Catches a side that pays for its first run, sizes that memory is too small for, and runs that do not alternate."""
    asked = []
    seconds = {"1": 4.0, "8": 2.0, "16": 2.2}

    def theirs(flags, args):
        flag = dict(zip(flags[1::2], flags[2::2], strict=True))
        size, limit = flag["--batch_size"], flag.get("--limit")
        asked.append((size, limit))
        if size == "32":
            raise run_command.CommandError(["lm_eval"], 1, "torch.OutOfMemoryError: CUDA out of memory.")
        return a_run(20.0, seconds[size], results(0.5, 8.0))

    def ours(flags, args):
        asked.append(("ours", dict(zip(flags[::2], flags[1::2], strict=True)).get("--limit")))
        return a_run(5.0, 1.0, results(0.5, 8.0))

    monkeypatch.setattr(commands, "run_theirs", theirs)
    monkeypatch.setattr(commands, "run_ours", ours)
    row = commands.measure_suite("a+b:40", arguments(batch_sizes="1,8,16,32"))
    assert asked[:6] == [("ours", "1"), ("1", "1"), ("1", "10"), ("8", "10"), ("16", "10"), ("32", "10")]
    assert asked[6:] == [("8", "40"), ("16", "40"), ("ours", "40")] * 2
    assert row["quarter_scoring_s"][32] == math.inf and row["ratio"] == {"wall_s": 4.0, "scoring_s": 2.0}
    asked.clear()
    commands.measure_suite("a", arguments(batch_sizes="8", repeats=1))
    assert asked == [("ours", "1"), ("8", "1"), ("8", None), ("ours", None)], "one size needs no trial"
    seconds["64"] = 1.0
    monkeypatch.setattr(commands, "try_sizes", lambda score, sizes: dict.fromkeys(sizes, math.inf))
    with pytest.raises(SystemExit, match="a: lm_eval ran out of memory at every one of --batch_sizes 64,128"):
        commands.measure_suite("a", arguments(batch_sizes="64,128"))


def test_an_error_that_is_not_of_memory_ends_the_trial():
    """Catches a typing error in a flag that passes for a batch size without room."""

    def fail(size):
        raise run_command.CommandError(["lm_eval"], 2, "no such task")

    with pytest.raises(run_command.CommandError, match="lm_eval returned 2:\nno such task"):
        commands.try_sizes(fail, [1, 8])


def test_both_commands_have_the_same_tasks_model_and_limit():
    """Catches a flag that only one side gets, so that they do different work."""
    args = arguments(gen_kwargs="max_gen_toks=4")
    ours, theirs = commands.our_flags(["a", "b"], 40.0, args), commands.lm_eval_flags(["a", "b"], 40.0, 8, args)
    common = ["--tasks", "a,b", "--limit", "40", "--include_path", "TASKS", "--gen_kwargs", "max_gen_toks=4"]
    assert ours == ["--model_args", "pretrained=DIR,dtype=float32", *common, "--device", "cpu"]
    model = ["run", "--model", "hf", "--model_args", "pretrained=DIR,dtype=float32"]
    assert theirs == [*model, *common, "--batch_size", "8", "--device", "cpu"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--commands", "--peer", "none"], "--commands compares with lm_eval"),
        (["--commands", "--random_weights"], "--commands compares with lm_eval"),
        (["--gen_kwargs", "max_gen_toks=4"], "--gen_kwargs is for --commands"),
    ],
)
def test_flags_that_do_not_go_together(monkeypatch, capsys, flags, sentence):
    """Catches a flag that is ignored in silence."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--model", "DIR", *flags])
    with pytest.raises(SystemExit):
        bench.read_arguments()
    assert sentence in capsys.readouterr().err


def python(program, **options):
    return run_command.run_command([sys.executable, "-c", program], **{"threads": 1, **options})


def test_a_command_that_fails_says_how():
    """Catches a time that is reported of a command that did nothing."""
    with pytest.raises(run_command.CommandError, match=r"returned 3:\nwhat was wrong") as raised:
        python("import sys; print('what was wrong', file=sys.stderr); sys.exit(3)")
    assert not raised.value.is_out_of_memory
    with pytest.raises(run_command.CommandError) as raised:
        python('raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")')
    assert raised.value.is_out_of_memory


@pytest.mark.skipif(len(run_command.usable_cores()) < 2, reason="needs two cores")
def test_a_command_runs_on_its_cores_and_this_process_on_all_of_its_own():
    """Catches a side that has more cores than the other, and a script that stays on one core itself."""
    before = run_command.usable_cores()
    program = "import os; print(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])"
    assert python(program, threads=3, cores=before[1:2]).stdout == f"[{before[1]}] 3\n"
    assert run_command.usable_cores() == before == eval(python(program).stdout.rpartition(" ")[0])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_peak_memory_is_of_rank_0_and_its_workers_apart(tmp_path):
    """Catches the launcher's memory, or another rank's, for that of rank 0, and a peak that is missed between two readings."""
    worker = "memory = bytearray(50 << 20); import time; time.sleep(1)"
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, subprocess, sys, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    memory = bytearray(300 << 20); del memory\n"
        f"    subprocess.run([sys.executable, '-c', {worker!r}])\n"
        "else:\n"
        "    memory = bytearray(700 << 20); time.sleep(1)\n"
    )
    launcher = f"""
import os, subprocess, sys
ranks = [subprocess.Popen([sys.executable, {str(rank)!r}], env={{**os.environ, "RANK": str(index)}}) for index in (1, 0)]
[one.wait() for one in ranks]
"""
    found = python(launcher, is_launcher=True)
    assert 300 << 20 < found.peak_bytes < 400 << 20
    assert 50 << 20 < found.workers_peak_bytes < 150 << 20
    assert found.wall_s > 1
    assert python("memory = bytearray(300 << 20); import time; time.sleep(0.5)").peak_bytes > 300 << 20


@pytest.mark.slow
def test_both_commands_for_real(tiny_model_path):
    """Catches flags, files and phases that the commands no longer have, and metrics that differ between the two sides."""
    args = arguments(model=str(tiny_model_path("llama")), include_path=demo.TASKS_PATH)
    tasks = ["demo_boolean_expressions", "demo_hellaswag"]
    theirs = commands.run_theirs(commands.lm_eval_flags(tasks, 4, 8, args), args)
    ours = commands.run_ours(commands.our_flags(tasks, 4, args), args)
    row = commands.summarize({"8": [theirs]}, [ours])
    assert (row["documents"], row["requests"]) == (8, 4 * 2 + 4 * 4)
    assert row["metrics"] >= 3 and row["max_relative_difference_of_metrics"] == 0 and row["accuracies_that_differ"] == []
    for run in (theirs, ours):
        assert 0 < run["scoring_s"] < run["wall_s"]
        assert run["peak_bytes"] > 100 * 2**20
