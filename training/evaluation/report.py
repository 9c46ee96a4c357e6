"""Tables of figures: CSV files, and `results.md` with the settings that they were computed with."""

import csv
import io
import math
from pathlib import Path

from pipeline_tango.sound_files import write_atomically

from .metrics import interval, probability_better


# name -> (heading, higher is better, digits after the point)
METRICS = {
    "frechet": ("Frechet distance", False, 3),
    "kernel": ("Kernel distance", False, 3),
    "kl_softmax": ("KL (softmax)", False, 3),
    "kl_sigmoid": ("KL (sigmoid)", False, 3),
    "kl_sigmoid_original": ("KL (sigmoid, audioldm_eval's)", False, 3),
    "inception": ("Inception score", True, 3),
    "clap": ("CLAP score", True, 3),
    "recall": ("Class recall", True, 3),
    "sequence_recall": ("All events heard", True, 3),
    "order": ("In order", True, 3),
    "order_heard": ("In order where all are heard", True, 3),
    "begin_order": ("Begin in order", True, 3),
    "begin_order_heard": ("Begin in order where all are heard", True, 3),
    "nearest": ("Similarity to the nearest training recording", False, 3),
}
# metrics that depend on the number of distinct clips, of which a resample has fewer: their intervals are centred
CENTRED = {"frechet", "inception"}
SYSTEM_COLUMNS = ("system", "model", "scheduler", "num_inference_steps", "guidance_scale", "seconds_per_clip")
FIGURE_COLUMNS = ("listener", "metric", "value", "low", "high", "num_clips", "note")


class Tables:
    """Rows of figures, by table: `results`, `groups`, `candidates` and `comparison`."""

    def __init__(self, confidence):
        self.confidence = confidence
        self.rows = {"results": [], "groups": [], "candidates": [], "comparison": []}

    def add(self, table, system, group, listener, figures):
        row = {name: getattr(system, "name" if name == "system" else name) for name in SYSTEM_COLUMNS}
        if group:
            row["num_candidates" if table == "candidates" else "group"] = group
        for metric, figure in figures.items():
            low, high = interval(figure.value, figure.resampled, self.confidence, metric in CENTRED)
            values = (listener, metric, figure.value, low, high, figure.num_clips, figure.note)
            self.rows[table].append(row | dict(zip(FIGURE_COLUMNS, values, strict=True)))

    def compare(self, baseline, other, listener, before, after):
        """Add the paired differences of `other` from `baseline`, whose figures are `after` and `before`."""
        for metric in before:
            if metric not in after:
                continue
            first, second = before[metric], after[metric]
            difference = second.value - first.value
            resampled, centred = second.resampled - first.resampled, metric in CENTRED
            low, high = interval(difference, resampled, self.confidence, centred)
            probability = probability_better(difference, resampled, METRICS[metric][1], centred)
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
                    "probability_that_system_is_better": probability,
                    "num_clips": second.num_clips,
                }
            )

    def write_csv(self, folder):
        """Write `TABLE.csv` of each table, and remove that of an earlier run where a table is empty."""
        for table, rows in self.rows.items():
            path = Path(folder) / f"{table}.csv"
            if rows:
                write_atomically(path, as_csv(rows).encode())
            else:
                path.unlink(missing_ok=True)


