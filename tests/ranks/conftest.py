"""Runs that several tests compare: each number of ranks is started once."""

import json
import shlex

import pytest
from launch import launch
from places import PROGRAMS

MANY_RUNS = (str(PROGRAMS / "many_runs.py"),)


@pytest.fixture(scope="module")
def run_on(request, tmp_path_factory):
    """run_on(ranks) -> {run: its directory}, of the flags in the test module's RUNS."""
    finished = {}

    def run(ranks):
        if ranks not in finished:
            place = tmp_path_factory.mktemp(f"ranks{ranks}_")
            directories = {name: place / name.replace(" ", "_") for name in request.module.RUNS}
            lines = [[*shlex.split(request.module.RUNS[name]), "--output_path", str(path)] for name, path in directories.items()]
            (place / "lines.json").write_text(json.dumps(lines))
            outcome = launch(ranks, place / "lines.json", program=MANY_RUNS, timeout_s=280)
            assert outcome.returncode == 0, str(outcome)
            finished[ranks] = directories
        return finished[ranks]

    return run
