"""The files in examples/ and the code in docs/: what needs no cluster runs; of the rest flags and syntax are checked."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documents
import numpy as np
import pytest
import tolerance
import yaml
from launch import launch
from places import ROOT

from ddp_eval.cli.flags import parse_flags
from ddp_eval.config import Config
from ddp_eval.output import tables
from ddp_eval.packs.cut import plan_packs
from ddp_eval.packs.plan import build_pack
from ddp_eval.packs.requests import requests_from_lists

EXAMPLES = ROOT / "examples"
EXEC = ("-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])")
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def own_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tasks in examples/own_task, scored and generated, on two ranks."""
    place = tmp_path_factory.mktemp("own") / "run"
    flags = ("--include_path", EXAMPLES / "own_task", "--tasks", "capitals,capitals_generate", "--log_samples")
    finished = launch(2, *flags, "--output_path", place)
    assert finished.returncode == 0, str(finished)
    return place


@pytest.mark.parametrize("example", ["training_loop.py", "training_loop_fsdp.py"])
def test_training_loop(example: str) -> None:
    """Catches an example that does not run, and ranks that do not come out of `evaluate`."""
    program = (str(EXAMPLES / example),)
    finished = launch(2, "--steps", 4, "--every", 2, "--limit", 4, program=program)
    assert finished.returncode == 0, str(finished)
    assert re.findall(r"step (\d): loss [\d.]+, acc {'demo_boolean_expressions': [\d.]+}", finished.stdout) == ["2", "4"]
    assert finished.stdout.count("done") == 1


def test_task_of_your_own(own_task: Path) -> None:
    """Catches a task file that lm_eval no longer reads, and data that are not found from another directory."""
    results = json.loads((own_task / "results.json").read_text())
    assert results["n-samples"]["capitals"]["effective"] == 8
    assert 0 <= results["results"]["capitals"]["acc,none"] <= 1
    assert "exact_match,none" in results["results"]["capitals_generate"]
    assert len(tables.read_scores(own_task / "scores.parquet")) == 32
    assert (own_task / "texts.parquet").is_file()


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys_of(item)


def test_every_key_is_described(own_task: Path) -> None:
    """Catches a key of results.json, telemetry.json, manifest.json or status.json that no page describes."""
    page = (ROOT / "docs" / "reference" / "run-directory.md").read_text(encoding="utf-8")
    results, manifest, telemetry, status = (
        json.loads((own_task / f"{name}.json").read_text()) for name in ("results", "manifest", "telemetry", "status")
    )
    section = results["ddp_eval"]
    named = set(re.findall(r"[\w-]+", " ".join(re.findall(r"`([^`]+)`", page))))
    own = {*section, *section["engine"], *section["generation"], *section["lm_eval_files"]}
    own |= {*manifest, *manifest["model"], *manifest["model"]["model_files"], *manifest["ranks"], *manifest["seeds"]}
    own |= {*manifest["hardware"], *manifest["tasks"], *keys_of(manifest["tasks"]["n_samples"]), *(manifest["git"] or {})}
    own |= {*telemetry, *telemetry["sample_columns"], *telemetry["peak"], *results, *status, *manifest["config"]}
    for rank in telemetry["ranks"]:
        own |= {*rank, *rank["counts"], *keys_of(list(rank["collectives"].values()))}
    own -= {*manifest["config"], *manifest["tasks"]["n_samples"]}  # flags, which have a page; names of tasks
    assert own - named == set()
    assert set(manifest["config"]) < set(Config.__dataclass_fields__)
    assert set(section) - {"irregular", "phases_s", "lm_eval_files"} <= set(manifest)
    files = {path.name for path in own_task.iterdir()} - {"demo"}
    assert {re.sub(r"^samples_.*\.", "samples_<task>.", name) for name in files} <= set(
        re.findall(r"^\| \[?`([^`]+)`", page, re.M)
    )


def test_nightly_reproduce(own_task: Path) -> None:
    """Catches a script that fails on a run whose bits have not changed, and one that trusts a manifest's code by itself."""
    script = str(EXAMPLES / "nightly_reproduce.sh")
    refused = launch(0, script, own_task, program=EXEC, PATH=PATH)
    assert refused.returncode == 2 and "--trust_task_files allows it" in refused.stderr, str(refused)
    finished = launch(0, script, own_task, "--trust_task_files", program=EXEC, PATH=PATH)
    assert finished.returncode == 0, str(finished)
    assert "expected identical: yes" in finished.stdout


