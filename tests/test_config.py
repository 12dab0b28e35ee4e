"""What Config decides by itself, for the command and the API alike."""

import pytest

from ddp_eval.config import Config


@pytest.mark.parametrize(
    ("template", "given", "expected"),
    [(True, None, True), ("rag", None, True), (True, False, False), (False, None, None), (False, False, False)],
)
def test_examples_are_turns_where_there_are_turns(template, given, expected):
    """Catches the default decided for the command alone, and an explicit `false` that the default wins over."""
    assert Config(apply_chat_template=template, fewshot_as_multiturn=given).fewshot_as_multiturn is expected
