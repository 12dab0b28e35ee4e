"""A run from start to end: who does what, in order. Read this first.

rank 0                                             ranks 1 … N-1
  choose the layout (layout.py) ────────────────────► hear it
  load the replica (tasks and prompts meanwhile)     load the replica, or this rank's part of one
  lm_eval builds every request once                  wait
  tokenise, check packs, plan                        wait
  send the plan ────────────────────────────────────► receive it
  DistributedSampler -> my packs, run them           DistributedSampler -> my packs, run them
  all_gather (item, log-probability, greedy) ◄──────► all_gather
  coverage check; lm_eval scores; write              wait
  say stop ─────────────────────────────────────────► leave
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from ddp_eval import demo
from ddp_eval import layout as layouts
from ddp_eval.config import Config
from ddp_eval.distributed import store, watchdog
from ddp_eval.distributed.messages import Followers, Journals, Load, await_begin, next_work
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine, vllm
from ddp_eval.engines.hf import checkpoint, limits
from ddp_eval.engines.hf.costs import flops_of_pair_and_read, pad_lengths
from ddp_eval.engines.load import brings_code, lay_out, load_replica
from ddp_eval.engines.ops.peak import peak_flops
from ddp_eval.errors import UserError
from ddp_eval.layout import Layout
from ddp_eval.output import directory as run_directory
from ddp_eval.output import documents, status, tables, write
from ddp_eval.output.directory import RunDirectory
from ddp_eval.output.irregular import log_irregular
from ddp_eval.output.lm_eval_names import SECTION, choose_names
from ddp_eval.packs.batches import NO_TOKEN, Prompts
from ddp_eval.packs.plan import Plan, fed_tokens
from ddp_eval.packs.requests import Requests
from ddp_eval.placement.choose import check_texts, choose_layout, consider, ranks_of
from ddp_eval.placement.memory import measure_model
from ddp_eval.placement.speed import Amount
from ddp_eval.run import nan_retry
from ddp_eval.run.execute import Gathered, fill_slots, fill_texts, run_plan
from ddp_eval.run.manifest import (
    describe_run,
    describe_steady_model,
    is_same_model,
    look_at_model,
    model_info,
)
from ddp_eval.run.planning import TextDecision, describe_texts, plan_texts
from ddp_eval.run.resume import name_work, tell_found, warn_of_not_finite
from ddp_eval.run.self_check import Decision, ScorePlan, make_plan
from ddp_eval.run.try_layouts import Seated, load_together, measure_layouts
from ddp_eval.system import hub, machine
from ddp_eval.tasks import trackers
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.telemetry import summary
from ddp_eval.telemetry.sampler import Sampler

log = logging.getLogger("ddp_eval")


Inspect = Callable[[dict[str, Any]], None]


def run(config: Config, world: World, inspect: Inspect | None = None) -> dict[str, Any] | None:
    """Evaluate as a command does: load the model, evaluate, write the run directory.

    inspect: given, before anything is scored, what `_lead` knows of model and prompts; may raise UserError to stop the run.
    Returns the results on rank 0, None elsewhere. Raises UserError on the rank that finds what the user must mend.
    """
    with Sampler(world.meter, world.device):
        if not world.is_leader:
            watchdog.step(watchdog.WAITING)
            if (begin := await_begin(world)) is None:
                return None
            watchdog.of_run(begin.directory)
            watchdog.step("loading the model", detail=_source(config))
            with world.meter.phases("load"):
                model_config = checkpoint.load_config(config.loader_args)
            follow(world, lambda world, layout: load_replica(config, model_config, world, layout))
            return None
        watchdog.step("opening what the results are logged to")
        with Followers(world) as followers, trackers.tracking(config) as track:
            outcome = _lead_run(config, world, followers, inspect)
            watchdog.step("logging the results")
            track(outcome)
            return outcome


def _lead_run(config: Config, world: World, followers: Followers, inspect: Inspect | None) -> dict[str, Any]:
    """The leader's part of `run`: see what the run directory holds, then begin, or go on, unless all is done."""
    watchdog.step(f"looking into the run directory {config.output_path or ''}".rstrip())
    finished = run_directory.find_finished(config, lambda manifest: is_same_model(manifest, config.loader_args), watchdog.renew)
    if finished is not None:
        log.warning("%s holds this very run, complete: nothing is left to do (--fresh starts over)", config.output_path)
        warn_of_not_finite(finished["ddp_eval"].get("not_finite", {}))
        log_irregular(finished["ddp_eval"].get("irregular", {}))
        return finished
    if not config.output_path:
        followers.begin(None)
        return _load_and_lead(config, None, world, followers, inspect)
    directory = run_directory.open_directory(config, lambda: _lose_directory(str(config.output_path)), watchdog.renew)
    watchdog.of_run(directory.path)
    watchdog.before_leaving(directory.close)
    with contextlib.closing(directory):
        followers.begin(directory.path)
        return _load_and_lead(config, directory, world, followers, inspect)


