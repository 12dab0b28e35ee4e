"""README and docs by their text alone: markers, flags, links, generated pages, language. No model, no rank."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import documents
import make_reference
import pytest
import yaml
from places import ROOT

from ddp_eval.__main__ import NOT_READ
from ddp_eval.analysis.verdict import NOT_AS_EXPECTED
from ddp_eval.cli import split_command
from ddp_eval.cli.flags import parse_flags
from ddp_eval.cli.plan import NOTHING_FITS
from ddp_eval.distributed.watchdog import EXIT_INTERRUPTED, EXIT_PREEMPTED
from ddp_eval.output import irregular, tables
from ddp_eval.telemetry.summary import PHASES

DOCS = ROOT / "docs"
LINKED = [*documents.PAGES, *(ROOT / name for name in ("CHANGELOG.md", "LOG.md", "examples/README.md", "slurm/README.md"))]
BLOCKS = [block for page in documents.PAGES for block in documents.blocks_of(page)]
TYPED = [block for block in BLOCKS if block.language in documents.COMMANDS]

# The dialect that the project's pages had: "sooner" for faster, "mend" for fix, "told" for reported.
DIALECT = re.compile(r"\b(sooner|mend(s|ed|ing)?|kin|told|deeds?|obeys?|obeyed|seated|contagion|oneself|tells?|quickest)\b", re.I)


def id_of(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def test_readme_is_one_page() -> None:
    """Catches a README that grows into a manual again: what is longer has a page in docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("block", TYPED, ids=id_of)
def test_every_command_is_tested_or_says_what_it_needs(block: documents.Block) -> None:
    """Catches a command in the docs that nobody runs: it will be wrong before long."""
    kind, _, rest = block.marker.partition(": ")
    assert kind in (documents.RUNS, "runs in", "needs"), f"{block} has no marker in the line above it"
    if kind == "needs":
        assert rest in documents.NEEDS, f"{block} needs something unknown"
    if kind == "runs in":
        path, _, name = rest.partition("::")
        assert (ROOT / path).is_file(), f"{block}: there is no {path}"
        assert re.search(rf"^def {re.escape(name)}\(", (ROOT / path).read_text(), re.MULTILINE), f"{block}: {path} has no {name}"


SHELL = [block for block in TYPED if block.language != "python"]


@pytest.mark.parametrize("block", SHELL, ids=id_of)
def test_flags_of_every_command_exist(block: documents.Block) -> None:
    """Catches a flag that the docs name and no parser knows, also where the command itself needs a GPU or a cluster."""
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for launcher, words in documents.evaluations_in(block.text):
        command, rest = split_command(words)
        if command in ("plan", "sweep"):
            _, rest = make_reference.parser_of(command).parse_known_args(rest)
        if command in ("run", "plan", "sweep"):
            config, _ = parse_flags(rest, names_model=command != "sweep")
            assert launcher != "slurm" or config.output_path, f"{block}: a job needs --output_path"
        else:
            make_reference.parser_of(command).parse_args(rest)


def test_commands_are_found() -> None:
    """Catches a reader of blocks that overlooks commands, so that the tests above check nothing."""
    found = [words for block in SHELL for _, words in documents.evaluations_in(block.text)]
    assert len(found) > 20
    assert {split_command(words)[0] for words in found} == {
        "run",
        "sweep",
        "ls",
        "validate",
        "plan",
        "compare",
        "report",
        "reproduce",
    }
    text = "OMP=1 torchrun -m ddp_eval --tasks a \\\n  --limit 2; if python -m ddp_eval ls tags; then echo ok; fi"
    assert list(documents.evaluations_in(text)) == [("module", ["--tasks", "a", "--limit", "2"]), ("module", ["ls", "tags"])]


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language in ("json", "yaml")], ids=id_of)
def test_data_can_be_read(block: documents.Block) -> None:
    """Catches an example file that cannot be pasted."""
    assert (json.loads if block.language == "json" else yaml.safe_load)(block.text) is not None


@pytest.mark.parametrize("page", LINKED, ids=id_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Catches a link to a page that was renamed or a heading that was rewritten."""
    for target in documents.links_of(page):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in documents.anchors_of(place), f"{target}: there is no such heading"


def test_files_that_are_named_exist() -> None:
    """Catches a script, test or record that has been moved and that the docs still name."""
    pattern = re.compile(r"`((?:scripts|tests|benchmarks|examples|slurm|docs)/[\w./*-]+)`")
    for page in documents.PAGES:
        for name in pattern.findall(page.read_text(encoding="utf-8")):
            assert list(ROOT.glob(name)), f"{page.relative_to(ROOT)} names {name}"


def test_every_page_is_in_the_navigation() -> None:
    """Catches a page that nobody finds, and an entry without a page."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else ()
        return [page for part in parts for page in pages(part)]

    assert sorted(pages(settings["nav"])) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_flags_page_is_up_to_date() -> None:
    """Catches a flag that was added or reworded without its page: run python scripts/make_reference.py."""
    assert make_reference.PAGE.read_text(encoding="utf-8") == make_reference.make_page()


def test_columns_are_described() -> None:
    """Catches a column, a kind of irregular request or a phase that no page describes."""
    page = (DOCS / "reference" / "run-directory.md").read_text(encoding="utf-8")
    for table in (tables.SCORES, tables.TEXTS, tables.DOCUMENTS):
        section = page.partition(f"\n## {table}\n")[2].partition("\n## ")[0]
        for column in tables.schema_of(table).names:
            assert f"`{column}`" in section, f"{column} of {table}"
    for kind in (*irregular.REQUESTS, *irregular.DOCUMENTS):
        assert f"| `{kind}` |" in page
    telemetry = (DOCS / "guide" / "report-and-telemetry.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", telemetry, re.MULTILINE) == list(PHASES)


def test_exit_codes_are_described() -> None:
    """Catches an exit code that changes without its page."""
    page = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert codes == {0, 1, 2, NOT_AS_EXPECTED, NOTHING_FITS, NOT_READ, EXIT_PREEMPTED, EXIT_INTERRUPTED}


@pytest.mark.parametrize("page", [*documents.PAGES, ROOT / "CHANGELOG.md"], ids=id_of)
def test_language_is_plain(page: Path) -> None:
    """Catches words that a reader has to learn before the system."""
    text = page.read_text(encoding="utf-8")
    assert [match[0] for match in DIALECT.finditer(text)] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Catches a link, an anchor or a docstring that the site's generator cannot resolve."""
    pytest.importorskip("material", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert "Evaluate a loaded model on lm_eval tasks" in (tmp_path / "site" / "reference" / "api" / "index.html").read_text()
