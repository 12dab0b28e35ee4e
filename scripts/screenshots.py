"""Writes the reports of two runs of the demo and of a sweep over noisy copies of it, and photographs them: light and dark, on a
desk and on a phone, the first one printed, too.

    python scripts/screenshots.py            # into docs/; needs chromium (apt-get install chromium) and matplotlib

With --report FILE an existing report of a run is photographed instead of the first, with --sweep FILE one of a sweep instead of
the second; of the two only what is named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
# name -> width and height of the window in pixels, more flags of Chromium
DARK = ["--blink-settings=preferredColorScheme=0"]
SHOTS: dict[str, tuple[int, int, list[str]]] = {
    "report_light": (1100, 5400, []),
    "report_dark": (1100, 2600, DARK),
    "report_phone": (500, 1100, []),
}
SWEEP_SHOTS: dict[str, tuple[int, int, list[str]]] = {
    "sweep_light": (1100, 1800, []),
    "sweep_dark": (1100, 1800, DARK),
    "sweep_phone": (500, 1100, []),
}
# Checkpoints of a training that never was: by step, the spread of the noise on the demo model's weights.
NOISE = {250: 0.06, 500: 0.035, 1000: 0.025, 1500: 0.02, 2000: 0.012, 3000: 0.0}
# Headless Chromium makes no window narrower than 500 pixels: a phone is a frame in it.
PHONE = '<body style="margin:0;background:#888"><iframe src="{}" style="border:0;margin:0 55px" width=390 height=1100></iframe>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="a report.html of a run (default: of a run of the demo on 2 ranks)")
    parser.add_argument("--sweep", type=Path, help="a report.html of a sweep (default: of noisy copies of the demo)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="directory of the pictures")
    options = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("no chromium on the PATH: apt-get install chromium")
    options.out.mkdir(parents=True, exist_ok=True)
    both = not (options.report or options.sweep)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if options.report or both:
            report = options.report.resolve() if options.report else make_report(place)
            photograph(report, SHOTS, options.out, place)
            chromium("--no-pdf-header-footer", f"--print-to-pdf={options.out / 'report_print.pdf'}", report.as_uri())
        if options.sweep or both:
            photograph(options.sweep.resolve() if options.sweep else make_sweep(place), SWEEP_SHOTS, options.out, place)


def photograph(report: Path, shots: dict[str, tuple[int, int, list[str]]], out: Path, scratch: Path) -> None:
    for name, (width, height, flags) in shots.items():
        page = report.as_uri()
        if name.endswith("_phone"):
            frame = scratch / "phone.html"
            frame.write_text(PHONE.format(page))
            page = frame.as_uri()
        chromium(f"--window-size={width},{height}", *flags, f"--screenshot={out / name}.png", page)


def run(directory: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, *arguments], check=True, cwd=directory, env=environment)


def make_report(directory: Path) -> Path:
    """Packs on two ranks against rows on one: the report of the first, with its differences from the second."""
    flags = ["--tasks", "demo", "--limit", "40", "--log_samples", "--model_args", "pretrained=demo", "--output_path"]
    run(directory, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ddp_eval", *flags, "packs")
    run(directory, "-m", "ddp_eval", *flags, "rows", "--no_packing")
    run(directory, "-m", "ddp_eval", "report", "packs", "rows")
    return directory / "packs" / "report.html"


def make_sweep(directory: Path) -> Path:
    """Runs of all checkpoints, side by side in one directory as a sweep leaves them, with one that failed."""
    sweep, models = directory / "llama-sweep", []
    sweep.mkdir()
    tasks = "demo_boolean_expressions,demo_mmlu,demo_lambada"
    for step, noise in NOISE.items():
        name = f"checkpoint-{step}"
        make_checkpoint(directory / name, noise, seed=step)
        began = time.monotonic()
        words = ["--model_args", f"pretrained={directory / name}", "--tasks", tasks, "--limit", "24"]
        run(directory, "-m", "ddp_eval", *words, "--output_path", str(sweep / name))
        models.append(describe(name, step, state="done", seconds=round(time.monotonic() - began, 1)))
    models.insert(-1, describe("checkpoint-2500", 2500, state="failed", reason="model.safetensors.index.json names no such file"))
    (sweep / "sweep.json").write_text(json.dumps({"version": 1, "models": models}))
    run(directory, "-m", "ddp_eval", "report", sweep.name)
    return sweep / "report.html"


def make_checkpoint(place: Path, noise: float, seed: int) -> None:
    """The demo model with Gaussian noise on its weights."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(ROOT / "ddp_eval" / "demo" / "model", place)
    weights, random = load_file(place / "model.safetensors"), torch.Generator().manual_seed(seed)
    noisy = {name: weight + noise * torch.randn(weight.shape, generator=random) for name, weight in weights.items()}
    save_file(noisy, place / "model.safetensors", metadata={"format": "pt"})


def describe(name: str, step: int, **facts: Any) -> dict[str, Any]:
    """A model in sweep.json."""
    return {"name": name, "model": f"train/{name}", "revision": None, "step": step, "reason": None, "seconds": None, **facts}


def chromium(*arguments: str) -> None:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
    subprocess.run([*command, *arguments], check=True, timeout=120, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
