"""The promise: the same scores, bit for bit, on any number of ranks."""

import json
import re
import shlex

import pytest
from launch import launch

from ddp_eval.output import tables, write

# Of torchrun; compared with 0, plain Python. `test_the_command` runs on two ranks too.
RANKS = [1, pytest.param(2, marks=pytest.mark.slow), 3, 4]

DEMO = "--model_args pretrained=demo "
RUNS = {
    # every kind of task; demo_hellaswag draws its examples at random, demo_wikitext has rolling windows
    "all": DEMO + "--tasks demo --limit 3 --max_pack_tokens 1024",
    "rows": DEMO + "--tasks demo_hellaswag demo_wikitext demo_lambada --limit 2 --no_packing",
    "one pack": DEMO + "--tasks demo_boolean_expressions --limit 1",
    "one request": DEMO + "--tasks demo_lambada --limit 1",
}


def read(directory, name):
    return json.loads((directory / name).read_text())


def results_but_times(directory):
    kept = read(directory, write.RESULTS)
    del kept["date"], kept["ddp_eval"]["phases_s"], kept["total_evaluation_time_seconds"]
    del kept["ddp_eval"]["lm_eval_files"]["date"]
    kept.pop("pretty_env_info", None)  # many_runs.py leaves it out; it holds the CPU's present clock rate
    return kept


def manifest_but_ranks(directory):
    kept = read(directory, write.MANIFEST)
    del kept["config"]["output_path"], kept["ranks"]["world_size"]
    return kept


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("ranks", RANKS)
def test_scores_do_not_depend_on_ranks(ranks, run, run_on):
    """Catches prompts drawn by rank, packs cut by rank, a request lost or counted twice, and results put into the wrong slot."""
    one, many = run_on(0)[run], run_on(ranks)[run]
    assert (many / tables.SCORES).read_bytes() == (one / tables.SCORES).read_bytes()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("ranks", RANKS)
def test_results_do_not_depend_on_ranks(ranks, run, run_on):
    """Catches metrics summed in the order of ranks, and what changes from run to run without anything having changed."""
    one, many = run_on(0)[run], run_on(ranks)[run]
    assert results_but_times(many) == results_but_times(one)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("ranks", RANKS)
def test_manifest_tells_only_the_ranks_apart(ranks, run, run_on):
    """Catches a plan cut by the number of ranks, and a manifest that cannot tell two runs apart or finds them different."""
    one, many = run_on(0)[run], run_on(ranks)[run]
    assert read(many, write.MANIFEST)["ranks"]["world_size"] == ranks
    assert read(one, write.MANIFEST)["ranks"]["world_size"] == 1
    assert manifest_but_ranks(many) == manifest_but_ranks(one)


def test_the_runs_are_what_they_are_called(run_on):
    """Catches this file comparing runs that have become alike: no random few-shot, no rolling, no rows, many packs."""
    manifests = {run: read(directory, write.MANIFEST) for run, directory in run_on(0).items()}
    assert manifests["all"]["batching"] == "packs"
    assert manifests["all"]["packs"] > 4, "every rank has some"
    assert manifests["all"]["packs"] % 3 or manifests["all"]["packs"] % 4, "some packs run twice"
    assert manifests["rows"]["batching"] == "rows"
    assert manifests["one pack"]["packs"] == 1 < manifests["one pack"]["requests"]
    assert manifests["one request"]["requests"] == 1
    scores = tables.read_scores(run_on(0)["all"] / tables.SCORES)
    assert None in scores.is_greedy, "rolling requests are neither greedy nor not"
    assert {"demo_hellaswag", "demo_mmlu_philosophy", "demo_lambada", "demo_boolean_expressions"} <= set(scores.task)


def test_the_command(run_on, tmp_path):
    """Catches a command that does not do what its parts do, prints its table once for every rank, or warns without need."""
    finished = launch(2, *shlex.split(RUNS["all"]), "--output_path", tmp_path / "run", cold=True)
    assert finished.returncode == 0, str(finished)
    one, many = run_on(0)["all"], tmp_path / "run"
    assert (many / tables.SCORES).read_bytes() == (one / tables.SCORES).read_bytes()
    assert manifest_but_ranks(many) == manifest_but_ranks(one)
    assert results_but_times(many)["results"] == results_but_times(one)["results"]
    assert len(re.findall(r"demo_hellaswag ", finished.stdout)) == 1, str(finished)
    assert finished.stdout.count(f"ddp_eval: the run is in {tmp_path / 'run'}") == 1, str(finished)
    lines = [line.strip() for line in finished.stderr.split("\n") if line.strip()]
    assert not [line for line in lines if "Warning" in line], str(finished)
    assert len(set(lines)) == len(lines), f"a line that comes twice\n{finished}"
    *_, progress = [line for line in lines if line.startswith("ddp_eval: ") and "tokens/s" in line]
    num_requests = read(tmp_path / "run", write.MANIFEST)["requests"]
    assert f"{num_requests} of {num_requests} requests" in progress, str(finished)


def test_help_is_printed_once():
    """Catches every rank printing the help text."""
    finished = launch(2, "--help", cold=True)
    assert finished.returncode == 0, str(finished)
    assert finished.stdout.count("--model_args") == 1, str(finished)
