"""What the other ranks do: load and run what the leader sends, until it says stop."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

from ddp_eval.config import Config
from ddp_eval.distributed import collectives, watchdog
from ddp_eval.distributed.messages import Load, next_work
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine
from ddp_eval.engines.hf import checkpoint
from ddp_eval.layout import Layout
from ddp_eval.placement.load import lay_out, load_replica
from ddp_eval.run.execute import run_plan
from ddp_eval.run.replica import load_together


def follow(world: World, load: Callable[[World, Layout], Engine]) -> None:
    """Every other rank's part: load and run what the leader sends until it says stop."""
    engine = None
    watchdog.step(watchdog.WAITING)
    while (word := next_work(world)) is not None:
        if isinstance(word, Load):
            watchdog.step("loading the model")
            if engine is not None:
                engine.close()
            engine = None  # its memory goes before the next takes some
            if word.config is not None:
                load = functools.partial(load_anew, word.config)
            laid_out = lay_out(world, word.layout)
            with world.meter.phases("load"):
                if word.is_probe:
                    engine, _ = load_together(laid_out, word.layout, load)
                else:
                    engine = load(laid_out, word.layout)
            watchdog.step(watchdog.WAITING)
        else:
            assert engine is not None, "the leader says how to load before it says what to run"
            with contextlib.suppress(collectives.FailedTogether):  # the leader knows, and says what comes next
                run_plan(laid_out, engine, word)


def load_anew(config: Config, world: World, layout: Layout) -> Engine:
    return load_replica(config, checkpoint.load_config(config.loader_args), world, layout)
