"""`sbatch slurm/eval.sh` on a real SLURM: the same bits as torchrun, on one node and on two."""

import os
import re
import shlex
import sys

import pytest
from jobs import QUICK, RUN, edit, logs
from launch import launch
from places import ROOT

from ddp_eval.output import tables, write

pytestmark = pytest.mark.slurm

# What a site's prologue or srun may leave behind, and what a rank must not take for its own.
LEFTOVERS = {"WORLD_SIZE": "7", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere", "TORCHELASTIC_RUN_ID": "old"}


@pytest.fixture(scope="module")
def plain_scores(tmp_path_factory, cluster):
    """scores.parquet of the same run under plain torchrun."""
    place = tmp_path_factory.mktemp("plain") / "run"
    finished = launch(2, *RUN, "--output_path", place, program=(str(QUICK),))
    assert finished.returncode == 0, str(finished)
    return (place / tables.SCORES).read_bytes()


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ("--nodes=1 --ntasks-per-node=2", 2),
        # of this shape is also every job in test_interruptions.py
        pytest.param("--nodes=2 --ntasks-per-node=1", 2, marks=pytest.mark.slow),
        ("--nodes=2 --gpus-per-node=2", 4),
    ],
)
def test_same_bits_as_torchrun(options, ranks, plain_scores, cluster, evaluate, tmp_path):
    """Catches ranks that don't find each other, that take the node for the whole world, and a script that fails in silence."""
    job = evaluate(options, *RUN, "--output_path", tmp_path / "run", **LEFTOVERS)
    assert cluster.finish(job) == "COMPLETED", job.words() + logs(tmp_path / "run")
    assert (tmp_path / "run" / tables.SCORES).read_bytes() == plain_scores
    assert f'"world_size": {ranks}' in (tmp_path / "run" / write.MANIFEST).read_text()
    first, *_, last = [line for line in job.words().splitlines() if f"ddp_eval: job {job.number}: " in line]
    assert "start on n" in first, job.words()
    assert last.endswith(f"done: {tmp_path}/run"), job.words()
    nodes = {path.name.split(".")[-2] for path in (tmp_path / "run" / "logs").glob("*.log")}
    assert nodes == ({"n1", "n2"} if "--nodes=2" in options else {"n1"})


def test_no_run_directory(cluster, evaluate, tmp_path):
    """Catches a job that runs for hours with nowhere to write."""
    job = evaluate("--nodes=1", *RUN)
    assert cluster.finish(job) == "FAILED"
    assert "--output_path DIR is missing" in job.words()
    assert cluster.facts(job)["ExitCode"] == "2:0"


@pytest.mark.slow
def test_job_of_the_examples(plain_scores, cluster, tmp_path):
    """Catches a job script of one's own that does not reach eval.sh, or hides its signals and flags from it."""
    (tmp_path / "slurm").mkdir()
    edit(ROOT / "slurm" / "eval.sh", tmp_path / "slurm" / "eval.sh", PYTHON=sys.executable, PROGRAM=QUICK)
    flags = shlex.join([*RUN, "--output_path", str(tmp_path / "run")])
    text = (ROOT / "examples" / "slurm_job.sh").read_text()
    text, count = re.subn(r"^flags=\(.*?^\)", f"flags=({flags})", text, flags=re.MULTILINE | re.DOTALL)
    assert count == 1
    (tmp_path / "job.sh").write_text(text)
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "HF_HUB_OFFLINE": "1"}
    options = ["--nodes=2", "--gpus-per-node=2", "--time=10"]
    job = cluster.submit(tmp_path / "job.sh", options=options, variables=variables, cwd=tmp_path)
    assert cluster.finish(job) == "COMPLETED", job.words() + logs(tmp_path / "run")
    assert (tmp_path / "run" / tables.SCORES).read_bytes() == plain_scores
