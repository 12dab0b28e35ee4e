"""What eval.sh and sweep.sh decide, with SLURM's commands played by small scripts: moments that a real SLURM shows too rarely."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

import pytest
from places import ROOT

from ddp_eval.output import status
from ddp_eval.system import launch_id

DONE = '{"state": "done", "reason": "", "time": "", "launch": {"slurm": "%s"}}'
SCONTROL = """\
echo "$@" >>"$FAKE/asked"
case "$1 $2" in
    "show node") echo "NodeName=n1 Arch=x NodeAddr=127.0.0.1 NodeHostName=n1" ;;
    "show hostnames") echo n1 ;;
    "show job")
        [[ -e "$FAKE/meanwhile" ]] && source "$FAKE/meanwhile"
        [[ -s "$FAKE/job" ]] && cat "$FAKE/job"
        ;;
    requeue*) [[ ! -e "$FAKE/refuse" ]] ;;
esac
"""
SRUN = """\
echo run >>"$FAKE/runs"
echo "$HEAD" >>"$FAKE/heads"
source "$FAKE/step"
"""
SCANCEL = """\
echo "$@" >>"$FAKE/asked"
[[ ! -s "$FAKE/deaf" ]] || { sed -i 1d "$FAKE/deaf"; exit 1; }
"""


@pytest.fixture
def evaluate(tmp_path):
    """evaluate(step, job=what scontrol says of it, *flags, command=(), **variables) -> the finished eval.sh.

    step: of srun, in bash. command: what comes before all flags.
    """
    programs = tmp_path / "programs"
    programs.mkdir()
    sleep = 'echo "$@" >>"$FAKE/slept"; /bin/sleep 0.1'
    stubs = {"scontrol": SCONTROL, "srun": SRUN, "scancel": SCANCEL, "sleep": sleep}
    for name, text in stubs.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (programs / name).chmod(0o755)
    (tmp_path / "run" / "logs").mkdir(parents=True)

    def start(step, job="JobId=7 JobState=RUNNING Restarts=0 ", *flags, command=(), **variables):
        (tmp_path / "step").write_text(step)
        (tmp_path / "job").write_text(f" {job}\n" if job else "")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "FAKE": str(tmp_path)}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", **variables}
        words = ["bash", ROOT / "slurm" / "eval.sh", *command, "--tasks", "demo", "--output_path", tmp_path / "run", *flags]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30)

    return start


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_outside_a_job():
    """Catches `unbound variable` in place of what to do."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = ["bash", str(ROOT / "slurm" / "eval.sh"), "--tasks", "demo"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert finished.returncode == 2 and finished.stderr.startswith("slurm/eval.sh runs in a SLURM job: sbatch"), finished


ELEMENT = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}


def test_last_element_of_an_array(evaluate, tmp_path):
    """Catches all elements of an array requeued, signalled or looked at, because the last one has the array's own id."""
    preempted = "JobId=7 JobState=RUNNING Restarts=0 PreemptTime=2026-11-22T10:00:00 "
    finished = evaluate("exit 1", preempted, **ELEMENT)
    assert finished.returncode == 0 and "job 7_3: stopped: a job of higher priority needs the nodes; requeued" in finished.stdout
    asked = [line.split()[-1] for line in lines(tmp_path / "asked") if "node" not in line and "host" not in line]
    assert set(asked) == {"7_3"} and "requeue 7_3" in lines(tmp_path / "asked")


def test_time_limit_of_an_array_element(evaluate, tmp_path):
    """Catches a time limit that stops the ranks of every element."""
    finished = evaluate('touch "$LOGS.n1.log"; kill -USR1 $PPID; /bin/sleep 1; exit 1', **ELEMENT)
    assert finished.returncode == 0 and "the time limit is near; requeued" in finished.stdout, finished.stdout
    assert "--signal=TERM 7_3" in lines(tmp_path / "asked")


