"""Token ids of scored requests, flat."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]


@dataclasses.dataclass(frozen=True)
class Requests:
    """Token ids of all requests, one behind another.

    tokens:       (T,) int32, context and continuation of each request.
    starts:       (N+1,) int64, where each request starts in `tokens`.
    num_targets:  (N,) int32, how many of its last tokens are scored; at least 1, at most its length - 1.
    """

    tokens: IntArray
    starts: IntArray
    num_targets: IntArray

    def __len__(self) -> int:
        return len(self.num_targets)

    def select(self, indices: IntArray) -> Requests:
        """The requests at `indices`, in that order."""
        lengths = np.diff(self.starts)[indices]
        return Requests(
            tokens=gather_runs(self.tokens, self.starts[:-1][indices], lengths),
            starts=offsets_of(lengths),
            num_targets=self.num_targets[indices],
        )


def concatenate(first: Requests, second: Requests) -> Requests:
    """Both sets of requests, one behind the other. Copies nothing where one of them is empty."""
    if not len(second) or not len(first):
        return second if len(second) else first
    return Requests(
        tokens=np.concatenate([first.tokens, second.tokens]),
        starts=np.concatenate([first.starts, second.starts[1:] + first.starts[-1]]),
        num_targets=np.concatenate([first.num_targets, second.num_targets]),
    )


def requests_from_lists(sequences: list[list[int]], num_targets: list[int]) -> Requests:
    """`Requests` from plain lists, for tests and small callers."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    flat = np.array([token for sequence in sequences for token in sequence], dtype=np.int32)
    return Requests(flat, offsets_of(lengths), np.array(num_targets, dtype=np.int32))


def offsets_of(lengths: IntArray) -> IntArray:
    """(n,) lengths -> (n+1,) int64 offsets, 0 first."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def gather_runs(values: IntArray, begins: IntArray, lengths: IntArray) -> IntArray:
    """Concatenate values[begin : begin + length] for each pair."""
    offsets = offsets_of(lengths)
    return values[np.repeat(begins - offsets[:-1], lengths) + np.arange(offsets[-1])]
