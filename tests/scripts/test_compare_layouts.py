"""scripts/compare_layouts.py: what counts as the numbers of one rank."""

from types import SimpleNamespace

import pytest
from compare_layouts import compare, sent_mb


def outcome(nats):
    scores = SimpleNamespace(task=["t"], doc_id=[0], idx=[0], loglikelihood=[nats], is_greedy=[True], num_tokens=[5000])
    return {"scores": scores, "metrics": {}, "wall_s": 1.0, "phases_s": {"forward": 1.0, "gather": 0.0}}


@pytest.mark.parametrize(
    ("moved", "exact", "agrees"),
    [(0.0, True, True), (1e-9, True, False), (9e-5, False, True), (2e-4, False, False), (float("nan"), False, False)],
)
def test_long_requests_get_no_allowance(moved, exact, agrees):
    """Catches a pass mark that grows with a request's tokens: here 5,000, of which each might have moved by 1e-6."""
    assert compare(outcome(-100.0), outcome(-100.0 + moved), exact)["agrees"] == agrees


def test_the_limit_can_be_given():
    """Catches a limit for one model and processor that another cannot change, or that reaches rows of equal bits."""
    runs = outcome(-100.0), outcome(-100.0002)
    assert compare(*runs, exact=False, within_nats=1e-3)["agrees"]
    assert not compare(*runs, exact=True, within_nats=1e-3)["agrees"]


def test_what_ranks_sent_is_added_up():
    """Catches bytes of results or messages that are counted as the layout's, and a rank that is left out."""
    ranks = [
        {"collectives": {"all_gather (weights)": {"sent_bytes": 3e6}, "all_gather (results)": {"sent_bytes": 5e6}}},
        {"collectives": {"all_gather (weights)": {"sent_bytes": 1e6}, "send": {"sent_bytes": 2e6}}},
    ]
    assert sent_mb({"ranks": ranks}) == 6.0
