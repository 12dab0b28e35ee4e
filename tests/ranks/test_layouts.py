"""Layouts on real ranks: the same scores, however the model lies over them."""

import json
import os
import shlex
import signal
import time
from typing import Any

import pytest
import tiny_models
import tolerance
import torch
import transformers
from launch import QUICK, launch, launching, wait_for
from places import PROGRAMS

from ddp_eval.output import tables, write

TASKS = "--tasks demo_hellaswag demo_wikitext demo_mmlu_philosophy --limit 4 --max_pack_tokens 512"

FAULTY = (str(PROGRAMS / "faulty_main.py"),)
UNLOADABLE = (str(PROGRAMS / "unloadable_main.py"),)
WAYS = (("send", "sent"), ("receive", "received"))  # of hidden states


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(ranks, layout, kind) -> the run directory and the launch; each once."""
    models, done = {}, {}

    def make(ranks, layout, kind="llama", extra=""):
        if kind not in models:
            models[kind] = tiny_models.save_model(kind, tmp_path_factory.mktemp(kind))
        key = ranks, layout, kind, extra
        if key not in done:
            path = tmp_path_factory.mktemp("run")
            arguments = f"--model_args pretrained={models[kind]} {TASKS} --layout {layout} --output_path {path} {extra}"
            done[key] = path, launch(ranks, *shlex.split(arguments), program=QUICK, timeout_s=280)
        return done[key]

    return make


def scores(outcome):
    path, finished = outcome
    assert finished.returncode == 0, str(finished)
    return tables.read_scores(path / tables.SCORES)


def score_bytes(outcome):
    scores(outcome)
    return (outcome[0] / tables.SCORES).read_bytes()


@pytest.mark.parametrize(
    ("ranks", "layout", "kind"),
    [
        (2, "layers:2", "llama"),
        (4, "layers:2", "gemma2"),
        pytest.param(3, "layers:3", "gemma3", marks=pytest.mark.slow),
        pytest.param(4, "layers:4", "gemma3", marks=pytest.mark.slow),
        pytest.param(2, "layers:2", "gpt2", marks=pytest.mark.slow),
        pytest.param(2, "layers:2", "qwen3_moe", marks=pytest.mark.slow),
    ],
)
def test_layers_give_the_bits_of_one_rank(ranks, layout, kind, run):
    """Catches hidden states that meet the wrong pack, and results of a stage that has none."""
    one, many = run(0, "replicas", kind), run(ranks, layout, kind)
    assert score_bytes(many) == score_bytes(one)
    manifest = json.loads((many[0] / write.MANIFEST).read_text())
    assert manifest["layout"] == layout
    assert manifest["packs"] > 4, "packs that follow one another"
    copies = f"{ranks // int(layout[-1])} cop"
    assert f"ddp_eval: layout {layout}: {copies}" in many[1].stderr, str(many[1])
    stages = json.loads((many[0] / write.TELEMETRY).read_text())["ranks"][: int(layout[-1])]
    assert len({stage["counts"]["computed_tokens"] for stage in stages}) == 1, "a stage has its part in every token"
    sent, received = (sum(one["collectives"].get(way, {}).get(f"{done}_bytes", 0) for one in stages) for way, done in WAYS)
    assert sent == received > 0


@pytest.mark.parametrize(
    ("ranks", "layout", "kind"),
    [
        (2, "shard:2", "gpt2"),
        (4, "shard:2", "gemma2"),
        pytest.param(2, "shard:2", "llama", marks=pytest.mark.slow),
        pytest.param(4, "shard:4", "llama", marks=pytest.mark.slow),
        pytest.param(4, "shard:2", "mistral", marks=pytest.mark.slow),
        pytest.param(2, "shard:2", "qwen3_moe", marks=pytest.mark.slow),
        pytest.param(4, "shard:4", "qwen3_moe", marks=pytest.mark.slow),
    ],
)
def test_sharded_weights_give_the_bits_of_one_rank(ranks, layout, kind, run):
    """Catches a head that sees a part of its weights, and shards that are read from the wrong place of a file."""
    one, many = run(0, "replicas", kind), run(ranks, layout, kind)
    assert score_bytes(many) == score_bytes(one)
    assert json.loads((many[0] / write.MANIFEST).read_text())["layout"] == layout
    reports = json.loads((many[0] / write.TELEMETRY).read_text())["ranks"]
    assert all(report["counts"]["packs"] for report in reports), "every rank runs packs of its own"
    assert all(report["collectives"]["all_gather (weights)"]["received_bytes"] for report in reports)


@pytest.mark.slow
def test_weights_of_two_dtypes_are_sharded(tmp_path):
    """Catches FSDP's refusal of layers whose weights are of two dtypes: routers that stay in float32 in a bfloat16 model."""
    experts: Any = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1}
    config = transformers.Ernie4_5_MoeConfig(**tiny_models._SHAPE, **experts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_models.make_tokenizer(model_max_length=2048).save_pretrained(tmp_path / "model")
    outcomes = []
    for ranks, layout in ((0, "replicas"), (2, "shard:2")):
        place = tmp_path / str(ranks)
        flags = shlex.split(f"--model_args pretrained={tmp_path / 'model'} {TASKS} --layout {layout} --output_path {place}")
        outcomes.append((place, launch(ranks, *flags, program=QUICK, timeout_s=280)))
    one, many = map(score_bytes, outcomes)
    assert one == many


def test_unfinished_work_goes_on_sharded(run, tmp_path):
    """Catches packs of a run that broke off which are lost, or run again, when the same command starts once more."""
    model, place = tiny_models.save_model("llama", tmp_path / "model"), tmp_path / "run"
    flags = shlex.split(f"--model_args pretrained={model} {TASKS} --layout shard:2 --output_path {place}")
    broken = launch(2, *flags, program=FAULTY, FAULT="journal_full", FAULT_RANK="1", timeout_s=280)
    assert broken.returncode != 0 and "No space left" in broken.stderr, str(broken)
    finished = launch(2, *flags, program=QUICK, timeout_s=280)
    assert "resuming: " in "".join(finished.sentences()), str(finished)
    assert score_bytes((place, finished)) == score_bytes(run(0, "replicas"))


@pytest.mark.parametrize(("number", "most_s"), [(signal.SIGKILL, 20), pytest.param(signal.SIGSTOP, 60, marks=pytest.mark.slow)])
def test_a_rank_that_is_gone_ends_a_sharded_run(number, most_s, tmp_path):
    """Catches ranks that wait in a collective for one that has been killed, or stopped."""
    model, pid = tiny_models.save_model("llama", tmp_path / "model"), tmp_path / "pid"
    flags = shlex.split(f"--model_args pretrained={model} {TASKS} --layout shard:2")
    with launching(2, *flags, program=FAULTY, FAULT="forward_stuck", FAULT_RANK="1", FAULT_FILE=str(pid)) as running:
        process = int(wait_for(pid, running))
        time.sleep(5)  # until the others have heard that it runs packs
        os.kill(process, number)
        finished = running.finish(most_s)
    assert finished.returncode != 0
    assert "rank 1" in "".join(finished.sentences()), str(finished)


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [
        (2, "gemma2"),
        pytest.param(4, "llama", marks=pytest.mark.slow),
        pytest.param(2, "qwen3_moe", marks=pytest.mark.slow),
    ],
)
def test_tensor_gives_the_numbers_of_one_rank(ranks, kind, run):
    """Catches transformers mixing the data of two replicas (off by a nat, no error), and a rank's part taken for the whole."""
    one, many = scores(run(0, "replicas", kind)), scores(run(ranks, "tensor:2", kind))
    assert one.task == many.task and one.is_greedy == many.is_greedy
    tolerance.of_kind(kind).assert_close(many.loglikelihood, one.loglikelihood, one.num_tokens)


