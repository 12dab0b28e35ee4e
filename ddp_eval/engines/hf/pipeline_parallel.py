"""Layer (pipeline) parallelism: each rank of a replica holds a slice of the layers and passes hidden states on.

    place 0   embedding, layers 0-3    pack 0 │ pack 1 │ pack 2 │ …
    place 1   layers 4-7                      │ pack 0 │ pack 1 │ …
    place 2   layers 8-11, norm, head                  │ pack 0 │ …   the only one with results

Every rank has the plan, so each makes masks and positions itself: hidden states alone travel, (B, L, H) in the model's dtype,
and their shape follows from the pack. Packs are in flight one behind another; a receive is posted before the pack ahead of it
is computed. The forward is the model's own, in which the modules of other stages are stand-ins without weights, so its numbers
are those of one rank, bit for bit.

Weights of other stages are never read: the model is built on the meta device with its stand-ins in place, and transformers
then materialises only the checkpoint's tensors that have a place in it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from ddp_eval.distributed import collectives
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import checkpoint, costs, engine
from ddp_eval.engines.ops import logprobs
from ddp_eval.errors import UserError, is_out_of_memory
from ddp_eval.packs.plan import Pack
from ddp_eval.packs.results import NO_RESULTS, Results
from ddp_eval.system.read_back import naming, open_regular, parse_json

# Models whose forward is known to be: embed, one layer after another on one hidden state, norm, head; tested in
# tests/engines/test_pipeline_parallel.py.
MODEL_TYPES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "mixtral", "qwen2_moe",
    "qwen3_moe", "phi3", "olmo2", "starcoder2", "smollm3", "granite",
)  # fmt: skip
# Share of the positions of a pack at which the head runs: from which the last stage's extra work is computed.
TYPICAL_READ_SHARE = 1 / 8
_MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, by its own rule
MOST_IN_FLIGHT = 4  # hidden states that a stage may have sent and the next not taken


class Absent(torch.nn.Module):
    """A layer, norm or head of another stage: hands its input on."""

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        if hasattr(original, "attention_type"):  # some models ask their layers which mask they want
            self.attention_type = original.attention_type

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden


class Entrance(Absent):
    """Stands where another stage's embedding or first layer was: whatever comes in, what the stage before sent goes on."""

    received: torch.Tensor

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.received


class NoPositions(Absent):
    """In place of learned position embeddings, which the first stage has added."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros((), device=hidden.device)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Which part of the model a rank holds. layers: their numbers; tied: the head uses the embedding's weights."""

    layers: range
    is_first: bool
    is_last: bool
    tied: bool


def plan_stages(whole: Any, stages: int) -> list[Stage]:
    """Cut the model `whole` (on the meta device) so that the most expensive stage is as cheap as can be.

    Raises UserError for a model whose layers cannot be split, or that has fewer layers than stages.
    """
    kind = whole.config.model_type  # of a model that reads images, too: its layers lie deeper
    if kind not in MODEL_TYPES:
        raise UserError(f"--layout layers cannot split {kind} models: it knows how to for {', '.join(MODEL_TYPES)}")
    config = whole.config.get_text_config()
    weights = [costs.active_parameters(layer, config) for layer in _layers(whole.base_model)]
    head = float(config.hidden_size * config.vocab_size) * TYPICAL_READ_SHARE
    spans = split_layers(weights, head, stages)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return [Stage(span, number == 0, number == stages - 1, tied) for number, span in enumerate(spans)]


def keep_stage(model: Any, stage: Stage) -> list[Entrance]:
    """Put stand-ins where other stages' modules are. Returns those that must be given what the stage before sent."""
    body = model.base_model
    entrances: list[Entrance] = []

    def enter(original: torch.nn.Module) -> Entrance:
        entrances.append(Entrance(original))
        return entrances[-1]

    layers = _layers(body)
    for number, layer in enumerate(layers):
        if number not in stage.layers:
            layers[number] = enter(layer) if number == 0 else Absent(layer)
    if not stage.is_first:
        if not (stage.is_last and stage.tied):
            body.set_input_embeddings(enter(body.get_input_embeddings()))
        if hasattr(body, "wpe"):
            body.wpe = NoPositions(body.wpe)
    if not stage.is_last:
        name = next(name for name in ("norm", "final_layer_norm", "ln_f") if hasattr(body, name))
        setattr(body, name, Absent(getattr(body, name)))
        model.set_output_embeddings(Absent(model.get_output_embeddings()))
    if not (stage.is_first and stage.is_last) and not (stage.is_last and stage.tied):
        model.all_tied_weights_keys = {}  # one of the two that share their weights is not here
    return entrances


