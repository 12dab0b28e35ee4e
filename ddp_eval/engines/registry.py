"""Engines by their names in --model. `config.ENGINES` is the table; an engine's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from ddp_eval import layout as layouts
from ddp_eval.config import ENGINES, Config
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine
from ddp_eval.errors import UserError
from ddp_eval.layout import Layout


class EngineSpec:
    """What a run asks of an engine before there is one. An engine's module holds one of these, as `SPEC`.

    own_layout: it lays itself over the ranks, by `layout_of`, and loads itself, by `load`. False, for transformers' models alone:
    --layout decides, and the kind of layout loads the model (placement/).
    seeds_generators: loading sets or draws from the generators of Python and numpy, of which prompts are drawn, too.
    """

    own_layout = True
    seeds_generators = False

    def longest_input(self, model_args: dict[str, Any], default: int) -> int:
        """Input tokens of the longest request. default: by the model's config and tokenizer, as lm_eval has it."""
        return default

    def layout_of(self, config: Config, model_config: Any, world: World) -> tuple[Layout, str]:
        """The layout, and which setting decided it, before any weight is read.

        Raises UserError for what the engine does not serve, --layout included, and when its packages are not installed.
        """
        if config.layout not in (layouts.AUTO, *layouts.WHOLE_KINDS):
            raise UserError(f"--layout {config.layout} is not for --model {config.model}: give --layout replicas")
        return layouts.WHOLE_COPIES, "the engine runs on one rank"

    def load(self, config: Config, model_config: Any, world: World) -> Engine:
        """This rank's engine. world: grouped into replicas. Collective where several ranks hold a replica."""
        raise NotImplementedError


def spec_of(name: str) -> EngineSpec:
    """name: of `config.ENGINES`, as a Config has checked."""
    spec: EngineSpec = importlib.import_module(ENGINES[name].module).SPEC
    return spec
