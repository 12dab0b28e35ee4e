"""Where tests find what is not a module: the repository, its scripts, the programs that ranks run, tasks that generate texts."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
PROGRAMS = ROOT / "tests" / "support" / "programs"
GENERATION_TASKS = ROOT / "tests" / "support" / "generation_tasks"
