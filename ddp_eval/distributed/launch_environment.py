"""What launchers leave in the environment: read and checked at one place, so that nonsense is one sentence. Light: no torch.

An empty variable counts as one that is not set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping

from ddp_eval.errors import UserError

# Of torchrun's kind. Left over in a shell, they make a process wait for others: `env -u` takes them away.
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Set by launchers that start several processes and describe no process group of torch: (launcher, variable with their number).
_OTHER_LAUNCHERS = (("mpirun", "OMPI_COMM_WORLD_SIZE"), ("mpirun", "MV2_COMM_WORLD_SIZE"), ("mpiexec", "PMI_SIZE"))


@dataclasses.dataclass(frozen=True)
class LaunchEnvironment:
    """This process among those of its launch. address, port: where ranks meet; "" and 0 with one rank.

    local_world_size: ranks on this machine; None where the launcher does not say. by_torchrun: not by hand or a script.
    agent_store: torchrun's own store is at `address`; otherwise rank 0 opens one there.
    inherited: the parent process has torchrun's variables too: a script that torchrun has started, or a shell in which they are
    left over.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int | None = None
    address: str = ""
    port: int = 0
    by_torchrun: bool = False
    agent_store: bool = False
    inherited: bool = False

    def way_out(self) -> str:
        """What to do where nobody meant to start several processes; empty where torchrun has started this one itself."""
        if self.by_torchrun and not self.inherited:
            return ""
        names = ("WORLD_SIZE", "RANK", *(["TORCHELASTIC_RUN_ID"] if self.by_torchrun else []))
        return (
            f"the variables WORLD_SIZE={self.world_size} and RANK={self.rank} ask for {self.world_size} processes; if they are "
            f"left over in this shell, start with `{without(*names)}` in front"
        )


def read(environment: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Raises UserError for what makes no sense."""
    variables = os.environ if environment is None else environment

    def number(name: str, default: int, least: int = 0) -> int:
        return whole_number(name, default, least, variables)

    def is_set(name: str) -> bool:
        return bool(variables.get(name, "").strip())

    by_torchrun = is_set("TORCHELASTIC_RUN_ID")
    rank, world_size, local_rank = number("RANK", 0), number("WORLD_SIZE", 1, 1), number("LOCAL_RANK", 0)
    number("GROUP_WORLD_SIZE", 1, 1)
    number("GROUP_RANK", 0)
    tasks = number("SLURM_STEP_NUM_TASKS", world_size)
    if not is_set("RANK"):
        if tasks > 1 and is_set("SLURM_STEP_NUM_TASKS"):
            raise UserError("srun started several tasks that know nothing of each other: have each node run one torchrun instead")
        for launcher, variable in _OTHER_LAUNCHERS:
            if number(variable, 1) > 1 and world_size == 1:
                raise UserError(
                    f"{launcher} started {variables[variable].strip()} processes that know nothing of each other ({variable}): "
                    f"start them with torchrun, or one alone with `{without(variable)}` in front"
                )
    if not by_torchrun and tasks != world_size:
        raise UserError(
            f"WORLD_SIZE is {world_size} but SLURM_STEP_NUM_TASKS is {tasks}: unset WORLD_SIZE, or start with torchrun"
        )
    if rank >= world_size:
        raise UserError(
            f"RANK must lie between 0 and WORLD_SIZE - 1, got RANK={rank} and WORLD_SIZE={world_size}: start with torchrun, or "
            f"one process alone with `{without('RANK', 'WORLD_SIZE')}` in front"
        )
    local_world_size = number("LOCAL_WORLD_SIZE", 1, 1) if is_set("LOCAL_WORLD_SIZE") else None
    if local_world_size is not None and local_rank >= local_world_size:
        raise UserError(
            f"LOCAL_RANK must lie between 0 and LOCAL_WORLD_SIZE - 1, got LOCAL_RANK={local_rank} and "
            f"LOCAL_WORLD_SIZE={local_world_size}: start with torchrun, or with `{without('LOCAL_RANK', 'LOCAL_WORLD_SIZE')}` in "
            "front"
        )
    if world_size == 1:
        return LaunchEnvironment(rank, world_size, local_rank, local_world_size, by_torchrun=by_torchrun)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not is_set(name):
            raise UserError(
                f"WORLD_SIZE is {world_size} but {name} is not set: start with torchrun, or one process alone with "
                f"`{without('WORLD_SIZE', 'RANK')}` in front"
            )
    if local_rank > rank or (local_world_size or 1) > world_size:
        raise UserError(
            f"LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={local_world_size or 'not set'} do not go with RANK={rank} and "
            f"WORLD_SIZE={world_size}: a machine has a part of the ranks; start with torchrun"
        )
    port = number("MASTER_PORT", 0)
    if not 1 <= port <= 65535:
        raise UserError(f"the environment variable MASTER_PORT must be a port from 1 to 65535, got {port}")
    agent_store = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = variables["MASTER_ADDR"].strip()
    inherited = by_torchrun and _parent_has("TORCHELASTIC_RUN_ID")
    return LaunchEnvironment(rank, world_size, local_rank, local_world_size, address, port, by_torchrun, agent_store, inherited)


def _parent_has(name: str) -> bool:
    """Whether the parent process has this variable too, which torchrun gives to its ranks and does not have itself."""
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            return f"\0{name}=".encode() in b"\0" + file.read()
    except OSError:
        return False


def whole_number(name: str, default: int, least: int | None = None, environment: Mapping[str, str] | None = None) -> int:
    """A variable's value; `default` where it is not set. Raises UserError."""
    text = (os.environ if environment is None else environment).get(name, "").strip()
    if not text:
        return default
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise UserError(f"the environment variable {name} must be a whole number, got {text}")
    if least is not None and int(text) < least:
        raise UserError(f"the environment variable {name} must be {least} or more, got {text}")
    return int(text)


def is_first() -> bool:
    """Whether this process is rank 0, as far as is known: the one that logs. Never raises."""
    return known_rank() == 0


def known_rank() -> int | None:
    """As `launch_rank`; None where RANK is no number. Never raises."""
    with contextlib.suppress(UserError):
        return launch_rank()
    return None


def drop_empty() -> None:
    """Take variables that are set to nothing out of the environment: other libraries take them for numbers."""
    for name in _NAMES:
        if not os.environ.get(name, "0").strip():
            del os.environ[name]


def without(*names: str) -> str:
    """The words in front of a command that hide these variables from it."""
    return "env " + " ".join(f"-u {name}" for name in names)


def launch_rank() -> int:
    """This process's rank as the launcher set it; 0 without a launcher. Needs no process group."""
    return whole_number("RANK", 0)


def launch_local_rank() -> int:
    """This process's rank on its node as the launcher set it; 0 without a launcher. Needs no process group."""
    return whole_number("LOCAL_RANK", 0)


def spans_nodes() -> bool:
    """Whether torchrun started ranks on several nodes. Needs no process group."""
    return whole_number("GROUP_WORLD_SIZE", 1) > 1
