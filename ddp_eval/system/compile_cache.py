"""Where torch keeps compiled kernels: never a directory that another user can write to, since torch unpickles what lies there.

torch's own choice (2.13) is torchinductor_USER in the temporary directory, which all users of a machine share: whoever makes it
first decides what is in it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def keep_private() -> None:
    """Have torch use its own choice if only this user can write to it, else a new directory. A directory the user named stays."""
    if os.environ.get(_VARIABLE):
        return
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    except ImportError:  # of a torch that keeps it elsewhere
        return
    path = default_cache_dir()
    with contextlib.suppress(OSError):  # it is there; or nothing can be, and torch says so
        os.mkdir(path, 0o700)
    if not _is_private(path):
        os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="torchinductor_")


def _is_private(path: str) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & stat.S_IWOTH
