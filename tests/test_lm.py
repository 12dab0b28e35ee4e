"""`ddp_eval.lm` on one rank: what lm_eval gets of it is what a run gives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import tiny_models
import tolerance
from chat_templates import CHAT_TEMPLATE
from lm_eval.tasks import TaskManager
from lm_eval_answers import answers_of, texts_of
from task_files import write_generation_task

from ddp_eval import demo
from ddp_eval.api import evaluate
from ddp_eval.errors import UserError
from ddp_eval.lm import DDPEvalLM, launch

pytestmark = pytest.mark.usefixtures("no_lm_eval_index")


@pytest.fixture
def lm(tiny_model_path: Callable[[str], Path]) -> Iterator[DDPEvalLM]:
    made = launch(pretrained=str(tiny_model_path("llama")), device="cpu", batch_size=4)
    assert made is not None
    with made:
        yield made


def by_lm_eval(lm: DDPEvalLM, path: str, tasks: list[str], **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=path, include_defaults=False)
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    return results


def by_us(model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
    results = evaluate(model, options.pop("tokenizer"), tasks, log_samples=True, bootstrap_iters=0, **options)
    assert results is not None
    return results


def test_texts_and_repeats(lm: DDPEvalLM, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches a repeated request answered once, twice alike, or drawn otherwise than in a run."""
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    path = write_generation_task(tmp_path / "tasks", ["What is it?", "the end of"], settings, more="repeats: 3\n")
    theirs = by_lm_eval(lm, path, ["pairs"])
    ours = by_us(tiny_model("llama"), ["pairs"], tokenizer=lm.tokenizer, include_path=path)
    answers = [one["resps"] for one in theirs["samples"]["pairs"]]
    assert answers == [one["resps"] for one in ours["samples"]["pairs"]]
    assert all(len(set(texts)) > 1 for (texts,) in answers)


def test_scores_and_what_lm_eval_asks_besides(lm: DDPEvalLM, tiny_model: Callable[..., Any]) -> None:
    """Catches another kind of request mixed up with the first, and results that do not name their model."""
    tasks, rounding = ["demo_lambada", "demo_wikitext"], tolerance.of_kind("llama")
    theirs = by_lm_eval(lm, demo.TASKS_PATH, tasks, limit=1)
    ours = by_us(tiny_model("llama"), tasks, tokenizer=lm.tokenizer, limit=1)
    for task in tasks:
        expected, texts = answers_of(ours["samples"][task]), texts_of(ours["samples"][task])
        for key, answer in answers_of(theirs["samples"][task]).items():
            value, other = (one[0] if isinstance(one, tuple) else one for one in (answer, expected[key]))
            assert value == rounding.close_for(other, texts[key], float32_sum=False), task
    assert theirs["config"]["model_num_parameters"] == tiny_model("llama").num_parameters()
    assert theirs["config"]["model_dtype"] == "torch.float32" and theirs["max_length"] == 2048


def test_lm_evals_warnings_of_nothing(lm: DDPEvalLM, caplog: pytest.LogCaptureFixture) -> None:
    """Catches lines about every task that ask for nothing, and a filter that outlives the model."""
    logger = logging.getLogger("lm_eval.api.task")
    for _ in range(2):
        logger.warning("demo: Custom kwargs can be passed.\nFor details see task Readme.")
        logger.warning("the answers are wrong")
        lm.close()
    assert len(caplog.messages) == 3 and caplog.messages[0] == "the answers are wrong"


def test_a_template_by_name(tiny_model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches the default template applied for the named one."""
    templates = {"default": CHAT_TEMPLATE, "short": "{{ messages[0]['content'] }} So:"}
    tiny_models.make_tokenizer(chat_template=templates, model_max_length=2048).save_pretrained(tmp_path)
    named = {"chat_template": "short"}
    made = launch(pretrained=str(tiny_model_path("llama")), tokenizer=str(tmp_path), device="cpu", chat_template_args=named)
    assert made is not None
    with made:
        results = by_lm_eval(made, demo.TASKS_PATH, ["demo_lambada"], limit=1, apply_chat_template=True)
    assert results["samples"]["demo_lambada"][0]["arguments"][0][0].endswith(" So:")


def test_what_cannot_be_meant(tiny_model_path: Callable[[str], Path]) -> None:
    """Catches arguments that the command refuses and a program gets away with, and a closed model that waits for its ranks."""
    model = str(tiny_model_path("llama"))
    for arguments, sentence in (
        ({}, "model_args pretrained must be a path or a name, got nothing"),
        ({"pretrained": model, "delta": "d"}, "model_args delta is not supported yet"),
        ({"pretrained": model, "dtpye": "float32"}, "model_args dtpye is unknown: did you mean dtype"),
        ({"pretrained": model, "layout": "rows"}, "--layout must be auto"),
        ({"pretrained": "no/such/model/here"}, "does not exist"),
    ):
        with pytest.raises(UserError, match=sentence):
            launch(**arguments)
    made = launch(pretrained=model, device="cpu")
    assert made is not None
    made.close()
    made.close()
    with pytest.raises(UserError, match="the model is closed"):
        made.loglikelihood([])