def test_time_limit_between_two_starts(evaluate, tmp_path):
    """Catches a warning that comes when no rank runs: another start would run into the limit, and SLURM end the job for good."""
    (tmp_path / "meanwhile").write_text('kill -USR1 "$(cat "$FAKE/pid")"')
    finished = evaluate('echo "$PPID" >"$FAKE/pid"; exit 1')
    assert finished.returncode == 0 and "the time limit is near; requeued" in finished.stdout, finished.stdout
    assert len(lines(tmp_path / "runs")) == 1


def test_warning_before_the_step_begins(evaluate, tmp_path):
    """Catches a warning that reaches nobody, because srun has not started its tasks yet."""
    step = 'kill -USR1 $PPID; /bin/sleep 0.5; cp "$FAKE/asked" "$FAKE/before"; touch "$LOGS.n1.log"; /bin/sleep 1; exit 1'
    finished = evaluate(step)
    assert finished.returncode == 0 and "the time limit is near; requeued" in finished.stdout, finished.stdout
    assert "--signal=TERM 7" in lines(tmp_path / "asked") and "--signal=TERM 7" not in lines(tmp_path / "before")


def test_warning_to_a_silent_controller(evaluate, tmp_path):
    """Catches ranks that run into the time limit because slurmctld was being restarted when they should have been told."""
    (tmp_path / "deaf").write_text("once\ntwice\n")
    evaluate('touch "$LOGS.n1.log"; kill -USR1 $PPID; /bin/sleep 1; exit 1')
    assert lines(tmp_path / "asked").count("--signal=TERM 7") == 3


def test_silent_controller(evaluate, tmp_path):
    """Catches a job that fails for good because slurmctld was being restarted when one of its ranks had died."""
    step = f'(($(wc -l <"$FAKE/runs") == 1)) && exit 1\necho \'{DONE % 7}\' >"$FAKE/run/status.json"'
    finished = evaluate(step, job="")
    assert finished.returncode == 0 and "starts again, restart 1 of 2" in finished.stdout, finished.stdout
    assert lines(tmp_path / "slept")
    assert len(set(lines(tmp_path / "heads"))) == 2, "a port that something else sits on is met again"


def test_controller_that_refuses_to_requeue(evaluate, tmp_path):
    """Catches a job that asks for ever."""
    (tmp_path / "refuse").touch()
    finished = evaluate("exit 1", "JobId=7 JobState=RUNNING Restarts=0 PreemptTime=2026-11-22T10:00:00 ")
    assert finished.returncode == 75 and "SLURM refused to requeue it: the same command resumes" in finished.stdout


@pytest.mark.parametrize(("whose", "runs"), [("7_3", 0), ("7", 1), ("6", 1)])
def test_done_before_it_was_requeued(whose, runs, evaluate, tmp_path):
    """Catches --fresh dropped because the directory's old run is done, and a job that is done computed again."""
    (tmp_path / "run" / "status.json").write_text(DONE % whose)
    step = f"echo '{DONE % '7_3'}' >\"$FAKE/run/status.json\""
    finished = evaluate(step, SLURM_RESTART_COUNT="1", **ELEMENT)
    assert finished.returncode == 0, finished.stdout
    assert len(lines(tmp_path / "runs")) == runs
    assert lines(tmp_path / "run" / "logs" / "flags") == ["--tasks", "demo", "--output_path", str(tmp_path / "run")]


NOT_AS_EXPECTED = f"echo '{DONE % 7}' >\"$FAKE/run/status.json\"; echo '  exitcode  : 3 (pid: 5)' >\"$LOGS.n1.log\"; exit 1"
EXPECT = {"identical": ("--expect", "identical"), "within 0.5": ("--expect", "within", "0.5")}


