"""A start that finished no work binds nobody: the corrected command runs in the same --output_path.

Source: a public report about a mistyped task after which a directory had to be deleted by hand.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import QUICK, launch, launching, wait_for

from ddp_eval.cli import flags as cli
from ddp_eval.config import Config
from ddp_eval.distributed.world import join_group
from ddp_eval.errors import UserError
from ddp_eval.output import directory as run_directory
from ddp_eval.output import journal, status, tables, write
from ddp_eval.output.directory import RunDirectory, open_directory
from ddp_eval.packs.results import RESULT
from ddp_eval.run import runner

KEY, OTHER_KEY = journal.work_key({"plan": "a"}), journal.work_key({"plan": "b"})
ITEM_STARTS = np.array([0, 1])


@pytest.fixture
def opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunDirectory]]:
    """opening(**flags) -> the open directory of a run with these flags."""
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC_", "SLURM_"))]:
        monkeypatch.delenv(name)
    opened = []

    def open_it(**flags: Any) -> RunDirectory:
        config = Config(**{"tasks": ["demo_lambada"], "output_path": str(tmp_path / "run"), **flags})
        opened.append(open_directory(config, lambda: None))
        return opened[-1]

    yield open_it
    for directory in opened:
        directory.close()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def kill(directory: RunDirectory) -> None:
    """Leave the directory as a process that is killed leaves it."""
    (directory.path / run_directory.LOCK).unlink()


def test_a_start_that_fails_leaves_its_status_alone(opening: Callable[..., RunDirectory]) -> None:
    """Catches flags, or a layout, of a command that never scored anything and that the next one must obey."""
    directory = opening(tasks=["demo_lambda"])
    directory.begin_replacing(Config(tasks=["demo_lambda"]), "layers:2")
    directory.close()
    assert names_in(directory.path) == [status.STATUS]
    assert opening(num_fewshot=1).layout is None


@pytest.mark.parametrize("left", ["nothing", "empty journal", "header", "torn record"])
def test_a_start_that_was_killed(opening: Callable[..., RunDirectory], left: str) -> None:
    """Catches what a killed process has left, a journal without a whole pack in it, taken for unfinished work."""
    directory = opening()
    directory.begin_replacing(Config(tasks=["demo_lambada"]), "layers:2")
    if left != "nothing":
        own = journal.Journal(directory.journals / "a.journal", OTHER_KEY, "cpu")
        own.append(0, np.array([(0, -1.0, True)], dtype=RESULT))
        own.close()
        whole = own.path.read_bytes()
        header = journal.decode_header(whole)
        assert header is not None
        own.path.write_bytes(whole[: {"empty journal": 0, "header": header[2], "torn record": len(whole) - 1}[left]])
    kill(directory)
    later = opening(num_fewshot=1)
    assert later.layout is None and later.recover(KEY, ITEM_STARTS).packs.tolist() == []


def test_a_journal_without_work_that_comes_late(opening: Callable[..., RunDirectory]) -> None:
    """Catches a run refused over the first bytes of a journal, which another node's disk shows late."""
    directory = opening()
    (directory.journals / "late.journal").write_bytes(journal.encode_header(OTHER_KEY, "cpu"))
    assert directory.recover(KEY, ITEM_STARTS).packs.tolist() == []


@pytest.mark.parametrize("kept", ["pack", "scores"])
def test_finished_work_binds(opening: Callable[..., RunDirectory], kept: str) -> None:
    """Catches the way out taken too far: a finished pack, or scores, thrown away because another command came."""
    directory = opening()
    own = journal.Journal(directory.journals / "a.journal", KEY, "cpu")
    if kept == "pack":
        own.append(0, np.array([(0, -1.0, True)], dtype=RESULT))
        own.close()
    else:
        tables.write_scores(directory.path, tables.Scores([], [], [], [], [], []))
    kill(directory)
    with pytest.raises(UserError, match=r"already holds an unfinished run of .* \(there num_fewshot was null, here it is 1\)"):
        opening(num_fewshot=1)
    if kept == "pack":
        assert opening().recover(KEY, ITEM_STARTS).packs.tolist() == [0]


