"""`python -m ddp_eval reproduce RUN_DIR`: from a run's manifest alone, the same evaluation again, on the ranks at hand.

Before anything is scored the leader compares what it finds with the manifest: the model's and the tokenizer's files, packages,
task versions, and the prompts and documents of each task. What differs is refused by name unless --allow names it.

A manifest may come from anybody, and so may the code that it names: none runs unless the command line allows it.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_eval.analysis.verdict import NOT_AS_EXPECTED, format_comparison, print_verdict, read_expectation, why_not
from ddp_eval.cli.compare import add_expect
from ddp_eval.cli.subcommand import Evaluation, SubcommandParser
from ddp_eval.config import PROMPT_ARGS, Config
from ddp_eval.errors import UserError
from ddp_eval.output import directory as run_directory
from ddp_eval.system.read_back import read_json, show

KINDS = ("model", "versions", "prompts", "documents", "packages")
_TEXT_ARGS = ("pretrained", "tokenizer", "revision", "subfolder", "peft")
# model_args that cannot have the model's loader run code. What else a manifest names goes to transformers or vLLM, some of whose
# options do: weights_only=False executes a pickle, use_kernels=True and worker_cls=… fetch or import code.
_PLAIN_ARGS = {
    *_TEXT_ARGS, *PROMPT_ARGS, "attn_implementation", "backend", "dtype", "load_in_4bit", "load_in_8bit", "max_gen_toks",
    "quantization_config", "trust_remote_code", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len",
    "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "enable_prefix_caching", "kv_cache_dtype", "quantization",
}  # fmt: skip
_PLAIN_PREFIXES = ("bnb_4bit_", "llm_int8_")
_TOKENIZERS_OF_TASKS = ("tokenizer", "pretrained", "model")  # names in metadata by which lm_eval's tasks load one
_MAX_LISTED = 10_000  # entries of a directory of task files that are looked at for code
_ABOUT = """\
Runs the evaluation of RUN_DIR again, from its manifest.json, on the ranks that torchrun starts or on one, and
compares. Refuses, with the list, when the model's files, task versions, prompts, documents or packages are not the same."""


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """earlier: the run's directory; config: what to run; manifest: what must be found; allow: of KINDS."""

    earlier: Path
    config: Config
    manifest: dict[str, Any]
    allow: frozenset[str]
    expectation: float | None

    def inspect(self, found: Mapping[str, Any]) -> None:
        """Compare what the leader found before scoring with the manifest. Raises UserError that lists all that differs."""
        changes = list_changes(self.manifest, found)
        refused = [text for kind, text in changes if kind not in self.allow]
        if refused:
            kinds = " ".join(dict.fromkeys(kind for kind, _ in changes if kind not in self.allow))
            raise UserError(f"this is not the run of {self.earlier}: {'; '.join(refused)} (--allow {kinds} runs it all the same)")

    def conclude(self) -> int:
        """Print the comparison of both runs; returns the exit code."""
        from ddp_eval.analysis.difference import compare_runs
        from ddp_eval.analysis.read import read_run

        comparison = compare_runs(read_run(self.earlier), read_run(str(self.config.output_path)))
        failure = why_not(comparison, self.expectation)
        print(format_comparison(comparison))
        print_verdict(self.expectation, [failure] if failure else [], [comparison])
        return NOT_AS_EXPECTED if failure else 0


def parse(argv: Sequence[str]) -> Evaluation:
    """Flags of `reproduce` -> what to evaluate. Changes to the directory that the earlier run started in. Raises UserError."""
    options = _build_parser().parse_args(argv)
    expectation = read_expectation(options.expect)
    earlier = Path(options.run).resolve()
    output = Path(options.output_path).resolve() if options.output_path else earlier.with_name(f"{earlier.name}.again")
    manifest = _read_manifest(earlier)
    if output == earlier:
        raise UserError(f"--output_path must not be the run to reproduce, got {options.output_path}")
    if os.path.isfile(output / "manifest.json") and not (
        options.overwrite or run_directory.already_replaced_by_this_launch(output)
    ):
        raise UserError(f"{output} already holds a complete run: --overwrite runs it again, `compare` compares the two")
    _refuse_programs(manifest, options.run)
    values = dict(manifest["config"])
    values |= {"output_path": str(output), "overwrite": options.overwrite}
    values |= {"seed": tuple(values["seed"])} if "seed" in values else {}
    values |= {"fresh": False, "preflight": False, "cache_requests": None}  # what the run was to do with what it found then
    values |= {name: value for name in ("device", "layout") if (value := getattr(options, name))}
    _refuse_untrusted(manifest, options)
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(Config)})
    if unknown:
        raise UserError(f"the run in {options.run} has the setting {unknown[0]}, which this version of ddp_eval does not know")
    config = Config(**values)
    os.chdir(_starting_directory(manifest))
    reproduction = Reproduction(earlier, config, manifest, frozenset(options.allow or ()), expectation)
    return Evaluation(config, inspect=reproduction.inspect, conclude=reproduction.conclude)


