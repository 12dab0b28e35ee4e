"""Telemetry: clocks that add up, padding and shares by hand, samples, and what is said about them."""

from __future__ import annotations

import functools
import itertools
import sys
import time
import types
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from places import GENERATION_TASKS

import ddp_eval
from ddp_eval.config import Config
from ddp_eval.distributed.world import World, join_group
from ddp_eval.engines.ops import peak
from ddp_eval.output import write
from ddp_eval.packs.batches import BatchLimits, Prompts, Settings, plan_batches
from ddp_eval.packs.cut import CostModel, plan_packs
from ddp_eval.packs.plan import fed_tokens
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.packs.rows import plan_rows
from ddp_eval.run import record, runner
from ddp_eval.run.planning import Decision, TextDecision, describe_texts
from ddp_eval.telemetry import meter, sampler
from ddp_eval.telemetry import summary as telemetry
from ddp_eval.telemetry.meter import Meter, Phases, process_age_s
from ddp_eval.telemetry.timeline import coarsen


def test_phases_add_up_to_the_wall_time(monkeypatch):
    """Catches time counted in two phases, or in none, and an inner phase that does not stop the outer one's clock."""
    now = [100.0]
    monkeypatch.setattr(meter, "time", types.SimpleNamespace(perf_counter=lambda: now[0], time=time.time))
    phases = Phases("start", age_s=1.0)
    now[0] += 8
    with phases("tasks"):
        now[0] += 16
        with phases("forward"):
            now[0] += 32
        phases.switch("score")
        now[0] += 64
    now[0] += 128
    assert phases.seconds == {"start": 137.0, "tasks": 16.0, "forward": 32.0, "score": 64.0}
    assert [name for _, name in phases.timeline] == ["start", "tasks", "forward", "tasks", "score", "start"]


def test_timelines_of_long_runs_have_an_end(monkeypatch):
    """Catches a telemetry.json and a page that grow with every pack of a pipeline, and the seconds of a phase lost in them."""
    now = [0.0]
    monkeypatch.setattr(meter, "time", types.SimpleNamespace(perf_counter=lambda: now[0], time=time.time))
    phases = Phases("load")
    now[0] = 500.0
    for _ in range(40_000):
        phases.switch("forward")
        now[0] += 0.03
        phases.switch("wait")
        now[0] += 0.01
    phases.switch("write")
    now[0] += 100
    timeline = phases.timeline
    assert len(timeline) <= meter._MOST_MOMENTS and timeline == sorted(timeline)
    assert timeline[0] == (0.0, "load") and timeline[-1][1] == "write" and timeline[-1][0] == pytest.approx(2100)
    spans: dict[str, float] = {}
    for (start, phase), (end, _) in itertools.pairwise([*timeline, (now[0], "")]):
        spans[phase] = spans.get(phase, 0.0) + end - start
    assert spans["load"] == pytest.approx(500, abs=2) and spans["write"] == pytest.approx(100)
    assert spans["forward"] > 1200 and phases.seconds["forward"] == pytest.approx(1200) and len(spans) == 4
    rank = {
        "rank": 0,
        "began_unix_s": 0.0,
        "wall_s": 4000.0,
        "timeline": [(0.1 * n, ("forward", "wait")[n % 2]) for n in range(40_000)],
    }
    pytest.importorskip("matplotlib")
    from ddp_eval.analysis import plots

    assert len(plots.timeline([rank])) < 1_000_000


def test_short_spans_are_merged_and_long_ones_stay():
    """Catches a phase of a minute lost between short ones, or moved."""
    timeline = [(0.0, "a"), (5.0, "b"), (5.1, "c"), (5.5, "b"), (5.6, "c"), (7.0, "d"), (7.2, "a"), (9.0, "b")]
    assert coarsen(timeline, 9.1, 0.01) == timeline
    assert coarsen(timeline, 9.1, 1.0) == [(0.0, "a"), (5.0, "c"), (7.0, "d"), (7.2, "a"), (9.0, "b")]
    assert coarsen([], 9.1, 1.0) == [] and coarsen([(3.0, "a")], 2.0, 1.0) == [(3.0, "a")]


def test_a_phase_that_fails_ends():
    """Catches a clock that runs on in a phase that an error has left."""
    phases = Phases()
    with pytest.raises(KeyError), phases("load"):
        raise KeyError
    time.sleep(0.01)
    assert phases.seconds["other"] >= 0.01


def test_the_process_is_as_old_as_it_is():
    """Catches ticks taken for seconds: imports happen before any clock of ours starts."""
    age_s = process_age_s()
    time.sleep(0.05)
    assert 0 < age_s < 3600
    assert 0.03 < process_age_s() - age_s < 4


