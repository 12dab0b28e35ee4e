"""Is B better than A on the same documents? Paired statistics, pure numpy.

Every metric here is g(Σ value / Σ weight) over documents: a mean (g the identity, weights 1), or a perplexity of sums.
Documents that share a context (the questions on one passage) are no independent draws: they are resampled, and their errors
summed, as one cluster.

Letters: n documents, C clusters, B resamples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ddp_eval.output.documents import TRANSFORMS, FloatArray

IntArray = npt.NDArray[np.int64]

RESAMPLES = 10_000
LEAST_P = 1 / (RESAMPLES + 1)  # by bootstrap
LEAST_CLUSTERS = 20  # resamples of fewer hold too few draws for an interval or a p-value
_MOST_KINDS = 64  # of clusters alike: few kinds are drawn by multinomials, which is faster than one by one
_DRAWS_AT_ONCE = 2**22


def aggregate(metric: str, values: FloatArray, weights: FloatArray) -> float:
    """The score of one run. metric: lm_eval's name, without its filter."""
    transform = TRANSFORMS.get(metric, lambda ratio: ratio)
    return float(transform(np.asarray(values.sum() / weights.sum())))


def compare_metric(
    metric: str, a: tuple[FloatArray, FloatArray], b: tuple[FloatArray, FloatArray], clusters: IntArray
) -> dict[str, Any]:
    """B minus A with its standard error, 95% interval and p-values.

    a, b:      (n,) values and (n,) weights of the same documents in the same order.
    clusters:  (n,) whole numbers; equal ones share a context.

    None stands for what the data cannot tell: the standard error of one cluster; interval and bootstrap p-value of fewer than
    LEAST_CLUSTERS, or of clusters that all differ alike.
    """
    num_clusters = len(np.unique(clusters))
    scores = aggregate(metric, *a), aggregate(metric, *b)
    difference = scores[1] - scores[0] if scores[0] != scores[1] else 0.0  # also of two that are infinite
    with np.errstate(invalid="ignore"):
        drawn = _resampled_differences(metric, a, b, clusters, np.random.default_rng(0))
    is_mean = metric not in TRANSFORMS
    stderr = clustered_stderr(b[0] - a[0], clusters) if is_mean else float(drawn.std(ddof=1)) * _missing_spread(num_clusters)
    if num_clusters > 1:
        drawn = difference + (drawn - difference) * _widening(num_clusters)
    tells = num_clusters >= LEAST_CLUSTERS and float(np.ptp(drawn)) > 1e-12 * abs(difference)
    outcome = {
        "a": aggregate(metric, *a),
        "b": aggregate(metric, *b),
        "difference": difference,
        "stderr": stderr if num_clusters > 1 else None,
        "interval_95": [float(bound) for bound in np.quantile(drawn, [0.025, 0.975])] if tells else None,
        "p_bootstrap": bootstrap_p(drawn, difference) if tells else None,
        "documents": len(clusters),
        "clusters": num_clusters,
        "p_mcnemar": None,
    }
    if is_mean and np.isin(a[0], (0, 1)).all() and np.isin(b[0], (0, 1)).all():
        lost, won = int((a[0] > b[0]).sum()), int((a[0] < b[0]).sum())
        outcome |= {"right_to_wrong": lost, "wrong_to_right": won}
        if num_clusters == len(clusters):  # the test takes documents as independent
            outcome["p_mcnemar"] = mcnemar_p(lost, won)
    return outcome


def mcnemar_p(lost: int, won: int) -> float:
    """Exact two-sided McNemar test: how likely a split of the changed answers at least this uneven is by a fair coin."""
    changed, least = lost + won, min(lost, won)
    # C(n, k-1) = C(n, k) * k / (n - k + 1): the tail in units of its largest term, as far as a float can tell.
    tail, term = 1.0, 1.0
    for k in range(least, 0, -1):
        term *= k / (changed - k + 1)
        if term < 1e-18 * tail:
            break
        tail += term
    return min(1.0, 2 * tail * (math.comb(changed, least) / 2**changed))


def clustered_stderr(differences: FloatArray, clusters: IntArray) -> float:
    """Standard error of the mean of (n,) paired differences, 0 < C <= n clusters; NaN for one cluster.

    With every document a cluster of its own this is std(ddof=1) / sqrt(n).
    """
    groups = np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(groups, weights=differences - differences.mean())
    count = len(sums)
    return math.sqrt(float((sums**2).sum()) * count / (count - 1)) / len(differences) if count > 1 else math.nan


def bootstrap_p(drawn: FloatArray, difference: float) -> float:
    """Two-sided: the share of resampled differences that lie as far from the observed one as that lies from zero."""
    if difference == 0:
        return 1.0
    far = np.abs(drawn - difference) >= abs(difference) * (1 - 1e-12)
    return float((far.sum() + 1) / (len(drawn) + 1))


def _missing_spread(clusters: int) -> float:
    """What the standard deviation over resamples of C clusters is too small by: their variance lacks a factor C / (C - 1)."""
    return math.sqrt(clusters / (clusters - 1)) if clusters > 1 else math.nan


def _widening(clusters: int) -> float:
    """What intervals of resampled C clusters are too narrow by (the "expanded percentile" of Hesterberg 2015, arXiv:1411.5279).

    Beside `_missing_spread` their tails are a normal's where Student's t with C - 1 degrees of freedom would be right. The
    latter's 97.5% point by its expansion in 1 / degrees of freedom, within 0.001 from 19 on.
    """
    z, freedom = 1.959964, clusters - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return _missing_spread(clusters) * t / z


def _resampled_differences(
    metric: str, a: tuple[FloatArray, FloatArray], b: tuple[FloatArray, FloatArray], clusters: IntArray, rng: np.random.Generator
) -> FloatArray:
    """(B,) differences of whole resamples of clusters."""
    groups = np.unique(clusters, return_inverse=True)[1]
    sums = np.stack([np.bincount(groups, weights=column) for column in (*a, *b)], axis=1)  # (C, 4)
    kinds, members = np.unique(sums, axis=0, return_counts=True)
    if len(kinds) <= _MOST_KINDS:
        totals = rng.multinomial(len(sums), members / len(sums), size=RESAMPLES) @ kinds
    else:
        rows = max(1, _DRAWS_AT_ONCE // len(sums))
        sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
        totals = np.concatenate([sums[rng.integers(len(sums), size=(size, len(sums)))].sum(axis=1) for size in sizes])
    transform = TRANSFORMS.get(metric, lambda ratio: ratio)
    differences: FloatArray = transform(totals[:, 2] / totals[:, 3]) - transform(totals[:, 0] / totals[:, 1])
    return differences
