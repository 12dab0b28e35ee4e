"""What the progress line counts."""

import io

import torch

from ddp_eval.distributed.progress import Progress
from ddp_eval.distributed.world import World


def test_a_resume_runs_to_the_whole():
    """Catches a resumed run whose count ends at what was left, where the start of it was told as a part of all."""
    stream = io.StringIO()
    with Progress(World(0, 0, 1, torch.device("cpu")), "work", 327, stream, done=1) as progress:
        progress.add(327, 1000)
        progress.push()
    assert stream.getvalue().startswith("ddp_eval: 328 of 328 requests, ") and ", 0 s left" in stream.getvalue()
