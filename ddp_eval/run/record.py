"""What one run did, filled in as it becomes known; results.json, the manifest, telemetry and stderr are made of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddp_eval.config import Config
from ddp_eval.engines import Engine
from ddp_eval.engines.hf.costs import flops_of_pair_and_read, pad_lengths
from ddp_eval.engines.ops.peak import peak_flops
from ddp_eval.packs.batches import NO_TOKEN, Prompts
from ddp_eval.packs.plan import Plan, fed_tokens
from ddp_eval.packs.requests import Requests
from ddp_eval.run.execute import Gathered
from ddp_eval.run.planning import Decision, TextDecision, WorkPlan, describe_texts
from ddp_eval.run.replica import Replica

if TYPE_CHECKING:
    from ddp_eval.tasks.harness import Outcome


@dataclasses.dataclass
class Record:
    """Small facts of a run, in the order in which they become known. It keeps no requests, plans or answers: those are large.

    measured_layouts: of `--layout measure`, or None.
    facts:      of engine, plan and answers, as results.json and the manifest have them.
    costs:      what telemetry computes shares with, see `summary.summarize`.
    resumed:    packs and batches that earlier starts have finished.
    differing, texts_differing: nats and answers in which work that ran on two ranks differs.
    not_finite: see `tables.find_not_finite`.
    """

    measured_layouts: list[dict[str, Any]] | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    costs: dict[str, Any] = dataclasses.field(default_factory=dict)
    resumed: int = 0
    pieces: int = 0
    differing: float = 0.0
    texts_differing: int = 0
    not_finite: dict[str, Any] = dataclasses.field(default_factory=dict)

    def fill_plan(self, requests: Requests, prompts: Prompts, plan: WorkPlan, replica: Replica, model_config: Any) -> None:
        """What is to be done, and by which engine in which layout."""
        if self.measured_layouts is not None:
            self.facts["measured_layouts"] = self.measured_layouts
        self.facts.update(engine=replica.engine.describe(), layout=str(replica.layout), **describe_plan(plan.scoring, requests))
        if len(prompts):
            self.facts["requests"] += len(prompts)
            self.facts["generation"] = describe_texts(plan.generation, prompts)
        self.costs.update(describe_costs(plan.scoring.plan, replica, model_config))

    def fill_left(self, requests: Requests, plan: WorkPlan, left: np.ndarray) -> None:
        """left: ascending numbers of the packs and batches that this start runs."""
        self.resumed = plan.num_units - len(left)
        self.costs.update(describe_left(plan.scoring, requests, left))

    def fill_done(self, prompts: Prompts, plan: WorkPlan, done: Gathered) -> None:
        """done: by this start."""
        self.costs.update(describe_answered(plan.generation, prompts, done.lengths))

    def fill_answers(
        self, differing: float, nan_recovered: int, splits: np.ndarray, texts: list[list[int]], texts_differing: int
    ) -> None:
        """What came out, of earlier starts too. texts: tokens of each distinct answer."""
        self.facts["nan_recovered"] = nan_recovered
        if "generation" in self.facts:
            self.facts["generation"] |= {
                "generated_tokens": sum(len(text) - text.count(NO_TOKEN) for text in texts),
                "repeated_answers_differ": texts_differing,
            }
        self.facts["repeated_packs_differ_nats"] = self.differing = differing
        self.facts["packs_split"] = {str(index): pieces for index, pieces in splits.tolist()}
        self.pieces, self.texts_differing = len(splits), texts_differing


class NoFacts(Record):
    """For callers that keep no facts of plan and costs, which take time over many small calls."""

    def fill_plan(self, requests: Requests, prompts: Prompts, plan: WorkPlan, replica: Replica, model_config: Any) -> None:
        pass

    def fill_left(self, requests: Requests, plan: WorkPlan, left: np.ndarray) -> None:
        pass

    def fill_done(self, prompts: Prompts, plan: WorkPlan, done: Gathered) -> None:
        pass


def find_plan_warnings(config: Config, plan: WorkPlan) -> list[str]:
    """What of a plan is slower than a user expects, unless a flag asks for it."""
    found = []
    if plan.scoring.why_rows and config.packing and config.numerics != "alone":
        found.append(f"packs are off for this model: {plan.scoring.why_rows}; running {plan.scoring.instead}")
    if plan.generation.why_alone and config.packing and config.numerics != "alone":
        found.append(f"this model generates one answer at a time: {plan.generation.why_alone}")
    return found


def find_outcome_warnings(record: Record) -> list[str]:
    """What of the answers may differ in another run."""
    found = []
    if record.texts_differing:
        found.append(f"{record.texts_differing} answers that ran on two ranks differ: are the ranks' GPUs or threads not alike?")
    if record.pieces:
        found.append(f"{record.pieces} packs did not fit the memory and ran in pieces: scores may round otherwise")
    if record.differing:
        found.append(
            f"packs that ran on two ranks differ by up to {record.differing:.2g} nats: are the ranks' GPUs or threads not alike?"
        )
    return found


def results_section(record: Record, outcome: Outcome, phases_s: dict[str, float]) -> dict[str, Any]:
    """The "ddp_eval" section of results.json."""
    return {**_facts(record, outcome), "irregular": outcome.irregular, "phases_s": phases_s}


def manifest_facts(record: Record, outcome: Outcome) -> dict[str, Any]:
    """What the manifest says of engine, plan, prompts and answers."""
    more = {name: outcome.prompts[name] for name in ("prompts_by_task", "documents_by_task")}
    return {**_facts(record, outcome), **more, "task_files": outcome.task_files, "resumed_packs": record.resumed}


def workload(record: Record, device: torch.device, engine: Engine) -> dict[str, Any]:
    """What `summary.summarize` needs beside the ranks' reports."""
    return {**record.facts, **record.costs, "peak": peak_flops(device, engine.dtype)}


