"""A real SLURM on this machine: one controller, and two slurmd that pose as the nodes n1 and n2.

It needs root and Debian's packages (slurmctld slurmd slurm-client munge), no systemd and no cgroups. Everything it writes, its
munge key and socket included, lies in one directory; the machine's own SLURM, if there is one, is not touched.

The directory `local` stands for a disk of the node's own: what n2 sees there is the content of `local_n2`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo", "unshare")
NODES = ("n1", "n2")
GRACE_S = 15  # between the first signal of a pre-emption and the end

_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={place}/munge.socket,cred_expire=5
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool.%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=10
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5,preempt_youngest_first
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1_port} CPUs=8 RealMemory=1000 Gres=gpu:2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2_port} CPUs=8 RealMemory=1000 Gres=gpu:2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} OverTimeLimit=0
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A submitted job. output: the file of the batch script's own words."""

    number: str
    output: Path

    def words(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def why_not() -> str | None:
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "starting SLURM needs root"
    missing = [program for program in PROGRAMS if shutil.which(program, path=_SYSTEM_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurmctld slurmd slurm-client munge)"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        return "this machine lets nobody make a mount namespace, which stands for a node's own disk"
    return None


class Cluster:
    """A running SLURM. `start` and `stop` it; `submit` jobs; `kill_node` and `start_node` break and mend nodes."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(place / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{_SYSTEM_PATH}"}

    @property
    def local(self) -> Path:
        """A path whose content differs from node to node; n1, and this process, see this directory itself."""
        return self.place / "local"

    @property
    def local_n2(self) -> Path:
        """What n2 sees as `local`."""
        return self.place / "local_n2"

    def start(self) -> None:
        for name in ("state", "spool.n1", "spool.n2", "local", "local_n2"):
            (self.place / name).mkdir(parents=True)
        ports = dict(zip(("controller_port", "n1_port", "n2_port"), _free_ports(3), strict=True))
        # Jobs of several clusters run at a time, in other workers of pytest: the port at which ranks meet goes by a job's number.
        first_job = random.SystemRandom().randrange(1, 10**6)
        settings = {"host": socket.gethostname(), "place": self.place, "grace_s": GRACE_S, "first_job": first_job, **ports}
        (self.place / "slurm.conf").write_text(_CONFIG.format(**settings))
        for name in ("gpu0", "gpu1"):
            (self.place / name).touch()
        (self.place / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.place}/gpu[0-1]\n")
        self._start_munge()
        self._start("slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.node_states() == {"n1": "IDLE", "n2": "IDLE"}, "the nodes to be idle", 30)

    def stop(self) -> None:
        """End the jobs, then the daemons. Never raises, so that what a test saw is not hidden."""
        with contextlib.suppress(Exception):
            self.clear()
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()

    def clear(self) -> None:
        """Cancel what is left in the queue."""
        if self.run("squeue", "-h"):
            self.run("scancel", "--user=root")
            self.wait(lambda: not self.run("squeue", "-h"), "the queue to empty", 20)

    def _start_munge(self) -> None:
        key = self.place / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": self.place / "munge.socket"}
        files |= {name: self.place / name.replace("-", ".") for name in ("log-file", "pid-file", "seed-file")}
        self._start("munged", ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())])
        self.wait(files["socket"].exists, "munged", 10)

    def _start(self, name: str, command: Sequence[str]) -> None:
        with open(self.place / f"{name}.output", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        slurmd = f"exec slurmd -D -N {node}"
        if node == "n1":
            self._start(node, ["sh", "-c", slurmd])
        else:
            mount = f"mount --bind {self.local_n2} {self.local}"
            self._start(node, ["unshare", "--mount", "sh", "-c", f"{mount} && {slurmd}"])

    def kill_node(self, node: str) -> None:
        """kill -9 of the node's slurmd, as when its machine hangs; processes of jobs stay."""
        self._daemons[node].send_signal(signal.SIGKILL)
        self._daemons[node].wait(5)

    def resume_node(self, node: str) -> None:
        """Take a node that was set down into service again; SLURM refuses while it still clears the node."""

        def is_up() -> bool:
            command = ["scontrol", "update", f"nodename={node}", "state=resume"]
            subprocess.run(command, env=self.environment, capture_output=True, timeout=30)
            return not self.node_states()[node].startswith("DOWN")

        self.wait(is_up, f"node {node} to be up", 60)

    def run(self, *command: object) -> str:
        """The output of one of SLURM's commands. Raises AssertionError with its words if it fails."""
        finished = subprocess.run([*map(str, command)], env=self.environment, capture_output=True, text=True, timeout=30)
        assert finished.returncode == 0, f"{' '.join(map(str, command))}: {finished.stderr}"
        return finished.stdout.strip()

    def submit(
        self, script: Path, *flags: object, options: Sequence[str] = (), variables: Mapping[str, str] | None = None, cwd: Path
    ) -> Job:
        """sbatch options script flags, in `cwd`."""
        environment = {**self.environment, **(variables or {})}
        command = ["sbatch", "--parsable", f"--output={cwd}/slurm-%j.out", *options, str(script), *map(str, flags)]
        finished = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=30)
        assert finished.returncode == 0, finished.stderr
        number = finished.stdout.strip()
        return Job(number, cwd / f"slurm-{number}.out")

    def facts(self, job: Job | str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, …"""
        number = job.number if isinstance(job, Job) else job
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", number)))

    def state(self, job: Job | str) -> str:
        return self.facts(job)["JobState"]

    def processes(self, job: Job | str) -> dict[int, tuple[str, dict[str, str]]]:
        """{id: (command line, environment)} of the job's living processes."""
        wanted = {"SLURM_JOB_ID": job.number if isinstance(job, Job) else job, "SLURM_CONF": self.environment["SLURM_CONF"]}
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile
                words = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
                environment = dict(word.split("=", 1) for word in words if "=" in word)
                if wanted.items() <= environment.items():
                    command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(directory.name)] = command, environment
        return found

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines()
        return {node: state.upper() for node, state in map(str.split, lines)}

    def finish(self, job: Job, timeout_s: float = 200.0) -> str:
        """Wait until the job has ended for good; its last state."""

        def ended() -> bool:
            return self.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")

        try:
            self.wait(ended, f"job {job.number} to end", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.facts(job)}\n{job.words()}") from None
        return self.state(job)

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
            time.sleep(0.1)


@contextlib.contextmanager
def running_cluster(place: Path) -> Iterator[Cluster]:
    """A cluster for the life of the block. Skips the test where there can be none."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(place)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
