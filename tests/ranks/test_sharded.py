"""`ddp_eval.evaluate` on models that torch's `fully_shard` (FSDP2) has spread over ranks."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from places import PROGRAMS

PROGRAM = (str(PROGRAMS / "sharded_main.py"),)
TRAINER = (str(PROGRAMS / "trainer_main.py"),)
LOOP = (str(PROGRAMS / "sharded_loop_main.py"),)
CASES = {
    2: [
        "llama/root/float32", "llama/layers/float32", "llama/kept/float32", "llama/freed/float32", "llama/grouped/float32",
        "llama/parts/float32", "llama/offload/float32", "llama/traced/float32", "llama/policy/bfloat16",
        "llama/root/bfloat16", "gpt2/root/float32", "gemma2/tied/bfloat16", "qwen3_moe/root/float32", "mistral/root/float32",
        "llama/texts/float32", "llama/single/float32", *(["llama/adapter/float32"] if importlib.util.find_spec("peft") else []),
    ],
    3: ["llama/root/float32", "gpt2/root/float32"],
    4: ["llama/hybrid/float32", "mistral/root/bfloat16"],
}  # fmt: skip
REFUSED = {
    "refused/fsdp1": "FullyShardedDataParallel (FSDP1), which evaluate does not serve: shard it with fully_shard",
    "refused/pair": "evaluate does not serve encoder-decoders that fully_shard has sharded: pass a whole copy on every rank",
}
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    """run(ranks) -> what each rank saw of its CASES."""
    done: dict[int, Any] = {}

    def make(ranks: int) -> list[Any]:
        if ranks not in done:
            place = tmp_path_factory.mktemp(f"ranks{ranks}_")
            done[ranks] = (
                place,
                launch(ranks, place, *CASES[ranks], *(REFUSED if ranks == 2 else ()), program=PROGRAM, timeout_s=280),
            )
        place, finished = done[ranks]
        assert finished.returncode == 0, str(finished)
        return [json.loads((place / f"{rank}.json").read_text()) for rank in range(ranks)]

    return make


@pytest.mark.parametrize(("ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases])
def test_sharded_models_answer_as_whole_ones(ranks: int, case: str, run: Callable[[int], list[Any]]) -> None:
    """Catches a head that sees a part of its weights, ranks out of step, and what an evaluation leaves changed."""
    seen = [rank[case] for rank in run(ranks)]
    assert seen[0]["many"] == seen[0]["whole"], "bits"
    assert seen[0]["many"]
    assert [rank["changed"] for rank in seen] == [[]] * ranks


@pytest.mark.slow
def test_compiled_models_answer_as_whole_ones(tmp_path: Path) -> None:
    """Catches kernels that torch has compiled and that see a part of a weight: "traced" has the same graphs without them."""
    finished = launch(2, tmp_path, "llama/compiled/float32", program=PROGRAM, timeout_s=280)
    assert finished.returncode == 0, str(finished)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text())["llama/compiled/float32"] for rank in (0, 1)]
    assert seen[0]["many"] == seen[0]["whole"], "bits"
    assert seen[0]["many"]
    assert [rank["changed"] for rank in seen] == [[], []]


@pytest.mark.parametrize(("case", "sentence"), REFUSED.items())
def test_what_cannot_be_evaluated_is_refused(case: str, sentence: str, run: Callable[[int], list[Any]]) -> None:
    """Catches wrong numbers of a model whose parts are called by themselves, a traceback, and a rank that is not told."""
    assert all(sentence in rank[case] for rank in run(2))


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    place = tmp_path_factory.mktemp("loop")
    finished = launch(2, place, program=LOOP, timeout_s=280)
    assert finished.returncode == 0, str(finished)
    return [json.loads((place / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_training_goes_on_to_the_bit(loop: list[Any]) -> None:
    """Catches an evaluation that moves a generator, drops gradients, or leaves FSDP in another state."""
    for rank in loop:
        without, evaluated = rank["losses"]
        assert len(without) == 20
        assert without == evaluated
        assert rank["same weights"]


def numbers(answers: Any) -> list[float]:
    return [float(number) for task in sorted(answers) for sample in answers[task] for number in NUMBER.findall(str(sample[1:]))]


@pytest.mark.parametrize(
    "what", ["memory", "memory for the root's weights", "memory for a layer's weights", "memory beside a tower"]
)
def test_a_rank_short_of_memory_runs_its_pack_in_halves(what: str, loop: list[Any]) -> None:
    """Catches a rank that runs more forwards than the others, or joins in fewer gatherings: then one waits for the other."""
    answers, _ = loop[0][what]
    assert not isinstance(answers, str), answers
    assert len(numbers(answers)) == 10
    assert numbers(answers) == pytest.approx(numbers(loop[0]["usual"]), abs=1e-4), "rounding of shorter packs"


def test_a_rank_short_of_memory_generates_with_fewer_rows(loop: list[Any]) -> None:
    """Catches other texts, and ranks that wait for one that begins a batch anew."""
    assert loop[0]["memory for texts"][0] == loop[0]["texts"]
    assert loop[0]["memory for the root's weights in texts"][0] == loop[0]["texts"]
    assert loop[0]["texts"]["gen_drawn"]


def test_a_rank_that_fails_ends_the_others_by_name(loop: list[Any]) -> None:
    """Catches ranks that wait in a collective for one that has raised, and an error without its rank."""
    leader, follower = loop
    assert follower["bug"][0] == "ValueError: a bug"
    assert "rank 1 failed while it ran its packs" in leader["bug"][0]
    assert leader["bug on the leader"][0] == "ValueError: a bug"
    assert "rank 0 failed while it ran its packs" in follower["bug on the leader"][0]
    assert "rank 1 failed while it ran its packs" in leader["bug in texts"][0]
    assert max(rank[case][1] for rank in loop for case in ("bug", "bug on the leader", "bug in texts")) < 20


def test_a_model_is_usable_after_a_failure(loop: list[Any]) -> None:
    """Catches weights that stay gathered, or hooks that stay, behind a forward that broke off."""
    assert loop[0]["afterwards"] == loop[0]["usual"]


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("fsdp", "gemma2"),
        pytest.param("fsdp", "llama", marks=pytest.mark.slow),
        pytest.param("ddp", "llama", marks=pytest.mark.slow),
    ],
)
def test_the_trainers_callback(way: str, kind: str, tmp_path: Path) -> None:
    """Catches metrics that are missing in the Trainer's logs on some rank, and an evaluation that changes the training."""
    finished = launch(2, tmp_path, way, kind, program=TRAINER, timeout_s=280)
    assert finished.returncode == 0, str(finished)
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["same weights"]
        losses = [[row["loss"] for row in seen[name] if "loss" in row] for name in ("plain", "evaluated")]
        assert losses[0] == losses[1] and len(losses[0]) == 6
        rows = [row for row in seen["evaluated"] if "eval/demo_hellaswag/acc_norm" in row]
        assert [row["step"] for row in rows] == [3, 6]
