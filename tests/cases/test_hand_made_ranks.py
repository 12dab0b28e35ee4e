"""`ddp_eval.lm` on two ranks: requests that belong to no task, asked in turn. Source: attempts to break this program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import hand_made_main
import launch as processes
import tolerance

from ddp_eval.lm import launch


def test_two_ranks_answer_as_one(tiny_model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches a second call that finds the other ranks gone, an empty one that they wait for, and answers that change places."""
    model, out = str(tiny_model_path("llama")), tmp_path / "out.json"
    finished = processes.launch(2, model, out, program=(hand_made_main.__file__,))
    assert finished.returncode == 0, str(finished)
    alone = launch(pretrained=model, device="cpu")
    assert alone is not None
    with alone:
        expected = json.loads(json.dumps(hand_made_main.answers_of(alone)))
    found = json.loads(out.read_text())
    assert found[2] == [] and [len(part) for part in found] == [len(part) for part in expected]
    most_tokens = max(tolerance.count_at_most(text) for text in hand_made_main.TEXTS)
    rounding = tolerance.of_kind("llama")
    for ours, one in zip(found, expected, strict=True):
        if ours and isinstance(ours[0], list):
            assert [flag for _, flag in ours] == [flag for _, flag in one]
            ours, one = ([value for value, _ in part] for part in (ours, one))
        assert ours == [value if isinstance(value, str) else rounding.close(value, most_tokens) for value in one]
    assert len({found[4][0], found[4][1], found[4][3]}) > 1 and found[4][2] == found[0][0]
