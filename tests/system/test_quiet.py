"""Which of lm_eval's words a user gets to see, and how often those of the hub."""

import logging
import os
import subprocess
import sys

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as theirs

from ddp_eval.system import hub
from ddp_eval.system.quiet import only_rank_zero_logs, quiet_libraries


def test_only_what_asks_for_nothing_is_held_back(caplog):
    """Catches a warning that matters held back, and a filter that stays in the caller's process."""
    logger = logging.getLogger("lm_eval.api.task")
    with quiet_libraries():
        logger.warning("demo: Custom kwargs can be passed.\nFor details see task Readme.")
        logger.warning("[Task: %s] metric acc is defined, but aggregation is not. using default aggregation=mean", "demo")
        logging.getLogger("lm_eval.evaluator").warning("Overwriting default num_fewshot of %s from %s to %s", "demo", 5, 2)
        logger.warning("the answers are wrong")
    logger.warning("For details see task Readme.")
    assert caplog.messages == ["the answers are wrong", "For details see task Readme."]


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("speaks", [True, False])
def test_one_rank_speaks_in_a_callers_process(speaks, bars, caplog):
    """Catches bars or warnings of a rank that does not speak, a warning of the other held back, and what outlives the block."""
    (theirs.enable_progress_bar if bars else theirs.disable_progress_bar)()
    logger, level = logging.getLogger("transformers"), logging.getLogger("transformers").level
    try:
        with only_rank_zero_logs(speaks):
            assert not theirs.is_progress_bar_enabled() and logger.isEnabledFor(logging.WARNING) == speaks
            logging.getLogger("of.the.caller").warning("mine")
        assert theirs.is_progress_bar_enabled() == bars == (not are_progress_bars_disabled())
        assert logger.level == level and caplog.messages == ["mine"]
    finally:
        theirs.enable_progress_bar()


@pytest.mark.parametrize(
    ("error", "offline", "text"),
    [
        (OSError("We couldn't connect to 'https://huggingface.co' to load the files"), True, "; HF_HUB_OFFLINE is set and"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)"), False, "; the hub is out of reach and"),
        (OSError("m is not a valid model identifier"), True, ""),
        (KeyError("text"), False, ""),
    ],
)
def test_advice_where_the_hub_is_out_of_reach(error, offline, text, monkeypatch):
    """Catches a user left without a way out, and one who is sent to the network over a fault that has nothing to do with it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    assert hub.advice(error).startswith(text) and bool(hub.advice(error)) == bool(text)


SAY = """
import logging
from ddp_eval.__main__ import _quiet_down
_quiet_down()
import huggingface_hub.utils.logging
logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
logging.getLogger("lm_eval.evaluator").info("Building contexts")
"""


@pytest.mark.parametrize(("rank", "level", "retries", "infos"), [("0", "info", 1, 1), ("0", "loud", 1, 0), ("1", "", 0, 0)])
def test_what_the_command_lets_through(rank, level, retries, infos):
    """Catches the hub's retries told twice, or by every rank, and LMEVAL_LOG_LEVEL without effect."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_VERBOSITY"}  # an earlier test's
    environment |= {"RANK": rank, "LMEVAL_LOG_LEVEL": level}
    finished = subprocess.run([sys.executable, "-c", SAY], env=environment, capture_output=True, text=True, check=True)
    assert finished.stderr.count("Retrying in 1s") == retries
    assert finished.stderr.count("Building contexts") == infos
