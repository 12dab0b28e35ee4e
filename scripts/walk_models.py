"""Walk over transformers' model types: a tiny random checkpoint of each, here and by lm_eval's own HF backend at batch size 1.

    python scripts/walk_models.py [--types NAME ...] [--all] [--again] [--output benchmarks/walk_models]

A checkpoint is made of every type in transformers' mapping of causal models, and with --all of those that read images or sound
and of encoder-decoders: from the type's own config with small sizes (tiny_configs.py), in float32. Both sides answer the same
requests: questions with choices behind a few examples, cloze words, and some texts, from the data in the package. What is
recorded for each type: how it ran (packs, rows, ...) and why, the largest difference, whether all texts are equal, what either
side raised, and whether the model is causal at all.

Each type runs in a process of its own, forked from this one, which a time-out ends; some seconds a type. Results are kept
in a JSON by type, with a digest of the code that they came from: the walk goes on where it was interrupted, and --again repeats
what other code gave, also in several goes. The Markdown file is written from that JSON.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import gc
import json
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_configs import tiny_config
from transformers.models.auto import modeling_auto

from ddp_eval import demo
from ddp_eval.errors import UserError, one_line
from ddp_eval.lm import DDPEvalLM
from ddp_eval.packs.plan import PACKS, ROWS, STATES
from ddp_eval.run import leader, planning
from ddp_eval.system.digests import digest_code

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
SEQ2SEQ = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
IMAGE_TEXT = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
MULTIMODAL = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
# What lm_eval, too, must be told before it runs a type.
MORE_ARGS: dict[str, dict[str, Any]] = {"xlnet": {"max_length": 1024}}
SPREAD = 0.25  # of the weights of matrices: a wrong mask or position then shows by whole nats
RIGHT_NATS = 1e-3  # the largest difference of a right answer
TIE = 1e-4  # logits closer than this may swap
ANSWER_TOKENS = 12


@dataclasses.dataclass
class Outcome:
    """Of one type.

    verdict: right, wrong, traceback (of ours), refused, lm_eval fails, both fail, not built, no answer.
    mode: packs, padded rows, ...
    lm_eval_error, texts_error: what lm_eval raised over all, or when it generated.
    is_causal: whether what follows a token changes what the model says at it; None where lm_eval does not run it causally.
    code: a digest of this package's modules.
    """

    verdict: str
    mode: str = ""
    generation: str = ""
    largest_nats: float | None = None
    texts_equal: bool | None = None
    why: str = ""
    lm_eval_error: str = ""
    texts_error: str = ""
    is_causal: bool | None = None
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    code: str = ""

    @contextlib.contextmanager
    def naming(self, directory: str) -> Iterator[None]:
        """Give the directory of the checkpoint one name in what either side raises in the block."""
        yield
        for field in ("why", "lm_eval_error", "texts_error"):
            setattr(self, field, getattr(self, field).replace(directory, "CHECKPOINT"))


def read_rows(name: str) -> list[dict[str, Any]]:
    lines = (Path(demo.TASKS_PATH).parent / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def scored_requests() -> list[tuple[str, str]]:
    """(context, continuation): choices of questions that share examples, choices of others that do not, single words."""
    requests: list[tuple[str, str]] = []
    questions = read_rows("mmlu_global_facts_test.jsonl")[:4]
    shown = "".join(
        f"{one['question']}\nAnswer: {'ABCD'[one['answer']]}\n\n" for one in read_rows("mmlu_global_facts_dev.jsonl")[:2]
    )
    requests += [(f"{shown}{one['question']}\nAnswer:", f" {letter}") for one in questions for letter in "ABCD"]
    for one in read_rows("hellaswag_validation.jsonl")[:3]:
        requests += [(one["query"], f" {choice}") for choice in one["choices"]]
    for one in read_rows("lambada_test.jsonl")[:4]:
        context, word = one["text"].rsplit(" ", 1)
        requests.append((context[-400:], f" {word}"))
    return requests


def text_requests() -> list[tuple[str, dict[str, Any]]]:
    contexts = [one["text"][:length] for one, length in zip(read_rows("lambada_test.jsonl"), (300, 120, 60, 200), strict=False)]
    return [(context, {"until": ["\n\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False}) for context in contexts]


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("walk", place, 1))
        for place, one in enumerate(arguments)
    ]


def is_pair(model_type: str, config: Any) -> bool:
    """Whether it is an encoder-decoder; transformers has models of speech and text in that mapping, too, which are not."""
    return model_type in SEQ2SEQ and getattr(config, "is_encoder_decoder", True)


def auto_class(model_type: str, config: Any) -> Any:
    """What lm_eval loads a type with; for types that it cannot load, what has a language head."""
    if is_pair(model_type, config):
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM if model_type in CAUSAL else transformers.AutoModelForMultimodalLM


def make_checkpoint(model_type: str, directory: str) -> Any:
    """A random model and the demo's tokenizer; matrices are drawn anew, wide enough for all positions to show.

    Returns the model's config.
    """
    torch.manual_seed(0)
    config = tiny_config(model_type)
    model = auto_class(model_type, config).from_config(config, dtype=torch.float32).eval()
    if type(model.config) is not type(config):  # the language model alone, of a type whose checkpoints hold more
        model = transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    names = ("Linear", "Embedding", "Conv1D", "Experts")
    with torch.no_grad():
        for module in model.modules():
            if any(name in type(module).__name__ for name in names):
                for weight in module.parameters(recurse=False):
                    if weight.dim() > 1:
                        weight.normal_(0.0, SPREAD)
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(demo.MODEL_PATH).save_pretrained(directory)
    return config


class Answers:
    """Log-probabilities in nats, and texts; or none, where the model scores but cannot generate, and what was raised.

    understood: the exceptions that say so.
    """

    def __init__(self, lm: Any, understood: type[Exception]) -> None:
        scored = lm.loglikelihood(instances("loglikelihood", scored_requests()), disable_tqdm=True)
        self.nats = [value for value, _ in scored]
        self.texts: list[str] | None = None
        self.no_texts = ""
        try:
            self.texts = lm.generate_until(instances("generate_until", text_requests()), disable_tqdm=True)
        except understood as error:
            self.no_texts = str(error) if isinstance(error, UserError) else describe(error)


def by_lm_eval(model_type: str, config: Any, directory: str) -> tuple[Answers, Any]:
    """Its answers and its model. A type that it does not know as causal is loaded for it."""
    given: dict[str, Any] = {"pretrained": directory, "dtype": "float32", **MORE_ARGS.get(model_type, {})}
    if model_type not in CAUSAL:
        source = auto_class(model_type, config)
        given |= {
            "pretrained": source.from_pretrained(directory, dtype=torch.float32).eval(),
            "tokenizer": transformers.AutoTokenizer.from_pretrained(directory),
        }
        if source is transformers.AutoModelForMultimodalLM:
            given["backend"] = "causal"
    lm = HFLM(batch_size=1, device="cpu", **given)
    return Answers(lm, Exception), lm.model


def sees_no_future(model: Any) -> bool:
    """Whether the logits at a token stay as they are when those behind it change."""
    tokens = torch.arange(5, 45)[None]
    other = tokens.clone()
    other[0, 30:] = torch.arange(100, 110)
    with torch.no_grad():
        ends = []
        for one in (tokens, other):
            torch.manual_seed(0)
            ends.append(model(one).logits[0, :30].float())
    return bool(torch.allclose(ends[0], ends[1], atol=1e-3))


def by_ddp_eval(model_type: str, directory: str, outcome: Outcome) -> Answers:
    """Our answers; how they came about is noted in `outcome`."""
    plan_work = leader.plan_work

    def watch(*arguments: Any) -> Any:
        plan = plan_work(*arguments)
        if len(plan.scoring.item_of_request):
            engine, kind = arguments[3].engine, plan.scoring.plan.kind
            of_kind = {PACKS: "packs", STATES: "shared caches", ROWS: plan.scoring.instead}
            outcome.mode = "pairs" if engine.capabilities.is_encoder_decoder else of_kind[kind]
            outcome.why = plan.scoring.why_rows or ""
        if len(plan.generation.item_of_prompt):
            outcome.generation = "batches" if plan.generation.plan.slots.all() else "one by one"
        return plan

    with (
        unittest.mock.patch.object(leader, "plan_work", watch),
        DDPEvalLM(pretrained=directory, dtype="float32", device="cpu", **MORE_ARGS.get(model_type, {})) as lm,
    ):
        return Answers(lm, UserError)


def walk_one(model_type: str) -> Outcome:
    """Both sides' answers to the same requests."""
    outcome = Outcome("not built")
    with tempfile.TemporaryDirectory() as directory, outcome.naming(directory):
        try:
            config = make_checkpoint(model_type, directory)
        except Exception as error:
            outcome.why = describe(error)
            return outcome
        theirs: Answers | None = None
        try:
            theirs, model = by_lm_eval(model_type, config, directory)
            with contextlib.suppress(Exception):
                outcome.is_causal = None if is_pair(model_type, config) else sees_no_future(model)
        except Exception as error:
            outcome.lm_eval_error = describe(error)
        gc.collect()
        try:
            ours = by_ddp_eval(model_type, directory, outcome)
        except UserError as error:
            outcome.verdict, outcome.why = "both fail" if theirs is None else "refused", str(error)
            return outcome
        except Exception as error:
            outcome.verdict, outcome.why = "traceback", describe(error)
            traceback.print_exc()
            return outcome
        if theirs is None:
            outcome.verdict = "lm_eval fails"
            return outcome
    compare(ours, theirs, outcome, model, transformers.AutoTokenizer.from_pretrained(demo.MODEL_PATH))
    return outcome


