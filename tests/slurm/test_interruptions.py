"""Jobs that are pre-empted, requeued, cancelled, out of time, or lose a process or a node: they resume, to the same bits.

Each test comes in the middle of a run, when some packs are in the journals and others are not.
"""

import os
import signal

import pytest
from jobs import QUICK, logs, packs_done
from launch import launch

from ddp_eval.output import status, tables

pytestmark = pytest.mark.slurm

SLOW = QUICK.with_name("slow_main.py")
# One request in each pack: 24 packs, 12 for each of two ranks.
RUN = ["--model_args", "pretrained=demo", "--tasks", "demo_lambada", "--limit", "24", "--max_pack_tokens", "1", "--device", "cpu"]
TWO_NODES = "--nodes=2 --ntasks-per-node=1"


@pytest.fixture(scope="module")
def plain_scores(tmp_path_factory, cluster):
    """scores.parquet of the same run, undisturbed, under plain torchrun."""
    place = tmp_path_factory.mktemp("plain") / "run"
    finished = launch(2, *RUN, "--output_path", place, program=(str(SLOW),))
    assert finished.returncode == 0, str(finished)
    return (place / tables.SCORES).read_bytes()


@pytest.fixture
def slow_job(cluster, evaluate, tmp_path):
    """slow_job(sbatch options, pack_s) -> a job with two packs done. Ten on each rank, of pack_s seconds, are left at least."""

    def start(options=TWO_NODES, pack_s=2.5):
        job = evaluate(options, *RUN, "--output_path", tmp_path / "run", program=SLOW, SLOW_PACK_S=str(pack_s))
        cluster.wait(lambda: packs_done(tmp_path / "run") >= 2 or job_ended(cluster, job), "packs to be done", 120)
        assert not job_ended(cluster, job), job.words() + logs(tmp_path / "run")
        return job

    return start


def job_ended(cluster, job):
    return cluster.state(job) not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING")


@pytest.fixture
def check_done(cluster, plain_scores, tmp_path):
    """check_done(job, restarts=…, said=…): it has ended well, after so many requeues, with these words, in the same bits."""

    def check(job, restarts, said):
        assert cluster.finish(job) == "COMPLETED", job.words() + logs(tmp_path / "run")
        assert (tmp_path / "run" / tables.SCORES).read_bytes() == plain_scores
        assert status.read_status(tmp_path / "run")["state"] == status.DONE
        assert cluster.facts(job)["Restarts"] == str(restarts), job.words()
        for words in said:
            assert words in job.words(), job.words() + logs(tmp_path / "run")
        assert "resuming: " in logs(tmp_path / "run")
        assert job.words().count("done: ") == 1, job.words()

    return check


def kill(cluster, job, which):
    """SIGKILL for the first process of the job whose command line and environment `which` accepts; its environment."""
    for pid, (command, environment) in sorted(cluster.processes(job).items()):
        if which(command, environment):
            os.kill(pid, signal.SIGKILL)
            return environment
    raise AssertionError([command for command, _ in cluster.processes(job).values()])


def is_rank(number):
    return lambda command, environment: environment.get("RANK") == str(number) and "slow_main.py" in command


def is_torchrun(node):
    return lambda command, environment: (
        environment.get("SLURMD_NODENAME") == node
        and "torch.distributed.run" in command
        and "RANK" not in environment
        and not command.startswith(("bash", "/bin/bash", "srun"))
    )


def test_preempted(cluster, slow_job, check_done, tmp_path):
    """Catches a pre-empted job that fails, loses its packs, or is not requeued because it was quicker to end than SLURM."""
    job = slow_job()
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 2\n")
    other = cluster.submit(urgent, options=["--partition=high", "--nodes=2", "--exclusive"], cwd=tmp_path)
    assert cluster.finish(other) == "COMPLETED"
    check_done(job, 1, ["a job of higher priority needs the nodes; requeued", "restart 1: resumes"])


