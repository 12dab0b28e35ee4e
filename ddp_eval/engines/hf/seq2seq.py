"""Run (context, continuation) pairs through an encoder-decoder of transformers: the one is encoded, the other decoded.

The rules are those of lm_eval's HF backend with `backend=seq2seq`: the decoder is fed the continuation shifted right, as the
model shifts its labels, and read at every token of it. A context is encoded once for all continuations of a pack that share it.

Letters: G contexts, S longest context, K items, T longest continuation, A answers (scored tokens), V vocabulary, H hidden size.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval.engines import Capabilities, OnProgress
from ddp_eval.engines.hf import checkpoint, costs, generate_one
from ddp_eval.engines.hf.base import TransformersEngine
from ddp_eval.engines.hf.draws import ForwardDraws
from ddp_eval.engines.ops import logprobs as readout
from ddp_eval.engines.ops import onednn_linear
from ddp_eval.engines.stop_strings import StopRule
from ddp_eval.packs.batches import Batch, Settings
from ddp_eval.packs.cut import CostModel
from ddp_eval.packs.pairs import contexts_of
from ddp_eval.packs.plan import Pack

PADDING = 0  # any token does: the encoder's mask hides it, and causal decoders never look behind a continuation's end


def load_engine(model_args: dict[str, Any], config: Any, device: torch.device) -> Seq2SeqEngine:
    """Load a replica's weights onto `device`. Raises UserError for unusable files, arguments or too little memory."""
    import transformers

    return Seq2SeqEngine(checkpoint.load_weights(model_args, config, device, transformers.AutoModelForSeq2SeqLM), device)


class Seq2SeqEngine(TransformersEngine):
    """One replica of a transformers encoder-decoder on one device."""

    name = "seq2seq"
    why_not_batches = "an encoder-decoder"

    def __init__(self, model: Any, device: torch.device) -> None:
        super().__init__(model, device)
        self.capabilities = Capabilities(launches_ahead=device.type != "cpu", is_encoder_decoder=True, rows_are_independent=True)
        self._own_draws = ForwardDraws(device)
        self._is_looked_at = False
        self._remove_products = onednn_linear.install(model)

    def close(self) -> None:
        """Give the model back as it came."""
        self._remove_products()

    def max_tokens(self) -> int:
        return 16384 if self.device.type == "cuda" else 2048

    def max_reads(self) -> int | None:
        """How many padded decoder tokens keep the logits within 1 GiB of float32."""
        return max(1, 2**28 // self.vocab_size)

    def cost_model(self) -> CostModel:
        return CostModel(token=self.flops_per_token())

    def flops_per_token(self) -> float:
        """Of a token in the mean: the encoder or the decoder, taken for half of the layers each."""
        return costs.active_parameters(self.model, self.config)

    def launch(self, pack: Pack) -> readout.Launched:
        """Start a pack's forward pass; on CUDA it goes on after this returns. `collect` waits for it."""
        from transformers.modeling_outputs import BaseModelOutput

        self._look_for_draws()
        contexts, context_of_item, continuations = contexts_of(pack)
        rows = torch.from_numpy(context_of_item).to(self.device)
        tokens, mask = self._pad([torch.from_numpy(context.astype(np.int64)) for context in contexts])  # (G, S)
        with self._inference(), self._own_draws.seeded_by(pack.tokens, pack.depth):
            decoder_tokens, present = self._pad([self._shift(targets) for targets in continuations])  # (K, T)
            hidden = self.model.get_encoder()(input_ids=tokens, attention_mask=mask).last_hidden_state  # (G, S, H)
            logits = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden[rows]),
                attention_mask=mask[rows],
                decoder_input_ids=decoder_tokens,
                use_cache=False,
            ).logits  # (K, T, V)
            return self._read_off(logits[present.bool()], pack)

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            yield

    def _look_for_draws(self) -> None:
        """Run a few tokens once, to see whether a forward draws at random. What a model raises is left to its first pack."""
        if self._is_looked_at:
            return
        self._is_looked_at = True
        tokens = torch.arange(4, device=self.device)[None] % self.vocab_size
        with contextlib.suppress(Exception), self._inference(), self._own_draws.watching():
            self.model(input_ids=tokens, decoder_input_ids=tokens, use_cache=False)

    def _shift(self, targets: npt.NDArray[np.integer]) -> torch.Tensor:
        """(T,) the decoder's input for a continuation, by the model's own rule for labels."""
        labels = torch.from_numpy(targets.astype(np.int64))[None]
        if hasattr(self.model, "prepare_decoder_input_ids_from_labels"):
            shifted: torch.Tensor = self.model.prepare_decoder_input_ids_from_labels(labels)
        else:
            shift = sys.modules[type(self.model).__module__].shift_tokens_right
            shifted = shift(labels, self.config.pad_token_id, self.config.decoder_start_token_id)
        return shifted[0]

    def _pad(self, sequences: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, longest) tokens padded on the right, and 1 where there is one, on the device."""
        tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PADDING)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        return tokens.to(self.device), mask.to(self.device)

    def _read_off(self, logits: torch.Tensor, pack: Pack) -> readout.Launched:
        """logits: (A, V), in the order of the pack's answers."""
        rows = torch.arange(len(logits), device=self.device)
        targets = torch.from_numpy(pack.answer_targets).to(self.device)
        return readout.copy_to_host(pack, readout.score_tokens(logits, rows, targets, pack.answer_items))

    def check_settings(self, settings: Settings, pad: int | None) -> bool:
        """Never in batches. Raises ValueError for settings that transformers refuses."""
        generate_one.prepare_config(self.model, settings, 2, pad)
        return False

    def generate(self, batch: Batch, tokenizer: Any, on_progress: OnProgress) -> list[list[int]]:
        """Every answer by the model's own `generate`, one prompt at a time; the decoder's first token is not among its tokens."""
        rule, answers = StopRule(tokenizer, batch.settings.until), []
        for prompt, limit, seed in zip(batch.prompts, batch.limits, batch.seeds, strict=True):
            context, mask = self._pad([torch.from_numpy(prompt.astype(np.int64))])
            inputs = {"input_ids": context, "attention_mask": mask}
            with self._inference():
                answers.append(
                    generate_one.answer(self.model, inputs, 1, limit, seed, batch.settings, rule.ends, tokenizer.pad_token_id)
                )
            on_progress(1, len(prompt) + len(answers[-1]))
        return answers
