"""Run a peer's own command, and write down when it built prompts, when it scored, and what it answered.

    PYTHON noted_command.py NOTES lm_eval-hf|lm_eval-vllm|lighteval FLAGS…

It runs in the peer's environment, where this package may not be. NOTES, a JSON file, gets

    spans    [[what, start, stop], …], what one of "prompts" and "scoring", times in Unix seconds
    answers  [[task, document, choice, log-probability in nats], …]
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPANS: list[tuple[str, float, float]] = []
ANSWERS: list[tuple[str, int, int, float]] = []
LM_EVAL_MODELS = {
    "lm_eval-hf": ("lm_eval.models.huggingface", "HFLM"),
    "lm_eval-vllm": ("lm_eval.models.vllm_causallms", "VLLM"),
}


def main() -> None:
    notes, peer, *flags = sys.argv[1:]
    if peer == "lm_eval-vllm":
        # vLLM divides by the seconds of its progress bar, which are 0 where bars are off; tqdm asks when it is imported.
        os.environ.pop("TQDM_DISABLE", None)
    module = "lighteval" if peer == "lighteval" else "lm_eval"
    watch_lighteval() if peer == "lighteval" else watch_lm_eval(*LM_EVAL_MODELS[peer])
    sys.argv = [module, *flags]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        Path(notes).write_text(json.dumps({"spans": SPANS, "answers": ANSWERS}))


def watch_lm_eval(module: str, name: str) -> None:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    watch(TaskManager, "load", "prompts")
    watch(Task, "build_all_requests", "prompts")
    watch(getattr(importlib.import_module(module), name), "loglikelihood", "scoring", note_requests)


def note_requests(requests: Any, answers: Any) -> None:
    for request, (logprob, _) in zip(requests, answers, strict=True):
        ANSWERS.append((request.task_name, request.doc_id, request.idx, float(logprob)))


def watch_lighteval() -> None:
    from lighteval.models.transformers.transformers_model import TransformersModel
    from lighteval.pipeline import Pipeline
    from lighteval.tasks.registry import Registry

    # All of its own tasks are imported, and some of them ask the network as soon as they are.
    Registry._load_from_files = Registry._load_from_subdirs = staticmethod(lambda *args: {})
    watch(Pipeline, "_init_tasks_and_requests", "prompts")
    watch(TransformersModel, "loglikelihood", "scoring", note_documents)


def note_documents(documents: Any, answers: Any) -> None:
    for document, answer in zip(documents, answers, strict=True):
        for choice, logprob in enumerate(answer.logprobs):
            ANSWERS.append((document.task_name.partition("|")[0], int(document.id), choice, float(logprob)))


def watch(owner: Any, name: str, what: str, note: Callable[[Any, Any], None] | None = None) -> None:
    """Have every call of the method noted as a span of `what`. note: takes its first argument and its result."""
    call = getattr(owner, name)

    def watched(self: Any, *rest: Any, **kwargs: Any) -> Any:
        started = time.time()
        result = call(self, *rest, **kwargs)
        SPANS.append((what, started, time.time()))
        if note:
            note(rest[0] if rest else next(iter(kwargs.values())), result)
        return result

    setattr(owner, name, watched)


if __name__ == "__main__":
    main()