def _refuse_programs(manifest: Mapping[str, Any], run: str) -> None:
    """Raise UserError where no command line asked for the run: of a loaded model, or of tasks that are no names."""
    if "pretrained" not in (manifest.get("model") or {}):
        raise UserError(f"the run in {run} was given a loaded model by a program: only that program can run it again")
    model_args, tasks = manifest["config"].get("model_args") or {}, manifest["config"].get("tasks")
    for name in _TEXT_ARGS:
        value = model_args.get(name)
        if not isinstance(value, str) and (name == "pretrained" or value is not None):
            raise UserError(f"{run}/manifest.json: config.model_args.{name} must be text, got {show(value)}")
    if not tasks or not all(isinstance(task, str) for task in tasks):
        raise UserError(f"the run in {run} was given its tasks by a program: only that program can run it again")


def _refuse_untrusted(manifest: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Raise UserError where the run would execute code that this very command line does not allow."""
    config = manifest["config"]
    model_args = config.get("model_args") or {}
    remote = config.get("trust_remote_code") or model_args.get("trust_remote_code")
    kernels = "/" in str(model_args.get("attn_implementation") or "")  # of the hub
    if (remote or kernels) and not options.trust_remote_code:
        raise UserError(f"the run in {options.run} runs Python code of its model or data set: --trust_remote_code allows it")
    others = [name for name in model_args if name not in _PLAIN_ARGS and not name.startswith(_PLAIN_PREFIXES)]
    others += [name for name in config.get("gen_kwargs") or {} if name in ("custom_generate", "trust_remote_code")]
    if others and not options.trust_remote_code:
        raise UserError(
            f"the run in {options.run} gives the library that loads its model the settings {', '.join(others[:5])}, which can "
            "make it run code: --trust_remote_code allows it"
        )
    _refuse_tokenizers(config, options)
    if config.get("confirm_run_unsafe_code") and not options.confirm_run_unsafe_code:
        raise UserError(f"the run in {options.run} runs code that a model writes: --confirm_run_unsafe_code allows it")
    start = _starting_directory(manifest)
    own = [start / str(word) for word in _task_files(config, start)]
    if own and not options.trust_task_files:
        folders = [place if os.path.isdir(place) else place.parent for place in own]
        code = sorted(name for folder in folders for name in _list_code(folder))
        which = f" ({', '.join(code[:5])}{', ...' if len(code) > 5 else ''})" if code else ""
        places = ", ".join(map(str, own))
        raise UserError(
            f"the run in {options.run} runs the Python code{which} of task files in {places}: --trust_task_files allows it"
        )


def _refuse_tokenizers(config: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Raise UserError where tasks such as RULER's would load a tokenizer that is not the model's and that nobody has allowed."""
    model_args, metadata = config.get("model_args") or {}, config.get("metadata") or {}
    own = [model_args.get("tokenizer"), model_args.get("pretrained")]
    others = {name: metadata[name] for name in _TOKENIZERS_OF_TASKS if metadata.get(name) and metadata[name] not in own}
    if others and not options.trust_remote_code:
        named = ", ".join(f"{name} {show(value)}" for name, value in others.items())
        raise UserError(
            f"the run in {options.run} has its tasks load another tokenizer than the model's (metadata {named}), which may come "
            "with code: --trust_remote_code allows it"
        )


def _list_code(folder: Path) -> list[str]:
    """Python files beneath a folder, as far as a look takes no time: a manifest may name any, such as /."""
    files = (name for _, _, names in os.walk(folder) for name in (*names, ""))  # "": an empty directory counts, too
    return [name for name in itertools.islice(files, _MAX_LISTED) if name.endswith(".py")]


def _task_files(config: Mapping[str, Any], start: Path) -> list[Any]:
    """Where task files lie that are not lm_eval's or ours: --include_path, and files and directories among --tasks."""
    words = [word for word in config.get("tasks") or [] if _may_be_task_files(word, start)]
    return [*([config["include_path"]] if config.get("include_path") else []), *words]


def _may_be_task_files(word: str, start: Path) -> bool:
    """Whether tasks/select.py may read files for this word of --tasks, if it is no task's name. start: the working directory."""
    if "/" in word or word.endswith((".yaml", ".yml")):
        return True
    return os.path.isdir(start / word) and bool(glob.glob(os.path.join(word, "*.yaml"), root_dir=start))


def _starting_directory(manifest: Mapping[str, Any]) -> Path:
    """Where relative paths of the model, of task files and of their data start: where the run began, else here."""
    began = manifest.get("working_directory") or ""
    return Path(began if os.path.isdir(began) else os.getcwd())


def list_changes(manifest: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(kind, what changed in words) for everything in `found` that the manifest has otherwise.

    found: {"model": as `describe_model` makes it, "packages", "versions", "prompts_by_task", "documents_by_task"}.
    """
    prompts, documents = found["prompts_by_task"], manifest.get("documents_by_task", {})  # an older manifest has none of these
    asked_alike = [task for task in documents if prompts.get(task) == manifest["prompts_by_task"].get(task)]
    return [
        *(("model", text) for text in _model_changes(manifest["model"], found["model"] or {})),
        *_changes("versions", "task {} has version {}, not {}", manifest["tasks"]["versions"], found["versions"], _show),
        *_changes("prompts", "the prompts of task {} are other ones", manifest["prompts_by_task"], prompts, _show),
        *_changes(
            "documents",
            "task {} has the same prompts, but other documents or right answers",
            {task: documents[task] for task in asked_alike},
            {task: found["documents_by_task"].get(task) for task in asked_alike},
            _show,
        ),
        *_changes("packages", "{} is {}, not {}", manifest["packages"], found["packages"], _show),
    ]


def _changes(
    kind: str, sentence: str, before: Mapping[str, Any], now: Mapping[str, Any], show: Callable[[Any], str]
) -> list[tuple[str, str]]:
    """Keys of either side whose values differ. Task versions of groups, which only the results know, are left to their tasks."""
    keys = [key for key in dict.fromkeys((*before, *now)) if kind != "versions" or key in now]
    return [
        (kind, sentence.format(key, show(now.get(key)), show(before.get(key)))) for key in keys if before.get(key) != now.get(key)
    ]


def _model_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changes = []
    parts = {"model_files": "model", "tokenizer_files": "tokenizer", "adapter_files": "adapter", "code_files": "model's code"}
    for part, name in parts.items():
        if part not in before and part not in now:
            continue
        old, new = (before.get(part) or {}).get("files", {}), (now.get(part) or {}).get("files", {})
        if not old or not new:
            changes.append(f"the files of the {name} could not be read {'now' if old else 'then'}")
            continue
        names = [file for file in dict.fromkeys((*old, *new)) if old.get(file) != new.get(file)]
        if names:
            changes.append(f"the {name} has other files: {', '.join(names)}")
    return changes


def _show(value: Any) -> str:
    return "missing" if value is None else str(value)


def _read_manifest(directory: Path) -> dict[str, Any]:
    from ddp_eval.output import shapes

    if not os.path.lexists(directory):
        raise UserError(f"there is no run at {directory}")
    if not os.path.lexists(directory / "manifest.json"):
        raise UserError(f"{directory} holds no complete run: it has no manifest.json")
    manifest = read_json(directory / "manifest.json", shapes.MANIFEST, directory)
    for key in ("config", "tasks", "packages", "prompts_by_task"):
        if key not in manifest:
            raise UserError(f"the manifest in {directory} has no {key}: it is of another version of ddp_eval")
    return dict(manifest)


def _build_parser() -> argparse.ArgumentParser:
    parser = SubcommandParser("reproduce", _ABOUT, launcher="torchrun")
    parser.add_argument("run", metavar="RUN_DIR", help="the directory of a complete run")
    parser.add_argument("--output_path", "-o", metavar="DIR", help="where the new run goes (default: RUN_DIR.again)")
    parser.add_argument("--overwrite", action="store_true", help="replace the complete run that is already there")
    parser.add_argument("--allow", nargs="+", choices=KINDS, help="run although these differ from the manifest")
    parser.add_argument("--device", help="cuda or cpu (default: as in the run)")
    parser.add_argument("--layout", help="how the model is split over the ranks (default: as in the run)")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code of the model or data set, as the run did"
    )
    parser.add_argument("--confirm_run_unsafe_code", action="store_true", help="run the code that a model writes, as the run did")
    parser.add_argument("--trust_task_files", action="store_true", help="run the Python code of task files, as the run did")
    add_expect(parser)
    return parser
