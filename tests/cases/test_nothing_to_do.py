"""Groups without tasks, documents that are all removed, and other ways to ask for nothing: one sentence before any work.

Source: a group file with no tasks, which ended in KeyError: 'engine'.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddp_eval.api import config_from_options, evaluate
from ddp_eval.cli import validate
from ddp_eval.errors import UserError
from ddp_eval.tasks import harness
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.telemetry.meter import Phases

TASK = (
    "output_type: loglikelihood\ncustom_dataset: !function code.load\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_target: a\n"
)
FILES = {
    "task.yaml": f"task: some\ntag: some_tag\n{TASK}",
    "none.yaml": "group: none\ntask: []\n",
    "null.yaml": "group: null_group\ntask: null\n",
    "missing.yaml": "group: missing\naggregate_metric_list: [{metric: acc}]\n",
    "text.yaml": "group: text\ntask: some\n",  # lm_eval takes a list alone
    "nested.yaml": "group: nested\ntask: [none, {group: inner, task: [null_group]}]\n",
    "typo.yaml": "group: typo\ntask: [some, sume]\n",
    "partly.yaml": "group: partly\ntask: [none, some]\n",
    "nameless.yaml": "group: nameless\ntask: [{output_type: loglikelihood}]\n",
    "numbers.yaml": "group: numbers\ntask: [1, 2]\n",
    "circle.yaml": "group: circle\ntask: [{group: inner, task: [round]}]\n",
    "round.yaml": "group: round\ntask: [circle]\n",
    "left.yaml": "group: left\ntask: [right]\n",
    "right.yaml": "group: right\ntask: [left]\n",
    "bare.yaml": "task: bare\noutput_type: loglikelihood\n",
    "removed.yaml": f"task: removed\nprocess_docs: !function code.remove\n{TASK}",
    "filtered.yaml": f"task: filtered\nprocess_docs: !function code.filter_all\n{TASK}",
    "no_examples.yaml": "task: no_examples\nnum_fewshot: 1\ntraining_split: train\n"
    f"fewshot_config: {{split: train, process_docs: !function code.remove}}\n{TASK}",
    "code.py": "import datasets\n"
    "def load(**unused):\n"
    "    rows = datasets.Dataset.from_list([{'q': 'one'}, {'q': 'two'}])\n"
    "    return datasets.DatasetDict({'test': rows, 'train': rows})\n"
    "def remove(documents):\n    return documents.select([])\n"
    "def filter_all(documents):\n    return documents.filter(lambda row: False)\n",
}


@pytest.fixture
def folder(tmp_path: Path, no_lm_eval_index: None) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def refusal(folder: Path, tiny_tokenizer: Any) -> Callable[..., str]:
    """refusal(tasks, **options) -> the sentence with which an evaluation ends before it scores anything."""

    def never(*unused: Any) -> Any:
        raise AssertionError("it came as far as to score")

    def refuse(*tasks: Any, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            config = config_from_options(list(tasks), include_path=str(folder), **options)
            harness.evaluate_tasks(config, Encoder(tiny_tokenizer, 2048, None, None), None, never, Phases())
        return str(caught.value)

    return refuse


NOTHING = {
    "none": "the group none holds no tasks: its file must list some under task",
    "null_group": "the group null_group holds no tasks: its file must list some under task",
    "missing": "the group missing holds no tasks: its file must list some under task",
    "text": "the group text holds no tasks: its file must list some under task",
    "nested": "the group nested holds no tasks: its file must list some under task",
    "typo": "the task sume, which the group typo names, is in no task file",
    "nameless": "the group nameless holds no tasks: its file must list some under task",
    "numbers": "the group numbers holds no tasks: its file must list some under task",
    "circle": "the group circle holds itself: circle > circle::inner > round > circle",
    "left": "the group left holds itself: left > right > left",
    "bare": "the task bare is in no task file, or its file gives neither dataset_path nor custom_dataset",
}


@pytest.mark.parametrize("name", NOTHING)
def test_names_that_lead_to_no_task(name: str, refusal: Callable[..., str], folder: Path) -> None:
    """Catches a KeyError, an endless recursion, a run of nothing that is called complete, and `validate` that calls it valid."""
    assert refusal(name).startswith(NOTHING[name])
    if name != "typo":  # which holds it, too
        assert refusal("some", name).startswith(NOTHING[name]), "beside a task that there is"
    with pytest.raises(UserError) as caught:
        validate.main(["--tasks", name, "--include_path", str(folder)])
    assert str(caught.value).startswith(NOTHING[name])


def test_files_and_configs_that_lead_to_no_task(refusal: Callable[..., str], folder: Path) -> None:
    """Catches the same in a file that is given by its path, and in a config that a program gives."""
    (folder / "list.yml").write_text("task: [some]\n")
    (folder / "other.yml").write_text("output_type: loglikelihood\n")
    (folder / "broken.yml").write_text("task: [\n")
    assert refusal(str(folder / "none.yaml")) == NOTHING["none"]
    assert refusal({"group": "mine", "task": []}) == "the group mine holds no tasks: its file must list some under task"
    for content in (str(folder / "list.yml"), str(folder / "other.yml"), {"task": ["some"]}, {}):
        assert refusal(content).startswith("a task or group must have a name, under task or group, got {")
    assert refusal(str(folder / "broken.yml")).startswith(f"lm_eval could not read the task file {folder / 'broken.yml'}: ")
    with pytest.raises(UserError, match=r"^lm_eval could not read the task file .*broken\.yml: "):
        validate.main(["--tasks", str(folder / "broken.yml")])


def test_documents_that_are_all_removed(refusal: Callable[..., str]) -> None:
    """Catches an IndexError, or scores of nothing, where process_docs leaves no document."""
    for name in ("removed", "filtered"):
        assert refusal(name) == f"the task {name} has no documents to evaluate"
        assert refusal("some", name) == f"the task {name} has no documents to evaluate"
    assert "no_examples" in refusal("no_examples")


def test_a_choice_of_no_documents(refusal: Callable[..., str], tmp_path: Path) -> None:
    """Catches an empty choice taken for all documents, or for a run without any."""
    assert refusal("some", limit=0) == "--limit must be more than 0 (documents per task, or a fraction below 1), got 0"
    assert refusal("some", limit="0.0").startswith("--limit must be more than 0")
    assert refusal("some", samples={"some": []}) == "--samples must name at least one document for task some"
    assert refusal("some", samples={}).startswith("--samples must be a JSON object such as")
    (tmp_path / "samples.json").write_text(json.dumps({"some": []}))
    assert refusal("some", samples=str(tmp_path / "samples.json")) == "--samples must name at least one document for task some"
    assert refusal() == "no tasks were given"


def test_a_group_that_is_partly_empty(folder: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches tasks refused over an empty group beside them, which lm_eval passes over; a tag's tasks are found, too."""
    options: dict[str, Any] = {"include_path": str(folder), "bootstrap_iters": 0}
    results = evaluate(tiny_model("llama"), tiny_tokenizer, ["partly"], **options)
    assert results is not None and results["n-samples"]["some"]["effective"] == 2
    assert validate.main(["--tasks", "some_tag", "--include_path", str(folder)]) == 0
