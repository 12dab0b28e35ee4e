"""What a run's own rules had to decide: requests that nothing can score, or not as they are, and documents without a number.

lm_eval (0.4.13) stops on most of these with an assertion; a continuation without tokens beside one of a single token it gives 0
nats, the best there is. The rule here: nothing that cannot be scored may win over what can.

- A continuation without a token of its own, because the tokenizer joins its start to the end of the context, is encoded by itself
  and scored behind the context's tokens.
- A continuation longer than the model's window is scored in windows, as lm_eval's rolling texts are: every token counts.
- A continuation that is empty, or that the tokenizer leaves without any token, has log-probability -inf and is not greedy: no
  argmax prefers it, whatever its length divides it by; a softmax gives it 0; a perplexity over it is infinite. A large negative
  number would do less well: `exp` of it overflows.
- Without its context, as lm_eval's `acc_mutual_info` asks for every choice, such a continuation has 0 nats, which makes
  log(choice | context) - log(choice) as small as it can be; -inf - -inf would be NaN, and argmax picks a NaN.
- A rolling text without tokens adds 0 nats, as in lm_eval.

Each is counted by task, with its first documents, in results.json (`ddp_eval.irregular`), and named once on stderr.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

log = logging.getLogger("ddp_eval")

# kind -> which requests those are
REQUESTS = {
    "context_cut": "whose context lost its left end to fit the model's window",
    "continuation_in_windows": "whose continuation is longer than the model's window, and scored in windows, every token once",
    "continuation_encoded_alone": "whose continuation has no token where the tokenizer joins it to the context: it is encoded "
    "by itself",
    "nothing_to_score": "whose continuation has no token: their log-probability is -inf, so that they never win",
    "text_without_tokens": "whose text has no token: they add 0 nats, as in lm_eval",
    "context_without_tokens": "whose context has no token: the prefix token stands in for it",
    "prompt_cut": "whose prompt lost its left end to leave room for the answer",
}
# kind -> which documents those are
DOCUMENTS = {
    "identical_choices": "with identical choices, of which the first is taken, as in lm_eval",
    "nan_metrics": "with a metric that is NaN, which makes its mean over all documents NaN",
}
FIRST = 5  # places that are kept of each task
_NAMED = 3  # tasks, and places of each, that are named on stderr

# {kind: {task: {"requests" or "documents": how many, "first": up to FIRST [doc_id, idx], or doc_id}}}
Irregular = dict[str, dict[str, dict[str, Any]]]


def count_requests(kinds: Mapping[str, Iterable[tuple[Any, Any, Any]]]) -> Irregular:
    """kinds: {kind: (task, doc_id, idx) of each request}. Kinds without any are left out."""
    return _count("requests", {kind: ((task, (doc, idx)) for task, doc, idx in found) for kind, found in kinds.items()})


def count_documents(kinds: Mapping[str, Iterable[tuple[Any, Any]]]) -> Irregular:
    """kinds: {kind: (task, doc_id) of each document}. Kinds without any are left out."""
    return _count("documents", kinds)


def log_irregular(irregular: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Name each kind once, with its first tasks and documents."""
    for noun, sayings in (("requests", REQUESTS), ("documents", DOCUMENTS)):
        for kind, saying in sayings.items():
            if tasks := irregular.get(kind):
                total = sum(found[noun] for found in tasks.values())
                places = "; ".join(f"{task}: {_places(found, found[noun])}" for task, found in list(tasks.items())[:_NAMED])
                more = f"; and {len(tasks) - _NAMED} more tasks" if len(tasks) > _NAMED else ""
                log.warning("%s %s: %d (%s%s)", noun, saying, total, places, more)


def find_unconditional(requests: Sequence[Any], empty: Collection[int], mutual: Collection[str]) -> list[int]:
    """Which of the requests without tokens ask for a choice without its context, beside the choice in it.

    requests: lm_eval's, of the kind loglikelihood. empty: indices into them.
    mutual: tasks that measure acc_mutual_info, whose documents ask in their second half. Of others it is seen by a request of the
    same document with the same continuation behind a context.
    """
    if not empty:
        return []
    of_document: dict[tuple[Any, Any], list[int]] = {}
    for index, one in enumerate(requests):
        of_document.setdefault((one.task_name, one.doc_id), []).append(index)
    found = []
    for index in empty:
        one = requests[index]
        together = of_document[one.task_name, one.doc_id]
        if one.task_name in mutual:
            is_second = one.idx >= len(together) // 2
        else:
            context, continuation = one.args[:2]
            is_second = not context and any(
                requests[other].args[0] and requests[other].args[1] == continuation for other in together
            )
        if is_second:
            found.append(index)
    return found


def find_identical(requests: Sequence[Any], mutual: Collection[str]) -> list[tuple[Any, Any]]:
    """(task, doc_id) of documents with two choices that are the same request. Arguments as of `find_unconditional`."""
    choices: dict[tuple[Any, Any], list[Any]] = {}
    for one in requests:
        choices.setdefault((one.task_name, one.doc_id), []).append(one.args)
    found = []
    for (task, doc_id), arguments in choices.items():
        asked = arguments[: len(arguments) // 2] if task in mutual else arguments
        if len({one[1] for one in asked}) < len(asked) and len({one[:2] for one in asked}) < len(asked):
            found.append((task, doc_id))
    return found


def find_nan(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Irregular:
    """Documents with a metric that is NaN or holds one. samples: lm_eval's, by task."""
    found = [
        (task, doc_id)
        for task, rows in samples.items()
        for doc_id in dict.fromkeys(
            row["doc_id"] for row in rows if any(_holds_nan(row.get(metric)) for metric in row.get("metrics", ()))
        )
    ]
    return count_documents({"nan_metrics": found})


def _holds_nan(value: Any) -> bool:
    if isinstance(value, (float, np.floating)):
        return math.isnan(value)
    if isinstance(value, np.ndarray):
        return value.dtype.kind == "f" and bool(np.isnan(value).any())
    return isinstance(value, (tuple, list)) and any(map(_holds_nan, value))


def _count(noun: str, kinds: Mapping[str, Iterable[tuple[Any, Any]]]) -> Irregular:
    counted: Irregular = {}
    for kind, found in kinds.items():
        for task, place in found:
            of_task = counted.setdefault(kind, {}).setdefault(str(task), {noun: 0, "first": []})
            of_task[noun] += 1
            if len(of_task["first"]) < FIRST:
                of_task["first"].append(list(place) if isinstance(place, tuple) else place)
    return counted


def _places(found: Mapping[str, Any], total: int) -> str:
    named = [
        f"document {place[0]} choice {place[1]}" if isinstance(place, list) else f"document {place}"
        for place in found["first"][:_NAMED]
    ]
    return ", ".join(named) + (", ..." if total > len(named) else "")
