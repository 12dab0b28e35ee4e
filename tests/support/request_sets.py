"""Random requests that share prefixes, and the tokens above each token of a pack. No test here."""

from __future__ import annotations

from hypothesis import strategies as st

from ddp_eval.packs.plan import Pack
from ddp_eval.packs.requests import Requests, requests_from_lists

Request = tuple[tuple[int, ...], int]  # tokens, how many of the last are scored


def to_requests(requests: list[Request]) -> Requests:
    return requests_from_lists([list(tokens) for tokens, _ in requests], [count for _, count in requests])


@st.composite
def request_sets(draw: st.DrawFn, min_size: int = 0, max_size: int = 12) -> list[Request]:
    """Requests over three tokens, many of them a piece of an earlier one plus a tail, or an earlier one again."""
    tails = st.lists(st.integers(0, 2), min_size=1, max_size=6)
    requests: list[Request] = []
    for _ in range(draw(st.integers(min_size, max_size))):
        tokens = tuple(draw(tails))
        if len(requests) > 0 and draw(st.booleans()):
            earlier = draw(st.sampled_from(requests))[0]
            tokens = (earlier[: draw(st.integers(0, len(earlier)))] + tokens)[:16]
            tokens = earlier if draw(st.integers(0, 3)) == 0 else tokens
        tokens = tokens if len(tokens) > 1 else (*tokens, draw(st.integers(0, 2)))
        requests.append((tokens, draw(st.integers(1, len(tokens) - 1))))
    return requests


def paths_of(pack: Pack) -> list[tuple[int, ...]]:
    """The tokens from the root to each token of the pack, by depth alone."""
    stack: list[int] = []
    paths = []
    for token, depth in zip(pack.tokens.tolist(), pack.depth.tolist(), strict=True):
        assert depth <= len(stack)
        stack[depth:] = [token]
        paths.append(tuple(stack))
    return paths
