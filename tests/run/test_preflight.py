"""Node checks: what ranks' facts lead to. Real nodes are in tests/slurm and tests/ranks/test_two_hosts.py."""

import os
import socket

import pytest
import torch

from ddp_eval import demo
from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.errors import UserError
from ddp_eval.run import preflight
from ddp_eval.system import network

MODEL = {"pretrained": "demo"}


def facts(rank, node, **more):
    """A rank's facts on a healthy node."""
    common = {"machine": node, "address": f"10.0.0.{node[1:]}", "interfaces": f"eth0 10.0.0.{node[1:]}", "problems": []}
    files = {"config.json": 10, "model.safetensors": 1000}
    return {"rank": rank, "node": node, **common, "versions": {"torch": "2.13.0"}, "gpu": None, "model": files, **more}


def gpu(uuid, name="H100"):
    return {"name": name, "memory_bytes": 80, "uuid": uuid}


def probe(**more):
    return {"time": 1000.0, "unreachable": None, "sees_marker": True, **more}


def test_good_nodes_have_no_problems():
    """Catches checks that cry wolf."""
    ranks = [facts(0, "n1", gpu=gpu("a")), facts(1, "n1", gpu=gpu("b")), facts(2, "n2", gpu=gpu("a"))]
    assert preflight.find_problems(ranks) == []
    assert preflight.judge_probes(ranks, [probe(), probe(), probe(time=1001.0)]) == ([], [])
    assert preflight.describe_nodes(ranks) == [
        "node n1: ranks 0-1, 2 x H100, at 10.0.0.1",
        "node n2: rank 2, 1 x H100, at 10.0.0.2",
    ]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"problems": ["the model directory /m does not exist"]}, "node n2: the model directory /m does not exist"),
        ({"versions": {"torch": "2.12.0"}}, "node n2 has torch 2.12.0 where node n1 has 2.13.0"),
        ({"versions": {}}, "node n2 has torch missing where node n1 has 2.13.0"),
        (
            {"model": {"config.json": 10, "model.safetensors": 999}},
            "node n2 has a model.safetensors of 999 bytes where node n1 has a model.safetensors of 1000 bytes",
        ),
        (
            {"model": {"config.json": 10}},
            "node n2 has no model.safetensors in the model's directory where node n1 has a model.safetensors of 1000 bytes",
        ),
        ({"address": "127.0.1.1"}, "node n2: its host name stands for 127.0.1.1, where other nodes cannot reach it"),
    ],
)
def test_bad_node_is_named(more, problem):
    """Catches a bad node that is not found, one named after another's fault, and a fault told once for each of its ranks."""
    (found,) = preflight.find_problems([facts(0, "n1"), facts(1, "n2", **more), facts(2, "n2", **more)])
    assert found.startswith(problem)


def test_the_odd_one_out_is_the_bad_node():
    """Catches all good nodes being named because the one with rank 0 is bad."""
    old = {"versions": {"torch": "2.12.0"}}
    ranks = [facts(0, "n1", **old), facts(1, "n1", **old), facts(2, "n2"), facts(3, "n3")]
    assert preflight.find_problems(ranks) == ["node n1 has torch 2.12.0 where node n2 has 2.13.0"]


def test_loopback_is_fine_on_one_machine():
    """Catches a laptop whose name stands for 127.0.0.1 being told that it cannot reach itself."""
    ranks = [facts(rank, node, machine="one", address="127.0.0.1") for rank, node in enumerate(("n1", "n2"))]
    assert preflight.find_problems(ranks) == []


def test_two_ranks_on_one_gpu():
    """Catches every rank computing on the first GPU of its node."""
    ranks = [facts(0, "n1", gpu=gpu("a")), facts(1, "n2", gpu=gpu("b")), facts(2, "n2", gpu=gpu("b"))]
    assert preflight.find_problems(ranks) == ["node n2: ranks 1 and 2 share one GPU"]


def test_what_probes_show():
    """Catches a clock, a firewall or a local disk that goes unnamed, and a warning that stops a run."""
    ranks = [facts(0, "n1", gpu=gpu("a")), facts(1, "n2", gpu=gpu("b", "A100"))]
    found = probe(time=940.0, unreachable="node n1 at 10.0.0.1", sees_marker=False)
    warnings, (problem,) = preflight.judge_probes(ranks, [probe(), found])
    assert problem.startswith("node n2 cannot reach node n1 at 10.0.0.1")
    assert [warning.partition(":")[0] for warning in warnings] == [
        "node n2 does not see the run directory of node n1",
        "node n2",
        "the GPUs are not alike (A100, H100)",
    ]
    assert "its clock is 60 s behind that of node n1" in warnings[1]


def test_one_process(tmp_path):
    """Catches checks that need torchrun, and that leave something behind in or instead of the run directory."""
    (line,) = preflight.check_nodes(
        Config(model_args=MODEL, tasks=["demo"], device="cpu", output_path=str(tmp_path / "run"))
    ).lines
    assert "rank 0, 1 x CPU" in line
    assert list(tmp_path.iterdir()) == []


def test_one_rank_alone():
    """Catches "1 ranks"."""
    world = World(0, 0, 1, torch.device("cpu"))
    assert preflight.check_group(world).startswith("all-reduce over 1 rank by gloo in ")


def test_stale_file_of_the_model(tmp_path):
    """Catches a checkpoint that can be listed but not read."""
    (tmp_path / "config.json").symlink_to(demo.MODEL_PATH + "/config.json")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match=r"the node checks failed: node .*: .*model.safetensors of the model cannot be read"):
        preflight.check_nodes(Config(model_args={"pretrained": str(tmp_path)}, tasks=["demo"], device="cpu"))


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"--output_path .*run cannot be written to \(it is a file\)"):
        preflight.check_nodes(Config(model_args=MODEL, tasks=["demo"], device="cpu", output_path=str(tmp_path / "run")))


def test_knocking():
    """Catches a probe that finds a closed port open, or an open one closed."""
    with network.listening() as listener:
        assert network.can_reach("127.0.0.1", listener.port)
        assert network.can_reach("127.0.0.1", listener.port), "it answers more than once"
    assert not network.can_reach("127.0.0.1", listener.port)


def test_address_of_an_interface(monkeypatch):
    """Catches the address of another interface than the one that gloo is told to take."""
    assert network.address_of("lo") == "127.0.0.1"
    assert network.address_of("nosuch0") is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(socket, "gethostname", lambda: "a-name-that-nobody-has.invalid")
    assert network.gloo_address() == "127.0.0.1"
    assert f"{os.stat('/proc/self/ns/net').st_ino}" in network.machine()
