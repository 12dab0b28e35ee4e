"""A model larger than a rank's memory, over two ranks."""

import pytest
import tiny_models
import torch
import transformers
import transformers.initialization
from launch import launch
from places import PROGRAMS

from ddp_eval.output import tables

CAPPED = (str(PROGRAMS / "capped_main.py"),)
WIDTH, INNER, LAYERS = 1024, 4096, 72  # 17 M weights a layer: 4.8 GB in float32


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_model_larger_than_a_rank(tmp_path):
    """Catches a rank that loads, or maps, more than its own weights: then the cap that one rank breaks breaks two as well."""
    config = transformers.LlamaConfig(
        vocab_size=tiny_models.VOCAB_SIZE, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=16, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), transformers.initialization.no_init_weights():
        model = transformers.LlamaForCausalLM(config)
    pattern = torch.randn(INNER, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        for weight in model.parameters():  # some numbers, quickly; a stage's weights differ from the next one's by a shift
            flat = weight.view(-1)
            repeated = pattern.roll(len(flat) % 97).repeat(-(-len(flat) // INNER))[: len(flat)]
            flat.copy_(repeated)
    whole = sum(weight.nbytes for weight in model.parameters())
    model.save_pretrained(tmp_path / "model", max_shard_size="100MB")
    tiny_models.make_tokenizer(model_max_length=512).save_pretrained(tmp_path / "model")
    del model
    assert whole > 4.5e9

    def run(ranks, layout, cap):
        peaks = tmp_path / f"peaks_{layout.replace(':', '')}_{cap}"
        peaks.mkdir()
        finished = launch(
            ranks, "--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", "demo_boolean_expressions", "--limit", 1,
            "--layout", layout, "--output_path", peaks / "run",
            program=CAPPED, timeout_s=1500, DDP_EVAL_CAP_BYTES=str(cap), DDP_EVAL_PEAKS=str(peaks),
        )  # fmt: skip
        return (
            finished,
            peaks,
            {rank: int((peaks / str(rank)).read_text()) for rank in range(max(ranks, 1)) if (peaks / str(rank)).exists()},
        )

    cap = int(0.99 * whole)  # the leader's imports alone map 1.6 GB, most of it never touched
    alone, _, _ = run(1, "replicas", cap)
    assert alone.returncode != 0 and "memory" in alone.stderr, "the cap is below the weights"
    uncapped, one, peak = run(1, "replicas", 0)
    assert uncapped.returncode == 0, str(uncapped)
    for layout in ("layers:2", "shard:2"):
        finished, two, peaks = run(2, layout, cap)
        assert finished.returncode == 0, str(finished)
        of_two = [each / 1e9 for each in peaks.values()]
        print(f"weights {whole / 1e9:.2f} GB; peak of one rank {peak[0] / 1e9:.2f} GB, of two under {layout} {of_two}")
        assert max(peaks.values()) < 0.6 * peak[0]
        assert len(peaks) == 2
        assert (two / "run" / tables.SCORES).read_bytes() == (one / "run" / tables.SCORES).read_bytes()
