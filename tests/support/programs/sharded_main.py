"""What `test_sharded.py` runs: `ddp_eval.evaluate` on models that `fully_shard` has spread over all ranks, in many ways.

    sharded_main.py DIRECTORY CASE...       a case: kind/way/dtype, or refused/way

Rank R writes what it saw to DIRECTORY/R.json, by case: the answers on the sharded model, those of the whole model on rank 0
alone, and what an evaluation has changed.
"""

import copy
import gc
import json
import sys
from pathlib import Path
from typing import Any

import quick_main  # noqa: F401  spares the leader the index of lm_eval's own tasks
import tiny_models
import torch
import torch.distributed as dist
from places import GENERATION_TASKS
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

import ddp_eval

TASKS = ["demo_hellaswag", "demo_lambada"]
TEXTS = ["gen_boolean", "gen_drawn", "gen_story"]
COMPILED = {"traced": "eager", "compiled": "inductor"}  # the first wraps the model alike, without a compiler


def make_model(kind: str, dtype: torch.dtype) -> Any:
    """A tiny model; its buffers stay in float32, as `from_pretrained` has them."""
    model = tiny_models.make_model(kind)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(dtype)
    for name, buffer in buffers.items():
        model.get_buffer(name).data = buffer
    return model


def adapt(model: Any) -> Any:
    """The model in peft's wrapper, with a LoRA adapter that changes its answers."""
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"]))


def layers_of(model: Any) -> list[Any]:
    if type(model).__module__.startswith("peft."):
        return layers_of(model.get_base_model())
    return list(model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers)


def add_tower(model: Any) -> Any:
    """The model with modules that text does not come to, defined before its layers, as models that read images have them."""
    model._modules = {"tower": torch.nn.ModuleList(torch.nn.Linear(9, 9) for _ in range(2)), **model._modules}
    return model


def shard(model: Any, way: str, dtype: torch.dtype) -> Any:
    """Spread the model over the ranks. Returns what the caller would evaluate."""
    options: dict[str, Any] = {}
    if way == "policy":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype)
    if way == "kept":
        options["reshard_after_forward"] = False
    if way == "freed":
        options["reshard_after_forward"] = True
    if way == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if way == "hybrid":
        count = dist.get_world_size() // 2
        options["mesh"] = dist.init_device_mesh("cpu", (count, 2), mesh_dim_names=("replicate", "shard"))
    for layer in (*getattr(model, "tower", ()), *layers_of(model)):
        if way in COMPILED:
            layer.compile(backend=COMPILED[way])
        fully_shard(layer, **options)
    if way == "grouped":
        fully_shard([model.base_model.norm, model.get_output_embeddings()], **options)
        fully_shard(model.get_input_embeddings(), **options)
    if way == "tied":  # as accelerate does it
        fully_shard([model.base_model.norm, model.get_input_embeddings(), model.get_output_embeddings()], **options)
    if way == "parts":
        fully_shard(model.base_model, **options)
        fully_shard(model.get_output_embeddings(), **options)
    elif way == "policy":
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, output_dtype=torch.float32))
    elif way != "layers":
        fully_shard(model, **options)
    return torch.compile(model, backend=COMPILED[way]) if way in COMPILED else model


def answers(results: dict[str, Any] | None) -> dict[str, Any] | None:
    """Every number of every request."""
    return results and {
        task: [[sample["doc_id"], *map(str, sample["filtered_resps"])] for sample in samples]
        for task, samples in results["samples"].items()
    }


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def state_of(model: Any) -> dict[str, Any]:
    return {
        "training": [module.training for module in model.modules()],
        "sharded": [hasattr(weight, "placements") for weight in model.parameters()],
        "values": [local(weight).sum().item() for weight in model.parameters()],
        "gradients": [None if weight.grad is None else local(weight.grad).sum().item() for weight in model.parameters()],
        "random": torch.get_rng_state().tolist(),
        "attention": model.config._attn_implementation,
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "classes": [f"{type(module).__module__}.{type(module).__name__}" for module in model.modules()],
        "forward": ["forward" in vars(module) for module in model.modules()],
        "groups": len(dist.distributed_c10d._world.pg_map),
    }


def train_one_step(model: Any) -> None:
    tokens = torch.arange(20)[None] + dist.get_rank()
    model(input_ids=tokens, labels=tokens).loss.backward()


def run_refused(way: str, tokenizer: Any) -> str | None:
    """The error of a model that `evaluate` does not serve."""
    model = make_model("t5" if way == "pair" else "llama", torch.float32)
    if way == "pair":
        called = fully_shard(model)
    elif way == "fsdp1":
        called = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    try:
        ddp_eval.evaluate(called, tokenizer, TASKS, limit=1)
    except ddp_eval.UserError as error:
        return str(error)
    return None


def run_case(case: str, tokenizer: Any, wholes: dict[tuple[str, str, str], Any], alone: Any) -> Any:
    """wholes: what is known of whole models, by kind, dtype and work; more are made on ranks that are in the group `alone`."""
    kind, way, *dtype_name = case.split("/")
    if kind == "refused":
        return run_refused(way, tokenizer)
    dtype, work = getattr(torch, dtype_name[0]), way if way in ("texts", "single", "adapter") else ""
    tasks, options = TASKS, dict[str, Any](limit=3, log_samples=True)
    if work == "texts":
        tasks, options = TEXTS, {**options, "include_path": str(GENERATION_TASKS)}
    elif work == "single":  # by the model's own `generate`
        beams = {"limit": 2, "gen_kwargs": "num_beams=2,max_gen_toks=6", "include_path": str(GENERATION_TASKS)}
        tasks, options = TEXTS[:1], {**options, **beams}
    put = adapt if work == "adapter" else lambda model: model
    key = kind, dtype_name[0], work
    if alone is not None and key not in wholes:
        wholes[key] = answers(ddp_eval.evaluate(put(make_model(kind, dtype)), tokenizer, tasks, group=alone, **options))
    model = put(make_model(kind, torch.float32 if way == "policy" else dtype))
    called = shard(model, way, dtype)
    model.train()
    before_first = way in ("freed", "kept")
    if not before_first:
        train_one_step(called)
    before = copy.deepcopy(state_of(model))
    many = answers(ddp_eval.evaluate(called, tokenizer, tasks, **options))
    after = state_of(model)
    train_one_step(called)
    changed = [name for name in before if before[name] != after[name] and not (before_first and name == "sharded")]
    return {"whole": wholes.get(key), "many": many, "changed": changed}


def main() -> None:
    dist.init_process_group("gloo")
    alone = dist.new_group([0])
    tokenizer = tiny_models.make_tokenizer(model_max_length=2048)
    wholes: dict[tuple[str, str, str], Any] = {}
    found = {case: run_case(case, tokenizer, wholes, alone if dist.get_rank() == 0 else None) for case in sys.argv[2:]}
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
