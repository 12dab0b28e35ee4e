"""What the tests of odd input share: tasks written by hand, a tokenizer that joins texts, lm_eval's own answers. No test here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny_models
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_LOADER = """\
import json, pathlib
import datasets
def load(**unused):
    rows = json.loads((pathlib.Path(__file__).parent / 'rows.json').read_text(encoding='utf-8'))
    return datasets.DatasetDict({'test': datasets.Dataset.from_list(rows)})
"""


def write_task(directory: Path, kind: str, rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], **more: Any) -> str:
    """The task "odd" of the type `kind` over `rows`, each with the text `context`; returns its --include_path.

    rows: with `choices` and `gold` for multiple_choice, else with `target`. more: further fields of the task.
    """
    directory.mkdir(parents=True)
    (directory / "rows.json").write_text(json.dumps(list(rows)), encoding="utf-8")
    (directory / "utils.py").write_text(_LOADER)
    fields: dict[str, Any] = {
        "task": "odd",
        "dataset_path": "json",
        "output_type": kind,
        "test_split": "test",
        "target_delimiter": "",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}",
        "metric_list": [{"metric": metric} for metric in metrics],
        **more,
    }
    if kind == "multiple_choice":
        fields |= {"doc_to_choice": "choices", "doc_to_target": "gold"}
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    (directory / "odd.yaml").write_text("\n".join([*lines, "custom_dataset: !function utils.load", ""]))
    return str(directory)


def by_lm_eval(model: Any, tokenizer: Any, path: str, *, lm_args: Any = None, **options: Any) -> dict[str, Any]:
    """lm_eval's own results of the task "odd", samples included."""
    manager = TaskManager(include_path=path, include_defaults=False)
    return tiny_models.evaluate_with_lm_eval(model, tokenizer, ["odd"], lm_args=lm_args, task_manager=manager, **options)


def answer_with_lm_eval(model: Any, tokenizer: Any, context: str, continuation: str, **options: Any) -> tuple[float, bool]:
    """lm_eval's own answer to one request."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    return lm.loglikelihood([request], disable_tqdm=True)[0]


def answers_of(results: Mapping[str, Any]) -> dict[tuple[int, int], Any]:
    """(document, choice) -> log-probability and flag, the bare sum of a rolling request, or a text."""
    return {
        (sample["doc_id"], index): answer
        for sample in results["samples"]["odd"]
        for index, (answer,) in enumerate(sample["resps"])
    }


def make_joining_tokenizer(**options: Any) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE in which "Answer" is one token and "Ans" two; `<s>` 0, `</s>` 1."""
    merges = [("A", "n"), ("s", "w"), ("sw", "e"), ("swe", "r"), ("An", "swer")]
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 2048, **options}
    )
    assert len(made.encode("Answer")) == 1 and len(made.encode("Ans")) == 2
    return made
