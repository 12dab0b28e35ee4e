"""Which layouts a run could have on these ranks, what fits, and which is expected to be the fastest."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ddp_eval import layout as layouts
from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines import registry
from ddp_eval.engines.hf import checkpoint, quantization
from ddp_eval.errors import UserError, one_line
from ddp_eval.layout import WHOLE_COPIES, Layout
from ddp_eval.placement.kinds import kept_layout, kind_of, resolve_layout
from ddp_eval.placement.memory import ModelSizes, measure_model, memory_of_rank
from ddp_eval.placement.speed import CPU_SPEEDS, CUDA_SPEEDS, Amount, Prediction, Speeds
from ddp_eval.system.text import format_bytes

# Assumed while the work is not known yet.
TYPICAL_WORKLOAD = Amount(tokens=20_000_000, reads=2_500_000, packs=3_000)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout with what it takes. impossible: why the model cannot be laid out so, else None and the rest is given.

    weights, room: bytes on the fullest rank. spare: bytes left of its memory, negative where it does not fit.
    """

    layout: Layout
    impossible: str | None = None
    weights: int = 0
    room: int = 0
    spare: int = 0
    prediction: Prediction | None = None

    @property
    def fits(self) -> bool:
        return self.impossible is None and self.spare >= 0

    @property
    def expected_s(self) -> float:
        return self.prediction.total_s if self.prediction else float("inf")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The machine as far as a choice needs it.

    memory: bytes that one rank can use. max_tokens: budget of a pack, None for what the engine plans.
    """

    world_size: int
    ranks_per_node: int
    memory: int
    max_tokens: int | None
    speeds: Speeds
    device: torch.device


def evaluate_layouts(whole: Any, ranks: Ranks, amount: Amount = TYPICAL_WORKLOAD) -> list[Candidate]:
    """Every layout of these ranks. whole: the model on the meta device."""
    sizes = measure_model(whole, ranks.device)
    return [_consider_one(whole, sizes, layout, ranks, amount) for layout in layouts.possible_layouts(ranks.world_size)]


def _consider_one(whole: Any, sizes: ModelSizes, layout: Layout, ranks: Ranks, amount: Amount) -> Candidate:
    kind = kind_of(layout)
    try:
        kind.check(whole)
    except UserError as error:
        return Candidate(layout, impossible=str(error).partition(" ")[2].partition(" ")[2])
    spans = kind.spans(whole)
    needs = kind.rank_bytes(sizes, spans, ranks.max_tokens or sizes.largest_pack)
    weights, room = max(needs, key=sum)
    prediction = kind.predict(sizes, spans, ranks.world_size, ranks.ranks_per_node, amount, ranks.speeds)
    return Candidate(layout, None, weights, room, ranks.memory - weights - room, prediction)


# Predictions closer than this are taken for equal: then copies within a node win, of these the ones on the fewest ranks.
_TOLERANCE = 1.1


def recommend(candidates: list[Candidate]) -> Candidate:
    """The fastest of those that fit; where none does, the one that lacks the fewest bytes."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    if fitting:
        limit = _TOLERANCE * min(candidate.expected_s for candidate in fitting)
        near = [candidate for candidate in fitting if candidate.expected_s <= limit]
        return min(near, key=lambda one: (_across_nodes(one), one.layout.ranks_per_replica, one.expected_s))
    return max((candidate for candidate in candidates if candidate.impossible is None), key=lambda candidate: candidate.spare)


def _across_nodes(candidate: Candidate) -> bool:
    return candidate.prediction is not None and not candidate.prediction.is_local


def fewest_local(kind: str, candidates: list[Candidate], ranks_per_node: int) -> Candidate:
    """A layout of this kind over as few ranks of a node as will hold the model; a whole copy where one will do.

    With layers, what lm_eval's parallelize=True does: where they cannot be split so that they fit, they are sharded, whose
    numbers are the same, and whose time is at best that of a split.
    """
    local = [one for one in candidates if one.impossible is None and one.layout.is_local(ranks_per_node)]
    own = [one for one in local if one.layout.kind in (*layouts.WHOLE_KINDS, kind)]
    instead = [one for one in local if one.layout.kind == layouts.SHARD] if kind == layouts.LAYERS else []
    return next((one for one in (*own, *instead) if one.fits), own[-1])


def say_memory(candidate: Candidate) -> str:
    """For the line that a run logs about its layout."""
    need = f"{format_bytes(candidate.weights + candidate.room)} a rank"
    spare = format_bytes(abs(candidate.spare))
    return f"{need}, {spare} to spare" if candidate.fits else f"{need}, {spare} too many"