def test_rows_over_layers(run):
    """Catches hidden states of padded rows that are taken for those of a tree."""
    one = run(0, "replicas", extra="--no_packing")
    assert score_bytes(run(2, "layers:2", extra="--no_packing")) == score_bytes(one)


@pytest.mark.parametrize(
    ("ranks", "layout", "kind", "sentence"),
    [
        (3, "layers:2", "llama", "3 ranks leave 1 over: start 2 or 4 ranks"),
        (2, "tensor:2", "gpt2", "cannot split gpt2 models: transformers has no plan for them"),
        (4, "tensor:4", "llama", "must divide the model's 2 key-value heads: 2 = 4 x 0 + 2"),
        (3, "layers:3", "llama", "splits a model of 2 layers into more parts than it has layers"),
        (2, "layers:2", "mpt", "cannot split mpt models"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(ranks, layout, kind, sentence, run):
    """Catches a layout that fails after the weights have loaded, with a traceback, or once for every rank."""
    _, finished = run(ranks, layout, kind)
    assert finished.returncode == 1, "torchrun's own, for workers that end with 2"
    (line,) = finished.sentences()
    assert sentence in line
    assert not finished.foreign_frames(), str(finished)


def test_measure_leaves_out_what_cannot_be_loaded(run, tmp_path):
    """Catches a run that dies of a layout that one rank cannot load, or whose ranks then wait for each other."""
    model = tiny_models.save_model("gpt2", tmp_path / "model")
    words = f"--model_args pretrained={model} {TASKS} --layout measure --output_path {tmp_path / 'run'}"
    finished = launch(2, *shlex.split(words), program=UNLOADABLE, timeout_s=280)
    assert finished.returncode == 0, str(finished)
    assert "layout layers:2 is left out: rank 1: the model does not fit into the memory of cpu" in finished.stderr, str(finished)
    manifest = json.loads((tmp_path / "run" / write.MANIFEST).read_text())
    assert [one["layout"] for one in manifest["measured_layouts"]] == ["replicas", "shard:2"]
    assert score_bytes((tmp_path / "run", finished)) == score_bytes(run(0, "replicas", "gpt2"))


@pytest.mark.slow
def test_measure_tries_what_fits_and_goes_on_with_the_quickest(run):
    """Catches a layout that is measured with the weights of another, and a run that goes on in what it has just left."""
    path, finished = run(2, "measure", extra="--max_pack_tokens 256")
    assert finished.returncode == 0, str(finished)
    lines = [line for line in finished.stderr.split("\n") if " s for the slice, " in line]
    assert [line.split()[2] for line in lines] == ["replicas:", "tensor:2:", "layers:2:", "shard:2:"], str(finished)
    assert all("GFLOP/s a rank" in line and "predicted" in line for line in lines)
    (taken,) = [line.split()[2].rstrip(":") for line in lines if line.endswith(": taken")]
    manifest = json.loads((path / write.MANIFEST).read_text())
    assert manifest["layout"] == taken
    assert [one["layout"] for one in manifest["measured_layouts"]] == ["replicas", "tensor:2", "layers:2", "shard:2"]
    one = scores(run(0, "replicas", extra="--max_pack_tokens 256"))
    found = scores((path, finished))
    tolerance.of_kind("llama").assert_close(found.loglikelihood, one.loglikelihood, one.num_tokens)
    ranks = json.loads((path / write.TELEMETRY).read_text())["ranks"]
    assert all(rank["phases_s"]["measure"] > 0 for rank in ranks), "what measuring takes is no trial of packs"
