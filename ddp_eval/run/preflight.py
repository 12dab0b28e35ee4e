"""Node checks before any work: bad nodes are named while it costs seconds, not after an hour of loading and waiting.

Every rank puts what it sees into the launcher's key-value store, before the process group exists, since a wrong network
interface or another version of torch would keep the group from forming; every rank reads all of it and comes to the same
verdict. Runs by itself when torchrun spans several nodes, and alone with --preflight.

    facts of each rank (versions, GPU, model files, run directory) ── store ──► problems that name nodes, or
    probes (next node's port, the run directory, clocks)           ── store ──► problems and warnings
    join the group, all-reduce on each rank's own device
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddp_eval.config import Config
from ddp_eval.distributed import collectives, launch_environment, store, watchdog
from ddp_eval.distributed.world import World, choose_device
from ddp_eval.engines.hf import model_files
from ddp_eval.errors import UserError
from ddp_eval.output import versions, write
from ddp_eval.system import digests, network
from ddp_eval.system.read_back import open_regular

EXCHANGE_S = 300.0  # nodes start Python from slow disks at different speeds
CLOCK_S = 5.0  # clocks further apart than this are worth a word
_NFS_S = 5.0  # a file that another node has just made may take so long to show

log = logging.getLogger("ddp_eval")


@dataclasses.dataclass(frozen=True)
class PreflightReport:
    """What --preflight prints: one line for each node."""

    lines: list[str]


def check_if_due(config: Config) -> PreflightReport | None:
    """Check the nodes if there are several or --preflight asks for it; None if not, or if ranks have no common store yet."""
    wanted = config.preflight or launch_environment.spans_nodes()
    return check_nodes(config) if wanted and store.can_exchange() else None


def check_nodes(config: Config) -> PreflightReport:
    """Check every node. Collective; needs `distributed.can_exchange`.

    Raises UserError, the same sentence on every rank, naming the nodes and what is wrong with them.
    """
    watchdog.step("checking this node")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(network.listening())
        marker = _leave_marker(config, stack)
        mine = _local_facts(config) | {"port": listener.port, "marker": marker}
        facts = _exchange("facts", mine)
        _raise_problems(find_problems(facts))
        probes = _exchange("probes", _probe(facts, mine))
        _exchange("end", {})  # nobody takes its port or marker away before all have probed
    warnings, problems = judge_probes(facts, probes)
    _raise_problems(problems)
    if launch_environment.launch_rank() == 0:
        for warning in warnings:
            log.warning("%s", warning)
    return PreflightReport(describe_nodes(facts))


def check_group(world: World) -> str:
    """All-reduce on every rank's own device, as the run's collectives will; how long it took. Raises LostContact."""
    seconds = collectives.time_all_reduce(world)
    backend = "NCCL" if world.device.type == "cuda" else "gloo"
    ranks = "1 rank" if world.world_size == 1 else f"{world.world_size} ranks"
    return f"all-reduce over {ranks} by {backend} in {1000 * seconds:.1f} ms"


def find_problems(facts: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with nodes by the ranks' facts, in rank order; each sentence names its node. Pure."""
    found = [f"node {one['node']}: {problem}" for one in facts for problem in one["problems"]]
    for one in facts:
        found += [f"node {one['node']} has {difference}" for difference in _differences(one, facts)]
    several = len({one["machine"] for one in facts}) > 1
    for one in facts:
        if several and one["address"].startswith("127."):
            found.append(
                f"node {one['node']}: its host name stands for {one['address']}, where other nodes cannot reach it: name the "
                f"network interface between the nodes, as GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (it has {one['interfaces']})"
            )
    found += _shared_gpus(facts)
    return list(dict.fromkeys(found))


