"""Rank 0's part of a run: lm_eval builds the requests, all ranks answer them, lm_eval computes metrics, the files are written.

lm_eval owns the outer loop: it calls `answer` once, with everything that it asks.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ddp_eval import demo
from ddp_eval import layout as layouts
from ddp_eval.config import Config
from ddp_eval.distributed import collectives, watchdog
from ddp_eval.distributed.messages import Followers, Journals
from ddp_eval.engines import registry
from ddp_eval.engines.hf import checkpoint, limits
from ddp_eval.errors import UserError
from ddp_eval.output import documents, tables, versions, write
from ddp_eval.output.directory import Directory
from ddp_eval.output.journal import RecoveredWork
from ddp_eval.output.lm_eval_names import SECTION, choose_names
from ddp_eval.packs.batches import Prompts
from ddp_eval.packs.plan import PACKS, Plan, empty_plan
from ddp_eval.packs.requests import Requests
from ddp_eval.packs.results import Results, fill_slots
from ddp_eval.placement.choose import check_texts, evaluate_layouts, ranks_of
from ddp_eval.placement.load import load_replica
from ddp_eval.placement.memory import measure_model
from ddp_eval.placement.speed import Amount
from ddp_eval.run import nan_retry
from ddp_eval.run.execute import Gathered, fill_texts, run_plan
from ddp_eval.run.manifest import describe_run, model_info
from ddp_eval.run.planning import WorkPlan, make_plan, plan_texts
from ddp_eval.run.record import Record, find_outcome_warnings, find_plan_warnings, manifest_facts, results_section, workload
from ddp_eval.run.replica import LoadedReplica, PendingReplica, Replica
from ddp_eval.run.resume import journal_key, log_resume, warn_nonfinite
from ddp_eval.run.self_check import ScorePlan
from ddp_eval.run.try_layouts import measure_layouts
from ddp_eval.tasks.plan_memo import PlanMemo
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.telemetry import summary

if TYPE_CHECKING:
    from ddp_eval.tasks.harness import Outcome
    from ddp_eval.tasks.kept_setup import KeptSetup
    from ddp_eval.tasks.request_types import Answers, Asked

log = logging.getLogger("ddp_eval")

Inspect = Callable[[dict[str, Any]], None]


def accept_all(found: dict[str, Any]) -> None:
    """An `Inspect` that stops no run."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What does not change during a run.

    directory: keeps finished packs, or is a NoDirectory. replica: the model, which may still be loading.
    inspect: given {"model": digests, "packages": versions, and the fingerprints of prompts} before anything is scored; may raise
        UserError to stop the run. None looks at nothing.
    kept: the set-up that evaluations of this process leave to each other.
    """

    config: Config
    followers: Followers
    directory: Directory
    model_config: Any
    encoder: Encoder
    replica: PendingReplica | LoadedReplica
    inspect: Inspect | None = None
    kept: KeptSetup | None = None

    @property
    def plans(self) -> PlanMemo:
        """Those of earlier evaluations, as far as any are kept."""
        return self.kept.plans if self.kept is not None else PlanMemo()


def make_encoder(config: Config, model_config: Any, tokenizer: Any) -> Encoder:
    """Raises UserError for a window or a prefix token that cannot be."""
    from ddp_eval.tasks import harness

    model_args = config.model_args
    max_length = harness.max_length_of(model_args, checkpoint.window_config(model_config), tokenizer)
    max_length = registry.spec_of(config.model).longest_input(model_args, max_length)
    try:
        return Encoder(
            tokenizer,
            max_length,
            model_args.get("add_bos_token"),
            model_args.get("prefix_token_id"),
            separate=checkpoint.is_seq2seq(model_args, model_config),
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def lead(job: Job) -> dict[str, Any]:
    """Build the requests, have all ranks score them, compute metrics and write the run directory. Returns the results."""
    from ddp_eval.tasks import harness

    record = Record()
    outcome = harness.evaluate_tasks(
        job.config,
        job.encoder,
        job.model_config,
        lambda asked: answer_and_keep(job, asked, record),
        job.followers.world.meter.phases,
        [demo.TASKS_PATH],
        job.replica.check,
        job.kept,
    )
    return write_results(job, outcome, record)


def answer_and_keep(job: Job, asked: Asked, record: Record) -> Answers:
    """`answer`, and the tables written before metrics are computed: those run the tasks' own code, which may fail."""
    if job.inspect is not None:
        watchdog.step("reading the model's files")
        job.inspect({"model": job.replica.digests(), "packages": versions.describe_packages(), **asked.fingerprints})
    answers = answer(job, asked.requests, asked.prompts, record)
    job.directory.check()
    scores, texts = asked.tables(answers)
    record.not_finite = tables.find_not_finite(scores, texts)
    warn_nonfinite(record.not_finite)
    if job.config.output_path:
        tables.write_scores(job.config.output_path, scores)
        if len(texts):
            tables.write_texts(job.config.output_path, texts)
    return answers


