"""Which of tasks' own functions may be called again for the next model, and come out as in a new process."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from ddp_eval.tasks.pure_code import keeps_no_state
from ddp_eval.tasks.task_sources import TaskSources, _loader_of_modules

HEAD = "import re\nPATTERN = re.compile('a+', re.DOTALL)\nLABELS = ('A', 'B')\n"


def loaded(path: Path, source: str) -> bool:
    path.write_text(source)
    return keeps_no_state(_loader_of_modules(TaskSources())(path).f)


@pytest.mark.parametrize(
    "source",
    [
        "def f(doc): return PATTERN.sub('', doc['a'])",
        "def g(a, b=1): return a\ndef f(doc, results):\n  doc['a'] = g(doc['a'])\n  found = {}\n  found['x'] = 1\n  return found",
        "def f(docs):\n  def change(doc):\n    doc['b'] = LABELS.index(doc['a'])\n    return doc\n  return docs.map(change)",
    ],
)
def test_code_that_keeps_nothing(source: str, tmp_path: Path) -> None:
    assert loaded(tmp_path / "plain.py", HEAD + source)


@pytest.mark.parametrize(
    "source",
    [
        "SEEN = []\ndef f(doc): SEEN.append(doc)",
        "N = 0\ndef f(doc):\n  global N\n  N += 1",
        "def f(doc, seen=[]): seen.append(doc)",
        "def f(doc): f.calls = 1",
        "import random\ndef f(doc): return random.random()",
        "import numpy as np\ndef f(doc): return np.random.rand()",
        "import functools\n@functools.cache\ndef f(doc): return [doc]",
        "import json\ndef f(doc): json.seen[doc] = 1",
        "import nltk\ndef f(doc): return doc",
        "class Count: n = 0\ndef f(doc): return Count.n",
        "def f(doc): return open(doc['a']).read()",
        "def make():\n  seen = []\n  def f(doc): seen.append(doc)\n  return f\nf = make()",
        "TABLE = {'a': 1}\ndef f(doc): TABLE['a'] = 2",
    ],
)
def test_code_that_may_keep_something(source: str, tmp_path: Path) -> None:
    """Catches a counter, a cache, a draw, and whatever a library keeps: the last model's would be the next one's."""
    assert not loaded(tmp_path / "state.py", HEAD + source)


def test_lm_evals_own_tasks() -> None:
    """Catches a rule that lets nothing pass."""
    names = {
        "wikitext.preprocess_wikitext": "process_results",
        "hellaswag.utils": "process_docs",
        "winogrande.preprocess_winogrande": "doc_to_text",
    }
    found = {name: getattr(importlib.import_module(f"lm_eval.tasks.{name}"), function) for name, function in names.items()}
    assert {name: keeps_no_state(function) for name, function in found.items()} == dict.fromkeys(names, True)
    assert not keeps_no_state(len)
    assert not keeps_no_state(lambda doc: doc)
