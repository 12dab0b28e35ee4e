"""The wheel holds every file of the package and runs where no clone is; the version is the same wherever it is stated."""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from places import ROOT


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What the command prints on stdout."""
    finished = subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def pip(*words: str | Path, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", cwd=cwd)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone: the wheel is compared with the files that git tracks")
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build in the clone leaves build/ behind, and the next one takes deleted files from it."""
    if not all(importlib.util.find_spec(name) for name in ("pip", "setuptools")):
        pytest.skip("needs pip and setuptools")
    place = tmp_path_factory.mktemp("wheel")
    for name in tracked:
        (place / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / "clone" / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", place, place / "clone", cwd=place)
    (path,) = place.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def version() -> str:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup["metadata"]["version"]


@pytest.mark.processes
def test_the_wheel_holds_the_files_of_the_package(wheel: Path, tracked: list[str]) -> None:
    """Catches a new kind of package data that setup.cfg does not name, and tests or scripts that get installed."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(name for name in tracked if name.startswith("ddp_eval/"))
    assert {"ddp_eval/py.typed", "ddp_eval/analysis/report.html.jinja", "ddp_eval/demo/model/model.safetensors"} <= set(names)


@pytest.mark.processes
def test_the_demo_runs_from_the_wheel_alone(wheel: Path, version: str, tmp_path: Path) -> None:
    """Catches a file that is found because the clone is the working directory or on the path."""
    target = tmp_path / "target"
    pip("install", "--no-compile", "--target", target, wheel, cwd=tmp_path)
    # -S: a clone that is installed for development is on the path by a .pth file of site-packages, which -S leaves unread.
    path = os.pathsep.join([str(target), *site.getsitepackages()])

    def python(*words: str) -> str:
        return run(sys.executable, "-S", *words, cwd=tmp_path, PYTHONPATH=path, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

    assert python("-c", "import ddp_eval; print(ddp_eval.__file__)") == f"{target / 'ddp_eval' / '__init__.py'}\n"
    places = "import pathlib, sys; print([place for place in sys.path if pathlib.Path(place, 'ddp_eval').exists()])"
    assert python("-c", places) == f"{[str(target)]}\n", "another copy can be imported"
    assert python("-m", "ddp_eval", "--version") == f"ddp_eval {version}\n"
    table = python("-m", "ddp_eval", "--limit", "2", "--device", "cpu", "--output_path", "run")
    assert "demo_boolean_expressions" in table
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["packages"]["ddp_eval"] == version
    python("-m", "ddp_eval", "report", "run")
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_version_is_the_same_everywhere(version: str) -> None:
    """Catches a release whose citation or changelog still names the one before."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == version
