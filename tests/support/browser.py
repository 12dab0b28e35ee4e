"""A page looked at from inside, in headless Chromium where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

# Written into the page to look at it from inside: what is wider than its box, or outside of its plot.
PROBE = """
<script>
document.documentElement.style.width = "%dpx";
const clipped = [], width = document.documentElement.clientWidth;
for (const details of document.querySelectorAll("details")) details.open = true;
setTimeout(() => {
  for (const one of document.querySelectorAll("main, main *:not(svg *)")) {
    const style = getComputedStyle(one);
    if (style.display !== "inline" && one.scrollWidth > one.clientWidth + 1 && style.overflowX !== "auto")
      clipped.push(one.tagName + " " + one.className + " " + one.textContent.slice(0, 40));
  }
  for (const text of document.querySelectorAll("svg.plot text")) {
    const inner = text.getBoundingClientRect(), outer = text.closest("svg").getBoundingClientRect();
    const beyond = [outer.left - inner.left, inner.right - outer.right, outer.top - inner.top, inner.bottom - outer.bottom];
    if (Math.max(...beyond) > 1)
      clipped.push("plot: " + text.textContent);
  }
  const count = name => document.querySelectorAll(name).length;
  const result = document.createElement("pre");
  result.id = "probe";
  result.textContent = JSON.stringify({clipped, plots: count("svg.plot"), texts: count("svg.plot text"),
    rows: Object.fromEntries([...document.querySelectorAll("table[id], table[class]")].map(table =>
      [table.id || table.className, table.querySelectorAll("tbody tr").length])),
    samples: count("#list > details"), choices: count("#list td.choice"), picked: document.getElementById("count")?.textContent});
  document.body.append(result);
}, 300);
</script>
"""


def look(page: str, place: Path, width: int = 1100) -> tuple[dict[str, Any], list[str]]:
    """What the probe saw, and what Chromium's console says."""
    file = place / "probed.html"
    file.write_text(page.replace("</body>", PROBE % width + "</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={place / 'profile'}", "--window-size=1200,900", file.as_uri()]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="probe">(.*?)</pre>', finished.stdout, re.DOTALL)
    assert found, finished.stderr[-2000:]
    return json.loads(html.unescape(found[1])), [line for line in finished.stderr.splitlines() if "CONSOLE" in line]
