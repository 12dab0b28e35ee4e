"""Packs and batches that do not fit the memory, and results on their way back from a device."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import tolerance
import torch

from ddp_eval.distributed import collectives
from ddp_eval.distributed.messages import Work
from ddp_eval.distributed.world import World
from ddp_eval.engines import Capabilities
from ddp_eval.engines.hf import engine as hf
from ddp_eval.errors import LostContact, OutOfStep, UserError, is_out_of_memory
from ddp_eval.packs.cut import plan_one_tree
from ddp_eval.packs.plan import Pack, build_pack
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.run import execute

CPU = torch.device("cpu")
ALONE = World(0, 0, 1, CPU)


def run_out_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


SHORTAGES = [run_out_on_a_gpu, lambda: torch.empty(2**50), lambda: np.empty(2**50)]


@pytest.fixture
def pack() -> Pack:
    """Eight questions behind one prefix."""
    random = np.random.default_rng(0)
    prefix = random.integers(0, 400, 30).tolist()
    sequences = [prefix + random.integers(0, 400, 9).tolist() for _ in range(8)]
    return build_pack(plan_one_tree(requests_from_lists(sequences, [5] * 8))[0], 0)


def test_shortages_by_what_is_said_of_them() -> None:
    """Catches a run that ends where halves would do, because CUDA's libraries and torch's compilers have words of their own."""
    from torch._dynamo.exc import BackendCompilerFailed

    for words in (
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert is_out_of_memory(RuntimeError(words))
    assert is_out_of_memory(BackendCompilerFailed(run_out_on_a_gpu, torch.OutOfMemoryError("CUDA out of memory"), None))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("CUDA error: out of memory"))
    assert not is_out_of_memory(LostContact("rank 1 cannot go on: CUDA out of memory"))


@pytest.mark.parametrize(("error", "sent"), [(OutOfStep("no memory for weights"), 0), (ValueError("a bug"), 1)])
def test_a_rank_out_of_step_sends_nothing(error: Exception, sent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches word of a failure that the others take for weights: they wait in another collective of the caller's group."""
    calls: list[Any] = []
    monkeypatch.setattr(collectives, "all_gather_rows", lambda *args, **options: calls.append(options))

    def fail() -> NoReturn:
        raise error

    engine: Any = SimpleNamespace(plain_attention="sdpa", capabilities=Capabilities(), together=fail)
    plan = plan_one_tree(requests_from_lists([[1, 2]], [1]))[0]
    with pytest.raises(type(error)):
        execute.run_plan(World(0, 0, 1, CPU, borrowed=True), engine, Work(plan, np.arange(1), "work"))
    assert calls == [{"failed": True}] * sent


@pytest.mark.parametrize("run_out", SHORTAGES, ids=["gpu", "cpu", "numpy"])
def test_packs_are_halved_when_memory_is_short(
    run_out: Callable[[], Any], pack: Pack, tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a shortage on a CPU, for which torch has no class, that ends the run where halves would do."""
    engine = hf.HFEngine(tiny_model("llama"), CPU)
    whole = engine.collect(engine.launch(pack))
    launch, room = engine.launch, 60

    def launch_in(room: int) -> Callable[[Pack], Any]:
        return lambda some: launch(some) if len(some) <= room else run_out()

    monkeypatch.setattr(engine, "launch", launch_in(room))
    pieces = execute._launch(ALONE, engine, pack)
    assert len(pieces) == 3
    found = np.concatenate([engine.collect(piece) for piece in pieces])
    np.testing.assert_array_equal(found["item"], whole["item"])
    tolerance.of_kind("llama").assert_close(found["logprob"], whole["logprob"], np.bincount(pack.answer_items))
    monkeypatch.setattr(engine, "launch", launch_in(10))
    with pytest.raises(UserError, match="rank 0 ran out of memory on cpu with a single request of 38 tokens, 5 of them scored"):
        execute._launch(ALONE, engine, pack)


@pytest.mark.parametrize("run_out", SHORTAGES, ids=["gpu", "cpu", "numpy"])
def test_shared_replicas_say_what_would_fit(run_out: Callable[[], Any], pack: Pack) -> None:
    """Catches a traceback where halving is not possible."""
    sentence = "rank 0 ran out of memory on cpu in a pack of 94 tokens, 40 of them scored: give --max_pack_tokens 47"
    with pytest.raises(UserError, match=sentence), hf.without_halves(ALONE, pack):
        run_out()


def test_other_errors_are_no_shortage(pack: Pack, tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a defect that is taken for a shortage, and halved until single requests are left."""
    engine, launched = hf.HFEngine(tiny_model("llama"), CPU), []

    def fail(some: Pack) -> None:
        launched.append(some)
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(engine, "launch", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        execute._launch(ALONE, engine, pack)
    assert len(launched) == 1
    with pytest.raises(RuntimeError, match="shapes"), hf.without_halves(ALONE, pack):
        fail(pack)
