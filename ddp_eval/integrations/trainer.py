"""A callback for transformers' Trainer: lm_eval tasks every so many steps, or at each of the Trainer's own evaluations."""

from __future__ import annotations

import os
from typing import Any

import transformers

from ddp_eval.analysis.read import result_rows
from ddp_eval.api import Evaluator
from ddp_eval.distributed.world import from_first_rank
from ddp_eval.errors import UserError


class EvaluationCallback(transformers.TrainerCallback):
    """`trainer.add_callback(EvaluationCallback(trainer, ["hellaswag"], limit=200))`, on every rank.

    Metrics go into the Trainer's logs, on every rank, as `eval/hellaswag/acc_norm`; those of a filter with a name of its own as
    `eval/gsm8k/exact_match/strict-match`.

    Prompts, token ids and plans are made at the first evaluation and used at all others (`ddp_eval.Evaluator`).

    trainer:      whose model is evaluated as it lies: whole, under DDP, or sharded by `fully_shard` (fsdp_version=2).
    tasks:        as for `ddp_eval.evaluate`, to which `options` go, too; each evaluation has a directory of its own in
                  output_path, `step-500` and so on.
    every_steps:  steps between evaluations; None: at each evaluation of the Trainer's own.
    tokenizer:    the Trainer's processing_class if not given.
    """

    def __init__(
        self, trainer: Any, tasks: list[Any] | str, *, every_steps: int | None = None, tokenizer: Any = None, **options: Any
    ) -> None:
        self._trainer = trainer
        self._every_steps = every_steps
        tokenizer = tokenizer or trainer.processing_class
        if tokenizer is None:
            raise UserError("EvaluationCallback needs a tokenizer: give tokenizer=, or processing_class= to the Trainer")
        if every_steps is not None and every_steps < 1:
            raise UserError(f"every_steps of EvaluationCallback must be 1 or more, got {every_steps}")
        self._output_path = options.pop("output_path", None)
        self._evaluator = Evaluator(tokenizer, tasks, **options)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._every_steps is not None and state.global_step % self._every_steps == 0:
            self._run(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._every_steps is None:
            self._run(state, control)

    def _run(self, state: Any, control: Any) -> None:
        place = {} if self._output_path is None else {"output_path": os.path.join(self._output_path, f"step-{state.global_step}")}
        results = self._evaluator.evaluate(self._trainer.model, **place)
        metrics = metrics_of(results) if results is not None else None
        logs_next = control.should_log
        self._trainer.log(from_first_rank(metrics))
        control.should_log = logs_next  # which `log` takes for done: the loss of this step is still to come


def metrics_of(results: dict[str, Any]) -> dict[str, float]:
    """The metrics of lm_eval's result dict, without standard errors, by plain names."""
    return {
        f"eval/{row['task']}/{row['metric']}" + ("" if row["filter"] == "none" else f"/{row['filter']}"): float(row["value"])
        for row in result_rows(results)
    }