def _lose_directory(path: str) -> None:
    """From the thread that keeps the lock: the run directory is no longer ours to write to."""
    watchdog.of_run(None)
    store.report_once(f"--output_path {path} was deleted or taken over by another run: this one ends; start it again")
    watchdog.leave(2, status.FAILED, "")


def _load_and_lead(
    config: Config, directory: RunDirectory | None, world: World, followers: Followers, inspect: Inspect | None
) -> dict[str, Any]:
    """Weights load in a thread of their own while lm_eval builds the prompts."""
    watchdog.step("reading the model's config and tokenizer", detail=_source(config))
    with world.meter.phases("load"):
        model_config = checkpoint.load_config(config.loader_args)
        limits.check_window(config.loader_args, model_config)
        layout, why = choose_layout(config, model_config, world, directory.layout if directory else None)
        tokenizer = checkpoint.load_tokenizer(config.loader_args)
    followers.load(layout)
    seated: Future[Seated] = Future()
    digests: Future[dict[str, Any]] = Future()

    before = look_at_model(config.loader_args)

    def load() -> None:
        laid_out = lay_out(world, layout)
        with world.meter.background("load"):
            _fulfil(seated, lambda: Seated(laid_out, layout, load_replica(config, model_config, laid_out, layout), why))
        _fulfil(digests, lambda: describe_steady_model(config.loader_args, getattr(model_config, "_commit_hash", None), before))

    # lm_eval's imports come first: two threads that import the same packages can meet half-made modules.
    with world.meter.phases("start"):
        from ddp_eval.tasks import harness  # noqa: F401

    loader = threading.Thread(target=load, daemon=True)
    loader.start()
    if brings_code(config, model_config):  # which may draw from, or seed, what prompts are drawn from
        watchdog.step("loading the model", detail=_source(config))
        loader.join()
    watchdog.step("building the prompts")

    def go_on() -> None:
        watchdog.renew()
        if seated.done():
            seated.result()

    return _lead(config, directory, followers, model_config, tokenizer, seated.result, digests.result, inspect, go_on)


def _source(config: Config) -> str:
    """Where the model comes from, for those who wait for it."""
    name = str(config.model_args.get("pretrained") or "")
    return name if not name or name == "demo" or os.path.isabs(name) else hub.describe_source(name)


