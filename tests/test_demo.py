"""The embedded default: its rows are the ones SOURCES.md names, its model was trained fairly, repeatably, and knows something."""

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from places import ROOT, SCRIPTS

from ddp_eval import demo

DATA = ROOT / "ddp_eval" / "demo" / "data"
SCRIPT = SCRIPTS / "make_demo_model.py"


@pytest.fixture(scope="module")
def make_demo_model():
    spec = importlib.util.spec_from_file_location("make_demo_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_rows(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_data_are_what_sources_say():
    """Catches a data file edited, added or dropped without its attribution."""
    table = re.findall(r"^\| `(\S+\.jsonl)` \| (\d+) \| `(\w{64})`", (DATA.parent / "SOURCES.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _, _ in table) == sorted(path.name for path in DATA.iterdir())
    for name, num_rows, digest in table:
        assert len(read_rows(name)) == int(num_rows), name
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest, name


def test_demo_stays_small():
    """Catches a model or data file that would bloat every clone and wheel."""
    sizes_bytes = {path.name: path.stat().st_size for path in DATA.parent.rglob("*") if path.is_file()}
    assert sum(sizes_bytes[path.name] for path in DATA.iterdir()) < 600_000
    assert sum(path.stat().st_size for path in Path(demo.MODEL_PATH).iterdir()) < 6_000_000


def test_training_never_sees_an_evaluated_expression(make_demo_model):
    """Catches a generator that leaks evaluated questions into training, or teaches wrong answers."""
    train, held_out = make_demo_model.split_expressions()
    evaluated = {row["input"]: row["target"] for row in read_rows("boolean_expressions_test.jsonl")}
    assert len(evaluated) == 250
    assert not any(question.endswith(tuple(evaluated)) for question, _ in train + held_out)
    assert not {question for question, _ in train} & {question for question, _ in held_out}
    assert dict(train)["not ( True ) is"] == "False" and dict(train)["True or False and False is"] == "True"


def test_grammar_covers_the_evaluated_expressions(make_demo_model):
    """Catches an enumeration that misses forms: without the exclusion it must produce every evaluated row, rightly answered."""
    every = set(make_demo_model.expressions(8))
    for row in read_rows("boolean_expressions_test.jsonl"):
        text = row["input"].removesuffix(" is")
        assert text in every
        assert str(eval(text)) == row["target"]


def test_training_never_sees_an_evaluated_text(make_demo_model):
    """Catches English taken from rows that a demo task scores."""
    english = "\n".join(make_demo_model.read_english())
    evaluated = [row["text"] for row in read_rows("lambada_test.jsonl")]
    evaluated += [row["query"] for row in read_rows("hellaswag_validation.jsonl")]
    evaluated += [row["page"] for row in read_rows("wikitext_test.jsonl")]
    evaluated += [row["question"] for path in DATA.glob("mmlu_*_test.jsonl") for row in read_rows(path.name)]
    assert not [text for text in evaluated if text in english]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_same_steps_give_the_same_bytes(tmp_path):
    """Catches set order, an unseeded draw or a clock in training: two processes with other hash seeds must write equal files."""
    seeds: Any = {"1": {}, "2": {"PYTHONHASHSEED": "2"}}
    for name, seed in seeds.items():
        made = launch(0, "--steps", 2, "--batch_size", 8, "--out", tmp_path / name, program=(str(SCRIPT),), **seed)
        assert made.returncode == 0, str(made)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert "model.safetensors" in names and "tokenizer.json" in names
    assert names == sorted(path.name for path in (tmp_path / "2").iterdir())
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_words_of_expressions_are_single_tokens():
    """Catches a loader that rebuilds the tokenizer in another class's image and so splits text other than in training."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    assert tokenizer.tokenize("not ( True ) is False") == ["not", "Ġ(", "ĠTrue", "Ġ)", "Ġis", "ĠFalse"]
    text = "Façade “quoted” 東京 \n\n  two  spaces"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    messages = [{"role": "user", "content": "not True is"}]
    templated = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert templated == "<s><|user|>not True is\n<|assistant|>"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_model_is_above_chance_by_the_harness(chat, monkeypatch):
    """Catches a broken checkpoint, prompt or choice: 100 of the evaluated expressions, scored by lm_eval's own backend."""
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    scores = simple_evaluate(
        model="hf",
        model_args={"pretrained": demo.MODEL_PATH, "dtype": "float32"},
        tasks=["demo_boolean_expressions"],
        task_manager=TaskManager(include_path=demo.TASKS_PATH, include_defaults=False),
        device="cpu",
        batch_size=16,
        limit=100,
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    targets = [row["target"] for row in read_rows("boolean_expressions_test.jsonl")[:100]]
    majority = max(targets.count("True"), targets.count("False")) / 100
    assert scores["results"]["demo_boolean_expressions"]["acc,none"] >= max(0.8, majority + 0.2)
