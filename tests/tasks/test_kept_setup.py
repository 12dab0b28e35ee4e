"""What one evaluation leaves to the next: the same results as from nothing, whatever tasks do, and nothing that is stale."""

from __future__ import annotations

import copy
import datetime
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_models
from task_files import write_task

import ddp_eval
from ddp_eval.api import Evaluator, evaluate
from ddp_eval.config import Config
from ddp_eval.tasks import kept_tasks, template_dates
from ddp_eval.tasks.kept_setup import KeptSetup
from ddp_eval.tasks.task_sources import TaskSources
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.tasks.tokenizer_digest import digest_tokenizer

pytestmark = pytest.mark.usefixtures("no_lm_eval_index")
GENERATION = str(Path(__file__).parent.parent / "support" / "generation_tasks")
# Draws, repeats and filters; choices, a whole text, and a task with code of its own.
TASKS = ["gen_drawn", "gen_boolean", "demo_hellaswag", "demo_wikitext"]


def essence(results: dict[str, Any] | None) -> Any:
    """All but times, and the addresses that lm_eval writes for functions."""
    assert results is not None
    section = results["ddp_eval"]
    plain = {key: value for key, value in results.items() if key not in ("ddp_eval", "date", "start_time", "end_time")}
    plain.pop("total_evaluation_time_seconds")
    plain["ddp_eval"] = {key: value for key, value in section.items() if key not in ("phases_s", "telemetry", "lm_eval_files")}
    return json.loads(re.sub("0x[0-9a-f]+", "", json.dumps(plain, default=str)))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever texts are encoded."""
    calls: list[int] = []
    for name in ("encode_pairs", "encode_prompts", "encode_rolling"):
        method = getattr(Encoder, name)

        def count(self: Any, *args: Any, method: Callable[..., Any] = method) -> Any:
            calls.append(1)
            return method(self, *args)

        monkeypatch.setattr(Encoder, name, count)
    return calls


def test_second_call_is_a_fresh_one(
    encoded: list[int], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Catches answers of the last model among those of this one, other draws, and digests that say so of what is the same."""
    options: dict[str, Any] = {"limit": 2, "bootstrap_iters": 50, "log_samples": True, "include_path": GENERATION}
    options |= {"output_path": str(tmp_path / "out"), "overwrite": True, "num_fewshot": 1}
    models = tiny_model("llama"), tiny_models.make_model("llama")
    for parameter in models[1].parameters():
        parameter.data.mul_(1.01)
    evaluator = Evaluator(tiny_tokenizer, TASKS, **options)
    found, scores, calls = [], [], []
    for model in (*models, models[0]):
        results = evaluator.evaluate(model)
        found.append(essence(results))
        scores.append([(tmp_path / "out" / f"{name}.parquet").read_bytes() for name in ("scores", "texts", "documents")])
        calls.append(len(encoded))
        assert results is not None
        results["samples"]["gen_drawn"][0]["arguments"][0][1]["until"] = "changed by whoever has the samples"
        results["samples"]["demo_hellaswag"][0]["doc"].clear()
    assert calls[0] == calls[1] == calls[2] == 3
    assert found[0] == found[2] != found[1]
    assert scores[0] == scores[2] != scores[1]
    assert found[1] == essence(evaluate(models[1], tiny_tokenizer, TASKS, **options))
    assert scores[1][0] == (tmp_path / "out" / "scores.parquet").read_bytes()


_STATEFUL = """
import random
COUNT = []
def count(doc, results):
    COUNT.append(1)
    doc["context"] += "!"
    return {"acc": len(COUNT) + random.random()}
"""