@pytest.mark.parametrize("expected", EXPECT)
def test_reproduction_that_is_not_as_expected(expected, evaluate, tmp_path):
    """Catches a job that succeeds though its bits are others than --expect asks for, at once or when it is requeued."""
    command = ("reproduce", "runs/a", *EXPECT[expected], "--device", "cpu")
    finished = evaluate(NOT_AS_EXPECTED, command=command)
    wanted = f"job 7: failed, not requeued: {tmp_path / 'run'} is done, and not as expected (--expect {expected}): "
    assert finished.returncode == 1 and wanted in finished.stdout, finished
    assert len(lines(tmp_path / "runs")) == 1 and json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    finished = evaluate("exit 0", command=command, SLURM_RESTART_COUNT="1")
    assert finished.returncode == 1 and wanted in finished.stdout and len(lines(tmp_path / "runs")) == 1, finished


def test_reproduction_whose_comparison_is_cut_off(evaluate, tmp_path):
    """Catches a run that passes for what was expected because it is done, though nothing has been compared."""
    command = ("reproduce", "runs/a", "--expect=identical")
    (tmp_path / "run" / "status.json").write_text(DONE % 7)
    for count in ("0", "1"):
        finished = evaluate("exit 137", command=command, SLURM_RESTART_COUNT=count)
        assert finished.returncode == 1 and "its comparison (--expect identical) came to no end" in finished.stdout, finished


def test_reproduction_as_expected(evaluate, tmp_path):
    """Catches a good reproduction that fails, or fails once it is requeued; without --expect a difference is no failure."""
    step = f"echo '{DONE % 7}' >\"$FAKE/run/status.json\""
    for count in ("0", "1"):
        finished = evaluate(step, command=("reproduce", "runs/a", "--expect", "identical"), SLURM_RESTART_COUNT=count)
        assert finished.returncode == 0 and "done: " in finished.stdout, finished
    assert len(lines(tmp_path / "runs")) == 1
    assert evaluate(NOT_AS_EXPECTED, command=("reproduce", "runs/a")).returncode == 0


def test_signal_behind_the_last_word(evaluate, tmp_path):
    """Catches a job that is done and requeued all the same, because SIGTERM met it while it printed its table."""
    step = f"echo '{DONE % 7}' >\"$FAKE/run/status.json\"; kill -TERM $PPID; /bin/sleep 0.5; exit 1"
    finished = evaluate(step)
    assert finished.returncode == 0 and "done: " in finished.stdout, finished.stdout
    assert not [line for line in lines(tmp_path / "asked") if "requeue" in line]


def test_complete_before(evaluate, tmp_path):
    """Catches a job that fails because its run was there already; another job did it."""
    (tmp_path / "run" / "status.json").write_text(DONE % 5)
    finished = evaluate('echo "ddp_eval: run holds this very run, complete: nothing is left to do (x)" >"$LOGS.n1.log"')
    assert finished.returncode == 0 and "done: " in finished.stdout, finished.stdout


def test_lost_node_is_no_success(evaluate, tmp_path):
    """Catches an old run that passes for this one because srun returns 0 when it has lost the only node."""
    (tmp_path / "run" / "status.json").write_text(DONE % 5)
    finished = evaluate("exit 0", "JobId=7 JobState=NODE_FAIL Restarts=0 ")
    assert finished.returncode == 75 and "NODE_FAIL" in finished.stdout, finished.stdout


@pytest.mark.parametrize(("holder", "stays"), [("7_3", False), ("7", True), ("8", True)])
def test_lock_of_another_job(holder, stays, evaluate, tmp_path):
    """Catches a requeued job that takes the lock of a living one away: two runs in one directory."""
    lock = tmp_path / "run" / ".ddp_eval.lock"
    lock.write_text(f'{{"pid": 1, "slurm_job": "{holder}", "token": "x"}}')
    evaluate(f"echo '{DONE % '7_3'}' >\"$FAKE/run/status.json\"", SLURM_RESTART_COUNT="1", **ELEMENT)
    assert lock.exists() is stays