def _lead(
    config: Config,
    directory: RunDirectory | None,
    followers: Followers,
    model_config: Any,
    tokenizer: Any,
    get_seated: Callable[[], Seated],
    get_digests: Callable[[], dict[str, Any]],
    inspect: Inspect | None = None,
    go_on: Callable[[], None] = watchdog.renew,
) -> dict[str, Any]:
    """Build the requests, have all ranks score them, compute metrics and write the run directory.

    directory: where finished packs are kept and found; None keeps none.
    go_on: called often while the prompts are built; may raise what another thread failed of.
    inspect: given {"model": digests, "packages": versions, and `harness.describe_prompts`} before anything is scored.
    """
    from ddp_eval.tasks import harness
    from ddp_eval.tasks.request_types import Answers, Asked

    world, phases = followers.world, followers.world.meter.phases
    model_args = config.model_args
    max_length = harness.max_length_of(model_args, model_config, tokenizer)
    if config.model == "vllm":
        max_length = vllm.longest_input(model_args, max_length)
    try:
        encoder = Encoder(
            tokenizer,
            max_length,
            model_args.get("add_bos_token"),
            model_args.get("prefix_token_id"),
            separate=checkpoint.is_seq2seq(model_args, model_config),
        )
    except ValueError as error:
        raise UserError(str(error)) from None

    facts: dict[str, Any] = {}
    resumed: list[int] = []
    costs: dict[str, Any] = {}

    def look(prompts: dict[str, Any]) -> None:
        if inspect is not None:
            watchdog.step("reading the model's files")
            inspect({"model": get_digests(), "packages": machine.describe_packages(), **prompts})

    def score(requests: Requests, prompts: Prompts) -> Answers:
        if len(prompts):
            check_texts(config, followers.layout, prompts.tasks[0])
        watchdog.step("loading the model", detail=_source(config))
        with phases("load"):
            seated = get_seated()
        engine = seated.engine
        if config.numerics == "fp32" and engine.dtype != torch.float32:
            raise UserError(f"--numerics fp32 needs a model in float32, this one is in {engine.dtype}")
        if seated.why and world.world_size > 1:
            log.warning("layout %s: %s (%s)", seated.layout, seated.layout.sentence(world.world_size), seated.why)
        limits.check_requests(requests, prompts, engine, model_args)
        watchdog.step("planning")
        with phases("plan"):
            alone, trial = config.numerics == "alone", trial_of(followers, seated)
            decision = make_plan(engine, requests, config.packing, config.max_pack_tokens, alone, trial)
            why = "--numerics alone was given" if alone else None if config.packing else "--no_packing was given"
            generation = plan_texts(engine, prompts, encoder.tokenizer.pad_token_id, why)
            num_requests = np.concatenate([decision.plan.num_requests, generation.plan.num_requests])
        del engine  # `_measure` may put another in its place
        kept = directory is not None and directory.layout == str(seated.layout)
        if config.layout == layouts.MEASURE and world.world_size > 1 and not kept:
            with phases("measure"):
                facts["measured_layouts"] = _measure(config, model_config, followers, seated, decision.plan)
        facts.update(engine=seated.engine.describe(), layout=str(seated.layout), **_describe_plan(decision, requests))
        if len(prompts):
            facts["requests"] += len(prompts)
            facts["generation"] = describe_texts(generation, prompts)
        costs.update(_describe_costs(decision.plan, seated, model_config))
        if decision.why_rows and config.packing and not alone:
            log.warning("packs are off for this model: %s; running padded rows instead", decision.why_rows)
        if generation.why_alone and not why:
            log.warning("this model generates one answer at a time: %s", generation.why_alone)
        journals, found = None, None
        if directory is not None:
            watchdog.step("reading the model's files")
            key = name_work(decision.plan, generation.plan, seated.engine.describe(), seated.world, get_digests())
            found = directory.recover(key, decision.plan.item_starts, generation.plan.item_starts)
            journals = Journals(directory.journals, key)
            directory.obeyed(config, str(seated.layout))
            tell_found(found, num_requests, seated.world)
        done = found.packs if found else np.zeros(0, dtype=np.int64)
        left = np.delete(np.arange(len(num_requests)), done)
        costs.update(_describe_left(decision, requests, left))
        decoder = encoder.tokenizer if len(prompts) else None
        watchdog.step(watchdog.WAITING)  # a rank may still load the model
        trees = seated.engine.tree_attention
        with followers.working_on(
            decision.plan, left, journals, texts=generation.plan, tokenizer=decoder, attention=trees
        ) as work:
            gathered = run_plan(seated.world, seated.engine, work)
        costs.update(_describe_answered(generation, prompts, gathered.lengths))
        if found:
            earlier = found.rows, found.halved, found.lengths, found.answers
            gathered = Gathered(*(np.concatenate(parts) for parts in zip(earlier, gathered, strict=True)))
        sums, greedy, differing = fill_slots(gathered.rows, decision.plan.num_items)
        (sums, greedy), facts["saved_from_nan"] = nan_retry.isolate(
            (sums, greedy), requests, decision, seated.engine, lambda plan: run_aside(followers, seated, plan, "again")
        )
        texts, texts_differing = fill_texts(gathered.lengths, gathered.answers, generation.plan.num_items)
        resumed.append(len(done))
        if len(prompts):
            facts["generation"] |= {
                "generated_tokens": sum(len(text) - text.count(NO_TOKEN) for text in texts),
                "repeated_answers_differ": texts_differing,
            }
        if texts_differing:
            log.warning("%d answers that ran on two ranks differ: are the ranks' GPUs or threads not alike?", texts_differing)
        watchdog.step("computing the metrics")
        if len(gathered.halved):
            log.warning("%d packs did not fit the memory and ran in pieces: scores may round otherwise", len(gathered.halved))
        if differing:
            log.warning(
                "packs that ran on two ranks differ by up to %.2g nats: are the ranks' GPUs or threads not alike?", differing
            )
        facts["repeated_packs_differ_nats"] = differing
        facts["packs_halved"] = {str(index): pieces for index, pieces in gathered.halved.tolist()}
        answers = [texts[item] for item in generation.item_of_prompt.tolist()]
        return Answers(sums[decision.item_of_request], greedy[decision.item_of_request], answers, generation.limits)

    def keep(scores: tables.Scores, texts: tables.Texts) -> None:
        facts["not_finite"] = tables.find_not_finite(scores, texts)
        warn_of_not_finite(facts["not_finite"])
        if config.output_path:
            tables.write_scores(config.output_path, scores)
            if len(texts):
                tables.write_texts(config.output_path, texts)

    def answer(asked: Asked) -> Answers:
        look(asked.fingerprints)
        answers = score(asked.requests, asked.prompts)
        keep(*asked.tables(answers))
        return answers

    outcome = harness.evaluate_tasks(config, encoder, model_config, answer, phases, [demo.TASKS_PATH], go_on)
    samples = outcome.results.pop("samples")
    outcome.results["config"].update(model_info(config, model_config, facts["engine"]))
    outcome.results["config"]["device"] = config.device or str(world.device)
    facts["prompts_sha256"] = outcome.prompts["prompts_sha256"]
    outcome.results["ddp_eval"] = {**facts, "irregular": outcome.irregular, "phases_s": phases.seconds}
    if config.output_path:
        outcome.results["ddp_eval"][SECTION] = choose_names(outcome.results)

    def measure() -> dict[str, Any]:
        peak = peak_flops(world.device, get_seated().engine.dtype)
        measured = summary.summarize(followers.measure(), {**facts, **costs, "peak": peak})
        world.meter.reset()
        return measured

    if config.log_samples or config.predict_only:
        outcome.results["samples"] = samples
    with phases("write"):
        if config.output_path:
            watchdog.step("writing the results")
            if not config.predict_only:
                tables.write_documents(config.output_path, documents.describe_documents(samples))
            more = {name: outcome.prompts[name] for name in ("prompts_by_task", "documents_by_task")}
            more |= {"task_files": outcome.task_files, "resumed_packs": resumed[0]}
            manifest = describe_run(config, world, outcome.results, {**facts, **more}, get_digests())
            measured = write.write_run(config.output_path, outcome.results, manifest, outcome.results.get("samples"), measure)
            if directory is not None:
                directory.finish()
        else:
            measured = measure()
    outcome.results["ddp_eval"]["telemetry"] = measured
    return outcome.results