def answer(job: Job, requests: Requests, prompts: Prompts, record: Record) -> Answers:
    """All requests of all tasks, once: log-probabilities of `requests`, texts for `prompts`, on all ranks."""
    replica = wait_for_replica(job, requests, prompts)
    plan = plan_work(job, requests, prompts, replica)
    record.measured_layouts = fastest_layout(job, replica, plan.scoring.plan)
    record.fill_plan(requests, prompts, plan, replica, job.model_config)
    log_all(find_plan_warnings(job.config, plan))
    todo = recover(job, plan, replica)
    record.fill_left(requests, plan, todo.left)
    done = execute(job, plan, replica, todo)
    record.fill_done(prompts, plan, done)
    return collect(job, requests, plan, replica, join_found(todo.found, done), record)


def wait_for_replica(job: Job, requests: Requests, prompts: Prompts) -> Replica:
    """The model, and all of its work held against its limits. Raises UserError for what it cannot do."""
    config, world = job.config, job.followers.world
    if len(prompts):
        check_texts(config, job.followers.layout, prompts.tasks[0] or "given")
    watchdog.step("loading the model", detail=job.replica.source)
    with world.meter.phases("load"):
        replica = job.replica.wait()
    if config.numerics == "fp32" and replica.engine.dtype != torch.float32:
        raise UserError(f"--numerics fp32 needs a model in float32, this one is in {replica.engine.dtype}")
    replica.log_choice()
    limits.check_requests(requests, prompts, replica.engine, config.model_args)
    return replica


def plan_work(job: Job, requests: Requests, prompts: Prompts, replica: Replica) -> WorkPlan:
    """Packs and batches, in the form that the model has proved itself to run rightly."""
    config = job.config
    watchdog.step("planning")
    with job.followers.world.meter.phases("plan"):
        alone, trial = config.numerics == "alone", probe_scorer(job.followers, replica)
        scoring = make_plan(replica.engine, requests, config.packing, config.max_pack_tokens, alone, trial, job.plans)
        why = "--numerics alone was given" if alone else None if config.packing else "--no_packing was given"
        pad = job.encoder.tokenizer.pad_token_id
        if len(prompts) and replica.world.ranks_per_shard > 1:
            run_extra(job.followers, replica, empty_plan(PACKS), "trial", asks="why_not_batches")
        return WorkPlan(scoring, plan_texts(replica.engine, prompts, pad, why, job.plans))


def fastest_layout(job: Job, replica: Replica, plan: Plan) -> list[dict[str, Any]] | None:
    """`--layout measure`: leave `replica` in the layout that is fastest on some of the work. Returns what was measured.

    None where nothing is: with one rank, or where unfinished work was begun in this layout.
    """
    config, world = job.config, job.followers.world
    if config.layout != layouts.MEASURE or world.world_size == 1 or job.directory.layout == str(replica.layout):
        return None
    with world.meter.phases("measure"):
        whole = checkpoint.whole_model(config.loader_args, job.model_config)
        amount = Amount(len(plan.tokens), len(plan.targets), plan.num_packs)
        candidates = evaluate_layouts(whole, ranks_of(config, world), amount)
        found = measure_layouts(
            job.followers, replica, plan, candidates, measure_model(whole, world.device),
            lambda world, layout: load_replica(config, job.model_config, world, layout),
        )  # fmt: skip
    return [{**one._asdict(), "layout": str(one.layout)} for one in found]


class Todo(NamedTuple):
    """found: of earlier starts. left: ascending numbers of the packs and batches that are not done. journals: of this start."""

    found: RecoveredWork
    left: np.ndarray
    journals: Journals | None


def recover(job: Job, plan: WorkPlan, replica: Replica) -> Todo:
    """What earlier starts have finished of this very work, and what is left of it."""
    scoring, texts = plan.scoring.plan, plan.generation.plan

    def make_key() -> bytes:
        watchdog.step("reading the model's files")
        return journal_key(scoring, texts, replica.engine.describe(), replica.world, job.replica.digests())

    job.directory.check()
    found, kept = job.directory.resume(make_key, scoring.item_starts, texts.item_starts, str(replica.layout))
    journals = Journals(*kept) if kept is not None else None
    job.directory.begin_replacing(job.config, str(replica.layout))
    log_resume(found, plan.num_requests, replica.world)
    return Todo(found, np.delete(np.arange(plan.num_units), found.packs), journals)


