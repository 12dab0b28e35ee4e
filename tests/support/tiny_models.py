"""Tiny random models and tokenizers, and lm_eval's own HF backend to compare with. No test here, no network, no pytest.

Weights are drawn with a spread of 0.3, far from what training starts with: every mask, window and position then shows in the
log-probabilities by whole nats, where the usual 0.02 would hide a wrong one behind rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ddp_eval import demo

WINDOW = 8  # of the sliding and chunked kinds: shorter than any prompt
VOCAB_SIZE = 400
BOS, EOS = "<s>", "</s>"

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE),
    "gpt2": lambda: transformers.GPT2Config(**_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=2048),
    "mistral": lambda: transformers.MistralConfig(**_SHAPE, sliding_window=WINDOW),
    # its layers slide and see all in turn
    "gemma2": lambda: transformers.Gemma2Config(**_SHAPE, sliding_window=WINDOW, query_pre_attn_scalar=8),
    # five sliding layers to one that sees all
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**_SHAPE, "num_hidden_layers": 6}, sliding_window=WINDOW, query_pre_attn_scalar=8
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    ),
    # one chunked layer with rotary positions, one that sees all without positions
    "llama4": lambda: transformers.Llama4TextConfig(
        **_SHAPE,
        attention_chunk_size=WINDOW,
        num_local_experts=2,
        intermediate_size_mlp=64,
        no_rope_layers=[1, 0],
        moe_layers=[1],
    ),
    # an indexer lets each token attend to at most 12 others; with many heads, so that no two of its scores are equal
    "deepseek_v32": lambda: transformers.DeepseekV32Config(
        **{**_SHAPE, "num_key_value_heads": 4, "head_dim": 8},
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_topk=12,
        index_n_heads=16,
        index_head_dim=16,
    ),
    # not causal: each token sees the whole row, and the padding behind it
    "bert": lambda: transformers.BertConfig(
        **_SMALL, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512
    ),
    "roberta": lambda: transformers.RobertaConfig(
        **_SMALL, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=514
    ),
    "mpt": lambda: transformers.MptConfig(**_SMALL, d_model=32, n_heads=4, n_layers=2, max_seq_len=2048),
    "bloom": lambda: transformers.BloomConfig(**_SMALL, hidden_size=32, n_layer=2, n_head=4),
    "falcon_alibi": lambda: transformers.FalconConfig(
        **_SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, max_position_embeddings=2048
    ),
    # one layer that sees all, one that slides, each by a buffer of its own
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **_SMALL,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=2048,
    ),
    "openai_gpt": lambda: transformers.OpenAIGPTConfig(
        vocab_size=VOCAB_SIZE, initializer_range=0.3, n_embd=32, n_layer=2, n_head=4, n_positions=2048
    ),
    "mamba": lambda: transformers.MambaConfig(**_SMALL, hidden_size=32, num_hidden_layers=2, state_size=8),
}
# Layers that keep a state: gated delta rules beside attention, state space and attention in one layer, short convolutions.
STATE_CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        **_SHAPE,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **_SHAPE, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=128
    ),
    "lfm2": lambda: transformers.Lfm2Config(**_SHAPE, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "jamba": lambda: transformers.JambaConfig(
        **_SHAPE,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
}
_ENCODER_DECODER: dict[str, Any] = {
    **{name: 2 for name in ("encoder_layers", "decoder_layers")},
    **{name: 4 for name in ("encoder_attention_heads", "decoder_attention_heads")},
    **{name: 64 for name in ("encoder_ffn_dim", "decoder_ffn_dim")},
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "max_position_embeddings": 512,
    "init_std": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "n_positions": 512,
    "pad_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
SEQ2SEQ_CONFIGS: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5Config(**_T5),
    "bart": lambda: transformers.BartConfig(**_ENCODER_DECODER),
    # has no `prepare_decoder_input_ids_from_labels`
    "m2m_100": lambda: transformers.M2M100Config(**_ENCODER_DECODER),
}
DEPTH_KINDS = ("mpt", "bloom", "falcon_alibi", "gpt_neo", "openai_gpt")  # count by index, and are made to count by depth
BATCHED_KINDS = ("llama", "gpt2", "mistral", "gemma2", "gemma3", "qwen3_moe", "llama4")  # generate in batches, too
TREE_KINDS = (*BATCHED_KINDS, "deepseek_v32", *DEPTH_KINDS)
ROW_KINDS = ("mamba",)  # no packs
STATE_KINDS = ("mamba", *STATE_CONFIGS)  # share prefixes by copies of their cache
SINGLE_KINDS = ("bert", "roberta")


def make_model(kind: str, attn_implementation: str | None = None) -> Any:
    """A random model of `kind`, in float32 and evaluation mode; the same weights at every call and in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        if kind in SEQ2SEQ_CONFIGS:
            return transformers.AutoModelForSeq2SeqLM.from_config(SEQ2SEQ_CONFIGS[kind](), dtype=torch.float32, **options).eval()
        config = {**CONFIGS, **STATE_CONFIGS}[kind]()
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        if kind == "deepseek_v32":  # the padding token's row is zero: to its indexer all tokens before it would be equal
            torch.nn.init.normal_(model.get_input_embeddings().weight, 0.0, 0.3)
    return model.eval()


