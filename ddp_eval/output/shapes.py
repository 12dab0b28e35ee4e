"""What must stand where in the JSON files that are read back: the shapes that read_back.py checks.

Each names the fields that this package reads, and no others: files of other versions may have more. Numbers may be NaN where a
metric may. pydantic checks (strictly: no text is taken for a number); the value itself stays as it was read.
"""

from __future__ import annotations

import functools
import os
import typing
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError
from typing_extensions import NotRequired, Required, TypedDict

from ddp_eval.config import Config
from ddp_eval.errors import one_line
from ddp_eval.output.documents import TRANSFORMS, arguments_of
from ddp_eval.output.irregular import DOCUMENTS, REQUESTS
from ddp_eval.system.read_back import MAX_NESTING, show

_fields = pydantic.with_config(ConfigDict(strict=True, extra="allow"))
_MAX_GROUPS_SHOWN = 100_000

Count = Annotated[int, Field(ge=0)]
DocumentNumber = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Pair = Annotated[list[Any], Field(min_length=2, max_length=2)]


def _wrong(text: str) -> PydanticCustomError:
    return PydanticCustomError("shape", "{text}", {"text": text})


def _one_of(kinds: tuple[type, ...], sentence: str) -> AfterValidator:
    """For values of several types, of which pydantic would report an error each."""

    def check(value: Any) -> Any:
        if not isinstance(value, kinds):
            raise PydanticCustomError("kind", "{text}", {"text": sentence})
        return value

    return AfterValidator(check)


_SEED = Annotated[list[int | None], Field(min_length=4, max_length=4)]
_TEMPLATE = Annotated[Any, _one_of((bool, str), "must be true, false or text")]
_AS_JSON: dict[str, Any] = {"seed": _SEED, "apply_chat_template": _TEMPLATE}  # of a Config, as JSON has it

_ConfigFields = _fields(
    TypedDict(  # type: ignore[operator]
        "ConfigFields", {**typing.get_type_hints(Config), **_AS_JSON}, total=False
    )
)


@_fields
class _Files(TypedDict, total=False):
    files: dict[str, str]


@_fields
class _Model(TypedDict, total=False):
    pretrained: str
    seen: str | None
    model_files: _Files | None
    tokenizer_files: _Files | None
    adapter_files: _Files | None
    code_files: _Files | None


@_fields
class _Tasks(TypedDict):
    versions: dict[str, Any]


@_fields
class _Engine(TypedDict, total=False):
    dtype: str


@_fields
class _Ranks(TypedDict, total=False):
    world_size: Annotated[int, Field(ge=1)]
    device: str


@_fields
class _Gpu(TypedDict):
    name: str


@_fields
class _Hardware(TypedDict, total=False):
    cpu: str | None
    gpus: list[_Gpu] | None


@_fields
class _Manifest(TypedDict, total=False):
    config: _ConfigFields  # type: ignore[valid-type]
    working_directory: str
    model: _Model | None
    tasks: _Tasks
    engine: _Engine
    requests: Count
    ranks: _Ranks
    hardware: _Hardware
    packages: dict[str, str | None]
    prompts_by_task: dict[str, str]
    documents_by_task: dict[str, str]
    task_files: dict[str, str]


@_fields
class _NotFinite(TypedDict):
    requests: Count
    first: list[Pair]


