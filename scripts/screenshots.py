"""Evaluates the demo twice, writes the report of both, and photographs it: light and dark, on a desk and on a phone, printed.

    python scripts/screenshots.py            # into docs/; needs chromium (apt-get install chromium) and matplotlib

With --report FILE an existing report is photographed instead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
# name -> width and height of the window in pixels, more flags of Chromium
SHOTS = {
    "report_light": (1100, 5400, []),
    "report_dark": (1100, 2600, ["--blink-settings=preferredColorScheme=0"]),
    "report_phone": (500, 1100, []),
}
# Headless Chromium makes no window narrower than 500 pixels: a phone is a frame in it.
PHONE = '<body style="margin:0;background:#888"><iframe src="{}" style="border:0;margin:0 55px" width=390 height=1100></iframe>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="a report.html (default: of a run of the demo on 2 ranks)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="directory of the pictures")
    options = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("no chromium on the PATH: apt-get install chromium")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        report = options.report.resolve() if options.report else make_report(Path(scratch))
        for name, (width, height, flags) in SHOTS.items():
            page = report.as_uri()
            if name == "report_phone":
                frame = Path(scratch) / "phone.html"
                frame.write_text(PHONE.format(page))
                page = frame.as_uri()
            chromium(f"--window-size={width},{height}", *flags, f"--screenshot={options.out / name}.png", page)
        chromium("--no-pdf-header-footer", f"--print-to-pdf={options.out / 'report_print.pdf'}", report.as_uri())


def make_report(directory: Path) -> Path:
    """Packs on two ranks against rows on one: the report of the first, with its differences from the second."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, cwd=directory, env=environment)

    flags = ["--tasks", "demo", "--limit", "40", "--log_samples", "--model_args", "pretrained=demo", "--output_path"]
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ddp_eval", *flags, "packs")
    run("-m", "ddp_eval", *flags, "rows", "--no_packing")
    run("-m", "ddp_eval", "report", "packs", "rows")
    return directory / "packs" / "report.html"


def chromium(*arguments: str) -> None:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
    subprocess.run([*command, *arguments], check=True, timeout=120, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
