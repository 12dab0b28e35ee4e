"""Versions of the packages that decide the numbers of a run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

from ddp_eval.config import ENGINES

PACKAGES = (
    "ddp_eval",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "lm_eval",
    "numpy",
    "peft",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    *(package for engine in ENGINES.values() for package in engine.packages),
)


def describe_packages() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
