"""Every file that is loaded counts in the model's digest and is looked at at each start, wherever it lies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny_models
import torch

from ddp_eval.cli import reproduce
from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import checkpoint, model_files
from ddp_eval.errors import UserError
from ddp_eval.packs.batches import NO_TEXTS
from ddp_eval.packs.cut import CostModel, plan_packs
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.run import manifest, preflight, runner
from ddp_eval.run.manifest import describe_model, is_same_model, see_model
from ddp_eval.run.resume import journal_key
from ddp_eval.system import digests

WORLD = World(0, 0, 1, torch.device("cpu"))
COMMIT = "a" * 40


def write(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def change(path: Path) -> None:
    """Another byte in the middle, at another time: file systems' clocks may stand still for 10 ms."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(data)


def describe(model_args: dict[str, Any]) -> dict[str, Any]:
    return describe_model(checkpoint.resolve_pretrained(model_args), model_args, None)


def key_of(model: dict[str, Any]) -> bytes:
    """The key of a small plan's journals with that model."""
    plan = plan_packs(requests_from_lists([[1, 2, 3]], [1]), CostModel(forward=1e30, dense=False), 100)[0]
    return journal_key(plan, NO_TEXTS, {"class": "HFEngine"}, WORLD, model)


def assert_noticed(path: Path, model_args: dict[str, Any]) -> None:
    """A change of `path` must show in the look at each start, in the digests, in what a finished run is, and in a resume."""
    before, key = describe(model_args), key_of(describe(model_args))
    assert is_same_model({"model": before}, model_args)
    change(path)
    assert see_model(model_args) != before["seen"], "a start would not look again"
    assert not is_same_model({"model": before}, model_args), "a finished run would be shown as this one"
    assert key_of(describe(model_args)) != key, "unfinished work would be resumed"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A model's directory, of files that are none of a model's."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        write(tmp_path / "model" / name)
    (tmp_path / "model" / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(1000))
    return tmp_path / "model"


