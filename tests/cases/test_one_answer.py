"""One question, one answer: `validate` and `plan` say what a run would say, and lm_eval's way in what the command would.

Source: `validate --tasks` of a multimodal task, which said "valid".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddp_eval.api import config_from_options
from ddp_eval.cli import flags, plan, validate
from ddp_eval.config import Config
from ddp_eval.errors import UserError
from ddp_eval.layout import Layout
from ddp_eval.lm import DDPEvalLM
from ddp_eval.placement import choose
from ddp_eval.tasks import harness
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.telemetry.meter import Phases

DATA = "custom_dataset: !function code.load\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_target: a\n"
FILES = {
    "image.yaml": f"task: image\noutput_type: generate_until\ndoc_to_image: [picture]\n{DATA}",
    "sound.yaml": f"task: sound\noutput_type: generate_until\ndoc_to_audio: [noise]\n{DATA}",
    "grouped.yaml": "group: grouped\ntask: [{task: plain, doc_to_image: [picture]}]\n",
    "plain.yaml": f"task: plain\noutput_type: loglikelihood\n{DATA}",
    "telepathy.yaml": f"task: telepathic\noutput_type: telepathy\n{DATA}",
    "unsafe.yaml": f"task: unsafe\noutput_type: loglikelihood\nunsafe_code: true\n{DATA}",
    "lost.yaml": f"task: lost\noutput_type: loglikelihood\nprocess_docs: !function code.nowhere\n{DATA}",
    "gone.yaml": f"task: gone\noutput_type: loglikelihood\nprocess_docs: !function no_such_module.docs\n{DATA}",
    "wrong.yaml": f"task: wrong\noutput_type: loglikelihood\nprocess_docs: !function broken.docs\n{DATA}",
    "leaving.yaml": f"task: leaving\noutput_type: loglikelihood\nprocess_docs: !function leaving.docs\n{DATA}",
    "shown.yaml": "task: shown\nclass: !function code.Shown\n",
    "spoken.yaml": "task: spoken\nclass: !function code.Spoken\n",
    "broken.py": "def docs(:\n",
    "leaving.py": "import sys\nsys.exit('a program is missing')\n",
    "code.py": "import datasets\nfrom lm_eval.api.task import ConfigurableTask, Task\n"
    "def load(**unused):\n"
    "    return datasets.DatasetDict({'test': datasets.Dataset.from_list([{'q': 'one', 'picture': 'p', 'noise': 'n'}])})\n"
    "class Shown(ConfigurableTask):\n    MULTIMODAL = True\n"
    "    def __init__(self, config=None):\n        super().__init__(config={'task': 'shown', 'custom_dataset': load, "
    "'test_split': 'test', 'doc_to_text': '{{q}}', 'doc_to_target': 'a', 'output_type': 'loglikelihood'})\n"
    "class Spoken(Task):\n    OUTPUT_TYPE = 'telepathy'\n    def download(self, *unused):\n        self.dataset = {}\n"
    "    has_training_docs = has_validation_docs = has_test_docs = doc_to_text = doc_to_target = process_results = None\n"
    "    construct_requests = aggregation = higher_is_better = None\n",
}
REFUSED = ["image", "sound", "grouped", "telepathic", "lost", "gone", "wrong", "leaving", "shown", "spoken", "plane", "*nothing*"]


@pytest.fixture
def folder(tmp_path: Path, no_lm_eval_index: None) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def run(folder: Path, tiny_tokenizer: Any) -> Callable[..., str]:
    """run(task, **options) -> the sentence with which an evaluation refuses, or "scores" where it would score."""

    class Scoring(Exception):
        pass

    def score(*unused: Any) -> Any:
        raise Scoring

    def try_it(task: str, **options: Any) -> str:
        try:
            config = config_from_options([task], include_path=str(folder), **options)
            harness.evaluate_tasks(config, Encoder(tiny_tokenizer, 2048, None, None), None, score, Phases())
        except UserError as error:
            return str(error)
        except Scoring:
            return "scores"
        raise AssertionError("neither refused nor scored")

    return try_it


def ask_validate(folder: Path, task: str) -> str:
    try:
        assert validate.main(["--tasks", task, "--include_path", str(folder)]) == 0
    except UserError as error:
        return str(error)
    return "valid"


@pytest.mark.parametrize("task", REFUSED)
def test_validate_refuses_what_a_run_refuses(task: str, run: Callable[..., str], folder: Path) -> None:
    """Catches a task called valid that no run would take: multimodal, of a kind, or with code that is not there."""
    said = ask_validate(folder, task)
    assert said == run(task) and said not in ("valid", "scores")
    file = folder / f"{task}.yaml"
    if file.exists() and task != "grouped":
        assert ask_validate(folder, str(file)) != "valid", "by its path"


def test_validate_and_a_run_agree_on_what_is_served(
    run: Callable[..., str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the checks taken too far."""
    assert (ask_validate(folder, "plain"), run("plain")) == ("valid", "scores")
    assert ask_validate(folder, str(folder / "plain.yaml")) == "valid"
    capsys.readouterr()
    assert ask_validate(folder, "unsafe") == "valid"
    assert "The task unsafe runs code that a model writes: a run of it needs --confirm_run_unsafe_code" in capsys.readouterr().out
    assert run("unsafe") == "the task unsafe runs code that a model writes, which is unsafe: --confirm_run_unsafe_code allows it"
    assert run("unsafe", confirm_run_unsafe_code=True) == "scores"


