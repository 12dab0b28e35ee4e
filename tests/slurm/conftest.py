"""One SLURM for all tests of the session, and eval.sh as a site would edit it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Job, running_cluster
from jobs import QUICK, edit
from places import ROOT


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running SLURM with the idle nodes n1 and n2."""
    with running_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def evaluate(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """evaluate(sbatch options, *flags, program=…, python_path=…, name=value) -> the job of eval.sh, submitted in tmp_path.

    The script's EDIT lines name this interpreter and `program`; python_path comes first on its path, further names are
    variables of the job. A job that a test leaves
    behind is cancelled.
    """

    def submit(options: str, *flags: object, program: Path = QUICK, python_path: Path = ROOT, **more: str) -> Job:
        script = edit(ROOT / "slurm" / "eval.sh", tmp_path / "eval.sh", PYTHON=sys.executable, PROGRAM=program)
        path = os.pathsep.join([str(python_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **more}
        return cluster.submit(script, *flags, options=options.split(), variables=variables, cwd=tmp_path)

    yield submit
    cluster.clear()