def _check_irregular(kinds: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Counts of requests or of documents, by kind (irregular.py); kinds that only another version knows are not read."""
    for noun, known in (("requests", REQUESTS), ("documents", DOCUMENTS)):
        for kind, tasks in kinds.items():
            for task, found in tasks.items() if kind in known else ():
                if type(found.get(noun)) is not int or found[noun] < 0:
                    raise _wrong(f"{kind}.{task}.{noun} must be a whole number, 0 or more, got {show(found.get(noun))}")
                if not isinstance(found.get("first"), list):
                    raise _wrong(f"{kind}.{task}.first must be a list, got {show(found.get('first'))}")
                for place in found["first"]:
                    if isinstance(place, list) and len(place) != 2:
                        raise _wrong(f"{kind}.{task}.first must hold a document and a choice, got {show(place)}")
    return kinds


@_fields
class _Section(TypedDict, total=False):
    not_finite: dict[str, _NotFinite]
    irregular: Annotated[dict[str, dict[str, dict[str, Any]]], AfterValidator(_check_irregular)]


def _check_scores(scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What tables and plots cannot show: a name or a standard error of another type, or one below 0."""
    for task, values in scores.items():
        for key, value in values.items():
            if key == "alias" and not isinstance(value, str):
                raise _wrong(f"{task}.alias must be text, got {show(value)}")
            if "_stderr," in key and not (value == "N/A" or (isinstance(value, (int, float)) and not value < 0)):
                raise _wrong(f"{task}.{key} must be a number of 0 or more, or N/A, got {show(value)}")
    return scores


def _check_groups(members: dict[str, list[str]]) -> dict[str, list[str]]:
    """lm_eval's table walks down from each group: one within itself would never end."""
    names = list(members)
    for _ in range(MAX_NESTING):
        names = [member for name in names for member in members.get(name, [])]
        if not names:
            return members
        if len(names) > _MAX_GROUPS_SHOWN:
            break
    raise _wrong("must not hold a group within itself, nor so many within each other")


@_fields
class _LmEvalConfig(TypedDict, total=False):
    model_dtype: str | None


@_fields
class _LmEvalResults(TypedDict, total=False):
    results: dict[str, dict[str, Any]]
    config: _LmEvalConfig


_Scores = Annotated[dict[str, dict[str, Any]], AfterValidator(_check_scores)]
_OneWay = Annotated[Any, _one_of((bool, type(None)), "must be true, false or null")]


@_fields
class _Results(TypedDict, total=False):
    results: _Scores
    groups: _Scores
    group_subtasks: Annotated[dict[str, list[str]], AfterValidator(_check_groups)]
    versions: dict[str, Any]
    higher_is_better: dict[str, dict[str, _OneWay]]
    config: dict[str, Any]
    ddp_eval: _Section
    # n-shot and n-samples are no names in Python: see _MORE_OF_RESULTS


_MORE_OF_RESULTS = _fields(
    TypedDict(  # type: ignore[operator]
        "MoreOfResults", {"n-shot": dict[str, Any], "n-samples": dict[str, dict[str, int | None]]}, total=False
    )
)


@_fields
class _Collective(TypedDict):
    calls: Amount
    seconds: Seconds
    sent_bytes: Amount
    received_bytes: Amount


@_fields
class _Rank(TypedDict):
    rank: Count
    began_unix_s: Finite
    wall_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    phases_s: dict[str, Seconds]
    timeline: list[Annotated[tuple[Seconds, str], Strict(False)]]
    collectives: dict[str, _Collective]
    samples: list[list[Finite | None]]
    tokens_per_s: Amount | None
    share_of_peak: Amount | None


@_fields
class _Telemetry(TypedDict):
    wall_s: Seconds
    tokens_per_s: Amount | None
    useful_tokens_per_s: Amount | None
    sharing: Amount | None
    padding: Amount | None
    imbalance: Finite | None
    idle_share: Amount
    sample_columns: list[str]
    weights_bytes: NotRequired[Amount | None]
    ranks: Annotated[list[_Rank], Field(min_length=1)]


def _check_samples(measured: dict[str, Any]) -> dict[str, Any]:
    """The rows of each rank's samples have the columns that there are to be."""
    from ddp_eval.telemetry.sampler import COLUMNS

    if measured["sample_columns"] != list(COLUMNS):
        raise _wrong(f"sample_columns must be {', '.join(COLUMNS)}, got {show(measured['sample_columns'])}")
    for number, rank in enumerate(measured["ranks"]):
        for row, sample in enumerate(rank["samples"]):
            if len(sample) != len(COLUMNS) or sample[0] is None:
                raise _wrong(f"ranks[{number}].samples[{row}] must have {len(COLUMNS)} numbers, got {show(sample)}")
    return measured


@_fields
class _Sample(TypedDict, total=False):
    doc_id: Required[DocumentNumber]
    filter: str
    metrics: Required[list[str]]
    arguments: Required[Any]
    resps: Required[list[Annotated[list[Any], Field(min_length=1)]]]
    prompt_hash: str | None
    doc_hash: str | None


def _check_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """One answer for each request, and a value for each metric, of the kinds that are read."""
    _check_arguments(sample["arguments"])
    arguments = arguments_of(sample)
    if len(arguments) != len(sample["resps"]):
        raise _wrong(f"resps must have an entry for each of {len(arguments)} arguments, got {len(sample['resps'])}")
    for number, (answers, argument) in enumerate(zip(sample["resps"], arguments, strict=True)):
        if isinstance(answers[0], list):
            if len(answers[0]) != 2 or not _is_number(answers[0][0]):
                raise _wrong(f"resps[{number}][0] must be a log-probability and a flag, got {show(answers[0])}")
        elif len(argument) == 1 and not _is_number(answers[0]):
            raise _wrong(f"resps[{number}][0] must be a log-probability, got {show(answers[0])}")
    for metric in sample["metrics"]:
        if metric not in sample:
            raise _wrong(f"metrics names {show(metric)}, of which there is no value")
        value = sample[metric]
        if metric in TRANSFORMS and isinstance(value, list) and not all(isinstance(one, (int, float)) for one in value):
            raise _wrong(f"{metric} must be numbers, got {show(value)}")
    return sample


def _check_arguments(arguments: Any) -> None:
    if not isinstance(arguments, (dict, list)):
        raise _wrong(f"arguments must be an object or a list, got {show(arguments)}")
    for one in arguments.values() if isinstance(arguments, dict) else arguments:
        if not isinstance(one, (dict, list)) or not one:
            raise _wrong(f"arguments must hold the texts of each request, got {show(one)}")


def _is_number(value: Any) -> bool:
    """Numbers stand as text in lm_eval's samples."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


SWEEP_VERSION = 1  # of sweep.json, and of the file of metrics that is made of it


def _check_version(version: int) -> int:
    if version != SWEEP_VERSION:
        raise _wrong(f"must be {SWEEP_VERSION}, the version that this ddp_eval reads, got {version}")
    return version


def _check_name(name: str) -> str:
    """Of a directory in the sweep's own: it leads nowhere else."""
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= 255 or "/" in name or "\0" in name or name in (".", ".."):
        raise _wrong(
            f"must be the name of a directory in the sweep's, got {show(name.encode('utf-8', 'backslashreplace').decode())}"
        )
    return name


@_fields
class _SweepModel(TypedDict, total=False):
    name: Required[Annotated[str, AfterValidator(_check_name)]]
    model: str | None
    revision: str | None
    step: DocumentNumber | None
    state: Required[str]
    reason: str | None
    seconds: Seconds | None
    logged: list[str]


def _check_twice(models: list[_SweepModel]) -> list[_SweepModel]:
    names = [model["name"] for model in models]
    if len(set(names)) != len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise _wrong(f"must name each model once, and {show(twice)} is there twice")
    return models


@_fields
class _Sweep(TypedDict):
    version: Annotated[Count, AfterValidator(_check_version)]
    models: Annotated[list[_SweepModel], AfterValidator(_check_twice)]


_PHRASES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_unicode": "must be text",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "missing": "is missing",
    "greater_than_equal": "must be {ge} or more",
    "greater_than": "must be more than {gt}",
    "less_than": "must be less than {lt}",
    "too_short": "must have {min_length} entries or more",
    "too_long": "must have {max_length} entries or less",
}


