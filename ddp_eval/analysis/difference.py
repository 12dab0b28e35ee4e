"""Two runs -> one plain dict of all that differs, ready for JSON, tables and the report."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ddp_eval.analysis import paired
from ddp_eval.analysis.matching import Pairing, align, numbered_tasks
from ddp_eval.analysis.read import Documents, Requests, Run
from ddp_eval.output.documents import TRANSFORMS

NEAR_TIE_NATS = 0.01
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}

# Where a fact of the manifest belongs; the first prefix that fits names the group.
_GROUPS = (
    ("model", ("model.", "config.model", "engine.class", "engine.parameters")),
    ("dtype and kernels", ("engine.", "numerics")),
    (
        "prompts",
        ("prompts", "documents", "task", "seeds.", "config.tasks", "config.num_fewshot", "config.limit", "config.samples"),
    ),
    ("prompts", ("config.apply_chat_template", "config.system_instruction", "config.fewshot", "config.seed", "requests")),
    ("versions", ("packages.", "git.")),
    ("hardware", ("hardware.",)),
    ("layout", ("ranks.", "plan_sha256", "layout", "packs", "why_rows", "computed_tokens", "config.packing", "config.max_pack")),
    ("layout", ("config.layout", "measured_layouts")),
)
_GEN_KWARGS, _BY_TASK = "config.gen_kwargs", "prompts_by_task."
_SAYS_NOTHING = ("config.output_path", "config.overwrite", "working_directory", "model.seen")


def compare_runs(a: Run, b: Run, near_tie_nats: float = NEAR_TIE_NATS) -> dict[str, Any]:
    """Everything that differs between two runs, task by task and over all tasks that both have."""
    b, pairings = align(a, b)
    shared = [task for task in _tasks(a) if task in _tasks(b)]
    tasks = {
        task: {**_compare_task(a, b, task, near_tie_nats), "pairing": pairings.get(task, Pairing({})).describe()}
        for task in shared
    }
    only = {"a": [task for task in _tasks(a) if task not in shared], "b": [task for task in _tasks(b) if task not in shared]}
    overall = _compare_overall(a, b, shared, list(tasks.values()))
    same_requests = not any(only.values()) and not any(any(task["requests_only_in"].values()) for task in tasks.values())
    compared = all(task["requests"] for task in tasks.values())
    return {
        "a": {"path": str(a.path), "kind": a.kind},
        "b": {"path": str(b.path), "kind": b.kind},
        "near_tie_nats": near_tie_nats,
        "notes": {"a": a.notes, "b": b.notes},
        "tasks_only_in": only,
        "no_samples_in": {
            side: [task for task in shared if task not in numbered_tasks(run)] for side, run in (("a", a), ("b", b))
        },
        "same_requests": same_requests,
        "identical": same_requests
        and bool(shared)
        and compared
        and overall["requests_differing"] == 0
        and not any(task["metrics_differing"] for task in tasks.values()),
        "tasks": tasks,
        "groups": _compare_groups(a, b, tasks),
        "overall": overall,
        "differences": differences(a, b),
    }


def differences(a: Run, b: Run) -> list[dict[str, Any]]:
    """Facts of the manifests that are not alike, by group. Of lm_eval's runs only what both sides tell."""
    left, right = dict(_flatten(a.manifest)), dict(_flatten(b.manifest))
    keys = [key for key in dict.fromkeys((*left, *right)) if key not in _SAYS_NOTHING]
    if a.kind != b.kind:
        keys = [key for key in keys if key in left and key in right]
    # A manifest of an older version says nothing of documents and task files, which may also lie elsewhere.
    keys = [key for key in keys if (key in left and key in right) or not key.startswith(("documents_by_task.", "task_files."))]
    same_prompts = _digests_of_settings(a, b, left, right)
    found = [
        {"group": _group(key), "key": key, "a": left.get(key), "b": right.get(key)} for key in keys if key not in same_prompts
    ]
    order = [*dict.fromkeys(name for name, _ in _GROUPS), "settings"]
    return sorted((one for one in found if one["a"] != one["b"]), key=lambda one: order.index(one["group"]))


def _digests_of_settings(a: Run, b: Run, left: Mapping[str, Any], right: Mapping[str, Any]) -> set[str]:
    """Keys of digests of prompts that differ by gen_kwargs alone, which count in them and are named themselves.

    left, right: the flat manifests. Documents have hashes of their prompts without the settings.
    """
    if not any(left.get(key) != right.get(key) for key in left.keys() | right.keys() if key.startswith(_GEN_KWARGS)):
        return set()
    differing = [key for key in left.keys() & right.keys() if key.startswith(_BY_TASK) and left[key] != right[key]]
    tasks = {key: key.removeprefix(_BY_TASK) for key in differing}
    alike = {key for key, task in tasks.items() if task in a.texts and a.prompts.get(task) == b.prompts.get(task) is not None}
    return alike | {"prompts_sha256"} if alike and len(alike) == len(differing) else alike


