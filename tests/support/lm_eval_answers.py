"""Answers of lm_eval's own HF backend, and results of ours held against its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import tiny_models
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tolerance import Rounding

ROLLING_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


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


def texts_of(samples: list[dict[str, Any]]) -> dict[tuple[int, int], str]:
    """(document, choice) -> the text that is scored."""
    return {(sample["doc_id"], index): arguments[-1] for sample in samples for index, arguments in enumerate(sample["arguments"])}


def assert_same_outcome(ours: dict[str, Any], theirs: dict[str, Any], rounding: Rounding, float32_sums: bool = True) -> None:
    """Equal prompts to the byte, log-probabilities and metrics within rounding, equal flags.

    float32_sums: lm_eval has added up in float32, its default.
    """
    assert set(ours["samples"]) == set(theirs["samples"])
    for task, samples in theirs["samples"].items():
        mine = ours["samples"][task]
        assert [sample["arguments"] for sample in mine] == [sample["arguments"] for sample in samples]
        assert [sample["target"] for sample in mine] == [sample["target"] for sample in samples]
        got, expected, texts = answers_of(mine), answers_of(samples), texts_of(samples)
        assert list(got) == list(expected)
        for key, answer in expected.items():
            if isinstance(answer, tuple):
                assert got[key][0] == rounding.close_for(answer[0], texts[key], float32_sums), (task, key)
                assert got[key][1] == answer[1], (task, key)
            else:
                assert got[key] == rounding.close_for(answer, texts[key], float32_sums), (task, key)
    for part in ("results", "groups"):
        assert set(ours.get(part, {})) == set(theirs.get(part, {}))
        for task, metrics in theirs.get(part, {}).items():
            for name, value in metrics.items():
                close = close_metric(name, value, theirs["samples"].get(task, []), rounding, float32_sums)
                assert ours[part][task][name] == close, (task, name)
    for part in ("n-samples", "versions", "n-shot", "higher_is_better", "group_subtasks"):
        assert ours[part] == theirs[part], part


def close_metric(name: str, value: Any, samples: list[dict[str, Any]], rounding: Rounding, float32_sums: bool = True) -> Any:
    """Equals what is within rounding of a metric of these samples.

    A perplexity is exp(-sum of log-probabilities / units): by whatever part of itself the exponent moves, it moves too. Units are
    documents; words or bytes for texts that are scored whole. Other metrics are computed in float64 from flags and from the
    order of log-probabilities, which rounding does not change here.
    """
    metric = name.partition(",")[0]
    if not isinstance(value, float) or metric not in ("perplexity", *ROLLING_METRICS):
        return pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
    moved = sum(bounds_of(samples, rounding, float32_sums))
    units = sum(len(text.split()) for text in texts_of(samples).values()) if metric in ROLLING_METRICS else len(samples)
    return pytest.approx(value, rel=2 * moved / units)  # twice: exp(x) - 1 is less than 2 x below 1


def bounds_of(samples: list[dict[str, Any]], rounding: Rounding, float32_sums: bool = True) -> list[float]:
    """What rounding may bring for each log-probability of these samples, in nats."""
    texts, bounds = texts_of(samples), []
    for key, answer in answers_of(samples).items():
        if not isinstance(answer, str):
            total = answer[0] if isinstance(answer, (tuple, list)) else answer
            bounds.append(rounding.nats_for(total, texts[key], float32_sums))
    return bounds


def largest_bound(samples: list[dict[str, Any]], rounding: Rounding) -> float:
    return max(bounds_of(samples, rounding), default=0.0)