def compare(ours: Answers, theirs: Answers, outcome: Outcome, model: Any, tokenizer: Any) -> None:
    drift = [abs(mine - other) for mine, other in zip(ours.nats, theirs.nats, strict=True)]
    outcome.largest_nats = max(drift)
    is_right = outcome.largest_nats <= RIGHT_NATS
    if ours.texts is not None and theirs.texts is not None:
        prompts = [context for context, _ in text_requests()]
        outcome.texts_equal = all(
            mine == other or is_tie(prompt, mine, other, model, tokenizer)
            for prompt, mine, other in zip(prompts, ours.texts, theirs.texts, strict=True)
        )
        is_right &= outcome.texts_equal
    if ours.texts is None:
        outcome.generation = ""
        outcome.why = "; ".join(filter(None, (outcome.why, ours.no_texts)))
        is_right &= theirs.texts is None  # else it generates there
    outcome.texts_error = theirs.no_texts
    outcome.verdict = "right" if is_right else "wrong"


def is_tie(prompt: str, mine: str, other: str, model: Any, tokenizer: Any) -> bool:
    """Whether two texts part where the model's two best tokens are as good as equal."""
    start = tokenizer.encode(prompt)
    texts = [tokenizer.encode(prompt + text) for text in (mine, other)]
    shared = next((place for place, pair in enumerate(zip(*texts, strict=False)) if len(set(pair)) > 1), min(map(len, texts)))
    with torch.no_grad():
        best = model(torch.tensor([texts[0][: max(shared, len(start))]])).logits[0, -1].topk(2).values
    return float(best[0] - best[1]) <= TIE


