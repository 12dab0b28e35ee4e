"""The engine `hf`: whole transformers models, from a checkpoint or loaded already, causal or encoder-decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ddp_eval.config import Config
from ddp_eval.distributed import sharding
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import checkpoint, engine
from ddp_eval.engines.registry import EngineSpec

if TYPE_CHECKING:
    from ddp_eval.engines.hf.seq2seq import Seq2SeqEngine


class HFSpec(EngineSpec):
    own_layout = False


SPEC = HFSpec()


def load_whole(config: Config, model_config: Any, world: World) -> engine.HFEngine | Seq2SeqEngine:
    """A whole copy of the model on this rank's device. Collective with --load broadcast."""
    model_args = config.loader_args
    if config.load == "broadcast":
        from ddp_eval.engines.hf import broadcast_load

        return broadcast_load.load_engine(model_args, model_config, world)
    if checkpoint.is_seq2seq(model_args, model_config):
        from ddp_eval.engines.hf import seq2seq

        return seq2seq.load_engine(model_args, model_config, world.device)
    return engine.load_engine(model_args, model_config, world.device)


def wrap_model(model: Any, world: World, root: Any = None) -> engine.HFEngine | Seq2SeqEngine:
    """The engine of a model that is loaded already. To be closed, which gives the model back as it came.

    root: see `fully_sharded.ShardedEngine`. Collective where `fully_shard` has spread the model over ranks.
    """
    device = world.device
    if sharding.is_sharded(model):
        from ddp_eval.engines.hf.fully_sharded import ShardedEngine

        return ShardedEngine(model, world, root=root)
    if checkpoint.is_seq2seq({}, model.config):
        from ddp_eval.engines.hf.seq2seq import Seq2SeqEngine

        return Seq2SeqEngine(model, device)
    return engine.HFEngine(model, device)