def follow(world: World, load: Callable[[World, Layout], Engine]) -> None:
    """Every other rank's part: load and run what the leader sends until it says stop."""
    engine = None
    watchdog.step(watchdog.WAITING)
    while (word := next_work(world)) is not None:
        if isinstance(word, Load):
            watchdog.step("loading the model")
            engine = None  # its memory goes before the next takes some
            if word.config is not None:
                load = functools.partial(_load_anew, word.config)
            laid_out = lay_out(world, word.layout)
            with world.meter.phases("load"):
                if word.on_trial:
                    engine, _ = load_together(laid_out, word.layout, load)
                else:
                    engine = load(laid_out, word.layout)
            watchdog.step(watchdog.WAITING)
        else:
            assert engine is not None, "the leader says how to load before it says what to run"
            run_plan(laid_out, engine, word)


def _load_anew(config: Config, world: World, layout: Layout) -> Engine:
    return load_replica(config, checkpoint.load_config(config.loader_args), world, layout)


def trial_of(followers: Followers, seated: Seated) -> ScorePlan | None:
    """How trial plans are scored where a copy of the model lies on several ranks: by all of them, like the run itself."""
    if seated.world.ranks_per_replica == 1:
        return None

    return lambda plan: run_aside(followers, seated, plan, "trial")[0]