def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a notebook whose cells do not run one behind the other, or that was saved with output."""
    pytest.importorskip("matplotlib")
    notebook = json.loads((EXAMPLES / "compare_two_runs.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)

    def run(command: list[str], **_: Any) -> None:
        assert command[1:3] == ["-m", "ddp_eval"]
        finished = launch(0, *command[3:])
        assert finished.returncode == 0, str(finished)

    monkeypatch.setattr(subprocess, "run", run)
    for name, value in {"RUNS": str(tmp_path / "runs"), "MPLBACKEND": "Agg"}.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert re.search(r"\d+ of 80 requests differ, by up to [\d.e-]+ nats", printed), printed
    assert re.search(r"\d+ of 20 answers flipped", printed), printed
    tolerance.of_demo().assert_close(names["a"], names["b"], names["scores"][0]["num_tokens"])
    reported = json.loads((tmp_path / "runs" / "packs" / "results.json").read_text())["results"]["demo_hellaswag"]
    assert names["of_a"]["demo_hellaswag", "acc"] == pytest.approx(reported["acc,none"])
    assert (tmp_path / "runs" / "differences.png").is_file()


def test_slurm_job(tmp_path: Path) -> None:
    """Catches a job whose flags ddp_eval does not take, or that does not reach slurm/eval.sh."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "eval.sh").write_text('printf "%q " "$@"\n')
    done = subprocess.run(["bash", EXAMPLES / "slurm_job.sh"], cwd=tmp_path, capture_output=True, text=True, check=True)
    config, _ = parse_flags(shlex.split(done.stdout))
    assert config.output_path and config.tasks == ["mmlu", "hellaswag"]
    header = (EXAMPLES / "slurm_job.sh").read_text()
    for line in ("--requeue", "--open-mode=append", "--signal=B:USR1@120"):  # what eval.sh relies on
        assert f"#SBATCH {line}\n" in header and f"#SBATCH {line}\n" in (ROOT / "slurm" / "eval.sh").read_text()


def test_kubernetes_job() -> None:
    """Catches a job whose flags ddp_eval does not take, or that the training operator cannot launch by torchrun."""
    job = yaml.safe_load((EXAMPLES / "kubernetes" / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec, policy = job["spec"], job["spec"]["elasticPolicy"]
    assert set(spec["pytorchReplicaSpecs"]) == {"Worker"}  # with a Master the operator would set RANK and WORLD_SIZE
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == policy["minReplicas"] == policy["maxReplicas"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    ((_, words),) = documents.evaluations_in(shlex.join(container["command"]))
    config, _ = parse_flags(words)
    volumes = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert config.output_path and any(config.output_path.startswith(f"{path}/") for path in volumes)
    assert f"--nproc_per_node={container['resources']['limits']['nvidia.com/gpu']}" in container["command"]


def test_image_recipes() -> None:
    """Catches a recipe that copies a file which is gone, and two recipes that drift apart."""
    docker, apptainer = ((EXAMPLES / "containers" / name).read_text() for name in ("Dockerfile", "ddp_eval.def"))
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", docker, re.MULTILINE) for word in line.split()]
    assert copied == re.findall(r"^ {4}(\S+) /opt/ddp_eval/\S+$", apptainer, re.MULTILINE)
    assert all((ROOT / name).exists() for name in copied)
    for pattern in (r"pip install .*", r"apt-get install .*", r"(?:FROM|From:) (\S+)"):
        (one,), (other,) = re.findall(pattern, docker), re.findall(pattern, apptainer)
        assert one.rstrip(" \\") == other.rstrip()


def test_engine_of_the_docs() -> None:
    """Catches an example engine that lacks a method, or that does not answer every item."""
    page = ROOT / "docs" / "internals" / "adding-an-engine.md"
    (block,) = [block for block in documents.blocks_of(page) if block.language == "python"]
    names: dict[str, Any] = {"__name__": "engine_of_the_docs"}
    exec(block.text, names)
    engine = names["ConstantEngine"]()
    requests = requests_from_lists([[1, 2, 3, 4], [1, 2, 3, 5, 6], [7, 8]], [1, 2, 1])
    plan, item_of_request = plan_packs(requests, engine.cost_model(), engine.max_tokens())
    launched = [engine.launch(build_pack(plan, index)) for index in range(plan.num_packs)]
    assert [one.pack.items for one in launched], "as run/execute.py asks for it"
    results = np.concatenate([engine.collect(one) for one in launched])
    assert np.array_equal(results["item"], np.arange(plan.num_items))
    expected = [-np.log(engine.vocab_size) * count for count in (1, 2, 1)]
    assert results["logprob"][item_of_request] == pytest.approx(expected)
