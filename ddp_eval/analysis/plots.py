"""Plots of the report: matplotlib figures as SVG text whose colours are the page's own, so that they follow light and dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ddp_eval.errors import UserError, printable
from ddp_eval.telemetry.summary import PHASES
from ddp_eval.telemetry.timeline import coarsen

# Colours that occur nowhere else, each replaced by the style sheet's variable of that name.
_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"
_SERIES = [f"#0102{10 + number}" for number in range(10)]
_LINES = ("-", "--", ":", "-.")
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "line", **{color: f"c{number}" for number, color in enumerate(_SERIES)}}

WIDTH_IN = 8.0
CURVE_WIDTH_IN = 4.0  # a phone shows one in its width, a desk three
_LOG_STEPS = 20  # times the median that the last step is, from which on steps have a logarithmic axis
_LOG_VALUES = 50  # times the least that the largest value is, from which on values have one: perplexities early in a training
_MAX_ROWS = 500  # of one plot
_MAX_NAME = 100  # characters
_MAX_LEGEND = 40
_PIXELS = 800  # about the width of a page


def intervals(rows: Sequence[tuple[str, float, float | None]], axis: str, zero: bool = False) -> str:
    """(name, value, standard error or None), from top to bottom, with 95% intervals. zero: mark the line of no difference."""
    left = len(rows) - _MAX_ROWS
    axis += f"; the first {_MAX_ROWS} of {len(rows)}" if left > 0 else ""
    rows = rows[:_MAX_ROWS]
    figure, axes = _figure(0.9 + 0.28 * len(rows))
    places = np.arange(len(rows))[::-1]
    errors = np.array([1.96 * (stderr or 0.0) for _, _, stderr in rows])
    values = np.array([value for _, value, _ in rows])
    axes.errorbar(values, places, xerr=errors, fmt="o", color=_SERIES[0], markersize=5, capsize=3, linewidth=1.6)
    # A name may come from anybody's file: it is no formula, and must not push the plot off its page.
    axes.set_yticks(places, [printable(name)[:_MAX_NAME] for name, _, _ in rows], parse_math=False)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(axis)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    if zero:
        axes.axvline(0, color=_MUTED, linewidth=1)
    return _to_svg(figure)


def curves(series: Sequence[tuple[str, Sequence[int], Sequence[float], Sequence[float | None]]]) -> str:
    """One metric over steps. series: name, steps, values, standard errors; 95% intervals are bars."""
    looks = list(itertools.product(_LINES, _SERIES))  # colours come again with another kind of line
    shown = series[: len(looks)]
    figure, axes = _figure(2.3 + 0.18 * (len(shown) if len(shown) > 1 else 0), width_in=CURVE_WIDTH_IN)
    for (name, steps, values, stderrs), (line, color) in zip(shown, looks, strict=False):
        errors = [1.96 * (stderr or 0.0) for stderr in stderrs]
        axes.errorbar(
            steps, values, yerr=errors, fmt="o", linestyle=line, color=color, markersize=3.5, capsize=2, linewidth=1.4,
            elinewidth=0.9, label=printable(name)[:_MAX_LEGEND],
        )  # fmt: skip
    every = sorted(step for _, steps, _, _ in shown for step in steps)
    if every[-1] > _LOG_STEPS * max(1, every[len(every) // 2]):
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    else:
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}" if float(step).is_integer() else "")
    reached = [value for _, _, values, _ in shown for value in values]
    if 0 < min(reached) < max(reached) / _LOG_VALUES:
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(min(reached) / 2, max(reached) * 2)
    else:
        axes.locator_params(axis="y", nbins=5)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.set_xlabel("step" + (f"; the first {len(shown)} of {len(series)}" if len(series) > len(shown) else ""))
    axes.grid(color=_GRID, linewidth=0.8)
    if len(shown) > 1:
        _legend(axes, 1)
        for text in axes.get_legend().get_texts():
            text.set_parse_math(False)
    return _to_svg(figure)


def margins(right: npt.NDArray[np.float64], wrong: npt.NDArray[np.float64], near_tie_nats: float) -> str:
    """How far the chosen answer leads, in nats, on a logarithmic scale: right and wrong answers stacked."""
    figure, axes = _figure(2.6)
    right, wrong = right[np.isfinite(right)], wrong[np.isfinite(wrong)]
    both = np.concatenate([right, wrong])
    least = max(float(both[both > 0].min(initial=1.0)), 1e-4)
    bins = np.geomspace(min(least, near_tie_nats / 2), max(float(both.max(initial=1.0)), 1.0) * 1.05, 41)
    shown = [np.clip(part, bins[0], None) for part in (right, wrong)]
    axes.hist(shown, bins=bins, stacked=True, color=[_SERIES[2], _SERIES[3]], label=["right", "wrong"])
    axes.axvline(near_tie_nats, color=_MUTED, linewidth=1, linestyle="--", label=f"near tie ({near_tie_nats:g} nats)")
    axes.set_xscale("log")
    axes.set_xlabel("lead of the chosen answer over the next, nats")
    axes.set_ylabel("documents")
    _legend(axes, 3)
    return _to_svg(figure)


def timeline(ranks: Sequence[Mapping[str, Any]]) -> str:
    """Each rank a bar from the first process's start, coloured by phase; spans narrower than a pixel are merged."""
    figure, axes = _figure(1.1 + 0.36 * len(ranks))
    began = min(rank["began_unix_s"] for rank in ranks)
    pixel_s = max(rank["began_unix_s"] - began + rank["wall_s"] for rank in ranks) / _PIXELS
    shown = [coarsen(rank["timeline"], rank["wall_s"], pixel_s) for rank in ranks]
    seen = {phase for timeline in shown for _, phase in timeline}
    colors = phase_colors()
    for place, (rank, timeline) in enumerate(zip(ranks, shown, strict=True)):
        offset = rank["began_unix_s"] - began
        moments = [*(moment for moment, _ in timeline), rank["wall_s"]]
        spans = [(start + offset, end - start) for start, end in itertools.pairwise(moments)]
        hues = [colors.get(phase, _MUTED) for _, phase in timeline]
        axes.broken_barh(spans, (-place - 0.36, 0.72), facecolors=hues, linewidth=0)
    axes.set_yticks([-place for place in range(len(ranks))], [f"rank {rank['rank']}" for rank in ranks])
    axes.set_xlabel("seconds")
    for phase in PHASES:
        if phase in seen:
            axes.barh([0], [0], color=colors[phase], label=phase)
    _legend(axes, 7)
    return _to_svg(figure)


