"""A run from start to end: who does what, in order. Read this first.

rank 0                                             ranks 1 … N-1
  load the replica (tasks and prompts meanwhile)     load the replica
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
import gc
import logging
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from ddp_eval import demo, distributed, results, run_directory, status, watch
from ddp_eval.config import Config, config_from_options
from ddp_eval.distributed import World
from ddp_eval.engines import broadcast, hf
from ddp_eval.errors import UserError
from ddp_eval.execution import Gathered, fill_slots, run_plan
from ddp_eval.manifest import describe_loaded_model, describe_model, describe_run, fingerprint_model
from ddp_eval.packing import Requests
from ddp_eval.planning import Decision, make_plan
from ddp_eval.protocol import Followers, Journals, await_begin, next_work
from ddp_eval.resume import name_work, tell_found, warn_of_not_finite
from ddp_eval.run_directory import RunDirectory
from ddp_eval.telemetry import Phases
from ddp_eval.tokenization import Encoder

log = logging.getLogger("ddp_eval")


def run(config: Config, world: World) -> dict[str, Any] | None:
    """Evaluate as a command does: load the model, evaluate, write the run directory.

    Returns the results on rank 0, None elsewhere. Raises UserError on the rank that finds what the user must mend.
    """
    if not world.is_leader:
        watch.step(watch.WAITING)
        if (begin := await_begin(world)) is None:
            return None
        watch.of_run(begin.directory)
        watch.step("loading the model")
        model_config = hf.load_config(config.loader_args)
        _follow(world, _load_engine(config, model_config, world))
        return None
    with Followers(world) as followers:
        return _lead_run(config, world, followers)


def evaluate(model: Any, tokenizer: Any, tasks: list[Any] | str, **options: Any) -> dict[str, Any] | None:
    """Evaluate a loaded model on lm_eval tasks, on all ranks of the process group that the caller is in (or on none).

    Every rank calls it with its own copy of the model (plain, DDP-wrapped or compiled). The model's training flags, the random
    state and the process group are left as they were.

    model:      a causal transformers model on this rank's device.
    tokenizer:  its tokenizer; only rank 0 uses it.
    tasks:      lm_eval task names or task configs.
    options:    fields of `Config`: num_fewshot, limit, output_path, include_path, model_args={"max_length": …}, …
                They are the command's flags, and errors call them so. log_samples=True puts the samples into the result, too.

    Returns lm_eval's result dict on rank 0, None on the others. Raises UserError on every rank when it cannot be done.
    """
    names = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
    config = config_from_options(tasks=names, **options)
    bare = _unwrap(model)
    world = distributed.adopt_group(next(bare.parameters()).device)
    try:
        with _as_it_was(bare), contextlib.closing(hf.HFEngine(bare, world.device)) as engine:
            bare.eval()
            if not world.is_leader:
                _follow(world, engine)
                return None
            with Followers(world) as followers:
                _prepare_output(config)
                return _lead(config, None, followers, bare.config, tokenizer, lambda: engine, lambda: describe_loaded_model(bare))
    finally:
        distributed.release_group(world)
        gc.collect()  # lm_eval's tasks refer to each other in circles; a training loop comes here again and again


def _lead_run(config: Config, world: World, followers: Followers) -> dict[str, Any]:
    """The leader's part of `run`: see what the run directory holds, then begin, or go on, unless all is done."""
    watch.step("looking into the run directory")
    finished = run_directory.find_finished(config, lambda: fingerprint_model(config.loader_args))
    if finished is not None:
        log.warning("%s holds this very run, complete: nothing is left to do (--fresh starts over)", config.output_path)
        return finished
    if not config.output_path:
        followers.begin(None)
        return _load_and_lead(config, None, world, followers)
    directory = run_directory.open_directory(config, lambda: _lose_directory(str(config.output_path)))
    watch.of_run(directory.path)
    watch.before_leaving(directory.close)
    with contextlib.closing(directory):
        followers.begin(directory.path)
        return _load_and_lead(config, directory, world, followers)


def _lose_directory(path: str) -> None:
    """From the thread that keeps the lock: the run directory is no longer ours to write to."""
    watch.of_run(None)
    distributed.report_once(f"--output_path {path} was deleted or taken over by another run: this one ends; start it again")
    watch.leave(2, status.FAILED, "")


def _load_and_lead(config: Config, directory: RunDirectory | None, world: World, followers: Followers) -> dict[str, Any]:
    """Weights load in a thread of their own while lm_eval builds the prompts."""
    watch.step("building the prompts")
    model_config = hf.load_config(config.loader_args)
    tokenizer = hf.load_tokenizer(config.loader_args)
    engine: Future[hf.HFEngine] = Future()
    digests: Future[dict[str, Any]] = Future()

    def load() -> None:
        _fulfil(engine, lambda: _load_engine(config, model_config, world))
        name = hf.resolve_pretrained(config.model_args)
        _fulfil(digests, lambda: describe_model(name, config.model_args, getattr(model_config, "_commit_hash", None)))

    # lm_eval's imports come first: two threads that import the same packages can meet half-made modules.
    from ddp_eval import harness  # noqa: F401

    threading.Thread(target=load, daemon=True).start()
    return _lead(config, directory, followers, model_config, tokenizer, engine.result, digests.result)


