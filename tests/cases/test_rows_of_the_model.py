"""Ids and positions that a model has no row for, and configs that no model can have: a sentence before any work."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tolerance
import torch
import transformers
from lm_eval_answers import by_lm_eval, odd_answers
from task_files import write_task

import ddp_eval
from ddp_eval import errors
from ddp_eval.cli import plan
from ddp_eval.engines.hf import checkpoint, config_check, limits
from ddp_eval.errors import UserError
from ddp_eval.lm import launch

EXTRA = "<extra>"  # a token that the tokenizer has and the model has no row for: id 400 of 400


@pytest.fixture(scope="module")
def larger_tokenizer() -> Any:
    tokenizer = tiny_models.make_tokenizer(model_max_length=2048)
    tokenizer.add_tokens([EXTRA])
    assert tokenizer.encode(EXTRA) == [tiny_models.VOCAB_SIZE]
    return tokenizer


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where anything is planned or run."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("work was begun")

    for name in (
        "ddp_eval.run.leader.make_plan",
        "ddp_eval.run.leader.run_plan",
        "ddp_eval.run.leader.plan_texts",
    ):
        monkeypatch.setattr(name, fail)


def evaluate(model: Any, tokenizer: Any, path: str, **options: Any) -> dict[str, Any]:
    found = ddp_eval.evaluate(model, tokenizer, ["odd"], include_path=path, log_samples=True, bootstrap_iters=0, **options)
    assert found is not None
    return found


def rows_with(place: str, text: str = EXTRA) -> list[dict[str, str]]:
    """Eight documents, of which the sixth has `text` in its context, or in or at the end of its target."""
    rows = [{"context": f"Document {number} of the", "target": f" end {number}"} for number in range(8)]
    key, form = {"context": ("context", "{}The {} of"), "target": ("target", "{} and {} end"), "end": ("target", "{} and{}")}[
        place
    ]
    rows[5][key] = form.format(rows[5][key], text)
    return rows


SENTENCE = (
    r"^the model has 400 token ids, and the tokenizer gives 400 for '<extra>': the task odd holds it in document 5, choice 0; "
)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        *(("loglikelihood", place) for place in ("context", "target", "end")),
        *(("loglikelihood_rolling", place) for place in ("target", "end")),
        ("generate_until", "context"),
    ],
)
@pytest.mark.parametrize("model", ["llama", "t5"])
@pytest.mark.usefixtures("no_work")
def test_an_id_without_a_row(
    model: str, kind: str, place: str, tiny_model: Callable[..., Any], larger_tokenizer: Any, tmp_path: Path
) -> None:
    """Catches an IndexError of torch's, on CUDA an assertion of the device, where one document of eight has such an id."""
    metric = {"loglikelihood": "acc", "generate_until": "exact_match"}.get(kind, "word_perplexity")
    more: dict[str, Any] = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}} if kind == "generate_until" else {}
    path = write_task(tmp_path / "tasks", kind, rows_with(place), [metric], **more)
    with pytest.raises(UserError, match=SENTENCE):
        evaluate(tiny_model(model), larger_tokenizer, path)


def test_an_id_that_nobody_uses(tiny_model: Callable[..., Any], larger_tokenizer: Any, tmp_path: Path) -> None:
    """Catches a tokenizer that is refused for its length alone: lm_eval gives numbers where no text has the token."""
    rows = rows_with("context", "one")
    path = write_task(tmp_path / "tasks", "loglikelihood", rows, ["acc"])
    theirs, ours = (odd_answers(run(tiny_model("llama"), larger_tokenizer, path)) for run in (by_lm_eval, evaluate))
    for (doc, choice), (value, greedy) in theirs.items():
        assert ours[doc, choice] == (tolerance.of_kind("llama").close_for(value, rows[doc]["target"]), greedy)


def test_rows_beyond_the_vocabulary(larger_tokenizer: Any, tmp_path: Path) -> None:
    """Catches a check by the config's vocab_size where the embedding has more rows, as after `resize_token_embeddings`."""
    model = tiny_models.make_model("llama")
    model.resize_token_embeddings(tiny_models.VOCAB_SIZE + 1)
    rows = rows_with("context")
    path = write_task(tmp_path / "tasks", "loglikelihood", rows, ["acc"])
    theirs, ours = (odd_answers(run(model, larger_tokenizer, path)) for run in (by_lm_eval, evaluate))
    value, greedy = theirs[5, 0]
    assert ours[5, 0] == (tolerance.of(model).close_for(value, rows[5]["target"]), greedy)


