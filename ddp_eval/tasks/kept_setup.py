"""What one evaluation leaves to the next of another model: tasks with their requests, token ids, plans.

    key       every option that prompts depend on, the tokenizer's digest, the window: of another key nothing is used
    files     that the tasks were made of: if one has changed, or another has come beside it, nothing is used
    tasks     those that keep no state (kept_tasks.py) as they are; others are built anew
    ids       where all texts are the same: those of kept tasks, and of others as far as they come out the same
    plans     in a memo, by all that decides them (plan_memo.py)

Results, samples and digests are those of an evaluation that begins with nothing. Leader only. It takes the memory of all prompts
for as long as it lives: only for who evaluates again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.tasks import _factory

from ddp_eval.config import TRACKER_FLAGS, Config
from ddp_eval.system.digests import digest_directory
from ddp_eval.tasks.fingerprints import describe_prompts
from ddp_eval.tasks.kept_tasks import (
    KeptTask,
    TaskCode,
    count_draws,
    is_kept,
    metadata_read,
    modules_at_load,
    modules_at_scoring,
    sign,
)
from ddp_eval.tasks.plan_memo import PlanMemo
from ddp_eval.tasks.request_types import Asked, RunOptions
from ddp_eval.tasks.task_sources import TaskSources, look_at, names_in
from ddp_eval.tasks.template_dates import printed_dates
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.tasks.tokenizer_digest import digest_tokenizer

log = logging.getLogger("ddp_eval")

# Of the settings: which model it is, where results go, and what is said meanwhile.
_OF_THE_MODEL = ("pretrained", "revision", "peft", "subfolder")
_NO_MATTER = ("output_path", "overwrite", "fresh", "timeout", "show_config", "preflight", "load", *TRACKER_FLAGS)


class KeptSetup:
    """`begin` an evaluation, let lm_eval `load` and `build`, `encode`, and `end` it. After a failure, `forget`."""

    def __init__(self) -> None:
        self.plans = PlanMemo()
        self._code: TaskCode | None = None
        self.is_new = True  # whether the last evaluation found nothing to use
        self._clear()

    def _clear(self) -> None:
        self.plans.forget()
        self._key: str | None = None
        self._dates: dict[str, str] = {}
        self._files: dict[str, tuple[str, str]] = {}  # {path: (SHA-256, how it looked)}
        self._folders: dict[str, frozenset[str]] = {}  # of these files, with what is in them: patterns may match more
        self._tasks: dict[str, KeptTask] = {}  # by the names and changes under which they were loaded
        self._loaded: dict[str, KeptTask] = {}  # by this evaluation
        self._all: list[Any] = []  # tasks that this evaluation and the last have loaded
        self._asked: Asked | None = None
        self._texts: dict[str, tuple[Any, ...]] = {}  # of each task's instances, see `_describe`

    def begin(self, config: Config, encoder: Encoder, sources: TaskSources) -> None:
        """Before anything is loaded."""
        dates = printed_dates(config, encoder.tokenizer)
        key = _key_of(config, encoder, dates)
        if self._asked is not None and dates and self._dates.keys() == dates.keys() and self._dates != dates:
            log.warning("the chat template prints the date, which is another now: prompts are built anew, as in a run by itself")
        if key is None or key != self._key or not self._has_same_files():
            self.forget()
        self._dates = dates or {}
        self.is_new = self._asked is None
        self._key = key
        if self._code is None:
            self._code = TaskCode()
        elif len(self._tasks) < len(self._all):
            self._code.forget(self._all)
        for path, (digest, look) in self._files.items():
            sources.files[path], sources.looks[path] = digest, look
        sources.folders.update(self._folders)
        self._loaded, self._all = {}, []

    def load(self, build: Callable[..., Any], factory: Any, entry: Any, overrides: Any) -> Any:
        """Stands before lm_eval's method that makes a task. build: that method."""
        if self._key is None:
            return build(factory, entry, overrides)
        place = f"{entry.name} {entry.yaml_path} {sign(overrides or {})}"
        kept = self._tasks.get(place)
        with _reading(kept.content if kept is not None else []) as content:
            config = factory._load_full_config(entry, overrides)
        signature, metadata = sign(config), metadata_read(config)
        if kept is None or (kept.signature, kept.metadata) != (signature, metadata) or not kept.loading.pass_over():
            task, step = count_draws(lambda: build(factory, entry, overrides))
            kept = KeptTask(task, signature, metadata, step, content)
        else:
            kept.task.config.metadata = config["metadata"]
        self._loaded[place] = kept
        self._all.append(kept.task)
        return kept.task

    def build(self, build: Callable[..., None], task: Any, options: Mapping[str, Any]) -> None:
        """Stands before lm_eval's method that builds a task's requests. build: that method."""
        kept = next((one for one in self._loaded.values() if one.task is task), None)
        if kept is None:
            build(task, **options)
        elif kept.building is not None and kept.building.pass_over():
            kept.renew()
        else:
            _, kept.building = count_draws(lambda: build(task, **options))
            kept.keep_arguments()

    def encode(
        self,
        instances: Sequence[Instance],
        tasks: Mapping[str, Any],
        options: RunOptions,
        encode: Callable[[], Asked],
    ) -> Asked:
        """What `encode` gives for these instances, or gave for the same before."""
        if self._key is None:
            return encode()
        known, self._asked = self._asked, None
        if known is not None and (swap := self._match(known, instances, tasks)) is not None:
            for part in known.parts:
                part.renew(options, swap)
            self._asked = Asked(known.requests, known.prompts, known.fingerprints, known.parts, instances)
            return self._asked
        self.plans.forget()
        asked = self._asked = encode()
        self._texts = {name: _describe(own, tasks, asked.fingerprints) for name, own in _by_task(instances).items()}
        return asked

    def _match(self, known: Asked, instances: Sequence[Instance], tasks: Mapping[str, Any]) -> dict[int, Instance] | None:
        """{id of an instance of the last evaluation: the same one of now}, where it is another object; None if any differs."""
        if len(known.instances) != len(instances):
            return None
        swap = {id(old): new for old, new in zip(known.instances, instances, strict=True) if old is not new}
        anew = _by_task(list(swap.values()))
        if len(swap) != sum(len(own) for own in anew.values()) or any(name not in self._texts for name in anew):
            return None
        before, now = ([str(one.task_name) for one in some] for some in (known.instances, instances))
        if before != now:
            return None
        same = all(_describe(own, tasks, None) == self._texts[name] for name, own in anew.items())
        return swap if same else None

    def end(self, sources: TaskSources) -> None:
        """All is scored: decide what is kept."""
        if self._key is None:
            return
        # As all was when it was read: what was written to since is another by now.
        self._files = {path: (digest, sources.looks.get(path, "")) for path, digest in sources.files.items()}
        self._folders = dict(sources.folders)
        kept = {place: one for place, one in self._loaded.items() if one.building is not None and is_kept(one.task)}
        own_code = {module for task in self._all if not any(task is one.task for one in kept.values())
                    for module in modules_at_scoring(task)}  # fmt: skip
        self._tasks = {place: one for place, one in kept.items() if not modules_at_load(one.task) & own_code}
        for one in self._tasks.values():
            one.renew()  # answers take memory
        self._loaded = {}

    def forget(self) -> None:
        """Begin again with nothing."""
        if self._code is not None:
            self._code.forget(self._all)
        self._clear()

    def _has_same_files(self) -> bool:
        if any(names_in(folder) != names for folder, names in self._folders.items()):
            return False
        for path, (digest, look) in self._files.items():
            now = look_at(path)
            if now == look:
                continue
            folder, name = os.path.split(path)
            if digest_directory(folder, [name], read_all=True)["files"].get(name) != digest:
                return False
            self._files[path] = digest, now
        return True