WARNED = "kill -USR1 $PPID; /bin/sleep 0.5; exit 1"
PACK_DONE = 'mkdir -p "$FAKE/run/journal"; echo pack >>"$FAKE/run/journal/0.journal"; '


@pytest.mark.parametrize(
    ("steps", "code"),
    [
        ([WARNED, WARNED], 1),
        ([PACK_DONE + WARNED, WARNED, WARNED], 1),
        ([WARNED, PACK_DONE + WARNED, WARNED], 0),
        ([WARNED, None, WARNED], 0),  # None: a start that SLURM ended otherwise
    ],
)
def test_time_limit_no_longer_than_the_warning(steps, code, evaluate, tmp_path):
    """Catches a job that is warned, requeued and warned again for ever, and one that fails though it comes further."""
    for number, step in enumerate(steps):
        if step is not None:
            state = f"JobId=7 JobState=RUNNING Restarts={number} "
            finished = evaluate(step, state, SLURM_RESTART_COUNT=str(number))
            last = number == len(steps) - 1
            assert finished.returncode == (code if last else 0), finished.stdout
            assert ("the time limit is near; requeued" in finished.stdout) is (not last or code == 0), finished.stdout
    if code == 1:
        assert "failed, not requeued: the warning before the time limit" in finished.stdout
        assert "let --time be well over" in status.read_status(tmp_path / "run")["reason"]


def models(*states):
    """A step that leaves a sweep.json."""
    text = json.dumps({"version": 1, "models": [{"name": str(number), "state": state} for number, state in enumerate(states)]})
    return f"echo '{text}' >\"$FAKE/run/sweep.json\"; "


def over(*counts):
    """A step in which a sweep comes to the end of its models."""
    return f'echo "ddp_eval: the sweep is over: {", ".join(counts)}" >>"$LOGS.n1.log"; '


def test_a_sweep_that_is_done(evaluate, tmp_path):
    """Catches a sweep started again, or failed, because its directory is no run's, and one that scripts cannot see the end of."""
    finished = evaluate(models("done", "done") + "exit 0", command=("sweep",))
    assert finished.returncode == 0 and "done: " in finished.stdout and len(lines(tmp_path / "runs")) == 1, finished.stdout
    found = status.read_status(tmp_path / "run")
    assert (found["state"], found["launch"]) == (status.DONE, {"slurm": "7"})
    assert lines(tmp_path / "run" / "logs" / "flags")[0] == "sweep"


def test_a_sweep_with_models_that_failed(evaluate, tmp_path):
    """Catches a model without a file that is tried three times over, with all that comes before it."""
    finished = evaluate(
        models("done", "failed", "waiting") + over("1 done", "1 failed", "1 waiting") + "exit 1", command=("sweep",)
    )
    assert finished.returncode == 1 and len(lines(tmp_path / "runs")) == 1, finished.stdout
    assert f"failed, not requeued: some models of the sweep failed: see {tmp_path}/run/sweep.json\n" in finished.stdout
    assert status.read_status(tmp_path / "run")["state"] == status.FAILED


def test_a_sweep_that_leaves_models_to_another_launch(evaluate, tmp_path):
    """Catches a job that starts again and again beside the other, and one that ends as if all were done."""
    finished = evaluate(models("done", "waiting") + over("1 done", "1 at work in another launch") + "exit 1", command=("sweep",))
    assert finished.returncode == 75 and len(lines(tmp_path / "runs")) == 1, finished.stdout
    assert "ended, and left models of the sweep to another launch" in finished.stdout
    assert status.read_status(tmp_path / "run")["state"] == status.PREEMPTED


def test_a_rank_of_a_sweep_that_dies(evaluate, tmp_path):
    """Catches a sweep given up when one rank died: the models that failed are not all that it has to do."""
    step = f'(($(wc -l <"$FAKE/runs") == 1)) && {{ {models("failed", "failed")}exit 1; }}\n{models("done")}exit 0'
    finished = evaluate(step, command=("sweep",))
    assert finished.returncode == 0 and "starts again, restart 1 of 2" in finished.stdout, finished.stdout


