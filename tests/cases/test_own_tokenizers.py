"""Tokenizers with methods that a model's author wrote: the ids and texts that lm_eval's HF backend gets of them."""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_models
import tolerance
import transformers
from encoded_rows import encode_with_lm_eval, rows_of
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.ruler.common_utils import get_tokenizer, resolve_tokenizer_name
from lm_eval_answers import by_lm_eval, odd_answers, texts_of
from task_files import write_task

import ddp_eval
from ddp_eval.config import Config
from ddp_eval.engines.hf import checkpoint
from ddp_eval.errors import UserError
from ddp_eval.system.tokenizer_calls import is_plain
from ddp_eval.tasks import harness, tokenization
from ddp_eval.tasks.text_cuts import Cuts
from ddp_eval.telemetry.meter import Phases

# What an author may write; each does to a text or to ids what its counterpart in transformers does not.
METHODS = {
    "encode, a token before": """
        def encode(self, text, *rest, **options):
            return [5, *super().encode(text, *rest, **options)]
    """,
    "encode, a letter dropped": """
        def encode(self, text, *rest, **options):
            return super().encode(text.replace("e", ""), *rest, **options)
    """,
    "__call__": """
        def __call__(self, text, *rest, **options):
            assert set(options) <= {"truncation", "padding", "return_tensors", "add_special_tokens"}, options
            assert self.padding_side == "left"
            return super().__call__([one.upper() for one in text], *rest, **options)
    """,
    "__call__, by the batch": """
        def __call__(self, text, *rest, **options):
            return super().__call__([one + "!" * len(text) for one in text], *rest, **options)
    """,
    "_encode_plus": """
        def _encode_plus(self, text, *rest, **options):
            lowered = text.lower() if isinstance(text, str) else [one.lower() for one in text]
            return super()._encode_plus(lowered, *rest, **options)
    """,
    "tokenize": """
        def tokenize(self, text, *rest, **options):
            return super().tokenize(text.upper(), *rest, **options)
    """,
    "decode": """
        def decode(self, token_ids, *rest, **options):
            found = super().decode(token_ids, *rest, **options)
            swap = str.swapcase
            return swap(found) if isinstance(found, str) else [swap(one) for one in found]
    """,
    "decode, of tensors and flat lists": """
        def decode(self, token_ids, *rest, **options):
            if hasattr(token_ids, "dim") and token_ids.dim() == 2:
                return [self.decode(row) for row in token_ids]
            if not isinstance(token_ids, (int, list)):
                token_ids = token_ids.tolist()
            return super().decode(token_ids, skip_special_tokens=options.get("skip_special_tokens", False)).replace("e", "E")
    """,
    "build_inputs_with_special_tokens": """
        def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
            return [7, *token_ids_0, 8]
    """,
}
SOURCE = "import transformers\n\n\nclass Own(transformers.PreTrainedTokenizerFast):\n{}"


def source_of(method: str) -> str:
    return SOURCE.format(textwrap.indent(textwrap.dedent(METHODS[method]).strip("\n"), "    "))


@functools.cache
def make_tokenizer(method: str, add_bos: bool = False) -> Any:
    names: dict[str, Any] = {}
    exec(source_of(method), names)
    backend = tiny_models.train(tiny_models.byte_level_bpe(add_bos), tiny_models.training_text())
    return names["Own"](tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=2048)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are cut however few they are."""
    monkeypatch.setattr(tokenization, "MANY_CHARACTERS", 0)


def evaluate(model: Any, tokenizer: Any, path: str, **options: Any) -> dict[str, Any]:
    found = ddp_eval.evaluate(model, tokenizer, ["odd"], include_path=path, log_samples=True, bootstrap_iters=0, **options)
    assert found is not None
    return found


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert [one["arguments"] for one in ours["samples"]["odd"]] == [one["arguments"] for one in theirs["samples"]["odd"]]
    got, expected, texts = odd_answers(ours), odd_answers(theirs), texts_of(theirs["samples"]["odd"])
    assert list(got) == list(expected)
    for key, answer in expected.items():
        if isinstance(answer, tuple):
            assert got[key] == (tolerance.of_kind("llama").close_for(answer[0], texts[key]), answer[1])
        else:
            assert isinstance(answer, str) and got[key] == answer


ROWS = [
    {"context": f"Question {number}: is it\n\nA letter, then {word}?\nAnswer:", "target": f" {word} he went Home"}
    for number, word in enumerate(["one", "Two", "thee", "east"])
]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "loglikelihood": ("acc", {}),
    "generate_until": ("exact_match", {"generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 8, "do_sample": False}}),
}


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("in_parts")
def test_ids_by_methods_of_an_authors_own(method: str, add_bos: bool, tiny_model: Callable[..., Any]) -> None:
    """Catches a shortcut that goes round a method of the tokenizer's own, and one called otherwise than lm_eval calls it.

    A public report: other ids than lm_eval's for a tokenizer whose `encode` puts a token before each text, or drops a letter.
    """
    model, tokenizer = tiny_model("llama"), make_tokenizer(method, add_bos)
    lm, encoder = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), tokenization.Encoder(tokenizer, 2048)
    pairs = [(row["context"], row["target"]) for row in ROWS] + [("", "Two")]
    expected = encode_with_lm_eval("loglikelihood", pairs, tokenizer, model)
    assert [row[1:] for row in rows_of(encoder.encode_pairs(pairs))] == [(one + two, len(two)) for one, two in expected]
    texts = [row["context"] for row in ROWS]
    expected = encode_with_lm_eval("loglikelihood_rolling", texts, tokenizer, model)
    assert [row[1:] for row in rows_of(encoder.encode_rolling(texts))] == [(one + two, len(two)) for one, two in expected]
    prompts = [lm.tok_batch_encode([text])[0][0].tolist() for text in texts]
    assert [ids.tolist() for ids in encoder.encode_prompts(texts)] == prompts


@pytest.mark.parametrize(
    ("method", "kind"),
    [*((method, "generate_until") for method in METHODS if method != "tokenize"), ("encode, a letter dropped", "loglikelihood")],
)
@pytest.mark.usefixtures("in_parts")
def test_answers_by_methods_of_an_authors_own(method: str, kind: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches the same on the way back: stop strings looked for, and answers read, by other methods than lm_eval's."""
    metric, more = KINDS[kind]
    path = write_task(tmp_path / "tasks", kind, ROWS[:2], [metric], **more)
    tokenizer = make_tokenizer(method)
    theirs = by_lm_eval(tiny_model("llama"), tokenizer, path)
    assert_same(evaluate(tiny_model("llama"), tokenizer, path), theirs)