def test_a_task_that_shows_images_costs_no_download(run: Callable[..., str], folder: Path) -> None:
    """Catches gigabytes of documents fetched for a task that its file alone shows not to be served."""
    (folder / "code.py").write_text("def load(**unused):\n    raise AssertionError('fetched')\n")
    for task in ("image", "sound", "grouped", "telepathic", "unsafe"):
        assert run(task).startswith("the task ")


def test_plan_recommends_what_a_run_takes(
    folder: Path, tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a layout recommended that the run itself refuses, for tasks that generate and for weights that cannot be split."""
    generates = FILES["plain.yaml"].replace("plain", "generates").replace("loglikelihood", "generate_until")
    (folder / "generates.yaml").write_text(generates)
    base = ["--model_args", f"pretrained={tiny_model_path('llama')}", "--include_path", str(folder), "--gpus", "2", "--tasks"]

    def layouts(*words: str) -> dict[str, str]:
        plan.main([*base, *words])
        rows = [
            line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("replicas", "tensor", "layers"))
        ]
        return {row[0]: " ".join(row[1:]) for row in rows}

    assert "impossible" not in "".join(layouts("plain").values())
    found = layouts("generates")
    assert "impossible" in found["layers:2"] and "the task generates generates text" in found["layers:2"]
    assert "impossible" not in found["replicas"] + found["tensor:2"]
    found = layouts("plain", "--load", "broadcast")
    assert "impossible" in found["layers:2"] and "impossible" in found["tensor:2"] and "impossible" not in found["replicas"]
    with pytest.raises(UserError, match=r"^plan is for --model hf: vllm lays a model out itself"):
        plan.main([*base, "plain", "--model", "vllm"])


@pytest.mark.parametrize("words", ["peft=adapter", "load_in_8bit=True"])
def test_what_only_whole_copies_serve(words: str) -> None:
    """Catches `plan` and a run with lists of their own of what cannot be split."""
    config = flags.parse(["--model_args", f"pretrained=m,{words}", "--tasks", "t"])[0]
    assert choose.why_not(config, None, Layout("replicas", 1)) is None
    for layout in (Layout("tensor", 2), Layout("layers", 2)):
        assert str(choose.why_not(config, None, layout)).startswith("nothing but whole copies serves ")


def test_layouts_of_lm_evals_way_in() -> None:
    """Catches `layout=measure` taken for another layout without a word, and texts asked of layers, which have no answer."""
    with pytest.raises(UserError, match="--layout measure is for the command"):
        DDPEvalLM(pretrained="demo", layout="measure")
    with pytest.raises(UserError, match="the task t generates text, which --layout layers:2 does not serve"):
        choose.check_texts(Config(), Layout("layers", 2), "t")
    choose.check_texts(Config(), Layout("tensor", 2), "t")