def _layers(body: Any) -> torch.nn.ModuleList:
    layers: torch.nn.ModuleList = body.h if hasattr(body, "h") else body.layers
    return layers


def stage_class(base: type, stage: Stage) -> type:
    """`base` that builds itself with only the modules of `stage`; its `from_pretrained` therefore loads only those."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)  # type: ignore[misc]
        self.entrances = keep_stage(self, stage)

    own = {
        "__init__": __init__,
        # transformers looks into the module of a class to learn what attention it can do.
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        # The other stages' weights, of which it would warn.
        "_keys_to_ignore_on_load_unexpected": [".*"],
    }
    if hasattr(base, "_load_pretrained_model"):
        own["_load_pretrained_model"] = staticmethod(_load_from_own_files(base, stage))
    return type(base.__name__, (base,), own)


def _load_from_own_files(base: Any, stage: Stage) -> Any:
    """transformers' step that opens the checkpoint's files, given only those that hold a weight of `stage`.

    It maps each file that it opens into memory as a whole, which counts against a process's limit on data.
    """

    def load(model: Any, state_dict: Any, checkpoint_files: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        own = [file for file in checkpoint_files or [] if _holds_weights_of(stage, file)]
        return base._load_pretrained_model(model, state_dict, own or checkpoint_files, *args, **kwargs)

    return load


def _holds_weights_of(stage: Stage, file: str) -> bool:
    """By the names in a safetensors file's header; True for other files."""
    if not file.endswith(".safetensors"):
        return True
    with naming(file), open_regular(file) as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(min(length, _MAX_HEADER_BYTES))
    try:
        names = parse_json(header.decode(), unique_keys=False)
    except ValueError:
        names = None
    if not isinstance(names, dict):  # safetensors will say what is wrong with the file
        return True
    numbers = [re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name) for name in names if name != "__metadata__"]
    return any(int(number[1]) in stage.layers if number else stage.is_first or stage.is_last for number in numbers)


def load_layers_engine(model_args: dict[str, Any], config: Any, world: World) -> LayersEngine:
    """Load this rank's stage onto its device. Raises UserError for what cannot be split or loaded."""
    whole = checkpoint.whole_model(model_args, config)
    stage = plan_stages(whole, world.ranks_per_replica)[world.shard_index]
    model = checkpoint.load_weights(model_args, config, world.device, stage_class(type(whole), stage), part=True)
    return LayersEngine(model, world, stage, whole, keep_attention="attn_implementation" in model_args)


@dataclasses.dataclass
class Expected:
    """A pack whose turn is to come. incoming: its hidden states under way from the stage before; None on the first."""

    pack: Pack
    incoming: collectives.Incoming | None


