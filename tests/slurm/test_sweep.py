"""`slurm/sweep.sh` on a real SLURM: an array over models x task sets, one element killed, then the report."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from jobs import QUICK, edit, packs_done
from launch import launch
from places import ROOT

from ddp_eval import demo
from ddp_eval.output import status, tables

pytestmark = pytest.mark.slurm

SLOW = QUICK.with_name("slow_main.py")
FLAGS = "--limit 12 --max_pack_tokens 1 --device cpu"
LIST = f"""\
# two models that differ in nothing but their place
model  one     --model_args 'pretrained=demo'
model  two     --model_args "pretrained={{place}}/two models"
tasks  lambada --tasks demo_lambada {FLAGS}
tasks  logic   --tasks demo_boolean_expressions --num_fewshot 1 {FLAGS}
"""


@pytest.fixture
def sweep(cluster, tmp_path):
    """sweep(*options) -> the array's and the report's job numbers. The scripts run slow_main.py."""
    for name in ("eval.sh", "sweep.sh"):
        shutil.copy(ROOT / "slurm" / name, tmp_path / name)
    edit(ROOT / "slurm" / "eval.sh", tmp_path / "eval.sh", PYTHON=sys.executable, PROGRAM=SLOW)
    (tmp_path / "list.txt").write_text(LIST.format(place=tmp_path))
    shutil.copytree(demo.MODEL_PATH, tmp_path / "two models")
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1", "SLOW_PACK_S": "2.5"}

    def submit(*options):
        command = [tmp_path / "sweep.sh", tmp_path / "list.txt", tmp_path / "out", *options]
        finished = subprocess.run(command, env={**cluster.environment, **variables}, capture_output=True, text=True, timeout=60)
        assert finished.returncode == 0, finished.stderr
        printed = re.fullmatch(r"array (\d+): 2 models x 2 task sets, in .*\nreport (\d+) follows\n", finished.stdout)
        assert printed is not None, finished.stdout
        array, report = printed.groups()
        return array, report

    yield submit
    cluster.clear()


def words(place):
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted(place.rglob("*.out")))


def kill_a_rank(cluster, element):
    number = cluster.run("squeue", "-h", "-r", "-j", element, "-o", "%A")
    processes = cluster.processes(number)
    ranks = [
        pid for pid, (command, environment) in processes.items() if environment.get("RANK") == "1" and "slow_main.py" in command
    ]
    assert ranks, processes.keys()
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_array(cluster, sweep, tmp_path):
    """Catches pairs that are mixed up, an element that is lost when a process dies, and a report that comes too early."""
    array, report = sweep("--at-once=2", "--nodes=1", "--ntasks-per-node=2")
    out = tmp_path / "out"
    cluster.wait(lambda: packs_done(out / "one" / "logic") >= 2, "element 1 to be at work", 200)
    states = cluster.run("squeue", "-h", "-r", "-j", array, "-o", "%K %T").split("\n")
    assert sum("RUNNING" in state for state in states) <= 2, states
    kill_a_rank(cluster, f"{array}_1")
    cluster.wait(lambda: packs_done(out / "two" / "logic") >= 2, "element 3 to be at work", 400)
    kill_a_rank(cluster, f"{array}_3")  # the last one, whose own id is that of the array
    cluster.wait(lambda: cluster.state(report) in ("COMPLETED", "FAILED"), "the report", 600)
    for model in ("one", "two"):
        for tasks in ("lambada", "logic"):
            assert status.read_status(out / model / tasks).get("state") == status.DONE, words(out)
    starts = {element: (out / "logs" / f"{array}_{element}.out").read_text().count(" start on ") for element in range(4)}
    assert starts == {0: 1, 1: 2, 2: 1, 3: 2}, words(out)
    for element in (1, 3):
        said = (out / "logs" / f"{array}_{element}.out").read_text()
        assert f"job {array}_{element}: a rank or a launcher has died" in said, words(out)
    for tasks in ("lambada", "logic"):
        assert f"one {tasks}: done" in words(out)
        if importlib.util.find_spec("ddp_eval.cli.compare"):
            assert f"{out}/two/{tasks}" in (out / f"compare.{tasks}.txt").read_text(), words(out)
    plain = launch(
        1, "--model_args", "pretrained=demo", "--tasks", "demo_boolean_expressions", "--num_fewshot", 1, *FLAGS.split(),
        "--output_path", tmp_path / "plain", program=(str(QUICK),),
    )  # fmt: skip
    assert plain.returncode == 0, str(plain)
    for model in ("one", "two"):
        assert (out / model / "logic" / tables.SCORES).read_bytes() == (tmp_path / "plain" / tables.SCORES).read_bytes()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("model a --x\n", 'must have a line "model NAME FLAGS" and a line "tasks NAME FLAGS"'),
        ("model a\nmodel a\ntasks t\n", "there are two lines model a"),
        (
            "model a/b\ntasks t\n",
            'the name after model must be letters, digits, . _ -, and begin with neither . nor -, got "a/b"',
        ),
        ("model --model_args pretrained=demo\ntasks t\n", 'and begin with neither . nor -, got "--model_args"'),
        ("model ..\ntasks t\n", 'and begin with neither . nor -, got ".."'),
        ("model logs\ntasks t\n", "a model cannot be named logs"),
        ("model a --x\r\ntasks t --tasks demo\r\n", "has Windows line ends: take them out, as by sed -i 's/\\r$//' "),
        ("modle a\n", 'a line must begin with model, models or tasks, got "modle"'),
        ("model a\nmodels a --models x\ntasks t\n", "there are two lines model a"),
    ],
)
def test_bad_list(text, why, tmp_path):
    """Catches an array of the wrong size submitted from a list that says something else. Needs no cluster."""
    (tmp_path / "list.txt").write_bytes(text.encode())
    command = [ROOT / "slurm" / "sweep.sh", tmp_path / "list.txt", tmp_path / "out"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert finished.returncode == 2
    assert why in finished.stderr, finished.stderr
    assert not (tmp_path / "out").exists()


def test_sweep_through_sbatch(tmp_path):
    """Catches an array of elements that all fail: SLURM runs a copy, which eval.sh is not beside. Needs no cluster."""
    script = shutil.copy(ROOT / "slurm" / "sweep.sh", tmp_path / "slurm_script")
    (tmp_path / "list.txt").write_text("model a\ntasks t\n")
    finished = subprocess.run([script, tmp_path / "list.txt", tmp_path / "out"], capture_output=True, text=True, timeout=20)
    assert finished.returncode == 2 and not (tmp_path / "out").exists()
    assert finished.stderr == "sweep.sh: eval.sh is not beside sweep.sh: run slurm/sweep.sh itself, not through sbatch\n"
