"""Two hosts without SLURM: network namespaces with host names that don't resolve, and the two commands of docs/guide/slurm.md."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from launch import QUICK, launch, launching
from places import ROOT

from ddp_eval.output import tables, write

RUN = ("--model_args", "pretrained=demo", "--tasks", "demo", "--limit", "3", "--max_pack_tokens", "1024")
RESOLVER = str(ROOT / "tests" / "support" / "no_resolver.conf")
EXEC = ("-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])")
# With a resolver that refuses at once: one that is out of reach costs half a minute for each name.
NAMED_HOST = 'echo "$0" > /proc/sys/kernel/hostname && mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'


def sh(command):
    subprocess.run(shlex.split(command), check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts():
    """The names of two network namespaces, 10.0.0.1 and 10.0.0.2 on their eth0."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare (apt-get install iproute2)")
    if subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody make a network namespace")
    names = [f"ddp{os.getpid()}x{number}" for number in (1, 2)]
    with contextlib.ExitStack() as stack:
        for name in names:
            sh(f"ip netns add {name}")
            stack.callback(sh, f"ip netns delete {name}")
        sh(f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        for name, address in zip(names, ("10.0.0.1", "10.0.0.2"), strict=True):
            sh(f"ip -n {name} addr add {address}/24 dev eth0")
            sh(f"ip -n {name} link set eth0 up")
            sh(f"ip -n {name} link set lo up")
        yield names


def documented_commands():
    """The variables and words of the two commands, up to the program's name, with a rank on each host."""
    text = (ROOT / "docs" / "guide" / "slurm.md").read_text().partition("## Without SLURM")[2].replace("\\\n", " ")
    commands = re.findall(r"^(GLOO_\S+) (NCCL_\S+) torchrun (.*) -m ddp_eval ", text, flags=re.MULTILINE)
    assert len(commands) == 2
    for gloo, nccl, flags in commands:
        yield dict(word.split("=") for word in (gloo, nccl)), flags.replace("nproc_per_node=8", "nproc_per_node=1").split()


def start(stack, host, variables, flags, *more):
    inside = ("ip", "netns", "exec", host, "unshare", "--uts", "--mount", "sh", "-c", NAMED_HOST, f"name-of-{host}", RESOLVER)
    torchrun = (sys.executable, "-m", "torch.distributed.run", *flags, *QUICK)
    return stack.enter_context(launching(0, *inside, *torchrun, *RUN, *more, program=EXEC, **variables))


def test_same_bits(hosts, tmp_path):
    """Catches ranks that meet only where names resolve, or on the loopback, and commands in the docs that don't run."""
    with contextlib.ExitStack() as stack:
        running = [
            start(stack, host, variables, flags, "--output_path", tmp_path / "run")
            for host, (variables, flags) in zip(hosts, documented_commands(), strict=True)
        ]
        for one in running:
            finished = one.finish(timeout_s=180)
            assert finished.returncode == 0, str(finished)
    plain = launch(1, *RUN, "--output_path", tmp_path / "plain", program=QUICK)
    assert plain.returncode == 0, str(plain)
    assert (tmp_path / "run" / tables.SCORES).read_bytes() == (tmp_path / "plain" / tables.SCORES).read_bytes()
    assert '"world_size": 2' in (tmp_path / "run" / write.MANIFEST).read_text()


def test_wrong_interface(hosts, tmp_path):
    """Catches half an hour of waiting for a group that cannot form: a host name that stands for the loopback."""
    with contextlib.ExitStack() as stack:
        running = [start(stack, host, {}, flags) for host, (_, flags) in zip(hosts, documented_commands(), strict=True)]
        finished = [one.finish(timeout_s=120) for one in running]
    sentences = [sentence for one in finished for sentence in one.sentences()]
    assert len(sentences) == 1, str(finished)
    for host, address in zip(hosts, ("10.0.0.1", "10.0.0.2"), strict=True):
        assert f"node name-of-{host}: its host name stands for 127.0.0.1" in sentences[0]
        assert f"it has eth0 {address}" in sentences[0]
