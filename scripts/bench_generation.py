#!/usr/bin/env python3
"""Time generation by ddp_eval against lm_eval's own HF backend: same machine, model and requests, in turn.

    OMP_NUM_THREADS=1 python scripts/bench_generation.py --model DIR --tasks T1:100,T2 --include_path TASKS --out benchmarks/NAME

Each side has a process of its own with the loaded model; one works while the other waits. What is timed is generation alone, from
prompts to texts (tokenise, self-check, plan, decode, look for stop strings, gather); building prompts and computing metrics is
lm_eval's own code on both sides and is left out. lm_eval counts at the batch size that is best for the task: all are tried on a
quarter of the documents, and those within 1.15 times the best on all of them, --repeats times; medians are reported.

Texts are compared with lm_eval's at batch size 1 (which runs once more for it where it is not among the best). Where an answer
takes another token, both tokens' logits in float32 are shown: of a tie, rounding may choose either. To compare and no more:

    OMP_NUM_THREADS=1 python scripts/bench_generation.py --model DIR --tasks T --include_path TASKS --batch_sizes 1 --repeats 1

A trained model ends its answers at different lengths, a random one hardly ever. With --random_weights the model is drawn from
DIR's config with a wide spread (--initializer_range), so that the next token depends on the whole context like a hash, and the
head's row for the end-of-text token is made longer (--end_factor), so that it wins now and then: the answers' lengths then are
spread like those of a geometric distribution. The table shows their quartiles.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import sys
import unittest.mock
from collections.abc import Sequence
from typing import Any

from sides import Job, Side, cut, evaluate_by_lm_eval, evaluate_by_us, format_conditions, keep, read_task  # beside this file

CALLS = ("generate_until",)
TOTALS = ("asked_tokens", "prompt_tokens", "generated_tokens", "batches", "slots", "why_one_by_one")  # of a task
TIE = 1e-4  # logits that are no further apart in float32 are equal but for rounding


def main() -> None:
    args = read_arguments()
    os.environ.setdefault("TQDM_DISABLE", "1")  # before the sides start
    sizes = [int(size) for size in args.batch_sizes.split(",")]
    job = Job(load_model, run_ours, run_lm_eval, no_memory={"elapsed_s": math.inf})
    theirs, ours = Side("lm_eval", args, job), Side("ours", args, job)
    with theirs, ours:
        rows: list[dict[str, Any]] = []
        report = {"conditions": ours.ask("conditions"), "rows": rows}
        answers: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
        for task in args.tasks.split(","):
            row, mine, alone = time_task(theirs, ours, task, sizes, args.repeats)
            answers.append((mine, alone))
            rows.append(row)
            print(format_row(row), file=sys.stderr, flush=True)
            keep(report, format_report, args.out)
        # Batch size 1 takes long: what ends this early leaves the times.
        for row, (mine, alone) in zip(rows, answers, strict=True):
            row |= compare_texts(theirs, ours, row, mine, alone)
            keep(report, format_report, args.out)
    print(format_report(report))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model directory; with --random_weights only config and tokenizer count")
    parser.add_argument("--random_weights", action="store_true", help="draw the weights, see above")
    parser.add_argument("--initializer_range", type=float, default=0.1, help="spread of drawn weights (default 0.1)")
    parser.add_argument("--end_factor", type=float, default=1.8, help="what the end token's row is multiplied by (default 1.8)")
    parser.add_argument("--dtype", default="float32", help="dtype of the weights for both sides (default float32)")
    parser.add_argument("--tasks", required=True, help="comma-separated TASK or TASK:DOCUMENTS, a row each")
    parser.add_argument("--include_path", help="directory of the tasks' files")
    parser.add_argument("--batch_sizes", default="1,8,16,32", help="lm_eval's batch sizes to try (default 1,8,16,32)")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of both sides; medians are reported (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both sides (default 1)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--out", help="write PATH.md and PATH.json")
    return parser.parse_args()


def load_model(args: argparse.Namespace, device: Any) -> Any:
    import torch
    import transformers

    dtype = getattr(torch, args.dtype)
    if not args.random_weights:
        return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(args.model, initializer_range=args.initializer_range)
    end = transformers.AutoTokenizer.from_pretrained(args.model).eos_token_id
    with device, torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.get_output_embeddings().weight[end] *= args.end_factor
    return model.eval()


def time_task(
    theirs: Side, ours: Side, task: str, sizes: list[int], repeats: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Medians of alternating runs; ours and lm_eval's answers, the latter where batch size 1 was among the best."""
    task, limit, quarter = read_task(task)
    for side in (theirs, ours):
        side.ask("run", task, 1, 1)  # warms up
    tried = {size: theirs.ask("run", task, quarter, size)["elapsed_s"] for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in tried if tried[size] <= 1.15 * min(tried.values())}
    alone: dict[str, Any] | None = None  # lm_eval's answers at batch size 1
    mine: list[dict[str, Any]] = []
    for _ in range(repeats):
        for size, seen in times.items():
            answer = theirs.ask("run", task, limit, size)
            seen.append(answer["elapsed_s"])
            alone = answer if size == 1 else alone
        mine.append(ours.ask("run", task, limit, None))
        if "texts" not in mine[-1]:
            sys.exit(f"{task}: memory did not do for ddp_eval beside lm_eval's process")
    medians = {size: statistics.median(seen) for size, seen in times.items()}
    best = min(medians, key=medians.__getitem__)
    ours_s = statistics.median(run["elapsed_s"] for run in mine)
    lengths = sorted(mine[0]["num_tokens"])
    row = {
        "task": task,
        "limit": limit,
        "requests": len(lengths),
        **{key: mine[0][key] for key in TOTALS},
        "answer_tokens": [lengths[round(share * (len(lengths) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)],
        "ours_s": ours_s,
        "lm_eval_s": medians[best],
        "lm_eval_batch_size": best,
        "ratio": medians[best] / ours_s,
        "all_times_s": {**{str(size): seen for size, seen in times.items()}, "ours": [run["elapsed_s"] for run in mine]},
        "quarter_times_s": {str(size): seconds for size, seconds in tried.items()},
    }
    return row, mine[-1], alone


def compare_texts(
    theirs: Side, ours: Side, row: dict[str, Any], mine: dict[str, Any], alone: dict[str, Any] | None
) -> dict[str, Any]:
    """How many of our texts are those of lm_eval at batch size 1, and what each other one parts by.

    alone: lm_eval's answers at batch size 1, or None where it is yet to run so.
    """
    alone = alone or theirs.ask("run", row["task"], row["limit"], 1)
    if "texts" not in alone:
        sys.exit(f"{row['task']}: memory did not do for lm_eval at batch size 1")
    pairs = [(prompt, answer, alone["answers"][prompt]) for prompt, answer in mine["answers"].items()]
    return {
        "texts_compared": len(alone["texts"]),
        "texts_equal": sum(a == b for a, b in zip(alone["texts"], mine["texts"], strict=True)),
        "differences": ours.ask("call", explain_differences, [pair for pair in pairs if pair[1] != pair[2]]),
    }


def run_lm_eval(
    model: Any, tokenizer: Any, task: str, limit: float | None, batch_size: int, args: argparse.Namespace
) -> dict[str, Any]:
    """answers: {tokens of a prompt: those of its answer}; what the prompts are only at batch size 1, which does not pad."""
    from lm_eval.models.huggingface import HFLM

    answers: dict[tuple[int, ...], tuple[int, ...]] = {}
    generate = HFLM._model_generate

    def keep(self: Any, context: Any, *rest: Any, **kwargs: Any) -> Any:
        output = generate(self, context, *rest, **kwargs)
        for prompt, row in zip(context.tolist(), output.tolist(), strict=True):
            answers[tuple(prompt)] = tuple(row[len(prompt) :])
        return output

    with unittest.mock.patch.object(HFLM, "_model_generate", keep):
        elapsed_s, results = evaluate_by_lm_eval(model, tokenizer, task, limit, args, CALLS, batch_size=batch_size)
    return {"elapsed_s": elapsed_s, "texts": texts_of(results), "answers": answers}


def run_ours(
    model: Any, tokenizer: Any, task: str, limit: float | None, batch_size: None, args: argparse.Namespace
) -> dict[str, Any]:
    from ddp_eval.tasks.request_types import generate_until

    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    class Kept(generate_until.GenerationRequests):
        def read(self, kind: int, answer: list[int]) -> str:  # called for one prompt after another
            found.append((tuple(self.prompts.tokens[len(found)].tolist()), tuple(answer)))
            return super().read(kind, answer)

    with unittest.mock.patch.object(generate_until, "GenerationRequests", Kept):
        elapsed_s, results = evaluate_by_us(model, tokenizer, task, limit, args, CALLS)
    lengths = [len(answer) for _, answer in found]
    answers = {"texts": texts_of(results), "answers": dict(found), "num_tokens": lengths}
    return {"elapsed_s": elapsed_s, **answers, **results["ddp_eval"]["generation"]}


def explain_differences(model: Any, tokenizer: Any, pairs: Sequence[tuple[tuple[int, ...], ...]]) -> list[dict[str, Any]]:
    """Of each (prompt, answer here, answer by lm_eval): where the answers part, the tokens that each side took there, and their
    logits in a plain forward in float32.

    tokens, logits: ours first; none where one answer is the beginning of the other.
    """
    import torch

    exact = exact_copy(model) if pairs and model.dtype != torch.float32 else model
    return [explain_difference(exact, tokenizer, *pair) for pair in pairs]


def explain_difference(
    exact: Any, tokenizer: Any, prompt: tuple[int, ...], ours: tuple[int, ...], theirs: tuple[int, ...]
) -> dict[str, Any]:
    import torch

    step = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if step is None:
        return {"step": min(len(ours), len(theirs)), "tokens": [], "logits": []}
    with torch.inference_mode():
        tokens = torch.tensor([[*prompt, *ours[:step]]], device=exact.device)
        logits = exact(input_ids=tokens, use_cache=False).logits[0, -1]
    taken = [ours[step], theirs[step]]
    return {"step": step, "tokens": [tokenizer.decode([token]) for token in taken], "logits": logits[taken].tolist()}


def exact_copy(model: Any) -> Any:
    """The model in float32, on its own device where there is room for that, else on the CPU."""
    import torch
    import transformers

    needed = 4.5 * model.num_parameters()
    fits = model.device.type != "cuda" or torch.cuda.mem_get_info(model.device)[0] > needed
    with model.device if fits else torch.device("cpu"):
        exact = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32)
    exact.load_state_dict(model.state_dict())
    return exact.eval()


def format_difference(task: str, difference: dict[str, Any]) -> str:
    """
    >>> print(format_difference("story", {"step": 3, "tokens": ["a", "b"], "logits": [7.25, 7.5]}))
    - story, token 3 of an answer: 'a' (7.250000) here, 'b' (7.500000) by lm_eval, 0.25 apart: no tie
    """
    place = f"- {task}, token {difference['step']} of an answer:"
    if not difference["logits"]:
        return f"{place} one side ends there, the other goes on"
    (ours, theirs), (a, b) = difference["tokens"], difference["logits"]
    verdict = "a tie" if abs(a - b) <= TIE else "no tie"
    return f"{place} {ours!r} ({a:.6f}) here, {theirs!r} ({b:.6f}) by lm_eval, {abs(a - b):.2g} apart: {verdict}"


def texts_of(results: dict[str, Any]) -> list[Any]:
    """Every document's answers, in the order of tasks and documents."""
    rows = {(task, row["doc_id"]): row["resps"] for task, part in results["samples"].items() for row in part}
    return [rows[key] for key in sorted(rows)]


COLUMNS: dict[str, Any] = {
    "task": lambda row: row["task"],
    "requests": lambda row: f"{row['requests']:,}",
    "prompt tokens": lambda row: f"{row['asked_tokens']:,}",
    "not shared": lambda row: f"{row['prompt_tokens']:,}",
    "generated": lambda row: f"{row['generated_tokens']:,}",
    "answer tokens, quartiles": lambda row: " ".join(map(str, row["answer_tokens"])),
    "batches x slots": lambda row: f"{row['batches']} x {row['slots']}",
    "lm_eval s (batch)": lambda row: f"{row['lm_eval_s']:.2f} ({row['lm_eval_batch_size']})",
    "ours s": lambda row: f"{row['ours_s']:.2f}",
    "ratio": lambda row: f"**{cut(row['ratio'])}**",
    "texts equal to lm_eval's at batch 1": lambda row: (
        f"{row['texts_equal']} of {row['texts_compared']}" if "texts_compared" in row else "not compared yet"
    ),
}


def format_row(row: dict[str, Any]) -> str:
    return f"| {' | '.join(show(row) for show in COLUMNS.values())} |"


def format_report(report: dict[str, Any]) -> str:
    conditions, rows = report["conditions"], report["rows"]
    mean = math.exp(statistics.fmean(math.log(row["ratio"]) for row in rows))
    lines = [
        *format_conditions(conditions),
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *map(format_row, rows),
        "",
        *[f"- {row['task']}: one text at a time, since {row['why_one_by_one']}." for row in rows if row["why_one_by_one"]],
        *[format_difference(row["task"], difference) for row in rows for difference in row.get("differences", ())],
        "",
        f"Geometric mean of the ratios: **{cut(mean)}**. Seconds of lm_eval on a quarter of the documents, by batch size: "
        + "; ".join(
            f"{row['task']} " + ", ".join(f"{size}: {seconds:.1f}" for size, seconds in row["quarter_times_s"].items())
            for row in rows
        )
        + ".",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