@pytest.mark.slow
def test_requeued_by_hand(cluster, slow_job, check_done):
    """Catches ranks that SLURM has to kill, and packs that are lost with them."""
    job = slow_job()
    cluster.run("scontrol", "requeue", job.number)
    check_done(job, 1, ["restart 1: resumes"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_time_limit(cluster, slow_job, check_done):
    """Catches a job that SLURM kills at its time limit, for good."""
    # SLURM looks each half minute whether to warn: 60 to 90 s before the end, and at most 90 s from here; the packs take longer.
    job = slow_job(f"{TWO_NODES} --time=20 --signal=B:USR1@60", pack_s=15.0)
    hours, minutes, seconds = map(int, cluster.facts(job)["RunTime"].split(":"))
    soon = hours * 60 + minutes + (2 if seconds <= 30 else 3)  # whole minutes, the end of which is 90 to 150 s away
    cluster.run("scontrol", "update", f"jobid={job.number}", f"timelimit={soon}")
    cluster.wait(lambda: cluster.facts(job)["Restarts"] == "1" or job_ended(cluster, job), "the time limit", 200)
    cluster.run("scontrol", "update", f"jobid={job.number}", "timelimit=20")
    said = [
        "the time limit is near: telling the ranks to stop",
        "stopped: the time limit is near; requeued",
        "restart 1: resumes",
    ]
    check_done(job, 1, said)


def test_time_limit_no_longer_than_the_warning(cluster, evaluate, tmp_path):
    """Catches a job that goes round in circles, warned and requeued before any pack; SLURM's warning is sent by hand here."""
    run = tmp_path / "run"
    job = evaluate("--nodelist=n1 --nodes=1 --ntasks-per-node=1", *RUN, "--output_path", run, program=SLOW)
    for restart in (0, 1):
        # The task is there to be told: torchrun, about to start Python.
        cluster.wait((run / "logs" / f"{job.number}.{restart}.0.n1.log").exists, f"start {restart}", 120)
        cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    assert cluster.finish(job) == "FAILED", job.words() + logs(run)
    assert cluster.facts(job)["Restarts"] == "1"
    assert "failed, not requeued: the warning before the time limit came before a pack" in job.words()
    assert status.read_status(run)["state"] == status.FAILED


@pytest.mark.slow
def test_cancelled(cluster, slow_job, evaluate, check_done, tmp_path):
    """Catches a cancelled job that comes back by itself, or that loses what it had done."""
    job = slow_job()
    cluster.run("scancel", job.number)
    assert cluster.finish(job) == "CANCELLED"
    assert "SLURM ends it; finished packs are kept" in job.words()
    assert cluster.facts(job)["Restarts"] == "0"
    again = evaluate(TWO_NODES, *RUN, "--output_path", tmp_path / "run", program=SLOW)
    check_done(again, 0, [])


@pytest.mark.slow
def test_node_set_down(cluster, slow_job, check_done):
    """Catches a job that fails with one of its nodes."""
    job = slow_job()
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait(lambda: cluster.state(job) == "PENDING", "the job to be requeued", 60)
    cluster.resume_node("n2")
    check_done(job, 1, ["restart 1: resumes"])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_killed(rank, cluster, slow_job, check_done):
    """Catches a job that ends, or hangs, because one of its processes was killed, as by a lack of memory."""
    job = slow_job()
    kill(cluster, job, is_rank(rank))
    check_done(job, 0, ["a rank or a launcher has died", "starts again, restart 1 of 2"])


@pytest.mark.slow
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_torchrun_killed(node, cluster, slow_job, check_done):
    """Catches workers that run on without their launcher; n1 has the rendezvous."""
    job = slow_job()
    kill(cluster, job, is_torchrun(node))
    check_done(job, 0, ["a rank or a launcher has died", "starts again, restart 1 of 2"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_slurmd_killed(cluster, slow_job, check_done):
    """Catches a job that is lost with the daemon of one of its nodes, which SLURM notices after most of a minute."""
    job = slow_job(pack_s=10.0)
    cluster.kill_node("n2")
    cluster.wait(lambda: cluster.state(job) == "PENDING", "the job to be requeued", 90)
    cluster.start_node("n2")
    check_done(job, 1, ["restart 1: resumes"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_first_start_lives_on_a_lost_node(cluster, slow_job, check_done, tmp_path):
    """Catches two starts of one job in one directory, or the second that fails because the first has the lock."""
    job = slow_job("--nodes=1 --ntasks-per-node=2", pack_s=10.0)
    lost = cluster.facts(job)["BatchHost"]
    cluster.kill_node(lost)
    cluster.wait(lambda: cluster.facts(job)["Restarts"] == "1", "the job to be requeued", 90)
    check_done(job, 1, ["SLURM's state for it is ", "restart 1: resumes"])
    assert "was deleted or taken over by another run: this one ends" in logs(tmp_path / "run")
    cluster.start_node(lost)
    cluster.wait(lambda: "DOWN" not in cluster.node_states()[lost], "the node to come back", 60)