def _facts(record: Record, outcome: Outcome) -> dict[str, Any]:
    return {**record.facts, "not_finite": record.not_finite, "prompts_sha256": outcome.prompts["prompts_sha256"]}


def describe_plan(decision: Decision, requests: Requests) -> dict[str, Any]:
    plan = decision.plan
    return {
        "plan_sha256": plan.digest(),
        "batching": plan.kind,
        "why_rows": decision.why_rows,
        "requests": len(requests),
        "distinct_requests": plan.num_items,
        "packs": plan.num_packs,
        "request_tokens": int((np.diff(requests.starts) - 1).sum()),
        "computed_tokens": len(plan.tokens),
    }


def describe_costs(plan: Plan, replica: Replica, model_config: Any) -> dict[str, Any]:
    """What telemetry computes shares with. flops_per_…: of one rank, which has its part in every token of its replica."""
    pad = functools.partial(pad_lengths, replica.engine.describe().get("attention"))
    pair, read = flops_of_pair_and_read(model_config.get_text_config())
    return {
        "weights_bytes": replica.engine.describe()["parameters"] * replica.engine.dtype.itemsize,
        "fed_tokens": fed_tokens(plan, pad),
        "ranks_per_replica": replica.world.ranks_per_replica,
        "flops_per_token": replica.engine.flops_per_token() / replica.world.ranks_per_replica,
        "flops_per_pair": pair / replica.world.ranks_per_replica,
        "flops_per_read": read / replica.world.ranks_per_replica,
    }


def describe_left(decision: Decision, requests: Requests, left: np.ndarray) -> dict[str, int]:
    """Of the packs that this start runs: the tokens that they hold, and those of the requests that they answer."""
    plan = decision.plan
    packs = left[left < plan.num_packs]
    pack_of_request = np.searchsorted(plan.item_starts, decision.item_of_request, side="right") - 1
    asked = (np.diff(requests.starts) - 1)[np.isin(pack_of_request, packs)].sum()
    return {"left_tokens": int(np.diff(plan.token_starts)[packs].sum()), "left_request_tokens": int(asked)}


def describe_answered(generation: TextDecision, prompts: Prompts, lengths: np.ndarray) -> dict[str, int]:
    """Tokens of the prompts that this start answered, and of its answers; those of two ranks twice. lengths: as in Gathered."""
    times = np.bincount(lengths[:, 0], minlength=generation.plan.num_items)
    prompt_lengths = np.array([len(prompt) for prompt in prompts.tokens], dtype=np.int64)
    return {
        "asked_tokens": int((prompt_lengths * times[generation.item_of_prompt]).sum()),
        "generated_tokens": int(lengths[:, 1].sum()),
    }
