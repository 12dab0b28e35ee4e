"""Which vector instructions MKL, torch's library for products in float32, uses on this processor: by its own account.

MKL chooses its kernels by the processor's maker as well as by what the processor can do, so only MKL knows. It is asked, not
timed: the answer is the same on every rank and in every run on a kind of processor, and the bits of a run follow from it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

_ASK = ("mkl_get_version", "mkl_serv_get_version")  # the public name, and the one in torch's wheels


class _Version(ctypes.Structure):
    """MKLVersion of mkl_types.h, and room to spare."""

    _fields_ = (
        ("numbers", ctypes.c_int * 3),
        ("status", ctypes.c_char_p),
        ("build", ctypes.c_char_p),
        ("processor", ctypes.c_char_p),
        ("platform", ctypes.c_char_p),
        ("spare", ctypes.c_char * 64),
    )


@functools.cache
def processor() -> str | None:
    """What MKL takes this processor for: "Intel(R) Architecture processors", "… (Intel(R) AVX-512) enabled processors".

    None where torch has no MKL, or one that cannot be asked.
    """
    if not torch.backends.mkl.is_available():
        return None
    for file in sorted(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*")):
        try:
            library = ctypes.CDLL(str(file))
        except OSError:
            continue
        for name in _ASK:
            if hasattr(library, name):
                found = _Version()
                getattr(library, name)(ctypes.byref(found))
                return (found.processor or b"").decode("utf-8", "replace") or None
    return None


def leaves_out_avx512() -> bool:
    """Whether MKL says that it runs without AVX-512 here. False where it does not say."""
    return "AVX-512" not in (processor() or "AVX-512")
