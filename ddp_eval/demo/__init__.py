"""What a bare `torchrun -m ddp_eval` evaluates: a small model and small tasks that ship with the package, no network.

`scripts/make_demo_model.py` made the model; SOURCES.md says where every row of `data/` comes from.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

MODEL_PATH = str(_HERE / "model")
TASKS_PATH = str(_HERE / "tasks")  # what --include_path takes
TASKS = ["demo"]
