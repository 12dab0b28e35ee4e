"""What a user can get wrong: one sentence on stderr, exit code 2, no traceback of ours, all ranks gone soon.

Every case runs in this process, where nothing but the sentence and the exit code can go wrong; some again as a command of their
own and under torchrun, which adds its summary of the failed rank and makes 1 of the exit code.
"""

import json
import os
import shutil
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from launch import COMMAND, QUICK, Finished, launch

from ddp_eval import __main__, demo
from ddp_eval.distributed import watchdog
from ddp_eval.output import journal
from ddp_eval.packs.results import RESULT

END_S = 15

UTILS = """\
import datasets

def load(**settings):
    return datasets.DatasetDict(test=datasets.Dataset.from_list([{"question": "1 + 1 =", "answer": " 2"}]))

def drop_all(rows):
    return rows.select([])

def fail(**settings):
    raise RuntimeError("the data set is on strike")
"""
TASK = """\
task: {name}
dataset_path: json
{more}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""
DEMO = "--model_args pretrained=demo "
TASKS = DEMO + "--include_path {place}/tasks "

# name: (flags, what the sentence says)
CASES = {
    "unknown task": (DEMO + "--tasks demo_helaswag", "there is no task demo_helaswag: did you mean demo_hellaswag"),
    "unknown flag": ("--task_s demo", "unknown flag --task_s: did you mean --tasks?"),
    "unknown command": ("evaluate --tasks demo", "unknown command evaluate"),
    "flag without value": ("--tasks", "--tasks"),
    "limit 0": ("--limit 0", "--limit must be more than 0 (documents per task, or a fraction below 1), got 0"),
    "limit of no number": ("--limit ten", "--limit must be a number, got ten"),
    "task that leaves nothing": (TASKS + "--tasks empty", "the task empty has no documents"),
    "few-shot below 0": ("--num_fewshot -1", "--num_fewshot must be 0 or more, got -1"),
    "seed of no number": ("--seed one", "--seed must be whole numbers or None, got one"),
    "bad JSON in samples": ("--samples {{'demo_lambada':[0]}}", "--samples must be a JSON object, with double quotes"),
    "document that is not there": (
        DEMO + '--tasks demo_wikitext --samples {{"demo_wikitext":[999]}}',
        "--samples asks for document 999 of the task demo_wikitext, whose documents are 0 to ",
    ),
    "bad max_length": ("--model_args pretrained=demo,max_length=long --tasks demo", "max_length in --model_args must be"),
    "bad dtype": (DEMO + "dtype=int8 --tasks demo_lambada --limit 1", "dtype in --model_args must be"),
    "samples without a place": ("--log_samples", "--log_samples needs --output_path DIR"),
    "device of no kind": ("--device tpu", "--device must be cuda or cpu, got tpu"),
    "no CUDA device": ("--device cuda", "--device cuda was asked for, but torch sees no CUDA device here"),
    "model that is not there": (
        "--model_args pretrained={place}/gone --tasks demo",
        "the model directory {place}/gone does not exist",
    ),
    "model in a directory with a slash": (
        "--model_args pretrained=gone/ --tasks demo",
        "the model directory gone/ does not exist",
    ),
    "directory without a model": (
        "--model_args pretrained={place}/run --tasks demo",
        "the directory {place}/run holds no model: config.json is missing",
    ),
    "model that is not in the cache": (
        "--model_args pretrained=no-such-model --tasks demo_lambada",
        "; HF_HUB_OFFLINE is set and the cache lacks them: unset it, or fetch them first",
    ),
    "unknown model argument": (
        DEMO.strip() + ",colour=1 --tasks demo_lambada --limit 1",
        "cannot load the model demo: it takes no model_args colour",
    ),
    "model without a tokenizer": (
        "--model_args pretrained={place}/no_tokenizer --tasks demo",
        "{place}/no_tokenizer",
    ),
    "corrupt checkpoint": (
        "--model_args pretrained={place}/corrupt --tasks demo_lambada --limit 1",
        "cannot load the model {place}/corrupt",
    ),
    "checkpoint without weights": (
        "--model_args pretrained={place}/no_weights --tasks demo_lambada --limit 1",
        "cannot load the model {place}/no_weights",
    ),
    "task of a kind whose documents cannot be had": (
        TASKS + "--tasks strange_afar",
        "the task strange_afar is of the type telepathy, which is not supported yet",
    ),
    "task file of a kind": (
        TASKS + "--tasks {place}/apart/strange_apart.yaml",
        "the task strange_apart is of the type telepathy, which is not supported yet",
    ),
    "answers longer than the window": (
        DEMO + "--include_path {place}/tasks --tasks generates --gen_kwargs max_gen_toks=100000 --limit 1",
        "the task generates asks for answers of up to 100000 tokens, which leaves no room for its prompts in the model's",
    ),
    "settings of generation that nobody knows": (
        DEMO + "--include_path {place}/tasks --tasks generates --gen_kwargs colour=1 --limit 1",
        "the task generates cannot generate with {{'colour': 1",
    ),
    "a temperature that cannot be": (
        DEMO + "--include_path {place}/tasks --tasks generates --gen_kwargs do_sample=true,temperature=0.0 --limit 1",
        "the task generates cannot generate with {{'do_sample': True, 'temperature': 0.0}}",
    ),
    "task given twice": (
        DEMO + "--tasks demo demo_lambada",
        "the task demo_lambada is asked for twice, as demo and as demo_lambada: give only one of the two",
    ),
    "documents of the hub": (
        TASKS + "--tasks afar",
        "; HF_HUB_OFFLINE is set and the cache lacks them: unset it, or fetch them first",
    ),
    "template of a task that does not work": (
        TASKS + "--tasks no_field",
        "a template in the task no_field does not work: 'nosuch' is undefined",
    ),
    "chat template of no name": (
        DEMO + "--tasks demo_lambada --apply_chat_template rag",
        "there is no chat template rag: the tokenizer has a single one, give --apply_chat_template alone",
    ),
    "chat template of another name": (
        "--model_args pretrained={place}/two_templates --tasks demo_lambada --apply_chat_template nosuch",
        "--apply_chat_template must name one of the tokenizer's templates: default, rag",
    ),
    "no chat template": (
        "--model_args pretrained={place}/no_template --tasks demo_lambada --apply_chat_template",
        "--apply_chat_template needs a tokenizer with a chat template, and this one has none",
    ),
    "task of an unknown kind": (TASKS + "--tasks strange", "telepathy"),
    "broken task file": (TASKS + "--tasks {place}/tasks/broken.yaml", "broken.yaml"),
    "task without its data": (TASKS + "--tasks no_data", "no_data"),
    "no such include path": (
        DEMO + "--tasks demo --include_path {place}/gone",
        "--include_path must be a directory of task files, got {place}/gone",
    ),
    "output path that is a file": (
        DEMO + "--tasks demo_lambada --output_path {place}/tasks/broken.yaml",
        "--output_path must be a directory",
    ),
    "output path that cannot be": (
        DEMO + "--tasks demo_lambada --output_path /proc/results",
        "--output_path /proc/results cannot be written to",
    ),
    "output path that holds a run": (DEMO + "--tasks demo_lambada --output_path {place}/run", "already holds a run"),
    "unfinished run of other flags": (
        DEMO + "--tasks demo_lambada --limit 3 --output_path {place}/unfinished",
        "already holds an unfinished run of 1970-01-0",
    ),
    "scores without a journal": (
        DEMO + "--tasks demo_lambada --output_path {place}/only_scores",
        "it has no journal to resume from",
    ),
    "output path below a file": (DEMO + "--tasks demo_lambada --output_path {place}/tasks/broken.yaml/run", "Not a directory"),
    "output path of too long a name": (DEMO + "--tasks demo_lambada --output_path {place}/" + "n" * 300, "File name too long"),
    "timeout of nothing": ("--timeout 0", "--timeout must be 1 or more seconds, got 0"),
    "timeout of no number": ("--timeout soon", "--timeout must be a number, got soon"),
    "endless timeout": ("--timeout inf", "--timeout must be 1 or more seconds, got inf"),
    "fresh without a place": ("--fresh", "--fresh needs --output_path DIR"),
    "max_pack_tokens 0": ("--max_pack_tokens 0", "--max_pack_tokens must be 1 or more, got 0"),
    "limit of half a document": ("--limit 1.5", "--limit must be a whole number or a fraction below 1, got 1.5"),
    "another engine": ("--model openai-completions", "--model must be hf"),
    "refused flag": ("--use_cache there", "--use_cache is not supported: use --output_path DIR"),
    "samples and limit": (DEMO + '--tasks demo_lambada --limit 2 --samples {{"demo_lambada":[0]}}', "exclude each other"),
    "seeds of the wrong number": ("--seed 1,2", "--seed must be 1 or 4 values"),
    "config file that is not there": ("--config {place}/gone.yaml", "--config must be a YAML file that can be read"),
    "config file that is no YAML": ("--config {place}/tasks/broken.yaml", "--config must be a YAML file"),
    "config file with an unknown key": ("--config {place}/typo.yaml", "has the unknown key task_s"),
    "token on the command line": (DEMO.rstrip() + ",token=hf_secret --tasks demo_lambada", "model_args token is not supported"),
    "hub model out of reach": (
        "--model_args pretrained=nobody/nothing --tasks demo_lambada",
        "cannot load the model nobody/nothing",
    ),
    "tokenizer that is not there": (
        DEMO.rstrip() + ",tokenizer={place}/gone --tasks demo_lambada",
        "cannot load a tokenizer from {place}/gone",
    ),
    "broken tokenizer": ("--model_args pretrained={place}/broken_tokenizer --tasks demo_lambada", "{place}/broken_tokenizer"),
    "config.json that is no JSON": (
        "--model_args pretrained={place}/broken_config --tasks demo_lambada",
        "{place}/broken_config",
    ),
    "encoder-decoder that is sent": (
        "--model_args pretrained={place}/t5 --tasks demo_lambada --load broadcast",
        "--load broadcast cannot send an encoder-decoder: give --load disk",
    ),
    "weights of another shape": (
        "--model_args pretrained={place}/other_shape --tasks demo_lambada --limit 1",
        "cannot load the model {place}/other_shape",
    ),
    "code of its own without the flag": (
        "--model_args pretrained={place}/own_code --tasks demo_lambada --limit 1",
        "cannot load",
    ),
    "task function that fails": (TASKS + "--tasks raises", "lm_eval could not"),
    "task function that is not there": (TASKS + "--tasks no_function", "lm_eval could not"),
    "template that fails": (TASKS + "--tasks bad_template", "bad_template"),
    "data file that is no JSON": (TASKS + "--tasks bad_data", "lm_eval could not"),
    "unsafe task without the flag": (TASKS + "--tasks unsafe", "unsafe"),
}

ENVIRONMENTS = {
    "no master address": ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but MASTER_ADDR is not set: start with torchrun"),
    "rank past the end": ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK must lie between 0 and WORLD_SIZE - 1, got RANK=5"),
    "master port of no number": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "many"},
        "the environment variable MASTER_PORT must be a whole number, got many",
    ),
    "world size left over in a SLURM job": (
        {
            "RANK": "0",
            "WORLD_SIZE": "4",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29500",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_PROCID": "0",
        },
        "WORLD_SIZE is 4 but SLURM_STEP_NUM_TASKS is 1",
    ),
    "tasks that know nothing of each other": ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started several tasks"),
    "negative world size": ({"RANK": "0", "WORLD_SIZE": "-1"}, "the environment variable WORLD_SIZE must be 1 or more, got -1"),
    "world size of no number": ({"WORLD_SIZE": "two"}, "the environment variable WORLD_SIZE must be a whole number, got two"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory of broken things."""
    place = tmp_path_factory.mktemp("bad")
    for name in ("no_tokenizer", "corrupt", "no_weights"):
        shutil.copytree(demo.MODEL_PATH, place / name)
    for file in (place / "no_tokenizer").glob("*token*"):
        file.unlink()
    weights = place / "corrupt" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (place / "no_weights" / "model.safetensors").unlink()
    for name in ("broken_tokenizer", "broken_config", "other_shape", "own_code"):
        shutil.copytree(demo.MODEL_PATH, place / name)
    (place / "broken_tokenizer" / "tokenizer.json").write_text('{"version": ')
    (place / "broken_config" / "config.json").write_text("{")
    edit_json(place / "other_shape" / "config.json", hidden_size=64)
    edit_json(place / "own_code" / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    (place / "own_code" / "own.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    (place / "t5").mkdir()
    (place / "t5" / "config.json").write_text('{"model_type": "t5"}')
    (place / "typo.yaml").write_text("task_s: demo\n")
    (place / "only_scores").mkdir()
    (place / "only_scores" / "scores.parquet").write_text("")
    (place / "unfinished" / "journal").mkdir(parents=True)
    begun = place / "unfinished" / "journal" / "run.json"
    begun.write_text(json.dumps({"flags": {"tasks": ["demo_lambada"], "model_args": {"pretrained": "demo"}, "limit": 4.0}}))
    os.utime(begun, (86400, 86400))
    own = journal.Journal(begun.with_name("a.journal"), journal.work_key({}), "cpu")
    own.append(0, np.array([(0, -1.0, True)], dtype=RESULT))
    own.close()
    shutil.copytree(demo.MODEL_PATH, place / "no_template")
    (place / "no_template" / "chat_template.jinja").unlink()
    templates = shutil.copytree(demo.MODEL_PATH, place / "two_templates") / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("{{ messages }}")
    (place / "run").mkdir()
    (place / "run" / "manifest.json").write_text("{}")
    tasks, apart = place / "tasks", place / "apart"
    tasks.mkdir()
    apart.mkdir()
    afar = TASK.replace("dataset_path: json", "dataset_path: someone/something")
    (tasks / "afar.yaml").write_text(afar.format(name="afar", kind="loglikelihood", more=""))
    (tasks / "strange_afar.yaml").write_text(afar.format(name="strange_afar", kind="telepathy", more=""))
    (apart / "strange_apart.yaml").write_text(afar.format(name="strange_apart", kind="telepathy", more=""))
    text = TASK.format(name="no_field", kind="loglikelihood", more="custom_dataset: !function utils.load")
    (tasks / "no_field.yaml").write_text(text.replace("{{question}}", "{{nosuch.field}}"))
    (tasks / "utils.py").write_text(UTILS)
    load = "custom_dataset: !function utils.load"
    for name, kind, more in (
        ("generates", "generate_until", load),
        ("strange", "telepathy", load),
        ("empty", "loglikelihood", f"{load}\nprocess_docs: !function utils.drop_all"),
        ("no_data", "loglikelihood", "dataset_kwargs: {data_files: {test: no_data.jsonl}}"),
        ("bad_data", "loglikelihood", f"dataset_kwargs: {{data_files: {{test: {place}/bad_data.jsonl}}}}"),
        ("raises", "loglikelihood", "custom_dataset: !function utils.fail"),
        ("no_function", "loglikelihood", "custom_dataset: !function utils.gone"),
        ("unsafe", "loglikelihood", f"{load}\nunsafe_code: true"),
    ):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, more=more))
    (place / "bad_data.jsonl").write_text("{{{\n")
    template = TASK.format(name="bad_template", kind="loglikelihood", more=load).replace("{{question}}", "{{question.x.y}}")
    (tasks / "bad_template.yaml").write_text(template)
    (tasks / "broken.yaml").write_text("task: broken\ndoc_to_text: [unclosed\n")
    return place


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def run_here(monkeypatch, capfd, place, no_lm_eval_index):
    """Run a command line in this process, in the directory of the task files, with `os._exit` as an exception."""
    import transformers

    def run(arguments):
        def leave(code):
            raise SystemExit(code)

        monkeypatch.setattr(os, "_exit", leave)
        # Signals and threads of this process stay what they are.
        monkeypatch.setattr(watchdog.Watch, "start", lambda watching: None)
        monkeypatch.setattr(watchdog, "_leaving", threading.Lock())
        monkeypatch.setattr(watchdog, "_directory", None)
        monkeypatch.setattr(watchdog, "_exit_hook", None)
        monkeypatch.setattr(sys, "argv", ["ddp_eval", *arguments])
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back what the command changes for the life of its process
        monkeypatch.setenv("TQDM_DISABLE", "1")
        monkeypatch.chdir(place / "tasks")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        capfd.readouterr()
        others = set(threading.enumerate())
        with pytest.raises(SystemExit) as left:
            __main__.main()
        _wait_for_threads(others)
        out, err = capfd.readouterr()
        code: Any = left.value.code
        return Finished(code, out, err, 0.0, [])

    transformers.utils.logging.disable_progress_bar()  # TQDM_DISABLE comes too late for this process
    yield run
    transformers.utils.logging.enable_progress_bar()


