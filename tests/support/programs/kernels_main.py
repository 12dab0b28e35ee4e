"""What `test_tolerance.py` runs in a process of its own, since torch picks its kernels when it is imported.

python kernels_main.py OUT KIND...: writes {kind: log-probability of each token of `tokens_of`} to OUT, as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import tiny_models
import torch

NUM_TOKENS = 160


def tokens_of(model: Any) -> torch.Tensor:
    """(1, NUM_TOKENS) random ids."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(2, vocabulary, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(3))


def logprobs_of(model: Any) -> torch.Tensor:
    """(NUM_TOKENS - 1,) float64: of each token but the first; an encoder-decoder gets the same tokens on either side."""
    tokens = tokens_of(model)
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False, **more).logits[0, :-1].double()
    return logits.log_softmax(-1)[torch.arange(NUM_TOKENS - 1), tokens[0, 1:]]


if __name__ == "__main__":
    out, *kinds = sys.argv[1:]
    torch.set_num_threads(1)
    Path(out).write_text(json.dumps({kind: logprobs_of(tiny_models.make_model(kind)).tolist() for kind in kinds}))