def test_an_embedding_with_more_rows_than_the_head(larger_tokenizer: Any, tmp_path: Path) -> None:
    """Catches one number for both: Llama 3.2 Vision feeds eight ids that it cannot predict."""
    model = tiny_models.make_model("llama")
    model.set_input_embeddings(torch.nn.Embedding(tiny_models.VOCAB_SIZE + 1, 32))
    path = write_task(tmp_path / "fed", "loglikelihood", rows_with("context"), ["acc"])
    assert len(odd_answers(evaluate(model, larger_tokenizer, path))) == 8
    path = write_task(tmp_path / "predicted", "loglikelihood", rows_with("end"), ["acc"])
    with pytest.raises(UserError, match=SENTENCE):
        evaluate(model, larger_tokenizer, path)


@pytest.mark.usefixtures("no_work")
def test_examples_and_the_prefix_token(tiny_model: Callable[..., Any], larger_tokenizer: Any, tmp_path: Path) -> None:
    """Catches ids that come from elsewhere than the document: an example, and prefix_token_id in --model_args."""
    rows = [{"context": f"Question {number}", "target": " yes"} for number in range(3)]
    shots = {"sampler": "first_n", "samples": [{"context": EXTRA, "target": "no"}]}
    path = write_task(tmp_path / "shots", "loglikelihood", rows, ["acc"], fewshot_config=shots, num_fewshot=1)
    with pytest.raises(UserError, match="the tokenizer gives 400 for '<extra>': the task odd holds it in document 0, choice 0"):
        evaluate(tiny_model("llama"), larger_tokenizer, path)
    path = write_task(tmp_path / "plain", "loglikelihood", rows, ["acc"])
    for given, sentence in ((400, "no id of the model, which has 400 of them"), (2**40, "no token id")):
        with pytest.raises(UserError, match=rf"^prefix_token_id={given} in --model_args is {sentence}$"):
            evaluate(tiny_model("llama"), larger_tokenizer, path, model_args={"prefix_token_id": given})


@pytest.mark.usefixtures("no_work")
def test_as_a_model_of_lm_eval_and_in_a_plan(tiny_model: Callable[..., Any], larger_tokenizer: Any, tmp_path: Path) -> None:
    """Catches the ways in that have a planning of their own."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    larger_tokenizer.save_pretrained(tmp_path / "model")
    path = write_task(tmp_path / "tasks", "loglikelihood", rows_with("target"), ["acc"])
    with pytest.raises(UserError, match=SENTENCE):
        plan.main(["--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", "odd", "--include_path", path])
    from lm_eval.api.instance import Instance

    lm = launch(pretrained=str(tmp_path / "model"), device="cpu")
    assert lm is not None
    with lm, pytest.raises(Exception, match="the tokenizer gives 400 for '<extra>'"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("a", EXTRA), 0)])


class Unknowing(transformers.ByT5Tokenizer):
    """A tokenizer in Python with no id for some text."""

    def encode(self, text: str, **options: Any) -> Any:
        return [None if letter == "?" else ord(letter) for letter in text]


def test_no_id_at_all(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches a TypeError of numpy's for a tokenizer that knows neither a text nor an unknown token."""
    path = write_task(tmp_path / "tasks", "loglikelihood", [{"context": "What", "target": " is it?"}], ["acc"])
    with pytest.raises(UserError, match=r"^the tokenizer gives 'What is it\?' the token id None, which is none: "):
        evaluate(tiny_model("llama"), Unknowing(extra_ids=0), path)


def test_ids_at_the_edges() -> None:
    """Catches an off-by-one at either end, and the last token of a causal request taken for one that is fed."""
    from ddp_eval.packs.batches import NO_PROMPTS
    from ddp_eval.packs.requests import requests_from_lists

    def first(tokens: list[list[int]], targets: list[int], fed: int, predicted: int, is_pair: bool = False) -> Any:
        rows = limits.Limits(fed, predicted, None, None)
        try:
            limits._check_ids(requests_from_lists(tokens, targets), NO_PROMPTS, rows, is_pair)
        except errors.OutOfRange as found:
            return found.index, found.token
        return None

    assert first([[1, 2], [3, 9]], [1, 1], 10, 10) is None
    assert first([[1, 2], [3, 10]], [1, 1], 10, 10) == (1, 10)
    assert first([[1, 2], [-1, 3]], [1, 1], 10, 10) == (1, -1)
    assert first([[1, 2, 12]], [1], 5, 13) is None and first([[1, 12, 2]], [1], 5, 13) == (0, 12)
    assert first([[1, 12, 2]], [1], 13, 5) is None and first([[1, 2, 12]], [1], 13, 5) == (0, 12)
    assert first([[7, 1], [1, 7]], [1, 1], 8, 4, is_pair=True) == (1, 7)


