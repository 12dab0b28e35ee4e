"""Two torchrun agents, as on two hosts: replicas and layers across them."""

import contextlib
import os
import socket
import subprocess
import sys

import pytest
import tiny_models
from launch import QUICK, launch
from places import ROOT

from ddp_eval.output import tables

TASKS = ["--tasks", "demo_hellaswag", "demo_wikitext", "--limit", "4", "--max_pack_tokens", "512"]


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks_each", "layout"), [(1, "layers:2"), (2, "layers:2"), (2, "layers:4")])
def test_layers_over_two_hosts(ranks_each, layout, tmp_path):
    """Catches local ranks taken for ranks: stages that meet their neighbours on one host only."""
    kind = "gemma3"
    model = tiny_models.save_model(kind, tmp_path / "model")
    flags = ["--model_args", f"pretrained={model}", *TASKS]
    one = launch(0, *flags, "--output_path", tmp_path / "one", program=QUICK)
    assert one.returncode == 0, str(one)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    port = free_port()
    agents = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={ranks_each}",
                "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=layers", "--local_addr=127.0.0.1",
                *QUICK, *flags, "--layout", layout, "--output_path", str(tmp_path / "two"),
            ],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        outputs = [agent.communicate(timeout=250)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait(30)
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert (tmp_path / "two" / tables.SCORES).read_bytes() == (tmp_path / "one" / tables.SCORES).read_bytes()