@contextlib.contextmanager
def _reading(content: list[Any]) -> Iterator[list[Any]]:
    """What lm_eval reads of task files in the block comes out of `content`, one after the other; if that is empty, it is noted
    there: for a task whose files have not changed.
    """
    load_yaml, again = _factory.load_yaml, iter(list(content))

    def read(path: Any, **options: Any) -> Any:
        found = next(again, None)
        if found is None:
            found = load_yaml(path, **options)
            content.append(found)
        return found

    with unittest.mock.patch.object(_factory, "load_yaml", read):
        yield content


def _key_of(config: Config, encoder: Encoder, dates: dict[str, str] | None) -> str | None:
    """All that prompts and their ids depend on beside tasks' files; None where that cannot be told, or where they are random."""
    tokenizer = digest_tokenizer(encoder.tokenizer)
    if tokenizer is None or dates is None or None in config.seed:
        return None
    settings = {one.name: getattr(config, one.name) for one in dataclasses.fields(config) if one.name not in _NO_MATTER}
    settings["model_args"] = {name: value for name, value in config.model_args.items() if name not in _OF_THE_MODEL}
    settings["tasks"] = [task if isinstance(task, (str, dict)) else id(task) for task in config.tasks]
    of_encoder = encoder.max_length, encoder.add_bos_token, encoder.prefix_token_id, encoder.separate
    return json.dumps(
        [settings, of_encoder, tokenizer, dates, os.getcwd()], sort_keys=True, default=lambda one: f"{type(one)} {id(one)}"
    )


def _by_task(instances: Sequence[Instance]) -> dict[str, list[Instance]]:
    found: dict[str, list[Instance]] = {}
    for one in instances:
        found.setdefault(str(one.task_name), []).append(one)
    return found


def _describe(instances: Sequence[Instance], tasks: Mapping[str, Any], known: Mapping[str, Any] | None) -> tuple[Any, ...]:
    """Of one task: digests of its texts and documents, as in `known` where they are there, and of the order of its instances."""
    name = str(instances[0].task_name)
    found = known or describe_prompts(instances, dict(tasks))
    order = hashlib.sha256(repr([(one.request_type, one.doc_id, one.idx, one.repeats) for one in instances]).encode())
    return found["prompts_by_task"][name], found["documents_by_task"][name], found["versions"].get(name), order.hexdigest()