GENERATION = str(GENERATION_TASKS)
REQUESTS = requests_from_lists([[1, 2, 3, 4], [1, 2, 5], [7, 8, 9, 10, 11, 12]], [1, 1, 2])


def test_padding_by_hand():
    """Catches a request that is read inside another's row counted as a row, and tiles that are not filled up."""
    rows, _ = plan_rows(REQUESTS, max_tokens=1000)
    assert fed_tokens(rows) == 2 * 5  # inputs 1 2 3 (1 2 is read inside) and 7 8 9 10 11
    alone, _ = plan_rows(REQUESTS, max_tokens=1, isolate=True)
    assert fed_tokens(alone) == 3 + 2 + 5
    packs, _ = plan_packs(REQUESTS, CostModel(forward=1e9), 1000)
    assert fed_tokens(packs) == 3 + 5 and fed_tokens(packs, lambda lengths: lengths + 120) == 128
    nothing, _ = plan_rows(requests_from_lists([], []), max_tokens=10)
    assert fed_tokens(nothing) == 0


def reports():
    """Two ranks: the second computes twice as long and the first builds the prompts meanwhile."""
    made = []
    for rank in (0, 1):
        meter = Meter()
        meter.count("computed_tokens", 1000 * (rank + 1))
        meter.count("visible_pairs", 500 * (rank + 1))
        meter.count("reads", 10 * (rank + 1))
        meter.sampling_s = 0.01
        phases = [{"tasks": 5.0, "wait": 1.0, "forward": 4.0}, {"wait": 2.0, "forward": 8.0}][rank]
        made.append({**meter.report(), "wall_s": 10.0, "phases_s": phases})
    return made


FACTS = {
    "request_tokens": 9000, "computed_tokens": 3000, "fed_tokens": 4500, "left_request_tokens": 7000, "left_tokens": 2400,
    "asked_tokens": 0, "generated_tokens": 0, "ranks_per_replica": 1,
    "flops_per_token": 2.0, "flops_per_pair": 0.5, "flops_per_read": 3.0, "peak": {"per_s": 1000.0},
}  # fmt: skip


def test_shares_by_hand():
    """Catches a rate over the wrong seconds or, on a resume, of work done before; an average of averages; work left out."""
    found = telemetry.summarize(reports(), FACTS)
    assert (found["sharing"], found["padding"]) == (3.0, 1.5)
    assert (found["tokens_per_s"], found["useful_tokens_per_s"]) == (2400 / 8, 7000 / 8)
    assert found["imbalance"] == pytest.approx(8 / 6 - 1) and found["idle_share"] == pytest.approx(3 / 20)
    assert [rank["share_of_peak"] for rank in found["ranks"]] == [2280 / 4000, 4560 / 8000]
    assert found["ranks"][0]["sampling_share"] == pytest.approx(0.001)


def test_a_resume_with_nothing_left(tmp_path, monkeypatch, capfd):
    """Catches a start that found all packs done, and tells of 0 tokens a second, 0% of peak and an unknown time left."""
    flags: dict[str, Any] = {"model_args": {"pretrained": "demo"}, "tasks": ["demo_lambada", "gen_boolean"], "limit": 2}
    config = Config(**flags, include_path=GENERATION, bootstrap_iters=0, output_path=str(tmp_path / "run"))
    with monkeypatch.context() as patch:

        def fail(*args):
            raise RuntimeError("killed behind its metrics")

        patch.setattr(write, "write_run", fail)
        with pytest.raises(RuntimeError, match="killed behind its metrics"):
            runner.run(config, join_group("cpu"))
    assert "of 4 requests, " in capfd.readouterr().err
    results = runner.run(config, join_group("cpu"))
    assert results is not None
    found = results["ddp_eval"]["telemetry"]
    assert "ddp_eval: " not in capfd.readouterr().err
    summary = telemetry.format_summary(found).splitlines()[2]
    assert summary.startswith("nothing was left to run, sharing ") and "peak" not in summary and "imbalance" not in summary
    assert found["tokens_per_s"] is found["useful_tokens_per_s"] is found["ranks"][0]["share_of_peak"] is None


def test_two_ranks_with_nothing_left():
    """Catches a resume that ends in a traceback behind its results: that ranks are even is not known, and is asked about."""
    idle = [{**one, "counts": {}, "phases_s": {"wait": 8.0}} for one in reports()]
    found = telemetry.summarize(idle, {**FACTS, "left_request_tokens": 0, "left_tokens": 0})
    assert found["imbalance"] is None
    assert "nothing was left to run" in telemetry.format_summary(found) and "longer than the mean" not in str(
        telemetry.advise(found)
    )