def judge_probes(facts: Sequence[dict[str, Any]], probes: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(warnings, problems) by what ranks found out about each other. Pure."""
    warnings, problems = [], []
    for one, probe in zip(facts, probes, strict=True):
        if probe["unreachable"]:
            problems.append(
                f"node {one['node']} cannot reach {probe['unreachable']}: is it the right network interface "
                f"(GLOO_SOCKET_IFNAME; it has {one['interfaces']}), or a firewall?"
            )
        if not probe["sees_marker"]:
            warnings.append(
                f"node {one['node']} does not see the run directory of node {facts[0]['node']}: "
                "its finished packs are not kept for a resume"
            )
        ahead_s = probe["time"] - probes[0]["time"]
        if abs(ahead_s) > CLOCK_S:
            side = "ahead of" if ahead_s > 0 else "behind"
            warnings.append(f"node {one['node']}: its clock is {abs(ahead_s):.0f} s {side} that of node {facts[0]['node']}")
    names = {one["gpu"]["name"] for one in facts if one["gpu"]}
    if len(names) > 1:
        warnings.append(f"the GPUs are not alike ({', '.join(sorted(names))}): the last bits depend on which one runs what")
    return list(dict.fromkeys(warnings)), list(dict.fromkeys(problems))


def describe_nodes(facts: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each node: its ranks, devices and address."""
    lines = []
    for node in dict.fromkeys(one["node"] for one in facts):
        ranks = [one for one in facts if one["node"] == node]
        device = ranks[0]["gpu"]["name"] if ranks[0]["gpu"] else "CPU"
        span = f"rank {ranks[0]['rank']}" if len(ranks) == 1 else f"ranks {ranks[0]['rank']}-{ranks[-1]['rank']}"
        lines.append(f"node {node}: {span}, {len(ranks)} x {device}, at {ranks[0]['address']}")
    return lines


def _local_facts(config: Config) -> dict[str, Any]:
    """What this rank sees; "problems" are for its user."""
    problems: list[str] = []
    facts = {
        "rank": launch_environment.launch_rank(),
        "node": node_name(),
        "machine": network.machine(),
        "address": network.gloo_address(),
        "interfaces": network.describe(),
        "versions": versions.describe_packages() | {"ddp_eval's code": digests.digest_code()},
        "gpu": None,
        "model": None,
    }
    for name, look in (("gpu", _look_at_gpu), ("model", _look_at_model)):
        try:
            facts[name] = look(config)
        except UserError as error:
            problems.append(str(error))
    if config.output_path and launch_environment.launch_local_rank() == 0:
        problems += _try_output(Path(config.output_path))
    return {**facts, "problems": problems}


def node_name() -> str:
    """What the site calls this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _look_at_gpu(config: Config) -> dict[str, Any] | None:
    """The GPU of this rank, tried out; None on the CPU. Raises UserError."""
    import torch

    device = choose_device(config.device, launch_environment.launch_local_rank())
    if device.type == "cpu":
        return None
    try:
        properties = torch.cuda.get_device_properties(device)
        ones = torch.ones(256, 256, device=device)
        right = bool((ones @ ones == 256).all().item())
    except RuntimeError as error:
        raise UserError(f"{device} cannot be used ({' '.join(str(error).split())[:200]})") from None
    if not right:
        raise UserError(f"{device} multiplies wrongly: take the node out of service")
    return {"name": properties.name, "memory_bytes": properties.total_memory, "uuid": str(getattr(properties, "uuid", ""))}


def _look_at_model(config: Config) -> dict[str, Any]:
    """What the checkpoint is on this node: {file: bytes} of a directory, or the hub's commit. Raises UserError."""
    from ddp_eval.engines.hf import checkpoint

    if "pretrained" not in config.model_args:
        return {}
    name = checkpoint.resolve_pretrained(config.model_args)
    if not os.path.isdir(name):
        if launch_environment.launch_local_rank() != 0:
            return {}
        return {"revision": getattr(checkpoint.load_config(config.loader_args), "_commit_hash", None)}
    try:
        files = {entry.name for entry in Path(name).iterdir() if not entry.is_dir()} | set(model_files.names_of_model(name))
        return {file: _try_reading(Path(name) / file) for file in sorted(files)}
    except OSError as error:
        raise UserError(f"{error.filename or name} of the model cannot be read ({error.strerror or error})") from None


def _try_reading(path: Path) -> int:
    """Its size. A byte is read at each end: a stale NFS handle shows only then."""
    size = path.stat().st_size
    with open_regular(path) as file:
        file.read(1)
        file.seek(max(0, size - 1))
        file.read(1)
    return size


def _try_output(path: Path) -> list[str]:
    try:
        existing = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
        if existing.is_dir() and os.access(existing, os.W_OK):
            return []
        reason = "it is a file" if not existing.is_dir() else f"no right to write in {existing}"
    except OSError as error:
        reason = error.strerror or str(error)
    return [f"--output_path {path} cannot be written to ({reason})"]


def _leave_marker(config: Config, stack: contextlib.ExitStack) -> str | None:
    """On rank 0: a file that every node should see, removed with its directory, if that is new, at the end; its path."""
    if not config.output_path or launch_environment.launch_rank() != 0:
        return None
    directory = Path(config.output_path).absolute()
    marker = directory / f".preflight-{uuid.uuid4().hex}{write.TEMPORARY_SUFFIX}"
    with contextlib.suppress(OSError):  # `_try_output` says so
        if not directory.exists():
            directory.mkdir(parents=True)
            stack.callback(_remove_if_empty, directory)
        marker.touch()
        stack.callback(marker.unlink, missing_ok=True)
    return str(marker)


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _probe(facts: Sequence[dict[str, Any]], mine: dict[str, Any]) -> dict[str, Any]:
    """What this rank finds out about others: nodes reach each other in a ring. The time comes first, while all are in step."""
    now = time.time()
    unreachable, sees_marker = None, True
    if launch_environment.launch_local_rank() == 0:
        others = _next_node(facts, mine)
        if others and not network.can_reach(others["address"], others["port"]):
            unreachable = f"node {others['node']} at {others['address']}"
        sees_marker = sees(facts[0]["marker"])
    return {"time": now, "unreachable": unreachable, "sees_marker": sees_marker}


def _next_node(facts: Sequence[dict[str, Any]], mine: dict[str, Any]) -> dict[str, Any] | None:
    """The facts of the first rank on the next node; None when there is one node."""
    firsts = list({one["node"]: one for one in reversed(facts)}.values())[::-1]
    here = [one["node"] for one in firsts].index(mine["node"])
    return firsts[(here + 1) % len(firsts)] if len(firsts) > 1 else None


def sees(marker: str | None) -> bool:
    """Whether this node sees a file or folder that another may have made this moment; waits some seconds for it."""
    deadline = time.monotonic() + _NFS_S
    while marker is not None and not os.path.exists(marker):
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(OSError):
            os.listdir(os.path.dirname(marker))  # makes NFS look again
        time.sleep(0.2)
    return True


def _differences(one: dict[str, Any], facts: Sequence[dict[str, Any]]) -> list[str]:
    """In which software and model files a rank's node differs from most nodes'."""
    found = []
    usual = _most_common(facts, "versions")
    for name in sorted({*one["versions"], *usual["versions"]}):
        here, there = one["versions"].get(name, "missing"), usual["versions"].get(name, "missing")
        if here != there:
            found.append(f"{name} {here} where node {usual['node']} has {there}")
    usual = _most_common(facts, "model")
    here, there = one["model"], usual["model"]
    if here and there and here != there:
        name = next(name for name in sorted({*here, *there}) if here.get(name) != there.get(name))
        found.append(f"{_of_model(name, here)} where node {usual['node']} has {_of_model(name, there)}")
    return found


def _most_common(facts: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """The facts of the first rank whose `key` most nodes share; of equally many, the one of the lowest rank."""
    of_node = {one["node"]: one for one in reversed(facts) if one[key]}
    if not of_node:
        return facts[0]
    values = [json.dumps(one[key], sort_keys=True) for one in facts if of_node.get(one["node"]) is one]
    most = max(values, key=values.count)
    return next(one for one in facts if json.dumps(one[key], sort_keys=True) == most)


def _of_model(name: str, files: dict[str, Any]) -> str:
    if name == "revision":
        return f"the model at revision {files.get(name)}"
    return f"a {name} of {files[name]} bytes" if name in files else f"no {name} in the model's directory"


def _shared_gpus(facts: Sequence[dict[str, Any]]) -> list[str]:
    owners: dict[tuple[str, str], int] = {}
    found = []
    for one in facts:
        if one["gpu"] and one["gpu"]["uuid"]:
            owner = owners.setdefault((one["node"], one["gpu"]["uuid"]), one["rank"])
            if owner != one["rank"]:
                found.append(f"node {one['node']}: ranks {owner} and {one['rank']} share one GPU")
    return found


def _exchange(name: str, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank has to say, in rank order. Raises UserError, naming the ranks that have said nothing."""
    with watchdog.waiting():
        texts = store.exchange(f"preflight/{name}", json.dumps(mine), EXCHANGE_S)
    silent = [rank for rank, text in enumerate(texts) if text is None]
    if silent:
        raise UserError(
            f"the node checks had nothing from rank {', '.join(map(str, silent))} for {EXCHANGE_S:.0f} s: look at its node's log"
        )
    return [json.loads(text) for text in texts if text is not None]


def _raise_problems(problems: list[str]) -> None:
    if problems:
        raise UserError(f"the node checks failed: {'; '.join(problems)}")