class LayersEngine(engine.HFEngine):
    """One stage of a replica. The same packs in the same order must be launched and collected on all of its stages.

    `launch` only posts the receive; `collect` computes, and returns empty arrays on all stages but the last.
    """

    def __init__(self, model: Any, world: World, stage: Stage, whole: Any, keep_attention: bool = False) -> None:
        super().__init__(model, world.device, keep_attention, whole)
        self.world = world
        self.stage = stage
        self.capabilities = dataclasses.replace(
            self.capabilities,
            reports_results=stage.is_last,
            launches_ahead=True,  # a launch posts a receive
            serves_generation=False,
        )
        self.why_not_states = "its stages pass on the hidden states of one forward for each pack"
        self._incoming: collectives.Incoming | None = None
        self._sent: collections.deque[collectives.Outgoing] = collections.deque()

    @functools.cached_property
    def _shortcuts(self) -> tuple[bool, bool]:
        """As of the whole model: each stage finds out with stand-ins for what it does not have."""
        self._enter(torch.linspace(-1, 1, 4 * self.config.hidden_size, device=self.device, dtype=self.dtype).view(1, 4, -1))
        return super()._shortcuts

    def _enter(self, hidden: torch.Tensor) -> None:
        for entrance in self.model.entrances:
            entrance.received = hidden

    def launch(self, pack: Pack) -> Any:
        """Say that `pack` is next but one: its hidden states may come in while the pack ahead is computed."""
        if self.stage.is_first:
            return Expected(pack, None)
        hidden = torch.empty((*self.input_shape(pack), self.config.hidden_size), dtype=self.dtype, device=self.device)
        return Expected(pack, collectives.Incoming(self.world, hidden, self.world.rank - 1))

    def collect(self, launched: Any) -> Results:
        self._incoming = launched.incoming
        with engine.without_halves(self.world, launched.pack):
            result = super().launch(launched.pack)
            return super().collect(result) if self.stage.is_last else NO_RESULTS

    def _call(
        self, tokens: torch.Tensor, columns: torch.Tensor, note: Callable[[Any], None] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """On the last stage as of the whole model. On the others the hidden states go on, and one zero each stands for them."""
        if self._incoming is not None:
            self._enter(self._incoming.wait())
        try:
            if self.stage.is_last:
                return super()._call(tokens, columns, note, **kwargs)
            hidden = self.model.base_model(input_ids=tokens, use_cache=False, **kwargs).last_hidden_state
        except Exception as error:
            if not self.is_probe or is_out_of_memory(error):
                raise
            # The next stage waits for this one: in a trial it answers that it cannot.
            hidden = torch.full((*tokens.shape, self.config.hidden_size), torch.nan, dtype=self.dtype, device=self.device)
        if self.stage.is_last:
            return hidden[:, columns] if self.splits_head else hidden[:, columns, :1].expand(-1, -1, self.vocab_size)
        self._send(hidden)
        return torch.zeros((len(tokens), len(columns), 1), device=self.device)

    def _send(self, hidden: torch.Tensor) -> None:
        self._sent.append(collectives.Outgoing(self.world, hidden.contiguous(), self.world.rank + 1))
        while len(self._sent) > MOST_IN_FLIGHT:
            self._sent.popleft().wait()

    def _read_off(self, values: torch.Tensor, hidden: bool, pack: Pack) -> logprobs.Launched:
        if self.stage.is_last:
            return super()._read_off(values, hidden, pack)
        return logprobs.Launched(pack, logprobs.nan_scores(0))


def split_layers(weights: list[float], last_extra: float, stages: int) -> list[range]:
    """Which layers each stage holds, so that the most expensive stage is as cheap as can be (earlier stages larger among equals).

    weights: the cost of each layer. last_extra: what the last stage does beside its layers (the head).
    Raises UserError when there are more stages than layers.
    """
    count = len(weights)
    if stages > count:
        raise UserError(f"--layout layers:{stages} splits a model of {count} layers into more parts than it has layers")
    sums = [0.0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    # best[s][i]: the least that the most expensive of s stages over the first i layers can cost.
    best = [[float("inf")] * (count + 1) for _ in range(stages + 1)]
    cut = [[0] * (count + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for stage in range(1, stages + 1):
        extra = last_extra if stage == stages else 0.0
        for stop in range(stage, count + 1):
            for start in range(stop - 1, stage - 2, -1):
                costliest = max(best[stage - 1][start], sums[stop] - sums[start] + extra)
                if costliest <= best[stage][stop] * (1 - 1e-9) or best[stage][stop] == float("inf"):
                    best[stage][stop], cut[stage][stop] = costliest, start
    spans: list[range] = []
    stop = count
    for stage in range(stages, 0, -1):
        spans.append(range(cut[stage][stop], stop))
        stop = cut[stage][stop]
    return spans[::-1]
