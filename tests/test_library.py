"""ls, validate and --show_config: lm_eval's own, by way of the leader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddp_eval.api import evaluate
from ddp_eval.cli import ls, validate
from ddp_eval.errors import UserError
from ddp_eval.tasks import harness, select


@pytest.fixture(autouse=True)
def without_lm_evals_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    task_manager = select.TaskManager
    monkeypatch.setattr(select, "TaskManager", lambda **options: task_manager(**{**options, "include_defaults": False}))


@pytest.mark.parametrize(
    ("what", "shown", "hidden"),
    [
        ("tasks", ["demo_mmlu", "demo_hellaswag", "|Group", "|Tag"], []),
        ("groups", ["demo_mmlu", "|Group"], ["demo_hellaswag", "|Tag"]),
        ("subtasks", ["demo_hellaswag", "demo_mmlu_philosophy", "multiple_choice"], ["|Group", "|Tag"]),
        ("tags", ["|Tag"], ["demo_hellaswag", "|Group"]),
    ],
)
def test_ls(what: str, shown: list[str], hidden: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a list that leaves the demo's tasks out, or shows groups for tags."""
    assert ls.main([what]) == 0
    text = capsys.readouterr().out.replace(" ", "")
    assert [word for word in shown if word not in text] == [] and [word for word in hidden if word in text] == []


def test_ls_says_what_there_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Catches a bare `ls` that waits for lm_eval's index, and a directory that is overlooked."""
    assert ls.main([]) == 0 and "usage: python -m ddp_eval ls" in capsys.readouterr().out
    with pytest.raises(UserError, match="ls: argument what: invalid choice: 'all'"):
        ls.main(["all"])
    with pytest.raises(UserError, match="--include_path must be a directory of task files, got"):
        ls.main(["tasks", "--include_path", str(tmp_path / "gone")])
    (tmp_path / "mine.yaml").write_text("task: my_own_task\noutput_type: loglikelihood\n")
    assert ls.main(["tasks", "--include-path", str(tmp_path)]) == 0 and "my_own_task" in capsys.readouterr().out


def test_validate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Catches a name that is unknown, or of a kind that no run would take, called valid."""
    assert validate.main(["--tasks", "demo_mmlu,demo_hellaswag", "demo_lam*"]) == 0
    assert capsys.readouterr().out.endswith("All tasks found and valid (5 tasks)\n")
    with pytest.raises(UserError, match="there is no task demo_helaswag: did you mean demo_hellaswag"):
        validate.main(["-t", "demo_mmlu", "demo_helaswag"])
    (tmp_path / "strange.yaml").write_text("task: strange\noutput_type: telepathy\n")
    with pytest.raises(UserError, match="the task strange is of the type telepathy"):
        validate.main(["-t", "strange", "--include_path", str(tmp_path)])
    with pytest.raises(UserError, match="the following arguments are required: --tasks"):
        validate.main([])


def test_a_task_that_shows_images(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches a multimodal task whose images are dropped, and one that is refused by a traceback of lm_eval's."""
    (tmp_path / "seen.yaml").write_text(
        "task: seen\noutput_type: multiple_choice\ncustom_dataset: !function utils.load\ntest_split: test\n"
        "doc_to_text: '{{question}}'\ndoc_to_image: [image]\ndoc_to_choice: [a, b]\ndoc_to_target: 0\n"
    )
    (tmp_path / "utils.py").write_text(
        "import datasets\ndef load(**unused):\n"
        "    rows = datasets.Dataset.from_list([{'question': 'q', 'image': 'i'}])\n"
        "    return datasets.DatasetDict({'test': rows})\n"
    )
    with pytest.raises(UserError, match=r"^the task seen shows images or sound to the model, which is not supported$"):
        evaluate(tiny_model("llama"), tiny_tokenizer, ["seen"], include_path=str(tmp_path))


def test_the_settings_that_are_shown(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches --show_config that prints thousands of samples, of answers or of a GPU's load, or no JSON."""
    options = {"limit": 1, "log_samples": True, "bootstrap_iters": 0, "output_path": str(tmp_path / "run")}
    results = evaluate(tiny_model("llama"), tiny_tokenizer, ["demo_lambada"], **options)
    assert results is not None and results["samples"] and results["ddp_eval"]["telemetry"]
    shown = json.loads(harness.format_results(results))
    assert shown["configs"]["demo_lambada"]["output_type"] == "loglikelihood"
    assert shown == json.loads((tmp_path / "run" / "results.json").read_text())
