"""The one exception that a user is meant to read, and how another library's error becomes part of its sentence.

Raise `UserError` for anything that the person who typed the command can mend: a flag, a path, a task name. `__main__` turns it
into one sentence on stderr and exit code 2, with no traceback. Every other exception is a defect of ours or of the machine,
and keeps its traceback.
"""

import re

# What is said of short memory in errors that have no class of their own: by torch on a CPU, by CUDA and its libraries, and by
# torch's compiler, whose errors quote others.
_SHORT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|std::bad_alloc|STATUS_ALLOC_FAILED|CUDA.*out of memory", re.DOTALL)


class UserError(Exception):
    """What was expected, what came, and what to do, in one sentence."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory did not do, or this machine's."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _SHORT_OF_MEMORY.search(str(error)) is not None


def one_line(text: object, most: int = 300) -> str:
    """An error's or a value's text in one line of at most `most` characters, dots where it is cut."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[:most] + "..."
