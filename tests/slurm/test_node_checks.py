"""Node checks on a real SLURM: a bad node is named before any work."""

import re
import shutil

import pytest
from jobs import RUN, logs

from ddp_eval import demo
from ddp_eval.output import status

pytestmark = pytest.mark.slurm


def told(run):
    """The sentences of the ranks on all nodes, progress left out."""
    return [line for line in logs(run).splitlines() if line.startswith("ddp_eval: ")]


def test_node_with_another_version(cluster, evaluate, tmp_path):
    """Catches numbers mixed from two versions of a package, and a bad node that is not named, or only after loading."""
    for place in (cluster.local, cluster.local_n2):
        (place / "site").mkdir(exist_ok=True)
    other = cluster.local_n2 / "site" / "numpy-0.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.9\n")
    job = evaluate("--nodes=2", *RUN, "--output_path", tmp_path / "run", python_path=cluster.local / "site")
    state = cluster.finish(job)
    shutil.rmtree(other)
    assert state == "FAILED", job.words()
    (sentence,) = told(tmp_path / "run")
    # Of two nodes neither is the odd one: the sentence begins with either.
    assert re.search(r"the node checks failed: node n\d has numpy \S+ where node n\d has ", sentence)
    assert "numpy 0.9 where" in sentence or "n2 has 0.9" in sentence
    assert f"failed, not requeued: {sentence.removeprefix('ddp_eval: ')}" in job.words()
    assert "starts again" not in job.words()
    assert sentence == f"ddp_eval: {status.read_status(tmp_path / 'run')['reason']}"


def test_node_without_the_model(cluster, evaluate, tmp_path):
    """Catches a node that finds its missing disk when the others have loaded, and a path of its own that only one node has."""
    model = cluster.local / "model"
    shutil.copytree(demo.MODEL_PATH, model)
    flags = ("--model_args", f"pretrained={model}", "--tasks", "demo_lambada", "--output_path", tmp_path / "run")
    job = evaluate("--nodes=2", *flags)
    state = cluster.finish(job)
    shutil.rmtree(model)
    assert state == "FAILED", job.words()
    assert told(tmp_path / "run") == [f"ddp_eval: the node checks failed: node n2: the model directory {model} does not exist"]


def test_good_nodes(cluster, evaluate, tmp_path):
    """Catches --preflight that runs the evaluation, says nothing of what it saw, or fails where nothing is wrong."""
    job = evaluate("--nodes=2", *RUN, "--preflight", "--output_path", tmp_path / "run")
    assert cluster.finish(job) == "COMPLETED", job.words() + logs(tmp_path / "run")
    assert "node n1: rank 0, 1 x CPU" in job.words() or "node n2: rank 0, 1 x CPU" in job.words()
    assert "ddp_eval: the node checks passed; all-reduce over 2 ranks by gloo" in job.words()
    assert job.words().endswith("node checks passed; nothing was evaluated\n")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"]