def test_one_model_of_a_sweep_that_is_complete(evaluate, tmp_path):
    """Catches a sweep taken for done because one of its models was found complete."""
    said = 'echo "ddp_eval: run/a holds this very run, complete: nothing is left to do (x)" >"$LOGS.n1.log"; '
    finished = evaluate(models("done", "waiting") + said + "exit 1", command=("sweep",))
    assert finished.returncode == 1 and len(lines(tmp_path / "runs")) == 3, finished.stdout


def test_a_sweep_before_its_time_limit(evaluate, tmp_path):
    """Catches a sweep that finishes a model at each start, or watches, called one that comes no further."""
    for number in range(3):
        state = f"JobId=7 JobState=RUNNING Restarts={number} "
        further = f'mkdir -p "$FAKE/run/{number}"; echo >"$FAKE/run/{number}/manifest.json"; '
        finished = evaluate(further + WARNED, state, command=("sweep",), SLURM_RESTART_COUNT=str(number))
        assert finished.returncode == 0 and "the time limit is near; requeued" in finished.stdout, finished.stdout
    for number in range(3):
        state = f"JobId=7 JobState=RUNNING Restarts={number} "
        finished = evaluate(WARNED, state, "--watch", command=("sweep",), SLURM_RESTART_COUNT=str(number))
        assert finished.returncode == 0, finished.stdout


def test_locks_of_a_sweeps_models(evaluate, tmp_path):
    """Catches a requeued sweep that waits for its own earlier start, and one that takes another watcher's model away."""
    for name, holder in (("own", "7"), ("other", "8")):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / ".ddp_eval.lock").write_text(f'{{"slurm_job": "{holder}"}}')
    evaluate(models("done") + "exit 0", command=("sweep",), SLURM_RESTART_COUNT="1")
    assert [(tmp_path / "run" / name / ".ddp_eval.lock").exists() for name in ("own", "other")] == [False, True]


REFUSED = r"""
printf '%s\n' 'ddp_eval: --tasks: "a\b"'$'\t''is none' '  exitcode  : 2 (pid: 5)' >"$LOGS.n1.log"
exit 1
"""


@pytest.mark.parametrize("earlier", [None, '{"state": "running", "launch": {"slurm": "5"}}', "torn"])
def test_failure_before_the_run_directory_is_open(earlier, evaluate, tmp_path, monkeypatch):
    """Catches a status.json that is missing, of an earlier job, or torn by the words in it, after a wrong flag."""
    if earlier:
        (tmp_path / "run" / "status.json").write_text(earlier)
        (tmp_path / "run" / ".ddp_eval.lock").write_text("of a job that was killed")
        os.utime(tmp_path / "run" / ".ddp_eval.lock", (0, time.time() - 100))
    finished = evaluate(REFUSED)
    assert finished.returncode == 1 and 'failed, not requeued: --tasks: "a\\b"\tis none\n' in finished.stdout, finished.stdout
    found = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (found["state"], found["reason"], found["launch"]) == (status.FAILED, '--tasks: "a\\b" is none', {"slurm": "7"})
    for name in ("SLURM_ARRAY_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    status.write_status(tmp_path, status.FAILED, "")
    own = status.read_status(tmp_path)
    assert list(found) == list(own) and len(found["time"]) == len(own["time"]) and found["launch"] == launch_id.launches()
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"status.json", ".ddp_eval.lock", "logs"}


@pytest.mark.parametrize("state", ["done", "running"])
def test_failure_beside_a_run(state, evaluate, tmp_path):
    """Catches a wrong flag that takes a finished run's "done" away, or another living run's "running"."""
    text = f'{{"state": "{state}", "launch": {{"slurm": "5"}}}}'
    (tmp_path / "run" / "status.json").write_text(text)
    if state == "running":
        (tmp_path / "run" / ".ddp_eval.lock").write_text('{"slurm_job": "5"}')
    assert evaluate(REFUSED).returncode == 1
    assert (tmp_path / "run" / "status.json").read_text() == text