def test_what_is_left_of_a_plan_by_hand():
    """Catches a resume that counts the tokens of packs that an earlier start has run, and repeated requests counted once."""
    requests = requests_from_lists([[1, 2, 3, 4], [7, 8, 9, 10, 11, 12], [1, 2, 5], [1, 2, 5]], [1, 2, 1, 1])
    decision = Decision(*plan_packs(requests, CostModel(), 5), None)
    plan = decision.plan
    assert plan.num_packs == 2
    describe_left = functools.partial(record.describe_left, decision, requests)
    everything = describe_left(np.array([0, 1]))
    assert everything == {"left_tokens": 3 + 5, "left_request_tokens": 3 + 5 + 2 + 2}
    small = int(np.argmin(np.diff(plan.token_starts)))
    assert describe_left(np.array([small])) == {"left_tokens": 3, "left_request_tokens": 3 + 2 + 2}
    assert describe_left(np.array([], dtype=np.int64)) == {"left_tokens": 0, "left_request_tokens": 0}


def test_what_was_answered_by_hand():
    """Catches prompts that an earlier start has answered, repeated ones counted once, and rows called shared that never are."""
    lists = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 3, 4]]
    settings = Settings((), {"do_sample": False})
    prompts = Prompts([np.array(one) for one in lists], [0] * 3, [9] * 3, [0] * 3, [settings], ["task"] * 3)
    for alone, least in ((True, 4 + 5), (False, 4 + 2)):
        plan, items = plan_batches(prompts, BatchLimits(1000, 4, 8), [alone])
        decision = TextDecision(plan, items, None, prompts.limits)
        assert describe_texts(decision, prompts)["prompt_tokens"] == least
        lengths = np.array([[items[0], 7]])
        assert record.describe_answered(decision, prompts, lengths) == {"asked_tokens": 8, "generated_tokens": 7}
        assert record.describe_answered(decision, prompts, lengths[:0]) == {"asked_tokens": 0, "generated_tokens": 0}


def test_texts_by_hand():
    """Catches a plan that is believed where tokens are counted, and a share of peak of seconds whose operations nobody counts."""
    texts = [{**one, "counts": {**one["counts"], "text_tokens": 300, "batches": 1 - rank}} for rank, one in enumerate(reports())]
    facts = {**FACTS, "asked_tokens": 1000, "generated_tokens": 200, "ranks_per_replica": 2}
    found = telemetry.summarize(texts, facts)
    assert found["sharing"] == pytest.approx((9000 + 1200) / (3000 + 300)) and found["padding"] == pytest.approx(4800 / 3300)
    assert (found["tokens_per_s"], found["useful_tokens_per_s"]) == (2700 / 8, 8200 / 8)
    assert found["generated_tokens_per_s"] == 200 / 8
    assert [rank["share_of_peak"] for rank in found["ranks"]] == [None, 4560 / 8000]
    assert "57% of peak where no text was generated" in telemetry.format_summary(found)


def test_one_by_one_shares_nothing(tiny_model):
    """Catches the sharing of batches reported for prompts that the model answered one at a time."""
    options = {"include_path": GENERATION, "limit": 6, "bootstrap_iters": 0}
    tokenizer = tiny_models.make_tokenizer(model_max_length=2048)

    def measure(**more):
        found = ddp_eval.evaluate(tiny_model("llama"), tokenizer, ["gen_boolean"], **options, **more)["ddp_eval"]
        return found["telemetry"], found["generation"]

    (batched, plan), (alone, _) = measure(), measure(numerics="alone")
    assert alone["sharing"] == alone["padding"] == 1.0
    assert alone["ranks"][0]["counts"]["text_tokens"] == plan["asked_tokens"] + plan["generated_tokens"]
    counted = batched["ranks"][0]["counts"]["text_tokens"]
    assert batched["sharing"] == (plan["asked_tokens"] + plan["generated_tokens"]) / counted > 1.5
    assert counted >= plan["prompt_tokens"] + plan["generated_tokens"]
    assert alone["tokens_per_s"] == alone["useful_tokens_per_s"] == alone["ranks"][0]["tokens_per_s"]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5), ("NVIDIA GH200 480GB", 990), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA L4", 121), ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05), ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-16GB", 112),
        ("NVIDIA A10G", None), ("NVIDIA GeForce RTX 4090", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)  # fmt: skip
def test_peaks_are_of_the_very_gpu(name, tflops):
    """Catches a GPU that takes another's figure because its name begins alike, a figure with sparsity, and a slice as a whole."""
    assert peak.known_peak(name) == (tflops and pytest.approx(tflops * 1e12))


