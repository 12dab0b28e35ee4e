"""`reproduce` and telemetry on real ranks: another directory, another rank count, and a prompt that is not the same any more."""

import json
import os
import shutil
from pathlib import Path

import pytest
from launch import QUICK, launch

from ddp_eval import demo
from ddp_eval.output import tables, write
from ddp_eval.packs.results import RESULT

TASK = """\
task: expressions
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
custom_dataset: !function utils.load_json
output_type: multiple_choice
test_split: test
doc_to_text: "{{input}}"
doc_to_target: "{{target}}"
doc_to_choice: ["False", "True"]
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A run on three ranks, of a task named by a relative path; where it was started and how it ended."""
    home = tmp_path_factory.mktemp("home")
    tasks = home / "tasks"
    tasks.mkdir()
    (tasks / "expressions.yaml").write_text(TASK)
    shutil.copy(Path(demo.TASKS_PATH) / "utils.py", tasks)
    rows = (Path(demo.TASKS_PATH).parent / "data" / "boolean_expressions_test.jsonl").read_text().splitlines(keepends=True)
    (tasks / "rows.jsonl").write_text("".join(rows[:10]))
    flags = ["--model_args", "pretrained=demo", "--include_path", "tasks", "--tasks", "expressions", "--output_path", "run"]
    finished = launch(3, *flags, program=QUICK, cwd=home, timeout_s=250)
    assert finished.returncode == 0, str(finished)
    return home, finished


def test_phases_add_up_to_the_wall_time(earlier):
    """Catches time of a rank that no phase has, and a clock that starts after the imports or stops before the end."""
    telemetry_file = earlier[0] / "run" / write.TELEMETRY
    telemetry = json.loads(telemetry_file.read_text())
    assert [rank["rank"] for rank in telemetry["ranks"]] == [0, 1, 2]
    for rank in telemetry["ranks"]:
        named_s = sum(seconds for phase, seconds in rank["phases_s"].items() if phase != "other")
        assert named_s == pytest.approx(rank["wall_s"], abs=max(0.5, 0.02 * rank["wall_s"]))
        by_the_clock_s = os.stat(telemetry_file).st_mtime - rank["began_unix_s"]
        # Rank 0 writes the file behind the other ranks' reports, and has to wait for the disk.
        assert rank["wall_s"] == pytest.approx(by_the_clock_s, abs=max(1.0, 0.02 * rank["wall_s"]))
        assert rank["wall_s"] < earlier[1].elapsed_s
        assert rank["sampling_share"] < 0.005
    assert {"start", "load", "tasks", "tokenize", "plan", "wait", "forward", "gather", "score", "write"} <= set(
        telemetry["ranks"][0]["phases_s"]
    )


def test_bytes_of_a_run_by_hand(earlier):
    """Catches a collective that is not counted: 20 requests, one item each, padded to the packs that each rank has; no texts."""
    ranks = json.loads((earlier[0] / "run" / write.TELEMETRY).read_text())["ranks"]
    sent = [rank["collectives"]["all_gather (rows)"] for rank in ranks]
    assert len({one["sent_bytes"] for one in sent}) == 1
    assert all(one["calls"] == 4 and one["received_bytes"] == 2 * one["sent_bytes"] for one in sent)
    most = max(rank["counts"]["requests"] for rank in ranks)
    assert sent[0]["sent_bytes"] == most * RESULT.itemsize, "the results of the rank with most; none halved, no texts"
    joined = [rank["collectives"]["all_gather (processes)"] for rank in ranks]
    assert {(one["calls"], one["sent_bytes"], one["received_bytes"]) for one in joined} == {(1, 8, 16)}


def test_the_summary_is_printed(earlier):
    """Catches telemetry that nobody sees."""
    assert "tokens/s" in earlier[1].stdout and "rank  wall s" in earlier[1].stdout


def test_reproduced_elsewhere_on_another_number_of_ranks(earlier, tmp_path):
    """Catches a manifest that lacks something, paths that hold only where the run was started, and bits that depend on ranks."""
    finished = launch(
        2,
        "reproduce",
        "--trust_task_files",
        earlier[0] / "run",
        "--output_path",
        "again",
        "--expect",
        "identical",
        program=QUICK,
        cwd=tmp_path,
        timeout_s=250,
    )
    assert finished.returncode == 0, str(finished)
    assert "identical: every request has the same bits" in finished.stdout
    assert "ranks.world_size: 3 | 2" in finished.stdout
    scores = [(place / tables.SCORES).read_bytes() for place in (earlier[0] / "run", tmp_path / "again")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("change", "ranks", "wanted"),
    [
        (("not", "no", 1), 2, "the prompts of task expressions are other ones (--allow prompts"),
        (
            ('"target": "False"', '"target": "True"'),
            1,
            "task expressions has the same prompts, but other documents or right answers (--allow documents",
        ),
    ],
    ids=["another prompt", "another right answer"],
)
def test_what_changed_is_refused_by_name(change, ranks, wanted, earlier, tmp_path):
    """Catches a reproduction of something else that passes for one; with other labels every log-probability is the same."""
    home = tmp_path / "home"
    shutil.copytree(earlier[0], home)
    manifest = json.loads((home / "run" / write.MANIFEST).read_text())
    (home / "run" / write.MANIFEST).write_text(json.dumps({**manifest, "working_directory": str(home)}))
    rows = (home / "tasks" / "rows.jsonl").read_text()
    (home / "tasks" / "rows.jsonl").write_text(rows.replace(*change))
    flags = ("--trust_task_files", "--expect", "identical")
    finished = launch(ranks, "reproduce", home / "run", *flags, program=QUICK, cwd=tmp_path, timeout_s=250)
    assert finished.returncode != 0
    assert finished.sentences() == [f"ddp_eval: this is not the run of {home / 'run'}: {wanted} runs it all the same)"]
    assert not finished.foreign_frames()
    assert not (home / "run.again" / write.MANIFEST).exists()