def test_failure_without_words(evaluate, tmp_path):
    """Catches a lock of this job's own killed rank that keeps its failure from being noted."""
    (tmp_path / "run" / ".ddp_eval.lock").write_text('{"slurm_job": "7"}')
    finished = evaluate("exit 9")
    assert finished.returncode == 1 and "failed with code 9, after 2 restarts: no rank said why; see " in finished.stdout
    assert status.read_status(tmp_path / "run")["reason"].startswith("no rank said why; see ")


def test_end_that_this_node_does_not_see(evaluate):
    """Catches a run directory that is not shared passed off as a rank that died."""
    finished = evaluate("exit 0")
    assert finished.returncode == 1 and "status.json on this node does not say so: do all share it?" in finished.stdout, (
        finished.stdout
    )


def test_output_path_that_cannot_be_made(evaluate, tmp_path):
    """Catches mkdir's own words as the only ones."""
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").touch()
    finished = evaluate("exit 0")
    sentence = f"job 7: failed, not requeued: --output_path {tmp_path / 'run'} cannot be written to (Not a directory)\n"
    assert finished.returncode == 2 and finished.stdout.endswith(sentence) and not finished.stderr, finished.stderr


def test_node_without_the_run_directory(evaluate, tmp_path):
    """Catches the words of a node lost because only the script's node has the directory for them."""
    (tmp_path / "programs" / "python").write_text("#!/usr/bin/env bash\necho words >&2\nexit 1\n")
    (tmp_path / "programs" / "python").chmod(0o755)
    step = 'rm -r "$FAKE/run"; while [[ "$1" != bash ]]; do shift; done\n'
    evaluate(f'{step}SLURMD_NODENAME=n2 SLURM_NODEID=1 SLURM_CPUS_ON_NODE=1 "$@"')
    assert (tmp_path / "run" / "logs" / "7.0.2.n2.log").read_text() == "words\n"


def test_end_of_the_node_checks(evaluate, tmp_path):
    """Catches node checks called a run that is done, and a node that SLURM lost called good."""
    finished = evaluate("exit 0", "JobId=7 JobState=RUNNING Restarts=0 ", "--preflight")
    assert finished.returncode == 0 and finished.stdout.endswith("job 7: node checks passed; nothing was evaluated\n")
    assert evaluate("exit 0", "JobId=7 JobState=NODE_FAIL Restarts=0 ", "--preflight").returncode == 75


def report(tmp_path, flags):
    """sweep.sh --report on a list of one model and one task set, whose run is done with `--limit 3`."""
    run = tmp_path / "out" / "a" / "t"
    (run / "logs").mkdir(parents=True)
    (run / "status.json").write_text(DONE % 7)
    (run / "logs" / "flags").write_text(f"--tasks\ntwo words\n--limit\n3\n--output_path\n{run}\n")
    (tmp_path / "list.txt").write_text(f"model a\ntasks t --tasks 'two words' {flags}\n")
    command = [ROOT / "slurm" / "sweep.sh", "--report", tmp_path / "list.txt", tmp_path / "out", ROOT / "slurm" / "eval.sh"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


def test_many_models_in_one_launch(tmp_path):
    """Catches a line "models" run as one model, its pattern expanded on the login node, or left out of the report."""
    (tmp_path / "list.txt").write_text("model a --x\nmodels small --models 'ckpt/*' --y\ntasks t --tasks demo\n")
    (tmp_path / "eval.sh").write_text(
        'PYTHON=(echo)\nPROGRAM=(program)\nsetup() { :; }\n# EDIT ends here.\nprintf "%s|" "$@" >"$FAKE/called"\n'
    )
    out = tmp_path / "out"
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "1", "FAKE": str(tmp_path)}

    def call(command):
        words = [ROOT / "slurm" / "sweep.sh", command, tmp_path / "list.txt", out, tmp_path / "eval.sh"]
        return subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=20)

    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "1").mkdir()
    assert call("--element").returncode == 0
    called = (tmp_path / "called").read_text()
    assert called == f"sweep|--models|ckpt/*|--y|--tasks|demo|--output_path|{out}/small/t|"
    (out / "small" / "t" / "logs").mkdir(parents=True)
    (out / "small" / "t" / "status.json").write_text(DONE % 7)
    (out / "small" / "t" / "logs" / "flags").write_text(called.replace("|", "\n"))
    finished = call("--report")
    assert "small t: done\n" in finished.stdout and "a t: not done" in finished.stdout and finished.returncode == 1
    assert (out / "compare.t.small.txt").read_text() == f"program compare {out}/small/t\n"
    assert not (out / "compare.t.txt").exists()


