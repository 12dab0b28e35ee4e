"""What the leader says and decides about work that is done already, and about numbers that are none."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
from typing import Any

import numpy as np
import torch
import transformers

from ddp_eval.distributed.world import World
from ddp_eval.output.journal import RecoveredWork, work_key
from ddp_eval.packs.batches import TextPlan
from ddp_eval.packs.plan import Plan
from ddp_eval.run.execute import describe_origin
from ddp_eval.run.manifest import FILES
from ddp_eval.system.digests import digest_code

log = logging.getLogger("ddp_eval")


# What of this package decides numbers, given a plan: all that engines and execution use, but for what a test names with its
# reason. A change in a report need not undo hours of packs.
_CODE = (
    "distributed/collectives.py", "distributed/contact.py", "distributed/messages.py", "distributed/sharding.py",
    "distributed/world.py", "engines", "errors.py", "layout.py", "packs", "placement/data_parallel.py",
    "placement/fully_sharded.py", "placement/kinds.py", "placement/load.py", "placement/pipeline_parallel.py",
    "placement/tensor_parallel.py", "run/execute.py", "run/self_check.py", "system/tokenizer_calls.py",
)  # fmt: skip
# What else computes, where it is installed: adapters, quantised layers, kernels, and the text in which stop strings are sought.
_PACKAGES = (
    "accelerate", "bitsandbytes", "causal-conv1d", "compressed-tensors", "flash-attn", "gptqmodel", "kernels", "mamba-ssm",
    "numpy", "optimum", "peft", "tokenizers", "triton",
)  # fmt: skip


def journal_key(plan: Plan, texts: TextPlan, engine: dict[str, Any], world: World, model: dict[str, Any]) -> bytes:
    """The key of journals: results under one key may be mixed, whatever the number of ranks.

    engine: what the engine says of itself. model: with whole digests of its files, which a copy elsewhere shares.
    """
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "ddp_eval": digest_code(_CODE)}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    files = {kind: (model.get(kind) or {}).get("sha256") for kind in FILES}
    if files["model_files"] is None:  # out of reach: the hub's commit says as much, else nothing may be mixed
        files["model_files"] = model.get("revision") or os.urandom(16).hex()
    plans = {"plan": plan.digest(), "texts": texts.digest()}
    return work_key({**plans, "engine": engine, "device": world.device.type, "model": files, "versions": versions})


def log_resume(found: RecoveredWork, num_requests: np.ndarray, world: World) -> None:
    """Say how much of the work is done, what was dropped, and whether other hardware did it.

    num_requests: of each pack and batch.
    """
    for note in found.notes:
        log.warning("%s", note)
    if not len(found.packs):
        return
    done = int(num_requests[found.packs].sum())
    log.warning(
        "resuming: %d of %d packs are done (%d of %d requests), %d packs are left",
        *(len(found.packs), len(num_requests), done, int(num_requests.sum()), len(num_requests) - len(found.packs)),
    )
    others = [origin for origin in found.origins if origin != describe_origin(world)]
    if others:
        log.warning(
            "packs that are done were computed on %s, the others will be on %s: the last bits of the numbers may differ",
            " and ".join(others),
            describe_origin(world),
        )


def warn_nonfinite(tasks: dict[str, dict[str, Any]]) -> None:
    """Say which requests met numbers that are NaN or infinite. tasks: from `tables.find_not_finite`."""
    for task, found in tasks.items():
        first = ", ".join(f"document {document} choice {choice}" for document, choice in found["first"])
        log.warning(
            "%d requests of the task %s came to numbers that are NaN or infinite (%s%s): do not trust its metrics",
            found["requests"],
            task,
            first,
            ", ..." if found["requests"] > len(found["first"]) else "",
        )
