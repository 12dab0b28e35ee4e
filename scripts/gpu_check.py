"""What bench_gpu.py asks before anything else: does this Python have what its parts import, and does torch compute on the device?

python scripts/gpu_check.py [--cpu]       one line of JSON

missing        modules that cannot be imported, each with the reason: no part would run
tests_missing  the same for those that only the tests need
problem        why the device cannot be used, or ""
free_bytes     of the device's memory, 0 on a CPU
hardware, packages, compiler   for the record; torch.compile needs a C compiler to make kernels
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
NEEDED = (
    "torch",
    "transformers",
    "datasets",
    "pyarrow",
    "lm_eval.evaluator",
    "lm_eval.tasks",
    "lm_eval.models.huggingface",
    "ddp_eval.api",
)
NEEDED_BY_TESTS = ("pytest", "pytest_timeout", "hypothesis")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="ask for no GPU")
    args = parser.parse_args()
    found: dict[str, Any] = {"missing": try_imports(NEEDED), "tests_missing": try_imports(NEEDED_BY_TESTS)}
    found |= {"problem": "", "free_bytes": 0, "compiler": find_compiler()}
    if not found["missing"]:
        from ddp_eval.output.versions import describe_packages
        from ddp_eval.system.machine import describe_hardware

        found |= {"hardware": describe_hardware(), "packages": describe_packages()}
        if not args.cpu:
            found |= try_device()
    print(json.dumps(found))


def try_imports(names: Sequence[str]) -> list[str]:
    """Those that fail, with the first line of the reason."""
    failed = []
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            failed.append(f"{name} ({(str(error).splitlines() or [type(error).__name__])[0]})")
    return failed


def try_device() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"problem": f"torch {torch.__version__} sees no CUDA device"}
    try:
        ones = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
        if (ones @ ones).sum().item() != 64**3:
            return {"problem": "a matrix product on the device came out wrong"}
        return {"free_bytes": torch.cuda.mem_get_info()[0]}
    except Exception as error:
        return {"problem": f"the device does not compute: {str(error).splitlines()[0]}"}


def find_compiler() -> str:
    """Triton builds a module of Python's for each kernel: it needs a C compiler and Python's headers, no nvcc."""
    names = (os.environ.get("CC"), "gcc", "clang", "cc")
    compiler = next((name for name in names if name and shutil.which(name)), "")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "none (Python's headers are not installed)"
    return compiler or "none (there is no C compiler)"


if __name__ == "__main__":
    main()
