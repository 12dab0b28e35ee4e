"""What the tests submit: scripts with their EDIT lines edited, and a run that takes its time."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICK = ROOT / "tests" / "distributed" / "quick_main.py"

RUN = ("--model_args", "pretrained=demo", "--tasks", "demo", "--limit", "3", "--max_pack_tokens", "1024", "--device", "cpu")


def edit(script: Path, copy: Path, **lines: object) -> Path:
    """Copy `script` with other values in its EDIT lines, NAME=(…); each must be there once."""
    text = script.read_text()
    for name, value in lines.items():
        text, count = re.subn(rf"^{name}=\(.*?\)", f"{name}=({value})", text, flags=re.MULTILINE)
        assert count == 1, f"{script.name} has {count} lines {name}="
    copy.write_text(text)
    return copy


def logs(run: Path) -> str:
    """The words of all nodes, each behind the name of its file: for messages of failed tests."""
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted((run / "logs").glob("*")))