def test_advice_names_the_cause():
    """Catches advice for a run that needs none, and a wait laid at the wrong door."""
    found = telemetry.summarize(reports(), FACTS)
    advice = telemetry.advise(found)
    assert any("rank 1 waits 20% of the time: rank 0 builds the prompts" in sentence for sentence in advice)
    assert any("rank 1 computes 33% longer than the mean" in sentence for sentence in advice)
    assert any("33% of all tokens are padding" in sentence for sentence in advice)
    good = {**reports()[0], "phases_s": {"forward": 10.0}}
    assert telemetry.advise(telemetry.summarize([good], {**FACTS, "fed_tokens": 3000})) == []
    assert "advice" not in telemetry.format_summary(found) and "wall s" in telemetry.format_summary(found)


def advice_of(leader, *others, weights_bytes=5_000_000):
    """Of ranks that run for 10 s, with these seconds by phase; the rest they compute."""
    everyone = [{"forward": 10.0 - sum(phases.values()), **phases} for phases in (leader, *others)]
    ran = [{**reports()[0], "wall_s": 10.0, "phases_s": phases} for phases in everyone]
    return telemetry.advise(telemetry.summarize(ran, {**FACTS, "fed_tokens": 3000, "weights_bytes": weights_bytes}))


@pytest.mark.parametrize(
    ("leader", "others", "cause"),
    [
        ({"start": 4.0, "score": 2.0}, [{"wait": 6.0}], "waits 60% of the time: mostly for rank 0 to start and import (40%)"),
        ({"start": 4.0, "score": 2.0}, [{"start": 4.0, "wait": 2.0}], "waits 20% of the time: rank 0 computes metrics meanwhile"),
        ({"bootstrap": 3.0, "score": 2.0}, [{"wait": 5.0}], "standard errors meanwhile (30%): lower --bootstrap_iters"),
        ({"write": 3.0, "score": 2.0}, [{"wait": 5.0}], "rank 0 writes the results meanwhile (30%): start fewer ranks"),
        ({"wait": 6.0}, [{"wait": 6.0}, {}], "ranks 1 to 2 wait 30% of the time: mostly for rank 2 to compute (30%)"),
    ],
)  # fmt: skip
def test_a_wait_has_its_largest_cause(leader, others, cause):
    """Catches a wait laid at the door of metrics, or of anything that the waiting ranks do as long themselves."""
    (sentence,) = [one for one in advice_of(leader, *others) if " wait" in one]
    assert cause in sentence


def test_advice_where_it_helps():
    """Catches --bootstrap_iters blamed for other seconds behind the scores, and a disk for what Python's imports take."""
    assert advice_of({"score": 6.0}) == []
    assert advice_of({"bootstrap": 4.0}) == ["bootstrapping standard errors takes 40% of the time: lower --bootstrap_iters"]
    assert advice_of({"start": 1.0, "load": 3.0}) == [
        "starting Python and its imports takes 40% of the time: give more tasks to one run"
    ]
    assert advice_of({"start": 1.0, "load": 3.0}, weights_bytes=2**34) == [
        "loading the model (16.0 GiB) takes 30% of the time: keep its files on a local disk, or give more tasks to one run"
    ]


def test_the_sampler_samples_this_process():
    """Catches cores and bytes that are not this process's, and a sampler that costs more than it may."""
    world = World(0, 0, 1, torch.device("cpu"))
    block = np.ones(2**23)  # 64 MiB, held while sampled
    with sampler.Sampler(world.meter, world.device, interval_s=0.05):
        until = time.perf_counter() + 30
        while len(world.meter.samples) < 5 and time.perf_counter() < until:
            block[:1000].sum()
    samples = np.array([row[:3] for row in world.meter.samples], dtype=float)
    assert len(samples) >= 5
    assert 0.05 < samples[:, 1].max() < 3 and samples[:, 2].min() > block.nbytes
    # Twice a second, as a run is sampled, this much for each sample must stay below 0.5%.
    assert world.meter.sampling_s / len(samples) * 2 < 0.005


def test_gpu_figures_come_from_nvml(monkeypatch):
    """Catches wrong units, and one figure that the device does not tell taking the others with it."""

    class NVMLError(Exception):
        pass

    def power(handle):
        raise NVMLError

    fake = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetUtilizationRates=lambda handle: types.SimpleNamespace(gpu=83),
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(used=2**31),
        nvmlDeviceGetPowerUsage=lambda handle: 350_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="ab"))
    world = World(0, 0, 1, torch.device("cuda", 0))
    assert sampler._gpu_reader(world.device)() == [0.83, 2.0**31, 350.0]
    fake.nvmlDeviceGetPowerUsage = power
    assert sampler._gpu_reader(world.device)() == [0.83, 2.0**31, None]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert sampler._gpu_reader(world.device)() == [None, None, None]