def test_report_of_the_list(tmp_path):
    """Catches a run that is called not done though it is."""
    finished = report(tmp_path, "--limit 3")
    assert finished.returncode == 0 and finished.stdout == "a t: done\n"


@pytest.mark.parametrize("flags", ["--limit 4", "", "--limit 3 --num_fewshot 1"])
def test_report_of_an_edited_list(flags, tmp_path):
    """Catches numbers of other flags compared as if the list's, or left from an earlier report."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.t.txt").write_text("of an earlier report")
    finished = report(tmp_path, flags)
    assert finished.returncode == 1 and "a t: the run there is of other flags" in finished.stdout
    assert not (tmp_path / "out" / "compare.t.txt").exists()


def test_report_of_tasks_whose_names_go_on_behind_a_dot(tmp_path):
    """Catches the comparison of mmlu.pro deleted as if it were one of mmlu, and one of an earlier report left."""
    out = tmp_path / "out"
    (tmp_path / "list.txt").write_text("model a\nmodels small --models x\ntasks mmlu.pro --tasks p\ntasks mmlu --tasks m\n")
    (tmp_path / "eval.sh").write_text("PYTHON=(echo)\nPROGRAM=(program)\nsetup() { :; }\n# EDIT ends here.\n")
    run = out / "small" / "mmlu.pro"
    (run / "logs").mkdir(parents=True)
    (run / "status.json").write_text(DONE % 7)
    (run / "logs" / "flags").write_text(f"sweep\n--models\nx\n--tasks\np\n--output_path\n{run}\n")
    for name in ("mmlu.small", "mmlu", "mmlu.of.another.list"):
        (out / f"compare.{name}.txt").write_text("earlier")
    words = [ROOT / "slurm" / "sweep.sh", "--report", tmp_path / "list.txt", out, tmp_path / "eval.sh"]
    finished = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert "small mmlu.pro: done\n" in finished.stdout, finished
    left = {path.name: path.read_text() for path in out.glob("compare.*")}
    assert left == {"compare.mmlu.pro.small.txt": f"program compare {run}\n", "compare.mmlu.of.another.list.txt": "earlier"}


@pytest.mark.parametrize("command", [[], ["--report"]])
def test_quote_that_is_not_closed(command, tmp_path):
    """Catches words dropped behind a quote that is never closed: the elements would run with half of their flags."""
    (tmp_path / "list.txt").write_text("model a --model_args 'pretrained=demo\nmodel b --x\ntasks t --tasks demo\n")
    words = [ROOT / "slurm" / "sweep.sh", *command, tmp_path / "list.txt", tmp_path / "out", ROOT / "slurm" / "eval.sh"][
        : 3 + 2 * len(command)
    ]
    finished = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert finished.returncode == 2, finished.stdout
    assert "the flags of model a and tasks t cannot be split into words: is a quote not closed?" in finished.stderr
    assert not (tmp_path / "out").exists()
