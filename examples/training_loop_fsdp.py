#!/usr/bin/env python3
"""Train a small model under FSDP2, sharded as torchtitan does it, and evaluate it on lm_eval tasks now and then.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 examples/training_loop_fsdp.py --steps 20 --every 10

Each layer is sharded, then the rest of the model. `evaluate` gathers layers as training does, on every rank at the same time, and
leaves the model sharded. The model and the tasks are those that ship with ddp_eval, so that this needs no GPU and no network.
"""

from __future__ import annotations

import argparse
import gc
import os
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import ddp_eval
from ddp_eval import demo

TEXT = "True and not False is True. not True or False is False. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations (default: %(default)s)")
    parser.add_argument("--tasks", default="demo_boolean_expressions", help="lm_eval task names (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=20, help="documents of each task (default: %(default)s)")
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    rank = dist.get_rank()
    torch.manual_seed(0)

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH)
    model.to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = tokenizer(TEXT * 4, return_tensors="pt").input_ids.to(device)

    for step in range(1, options.steps + 1):
        model.train()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % options.every == 0:
            # Every rank calls it; rank 0 gets the results, the others None.
            results = ddp_eval.evaluate(model, tokenizer, tasks=options.tasks, limit=options.limit, bootstrap_iters=0)
            if results is not None:
                scores = {task: row.get("acc,none") for task, row in results["results"].items()}
                print(f"step {step}: loss {float(loss):.4f}, acc {scores}", flush=True)

    if rank == 0:
        print("done", flush=True)
    # The model must go before the group: as its last holder it can wait for the group's threads for ever.
    del layer, model, optimizer
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
