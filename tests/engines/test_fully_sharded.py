"""What `--layout shard` refuses before any weight is read."""

import re
from types import SimpleNamespace

import pytest

from ddp_eval.engines.hf.fully_sharded import check_model
from ddp_eval.errors import UserError


def test_an_older_transformers_is_named() -> None:
    """Catches a traceback out of a loader that shards otherwise, or not at all."""
    older = SimpleNamespace(maybe_distribute_model=lambda model, distributed_config, device_mesh: model)
    sentence = re.escape("--layout shard:2 needs transformers 5.20 or newer, which loads weights into shards, and ")
    for whole in (older, SimpleNamespace()):
        with pytest.raises(UserError, match=f"^{sentence}"):
            check_model(whole, 2)
