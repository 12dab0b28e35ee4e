"""Stop strings in answers, token by token, and the tree of prompts that share their beginnings."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import torch

from ddp_eval.engines.hf.kv_slots import build_prefix_tree
from ddp_eval.engines.stop_strings import StopRule


@hypothesis.given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=40))
def test_a_tree_holds_every_prompt(lists: list[list[int]]) -> None:
    """Catches a token that is laid down twice, that sees what is not before it, or does not see what is."""
    tree = build_prefix_tree([np.array(tokens) for tokens in lists])
    index = np.arange(len(tree.tokens))
    for tokens, path in zip(lists, tree.paths, strict=True):
        assert tree.tokens[path].tolist() == tokens
        assert tree.depth[path].tolist() == list(range(len(tokens)))
        sees = (index <= path[-1]) & (path[-1] < tree.end)
        assert np.flatnonzero(sees).tolist() == path.tolist()
    assert len(tree.tokens) == len({tuple(tokens[:end]) for tokens in lists for end in range(1, len(tokens) + 1)})


def test_stop_strings_across_tokens(tiny_tokenizer: Any) -> None:
    """Catches a stop string that is only found as whole tokens, in the prompt, or once it is long past."""
    from lm_eval.models.utils_hf import MultiTokenEOSCriteria

    until = ["the qu", "s", "</s>", ". "]
    rule = StopRule(tiny_tokenizer, until)
    text = tiny_tokenizer("a dog and the quick fox ran. it was </s> over.")["input_ids"]
    for end in range(1, len(text) + 1):
        answer = torch.tensor([[5, 6, 7, *text[:end]]])
        wanted = any(MultiTokenEOSCriteria(stop, tiny_tokenizer, 3, 1)(answer, None) for stop in until)
        assert rule.ends([text[:end]]) == [wanted]
