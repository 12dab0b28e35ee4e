"""What Config decides by itself, for the command and the API alike."""

from typing import Any

import pytest

from ddp_eval.config import Config
from ddp_eval.errors import UserError


@pytest.mark.parametrize(
    ("template", "given", "expected"),
    [(True, None, True), ("rag", None, True), (True, False, False), (False, None, None), (False, False, False)],
)
def test_examples_are_turns_where_there_are_turns(template, given, expected):
    """Catches the default decided for the command alone, and an explicit `false` that the default wins over."""
    assert Config(apply_chat_template=template, fewshot_as_multiturn=given).fewshot_as_multiturn is expected


@pytest.mark.parametrize("flag", ["model_args", "metadata", "gen_kwargs"])
@pytest.mark.parametrize(
    "name", ["token", "hf_token", "use_auth_token", "HF-Token", "token_file", "client_secret", "password", "api_key"]
)
def test_secrets_are_refused(flag, name):
    """Catches a token that the API or another spelling takes into manifest.json, results.json and run.json."""
    values: dict[str, Any]
    for values in ({name: "hf_abc"}, {"hf_overrides": {name: "hf_abc"}}):
        options: dict[str, Any] = {flag: values}
        with pytest.raises(UserError, match=f"--{flag} {name} looks like a secret") as refused:
            Config(**options)
        assert "hf_abc" not in str(refused.value)


def test_tokens_of_a_vocabulary_are_none():
    """Catches a refusal of settings that merely name a token, or that are off."""
    args = {"prefix_token_id": 1, "add_bos_token": True, "pad_token": "<pad>", "eos_token": "</s>", "tokenizer": "x"}
    args |= {"think_end_token": "</think>", "max_new_tokens": 3, "pad_token_id": 0, "hf_token": None, "use_auth_token": False}
    assert Config(model_args=args).model_args == args