def _load_engine(config: Config, model_config: Any, world: World) -> hf.HFEngine:
    if config.load == "broadcast":
        return broadcast.load_engine(config.loader_args, model_config, world)
    return hf.load_engine(config.loader_args, model_config, world.device)


def _prepare_output(config: Config) -> None:
    if config.output_path:
        results.prepare_directory(config.output_path, config.overwrite)


def _lead(
    config: Config,
    directory: RunDirectory | None,
    followers: Followers,
    model_config: Any,
    tokenizer: Any,
    get_engine: Callable[[], hf.HFEngine],
    get_digests: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Build the requests, have all ranks score them, compute metrics and write the run directory.

    directory: where finished packs are kept and found; None keeps none.
    """
    from ddp_eval import harness

    world, phases = followers.world, Phases()
    model_args = config.model_args
    max_length = harness.max_length_of(model_args, model_config, tokenizer)
    try:
        encoder = Encoder(tokenizer, max_length, model_args.get("add_bos_token"), model_args.get("prefix_token_id"))
    except ValueError as error:
        raise UserError(str(error)) from None

    facts: dict[str, Any] = {}
    resumed: list[int] = []

    def score(requests: Requests) -> tuple[np.ndarray, np.ndarray]:
        watch.step("loading the model")
        with phases("load"):
            engine = get_engine()
        watch.step("planning")
        with phases("plan"):
            decision = make_plan(engine, requests, config.packing, config.max_pack_tokens)
        facts.update(engine=engine.describe(), **_describe_plan(decision, requests))
        if decision.why_rows and config.packing:
            log.warning("packs are off for this model: %s; running padded rows instead", decision.why_rows)
        journals, found = None, None
        if directory is not None:
            facts["model_fingerprint"] = fingerprint_model(config.loader_args)
            key = name_work(decision.plan, engine.describe(), world, facts["model_fingerprint"])
            journals, found = Journals(directory.journals, key), directory.recover(key, decision.plan.item_starts)
            tell_found(found, decision.plan, world)
        done = found.packs if found else np.zeros(0, dtype=np.int64)
        watch.step(watch.WAITING)  # a rank may still load the model
        with followers.working_on(decision.plan, np.delete(np.arange(decision.plan.num_packs), done), journals) as work:
            gathered = run_plan(world, engine, work, phases)
        if found:
            gathered = Gathered(*(np.concatenate(parts) for parts in zip((found.rows, found.halved), gathered, strict=True)))
        sums, greedy, differing = fill_slots(gathered.rows, decision.plan.num_items)
        resumed.append(len(done))
        watch.step("computing the metrics")
        if len(gathered.halved):
            log.warning("%d packs did not fit the memory and ran in pieces: scores may round otherwise", len(gathered.halved))
        if differing:
            log.warning(
                "packs that ran on two ranks differ by up to %.2g nats: are the ranks' GPUs or threads not alike?", differing
            )
        facts["repeated_packs_differ_nats"] = differing
        facts["packs_halved"] = {str(index): pieces for index, pieces in gathered.halved.tolist()}
        return sums[decision.item_of_request], greedy[decision.item_of_request]

    def keep(scores: results.Scores) -> None:
        facts["not_finite"] = results.find_not_finite(scores)
        warn_of_not_finite(facts["not_finite"])
        if config.output_path:
            results.write_scores(config.output_path, scores)

    outcome = harness.evaluate_tasks(config, encoder, model_config, score, keep, phases, include_paths=[demo.TASKS_PATH])
    outcome.results["config"].update(_model_info(config, model_config, facts["engine"]))
    facts["prompts_sha256"] = outcome.prompt_digest
    outcome.results["ddp_eval"] = {**facts, "phases_s": phases.seconds}
    if config.output_path:
        watch.step("writing the results")
        manifest = describe_run(config, world, outcome.results, {**facts, "resumed_packs": resumed[0]}, get_digests())
        results.write_run(config.output_path, outcome.results, manifest, outcome.results.get("samples"))
        if directory is not None:
            directory.finish()
    return outcome.results


def _follow(world: World, engine: hf.HFEngine) -> None:
    """Every other rank's part: run what the leader sends until it says stop."""
    watch.step(watch.WAITING)
    while (work := next_work(world)) is not None:
        run_plan(world, engine, work, Phases())


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


def _model_info(config: Config, model_config: Any, engine: dict[str, Any]) -> dict[str, Any]:
    """What lm_eval's HF backend says of its model in results["config"]."""
    return {
        "model_num_parameters": engine["parameters"],
        "model_dtype": engine["dtype"],
        "model_revision": config.model_args.get("revision", "main"),
        "model_sha": getattr(model_config, "_commit_hash", None) or "",
    }


def _fulfil(future: Future[Any], make: Callable[[], Any]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:  # the waiting thread raises it
        future.set_exception(error)


def _unwrap(model: Any) -> Any:
    """The transformers model inside DDP or torch.compile wrappers. Raises UserError for sharded ones."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            model = model.module
        else:
            break
    if (
        any(hasattr(parameter, "placements") for parameter in model.parameters())
        or "FullyShardedDataParallel" in type(model).__name__
    ):
        raise UserError("the model is sharded over ranks (FSDP or tensor parallel): evaluate needs a whole copy on every rank")
    return model


@contextlib.contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Put back every module's training flag and the random state of Python, numpy and torch."""
    training = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for module, flag in training:
                module.training = flag