def _wait_for_threads(others, timeout_s=60):
    """Until the thread that loads the model has ended: transformers cannot load two models at once."""
    deadline = time.monotonic() + timeout_s
    while any(type(thread) is threading.Thread for thread in set(threading.enumerate()) - others):
        assert time.monotonic() < deadline, "the thread that loads the model does not end"
        time.sleep(0.01)


def arguments_of(case, place):
    flags, text = CASES[case]
    return [word.format(place=place) for word in flags.split()], text.format(place=place)


def check(finished, code, text):
    sentences = finished.sentences()
    assert finished.returncode == code, str(finished)
    assert len(sentences) == 1, str(finished)
    assert text in sentences[0], str(finished)
    assert not finished.foreign_frames(), str(finished)


@pytest.mark.parametrize("case", CASES)
def test_one_sentence(case, place, run_here):
    """Catches a mistake that ends in a traceback, in silence, in the wrong exit code, or in words that do not name it."""
    arguments, text = arguments_of(case, place)
    check(run_here(arguments), 2, text)


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment_that_makes_no_sense(case, run_here, monkeypatch):
    """Catches a half-made launcher environment that hangs in the rendezvous or is taken for a single process."""
    variables, text = ENVIRONMENTS[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    check(run_here([]), 2, text)
    assert time.monotonic() - started < END_S


@pytest.mark.parametrize(("case", "program"), [("unknown task", COMMAND), ("corrupt checkpoint", QUICK)])
def test_as_a_command(case, program, place):
    """Catches an exit that waits for threads, and what happens only in a process of its own."""
    arguments, text = arguments_of(case, place)
    finished = launch(0, *arguments, program=program, cwd=place / "tasks", cold=True)
    check(finished, 2, text)
    assert finished.seconds_after(text) < END_S, str(finished)


# Known before torch is loaded; by every rank; by the leader alone, before and after lm_eval; in the thread that loads the model.
@pytest.mark.parametrize(
    ("case", "program"),
    [
        ("unknown flag", COMMAND),
        ("no CUDA device", COMMAND),
        ("model that is not there", COMMAND),
        ("output path that holds a run", COMMAND),
        ("unknown task", QUICK),
        ("settings of generation that nobody knows", QUICK),
        ("corrupt checkpoint", QUICK),
    ],
)
def test_under_torchrun(case, program, place):
    """Catches a sentence that comes twice or is followed by frames of ours, and ranks that wait for one that has failed."""
    arguments, text = arguments_of(case, place)
    finished = launch(2, *arguments, program=program, cwd=place / "tasks", cold=case == "unknown flag")
    check(finished, 1, text)
    assert finished.seconds_after(text) < END_S, str(finished)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_all_under_torchrun(case, place):
    """Catches a mistake that one process reports well and two do not."""
    arguments, text = arguments_of(case, place)
    finished = launch(2, *arguments, program=QUICK, cwd=place / "tasks")
    check(finished, 1, text)
    assert finished.seconds_after(text) < END_S, str(finished)
