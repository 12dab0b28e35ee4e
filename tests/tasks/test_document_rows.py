"""Documents decoded many at once and written by hand are those of `datasets` and `json`."""

import json
from typing import Any

import datasets
import numpy as np
import pytest
from lm_eval.utils import handle_non_serializable

from ddp_eval.tasks.document_rows import dump_document, iterate_rows

ONE_BY_ONE = datasets.Dataset.__iter__
ROWS = [
    {"text": f"{i} é\n\u2028", "choices": ["a", "b"][: i % 3], "number": i, "real": i / 3, "none": None, "yes": i % 2 == 0,
     "nested": {"keys": [1, 2], "more": [{"deep": str(i)}]}, "bytes": b"\xff", "sometimes": i if i % 5 else None}
    for i in range(250)
]  # fmt: skip


def plain() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


@pytest.mark.parametrize(
    "make",
    [
        plain,
        lambda: plain().filter(lambda row: row["number"] % 2 == 0),
        lambda: plain().select([249, 1, 2]),
        lambda: plain().select([]),
        lambda: plain().shuffle(seed=3),
        lambda: plain().select_columns(["text"]),
        lambda: plain().remove_columns(list(ROWS[0])),
        lambda: datasets.concatenate_datasets([plain(), plain()]),
        lambda: plain().select_columns(["number", "real"]).with_format("numpy"),
        lambda: plain().with_format(None, columns=["text", "number"]),
        lambda: plain().with_transform(lambda batch: {"upper": [text.upper() for text in batch["text"]]}),
        lambda: plain().select_columns(["number"]).cast_column("number", datasets.ClassLabel(names=list(map(str, range(250))))),
        lambda: datasets.Dataset.from_dict(
            {"square": [np.eye(2).tolist()] * 3}, features=datasets.Features(square=datasets.Array2D((2, 2), "float32"))
        ),
    ],
)  # fmt: skip
def test_rows_are_the_same(make: Any) -> None:
    """Catches rows in another order, of other types, or of other columns than `datasets` gives."""
    dataset = make()
    assert repr(list(iterate_rows(ONE_BY_ONE)(dataset))) == repr(list(ONE_BY_ONE(dataset)))


def test_rows_are_new_objects() -> None:
    """Catches a document that a task changes, changed for whoever comes after."""
    dataset = plain()
    for row in iterate_rows(ONE_BY_ONE)(dataset):
        row["choices"].append("changed")
    assert repr(list(iterate_rows(ONE_BY_ONE)(dataset))) == repr(ROWS)


@pytest.mark.parametrize(
    "document",
    [
        {"question": 'é "\u2028\x00\x7f\ud800\n', "choices": ["a", 'b"'], "answer": 3, "": ""},
        {"big": 10**30, "minus": -1, "yes": True, "none": None, "real": 0.1, "nan": float("nan")},
        {"empty": [], "mixed": ["a", 1], "nested": {"a": [{}]}, "tuple": ("a",)},
        {1: "a", None: "b"},
        {"array": np.arange(3)},
        {},
        [],
        "text",
    ],
)
def test_json_is_the_same(document: Any) -> None:
    """Catches a document's digest that is not lm_eval's."""
    options = {"indent": 2, "default": handle_non_serializable, "ensure_ascii": False}
    assert dump_document(document, **options) == json.dumps(document, **options)
    assert dump_document({"a": "é"}) == json.dumps({"a": "é"})
