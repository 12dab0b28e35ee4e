"""The models of bench_gpu.py: configs, whose weights its parts draw on the device, or one of them with weights on disk.

    python scripts/gpu_models.py --shapes llama1b llama8b --tasks A:300,B --include_path TASKS --out DIR
    python scripts/gpu_models.py --draw DIR/1b --dtype bfloat16 --out DIR/weights          for vLLM, which reads them

1b and 8b have the vocabulary of their shapes, most of whose tokens stand for no text; 1b_text, which generates some, has the
tokenizer's. All have one tokenizer, which learns the texts of the tasks.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from make_bench_model import make_config, read_texts, train_tokenizer  # beside this file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs=2, help="of make_bench_model.py, for 1b and 8b")
    parser.add_argument("--tasks", help="comma-separated TASK or TASK:DOCUMENTS whose texts the tokenizer learns")
    parser.add_argument("--include_path", help="directory of the tasks' files")
    parser.add_argument("--draw", type=Path, help="directory of a config and a tokenizer: draw its weights")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default bfloat16)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    draw(args) if args.draw else make_configs(args)


def make_configs(args: argparse.Namespace) -> None:
    names = [task.partition(":")[0] for task in args.tasks.split(",")]
    tokenizer = train_tokenizer(read_texts(names, args.include_path))
    small, large = args.shapes
    for name, shape in (("1b", small), ("8b", large), ("1b_text", small)):
        config = make_config(shape, tokenizer)
        if name == "1b_text":
            config.vocab_size = len(tokenizer)
        tokenizer.save_pretrained(args.out / name)
        config.save_pretrained(args.out / name)


def draw(args: argparse.Namespace) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    with torch.device(device):
        config = transformers.AutoConfig.from_pretrained(args.draw)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    model.save_pretrained(args.out)
    transformers.AutoTokenizer.from_pretrained(args.draw).save_pretrained(args.out)


if __name__ == "__main__":
    main()