def utilisation(ranks: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """GPU (or processor cores) in use and memory held, over time, one line for each rank."""
    samples = [np.array(rank["samples"], dtype=np.float64).reshape(-1, len(columns)) for rank in ranks]
    with_gpu = any(len(rows) and not np.isnan(rows[:, columns.index("gpu_busy")]).all() for rows in samples)
    panels = [("gpu_busy", "GPU busy", 1.0), ("gpu_memory_bytes", "GPU GiB", 2.0**30), ("gpu_power_w", "watts", 1.0)]
    if not with_gpu:
        panels = [("cpu_cores", "cores in use", 1.0), ("rss_bytes", "resident MiB", 2.0**20)]
    figure, all_axes = _figure(0.6 + 1.5 * len(panels), len(panels))
    began = min(rank["began_unix_s"] for rank in ranks)
    for axes, (column, title, unit) in zip(all_axes, panels, strict=True):
        for number, (rank, rows) in enumerate(zip(ranks, samples, strict=True)):
            moments = rows[:, 0] + rank["began_unix_s"] - began
            line = rows[:, columns.index(column)] / unit
            axes.plot(moments, line, color=_SERIES[number % len(_SERIES)], linewidth=1.4, label=f"rank {rank['rank']}")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
        axes.grid(color=_GRID, linewidth=0.8)
    all_axes[-1].set_xlabel("seconds")
    if 1 < len(ranks) <= 8:
        _legend(all_axes[0], 8)
    return _to_svg(figure)


def phase_colors() -> dict[str, str]:
    """Each phase its colour, the same in every plot; idle ones are grey."""
    pale = {"wait": _GRID, "join": _MUTED, "other": _MUTED}
    hues = iter([*_SERIES, *_SERIES])
    return {phase: pale.get(phase) or next(hues) for phase in PHASES}


def _figure(height_in: float, panels: int = 0, width_in: float = WIDTH_IN) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('the report needs matplotlib: pip install "ddp_eval[report]"') from None
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    axes = figure.subplots(panels or 1, 1, squeeze=False)[:, 0]
    for one in axes:
        one.set_facecolor("none")
        for name, spine in one.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(_MUTED)
        one.tick_params(which="both", colors=_INK, labelsize=9)
        one.xaxis.label.set(color=_INK, size=9)
        one.yaxis.label.set(color=_INK, size=9)
        one.set_axisbelow(True)
    return figure, axes if panels else axes[0]


def _legend(axes: Any, columns: int) -> None:
    options = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": columns, "frameon": False, "fontsize": 9}
    axes.legend(**options, labelcolor=_INK, handlelength=1.2, columnspacing=1.2)


def _to_svg(figure: Any) -> str:
    """The <svg> element alone. Text stays text; the same figure gives the same bytes."""
    import matplotlib

    figure.patch.set_alpha(0)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ddp_eval", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" class="plot">', svg, count=1)
    return re.sub(r"<[^>]*>|[^<]+", lambda match: _restyle(match[0]) if match[0].startswith("<") else match[0], svg)


def _restyle(part: str) -> str:
    """A tag with the page's font and colours."""
    part = re.sub(r"font: ([^;\"]*?)'[^;\"]*", lambda match: "font: " + match[1] + "sans-serif", part)
    return re.sub("|".join(_VARIABLES), lambda match: f"var(--{_VARIABLES[match[0]]})", part)