SMALL: dict[str, Any] = {"vocab_size": 400, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
LENGTH = 16
NARROW: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**{**tiny_models._SHAPE, "max_position_embeddings": LENGTH}),
    "gpt2": lambda: transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **SMALL, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=LENGTH,
    ),
    "gptj": lambda: transformers.GPTJConfig(**SMALL, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=LENGTH),
    "codegen": lambda: transformers.CodeGenConfig(**SMALL, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=LENGTH),
    "opt": lambda: transformers.OPTConfig(
        **SMALL, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=LENGTH,
    ),
    "biogpt": lambda: transformers.BioGptConfig(
        **SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=LENGTH
    ),
    "ctrl": lambda: transformers.CTRLConfig(**SMALL, n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=LENGTH),
    "openai-gpt": lambda: transformers.OpenAIGPTConfig(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH),
    "roberta": lambda: transformers.RobertaConfig(
        **SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, is_decoder=True,
    ),
    "roformer": lambda: transformers.RoFormerConfig(
        **SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, is_decoder=True,
    ),
    "prophetnet": lambda: transformers.ProphetNetConfig(
        **SMALL, hidden_size=32, encoder_ffn_dim=48, num_encoder_layers=2, num_encoder_attention_heads=4, decoder_ffn_dim=48,
        num_decoder_layers=2, num_decoder_attention_heads=4, max_position_embeddings=LENGTH, is_decoder=True,
        is_encoder_decoder=False, add_cross_attention=False,
    ),
    "xglm": lambda: transformers.XGLMConfig(
        **SMALL, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=LENGTH
    ),
    "bloom": lambda: transformers.BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: transformers.MptConfig(**SMALL, d_model=32, n_heads=4, n_layers=2, max_seq_len=LENGTH),
    "mamba": lambda: transformers.MambaConfig(**SMALL, hidden_size=32, num_hidden_layers=2, state_size=8),
}  # fmt: skip