def describe(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_line(error, 200)} ({Path(place.filename).name}:{place.lineno})"


def walk_in_child(model_type: str, limit_s: float) -> Outcome:
    """`walk_one` in a forked process that is killed after `limit_s`."""
    with tempfile.NamedTemporaryFile(mode="r", suffix=".json") as file:
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            try:
                outcome = walk_one(model_type)
            except BaseException as error:  # nothing of the parent's may run in this process
                outcome = Outcome("no answer", why=describe(error))
            Path(file.name).write_text(json.dumps(dataclasses.asdict(outcome)))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        while not (ended := os.wait4(pid, os.WNOHANG))[0]:
            if time.monotonic() - started > limit_s:
                os.kill(pid, signal.SIGKILL)
                ended = os.wait4(pid, 0)
                break
            time.sleep(0.05)
        text = file.read()
    outcome = Outcome(**json.loads(text)) if text else Outcome("no answer", why=how_it_ended(ended[1], limit_s))
    outcome.elapsed_s, outcome.code = round(time.monotonic() - started, 1), code_now()
    outcome.cpu_s = round(ended[2].ru_utime + ended[2].ru_stime, 1)
    return outcome


def how_it_ended(status: int, limit_s: float) -> str:
    """Words on a process that left no outcome; status: of os.wait."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        return f"its process was killed, after {limit_s:.0f} s or for want of memory"
    return f"its process ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with exit code {code}"


def code_now() -> str:
    """What a row holds for: this package's modules, and what they run on."""
    return f"{digest_code()}, transformers {transformers.__version__}, torch {torch.__version__}"