def test_tasks_with_state(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches a counter of a task's own that goes on where the last model's ended, and draws that depend on what was kept."""
    rows = [{"context": f"{number} is", "target": " odd"} for number in range(3)]
    path = write_task(tmp_path / "tasks", "loglikelihood", rows, ["acc"])
    (tmp_path / "tasks" / "utils.py").open("a").write(_STATEFUL)
    (tmp_path / "tasks" / "odd.yaml").open("a").write("process_results: !function utils.count\n")
    evaluator = Evaluator(tiny_tokenizer, ["demo_lambada", "odd"], include_path=path, limit=3, bootstrap_iters=0)
    first, second = (evaluator.evaluate(tiny_model("llama")) for _ in range(2))
    assert first is not None
    assert 2 < first["results"]["odd"]["acc,none"] < 3
    assert essence(first) == essence(second)


def test_what_is_stale_is_not_used(encoded: list[int], tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches prompts of yesterday's documents, of another tokenizer, of other options."""
    tokenizer = tiny_models.make_tokenizer()
    path = write_task(tmp_path / "tasks", "loglikelihood", [{"context": "one", "target": " two"}], ["acc"])
    evaluator = Evaluator(tokenizer, ["odd"], include_path=path, bootstrap_iters=0)

    def digest(**options: Any) -> tuple[int, str, int]:
        encoded.clear()
        results = evaluator.evaluate(tiny_model("llama"), **options)
        assert results is not None
        return len(encoded), results["ddp_eval"]["prompts_sha256"], results["n-samples"]["odd"]["effective"]

    first = digest()
    assert first[0] == 1
    assert digest() == (0, *first[1:])
    (tmp_path / "tasks" / "rows.json").write_text('[{"context": "three", "target": " two"}, {"context": "4", "target": "5"}]')
    changed = digest()
    assert changed[0] == 1 and changed[1] != first[1] and changed[2] == 2
    (tmp_path / "tasks" / "odd.yaml").open("a").write("description: 'Count. '\n")
    described = digest()
    assert described[0] == 1 and described[1] != changed[1]
    assert digest(limit=1)[0] == 1
    assert digest(limit=1)[0] == 0
    (tmp_path / "tasks" / "more.json").write_text("[]")
    assert digest(limit=1)[0] == 1
    tokenizer.add_tokens(["four"])
    assert digest(limit=1)[0] == 1
    assert digest(limit=1, seed=None)[0] == digest(limit=1, seed=None)[0] == 1


def test_digest_of_a_tokenizer() -> None:
    """Catches ids of one tokenizer taken for another's, and one that is another after its first use."""
    tokenizer = tiny_models.make_tokenizer()
    before = digest_tokenizer(tokenizer)
    tokenizer(["one", "two words"], padding=False, truncation=True, max_length=4)
    assert digest_tokenizer(tokenizer) == before == digest_tokenizer(tiny_models.make_tokenizer())
    tokenizer.chat_template = "{{ messages }}"
    assert digest_tokenizer(tokenizer) != before
    assert digest_tokenizer(type("Own", (type(tokenizer),), {})(tokenizer_object=tokenizer.backend_tokenizer)) is None


def test_metadata_that_a_loader_may_read() -> None:
    """Catches documents made for the last model's name: some tasks load by what --model_args says."""

    def ignores(data_files: str, **rest: object) -> None: ...

    def reads_one(pretrained: str, **rest: object) -> None: ...

    def reads_rest(**rest: object) -> object:
        return rest

    metadata = {"pretrained": "a", "dtype": "float32"}
    found = [
        kept_tasks.metadata_read({"custom_dataset": load, "metadata": metadata}) for load in (ignores, reads_one, reads_rest)
    ]
    assert found == [{}, {"pretrained": "a"}, metadata]
    assert kept_tasks.metadata_read({"metadata": metadata}) == {}


def test_public_names() -> None:
    assert ddp_eval.Evaluator is Evaluator
    assert KeptSetup().is_new


def test_a_file_that_changes_while_the_model_scores(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches prompts of the first model's documents for the second, with the digest of its own: the file was written to
    between loading and the end."""
    path = write_task(tmp_path / "tasks", "loglikelihood", [{"context": "one", "target": " two"}], ["acc"])
    evaluator = Evaluator(tiny_tokenizer, ["odd"], include_path=path, bootstrap_iters=0)
    model = tiny_model("llama")
    rows = tmp_path / "tasks" / "rows.json"
    hook = model.register_forward_hook(lambda *_: rows.write_text('[{"context": "three", "target": " four"}]') and None)
    first = evaluator.evaluate(model)
    hook.remove()
    second = evaluator.evaluate(model)
    fresh = evaluate(model, tiny_tokenizer, ["odd"], include_path=path, bootstrap_iters=0)
    assert first is not None and second is not None and fresh is not None
    assert second["ddp_eval"]["prompts_sha256"] == fresh["ddp_eval"]["prompts_sha256"] != first["ddp_eval"]["prompts_sha256"]


def test_documents_of_a_callers_own_function(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches the documents of the first call at the second: a function of the caller's may return others by then. And a module
    of the caller's that is gone afterwards, so that nothing of it can be pickled any more."""
    rows = [{"context": "one is", "target": " odd"}]
    task = {
        "task": "own", "custom_dataset": lambda **_: datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}),
        "dataset_path": "own", "output_type": "loglikelihood", "test_split": "test", "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    evaluator = Evaluator(tiny_tokenizer, [task], bootstrap_iters=0)
    first = evaluator.evaluate(tiny_model("llama"))
    rows.append({"context": "two is", "target": " even"})
    second = evaluator.evaluate(tiny_model("llama"))
    assert first is not None and second is not None
    assert [found["n-samples"]["own"]["effective"] for found in (first, second)] == [1, 2]
    assert sys.modules[__name__].__file__ == __file__


def test_a_template_that_prints_the_date(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches prompts with yesterday's date behind midnight, where a run by itself has today's."""
    days = [datetime.datetime(2026, 11, 30, 23, 59)]
    clock = types.SimpleNamespace(datetime=types.SimpleNamespace(now=lambda: days[0]))
    monkeypatch.setattr(template_dates, "datetime", clock)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% if strftime_now is defined %}{{ strftime_now( '%d %b') }}{% endif %}{{ strftime_now(\"%Y\") }}"
    config = Config(tasks=["demo_lambada"], apply_chat_template=True)
    assert template_dates.printed_dates(config, tokenizer) == {"%d %b": "30 Nov", "%Y": "2026"}
    assert template_dates.printed_dates(Config(tasks=["demo_lambada"]), tokenizer) == {}
    setup, found = KeptSetup(), []
    for day in (days[0], days[0], datetime.datetime(2026, 12, 1)):
        days[0] = day
        setup.begin(config, Encoder(tokenizer, 64), TaskSources())
        found.append(setup.is_new)
        setup._asked = setup._asked or object()  # type: ignore[assignment]
    assert found == [True, False, True] and "the chat template prints the date, which is another now" in caplog.text
    tokenizer.chat_template = "{{ strftime_now(date_format) }}"
    assert template_dates.printed_dates(config, tokenizer) is None
    setup.begin(config, Encoder(tokenizer, 64), TaskSources())
    assert setup.is_new