def run_aside(followers: Followers, seated: Seated, plan: Plan, phase: str) -> nan_retry.Scored:
    """Have all ranks run a small plan beside the run's own. Returns its items' sums and flags."""
    with followers.working_on(plan, phase=phase, attention=seated.engine.tree_attention) as work:
        rows = run_plan(seated.world, seated.engine, work).rows
    sums, greedy, _ = fill_slots(rows, plan.num_items)
    return sums, greedy


def _measure(config: Config, model_config: Any, followers: Followers, seated: Seated, plan: Plan) -> list[dict[str, Any]]:
    """`--layout measure`: leave `seated` in the layout that is quickest on some of the work. Returns what was measured."""
    whole = checkpoint.whole_model(config.loader_args, model_config)
    amount = Amount(len(plan.tokens), len(plan.targets), plan.num_packs)
    candidates = consider(whole, ranks_of(config, followers.world), amount)
    found = measure_layouts(
        followers, seated, plan, candidates, measure_model(whole, followers.world.device),
        lambda world, layout: load_replica(config, model_config, world, layout),
    )  # fmt: skip
    return [{**one._asdict(), "layout": str(one.layout)} for one in found]


def _describe_plan(decision: Decision, requests: Requests) -> dict[str, Any]:
    plan = decision.plan
    return {
        "plan_sha256": plan.digest(),
        "layout_of_requests": "rows" if plan.rows else "packs",
        "why_rows": decision.why_rows,
        "requests": len(requests),
        "distinct_requests": plan.num_items,
        "packs": plan.num_packs,
        "request_tokens": int((np.diff(requests.starts) - 1).sum()),
        "computed_tokens": len(plan.tokens),
    }


def _describe_costs(plan: Plan, seated: Seated, model_config: Any) -> dict[str, Any]:
    """What telemetry reckons shares with. flops_per_…: of one rank, which has its part in every token of its replica."""
    pad = functools.partial(pad_lengths, seated.engine.describe().get("attention"))
    pair, read = flops_of_pair_and_read(model_config.get_text_config())
    return {
        "weights_bytes": seated.engine.describe()["parameters"] * seated.engine.dtype.itemsize,
        "fed_tokens": fed_tokens(plan, pad),
        "ranks_per_replica": seated.world.ranks_per_replica,
        "flops_per_token": seated.engine.flops_per_token() / seated.world.ranks_per_replica,
        "flops_per_pair": pair / seated.world.ranks_per_replica,
        "flops_per_read": read / seated.world.ranks_per_replica,
    }


def _describe_left(decision: Decision, requests: Requests, left: np.ndarray) -> dict[str, int]:
    """Of the packs that this start runs: the tokens that they hold, and those of the requests that they answer."""
    plan = decision.plan
    packs = left[left < plan.num_packs]
    pack_of_request = np.searchsorted(plan.item_starts, decision.item_of_request, side="right") - 1
    asked = (np.diff(requests.starts) - 1)[np.isin(pack_of_request, packs)].sum()
    return {"left_tokens": int(np.diff(plan.token_starts)[packs].sum()), "left_request_tokens": int(asked)}


def _describe_answered(generation: TextDecision, prompts: Prompts, lengths: np.ndarray) -> dict[str, int]:
    """Tokens of the prompts that this start answered, and of its answers; those of two ranks twice. lengths: as in Gathered."""
    times = np.bincount(lengths[:, 0], minlength=generation.plan.num_items)
    prompt_lengths = np.array([len(prompt) for prompt in prompts.tokens], dtype=np.int64)
    return {
        "asked_tokens": int((prompt_lengths * times[generation.item_of_prompt]).sum()),
        "generated_tokens": int(lengths[:, 1].sum()),
    }


def _fulfil(future: Future[Any], make: Callable[[], Any]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:  # the waiting thread raises it
        future.set_exception(error)
