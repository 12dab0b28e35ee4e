"""What is known of torch's FSDP, and what is said where it is another one."""

from types import SimpleNamespace

import pytest
import torch

from ddp_eval.distributed import sharding
from ddp_eval.errors import UserError


def test_another_fsdp_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback out of torch's own objects, of whose members a later release has renamed one."""
    known = SimpleNamespace(_device=None, _mp_policy=None, _comm_ctx=None, _modules_to_run_forward=set(), _fsdp_param_group=None)
    monkeypatch.setattr(sharding, "_states", lambda model: [known])
    sharding.check_torch(None)
    del known._comm_ctx
    with pytest.raises(
        UserError, match=f"sharded models need a torch from 2.8 to 2.13, and the FSDP of torch {torch.__version__[:4]}"
    ):
        sharding.check_torch(None)
