"""Answers of lm_eval's own HF backend, and results of ours held against its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import tiny_models
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TOLERANCE_NATS = 1e-4


def by_lm_eval(model: Any, tokenizer: Any, path: str, *, lm_args: Any = None, **options: Any) -> dict[str, Any]:
    """lm_eval's own results of the task "odd", samples included."""
    manager = TaskManager(include_path=path, include_defaults=False)
    return tiny_models.evaluate_with_lm_eval(model, tokenizer, ["odd"], lm_args=lm_args, task_manager=manager, **options)


def answer_with_lm_eval(model: Any, tokenizer: Any, context: str, continuation: str, **options: Any) -> tuple[float, bool]:
    """lm_eval's own answer to one request."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    return lm.loglikelihood([request], disable_tqdm=True)[0]


def answers_of(samples: list[dict[str, Any]]) -> dict[tuple[int, int], Any]:
    """(document, choice) -> log-probability and flag, or the bare sum of a rolling request."""
    found = {}
    for sample in samples:
        for index, (answer,) in enumerate(sample["resps"]):
            found[sample["doc_id"], index] = answer
    return found


def odd_answers(results: Mapping[str, Any]) -> dict[tuple[int, int], Any]:
    """(document, choice) -> log-probability and flag, the bare sum of a rolling request, or a text; of the task "odd"."""
    return answers_of(results["samples"]["odd"])


def assert_same_outcome(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal prompts to the byte, log-probabilities within the tolerance, equal flags and metrics."""
    assert set(ours["samples"]) == set(theirs["samples"])
    for task, samples in theirs["samples"].items():
        mine = ours["samples"][task]
        assert [sample["arguments"] for sample in mine] == [sample["arguments"] for sample in samples]
        assert [sample["target"] for sample in mine] == [sample["target"] for sample in samples]
        got, expected = answers_of(mine), answers_of(samples)
        assert list(got) == list(expected)
        for key, answer in expected.items():
            if isinstance(answer, tuple):
                assert got[key][0] == pytest.approx(answer[0], abs=TOLERANCE_NATS), (task, key)
                assert got[key][1] == answer[1], (task, key)
            else:
                # A sum over hundreds of tokens at several nats each: one wrong token is far more than this.
                assert got[key] == pytest.approx(answer, rel=1e-6), (task, key)
    for part in ("results", "groups"):
        assert set(ours.get(part, {})) == set(theirs.get(part, {}))
        for task, metrics in theirs.get(part, {}).items():
            for name, value in metrics.items():
                close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                assert ours[part][task][name] == close, (task, name)
    for part in ("n-samples", "versions", "n-shot", "higher_is_better", "group_subtasks"):
        assert ours[part] == theirs[part], part