def narrow_model(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(NARROW[kind](), dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", NARROW)
def test_positions_are_those_that_a_forward_takes(kind: str) -> None:
    """Catches a table of positions that is not found, or has another length than what a forward is found to take."""
    model = narrow_model(kind)

    def fits(length: int) -> bool:
        try:
            with torch.inference_mode():
                model(input_ids=torch.full((1, length), 7), use_cache=False)
        except (IndexError, RuntimeError):
            return False
        return True

    longest = max(length for length in range(LENGTH - 4, LENGTH + 5) if fits(length))
    expected = None if longest == LENGTH + 4 else longest
    assert limits.limits_of(model).positions == expected
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(NARROW[kind]())
    assert limits.limits_of(whole) == (SMALL["vocab_size"], SMALL["vocab_size"], expected, None)


@pytest.mark.parametrize("kind", ["bart", "m2m_100", "t5"])
def test_positions_of_an_encoder_decoder(kind: str) -> None:
    """Catches tables of encoder and decoder mixed up, and one taken for a table that grows or is not there."""
    expected = 512 if kind == "bart" else None
    found = limits.limits_of(tiny_models.make_model(kind), is_pair=True)
    assert found == (tiny_models.VOCAB_SIZE, tiny_models.VOCAB_SIZE, expected, expected)


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    tiny_models.make_tokenizer(model_max_length=2048).save_pretrained(directory)
    return directory


def test_a_window_beyond_the_positions(tmp_path: Path) -> None:
    """Catches max_length beyond a learned table: an IndexError in the middle of a run. A rotary model takes it, as in lm_eval."""
    place = save(narrow_model("gpt2"), tmp_path / "gpt2")
    sentence = rf"^max_length={2 * LENGTH} in --model_args is more than the model has positions for: give {LENGTH} or less$"
    with pytest.raises(UserError, match=sentence):
        launch(pretrained=str(place), max_length=2 * LENGTH, device="cpu")
    with pytest.raises(UserError, match=sentence):
        plan.main(["--model_args", f"pretrained={place},max_length={2 * LENGTH}"])
    rows = [{"context": "One of the many words of a long text that", "target": " goes on and on until it ends"}]
    path = write_task(tmp_path / "tasks", "loglikelihood", rows, ["acc"])
    tokenizer = tiny_models.make_tokenizer()
    with pytest.raises(UserError, match=sentence):
        evaluate(narrow_model("gpt2"), tokenizer, path, model_args={"max_length": 2 * LENGTH})
    assert len(tokenizer.encode(rows[0]["context"] + rows[0]["target"])) > LENGTH + 1
    theirs = by_lm_eval(narrow_model("llama"), tokenizer, path, lm_args={"max_length": 2 * LENGTH})
    ours = evaluate(narrow_model("llama"), tokenizer, path, model_args={"max_length": 2 * LENGTH})
    allowed = tolerance.of(narrow_model("llama"))
    assert odd_answers(ours)[0, 0][0] == allowed.close_for(odd_answers(theirs)[0, 0][0], rows[0]["target"])


def test_a_window_of_the_config_beyond_the_positions(tmp_path: Path) -> None:
    """Catches RoBERTa, whose table counts from behind the padding token: its config says two positions too many."""
    rows = [{"context": "short", "target": " end"}, {"context": "many words " * 10, "target": " end"}]
    path = write_task(tmp_path / "tasks", "loglikelihood", rows, ["acc"])
    with pytest.raises(
        UserError, match=r"^the model has 14 positions, and is to be fed 16 tokens: give max_length=14 in --mod.*document 1"
    ):
        evaluate(narrow_model("roberta"), tiny_models.make_tokenizer(), path)
    assert odd_answers(evaluate(narrow_model("roberta"), tiny_models.make_tokenizer(), path, model_args={"max_length": 14}))


def test_answers_end_with_the_positions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a checkpoint, or a task, that asks for longer answers than there are positions for: lm_eval fails there."""
    model, tokenizer = narrow_model("gpt2"), tiny_models.make_tokenizer()
    settings = {"until": ["zqzq"], "max_gen_toks": 4, "max_length": 3 * LENGTH}
    path = write_task(tmp_path / "tasks", "generate_until", [{"context": "The end", "target": "x"}], ["exact_match"],
                      generation_kwargs=settings)  # fmt: skip
    with pytest.raises(IndexError):
        by_lm_eval(model, tokenizer, path)
    ours = evaluate(model, tokenizer, path, output_path=str(tmp_path / "out"))
    assert any(f"end where the model's {LENGTH} positions do" in message for message in caplog.messages)
    import pyarrow.parquet

    row = pyarrow.parquet.read_table(tmp_path / "out" / "texts.parquet").to_pylist()[0]
    assert row["num_tokens"] == LENGTH - len(tokenizer.encode("The end")) + 1 and row["at_limit"]
    shorter = write_task(tmp_path / "shorter", "generate_until", [{"context": "The end", "target": "x"}], ["exact_match"],
                         generation_kwargs={**settings, "max_length": LENGTH + 1})  # fmt: skip
    assert odd_answers(ours) == odd_answers(by_lm_eval(model, tokenizer, shorter))


BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "no window": {"max_position_embeddings": 0},
    "a negative window": {"max_position_embeddings": -2048},
    "a window of text": {"max_position_embeddings": "2048"},
    "a thousand million layers": {"num_hidden_layers": 10**9},
    "no layers": {"num_hidden_layers": 0},
    "negative layers": {"num_hidden_layers": -2},
    "layers of text": {"num_hidden_layers": "two"},
    "no vocabulary": {"vocab_size": 0},
    "a negative vocabulary": {"vocab_size": -400},
    "a vocabulary of text": {"vocab_size": "400"},
    "a huge vocabulary": {"vocab_size": 10**13},
    "no width": {"hidden_size": 0},
    "a negative width": {"hidden_size": -32},
    "a fraction of a width": {"hidden_size": 32.5},
    "a huge width": {"hidden_size": 2**62},
    "a width beyond any number": {"hidden_size": 10**40},
    "no heads": {"num_attention_heads": 0},
    "negative heads": {"num_attention_heads": -4},
    "no key heads": {"num_key_value_heads": 0},
    "no head width": {"head_dim": 0},
    "a negative inner width": {"intermediate_size": -1},
    "a list of vocabularies": {"vocab_size": {"text": 400}},
}


def edit_config(directory: Path, changes: dict[str, Any]) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def model_copy(tiny_model_path: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_path("llama"), tmp_path / "model")


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_that_no_model_can_have(case: str, model_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, a run all the same, or a process that is killed while it builds layers without an end."""
    edit_config(model_copy, BAD_CONFIGS[case])
    (field,) = BAD_CONFIGS[case]
    monkeypatch.setattr(checkpoint, "whole_model", None)  # nothing may be built
    started = time.monotonic()
    for attempt in (
        lambda: checkpoint.load_config({"pretrained": str(model_copy)}),
        lambda: plan.main(["--model_args", f"pretrained={model_copy}"]),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        sentence = str(caught.value)
        assert str(model_copy) in sentence and field in sentence and "\n" not in sentence and len(sentence) < 400, sentence
    assert time.monotonic() - started < 5


def test_a_field_given_by_hand(model_copy: Path) -> None:
    """Catches values of --model_args that go before the file's, for better or worse; and a window that is given instead."""
    with pytest.raises(UserError, match="has num_hidden_layers=0, and a model has 1 to 4,096"):
        checkpoint.load_config({"pretrained": str(model_copy), "num_hidden_layers": 0})
    edit_config(model_copy, {"num_hidden_layers": -1, "max_position_embeddings": 0})
    args = {"pretrained": str(model_copy), "num_hidden_layers": 2, "max_length": 64}
    assert checkpoint.load_config(args).num_hidden_layers == 2


def test_no_window_at_all(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches a window of 0 tokens that comes from a loaded model's config, or from its tokenizer."""
    model, tokenizer = tiny_models.make_model("llama"), tiny_models.make_tokenizer()
    model.config.max_position_embeddings = 0
    path = write_task(tmp_path / "tasks", "loglikelihood", [{"context": "a", "target": " b"}], ["acc"])
    with pytest.raises(UserError, match=r"has a window of 1 token or more: give max_length=N$"):
        evaluate(model, tokenizer, path)
    assert evaluate(model, tokenizer, path, model_args={"max_length": 64})


def test_more_weights_than_the_files_can_hold(model_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gigabytes that are allocated for weights that no file has: a config of another model, or a damaged one."""
    edit_config(model_copy, {"vocab_size": 2**27})
    args = {"pretrained": str(model_copy)}
    config = checkpoint.load_config(args)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(UserError, match=r"^cannot load the model .* its config.json describes 8,5\d\d,\d{3},\d{3} weights"):
        checkpoint.load_weights(args, config, torch.device("cpu"))


def test_weights_in_folders_below_count(model_copy: Path) -> None:
    """Catches a checkpoint whose index names shards in a folder refused for the few weights beside its config."""
    (model_copy / "shards").mkdir()
    (model_copy / "model.safetensors").rename(model_copy / "shards" / "model-00001-of-00002.safetensors")
    (model_copy / "model-00002-of-00002.safetensors").write_bytes(b"0" * 64)
    config = checkpoint.load_config({"pretrained": str(model_copy)})
    config_check.check_size(lambda: 10**6, config, str(model_copy), "model")
    (model_copy / "shards" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="describes 1,000,000 weights, and its files of weights have 64 bytes"):
        config_check.check_size(lambda: 10**6, config, str(model_copy), "model")


def test_fields_that_are_left_open() -> None:
    """Catches sizes refused that a config leaves to the model, or gives for each layer."""
    for open_field in ({"num_key_value_heads": None}, {"n_inner": None}, {"num_heads": None, "n_layers": [1, 2]}):
        config_check._check_sizes(open_field, "model")


@pytest.mark.parametrize("kind", [*tiny_models.CONFIGS, *tiny_models.SEQ2SEQ_CONFIGS])
def test_checkpoints_that_are_whole_pass(kind: str, tiny_model_path: Callable[[str], Path]) -> None:
    """Catches a check of sizes that refuses a model, or builds one where its files leave no doubt."""
    place = tiny_model_path(kind)
    config = checkpoint.load_config({"pretrained": str(place)})
    is_pair = kind in tiny_models.SEQ2SEQ_CONFIGS
    exactly = functools.partial(checkpoint.whole_model, {"pretrained": str(place)}, config, is_pair)
    config_check.check_size(lambda: exactly().num_parameters(), config, str(place), kind)
    assert config_check._estimate(config) <= config_check._stored_bytes(str(place))


def test_a_command_says_it_in_a_sentence(tmp_path: Path) -> None:
    """Catches a traceback, or another exit code than that of a mistake, where the process starts for real."""
    from ddp_eval import demo

    place = shutil.copytree(demo.MODEL_PATH, tmp_path / "model")
    edit_config(place, {"num_hidden_layers": 10**9})
    command = [sys.executable, "-m", "ddp_eval", "--model_args", f"pretrained={place}", "--tasks", "demo_lambada"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 2 and "Traceback" not in finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.startswith("ddp_eval: ")]
    why = "has num_hidden_layers=1000000000, and a model has 1 to 4,096: is its config.json damaged?"
    assert lines == [f"ddp_eval: the config of {place} {why}"]