def asks_twice(run: Run, task: str) -> bool:
    """Whether the second half of a document's requests are its choices without the question: lm_eval's acc_mutual_info."""
    return any(key.startswith("acc_mutual_info,") for key in run.metrics.get(task, {}))


def answers_of(
    requests: Requests, twice: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Documents with two or more choices: (n,) doc_id, (n,) the choice of highest log-probability, (n,) its lead over the next.

    The first of equal choices is taken, as lm_eval's argmax does. twice: see `asks_twice`.
    """
    doc_ids, starts, counts = np.unique(requests.doc_id, return_index=True, return_counts=True)
    counts = counts // 2 if twice else counts
    chosen = counts > 1
    doc_ids, starts, counts = doc_ids[chosen], starts[chosen], counts[chosen]
    blocks = [requests.loglikelihood[start : start + count] for start, count in zip(starts, counts, strict=True)]
    best = np.array([int(np.argmax(block)) for block in blocks], dtype=np.int64)
    with np.errstate(invalid="ignore"):  # none of the choices could be scored
        lead = np.array([float(np.subtract(*np.sort(block)[[-1, -2]])) for block in blocks], dtype=np.float64)
    return doc_ids, best, lead


def _tasks(run: Run) -> list[str]:
    """Those with answers first, then those of which a run reports metrics alone: lm_eval's output may lack their samples."""
    evaluated = run.results.get("n-samples") or {}
    return list(dict.fromkeys((*numbered_tasks(run), *(task for task in run.reported if task in evaluated))))


def _compare_task(a: Run, b: Run, task: str, near_tie_nats: float) -> dict[str, Any]:
    left, right = a.requests.get(task, _NONE), b.requests.get(task, _NONE)
    in_left, in_right = _match(left, right)
    texts = [a.texts.get(task, {}), b.texts.get(task, {})]
    both_texts = texts[0].keys() & texts[1].keys()
    texts_differing = sum(texts[0][key] != texts[1][key] for key in both_texts)
    only = {
        "a": len(left.doc_id) - len(in_left) + len(texts[0]) - len(both_texts),
        "b": len(right.doc_id) - len(in_right) + len(texts[1]) - len(both_texts),
    }
    left, right = _take(left, in_left), _take(right, in_right)
    deltas = _deltas(left.loglikelihood, right.loglikelihood)
    bits_differ = left.loglikelihood.view(np.int64) != right.loglikelihood.view(np.int64)
    greedy_differ = left.is_greedy != right.is_greedy
    prompts = [a.prompts.get(task, {}), b.prompts.get(task, {})]
    both = prompts[0].keys() & prompts[1].keys()
    documents = _paired_documents(a, b, task)
    return {
        "requests": len(deltas) + len(both_texts),
        "requests_only_in": only,
        "requests_differing": int((bits_differ | greedy_differ).sum()) + texts_differing,
        "texts": len(both_texts),
        "texts_differing": texts_differing,
        "delta_nats": _summary(deltas),
        **_flips(left, right, asks_twice(a, task) or asks_twice(b, task), near_tie_nats),
        "greedy_flipped": int(greedy_differ.sum()),
        "prompts_compared": len(both),
        "prompts_differing": sum(prompts[0][doc] != prompts[1][doc] for doc in both),
        "metrics": _compare_metrics(a, b, task, documents),
        "metrics_differing": _metrics_differing(a, b, task, documents),
        "deltas": deltas,
    }


def _compare_overall(a: Run, b: Run, shared: list[str], tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over tasks; metrics that are means, over the documents of all tasks that have them."""
    deltas = np.concatenate([np.zeros(0), *(task.pop("deltas") for task in tasks)])
    counted = [
        "requests",
        "requests_differing",
        "texts",
        "texts_differing",
        "answers",
        "answers_flipped",
        "near_ties",
        "greedy_flipped",
    ]
    counted += ["prompts_compared", "prompts_differing"]
    overall = {key: sum(task[key] for task in tasks) for key in counted}
    pooled: dict[str, list[tuple[str, Any]]] = {}
    for task in shared:
        for key, documents in _paired_documents(a, b, task).items():
            if key.partition(",")[0] not in TRANSFORMS and _is_aggregate(a, b, task, key):
                pooled.setdefault(key, []).append((task, documents))
    metrics = {}
    for key, parts in pooled.items():
        if len(parts) > 1:
            metrics[key] = _compare_pooled(key, [part for _, part in parts])
            metrics[key]["tasks"] = len(parts)
    return {**overall, "delta_nats": _summary(deltas), "metrics": metrics}


def _compare_pooled(key: str, parts: list[Any]) -> dict[str, Any]:
    """Paired statistics over the documents of several tasks. parts: of `_paired_documents`."""
    columns = [np.concatenate([part[column] for part in parts]) for column in range(4)]
    offsets = np.cumsum([0, *(len(part[4]) for part in parts)])
    clusters = np.concatenate([part[4] + offset for part, offset in zip(parts, offsets[:-1], strict=True)])
    return paired.compare_metric(key.partition(",")[0], (columns[0], columns[1]), (columns[2], columns[3]), clusters)


def compare_scores(a: Run, b: Run, wanted: Collection[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """{(task or group, "metric,filter"): paired statistics} of what is `wanted` and both runs report; B must be aligned with A.

    A group's documents are those of its tasks, where their mean is the number that is reported of it, as lm_eval's is unless it
    weighs tasks alike.
    """
    found = {}
    for task in a.reported.keys() & b.reported.keys():
        keys = [key for key in a.reported[task].keys() & b.reported[task].keys() if (task, key) in wanted]
        if not keys:
            continue
        members = _members(a, task)
        documents = [_paired_documents(a, b, member) for member in members]
        for key in keys:
            parts = [one[key] for one in documents if key in one]
            if len(parts) != len(members) or not parts:
                continue
            one = _compare_pooled(key, parts)
            if all(_is_close(one[side], run.reported[task][key]) for side, run in (("a", a), ("b", b))):
                found[task, key] = one
    return found


def _compare_groups(a: Run, b: Run, tasks: Collection[str]) -> dict[str, Any]:
    """{group: {"metrics": as of a task}} of the groups, such as mmlu, that both runs report; B must be aligned with A."""
    names = [name for name, members in a.results.get("group_subtasks", {}).items() if members and name not in tasks]
    keys = {name: [key for key in a.reported.get(name, {}) if key in b.reported.get(name, {})] for name in names}
    found = compare_scores(a, b, {(name, key) for name, own in keys.items() for key in own})
    return {
        name: {"metrics": {key: found.get((name, key)) or _reported_alone(a, b, name, key) for key in own}}
        for name, own in keys.items()
        if own
    }


def count_flips(a: Run, b: Run, near_tie_nats: float = NEAR_TIE_NATS) -> dict[str, int]:
    """Answers, and generated texts, that are others in B than in A, over all tasks that both have; B must be aligned with A."""
    total: dict[str, int] = {}
    for task in (task for task in numbered_tasks(a) if task in numbered_tasks(b)):
        left, right = a.requests.get(task, _NONE), b.requests.get(task, _NONE)
        in_left, in_right = _match(left, right)
        left, right = _take(left, in_left), _take(right, in_right)
        counts = _flips(left, right, asks_twice(a, task) or asks_twice(b, task), near_tie_nats)
        texts = [run.texts.get(task, {}) for run in (a, b)]
        both = texts[0].keys() & texts[1].keys()
        counts |= {"texts": len(both), "texts_differing": sum(texts[0][key] != texts[1][key] for key in both)}
        total = {name: total.get(name, 0) + count for name, count in counts.items()}
    return total


def _members(run: Run, task: str) -> list[str]:
    """The tasks of a group and of the groups in it, each once; of a task itself."""
    members = run.results.get("group_subtasks", {})
    found, level = [], [task]
    while level:
        found += [one for one in level if not members.get(one)]
        level = list(dict.fromkeys(inner for one in level for inner in members.get(one, [])))
    return list(dict.fromkeys(found))


def _metrics_differing(a: Run, b: Run, task: str, documents: dict[str, Any]) -> list[str]:
    """Which metrics differ, in what was reported or in any document. Of lm_eval's runs only those that both have."""
    reported = a.reported.get(task, {}), b.reported.get(task, {})
    found = {key for key in reported[0].keys() & reported[1].keys() if reported[0][key] != reported[1][key]}
    if a.kind == b.kind:
        found |= reported[0].keys() ^ reported[1].keys()
    for key, (value_a, weight_a, value_b, weight_b, _) in documents.items():
        if not np.array_equal([value_a, weight_a], [value_b, weight_b], equal_nan=True):
            found.add(key)
    return sorted(found)


def _compare_metrics(a: Run, b: Run, task: str, documents: dict[str, Any]) -> dict[str, Any]:
    """By "metric,filter": paired statistics where both runs kept the documents, else the two numbers and their difference."""
    found: dict[str, Any] = {}
    reported = a.reported.get(task, {}), b.reported.get(task, {})
    for key in dict.fromkeys((*reported[0], *reported[1], *documents)):
        if key in documents and _is_aggregate(a, b, task, key):
            value_a, weight_a, value_b, weight_b, clusters = documents[key]
            found[key] = paired.compare_metric(key.partition(",")[0], (value_a, weight_a), (value_b, weight_b), clusters)
        elif key in reported[0] and key in reported[1]:
            found[key] = _reported_alone(a, b, task, key)
    return found


def _reported_alone(a: Run, b: Run, task: str, key: str) -> dict[str, Any]:
    """Two numbers whose documents say nothing of their difference."""
    values = a.reported[task][key], b.reported[task][key]
    return {"a": values[0], "b": values[1], "difference": values[1] - values[0]}


def _paired_documents(a: Run, b: Run, task: str) -> dict[str, Any]:
    """By "metric,filter", over the documents of both: value and weight in A, value and weight in B, cluster; (n,) each."""
    found = {}
    for key in a.metrics.get(task, {}).keys() & b.metrics.get(task, {}).keys():
        left, right = a.metrics[task][key], b.metrics[task][key]
        doc_ids, in_left, in_right = np.intersect1d(left.doc_id, right.doc_id, assume_unique=True, return_indices=True)
        if len(doc_ids):
            contexts = a.contexts.get(task) or b.contexts.get(task) or {}
            names = [contexts.get(doc_id) or str(doc_id) for doc_id in doc_ids.tolist()]
            clusters = np.unique(names, return_inverse=True)[1].astype(np.int64)
            columns = (left.value[in_left], left.weight[in_left], right.value[in_right], right.weight[in_right])
            found[key] = (*columns, clusters)
    return dict(sorted(found.items()))


def _is_aggregate(a: Run, b: Run, task: str, key: str) -> bool:
    """Whether the metric is what paired.py takes it for: over all documents it must give the number that the run reported."""
    for run in (a, b):
        documents: Documents = run.metrics[task][key]
        reported = run.reported.get(task, {}).get(key)
        computed = paired.aggregate(key.partition(",")[0], documents.value, documents.weight)
        if reported is not None and not _is_close(computed, reported):
            return False
    return True


def _is_close(computed: float, reported: float) -> bool:
    return math.isclose(computed, reported, rel_tol=1e-6, abs_tol=1e-9)


def _flips(left: Requests, right: Requests, twice: bool, near_tie_nats: float) -> dict[str, int]:
    """Documents whose best choice is another one, and how many of those had choices closer than `near_tie_nats` in both runs."""
    doc_ids, best_left, _ = answers_of(left, twice)
    _, best_right, _ = answers_of(right, twice)
    flipped = np.flatnonzero(best_left != best_right)
    near = 0
    for document in flipped:
        start = int(np.searchsorted(left.doc_id, doc_ids[document]))
        one, other = start + int(best_left[document]), start + int(best_right[document])
        leads = left.loglikelihood[one] - left.loglikelihood[other], right.loglikelihood[other] - right.loglikelihood[one]
        near += bool(max(leads) <= near_tie_nats)
    return {"answers": len(doc_ids), "answers_flipped": len(flipped), "near_ties": near}


def _match(left: Requests, right: Requests) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Where the requests of both stand in each."""
    kind = np.dtype([("doc_id", np.int64), ("idx", np.int64)])
    keys = [np.zeros(len(side.doc_id), dtype=kind) for side in (left, right)]
    for key, side in zip(keys, (left, right), strict=True):
        key["doc_id"], key["idx"] = side.doc_id, side.idx
    _, in_left, in_right = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    return in_left, in_right


def _take(requests: Requests, rows: npt.NDArray[np.intp]) -> Requests:
    return Requests(requests.doc_id[rows], requests.idx[rows], requests.loglikelihood[rows], requests.is_greedy[rows])


def _deltas(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N,) absolute differences; equal bits differ by 0, anything that is no number differs from all else by infinity."""
    with np.errstate(invalid="ignore"):
        deltas = np.abs(left - right)
    deltas[np.isnan(deltas)] = np.inf
    deltas[left.view(np.int64) == right.view(np.int64)] = 0.0
    return deltas


def _summary(deltas: npt.NDArray[np.float64]) -> dict[str, float] | None:
    if not len(deltas):
        return None
    quantiles = np.quantile(deltas, list(QUANTILES.values()), method="higher").tolist()
    return {"max": float(deltas.max()), "mean": float(deltas.mean()), **dict(zip(QUANTILES, quantiles, strict=True))}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _group(key: str) -> str:
    return next((name for name, prefixes in _GROUPS if key.startswith(prefixes)), "settings")


_NONE = Requests(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int8))