def index_of(*shards: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": {f"weight{number}": shard for number, shard in enumerate(shards)}})


@pytest.fixture
def sharded(tmp_path: Path) -> Callable[[str], Path]:
    """sharded(folder) -> a model whose index names shards in that folder of its directory."""

    def make(folder: str) -> Path:
        place = tmp_path / "sharded"
        tiny_models.make_model("llama").save_pretrained(place, max_shard_size="60KB")
        tiny_models.make_tokenizer(model_max_length=2048).save_pretrained(place)
        index = json.loads((place / "model.safetensors.index.json").read_text())
        (place / folder).mkdir(parents=True, exist_ok=True)
        for shard in set(index["weight_map"].values()):
            shutil.move(place / shard, place / folder / shard)
        index["weight_map"] = {name: f"{folder}/{shard}" for name, shard in index["weight_map"].items()}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
        return place

    return make


def test_shards_in_a_folder_below(sharded: Callable[[str], Path]) -> None:
    """Catches weights that no digest covers (seen in a probe): two models' scores in one run, old ones shown for new weights."""
    place = sharded("parts/of it")
    args = {"pretrained": str(place)}
    shard = min((place / "parts" / "of it").iterdir())
    assert f"parts/of it/{shard.name}" in describe(args)["model_files"]["files"]
    assert_noticed(shard, args)


def test_a_finished_run_of_other_weights_in_a_folder_below(sharded: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches the same in whole runs: "holds this very run, complete"."""
    place = sharded("parts")
    options: dict[str, Any] = {"tasks": ["demo_lambada"], "limit": 1, "bootstrap_iters": 0, "device": "cpu"}
    config = Config(model_args={"pretrained": str(place)}, output_path=str(tmp_path / "out"), **options)
    first = runner.run(config, WORLD)
    assert first is not None and runner.run(config, WORLD) is not None
    shard = min((place / "parts").iterdir())
    weights = safetensors.torch.load_file(shard)
    safetensors.torch.save_file({name: weight * 0.5 for name, weight in weights.items()}, shard, {"format": "pt"})
    with pytest.raises(UserError, match=r"already holds a run .* \(the files of the model have changed since\)"):
        runner.run(config, WORLD)


@pytest.mark.parametrize("where", ["../elsewhere/x.safetensors", "/tmp/x.safetensors", "parts/../../x.safetensors"])
def test_shards_outside_are_refused(where: str, plain: Path) -> None:
    """Catches weights that belong to no directory whose files a run's record could name."""
    index = write(plain / "model.safetensors.index.json", index_of("parts/a.safetensors", where))
    sentence = rf"^model\.safetensors\.index\.json in {plain} names weights outside of that directory, {where}: put them into it"
    with pytest.raises(UserError, match=sentence):
        checkpoint.load_config({"pretrained": str(plain)})
    with pytest.raises(UserError, match=sentence):
        is_same_model({"model": {"seen": "x"}}, {"pretrained": str(plain)})
    index.rename(plain / "model.safetensors.index.fp16.json")
    with pytest.raises(UserError, match=r"^model\.safetensors\.index\.fp16\.json in .* names weights outside"):
        checkpoint.load_config({"pretrained": str(plain)})


def test_a_file_that_the_config_names(plain: Path) -> None:
    """Catches weights named by transformers_weights, alone or by way of an index, in a folder below or outside."""
    write(plain / "config.json", json.dumps({"transformers_weights": "sub/own.safetensors.index.json"}))
    write(plain / "sub" / "own.safetensors.index.json", index_of("other/a.safetensors"))
    shard = write(plain / "other" / "a.safetensors", "weights")
    assert_noticed(shard, {"pretrained": str(plain)})
    assert_noticed(
        write(plain / "sub" / "own.safetensors.index.json", index_of("other/a.safetensors")), {"pretrained": str(plain)}
    )
    write(plain / "config.json", json.dumps({"transformers_weights": "../own.safetensors"}))
    with pytest.raises(UserError, match=r"^config\.json in .* names weights outside of that directory, \.\./own\.safetensors"):
        model_files.check_shards(plain)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(index: str, plain: Path) -> None:
    """Catches a traceback over a file that transformers has a sentence for."""
    write(plain / "model.safetensors.index.json", index)
    assert "model.safetensors.index.json" in model_files.names_of_model(plain)


def test_adapters_have_indices_too(plain: Path, tmp_path: Path) -> None:
    """Catches the rule kept for models alone."""
    pytest.importorskip("peft")
    adapter = write(tmp_path / "adapter" / "adapter_config.json").parent
    write(adapter / "adapter_model.safetensors.index.json", index_of("parts/a.safetensors"))
    args = {"pretrained": str(plain), "peft": str(adapter)}
    assert_noticed(write(adapter / "parts" / "a.safetensors", "weights"), args)
    assert_noticed(adapter / "adapter_config.json", args)
    write(adapter / "adapter_model.safetensors.index.json", index_of("../a.safetensors"))
    write(plain / "config.json", json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="names weights outside of that directory"):
        checkpoint.load_config(args)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
        "vocab-src.json", "sentencepiece.bpe.model", "qwen.tiktoken", "tekken.json", "tokenizer.4.0.0.json", "config.json",
    ],
)  # fmt: skip
def test_files_of_a_tokenizer_elsewhere(name: str, plain: Path, tmp_path: Path) -> None:
    """Catches a vocabulary or a template under a name that is on no list."""
    place = tmp_path / "tokenizer"
    for one in ("tokenizer_config.json", name, "model.safetensors"):
        write(place / one)
    args = {"pretrained": str(plain), "tokenizer": str(place)}
    assert set(describe(args)["tokenizer_files"]["files"]) == {"tokenizer_config.json", name}
    assert_noticed(place / name, args)


