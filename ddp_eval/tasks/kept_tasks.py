"""Tasks that lm_eval need not load and build again for the next model: which they are, and how they become as new.

A task is kept where nothing works between its documents and its scores but templates, lm_eval's own metrics and filters, and code
that can keep no state (pure_code.py). All others are loaded and built anew for each model, by modules that are executed anew, as
in a process of their own.

What a task draws from Python's, numpy's and torch's global generators while it is loaded and built, the tasks behind it do not
get: so the states before and after are kept with it, and put in place where it is passed over.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import datasets
import lm_eval.api.registry as registry
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.samplers import ContextSampler, FirstNSampler
from lm_eval.api.task import ConfigurableTask

from ddp_eval.tasks.pure_code import keeps_no_state

_REGISTRIES = (
    registry.filter_registry, registry.aggregation_registry, registry.metric_registry, registry.metric_agg_registry,
    registry.higher_is_better_registry,
)  # fmt: skip


def generator_states() -> tuple[Any, ...]:
    """Of Python's, numpy's and torch's global generators; equal where nothing was drawn in between."""
    name, keys, *more = np.random.get_state(legacy=True)
    return random.getstate(), (name, np.asarray(keys).tobytes(), *more), torch.get_rng_state().numpy().tobytes()


def set_generator_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    name, keys, *more = states[1]
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *more))
    torch.set_rng_state(torch.frombuffer(bytearray(states[2]), dtype=torch.uint8))


@dataclasses.dataclass
class Step:
    """Loading or building of a task: the generators before and after."""

    before: tuple[Any, ...]
    after: tuple[Any, ...] = ()

    def pass_over(self) -> bool:
        """Leave the generators as the step would. False where it would draw something else now."""
        if self.before == self.after:
            return True
        if generator_states() != self.before:
            return False
        set_generator_states(self.after)
        return True


@dataclasses.dataclass
class KeptTask:
    """A task with its instances.

    signature: of its settings, see `sign`. metadata: those of its settings' `metadata` that the code which loads its documents
    may read. content: what its task file was read as. arguments: of its instances, by their place, if more than texts.
    """

    task: Any
    signature: str
    metadata: dict[str, Any]
    loading: Step
    content: list[Any]
    building: Step | None = None
    arguments: dict[int, Any] = dataclasses.field(default_factory=dict)

    def keep_arguments(self) -> None:
        """To be called once the instances are built: who gets the samples may change what they refer to."""
        instances = enumerate(self.task.instances)
        plain = ((place, one) for place, one in instances if not all(isinstance(part, str) for part in one.args))
        self.arguments = {place: copy.deepcopy(one.arguments) for place, one in plain}

    def renew(self) -> None:
        """As after building: without answers."""
        for place, one in enumerate(self.task.instances):
            one.resps, one.filtered_resps = [], {}
            if place in self.arguments:
                one.arguments = copy.deepcopy(self.arguments[place])


def sign(config: Mapping[str, Any]) -> str:
    """Equal for equal settings of a task, functions by their names; without the metadata, which names the model."""
    return repr(_describe({key: value for key, value in config.items() if key != "metadata"}))


