"""Train the demo model: a 1.2 M-parameter Llama that evaluates Boolean expressions and has read a little English.

    python scripts/make_demo_model.py            # about 10 minutes on one core, writes ddp_eval/demo/model

Deterministic: the same packages, processor and --threads give the same bytes. A different thread count splits sums elsewhere and
so changes the last bits of CPU arithmetic, and with them every later step.

It learns from two things, and never from a row that a demo task evaluates:
  - Boolean expressions, enumerated here and answered by Python. The evaluated ones are taken out first.
  - English: the few-shot rows of HellaSwag and MMLU and the LAMBADA rows that ship for this purpose (demo/SOURCES.md).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parent.parent / "ddp_eval" / "demo"
SEED = 1234
LONGEST = 9  # words in an expression; the evaluated ones all have 8
NUM_HELD_OUT = 500
WINDOW = 1024  # tokens, also the model's context: every position gets trained
LEARNING_RATE = 2e-3
Pair = tuple[str, str]  # question, answer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@lru_cache(None)
def expressions(num_words: int) -> list[str]:
    """Every Boolean expression of that many words, sorted: `term`, or `term and|or expression`."""
    found = set(terms(num_words))
    for left in range(1, num_words - 1):
        for operator in ("and", "or"):
            found |= {f"{a} {operator} {b}" for a in terms(left) for b in expressions(num_words - left - 1)}
    return sorted(found)


@lru_cache(None)
def terms(num_words: int) -> list[str]:
    """`True`, `False`, `not term` or `( expression )`, sorted."""
    found = {"True", "False"} if num_words == 1 else set()
    if num_words >= 2:
        found |= {f"not {term}" for term in terms(num_words - 1)}
    if num_words >= 3:
        found |= {f"( {inner} )" for inner in expressions(num_words - 2)}
    return sorted(found)


def read_rows(name: str) -> list[dict[str, Any]]:
    with (DEMO / "data" / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def split_expressions() -> tuple[list[Pair], list[Pair]]:
    """(train, held out) lists of (question, answer). No question is an evaluated one, or ends in one (`not` + evaluated)."""
    evaluated = tuple(row["input"] for row in read_rows("boolean_expressions_test.jsonl"))
    every = [f"{text} is" for num_words in range(1, LONGEST + 1) for text in expressions(num_words)]
    allowed = [question for question in every if not question.endswith(evaluated)]
    pairs = [(question, str(eval(question.removesuffix(" is")))) for question in allowed]
    random.Random(SEED).shuffle(pairs)
    return pairs[NUM_HELD_OUT:], pairs[:NUM_HELD_OUT]


def read_english() -> list[str]:
    """One string per document, in the words that the tasks use around their few-shot rows."""
    documents = [row["text"] for row in read_rows("lambada_train.jsonl")]
    documents += [f"{row['query']} {row['choices'][int(row['label'])]}" for row in read_rows("hellaswag_train.jsonl")]
    for path in sorted((DEMO / "data").glob("mmlu_*_dev.jsonl")):
        for row in read_rows(path.name):
            choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
            documents.append(f"{row['question'].strip()}\n{choices}Answer: {'ABCD'[row['answer']]}")
    return documents


def train_bpe(texts: Iterable[str], size: int, special_tokens: list[str]) -> Tokenizer:
    """A byte-level BPE as GPT-2's, of at most `size` tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """2,048 tokens; the words of the expressions come out as one token each."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(texts, 2048, ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=WINDOW,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_expressions(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels), both (rows, length): plain, after <s>, or in the chat template; only the answer and </s> are labels."""
    rows = []
    for question, answer in pairs:
        prompt, target = rng.choice(
            [
                (question, f" {answer}"),
                (question, f" {answer}"),
                (f"<s>{question}", f" {answer}"),
                (f"<s><|user|>{question}\n<|assistant|>", answer),
            ]
        )
        rows.append((tokenizer(prompt).input_ids, tokenizer(f"{target}</s>").input_ids))
    length = max(len(prompt) + len(target) for prompt, target in rows)
    tokens = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    for i, (prompt, target) in enumerate(rows):
        end = len(prompt) + len(target)
        tokens[i, :end] = torch.tensor(prompt + target)
        labels[i, len(prompt) : end] = torch.tensor(target)
    return tokens, labels


def next_token_loss(model: LlamaForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean nats over the labels that are not -100. No mask: padding stands on the right, where causal attention can't see it."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def draw_window(documents: list[str], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> torch.Tensor:
    """(1, WINDOW) tokens of shuffled documents, joined as few-shot examples are, with <s> in front half of the time."""
    text = "\n\n".join(rng.sample(documents, 40))
    start = [tokenizer.bos_token_id] * rng.randrange(2)
    return torch.tensor([(start + tokenizer(text, truncation=True, max_length=WINDOW).input_ids)[:WINDOW]])


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[Pair],
    documents: list[str],
    num_steps: int,
    batch_size: int,
) -> None:
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    started = time.perf_counter()
    for step in range(num_steps):
        warmup, decay = (step + 1) / 50, 1.0 - step / num_steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(warmup, decay)
        answer_loss = next_token_loss(model, *encode_expressions(rng.sample(pairs, batch_size), tokenizer, rng))
        window = draw_window(documents, tokenizer, rng)
        english_loss = next_token_loss(model, window, window)
        (answer_loss + english_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == num_steps - 1:
            elapsed_s = time.perf_counter() - started
            losses = f"answers {answer_loss.item():.4f}  English {english_loss.item():.4f} nats"
            print(f"step {step:5d}  {losses}  {elapsed_s:.0f} s", flush=True)


@torch.no_grad()
def measure_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> float:
    """The share of questions after which the right one of ` True` and ` False` is the likelier token."""
    true, false = tokenizer(" True").input_ids[0], tokenizer(" False").input_ids[0]
    num_right = 0
    for question, answer in pairs:
        logits = model(torch.tensor([tokenizer(question).input_ids])).logits[0, -1]
        num_right += (logits[true] > logits[false]).item() == (answer == "True")
    return num_right / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEMO / "model", help="folder to write (default: the package's own)")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps (default 800)")
    parser.add_argument("--batch_size", type=int, default=128, help="expressions per step (default 128)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1); another count gives other last bits")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)

    train_pairs, held_out_pairs = split_expressions()
    documents = read_english()
    tokenizer = make_tokenizer(documents + [f"{question} {answer}" for question, answer in train_pairs])
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(train_pairs):,} expressions, {len(documents)} documents")
    train(model, tokenizer, train_pairs, documents, args.steps, args.batch_size)

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    for path in sorted(args.out.iterdir()):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.stat().st_size:9,}  {path.name}")
    accuracy = measure_accuracy(model.eval(), tokenizer, held_out_pairs)
    print(f"accuracy on {len(held_out_pairs)} expressions that it has not seen: {accuracy:.3f}")


if __name__ == "__main__":
    main()