def test_templates_in_a_folder_of_the_model(plain: Path) -> None:
    """Catches the same where the tokenizer lies with the model; its weights are not read twice."""
    template = write(plain / "additional_chat_templates" / "tool_use.jinja")
    args = {"pretrained": str(plain)}
    assert set(describe(args)["tokenizer_files"]["files"]) == {
        "additional_chat_templates/tool_use.jinja", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert_noticed(template, args)


def test_a_tokenizer_that_is_one_file(plain: Path, tmp_path: Path) -> None:
    """Catches a warning in place of its digest."""
    file = write(tmp_path / "own" / "tokenizer.json")
    args = {"pretrained": str(plain), "tokenizer": str(file)}
    assert list(describe(args)["tokenizer_files"]["files"]) == ["tokenizer.json"]
    assert_noticed(file, args)


def test_code_of_the_checkpoint(plain: Path, tmp_path: Path) -> None:
    """Catches code in folders below, and of another repository, that is run and does not count, and a loop of links."""
    other = write(tmp_path / "other" / "modeling.py", "from .more import x").parent
    write(other / "more.py", "x = 1")
    write(plain / "config.json", json.dumps({"auto_map": {"AutoModel": "own.Own", "AutoConfig": f"{other}--modeling.Own"}}))
    write(plain / "tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["below/tokens.Slow", None]}}))
    code = [write(plain / name, "x = 1") for name in ("own.py", "below/tokens.py", "below/deep/er.py", "linked/there.py")]
    shutil.move(plain / "linked", tmp_path / "linked")
    (plain / "linked").symlink_to(tmp_path / "linked")
    (plain / "below" / "up").symlink_to(plain)
    args = {"pretrained": str(plain), "trust_remote_code": True}
    for file in (*code, other / "modeling.py", other / "more.py"):
        assert_noticed(file, args)
    assert f"{other}--more.py" in describe(args)["code_files"]["files"]
    untrusted = describe({"pretrained": str(plain)})
    assert "code_files" not in untrusted and "below/tokens.py" not in untrusted["model_files"]["files"]


def test_a_model_in_a_subfolder(tmp_path: Path, plain: Path) -> None:
    """Catches the wrong folder looked at; the code of such a model lies at the top."""
    shutil.move(plain, tmp_path / "whole" / "sub")
    args = {"pretrained": str(tmp_path / "whole"), "subfolder": "sub", "trust_remote_code": True}
    code = write(tmp_path / "whole" / "modeling.py", "x = 1")
    for file in ("model.safetensors", "generation_config.json", "tokenizer.json"):
        assert_noticed(tmp_path / "whole" / "sub" / file, args)
    assert_noticed(code, args)


def test_files_that_links_lead_to(plain: Path, tmp_path: Path) -> None:
    """Catches a look at the link alone, and a link that leads to another file of that size and time."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.move(plain / "model.safetensors", first)
    (plain / "model.safetensors").symlink_to(first)
    args = {"pretrained": str(plain)}
    assert_noticed(first, args)
    second.write_bytes(bytes(reversed(first.read_bytes())))
    os.utime(second, ns=(0, first.stat().st_mtime_ns))
    before = describe(args)
    (plain / "model.safetensors").unlink()
    (plain / "model.safetensors").symlink_to(second)
    assert not is_same_model({"model": before}, args)


def test_code_of_another_repository_of_the_hub(plain: Path, tmp_path: Path) -> None:
    """Catches code in the hub's cache that does not count, and nothing looked at since a module that is not needed is missing."""
    repository = tmp_path / "cache" / "models--who--code"
    write(repository / "refs" / "main", COMMIT)
    code = write(repository / "snapshots" / COMMIT / "modeling.py", "x = 1")
    named = {"AutoModel": "who/code--modeling.Own", "AutoModelForX": "who/code--other.Own", "AutoConfig": "no/such--config.Own"}
    write(plain / "config.json", json.dumps({"auto_map": named}))
    args = {"pretrained": str(plain), "trust_remote_code": True, "cache_dir": str(tmp_path / "cache")}
    assert list(describe(args)["code_files"]["files"]) == ["who/code--modeling.py"]
    assert_noticed(code, args)


@pytest.fixture
def cached(plain: Path, tmp_path: Path) -> Path:
    """The model in a cache of the hub, a shard in a folder below, as who/model at revision main; returns the cache."""
    write(plain / "model.safetensors.index.json", index_of("parts/a.safetensors"))
    write(plain / "parts" / "a.safetensors", "weights")
    repository = tmp_path / "cache" / "models--who--model"
    write(repository / "refs" / "main", COMMIT)
    for file in [path for path in plain.rglob("*") if path.is_file()]:
        blob = repository / "blobs" / digests._digest_file(file, read_all=True)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(file, blob)
        link = repository / "snapshots" / COMMIT / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return tmp_path / "cache"


def test_links_of_a_hub_cache(cached: Path, plain: Path) -> None:
    """Catches a model of the hub refused, one in a cache of its own that nothing is known of, and a blob taken at its word
    after somebody has written to it."""
    args = {"pretrained": "who/model", "cache_dir": str(cached)}
    assert describe(args)["model_files"] == describe({"pretrained": str(plain)})["model_files"]
    snapshot = cached / "models--who--model" / "snapshots" / COMMIT
    model_files.check_shards(snapshot)
    assert_noticed(Path(os.path.realpath(snapshot / "parts" / "a.safetensors")), args)


def test_a_blob_that_keeps_its_time(cached: Path) -> None:
    """Catches a finished run shown for weights that were written with their old time."""
    args = {"pretrained": "who/model", "cache_dir": str(cached)}
    blob = Path(os.path.realpath(cached / "models--who--model" / "snapshots" / COMMIT / "model.safetensors"))
    before, times = describe(args), blob.stat()
    change(blob)
    os.utime(blob, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not is_same_model({"model": before}, args)


def test_digests_are_those_of_earlier_runs(plain: Path) -> None:
    """Catches records of all models that change although nothing about them did."""
    write(plain / "runs" / "events.log")
    write(plain / "README.md")
    found = describe({"pretrained": str(plain)})
    assert found["model_files"] == digests.digest_directory(plain)
    assert found["tokenizer_files"] == digests.digest_directory(plain, ["tokenizer.json", "tokenizer_config.json"])
    assert set(found) == {"pretrained", "revision", "seen", "model_files", "tokenizer_files"}


def test_files_out_of_reach_are_never_resumed() -> None:
    """Catches two models whose files cannot be read taken for one."""
    unknown = {"model_files": None, "tokenizer_files": None}
    assert key_of({**unknown, "revision": None}) != key_of({**unknown, "revision": None})
    assert key_of({**unknown, "revision": COMMIT}) == key_of({**unknown, "revision": COMMIT})
    assert key_of({**unknown, "revision": COMMIT}) != key_of({**unknown, "revision": "b" * 40})


@pytest.mark.parametrize(("file", "stops"), [("model.safetensors", True), ("config.json", True), ("train.log", False)])
def test_files_written_to_while_they_are_loaded(
    file: str, stops: bool, tiny_model_path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches digests of weights other than those that were loaded; a training run's log in that directory is no matter."""
    place = tmp_path / "model"
    shutil.copytree(tiny_model_path("llama"), place)
    write(place / "train.log", "a line")
    load = runner.load_replica

    def load_and_write(*args: Any) -> Any:
        engine = load(*args)
        before = (place / file).stat()
        while (place / file).stat().st_ctime_ns == before.st_ctime_ns:
            (place / file).write_bytes((place / file).read_bytes())
        return engine

    monkeypatch.setattr(runner, "load_replica", load_and_write)
    config = Config(
        model_args={"pretrained": str(place)}, tasks=["demo_lambada"], limit=1, bootstrap_iters=0, device="cpu",
        output_path=str(tmp_path / "out"),
    )  # fmt: skip
    if not stops:
        assert runner.run(config, WORLD) is not None
        return
    with pytest.raises(UserError, match=rf"^{place / file} was written to while the model was loaded from it: start again"):
        runner.run(config, WORLD)


def test_nodes_compare_shards_in_folders_too(plain: Path) -> None:
    """Catches node checks that pass although a node lacks a part of a shard."""
    write(plain / "model.safetensors.index.json", index_of("parts/a.safetensors"))
    write(plain / "parts" / "a.safetensors", "weights")
    facts = preflight._look_at_model(Config(model_args={"pretrained": str(plain)}))
    assert facts["parts/a.safetensors"] == 7 and facts["model.safetensors"] == 1000


def test_reproduce_names_code_that_changed(plain: Path) -> None:
    """Catches a reproduction by other code of the checkpoint, without a word."""
    write(plain / "config.json", json.dumps({"auto_map": {"AutoModel": f"{plain.parent}/other--modeling.Own"}}))
    code = write(plain.parent / "other" / "modeling.py", "x = 1")
    args = {"pretrained": str(plain), "trust_remote_code": True}
    before = describe(args)
    change(code)
    assert reproduce._model_changes(before, describe(args)) == [
        f"the model's code has other files: {plain.parent}/other--modeling.py"
    ]


def test_what_cannot_be_read_is_said(plain: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that ends over a file which its record alone needs."""

    def refuse(*args: Any) -> Any:
        raise PermissionError("no")

    monkeypatch.setattr(manifest.digests, "digest_directory", refuse)
    assert describe({"pretrained": str(plain)})["model_files"] is None
    assert any("the files of" in message and "are not in the manifest: no" in message for message in caplog.messages)


def test_code_of_a_checkpoint_is_refused_without_a_question(
    tmp_path: Path, tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches transformers' question on every terminal, and code that a "y" to it runs without --trust_remote_code."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    place = shutil.copytree(tiny_model_path("llama"), tmp_path / "own")
    write(place / "own.py", "raise SystemExit('code of a checkpoint was run')\n")
    config = json.loads((place / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    write(place / "config.json", json.dumps(config | {"model_type": "own", "auto_map": own}))
    tokenizer = json.loads((place / "tokenizer_config.json").read_text())
    write(place / "tokenizer_config.json", json.dumps(tokenizer | {"tokenizer_class": "Own", "auto_map": own}))
    for load in (checkpoint.load_config, checkpoint.load_tokenizer):
        with pytest.raises(UserError, match="trust_remote_code"):
            load({"pretrained": str(place)})
    assert not asked