def as_csv(rows):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def describe_run(
    tables, systems, extractor, settings, *, prompts, references, batch_size, num_problems, own_values=()
):
    """The settings that the figures were computed with, as a list in Markdown.

    Args:
        extractor (`FeatureExtractor`), settings (`MetricSettings`): as the figures were computed with.
        prompts, references (`str`, *optional*): where the lists come from.
        batch_size (`int`): of the generation.
        own_values (`list[str]`, *optional*): of `num_inference_steps` and `guidance_scale`, those that were each
            model's own.
    """
    counts = ", ".join(f"{system.name} {len(system.sounds)}" for system in systems[:8])
    more = f" and {len(systems) - 8} more" if len(systems) > 8 else ""
    lines = [f"- Sounds: {counts}{more}."]
    lines += [f"- Prompts: {prompts or 'none'}. References: {references or 'none'}."]
    generated = [system for system in systems if system.scheduler and own_values]
    if own := {system.model: [f"{name} {getattr(system, name):g}" for name in own_values] for system in generated}:
        told = "; ".join(f"{model} {', '.join(values)}" for model, values in own.items())
        lines += [f"- Not asked for, so the models' own: {told}."]
    for name, listener in extractor.listeners.items():
        lines += [f"- `{name}`: weights {Path(listener.weights).name}, sha256 `{listener.checksum[:16]}`."]
    level = "scaled to the same peak" if extractor.level == "peak" else "at its own level"
    lines += [f"- Input of the listeners: the first {extractor.max_length_in_s:g} s of each sound, {level}."]
    lines += [
        f"- In brackets: {100 * tables.confidence:g}% bootstrap intervals, {settings.num_resamples} resamples of "
        "prompts and of references. Distances and KL: lower is better. The other metrics: higher is better."
    ]
    results = tables.rows["results"]
    if any(row["metric"] == "recall" for row in results):
        lines += [
            "- Class recall: share of the sounds for which a label of the prompt is among the "
            f"{settings.recall_k} most probable classes."
        ]
    if any(row["metric"] == "sequence_recall" for row in results):
        lines += [
            "- Of prompts that name several events: the share of the sounds in which each event is among the "
            f"{settings.recall_k} most probable classes. Of those that name an order: the share in which the events "
            "are in it, by the mean times of their class probabilities, and by when these reach half of their peaks."
        ]
    if any(row["metric"] == "nearest" for row in results):
        lines += [
            "- Similarity to the nearest training recording: the largest cosine of a sound's embedding and that of a "
            "training recording, on average. 1 is a copy; recordings that were not trained on show what to expect."
        ]
    if any(row["seconds_per_clip"] for row in results):
        devices = ", ".join(sorted({each for system in systems for each in system.devices}))
        lines += [
            f"- Seconds per clip: median compute time on {devices}, in batches of {batch_size}, without loading."
        ]
    if num_problems:
        lines += [
            f"- {num_problems} sounds, prompts or references are unpaired, unreadable or silent: `problems.json`."
        ]
    return lines


def as_markdown(tables, description, listeners, rank_by, pictures, command):
    """The text of `results.md`.

    Args:
        description (`list[str]`): from `describe_run`.
        listeners (`list[str]`): names of those that have tables of their own.
        rank_by (`str`, *optional*): name of the listener that ranked the takes.
        pictures (`dict[str, list[Path]]`): plots by listener, beside the text.
        command (`str`): the command line.
    """
    lines = ["# Evaluation", "", *description]
    for listener in listeners:
        lines += markdown_table(tables, "results", listener, f"Measured by {listener}", ["system"])
        lines += [f"![{path.stem}]({path.name})\n" for path in pictures.get(listener, [])]
        title = f"By group, measured by {listener}"
        lines += markdown_table(tables, "groups", listener, title, ["group", "system"])
        title = f"Best of N by {rank_by}, measured by {listener}"
        lines += markdown_table(tables, "candidates", listener, title, ["system", "num_candidates"])
        if rank_by == listener:
            lines += [f"{listener} ranked these takes itself, so its figures are biased in their favour.", ""]
    if tables.rows["comparison"]:
        headings = "| | listener | metric | baseline | system | difference | probability of being better |"
        lines += ["", "## Comparison", "", headings]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in tables.rows["comparison"]:
            heading, _, digits = METRICS[row["metric"]]
            lines += [
                f"| {row['system']} against {row['baseline']} | {row['listener']} | {heading} "
                f"| {row['baseline_value']:.{digits}f} | {row['value']:.{digits}f} "
                f"| {with_interval(row | {'value': row['difference']}, digits, '+')} "
                f"| {100 * row['probability_that_system_is_better']:.0f}% |"
            ]
    lines += ["", f"    {command}", ""]
    return "\n".join(lines)


def markdown_table(tables, table, listener, title, keys):
    """Lines of one table: a row for each combination of `keys`, a column for each metric, notes below."""
    rows = [row for row in tables.rows[table] if row["listener"] == listener]
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
    if table == "groups":
        by_key = dict(sorted(by_key.items(), key=lambda pair: pair[0][0]))
    for key, figures in by_key.items():
        cells = [*key, str(max(row["num_clips"] for row in figures.values()))]
        if timed:
            seconds = next(iter(figures.values()))["seconds_per_clip"]
            cells += [f"{seconds:.3g}" if seconds else ""]
        for metric in metrics:
            row = figures.get(metric)
            if row is None:
                cells += [""]
                continue
            mark = f" ({notes.setdefault(row['note'], len(notes) + 1)})" if row["note"] else ""
            cells += [with_interval(row, METRICS[metric][2]) + mark]
        lines += [f"| {' | '.join(cells)} |"]
    return [*lines, "", *[f"({number}) {note}.  " for note, number in notes.items()], ""]


def with_interval(row, digits, sign=""):
    value = f"{row['value']:{sign}.{digits}f}"
    return (
        value if math.isnan(row["low"]) else f"{value} [{row['low']:{sign}.{digits}f}, {row['high']:{sign}.{digits}f}]"
    )
