"""What `test_hand_made_ranks.py` runs on each rank: calls of all kinds, in turn, of requests that belong to no task.

python hand_made_main.py MODEL OUT: rank 0 writes what they came to to OUT, as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from ddp_eval.lm import launch

PAIRS = [("The cat", " sat"), ("", " sat"), ("The cat ", "sat on the mat"), ("The cat", " sat")]
TEXTS = ["The cat sat on the mat.", "", "One two three four five."]
PROMPTS = ["The cat", "One two", "Q: what?"]


def answers_of(lm: Any) -> list[Any]:
    pairs = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS]
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    settings = {"until": ".", "max_gen_toks": 6}
    prompts = [Instance("generate_until", {}, (prompt, settings), 0) for prompt in PROMPTS]
    drawn = Instance("generate_until", {}, ("The", {"max_gen_toks": 6, "do_sample": "true", "temperature": "1"}), 0)
    return [
        lm.generate_until(prompts),
        lm.loglikelihood(pairs),
        lm.loglikelihood([]),
        lm.loglikelihood_rolling(texts),
        lm.generate_until([drawn, drawn, prompts[0], drawn]),
        lm._loglikelihood_tokens([(None, [5, 6], [7]), (None, [5], [6, 7])]),
        lm.loglikelihood(pairs[:1]),
    ]


if __name__ == "__main__":
    model, out = sys.argv[1:]
    lm = launch(pretrained=model, device="cpu")
    if lm is not None:
        with lm:
            Path(out).write_text(json.dumps(answers_of(lm)))