def total_of(found: dict[str, dict[str, Any]]) -> str:
    """Of the types that lm_eval evaluates and that are causal (or pairs), how many share prefixes."""
    sensible = [one for one in found.values() if one["mode"] and not one["lm_eval_error"] and one.get("is_causal") is not False]
    sharing = [one for one in sensible if one["mode"] not in (planning.PADDED, planning.SINGLE)]
    modes = collections.Counter(one["mode"] for one in sharing)
    parts = ", ".join(f"{count} in {mode}" for mode, count in modes.most_common())
    share = 100 * len(sharing) / max(1, len(sensible))
    return (
        f"Of {len(sensible)} types that lm_eval runs, models of both directions (BERT and its like) apart, {len(sharing)} share "
        f"prefixes ({share:.0f}%): {parts}."
    )


def write_report(found: dict[str, dict[str, Any]], path: Path) -> None:
    totals = collections.Counter((one["verdict"], one["mode"]) for one in found.values())
    left = [name for name in CAUSAL if name not in found]
    rest = f" Not walked yet: {', '.join(left)}." if left else ""
    codes = collections.Counter(one.get("code") or "code of before" for one in found.values())
    lines = [
        "# Walk over transformers' model types",
        "",
        f"{len(found)} model types, a tiny random checkpoint of each in float32: {len(scored_requests())} scored "
        f"requests and {len(text_requests())} texts, against lm_eval's HF backend at batch size 1 (`scripts/walk_models.py`). "
        f"Right: within {RIGHT_NATS:g} nats a request, and all texts equal but at ties.{rest}",
        "",
        total_of(found),
        "",
        "Code: " + "; ".join(f"{code} ({count} types)" for code, count in codes.most_common()) + ". "
        f"CPU time of a type: {statistics.median(one.get('cpu_s', 0.0) for one in found.values()):.1f} s in the median, "
        f"{sum(one.get('cpu_s', 0.0) for one in found.values()) / 60:.0f} minutes in all.",
        "",
        "| outcome | how ddp_eval runs it | types |",
        "|---|---|---|",
        *(f"| {verdict} | {mode or '-'} | {count} |" for (verdict, mode), count in totals.most_common()),
        "",
        "| type | outcome | scoring | generation | largest difference, nats | texts equal | why, or what was raised |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in sorted(found.items()):
        nats = "" if one["largest_nats"] is None else f"{one['largest_nats']:.1e}"
        texts = {True: "yes", False: "no", None: ""}[one["texts_equal"]]
        theirs = one["lm_eval_error"] or one.get("texts_error")
        why = "; ".join(text for text in (one["why"], theirs and f"lm_eval: {theirs}") if text)
        cells = (name, one["verdict"], one["mode"], one["generation"], nats, texts, why.replace("|", "/"))
        lines.append("| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", nargs="+", help="these types alone, walked again if they were")
    parser.add_argument("--all", action="store_true", help="types that read images or sound, and encoder-decoders, too")
    parser.add_argument("--again", action="store_true", help="walk types again that were walked with other code")
    parser.add_argument("--limit_s", type=float, default=240.0, help="of one type")
    parser.add_argument(
        "--output", default="benchmarks/walk_models", help="of the JSON and the Markdown file, without the ending"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")
    store = Path(f"{args.output}.json")
    found: dict[str, dict[str, Any]] = json.loads(store.read_text()) if store.exists() else {}
    known = list(dict.fromkeys([*CAUSAL, *IMAGE_TEXT, *MULTIMODAL, *SEQ2SEQ] if args.all else CAUSAL))
    for name in args.types or known:
        is_old = args.again and found.get(name, {}).get("code") != code_now()
        if name in found and not (is_old or args.types):
            continue
        outcome = walk_in_child(name, args.limit_s)
        found[name] = dataclasses.asdict(outcome)
        nats = "" if outcome.largest_nats is None else f"{outcome.largest_nats:.1e}"
        print(f"{name}: {outcome.verdict} {outcome.mode} {nats} {outcome.why} {outcome.lm_eval_error}", flush=True)
        whole = store.with_suffix(".tmp")
        whole.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
        whole.replace(store)  # an end at any moment leaves one or the other
        write_report(found, Path(f"{args.output}.md"))


if __name__ == "__main__":
    main()
