"""Read log-probabilities and whether tokens are greedy off the logits at a pack's reads, and have them sent to the host.

Letters: R reads, V vocabulary, A answers (scored tokens).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval.engines.ops import onednn_linear
from ddp_eval.packs.plan import Pack
from ddp_eval.packs.results import Results, make_results

LOGITS_AT_ONCE = 2**26  # reads times vocabulary that the head computes in one go


class TokenScores(NamedTuple):
    """What is read off the logits for each scored token, (A,) each.

    logprobs: float32. is_greedy: whether each was the argmax; behind an item's first miss they may all be False.
    """

    logprobs: torch.Tensor
    is_greedy: torch.Tensor


def score_tokens(logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, items: npt.NDArray[Any]) -> TokenScores:
    """Scores of the tokens at logits[row, target]. rows: ascending. items: (len(rows),) whose tokens these are."""
    return TokenScores(log_softmax_at(logits, rows, targets), find_greedy(logits, rows, targets, items))


def join_scores(parts: list[TokenScores], order: torch.Tensor) -> TokenScores:
    """Scores that were read in several parts, in this order."""
    return TokenScores(*(torch.cat(columns)[order] for columns in zip(*parts, strict=True)))


def nan_scores(count: int) -> TokenScores:
    """NaN for `count` scored tokens."""
    return TokenScores(torch.full((count,), torch.nan), torch.zeros(count, dtype=torch.bool))


@dataclasses.dataclass
class Launched:
    """A forward pass under way: its pack and what is read off it, on the host once `arrived` has come."""

    pack: Pack
    scores: TokenScores
    arrived: torch.cuda.Event | None = None


def copy_to_host(pack: Pack, scores: TokenScores) -> Launched:
    """Have the results set out behind their own forward: fetched later, they would wait for the next pack's too."""
    device = scores.logprobs.device
    ahead = device.type == "cuda"
    launched = Launched(pack, TokenScores(*(column.to("cpu", non_blocking=ahead) for column in scores)))
    if ahead:
        launched.arrived = torch.cuda.Event()
        launched.arrived.record(torch.cuda.current_stream(device))
    return launched


def sum_logprobs(launched: Launched) -> Results:
    """(items,) RESULT: log-probabilities in nats, added up in float64, and whether every scored token was the argmax."""
    if launched.arrived is not None:
        launched.arrived.synchronize()
    scores = launched.scores
    return make_results(launched.pack, scores.logprobs.numpy().astype(np.float64), scores.is_greedy.numpy())


def head_rows(vocabulary: int) -> int:
    """Of how many reads the head computes logits at a time."""
    most = max(64, min(2048, LOGITS_AT_ONCE // max(1, vocabulary)))
    return most if most < onednn_linear.FINE else most - most % onednn_linear.FINE


def log_softmax_at(logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """log_softmax(logits)[rows, columns] in float32. rows: ascending."""
    if logits.device.type != "cpu":
        return logits.log_softmax(dim=-1, dtype=torch.float32)[rows, columns]
    # A few rows at a time stay in the processor's cache, in memory that need not be asked for again.
    step = max(1, 2**20 // logits.shape[1])
    shape = min(step, len(logits)), logits.shape[1]
    exact, results = (torch.empty(shape, dtype=torch.float32) for _ in range(2))
    edges = torch.searchsorted(rows, torch.arange(0, len(logits) + step, step)).tolist()
    picked = []
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        block = logits[number * step : (number + 1) * step]
        source = block if block.dtype == torch.float32 else exact[: len(block)].copy_(block)
        result = torch.log_softmax(source, dim=-1, out=results[: len(block)])
        picked.append(result[rows[start:stop] - number * step, columns[start:stop]])
    return torch.cat(picked)


def find_greedy(logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, items: npt.NDArray[Any]) -> torch.Tensor:
    """Whether each logits[row, column] is what argmax picks in its row: of equals, the first.

    items: (len(rows),) whose answers these are. Of an item whose first is a miss the rest is not looked at, and False.
    """
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)[rows] == columns
    is_greedy = torch.zeros(len(rows), dtype=torch.bool)
    firsts, item = np.unique(items, return_index=True, return_inverse=True)[1:]
    first = torch.from_numpy(firsts)
    is_greedy[first] = is_argmax(logits, rows[first], columns[first])
    others = is_greedy[first][torch.from_numpy(item)]
    others[first] = False
    is_greedy[others] = is_argmax(logits, rows[others], columns[others])
    return is_greedy


def is_argmax(logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Whether each logits[row, column] is what argmax picks in its row: of equals, the first. For CPUs."""
    # argmax takes 20 times as long as amax on a CPU: it decides only where there may be several.
    few = 2 * len(rows) < len(logits)
    largest = logits[rows].amax(dim=-1) if few else logits.amax(dim=-1)[rows]
    is_greedy = logits[rows, columns] == largest
    contested = rows[is_greedy].unique()
    picked = torch.full((len(logits),), -1)
    picked[contested] = logits[contested].max(dim=-1).indices
    return is_greedy & (picked[rows] == columns)