def execute(job: Job, plan: WorkPlan, replica: Replica, todo: Todo) -> Gathered:
    """Have all ranks run what is left, each its share."""
    watchdog.step(watchdog.WAITING)  # a rank may still load the model
    try:
        with job.followers.working_on(
            plan.scoring.plan,
            todo.left,
            todo.journals,
            texts=plan.generation.plan,
            tokenizer=job.encoder.tokenizer if plan.generation.plan.num_batches else None,
            attention=replica.engine.tree_attention,
        ) as work:
            return run_plan(replica.world, replica.engine, work, job.directory.check)
    except collectives.FailedTogether:
        job.directory.check()  # a lost one is why, and no failure of the model
        raise


def join_found(found: RecoveredWork, done: Gathered) -> Gathered:
    """What earlier starts have left in journals, and what this one has brought."""
    earlier = found.results, found.splits, found.lengths, found.answers
    return Gathered(*(np.concatenate(parts) for parts in zip(earlier, done, strict=True)))


def collect(job: Job, requests: Requests, plan: WorkPlan, replica: Replica, gathered: Gathered, record: Record) -> Answers:
    """Every request's answer. Checks that none is missing, and scores again alone what came out NaN in a pack."""
    from ddp_eval.tasks.request_types import Answers

    results, differing = fill_slots(gathered.results, plan.scoring.plan.num_items)
    results, saved = nan_retry.rescore_nan(
        results, requests, plan.scoring, replica.engine, lambda small: run_extra(job.followers, replica, small, "again")
    )
    texts, texts_differing = fill_texts(gathered.lengths, gathered.answers, plan.generation.plan.num_items)
    record.fill_answers(differing, saved, gathered.splits, texts, texts_differing)
    watchdog.step("computing the metrics")
    log_all(find_outcome_warnings(record))
    answered = [texts[item] for item in np.asarray(plan.generation.item_of_prompt).tolist()]
    return Answers(results[plan.scoring.item_of_request], answered, plan.generation.limits)


def write_results(job: Job, outcome: Outcome, record: Record) -> dict[str, Any]:
    """Stamp the results with what the run did, and write the run directory where there is one."""
    config, world = job.config, job.followers.world
    results, phases = outcome.results, world.meter.phases
    samples = results.pop("samples")
    results["config"].update(model_info(config, job.model_config, record.facts["engine"]))
    results["config"]["device"] = config.device or str(world.device)
    results["ddp_eval"] = results_section(record, outcome, phases.seconds)
    if config.output_path:
        results["ddp_eval"][SECTION] = choose_names(results)

    def measure() -> dict[str, Any]:
        measured = summary.summarize(job.followers.collect_telemetry(), workload(record, world.device, job.replica.wait().engine))
        world.meter.reset()
        return measured

    if config.log_samples or config.predict_only:
        results["samples"] = samples
    job.directory.check()
    with phases("write"):
        if config.output_path:
            watchdog.step("writing the results")
            if not config.predict_only:
                tables.write_documents(config.output_path, documents.describe_documents(samples))
            manifest = describe_run(config, world, results, manifest_facts(record, outcome), job.replica.digests())
            measured = write.write_run(config.output_path, results, manifest, results.get("samples"), measure)
            job.directory.finish()
        else:
            measured = measure()
    results["ddp_eval"]["telemetry"] = measured
    return results


def probe_scorer(followers: Followers, replica: Replica) -> ScorePlan | None:
    """How trial plans are scored where a copy of the model lies on several ranks: by all of them, like the run itself."""
    if replica.world.ranks_per_replica == 1 and replica.world.ranks_per_shard == 1:
        return None
    return lambda plan: run_extra(followers, replica, plan, "trial")["logprob"]


def run_extra(followers: Followers, replica: Replica, plan: Plan, phase: str, asks: str = "") -> Results:
    """Have all ranks run a small plan beside the run's own. Returns the results of its items, in their order.

    asks: see `messages.Work`.
    """
    with followers.working_on(plan, phase=phase, attention=replica.engine.tree_attention, asks=asks) as work:
        gathered = run_plan(replica.world, replica.engine, work).results
    return fill_slots(gathered, plan.num_items)[0]


def log_all(sentences: list[str]) -> None:
    for sentence in sentences:
        log.warning("%s", sentence)