def choose_layout(config: Config, model_config: Any, world: World, earlier: str | None = None) -> tuple[Layout, str]:
    """The layout of a run, and why, before any weight is read.

    earlier: the layout of the unfinished work that this run goes on with. What was chosen then is chosen again where it can
    be: a clock or the memory free today might choose another, whose numbers must not be mixed with those.
    Raises UserError when the ranks do not divide into replicas, or the model cannot be laid out as asked.
    """
    spec = registry.spec_of(config.model)
    if spec.own_layout:
        layout, why = spec.layout_of(config, model_config, world)
    else:
        layout, why = _choose(config, model_config, world, earlier)
    if config.load == "broadcast" and (whole_only := _why_whole_only(config, model_config)):
        raise UserError(f"--load broadcast cannot send {whole_only}: give --load disk")
    if config.load == "broadcast" and (layout.ranks_per_replica > 1 or config.layout == layouts.MEASURE or spec.own_layout):
        raise UserError(f"--load broadcast sends whole copies of a hf model, and this is {layout}: give --load disk")
    return layout, why


def why_not(config: Config, model_config: Any, layout: Layout, generating: str | None = None) -> str | None:
    """Why a run of these flags refuses the layout, in a phrase; None if it does not.

    generating: a task that generates text, None where none does.
    """
    if layout.ranks_per_replica == 1:
        return None
    if whole_only := _why_whole_only(config, model_config):
        return f"nothing but whole copies serves {whole_only}"
    if config.load == "broadcast":
        return "--load broadcast sends whole copies"
    if generating is not None and not kind_of(layout).serves_generation:
        return f"the task {generating} generates text, which this does not serve"
    return None


def check_texts(config: Config, layout: Layout | None, generating: str) -> None:
    """Raise UserError where the layout does not serve tasks that generate text, of which `generating` is one."""
    if layout is not None and not kind_of(layout).serves_generation:
        raise UserError(
            f"the task {generating} generates text, which --layout {layout} does not serve: give --layout "
            "replicas, or --layout shard:K for a model that is too large for one rank"
        )
    if config.layout == layouts.MEASURE:
        raise UserError(f"--layout measure is for tasks that score, and {generating} generates text: name a layout")


def _choose(config: Config, model_config: Any, world: World, earlier: str | None) -> tuple[Layout, str]:
    is_open = config.layout in (layouts.AUTO, layouts.MEASURE, *layouts.SPLIT_KINDS)  # `tensor` alone goes by the ranks at hand
    if is_open and earlier and (kept := kept_layout(earlier, world.world_size)):
        return kept, "as in the work that this resumes"
    fixed = resolve_layout(config.layout, world.world_size, world.ranks_per_node)
    if fixed is not None and fixed.ranks_per_replica == 1:
        return fixed, "as asked"
    if fixed is None and world.world_size == 1:
        return WHOLE_COPIES, "one rank"
    whole_only = _why_whole_only(config, model_config)
    if fixed is not None:
        if whole_only:
            raise UserError(f"--layout {fixed} cannot split {whole_only}: give --layout replicas")
        kind_of(fixed).check(checkpoint.whole_model(config.loader_args, model_config))
        return fixed, "as asked"
    if whole_only and config.layout == layouts.MEASURE:
        raise UserError(f"--layout measure is not for {whole_only}, which only whole copies serve: give --layout replicas")
    if whole_only:
        return WHOLE_COPIES, f"nothing else serves {whole_only}"
    try:
        candidates = evaluate_layouts(checkpoint.whole_model(config.loader_args, model_config), ranks_of(config, world))
    except (UserError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        return WHOLE_COPIES, f"what it takes cannot be worked out: {one_line(error)}"
    if config.layout in layouts.SPLIT_KINDS:
        chosen = fewest_local(config.layout, candidates, world.ranks_per_node)
        return chosen.layout, f"the fewest ranks that hold the model: {say_memory(chosen)}"
    chosen = recommend(candidates)
    return chosen.layout, f"{'the fastest that fits' if chosen.fits else 'nothing fits, this lacks least'}: {say_memory(chosen)}"


def _why_whole_only(config: Config, model_config: Any) -> str | None:
    """What of this model no layout but whole copies can serve, in a phrase."""
    if quantization.is_quantised(config.model_args, model_config):
        return "quantised weights"
    if config.model_args.get("peft"):
        return "a model with an adapter"
    return "an encoder-decoder" if checkpoint.is_seq2seq(config.model_args, model_config) else None


def ranks_of(config: Config, world: World) -> Ranks:
    """What this run's ranks have."""
    on_cuda = world.device.type == "cuda"
    return Ranks(
        world_size=world.world_size,
        ranks_per_node=world.ranks_per_node,
        memory=memory_of_rank(world.device, world.ranks_per_node),
        max_tokens=config.max_pack_tokens,
        speeds=CUDA_SPEEDS if on_cuda else CPU_SPEEDS,
        device=world.device,
    )
