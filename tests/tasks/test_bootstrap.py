"""Our bootstrap against lm_eval's own, which forks a pool of processes."""

import math
import multiprocessing

import numpy as np
import pytest
from lm_eval.api import metrics

from ddp_eval.tasks import bootstrap

RANDOM = np.random.default_rng(3)
LOGLIKELIHOODS = (-RANDOM.exponential(3.0, size=57)).tolist()
LABELS = [(int(a), int(b)) for a, b in RANDOM.integers(0, 2, size=(40, 2))]


@pytest.fixture
def lm_evals(monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    return metrics.bootstrap_stderr


@pytest.mark.parametrize("iters", [100, 1000, 4000, 4500])
@pytest.mark.parametrize("statistic, samples", [(metrics.perplexity, LOGLIKELIHOODS), (metrics.median, LOGLIKELIHOODS)])
def test_same_as_lm_eval(lm_evals, statistic, samples, iters):
    """Catches draws of another generator or seed, chunks left out, and the wrong divisor of the variance."""
    assert bootstrap.bootstrap_stderr(statistic, samples, iters) == pytest.approx(lm_evals(statistic, samples, iters), rel=1e-12)


@pytest.mark.parametrize("samples", [[math.nan, 0.5], [math.nan, math.nan], [math.inf, 0.5], [-math.inf, math.inf]])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of lm_eval's own sums
def test_no_number_is_nan_as_in_lm_eval(lm_evals, samples):
    """Catches a traceback in place of results, where an empty answer of one document leaves a resample without a number."""
    assert math.isnan(lm_evals(metrics.nanmean, samples, 1000))
    assert math.isnan(bootstrap.bootstrap_stderr(metrics.nanmean, samples, 1000))


def test_slow_statistic_over_all_cores_is_the_same(lm_evals, monkeypatch):
    """Catches chunks that come back out of order, twice or not at all from the worker processes."""
    monkeypatch.setattr(bootstrap, "PATIENCE_S", 0.0)
    assert bootstrap.bootstrap_stderr(metrics.matthews_corrcoef, LABELS, 300) == pytest.approx(
        lm_evals(metrics.matthews_corrcoef, LABELS, 300), rel=1e-12
    )
    monkeypatch.setattr(bootstrap, "CHUNK", 50)
    spread = bootstrap.bootstrap_stderr(metrics.median, LOGLIKELIHOODS, 200)
    monkeypatch.setattr(bootstrap, "PATIENCE_S", 1e9)
    assert spread == bootstrap.bootstrap_stderr(metrics.median, LOGLIKELIHOODS, 200)


def test_nothing_is_forked(monkeypatch):
    """Catches lm_eval's pool, whose fork beside gloo's threads can hang a run for ever."""
    monkeypatch.setattr(multiprocessing, "Pool", None)
    assert bootstrap.bootstrap_stderr(metrics.perplexity, LOGLIKELIHOODS, 1000) > 0
