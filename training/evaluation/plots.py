"""Plots of sweeps and of the best of N takes: a PNG for each metric and listener."""

import io
import math
from pathlib import Path

import numpy as np

from pipeline_tango.sound_files import write_atomically

from .report import METRICS


# column -> (label, logarithmic)
SWEPT_COLUMNS = {
    "num_inference_steps": ("Denoising steps", True),
    "guidance_scale": ("Guidance scale", False),
    "seconds_per_clip": ("Seconds per clip", True),
}


def draw_plots(tables, listener, rank_by, folder):
    """Plot each metric against steps, guidance scale and seconds per clip, where those vary, and against the number of
    candidates. Needs matplotlib.

    Args:
        tables (`Tables`): the figures.
        rank_by (`str`, *optional*): name of the listener that ranked the takes.

    Returns:
        `list[Path]`: `METRIC_LISTENER.png` in `folder`.
    """
    from matplotlib.figure import Figure as Canvas

    rows, candidates = (
        [row for row in tables.rows[table] if row["listener"] == listener] for table in ("results", "candidates")
    )
    swept = [name for name in SWEPT_COLUMNS if len({row[name] for row in rows if row[name] is not None}) > 1]
    if swept == ["seconds_per_clip"]:  # the models differ, not the settings
        swept = []
    paths = []
    for metric, (heading, higher_is_better, _) in METRICS.items():
        points = [row for row in rows if row["metric"] == metric and row["scheduler"]]
        panels = swept if points else []
        ranked = [row for row in candidates if row["metric"] == metric]
        if not panels and not ranked:
            continue
        canvas = Canvas(figsize=(5.2 * (len(panels) + bool(ranked)), 4), layout="constrained")
        all_axes = canvas.subplots(1, len(panels) + bool(ranked), squeeze=False)[0]
        for axes, name in zip(all_axes, panels):
            draw_sweep(axes, points, name)
        if ranked:
            draw_candidates(all_axes[-1], ranked, rank_by)
        real = [row for row in rows if row["metric"] == metric and row["system"].startswith("real recordings")]
        for axes in all_axes:
            if real:
                axes.axhline(real[0]["value"], color="black", linestyle="--", linewidth=1, label="real recordings")
            axes.set_ylabel(f"{heading} ({'higher' if higher_is_better else 'lower'} is better)")
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=8)
        canvas.suptitle(f"{heading}, measured by {listener}")
        content = io.BytesIO()
        canvas.savefig(content, format="png", dpi=120)
        path = Path(folder) / f"{metric}_{listener}.png"
        write_atomically(path, content.getvalue())
        paths.append(path)
    return paths


def draw_sweep(axes, points, name):
    """Values against the column `name`, a line for each combination of what else varies."""
    fixed = [each for each in ("model", "scheduler", "num_inference_steps", "guidance_scale") if each != name]
    if name == "seconds_per_clip":  # one line through all numbers of steps, each at its own time
        fixed.remove("num_inference_steps")
    varying = [each for each in fixed if len({row[each] for row in points}) > 1]
    lines = {}
    for row in points:
        lines.setdefault(tuple(row[each] for each in varying), []).append(row)
    for key, line in lines.items():
        label = ", ".join(describe(each, value) for each, value in zip(varying, key))
        draw_line(axes, sorted(line, key=lambda row: row[name] or 0), name, label)
    label, logarithmic = SWEPT_COLUMNS[name]
    axes.set_xlabel(label)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="minor", labelsize=7)
    if name == "num_inference_steps":
        steps = sorted({row[name] for row in points})
        axes.set_xticks(steps, labels=map(str, steps))
        axes.minorticks_off()


def draw_candidates(axes, ranked, rank_by):
    """Values of the best take against the number of takes, a line for each system."""
    for system in dict.fromkeys(row["system"] for row in ranked):
        line = [row | {"n": int(row["num_candidates"])} for row in ranked if row["system"] == system]
        draw_line(axes, line, "n", system)
    axes.set_xlabel(f"Number of candidates (ranked by {rank_by})")
    axes.set_xticks(sorted({int(row["num_candidates"]) for row in ranked}))


def draw_line(axes, rows, name, label):
    rows = [row for row in rows if row[name] is not None and math.isfinite(row["value"])]
    x = [row[name] for row in rows]
    value, low, high = (np.array([row[each] for row in rows], float) for each in ("value", "low", "high"))
    reach = np.nan_to_num(np.maximum([value - low, high - value], 0))
    axes.errorbar(x, value, yerr=reach, marker="o", markersize=4, capsize=3, linewidth=1.5, label=label or None)


def describe(name, value):
    if name == "guidance_scale":
        return f"guidance {value:g}"
    if name == "num_inference_steps":
        return f"{value} steps"
    return Path(value).name if name == "model" else str(value)
