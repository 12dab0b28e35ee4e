#!/usr/bin/env python3
"""Make a model of a benchmark's shape: with random weights, and a tokenizer trained on the texts of the tasks.

    python scripts/make_bench_model.py --shape llama23m --tasks local_mmlu,local_hellaswag,… --include_path DIR --out llama23m

Speed does not depend on the values of the weights. How many tokens there are depends on the tokenizer, and one that has learnt
the tasks' own texts cuts them about as a real one of its size does. Same tasks and versions: the same files, to the last bit.
`--config_only` leaves the weights to the benchmark (`--random_weights`), which draws them on its device: 1 B and 8 B parameters.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_tokenization import collect_requests  # beside this file
from make_demo_model import train_bpe

LLAMA23M = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
SHAPES: dict[str, dict[str, Any]] = {
    # Next to no computing: what is left is what scripts/bench_prepare.py measures.
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    # As small, with heads that every engine has kernels for (vLLM on a CPU: a width of 32 or more).
    "rehearsal": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
    "llama23m": LLAMA23M,
    "llama100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    # The first with the vocabulary of Qwen 2 and 3, most of whose tokens no text comes to: the head pays for all of them.
    "llama150k": {**LLAMA23M, "vocab_size": 151_936, "tie_word_embeddings": True},
    # Llama 3.2 1 B and Llama 3.1 8 B.
    "llama1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "llama8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
    },
    # Three gated delta rules to one layer that attends, as Qwen3-Next and Qwen3.5 have them.
    "qwen3_5_28m": {
        "model_type": "qwen3_5_text",
        **LLAMA23M,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "tie_word_embeddings": False,
    },
    # State-space layers alone.
    "mamba2_26m": {
        "model_type": "mamba2",
        "hidden_size": 512,
        "num_hidden_layers": 10,
        "num_heads": 16,
        "head_dim": 64,
        "n_groups": 1,
        "tie_word_embeddings": True,
    },
    # A state-space part beside attention in each layer.
    "falcon_h1_27m": {
        "model_type": "falcon_h1",
        **LLAMA23M,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "mamba_d_ssm": 768,
        "mamba_n_heads": 12,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "tie_word_embeddings": False,
    },
    # Attention with positions by ALiBi.
    "bloom20m": {"model_type": "bloom", "hidden_size": 384, "n_layer": 8, "n_head": 6},
}
TOKENIZER_SIZE = 16_000  # tokens; at most so many, where the texts are few


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True, help="which shape")
    parser.add_argument("--tasks", required=True, help="comma-separated tasks or groups whose texts the tokenizer learns")
    parser.add_argument("--include_path", help="directory of the tasks' files")
    parser.add_argument(
        "--config_only", action="store_true", help="write no weights: the benchmarks draw them (--random_weights)"
    )
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    tokenizer = train_tokenizer(read_texts(args.tasks.split(","), args.include_path))
    tokenizer.save_pretrained(args.out)
    config = make_config(args.shape, tokenizer)
    config.save_pretrained(args.out)
    if not args.config_only:
        make_model(config).save_pretrained(args.out)
    print(f"{args.out}: {args.shape}, a tokenizer of {len(tokenizer)} tokens, vocabulary {config.vocab_size}")


def read_texts(tasks: Sequence[str], include_path: str | None) -> list[str]:
    """Every distinct string of the tasks' requests without examples: what is scored, then whole texts, in lm_eval's order."""
    found = collect_requests(tasks, include_path, num_fewshot=0)
    scored = (text for request in found["loglikelihood"] for text in request.args)
    whole = (request.args[0] for request in (*found["loglikelihood_rolling"], *found["generate_until"]))
    return list(dict.fromkeys((*scored, *whole)))


def train_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE as GPT-2's, Llama 3's and Qwen's are."""
    from transformers import PreTrainedTokenizerFast

    bpe = train_bpe(texts, TOKENIZER_SIZE, ["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def make_config(shape: str, tokenizer: Any) -> Any:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {"model_type": "llama", "vocab_size": TOKENIZER_SIZE, "max_position_embeddings": 2048, **SHAPES[shape]}
    kind = settings.pop("model_type")
    return CONFIG_MAPPING[kind](**settings, **ids, architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]])


def make_model(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


if __name__ == "__main__":
    main()