def make_tokenizer(**options: Any) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCAB_SIZE ids, `<s>` 0 and `</s>` 1. It loses no text and adds no special token."""
    backend = train(byte_level_bpe(), training_text())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": BOS, "eos_token": EOS, **options})


def save_model(kind: str, directory: Path) -> Path:
    """A model of `kind` and its tokenizer in `directory`, as `pretrained=` takes it."""
    make_model(kind).save_pretrained(directory)
    make_tokenizer(model_max_length=2048).save_pretrained(directory)
    return directory


def training_text() -> list[str]:
    """Some English of the demo's own, to train tokenizers on."""
    lines = (Path(demo.TASKS_PATH).parent / "data" / "lambada_train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[:60]]


def train(parts: tuple[Tokenizer, Any], text: Sequence[str]) -> Tokenizer:
    """Train (tokenizer, trainer) on `text`; returns the tokenizer."""
    tokenizer, trainer = parts
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def byte_level_bpe(add_bos: bool = False) -> tuple[Tokenizer, Any]:
    """Untrained GPT-2-like tokenizer and its trainer; with `add_bos`, as Llama 3's does, BOS goes before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    return tokenizer, trainer


def unigram() -> tuple[Tokenizer, Any]:
    """Untrained SentencePiece-like tokenizer and its trainer: a space before every text, BOS before that."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[BOS, EOS, "<unk>"], unk_token="<unk>", show_progress=False
    )
    return tokenizer, trainer


def word_piece() -> tuple[Tokenizer, Any]:
    """Untrained BERT-like tokenizer and its trainer: lower case, [CLS] before and [SEP] behind every text."""
    from tokenizers import normalizers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["[CLS]", "[SEP]", "[UNK]", "[PAD]"], show_progress=False
    )
    return tokenizer, trainer


def make_joining_tokenizer(**options: Any) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE in which "Answer" is one token and "Ans" two; `<s>` 0, `</s>` 1."""
    merges = [("A", "n"), ("s", "w"), ("sw", "e"), ("swe", "r"), ("An", "swer")]
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 2048, **options}
    )
    assert len(made.encode("Answer")) == 1 and len(made.encode("Ans")) == 2
    return made


def score_plainly(model: Any, sequence: Sequence[int], num_targets: int) -> tuple[float, bool]:
    """The log-probability in nats of a sequence's last tokens and whether each was the argmax: one plain forward, by hand."""
    tokens = torch.tensor([list(sequence)], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[0].double()
    targets = tokens[0, 1:]
    logprobs = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    greedy = logits.argmax(-1) == targets
    return float(logprobs[-num_targets:].sum()), bool(greedy[-num_targets:].all())


def evaluate_with_lm_eval(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, lm_args: Any = None, **options: Any
) -> dict[str, Any]:
    """lm_eval's result dict, samples included, by its own HF backend at batch size 1, for tasks of the demo.

    lm_args: more arguments of HFLM. options: of `simple_evaluate`.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **(lm_args or {}))
    manager = TaskManager(include_path=demo.TASKS_PATH, include_defaults=False)
    options = {"task_manager": manager, "log_samples": True, "bootstrap_iters": 0, **options}
    results: dict[str, Any] = lm_eval.simple_evaluate(model=lm, tasks=list(tasks), **options)
    return results
