"""How fast a device multiplies matrices: by its name, or measured."""

from __future__ import annotations

import time
from typing import Any

# Dense half-precision products, operations per second, from NVIDIA's data sheets (half of what they promise with sparsity). The
# first counts whose words are all among those of the device's name.
_KNOWN_PEAKS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("GH200", 9.9e14),
    ("H200 NVL", 8.355e14),
    ("H200", 9.894e14),
    ("H100 NVL", 8.355e14),
    ("H100 PCIe", 7.56e14),
    ("H100", 9.894e14),
    ("A100", 3.12e14),
    ("L40S", 3.6205e14),
    ("L40", 1.8105e14),
    ("L4", 1.21e14),
    ("V100 PCIE", 1.12e14),
    ("V100", 1.25e14),
)


def known_peak(name: str) -> float | None:
    """Of a GPU by its name, in half precision; None where it is not known, or only a slice of the GPU is there (MIG)."""
    words = set(name.replace("-", " ").split())
    return None if "MIG" in words else next((peak for part, peak in _KNOWN_PEAKS if words.issuperset(part.split())), None)


def peak_flops(device: Any, dtype: Any) -> dict[str, Any] | None:
    """Operations per second of a matrix product: known for some GPUs in half precision, measured on a CPU; else None."""
    import torch

    from ddp_eval.engines.ops import onednn_linear

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = known_peak(name)
        return {"per_s": known, "from": f"data sheet of {name}"} if known and dtype != torch.float32 else None
    matrix = torch.ones(768, 768, dtype=dtype)
    best_s = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        onednn_linear.matrix_product(matrix, matrix)
        best_s = min(best_s, time.perf_counter() - started)
    return {"per_s": 2 * 768**3 / best_s, "from": f"a 768 x 768 product in {dtype}, {torch.get_num_threads()} threads"}
