"""What is known of tasks before they are loaded: the walk from names to tasks, on an index written by hand."""

from types import SimpleNamespace
from typing import Any

import pytest

from ddp_eval.errors import UserError
from ddp_eval.tasks.index import check_once, drop_members, find_leaves, is_complete


def entry(kind: str, cfg: Any = None, tags: Any = ()) -> Any:
    return SimpleNamespace(kind=SimpleNamespace(name=kind), cfg=cfg, tags=set(tags))


INDEX = {
    "a": entry("TASK", {"task": "a", "output_type": "multiple_choice", "num_fewshot": 0}),
    "b": entry("TASK", {"task": "b"}),
    "c": entry("PY_TASK", {"task": "c", "class": "utils.C"}),
    "letters": entry("TAG", tags=["b", "a"]),
    "pair": entry("GROUP", {"group": "pair", "task": ["a", {"task": "b", "output_type": "loglikelihood"}]}),
    "all": entry("GROUP", {"group": "all", "task": ["pair", "c"], "num_fewshot": 5, "aggregate_metric_list": []}),
    "other": entry("GROUP", {"group": "other", "task": ["letters"]}),
    "own": entry("GROUP", {"group": "own", "task": [{"group": "inner", "task": ["a"], "num_fewshot": 2}, {"task": "new"}]}),
}


@pytest.mark.parametrize(
    ("spec", "trails", "kinds"),
    [
        ("a", ["a"], ["multiple_choice"]),
        ("b", ["b"], ["generate_until"]),
        ("c", ["c"], [None]),
        ("letters", ["letters a", "letters b"], ["multiple_choice", "generate_until"]),
        ("pair", ["pair a", "pair b"], ["multiple_choice", "loglikelihood"]),
        ("all", ["all pair a", "all pair b", "all c"], ["multiple_choice", "loglikelihood", None]),
        ("own", ["own own::inner a", "own own::new"], ["multiple_choice", "generate_until"]),
        ({"task": "a", "output_type": "loglikelihood"}, ["a"], ["loglikelihood"]),
        ({"task": "mine", "output_type": "loglikelihood"}, ["mine"], ["loglikelihood"]),
        ({"group": "mine", "task": ["b"], "output_type": "loglikelihood"}, ["mine b"], ["loglikelihood"]),
        ("nowhere", [], []),
    ],
)
def test_names_lead_to_tasks(spec: Any, trails: list[str], kinds: list[str | None]) -> None:
    """Catches a task that is missed behind a group or tag, and one taken for a kind that its group has changed."""
    leaves = list(find_leaves(spec, INDEX))
    assert [" ".join(leaf.trail) for leaf in leaves] == trails
    assert [leaf.output_type for leaf in leaves] == kinds


def test_a_groups_settings_reach_its_tasks() -> None:
    """Catches an outer group's setting lost on the way, or beaten by an inner one's, and names that travel as settings."""
    leaves = {leaf.trail[-1]: leaf.settings for leaf in find_leaves("all", INDEX)}
    assert {name: settings["num_fewshot"] for name, settings in leaves.items()} == {"a": 5, "b": 5, "c": 5}
    assert {name: settings["task"] for name, settings in leaves.items()} == {"a": "a", "b": "b", "c": "c"}
    (inner, _) = find_leaves("own", INDEX)
    assert inner.settings["num_fewshot"] == 2


def test_a_pattern_brings_each_task_once() -> None:
    """Catches members that are evaluated beside their group, and names that nobody else brings dropped."""
    assert drop_members(["a", "all", "b", "c", "pair"], INDEX) == ["all"]
    assert drop_members(["a", "b", "c", "letters"], INDEX) == ["c", "letters"]
    assert drop_members(["a", "b"], INDEX) == ["a", "b"]


def test_tasks_that_are_asked_for_twice() -> None:
    """Catches two groups that would write to the same place, and a refusal of what lm_eval allows: a tag beside its task."""
    check_once(["pair", "c"], INDEX)
    check_once(["letters", "a"], INDEX)
    check_once(["a", "a"], INDEX)
    for names in (["pair", "other"], ["all", "a"], ["a", "all"], ["letters", "pair"]):
        with pytest.raises(UserError, match=r"^the task [ab] is asked for twice, as .* and as .*: give only one of the two$"):
            check_once(names, INDEX)


def test_the_walk_agrees_with_lm_eval(tmp_path: Any) -> None:
    """Catches settings that travel otherwise than in lm_eval, which builds the demo's nested groups here."""
    from lm_eval.tasks import TaskManager

    from ddp_eval import demo

    (tmp_path / "more.yaml").write_text(
        "group: more\nnum_fewshot: 1\ntask:\n  - demo_mmlu\n  - task: demo_hellaswag\n    num_fewshot: 3\n"
        "  - group: inner\n    num_fewshot: 2\n    task: [demo_lambada, demo_wikitext]\n"
    )
    manager = TaskManager(include_path=[demo.TASKS_PATH, str(tmp_path)], include_defaults=False)
    built = manager.load(["more"])["tasks"]
    leaves = {leaf.trail[-1]: leaf for leaf in find_leaves("more", manager.task_index)}
    assert set(leaves) == set(built)
    for name, task in built.items():
        assert leaves[name].output_type == task.OUTPUT_TYPE, name
        assert leaves[name].settings["num_fewshot"] == task.config.num_fewshot, name


@pytest.mark.parametrize(
    ("names", "complete"),
    [
        (["a", "pair", "all"], True),
        (["letters", "other"], True),
        (["own"], False),  # `new` is nowhere
        (["elsewhere"], False),
        (["a*"], False),
        ([{"task": "a"}], False),
    ],
)
def test_whether_lm_evals_own_tasks_are_needed(names: list[Any], complete: bool) -> None:
    """Catches an index that lacks a member, and patterns that lm_eval's own tasks would add to."""
    assert is_complete(names, INDEX) is complete


def test_a_tag_of_a_later_folder_replaces_an_earlier_one(tmp_path: Any) -> None:
    """Catches an lm_eval that joins tags of several folders, as lm_eval's own and --include_path: then none is complete."""
    from lm_eval.tasks import TaskManager

    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.yaml").write_text(f"task: of_{folder}\ntag: shared\noutput_type: loglikelihood\n")
    manager = TaskManager(include_path=[str(tmp_path / "first"), str(tmp_path / "second")], include_defaults=False)
    assert {"of_first", "of_second"} <= manager.task_index.keys()
    assert manager.task_index["shared"].tags == {"of_second"}
