"""What programs that were written for lm_eval's HFLM find on `ddp_eval.lm.DDPEvalLM`: its members, or why one is not there.

Leader only. The answers to requests are in lm.py; here is what stands around them: HFLM's settings, tokens, the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from lm_eval.models.utils import has_bos_prefix

from ddp_eval.config import Config, read_think_end
from ddp_eval.system.text import read_count
from ddp_eval.tasks.generation_requests import MAX_GEN_TOKS
from ddp_eval.tasks.tokenization import Encoder

_LOADS = "the model is loaded by then: give arguments to ddp_eval.lm.launch"
BY_COST = "packs are sized by cost, not by a batch size: there is none to find"
_LOOPS = "generation is a loop of its own over all ranks: call generate_until"
_ABSENT = {
    "accelerator": "torchrun starts the ranks, and torch.distributed joins them, not accelerate",
    "_get_config": _LOADS,
    "_get_backend": _LOADS,
    "_create_model": _LOADS,
    "_create_tokenizer": _LOADS,
    "_get_accelerate_args": _LOADS,
    "_detect_batch_size": BY_COST,
    "_batch_scheduler": BY_COST,
    "_model_generate": _LOOPS,
    "_select_cont_toks": "logits exist only where an answer is read: call loglikelihood or _loglikelihood_tokens",
}


class HFLMMembers:
    """To be mixed in; `_keep_members` sets what HFLM's constructor sets. `_replica` is the leader's engine and its layout."""

    tokenizer: Any
    encoder: Encoder
    _replica: Any
    _options: Any

    _DEFAULT_MAX_LENGTH = 2048

    def _keep_members(self, config: Config, model_config: Any, device: torch.device, given: Mapping[str, Any]) -> None:
        """given: the constructor's arguments, those that have no effect here among them."""
        args = config.model_args
        separate = self.encoder.separate
        self.backend = "seq2seq" if separate else "causal"
        self.AUTO_MODEL_CLASS = transformers.AutoModelForSeq2SeqLM if separate else transformers.AutoModelForCausalLM
        self._config = model_config
        self._device = device
        self._max_length = args.get("max_length")
        self.pretrained = args["pretrained"]
        self.revision = str(args.get("revision") or "main")
        self.peft, self.delta = args.get("peft"), None
        self.add_bos_token = args.get("add_bos_token")
        self.custom_prefix_token_id = args.get("prefix_token_id")
        self.vocab_size = self.tokenizer.vocab_size
        self.enable_thinking = args.get("enable_thinking")
        self.think_end_token = read_think_end(args)
        self.truncation, self.logits_cache = False, True
        self.softmax_dtype, self.mixed_precision_dtype = torch.float32, None
        size, _, schedule = str(given.get("batch_size") or 1).partition(":")
        count = read_count(size)
        self.batch_size_per_gpu: int | str = size if count is None else count
        self.batch_schedule: float = float(schedule) if schedule else 1
        self.batch_sizes: dict[int, int] = {}
        self.max_batch_size = given.get("max_batch_size") or 64

    @property
    def batch_size(self) -> int | str:
        """What was given, or 1: packs are sized by cost."""
        return self.batch_size_per_gpu

    @property
    def max_gen_toks(self) -> int:
        return self._options.max_gen_toks or MAX_GEN_TOKS

    @property
    def chat_template_args(self) -> dict[str, Any]:
        return dict(getattr(self, "_chat_template_args", {}))

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, tokens) ids and mask, padded to the longest, as HFLM gives them to `generate`."""
        options: dict[str, Any] = {}
        if self.backend == "causal":
            if has_bos_prefix(strings[0], getattr(self.tokenizer, "bos_token", None)):
                options["add_special_tokens"] = False
            elif self.add_bos_token is not None:
                options["add_special_tokens"] = self.add_bos_token
        side = self.tokenizer.padding_side
        self.tokenizer.padding_side = padding_side
        try:
            encoding = self.tokenizer(strings, truncation=truncation, padding="longest", return_tensors="pt", **options)
        finally:
            self.tokenizer.padding_side = side
        kept = slice(-left_truncate_len if left_truncate_len else None, None)
        return encoding["input_ids"][:, kept], encoding["attention_mask"][:, kept]

    def _model_call(self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None) -> Any:
        """(rows, tokens, vocabulary) logits of this rank's copy: one plain forward, on this rank alone."""
        more = {} if attn_mask is None and labels is None else {"attention_mask": attn_mask, "labels": labels}
        with torch.no_grad():
            return self.model(input_ids=inps, **more).logits

    @property
    def model(self) -> Any:
        """This rank's copy, which is all of the model. AttributeError where none is whole."""
        if self._replica.layout.ranks_per_replica > 1:
            raise AttributeError(self._why_no_model())
        return self._replica.engine.model

    @property
    def _model(self) -> Any:
        return self.model

    def _why_no_model(self) -> str:
        return (
            f"no rank holds the whole model under --layout {self._replica.layout}: launch with layout='replicas' to have one, "
            "or call loglikelihood, loglikelihood_rolling or generate_until, which all ranks answer"
        )

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there or raises AttributeError itself."""
        if name in ("model", "_model") and "_replica" in self.__dict__:
            raise AttributeError(self._why_no_model())
        if name in _ABSENT:
            raise AttributeError(f"{type(self).__name__} has no {name}: {_ABSENT[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
