"""lm_eval's bootstrap standard errors, the same draws, without its pool of forked processes.

lm_eval forks one process per core (`lm_eval.api.metrics.bootstrap_stderr`). A fork of a process that runs threads (gloo's, the
tokenizer's, torch's) can leave a lock taken for ever, and the run hangs. Nothing is forked here.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ddp_eval.distributed import watchdog

CHUNK = 1000  # resamples of one seed, lm_eval's number
PATIENCE_S = 10.0  # a bootstrap that would take longer than this on one core is spread over all


def bootstrap_stderr(statistic: Callable[[Sequence[Any]], float], samples: Sequence[Any], iters: int) -> float:
    """Standard deviation of `statistic` over `iters` resamples (whole chunks of 1,000), as lm_eval draws them.

    For lm_eval's `perplexity` the resamples are computed in numpy, any other statistic is called for each. NaN where the
    statistic of a resample is no finite number.
    """
    per_chunk = min(CHUNK, iters)
    chunks = iters // per_chunk
    if getattr(statistic, "__name__", "") == "perplexity":
        values = np.asarray(samples, dtype=np.float64)
        means = (_resampled_means(values, seed, per_chunk) for seed in range(chunks))
        with np.errstate(invalid="ignore", over="ignore"):  # of an infinite perplexity it is NaN
            return float(np.std([x for chunk in _renewing(means) for x in np.exp(-chunk)], ddof=1))
    started = time.perf_counter()
    drawn = _resample(statistic, samples, 0, per_chunk)
    if (chunks - 1) * (time.perf_counter() - started) <= PATIENCE_S:
        rest = list(_renewing(_resample(statistic, samples, seed, per_chunk) for seed in range(1, chunks)))
    else:
        import joblib  # with scikit-learn, which lm_eval needs; its workers are new processes

        tasks = (joblib.delayed(_resample)(statistic, samples, seed, per_chunk) for seed in range(1, chunks))
        rest = list(_renewing(joblib.Parallel(n_jobs=os.cpu_count(), return_as="generator")(tasks)))
    found = [*drawn, *(value for chunk in rest for value in chunk)]
    return statistics.stdev(found) if all(map(math.isfinite, found)) else math.nan


def _renewing(chunks: Iterable[Any]) -> Iterator[Any]:
    """Every chunk that is done may be followed by one that takes --timeout."""
    for chunk in chunks:
        watchdog.touch()
        yield chunk


def _resample(statistic: Callable[[Sequence[Any]], float], samples: Sequence[Any], seed: int, count: int) -> list[float]:
    generator = random.Random(seed)
    return [float(statistic(generator.choices(samples, k=len(samples)))) for _ in range(count)]


def _resampled_means(values: npt.NDArray[np.float64], seed: int, count: int) -> npt.NDArray[np.float64]:
    """(count,) means of resamples: the draws of `random.Random(seed).choices`, whose generator is numpy's MT19937 too."""
    state = random.Random(seed).getstate()[1]
    generator = np.random.RandomState()
    generator.set_state(("MT19937", np.array(state[:-1], dtype=np.uint32), int(state[-1]), 0, 0.0))
    means = []
    rows = max(1, 2**21 // len(values))  # keeps the draws in hand at 16 MiB
    for start in range(0, count, rows):
        draws = generator.random_sample((min(rows, count - start), len(values))) * len(values)
        means.append(values[draws.astype(np.int64)].mean(axis=1))
    return np.concatenate(means)
