"""The environment as lm_eval writes it into results.json (`pretty_env_info`): collected while ranks work, once in a process.

torch collects it by running a dozen programs, `pip list` alone for seconds; lm_eval would do so at the end of every evaluation,
while all ranks wait. Nothing here may tell the value of an environment variable.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import threading
import unittest.mock
from concurrent.futures import Future

from torch.utils import collect_env

# What torch prints of environment variables: a field and the beginning of its line.
_FROM_VARIABLES = {"cuda_module_loading": "CUDA_MODULE_LOADING set to:", "caching_allocator_config": "Caching allocator config:"}


@functools.cache
def start_collecting() -> Future[str]:
    """Begin to collect, in a thread of its own; the same future at every call. It may bring what torch raises."""
    collected: Future[str] = Future()

    def collect() -> None:
        try:
            collected.set_result(_collect())
        except BaseException as error:  # whoever asks raises it
            collected.set_exception(error)

    threading.Thread(target=collect, daemon=True).start()
    return collected


def _collect() -> str:
    with (
        unittest.mock.patch.object(collect_env, "get_pip_packages", _list_packages),
        unittest.mock.patch.object(collect_env, "get_cuda_module_loading_config", lambda: None),
    ):
        found = collect_env.get_env_info()
    found = found._replace(**{field: None for field in _FROM_VARIABLES if field in found._fields})
    if os.environ.get("CUDNN_LIBRARY"):  # torch takes the path from there
        found = found._replace(cudnn_version=None)
    lines = str(collect_env.pretty_str(found)).split("\n")
    return "\n".join(line for line in lines if not line.startswith(tuple(_FROM_VARIABLES.values())))


def _list_packages(run: object, patterns: object = None) -> tuple[str, str]:
    """What torch has `pip list --format=freeze` say, without the program."""
    wanted = (
        *collect_env.PIP_PATTERNS,
        *collect_env.COMMON_PATTERNS,
        *collect_env.NVIDIA_PATTERNS,
        *collect_env.ONEAPI_PATTERNS,
    )
    versions: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        versions.setdefault(str(package.metadata["Name"]), package.version)  # the first on the path is the one imported
    lines = (f"{name}=={version}" for name, version in sorted(versions.items(), key=lambda item: item[0].lower()))
    return "pip3", "\n".join(line for line in lines if any(part in line for part in wanted))
