"""What the tests submit: scripts with their EDIT lines edited, and a run that takes its time."""

from __future__ import annotations

import re
from pathlib import Path

from places import PROGRAMS

from ddp_eval.output import journal

QUICK = PROGRAMS / "quick_main.py"

RUN = ("--model_args", "pretrained=demo", "--tasks", "demo", "--limit", "3", "--max_pack_tokens", "1024", "--device", "cpu")


def edit(script: Path, copy: Path, **lines: object) -> Path:
    """Copy `script` with other values in its EDIT lines, NAME=(…); each must be there once."""
    text = script.read_text()
    for name, value in lines.items():
        text, count = re.subn(rf"^{name}=\(.*?\)", f"{name}=({value})", text, flags=re.MULTILINE)
        assert count == 1, f"{script.name} has {count} lines {name}="
    copy.write_text(text)
    return copy


def packs_done(run: Path) -> int:
    """How many packs are in the journals of a run, which may be at work."""
    count = 0
    for path in (run / "journal").glob(f"*{journal.SUFFIX}"):
        data = path.read_bytes()
        header = journal.decode_header(data)
        if header is not None:
            key, _, start = header
            count += len(list(journal.decode_records(data, start, key)))
    return count


def logs(run: Path) -> str:
    """The words of all nodes, each behind the name of its file: for messages of failed tests."""
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted((run / "logs").glob("*")))