def _describe(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _describe(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(one) for one in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', '')}:{type(value).__qualname__}"


def metadata_read(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a task's `metadata`, in which lm_eval puts the model's arguments, what the code that loads its documents may read."""
    metadata = config.get("metadata")
    load, found = config.get("custom_dataset"), dict(metadata) if isinstance(metadata, Mapping) else {}
    code = getattr(load, "__code__", None)
    if load is None:
        return {}
    if code is None:
        return found
    named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    rest = _name_of_rest(code)
    if rest is not None and _reads(code, rest):
        return found
    return {key: value for key, value in found.items() if key in named}


def _name_of_rest(code: Any) -> str | None:
    """Of the parameter that takes all other keyword arguments, such as `kwargs`."""
    takes_places, takes_names = bool(code.co_flags & 0x04), bool(code.co_flags & 0x08)
    place = code.co_argcount + code.co_kwonlyargcount + takes_places
    return str(code.co_varnames[place]) if takes_names else None


def _reads(code: Any, name: str) -> bool:
    """Whether a function may look at one of its variables; `locals()` and the like, which look at all of them, count."""
    import dis

    looks_at_all = {"locals", "vars", "eval", "exec", "sys", "inspect"} & set(code.co_names)
    return bool(looks_at_all) or any(one.argval == name for one in dis.get_instructions(code)) or name in code.co_cellvars


def is_kept(task: Any) -> bool:
    """Whether a task that has been scored once can be scored again and come out as a new one would."""
    if type(task) is not ConfigurableTask or task.prompt is not None:
        return False
    if type(getattr(task, "sampler", None)) not in (type(None), ContextSampler, FirstNSampler):
        return False
    names = ("doc_to_text", "doc_to_target", "doc_to_choice", "doc_to_decontamination_query", "gen_prefix", "description")
    sources = [getattr(config, name, None) for config in (task.config, task.fewshot_cfg) for name in (*names, "process_docs")]
    code = [source for source in (*sources, task.config.process_results) if callable(source)]
    metrics = [one for one in (*task._metric_fn_list.values(), *task._aggregation_list.values()) if one is not None]
    code += [metric for metric in metrics if not _is_of(metric, "lm_eval.api.")]
    if not all(map(keeps_no_state, code)):
        return False
    if not all(_is_plain_filter(make) for ensemble in getattr(task, "_filters", ()) for make in ensemble.filters):
        return False
    if not _loads_from_file(task.config.custom_dataset):
        return False
    makes_documents = task.config.process_docs is not None  # anew each time that they are asked for
    return (makes_documents or _is_plain_dataset(task.eval_docs)) and all(type(one) is Instance for one in task.instances)


def _loads_from_file(load: Any) -> bool:
    """Whether a `custom_dataset` is none, or of a task's file, or keeps no state. A caller's own may return others by now."""
    names = getattr(load, "__globals__", {})
    of_file = "__ddp_eval_source__" in names or str(names.get("__name__", "")).startswith(("lm_eval.", "ddp_eval."))
    return not callable(load) or of_file or keeps_no_state(load)


def _is_of(function: Any, package: str) -> bool:
    return str(getattr(function, "__module__", "")).startswith(package)


def _is_plain_filter(make: Any) -> bool:
    """make: as lm_eval's `build_filter_ensemble` leaves it, a partial of the filter's class, or the class."""
    made, given = getattr(make, "func", make), {**getattr(make, "keywords", {})}
    return _is_of(made, "lm_eval.filters") and not any(callable(value) for value in given.values())


def _is_plain_dataset(documents: Any) -> bool:
    """Whether every look at its rows gives the same ones, each time as new objects."""
    return type(documents) is datasets.Dataset and documents.format["type"] is None


class TaskCode:
    """The modules that tasks' own code is in. `forget` lets them be executed again, as in a new process.

    Not those that were there before, unless a task file names them: they are the caller's, who may be `__main__`.
    """

    def __init__(self) -> None:
        self._registered = [dict(one._objs) for one in _REGISTRIES]
        self._before = set(sys.modules)

    def forget(self, tasks: Collection[Any]) -> None:
        """tasks: all that have been loaded."""
        names = {module for task in tasks for module in (*modules_at_load(task), *modules_at_scoring(task))} - self._before
        names |= {name for name, module in list(sys.modules.items()) if getattr(module, "__ddp_eval_source__", None)}
        names |= {name for name in sys.modules.keys() - self._before if _is_task_of_lm_eval(name)}
        folders = {_folder_of(name) for name in names} - {""}
        names |= {name for name in sys.modules.keys() - self._before if _folder_of(name) in folders}  # helpers beside them
        for name in names:
            if _is_task_of_lm_eval(name) or not name.startswith(("lm_eval", "ddp_eval.tasks")):
                sys.modules.pop(name, None)
        for one, known in zip(_REGISTRIES, self._registered, strict=True):
            one._objs.clear()
            one._objs.update(known)


def modules_at_load(task: Any) -> set[str]:
    """Where the code lies that loads a task's documents."""
    load = getattr(getattr(task, "config", None), "custom_dataset", None)
    return {load.__module__} if callable(load) else set()


def modules_at_scoring(task: Any) -> set[str]:
    """Where other code of a task's own lies."""
    found = {type(task).__module__}
    for config in (getattr(task, "config", None), getattr(task, "fewshot_cfg", None)):
        values = vars(config) if hasattr(config, "__dict__") else {}
        found |= {str(one.__module__) for name, one in values.items() if callable(one) and name != "custom_dataset"}
    functions = [*getattr(task, "_metric_fn_list", {}).values(), *getattr(task, "_aggregation_list", {}).values()]
    return found | {str(getattr(one, "__module__", "")) for one in functions}


def _is_task_of_lm_eval(name: str) -> bool:
    return name.startswith("lm_eval.tasks.") and name.count(".") > 2


def _folder_of(name: str) -> str:
    path = getattr(sys.modules.get(name), "__file__", None) or ""
    return path.rpartition("/")[0] if name.startswith("lm_eval.tasks.") or "site-packages" not in path else ""


def count_draws(do: Callable[[], Any]) -> tuple[Any, Step]:
    """What `do` returns, and the generators before and after."""
    step = Step(generator_states())
    found = do()
    step.after = generator_states()
    return found, step
