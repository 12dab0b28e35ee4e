"""The walk over model types: a sample of each way in which models run, and a walk that goes on where it was interrupted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import model_table
import pytest
import walk_models
from launch import launch


@pytest.mark.parametrize(
    ("model_type", "mode", "generation"),
    [
        ("gemma4_text", "packs", "batches"),  # heads of two sizes
        ("glm_moe_dsa", "packs", "batches"),  # an indexer
        ("lfm2", "shared caches", "batches"),  # short convolutions
        ("bert", "each request by itself", "one by one"),  # not causal
        ("bart", "pairs", "one by one"),
    ],
)
def test_a_sample_of_each_mode(model_type: str, mode: str, generation: str, tmp_path: Path) -> None:
    """Catches a kind of model whose numbers are not lm_eval's any more, or that no longer runs as it did."""
    finished = launch(0, "--types", model_type, "--output", tmp_path / "walk", program=(walk_models.__file__,), timeout_s=200)
    assert finished.returncode == 0, str(finished)
    found = json.loads((tmp_path / "walk.json").read_text())[model_type]
    assert (found["verdict"], found["mode"], found["generation"]) == ("right", mode, generation), found
    assert found["largest_nats"] < 5e-4 and found["texts_equal"]


def test_a_walk_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches types walked twice, results of an earlier start lost, and a table without them."""
    walked: list[str] = []

    def walk(model_type: str, limit_s: float) -> walk_models.Outcome:
        walked.append(model_type)
        way = ("each request by itself", "one by one") if model_type == "bert" else ("packs", "batches")
        return walk_models.Outcome("right", *way, 1e-5, True, is_causal=model_type != "bert", code=walk_models.code_now())

    monkeypatch.setattr(walk_models, "walk_in_child", walk)
    monkeypatch.setattr(walk_models, "CAUSAL", ["llama", "mamba", "bert"])
    start = ["walk_models.py", "--output", str(tmp_path / "walk")]
    for more in (["--types", "mamba"], [], [], ["--again"]):
        monkeypatch.setattr(sys, "argv", [*start, *more])
        walk_models.main()
    assert walked == ["mamba", "llama", "bert"]
    monkeypatch.setattr(walk_models, "code_now", lambda: "other code")
    walk_models.main()
    assert walked[3:] == ["llama", "mamba", "bert"], "what other code gave"
    assert sorted(json.loads((tmp_path / "walk.json").read_text())) == ["bert", "llama", "mamba"]
    text = (tmp_path / "walk.md").read_text()
    assert "| right | packs | 2 |" in text and "2 share prefixes (100%): 2 in packs." in text and "other code (3 types)" in text
    assert "| llama | right | packs | batches | 1.0e-05 | yes |  |" in text


def test_the_tables_of_families_are_the_records() -> None:
    """Catches tables in the docs that say otherwise than the walk, and a family of the newest models without a row."""
    found = json.loads(model_table.RECORD.read_text())
    page = model_table.PAGE.read_text(encoding="utf-8")
    assert model_table.page_of(page, found) == page, "python scripts/model_table.py"
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for year in ("2026", "2025"):
        missing = [family for family in model_table.FAMILIES[year] if not any(row.startswith(f"| {family} |") for row in rows)]
        assert not missing