BROKEN = {
    "a mistyped task": "--tasks demo_lambda",
    "a wrong path": "--tasks demo_lambada --model_args pretrained=/nowhere/at/all",
    "a wrong template": "--tasks broken_template",
    "a template that the tokenizer lacks": "--tasks demo_lambada --apply_chat_template no_such_template",
    "wrong settings": "--tasks generates --gen_kwargs max_gen_toks=100000",
    "a document that is not there": '--tasks demo_lambada --samples {"demo_lambada":[99999]}',
    "settings of no use": "--tasks generates --gen_kwargs top_k=-7,do_sample=True",
    "an argument that no model takes": "--tasks demo_lambada --model_args pretrained=demo,colour=1",
}
TASKS = {
    "broken_template.yaml": "task: broken_template\ninclude: _base\ndoc_to_text: '{{ question | no_such_filter }}'\n",
    "generates.yaml": "task: generates\ninclude: _base\noutput_type: generate_until\ndoc_to_text: '{{question}}'\n",
    "_base": "output_type: loglikelihood\ncustom_dataset: !function code.load\ntest_split: test\ndoc_to_target: a\n",
    "sleepy.yaml": "task: sleepy\ninclude: _base\ncustom_dataset: !function code.sleep\ndoc_to_text: '{{question}}'\n",
    "code.py": "import datasets, time\ndef load(**unused):\n"
    "    return datasets.DatasetDict({'test': datasets.Dataset.from_list([{'question': 'q'}])})\n"
    "def sleep(**unused):\n    time.sleep(300)\n",
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    made = tmp_path / "tasks"
    made.mkdir()
    for name, text in TASKS.items():
        (made / name).write_text(text)
    return made


@pytest.mark.usefixtures("no_lm_eval_index")
def test_every_mistake_then_the_right_command(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mistake of any kind after which the same directory is refused."""
    output = tmp_path / "run"
    world = join_group("cpu")

    def run(words: str) -> None:
        try:
            runner.run(cli.parse([*flags, *words.split(" ")])[0], world)
        finally:  # a process of its own would end here; the model is still being loaded
            for thread in threading.enumerate():
                if thread.name.endswith("(load)"):
                    thread.join()

    flags = ["--include_path", str(tasks), "--output_path", str(output), "--bootstrap_iters", "0"]
    for mistake, words in BROKEN.items():
        with pytest.raises(UserError):
            run(words)
        assert names_in(output) == [status.STATUS], mistake
    run("--tasks demo_lambada --limit 1")
    assert status.read_status(output)["state"] == status.DONE and (output / write.MANIFEST).is_file()
    for words in BROKEN.values():  # a complete run is refused, and stays
        with pytest.raises(UserError, match="already holds a run"):
            run(words)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for mistake, words in BROKEN.items():
        with pytest.raises(UserError):
            run(f"--overwrite {words}")
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before, mistake


@pytest.mark.slow
def test_interrupted_and_mistaken_on_two_ranks(tasks: Path, tmp_path: Path) -> None:
    """Catches Ctrl-C before the first pack, or a mistake under torchrun, that leaves a directory nobody else may use.

    Slow: it starts two ranks three times.
    """
    output = tmp_path / "run"
    flags = ["--include_path", tasks, "--output_path", output, "--bootstrap_iters", "0"]
    with launching(2, *flags, "--tasks", "sleepy", program=QUICK) as running:
        wait_for(output / run_directory.JOURNALS / "run.json", running)
        running.process.send_signal(signal.SIGINT)
        finished = running.finish(60)
    assert finished.returncode == 1 and status.read_status(output)["state"] == status.PREEMPTED, str(finished)
    mistaken = launch(2, *flags, "--tasks", "demo_lambda", program=QUICK)
    assert "there is no task demo_lambda: did you mean demo_lambada" in mistaken.sentences()[-1], str(mistaken)
    assert names_in(output) == [status.STATUS] and status.read_status(output)["state"] == status.FAILED
    finished = launch(2, *flags, "--tasks", "demo_lambada", "--limit", "2", program=QUICK)
    assert finished.returncode == 0 and status.read_status(output)["state"] == status.DONE, str(finished)
