"""Tables and plots of what `training.evaluate` measured."""

import csv
import io
import math
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger

from pipeline_tango.sound_files import write_atomically
from training.metrics import interval, probability_better


logger = get_logger(__name__)

# name -> (heading, higher is better, digits after the point)
METRICS = {
    "frechet": ("Frechet distance", False, 3),
    "kernel": ("Kernel distance", False, 3),
    "kl_softmax": ("KL (softmax)", False, 3),
    "kl_sigmoid": ("KL (sigmoid)", False, 3),
    "kl_sigmoid_original": ("KL (sigmoid, audioldm_eval's)", False, 3),
    "inception": ("Inception score", True, 3),
    "clap": ("CLAP score", True, 3),
    "recall": ("Class recall", True, 3),  # of a right class among the --recall_k heard most
}
RESULT_COLUMNS = ("system", "model", "scheduler", "num_inference_steps", "guidance_scale", "seconds_per_clip")
# with fewer distinct clips they come out otherwise, so their resamples are moved to where the figure is
CENTRED = {"frechet", "inception"}
FIGURE_COLUMNS = ("listener", "metric", "value", "low", "high", "num_clips", "note")


class Report:
    """Tables and plots of what was measured."""

    def __init__(self, args, systems, hearing, problems):
        self.args, self.systems, self.hearing, self.problems = args, systems, hearing, problems
        self.measures, self.heard, self.real, self.scores = {}, {}, {}, {}
        self.figures = {}
        self.rows = {"results": [], "groups": [], "candidates": [], "comparison": []}

    def add(self, table, system, group, listener, figures):
        self.figures[table, system.name, group, listener] = figures
        row = {name: getattr(system, "name" if name == "system" else name) for name in RESULT_COLUMNS}
        if group:
            row["num_candidates" if table == "candidates" else "group"] = group
        for metric, figure in figures.items():
            low, high = interval(figure.value, figure.resampled, self.args.confidence, metric in CENTRED)
            values = (listener, metric, figure.value, low, high, figure.num_clips, figure.note)
            self.rows[table].append(row | dict(zip(FIGURE_COLUMNS, values, strict=True)))

    def compare(self, baseline, other, listener, before, after):
        for metric in before:
            if metric not in after:
                continue
            first, second = before[metric], after[metric]
            difference = second.value - first.value
            resampled, centred = second.resampled - first.resampled, metric in CENTRED
            low, high = interval(difference, resampled, self.args.confidence, centred)
            sure = probability_better(difference, resampled, METRICS[metric][1], centred)
            self.rows["comparison"].append(
                {
                    "baseline": baseline.name,
                    "system": other.name,
                    "listener": listener,
                    "metric": metric,
                    "baseline_value": first.value,
                    "value": second.value,
                    "difference": difference,
                    "low": low,
                    "high": high,
                    "probability_that_system_is_better": sure,
                    "num_clips": second.num_clips,
                }
            )

    def write(self):
        folder = Path(self.args.output_dir)
        for table, rows in self.rows.items():
            path = folder / f"{table}.csv"
            if rows:
                write_atomically(path, as_csv(rows).encode())
            else:
                path.unlink(missing_ok=True)
        plots = []
        if find_spec("matplotlib"):
            for listener in self.args.listener:
                plots += draw_plots(self, listener, folder)
        text = self.markdown(plots)
        write_atomically(folder / "results.md", text.encode())
        shown = text.split("## By group")[0].split("## Compared")[0].strip()
        logger.info(f"{folder / 'results.md'}:\n\n{shown}\n")

    def markdown(self, plots):
        args = self.args
        counts = ", ".join(f"{system.name} {len(system.sounds)}" for system in self.systems[:8])
        more = f" and {len(self.systems) - 8} more" if len(self.systems) > 8 else ""
        lines = ["# Measured sounds", ""]
        lines += [
            f"- Sounds: {counts}{more}.",
            f"- Prompts: {args.prompts or 'none'}. References: {args.references or 'none'}.",
        ]
        for name in dict.fromkeys([*args.listener, *([args.rank_by] if args.rank_by else [])]):
            listener = self.hearing.listeners[name]
            lines += [f"- `{name}`: weights {Path(listener.weights).name}, sha256 `{listener.checksum[:16]}`."]
        lines += [
            f"- Heard: the first {self.hearing.max_length_in_s:g} s of each, "
            + ("all at the same peak." if args.level == "peak" else "at its own level.")
        ]
        lines += [
            f"- In brackets: {100 * args.confidence:g}% bootstrap intervals, {args.num_resamples} resamples of "
            "prompts and of references. Distances and KL: lower is better. The others: higher is better."
        ]
        if any(row["metric"] == "recall" for row in self.rows["results"]):
            lines += [f"- Class recall: a label of the prompt is among the {args.recall_k} classes heard most."]
        if any(row["seconds_per_clip"] for row in self.rows["results"]):
            devices = ", ".join(sorted({each for system in self.systems for each in system.devices}))
            lines += [
                f"- Seconds per clip: the median, on {devices}, in batches of {args.batch_size}, without loading."
            ]
        if self.problems:
            lines += [f"- {len(self.problems)} sounds, prompts or references are unpaired or broken: `problems.json`."]
        for listener in args.listener:
            lines += self.table("results", listener, f"Heard by {listener}", ["system"])
            lines += [f"![{path.stem}]({path.name})\n" for path in plots if path.stem.endswith(f"_{listener}")]
            lines += self.table("groups", listener, f"By group, heard by {listener}", ["group", "system"])
            lines += self.table(
                "candidates",
                listener,
                f"Best of N by {args.rank_by}, heard by {listener}",
                ["system", "num_candidates"],
            )
            if args.rank_by == listener:
                lines += [f"{listener} chose these takes itself: it is bound to like them.", ""]
        if self.rows["comparison"]:
            lines += ["", "## Compared", "", "| | listener | metric | baseline | here | difference | better with |"]
            lines += ["|---|---|---|---|---|---|---|"]
            for row in self.rows["comparison"]:
                heading, _, digits = METRICS[row["metric"]]
                lines += [
                    f"| {row['system']} against {row['baseline']} | {row['listener']} | {heading} "
                    f"| {row['baseline_value']:.{digits}f} | {row['value']:.{digits}f} "
                    f"| {with_interval(row | {'value': row['difference']}, digits, '+')} "
                    f"| {100 * row['probability_that_system_is_better']:.0f}% |"
                ]
        lines += ["", "    python -m training.evaluate " + shlex.join(sys.argv[1:]), ""]
        return "\n".join(lines)

    def table(self, table, listener, title, keys):
        rows = [row for row in self.rows[table] if row["listener"] == listener]
        if not rows:
            return []
        metrics = [metric for metric in METRICS if any(row["metric"] == metric for row in rows)]
        timed = table == "results" and any(row["seconds_per_clip"] for row in rows)
        headings = [*keys, "clips", *(["s per clip"] if timed else []), *[METRICS[metric][0] for metric in metrics]]
        lines = ["", f"## {title}", "", f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
        notes = {}
        by_key = {}
        for row in rows:
            by_key.setdefault(tuple(row.get(key, "") for key in keys), {})[row["metric"]] = row
        for key, figures in (
            sorted(by_key.items(), key=lambda pair: pair[0][0]) if table == "groups" else by_key.items()
        ):
            any_row = next(iter(figures.values()))
            cells = [*key, str(max(row["num_clips"] for row in figures.values()))]
            if timed:
                cells += [f"{any_row['seconds_per_clip']:.3g}" if any_row["seconds_per_clip"] else ""]
            for metric in metrics:
                row = figures.get(metric)
                if row is None:
                    cells += [""]
                    continue
                digits = METRICS[metric][2]
                mark = f" ({notes.setdefault(row['note'], len(notes) + 1)})" if row["note"] else ""
                cells += [with_interval(row, digits) + mark]
            lines += [f"| {' | '.join(cells)} |"]
        return [*lines, "", *[f"({number}) {note}.  " for note, number in notes.items()], ""]


def with_interval(row, digits, sign=""):
    value = f"{row['value']:{sign}.{digits}f}"
    return (
        value if math.isnan(row["low"]) else f"{value} [{row['low']:{sign}.{digits}f}, {row['high']:{sign}.{digits}f}]"
    )


def as_csv(rows):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw_plots(report, listener, folder):
    """A PNG for each metric: against steps, guidance and seconds per clip, where those vary. Returns the paths."""
    from matplotlib.figure import Figure as Canvas

    axes_of = {
        "num_inference_steps": ("Denoising steps", True),
        "guidance_scale": ("Guidance scale", False),
        "seconds_per_clip": ("Seconds per clip", True),
    }
    rows = [row for row in report.rows["results"] if row["listener"] == listener]
    swept = [name for name in axes_of if len({row[name] for row in rows if row[name] is not None}) > 1]
    if swept == ["seconds_per_clip"]:  # models, not settings
        swept = []
    candidates = [row for row in report.rows["candidates"] if row["listener"] == listener]
    paths = []
    for metric, (heading, higher, _) in METRICS.items():
        points = [row for row in rows if row["metric"] == metric and row["scheduler"]]
        panels = swept if points else []
        ranked = [row for row in candidates if row["metric"] == metric]
        if not panels and not ranked:
            continue
        canvas = Canvas(figsize=(5.2 * (len(panels) + bool(ranked)), 4), layout="constrained")
        all_axes = canvas.subplots(1, len(panels) + bool(ranked), squeeze=False)[0]
        real = [row for row in rows if row["metric"] == metric and row["system"].startswith("real recordings")]
        for axes, name in zip(all_axes, panels):
            fixed = [each for each in ("model", "scheduler", "num_inference_steps", "guidance_scale") if each != name]
            if name == "seconds_per_clip":  # a line through the steps, each at its own time
                fixed.remove("num_inference_steps")
            varying = [each for each in fixed if len({row[each] for row in points}) > 1]
            lines = {}
            for row in points:
                lines.setdefault(tuple(row[each] for each in varying), []).append(row)
            for key, line in lines.items():
                label = ", ".join(describe(each, value) for each, value in zip(varying, key))
                draw_line(axes, sorted(line, key=lambda row: row[name] or 0), name, label)
            label, logarithmic = axes_of[name]
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
        if ranked:
            axes = all_axes[-1]
            for system in dict.fromkeys(row["system"] for row in ranked):
                line = [row | {"n": int(row["num_candidates"])} for row in ranked if row["system"] == system]
                draw_line(axes, line, "n", system)
            axes.set_xlabel(f"Takes to choose from (by {report.args.rank_by})")
            axes.set_xticks(sorted({int(row["num_candidates"]) for row in ranked}))
        for axes in all_axes:
            if real:
                axes.axhline(real[0]["value"], color="black", linestyle="--", linewidth=1, label="real recordings")
            axes.set_ylabel(f"{heading} ({'higher' if higher else 'lower'} is better)")
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=8)
        canvas.suptitle(f"{heading}, heard by {listener}")
        content = io.BytesIO()
        canvas.savefig(content, format="png", dpi=120)
        path = folder / f"{metric}_{listener}.png"
        write_atomically(path, content.getvalue())
        paths.append(path)
    return paths


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
