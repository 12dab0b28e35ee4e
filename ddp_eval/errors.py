"""The one exception that a user is meant to read, and how another library's error becomes part of its sentence.

Raise `UserError` for anything that the person who typed the command can fix: a flag, a path, a task name. `__main__` turns it
into one sentence on stderr and exit code 2, with no traceback. Every other exception is a defect of ours or of the machine,
and keeps its traceback.
"""

import re

# What is said of short memory in errors that have no class of their own: by torch on a CPU, by CUDA and its libraries, and by
# torch's compiler, whose errors quote others.
_SHORT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|std::bad_alloc|STATUS_ALLOC_FAILED|CUDA.*out of memory", re.DOTALL)


class UserError(Exception):
    """What was expected, what came, and what to do, in one sentence."""


class LostContact(RuntimeError):
    """Another rank has failed or is gone. That rank's own error is the one to read."""


class OutOfStep(LostContact):
    """Other ranks wait in a collective that this one cannot take part in: nothing can be sent to them over the same group."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory did not do, or this machine's. Not where another rank's did not, whatever the words."""
    import torch  # later: flags and files are read without it

    if isinstance(error, LostContact):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _SHORT_OF_MEMORY.search(str(error)) is not None


def describe(error: Exception) -> str:
    """One sentence for an error: the user's as it is, others with their class."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"


def one_line(text: object, most: int = 300) -> str:
    """An error's or a value's text in one line of at most `most` characters, dots where it is cut."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[:most] + "..."


# Characters that a terminal obeys or that turn text around, and halves of a surrogate pair, which no encoding takes.
_NOT_SHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def printable(text: object, keep: str = "") -> str:
    """Text that may come from anybody's file, for a terminal: what a terminal would obey becomes a backslash escape.

    keep: control characters that are left as they are, such as a table's line ends.
    """
    return _NOT_SHOWN.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], str(text))


class OutOfRange(Exception):
    """A request or prompt that the model has no row for. Whoever knows its task makes a sentence of it.

    index: of the request, or, with `is_prompt`, of the prompt. token: the id; None where it is the length that is too much.
    sentence: what is wrong, to be followed by where.
    """

    def __init__(self, index: int, is_prompt: bool, token: int | None, sentence: str) -> None:
        super().__init__(sentence)
        self.index = index
        self.is_prompt = is_prompt
        self.token = token
        self.sentence = sentence