def test_each_method_changes_something(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches an input of this file that would pass whatever is called."""
    plain = tiny_models.make_tokenizer()
    lm = HFLM(pretrained=tiny_model("llama"), tokenizer=plain, batch_size=1)
    text = ROWS[0]["context"]
    for method in METHODS:
        own = HFLM(pretrained=tiny_model("llama"), tokenizer=make_tokenizer(method), batch_size=1)
        changes = (
            own.tok_encode(text) != lm.tok_encode(text),
            own.tok_batch_encode([text])[0].tolist() != lm.tok_batch_encode([text])[0].tolist(),
            own.tok_decode(plain.encode(text)) != lm.tok_decode(plain.encode(text)),
        )
        # Fast tokenizers of transformers 5 go by none of these two.
        assert any(changes) == (method not in ("tokenize", "build_inputs_with_special_tokens")), method


def test_what_goes_the_long_way() -> None:
    """Catches a method on the way that nobody looks for, and tokenizers that are slow without a need."""
    long_way = {method for method in METHODS if not is_plain(make_tokenizer(method))}
    assert long_way == {method for method in METHODS if method.startswith(("encode", "__call__", "_encode_plus"))}
    assert Cuts(make_tokenizer("decode")), "its texts are cut as those of any other"

    class Wrapped(transformers.PreTrainedTokenizerFast):
        @property
        def backend_tokenizer(self) -> Any:
            return self._tokenizer

    backend = tiny_models.train(tiny_models.byte_level_bpe(), tiny_models.training_text())
    assert not is_plain(Wrapped(tokenizer_object=backend, bos_token="<s>"))
    plain = tiny_models.make_tokenizer()
    assert is_plain(plain)
    plain.encode = lambda text, **options: [1]
    assert not is_plain(plain), "also of one object alone"


@pytest.mark.parametrize("method", ["encode, a letter dropped", "__call__", "decode"])
@pytest.mark.usefixtures("in_parts")
def test_by_auto_map_from_a_directory(
    method: str, tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches code of a checkpoint's own that --trust_remote_code lets in and nothing calls."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    place = tmp_path / f"model_{abs(hash(method))}"
    tiny_model("llama").save_pretrained(place)
    tokenizer = tiny_models.make_tokenizer(model_max_length=2048)
    tokenizer.save_pretrained(place)
    settings = json.loads((place / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "own_tokenizer.Own"]}, "tokenizer_class": "Own"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    (place / "own_tokenizer.py").write_text(source_of(method))
    loaded = checkpoint.load_tokenizer({"pretrained": str(place), "trust_remote_code": True})
    assert type(loaded).__name__ == "Own" and type(loaded).__module__.startswith("transformers_modules.")
    theirs_loaded = transformers.AutoTokenizer.from_pretrained(str(place), trust_remote_code=True)
    kind = "loglikelihood" if method.startswith("encode") else "generate_until"
    path = write_task(tmp_path / kind, kind, ROWS[:2], [KINDS[kind][0]], **KINDS[kind][1])
    theirs = by_lm_eval(tiny_model("llama"), theirs_loaded, path)
    assert_same(evaluate(tiny_model("llama"), loaded, path), theirs)


def test_tasks_run_no_code_of_a_tokenizer_that_nobody_allowed(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches code of a repository that a manifest's metadata names: RULER loads it with trust_remote_code=True, always."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    place = tmp_path / "model_of_a_stranger"
    tiny_tokenizer.save_pretrained(place)
    settings = json.loads((place / "tokenizer_config.json").read_text())
    own = {"auto_map": {"AutoTokenizer": [None, "own_tokenizer.Own"]}, "tokenizer_class": "PreTrainedTokenizerFast"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings | own))
    (place / "own_tokenizer.py").write_text(source_of("decode"))
    loaded: list[Any] = []

    def load(**metadata: Any) -> Any:
        loaded.append(get_tokenizer.__wrapped__(resolve_tokenizer_name(metadata)))
        return datasets.DatasetDict(test=datasets.Dataset.from_list([{"text": "one"}]))

    def stop(*unused: Any) -> Any:
        raise UserError("built")

    task = {
        "task": "sized", "output_type": "loglikelihood", "test_split": "test", "custom_dataset": load, "doc_to_text": "{{text}}",
        "doc_to_target": " two", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    for allowed in (False, True):
        config = Config(tasks=[task], metadata={"tokenizer": str(place)}, trust_remote_code=allowed)
        with pytest.raises(UserError, match="built"):
            harness.evaluate_tasks(config, tokenization.Encoder(tiny_tokenizer, 2048, None, None), None, stop, Phases())
    assert [type(one).__name__ == "Own" for one in loaded] == [False, True]
    assert transformers.AutoTokenizer.from_pretrained(str(place), trust_remote_code=True).__class__.__name__ == "Own"