def _describe(error: Any) -> str:
    kind, place = error["type"], _place(error["loc"])
    phrase = _PHRASES[kind].format_map(error.get("ctx", {})) if kind in _PHRASES else error["msg"]
    got = "" if kind in ("missing", "shape") else f", got {show(error['input'])}"
    is_place = kind == "shape" and not phrase.startswith("must ")
    return f"{place}{('.' if is_place else ' ') if place else ''}{phrase}{got}"


def _place(loc: tuple[int | str, ...]) -> str:
    """ranks[0].wall_s"""
    place = ""
    for part in loc:
        place += f"[{part}]" if isinstance(part, int) else f"{'.' if place else ''}{one_line(part, 60)}"
    return place


class _Shape:
    """A `read_back.Shape`. The checkers are built when the first file comes."""

    def __init__(self, *kinds: Any) -> None:
        self._kinds = kinds

    @functools.cached_property
    def _adapters(self) -> list[pydantic.TypeAdapter[Any]]:
        return [pydantic.TypeAdapter(kind) for kind in self._kinds]

    def __call__(self, value: Any) -> str | None:
        try:
            for adapter in self._adapters:
                adapter.validate_python(value)
        except pydantic.ValidationError as error:
            return _describe(error.errors(include_url=False)[0])
        return None


@_fields
class _Complete(TypedDict):
    results: Any
    versions: Any
    ddp_eval: Any


MANIFEST = _Shape(_Manifest)
RESULTS = _Shape(_Results, _MORE_OF_RESULTS)
FINISHED_RESULTS = _Shape(_Complete, _Results, _MORE_OF_RESULTS)  # to be shown as those of a run
LM_EVAL_RESULTS = _Shape(_LmEvalResults, _MORE_OF_RESULTS)
TELEMETRY = _Shape(Annotated[_Telemetry, AfterValidator(_check_samples)])
SAMPLE = _Shape(Annotated[_Sample, AfterValidator(_check_sample)])
SWEEP = _Shape(_Sweep)
